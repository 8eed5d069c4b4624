"""The process of one submission: run its cells and the checks, and tell the grader the results.

On Linux this is two processes. The first one supervises: it waits for the second, which runs the
submission, and then ends everything that came of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilora.exercises import outcome
from minilora.exercises.authorship import foreign
from minilora.exercises.cells import Session, read_cells
from minilora.exercises.grade import CHECKS, EXERCISES, MAX_TEXT, exercise_numbers, signature
from minilora.exercises.restore import snapshot

MAX_MEMORY = 8 << 30  # bytes, for the process of one file
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # from <linux/prctl.h>
Send = Callable[..., None]


# ---- The processes


def supervise() -> None:
    """Return in a process whose descendants all end with it, or when standard input is closed."""
    watched, nothing = os.dup(0), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    if sys.platform != "linux" or not hasattr(os, "fork"):
        _when_closed(watched, _end_group)
        return
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process
    child = os.fork()
    if not child:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(watched)
        return
    _when_closed(watched, lambda: os.kill(child, signal.SIGKILL))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _end_descendants()
    os._exit(status if status >= 0 else 128 - status)  # as shells show a signal


def _prctl(option: int, value: int) -> None:
    """Set an attribute of this process, where that is possible."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _when_closed(pipe: int, call: Callable[[], None]) -> None:
    """Call a function when a pipe is closed at its other end."""

    def wait() -> None:
        os.read(pipe, 1)
        call()

    threading.Thread(target=wait, daemon=True).start()


def _end_group() -> None:
    """End this process and those in its group, where there are groups."""
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def _end_descendants() -> None:
    """Kill all children of this process until there are none: theirs become its own."""
    while True:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended since
                parent = stat.read_bytes().rpartition(b")")[2].split()[1]
                if int(parent) == os.getpid():
                    os.kill(int(stat.parent.name), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def sender(pipe: int, key: bytes) -> Send:
    """Return a function that sends a message to the grader."""
    numbers, process = itertools.count(), os.getpid()

    def send(*message: Any) -> None:
        if os.getpid() != process:  # the submission has forked, and this is its copy of the grader
            os._exit(0)
        payload = json.dumps(message).encode()
        os.write(pipe, signature(key, next(numbers), payload) + b" " + payload + b"\n")

    return send


# ---- The submission


def judge(name: str, data: bytes, send: Send) -> None:
    """Run the cells of a file, then the checks; send the results."""
    try:
        cells, number = read_cells(data, Path(name).suffix)
    except ValueError as error:
        send("end", str(error)[:MAX_TEXT])
        return
    send("exercise", number, [])  # which is all that is known if the file never ends
    session = Session()
    restore = snapshot()
    outcome.after_call = restore
    for i, source in enumerate(cells):
        session.run(source, f"<cell {i + 1}>" if len(cells) > 1 else name)
    restore()
    number, wanted = wanted_checks(number, Path(name).stem, session)
    send("exercise", number, list(wanted))
    for check, defined in wanted.items():
        passed, message = run_check(check, defined, session)
        restore()
        send("check", check, passed, message[:MAX_TEXT])
    send("end", "" if wanted else session.raised[:MAX_TEXT])


def wanted_checks(
    number: int | None, stem: str, session: Session
) -> tuple[int | None, dict[str, str]]:
    """Return the exercise of a file, if it has only one, and the checks that it must pass."""

    def answered(also_foreign: bool) -> dict[int, dict[str, str]]:
        return {
            n: checks for n, checks in EXERCISES.items() if any(
                name in session.scope
                and (also_foreign or not foreign(session.scope[name], session.names))
                for name in checks.values())
        }

    found = answered(False) or answered(True)
    if number is None:  # a number in the file's name counts if it fits, or if nothing else does
        number = next((n for n in exercise_numbers(stem) if n in found or not found), None)
    return number, EXERCISES.get(number or 0) or {
        check: name for checks in found.values() for check, name in checks.items()
    }


def run_check(check: str, defined: str, session: Session) -> tuple[bool, str]:
    """Run one check; return whether it passed, and its message."""
    if defined not in session.scope:
        return False, f"{defined} is not defined. {session.raised}".strip()
    answer = session.scope[defined]
    try:
        if whose := foreign(answer, session.names):
            return False, f"{defined} is imported, not defined in the file: {whose}."
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever the submission has set
            return True, repr(CHECKS[check](answer))
    except outcome.CheckFailed as failure:
        return False, str(failure)
    except BaseException as error:
        return False, outcome.describe_exception(error)


def hide_exercises() -> None:
    """Take the exercises out of the loaded modules: a submission that imports them gets others."""
    for name in [name for name in sys.modules if name.startswith("minilora.exercises")]:
        del sys.modules[name]
    del vars(sys.modules["minilora"])["exercises"]


def main() -> None:
    """Run the submission that is on standard input, and send the results to standard output."""
    key, name, data = pickle.load(sys.stdin.buffer)
    pipe = os.dup(1)
    supervise()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    hide_exercises()
    judge(name, data, sender(pipe, key))
    os._exit(0)  # without what the submission has left for the end, such as threads


if __name__ == "__main__":
    main()
