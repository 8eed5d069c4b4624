"""Grade submitted files: `minilora check`, with files and folders of them.

Each file runs in its own process (`submission.py`), which tells this one the result of each check
over a pipe. The rows are written here. This is not a sandbox: run untrusted code only where it can
do no harm. tests/exercises/test_defence.py has a test for each of these lines.

Defended against:

- A file that hangs, crashes, exits, floods its output or the pipe, or cannot be read costs its own
  row only, and no more than the time limit.
- Only the grader's own messages count: each is signed with a key that the submission is not given,
  and a message that is not signed costs the file all its points.
- No row changes because another file was overwritten: all are read before any is run.
- What a submission replaces in Python's builtins, in NumPy, in minilora or in the checks is put
  back before its answer is judged, and after each call of it.
- The processes that a submission starts end with it, whatever they ignore and wherever they hide;
  and with the grader, if that is killed. Outside Linux, only those in its process group do, and on
  Windows, which has no such groups, none.
- The reference, or another function or class of minilora, given as the answer is not right, in
  whatever `functools` or a class wraps it: the code must be the file's own.

Not defended against:

- An answer that calls or copies minilora's code in a function of its own.
- Code that looks for the key or the checks in the memory of its own process.
- Code that uses what the user may use: files, the network, processors and disks without end, and
  other processes, such as the one that supervises it; outside Linux, memory without end, too.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from minilora.exercises import (
    e01_linear,
    e02_cross_entropy,
    e03_lora_forward,
    e04_lora_backward,
    e05_replace_linear,
    e06_adamw,
    e07_layer_norm,
    e08_attention,
    e09_merging,
    e10_counting,
    e11_training,
    e12_diagnosis,
)
from minilora.files.safetensors import printable

MODULES = (
    e01_linear, e02_cross_entropy, e03_lora_forward, e04_lora_backward, e05_replace_linear,
    e06_adamw, e07_layer_norm, e08_attention, e09_merging, e10_counting, e11_training,
    e12_diagnosis,
)
# {number of the exercise: {name of the check: the name that a submission must define}}
EXERCISES: dict[int, dict[str, str]] = {module.NUMBER: module.DEFINED for module in MODULES}
CHECKS = {name: getattr(module, name) for module in MODULES for name in module.DEFINED}
MAX_FILE_SIZE = 2_000_000  # bytes
MAX_TEXT = 10_000  # characters of a message
MAX_LINE = 13 * MAX_TEXT  # bytes of a line on the pipe: JSON has up to 12 for a character
# A spreadsheet computes a cell that starts like this, in wide letters, too. Where a semicolon
# separates cells, each part is a cell.
FORMULA = re.compile(r'(^|;)(?=[\s"]*[=+\-@＝＋－＠])')


def grade(
    paths: str | Path | Iterable[str | Path], seconds: float = 30.0
) -> list[dict[str, Any]]:
    """Grade files, and every .py and .ipynb file below folders.

    Parameters
    ----------
    paths
        A file or folder, or several. A file that is reached twice is graded once; a link to it
        is a file of its own.
    seconds
        Time limit for one file.

    Returns
    -------
    list of dict
        A row for each file: "file", "exercise" (a number or None), "checks" (a list of rows
        with "check", "passed" and "message"), "passed", "total", and "error" ("" or the reason
        why the file could not be graded).

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If a file is neither .py nor .ipynb, or a folder contains no such file.
    """
    files: dict[str, Path] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        for file in _files(Path(path)):
            files.setdefault(os.path.normcase(os.path.abspath(file)), file)
    contents = [_read(file) for file in files.values()]  # before any code can change one
    return [_grade_file(*item, seconds) for item in zip(files.values(), contents, strict=True)]


def _files(path: Path) -> list[Path]:
    """Return the files that a path given by the user stands for."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir() and path.suffix not in (".py", ".ipynb"):
        raise ValueError(f"{path} is neither a notebook (.ipynb) nor Python (.py)")
    files = [path] if not path.is_dir() else sorted(
        f for f in path.rglob("*") if f.suffix in (".py", ".ipynb") and not f.is_dir()
        and not any(part.startswith(".") for part in f.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"there is no .py or .ipynb file in {path}")
    return files


def is_complete(row: dict[str, Any]) -> bool:
    """Return whether a file passed every check."""
    return row["passed"] == row["total"] > 0 and not row["error"]


def exercise_numbers(name: str) -> list[int]:
    """Return the numbers of exercises in a name: [4] for "smith_04_lora_backward"."""
    digits = map(int, re.findall(r"(?<!\d)(\d{1,2})(?!\d)", name))
    return [number for number in digits if number in EXERCISES]


def _read(path: Path) -> bytes | str:
    """Return the contents of a file, or the reason why there are none."""
    try:
        if not path.is_file():  # opening a FIFO would wait, and a device may have no end
            return "it is not a regular file"
        with path.open("rb") as file:
            data = file.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return data if len(data) <= MAX_FILE_SIZE else \
        f"the file has more than {MAX_FILE_SIZE:,} bytes"


# ---- The process of a file


def signature(key: bytes, number: int, payload: bytes) -> bytes:
    """Return what stands before message `number` of a process, to show that we wrote it."""
    return hashlib.blake2b(b"%d %b" % (number, payload), key=key).hexdigest().encode()


def _run(name: str, data: bytes, seconds: float) -> tuple[list[Any], str]:
    """Run a file in its own process; return its messages, and an error or ""."""
    key, messages = os.urandom(32), []
    folder = tempfile.mkdtemp()
    process = subprocess.Popen(
        [sys.executable, "-m", "minilora.exercises.submission"], cwd=folder,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        # On Windows, a console of its own: a submission can send Ctrl-C to all in its console.
        start_new_session=True, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
                          "PYTHONIOENCODING": "utf-8:backslashreplace",  # notebooks print any text
                          "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )
    assert process.stdin and process.stdout
    # A thread, since reading can wait for ever, and select() knows no pipes on Windows.
    reader = threading.Thread(target=_receive, args=(process.stdout, key, messages), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(OSError):
            pickle.dump((key, name, data), process.stdin)
            process.stdin.flush()
        end = time.monotonic() + seconds
        while reader.is_alive() and time.monotonic() < end:
            reader.join(0.1)  # in short pieces, since on Windows Ctrl-C does not interrupt one
        late = reader.is_alive()
    finally:
        _end(process)
        with contextlib.suppress(OSError, RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
    if late:
        return list(messages), f"stopped after {seconds:g} seconds: an endless loop?"
    if messages and messages[-1] is None:
        return [], "something other than the grader wrote its results: none of them counts"
    if not messages or messages[-1][0] != "end":
        return messages, f"the process died (status {process.returncode})"
    return messages, messages[-1][1]


def _receive(pipe: IO[bytes], key: bytes, messages: list[Any]) -> None:
    """Append the messages on the pipe, up to "end", and None for one that is not ours."""
    with pipe:
        for number in range(len(CHECKS) + 3):  # two for the exercise, and the end
            line = pipe.readline(MAX_LINE)
            if not line:
                return
            sign, _, payload = line.rstrip(b"\r\n").partition(b" ")
            messages.append(_message(payload) if sign == signature(key, number, payload) else None)
            if messages[-1] is None or messages[-1][0] == "end":
                return


def _message(payload: bytes) -> Any:
    """Return a message, or None if it is not one that `submission.py` sends."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    match message:
        case ["exercise", None | int() as number, [*names]] if (
            number in (None, *EXERCISES) and all(name in [*CHECKS] for name in names)
        ):
            return message
        case ["check", str(name), bool(), str(text)] if name in CHECKS and len(text) <= MAX_TEXT:
            return message
        case ["end", str(text)] if len(text) <= MAX_TEXT:
            return message
    return None


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    assert process.stdin
    with contextlib.suppress(OSError):
        process.stdin.close()  # which the process watches, to do it itself
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    kill = getattr(signal, "SIGKILL", signal.SIGTERM)  # which Windows does not have
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kill)
    process.send_signal(kill)
    process.wait()


# ---- Rows


def _grade_file(path: Path, contents: bytes | str, seconds: float) -> dict[str, Any]:
    """Run one file and return its row."""
    if isinstance(contents, str):
        messages, error = [], contents
    else:
        messages, error = _run(path.name, contents, seconds)
    number, wanted, done = None, [], {}
    for message in messages:
        match message:
            case ["exercise", number, wanted]:
                pass
            case ["check", name, passed, text]:
                done[name] = {"check": name, "passed": passed, "message": text}
    number = number or next(iter(exercise_numbers(path.stem)), None)
    # A failed check for each one that was not reached.
    checks = [done.get(name, {"check": name, "passed": False, "message": error})
              for name in wanted or EXERCISES.get(number or 0, {})]
    if not checks and not error:
        error = "it defines nothing that an exercise asks for"
    return {"file": str(path), "exercise": number, "checks": checks,
            "passed": sum(check["passed"] for check in checks), "total": len(checks),
            "error": error}


def report(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text: a single file in full, several files as a table.

    What would move the cursor or break the terminal, in names and messages, is escaped.
    """
    body = _full(rows[0]) if len(rows) == 1 else _table(rows)
    done = sum(map(is_complete, rows))
    body.append(f"{done} of {len(rows)} {'file is' if len(rows) == 1 else 'files are'} complete")
    return "\n".join(map(printable, body))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table, one for each file."""
    cells = [("file", "exercise", "passed", "first thing to look at")]
    cells += [(row["file"], str(row["exercise"] or "?"), f"{row['passed']} of {row['total']}",
               _first_message(row)[:90]) for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in cells]


def _first_message(row: dict[str, Any]) -> str:
    """Return the line that says what to look at first; "" if the file is complete."""
    first = next((item["message"] for item in row["checks"] if not item["passed"]), "")
    lines = (row["error"] or first).split("\n")
    return lines[1] if len(lines) > 1 and lines[0].endswith("not yet.") else lines[0]


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Return the rows as CSV for a spreadsheet, a line for each file below a line of names.

    Names and messages come from learners. What a spreadsheet would take for a formula gets an
    apostrophe before it, what `report` escapes is escaped, and long messages are cut.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "exercise", "passed", "total", "complete", "message"])
    for row in rows:
        file, message = (FORMULA.sub(r"\1'", printable(text)) for text in
                         (row["file"], _first_message(row)[:500]))
        writer.writerow([file, row["exercise"], row["passed"], row["total"],
                         int(is_complete(row)), message])
    return table.getvalue().removesuffix("\n")


def _full(row: dict[str, Any]) -> list[str]:
    """Return the lines that show one file, with every message in full."""
    lines = [f"{row['file']}: {row['passed']} of {row['total']} checks passed"]
    if row["error"]:
        lines.append(f"  {row['error']}")
    for item in row["checks"]:
        lines.append(f"  {'passed' if item['passed'] else 'failed'}  {item['check']}")
        if item["message"] and not item["passed"]:
            lines += [f"    {line}" for line in item["message"].split("\n")]
    return lines
