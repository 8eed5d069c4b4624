"""Grade submitted files: `minilora check FILE` or a folder of them.

Each file runs in its own process with a time limit, so that an endless loop or a crash
affects only its own row. Only the functions that the file defines count: the checks are called
from here, and the check cells of the file are ignored. This is not a sandbox: run untrusted
code only where it can do no harm.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import linecache
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
from minilora.exercises.outcome import CheckFailed, describe_exception

MODULES = (
    e01_linear, e02_cross_entropy, e03_lora_forward, e04_lora_backward, e05_replace_linear,
    e06_adamw, e07_layer_norm, e08_attention, e09_merging, e10_counting, e11_training,
    e12_diagnosis,
)
# {number of the exercise: {name of the check: the name that a submission must define}}
EXERCISES: dict[int, dict[str, str]] = {module.NUMBER: module.DEFINED for module in MODULES}
CHECKS = {name: getattr(module, name) for module in MODULES for name in module.DEFINED}
MAX_FILE_SIZE = 2_000_000  # bytes
MAX_MEMORY = 8 << 30  # bytes, for the process of one file


def grade(path: str | Path, seconds: float = 30.0) -> list[dict[str, Any]]:
    """Grade a file, or every .py and .ipynb file below a folder.

    Parameters
    ----------
    path
        The file or folder.
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
        If the file is neither .py nor .ipynb, or the folder contains no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_file() and path.suffix not in (".py", ".ipynb"):
        raise ValueError(f"{path} is neither a notebook (.ipynb) nor Python (.py)")
    files = [path] if path.is_file() else sorted(
        f for f in path.rglob("*") if f.suffix in (".py", ".ipynb") and f.is_file()
        and not any(part.startswith(".") for part in f.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"there is no .py or .ipynb file in {path}")
    return [_grade_file(file, seconds) for file in files]


def _grade_file(path: Path, seconds: float) -> dict[str, Any]:
    """Run one file in its own process and return its row."""
    row: dict[str, Any] = {"file": str(path), "exercise": None, "checks": [], "passed": 0,
                           "total": 0, "error": ""}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "minilora.exercises.grade", str(path.resolve()), str(answer)],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                              "OPENBLAS_NUM_THREADS": "1"},
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            row["error"] = f"stopped after {seconds:g} seconds: an endless loop?"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and all processes that it started
            process.wait()
        if answer.exists():
            late = row["error"]
            row |= json.loads(answer.read_text())
            row["error"] = late or row["error"]
        if not row["error"] and not row.get("finished"):
            row["error"] = f"the process died (status {process.returncode})"
    _fill(row, path)
    return {key: value for key, value in row.items() if key not in ("finished", "wanted")}


def _fill(row: dict[str, Any], path: Path) -> None:
    """Complete a row: add a failed check for each one not reached, and the sums."""
    number = row["exercise"] or next(iter(exercise_numbers(path.stem)), None)
    row["exercise"] = number
    done = {item["check"] for item in row["checks"]}
    for name in row.get("wanted") or EXERCISES.get(number or 0, {}):
        if name not in done:
            row["checks"].append({"check": name, "passed": False, "message": row["error"]})
    row["total"] = len(row["checks"])
    row["passed"] = sum(item["passed"] for item in row["checks"])
    if not row["total"] and not row["error"]:
        row["error"] = "it defines nothing that an exercise asks for"


def exercise_numbers(name: str) -> list[int]:
    """Return the numbers of exercises in a name: [4] for "smith_04_lora_backward"."""
    digits = map(int, re.findall(r"(?<!\d)(\d{1,2})(?!\d)", name))
    return [number for number in digits if number in EXERCISES]


# ---- In the process of the file


def read_cells(path: Path) -> tuple[list[str], int | None]:
    """Read the code of a submission.

    Parameters
    ----------
    path
        A .py or .ipynb file.

    Returns
    -------
    list of str
        The code cells, without those that check an answer.
    int or None
        The number of the exercise, if a notebook's metadata give it.

    Raises
    ------
    ValueError
        If the file is too large, not text, or not a notebook.
    """
    if path.stat().st_size > MAX_FILE_SIZE:
        raise ValueError(f"the file has more than {MAX_FILE_SIZE:,} bytes")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return re.split(r"(?m)^# %%.*$", text) if "# %%" in text else [text], None
    try:
        notebook = json.loads(text)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        marks = [cell.get("metadata", {}).get("nbgrader", {}) for cell in cells]
        ids = [n for mark in marks for n in exercise_numbers(str(mark.get("grade_id", "")))[:1]]
        sources = ["".join(cell["source"]) for cell, mark in zip(cells, marks, strict=True)
                   if not mark.get("grade")]  # the checks in the file are ignored
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("the file is not a notebook") from None
    return sources, next(iter(ids), None)


def _run(path: Path, answer: Path) -> None:
    """Run the cells of a file, then the checks; write the row after each step."""
    row: dict[str, Any] = {"exercise": None, "checks": [], "error": ""}

    def write(**changes: Any) -> None:
        row.update(changes)
        answer.write_text(json.dumps(row))

    try:
        cells, number = read_cells(path)
    except (ValueError, OSError) as error:
        write(error=str(error), finished=True)
        return
    write(exercise=number)
    scope: dict[str, Any] = {"__name__": "submission"}
    raised = _execute(cells, path.name, scope)
    number, wanted = _wanted_checks(number, path.stem, scope)
    write(exercise=number, wanted=list(wanted))
    for name, defined in wanted.items():
        passed, message = _check(name, defined, scope, raised)
        row["checks"].append({"check": name, "passed": passed, "message": message})
        write()
    write(finished=True, error="" if wanted else raised)


def _is_own(name: str, scope: dict[str, Any]) -> bool:
    """Return whether the file defines this name itself rather than importing it."""
    return getattr(scope.get(name), "__module__", "submission") == "submission"


def _wanted_checks(
    number: int | None, stem: str, scope: dict[str, Any]
) -> tuple[int | None, dict[str, str]]:
    """Return the exercise of a file, if it has only one, and the checks that it must pass."""
    defined_here = {
        n: checks for n, checks in EXERCISES.items()
        if any(name in scope and _is_own(name, scope) for name in checks.values())
    }
    if number is None:  # a number in the file's name counts if it fits, or if nothing else does
        named = [n for n in exercise_numbers(stem) if n in defined_here or not defined_here]
        number = next(iter(named), None)
    return number, EXERCISES.get(number or 0) or {
        check: name for checks in defined_here.values() for check, name in checks.items()
    }


def _check(name: str, defined: str, scope: dict[str, Any], raised: str) -> tuple[bool, str]:
    """Run one check; return whether it passed, and its message."""
    if defined not in scope:
        return False, f"{defined} is not defined. {raised}".strip()
    if not _is_own(defined, scope):
        return False, f"{defined} is imported, not defined in the file."
    try:
        return True, repr(CHECKS[name](scope[defined]))
    except CheckFailed as failure:
        return False, str(failure)
    except (Exception, SystemExit) as error:
        return False, describe_exception(error)


def _execute(cells: list[str], file: str, scope: dict[str, Any]) -> str:
    """Run the cells in `scope`, continuing after errors; return the first real error or ""."""
    raised = ""
    for i, source in enumerate(cells):
        # A notebook's magics and shell lines are not Python.
        source = re.sub(r"(?m)^\s*[%!].*$", "", source)
        name = f"<cell {i + 1}>" if len(cells) > 1 else file
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        try:
            statements = ast.parse(source, name).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raised = raised or describe_exception(error)
            continue
        for statement in statements:  # one by one, so that a failed check does not stop the rest
            try:
                exec(compile(ast.Module([statement], []), name, "exec"), scope)
            except (CheckFailed, NotImplementedError):
                pass
            except (Exception, SystemExit) as error:
                raised = raised or describe_exception(error)
    return raised


# ---- Reports


def report(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text: a single file in full, several files as a table."""
    if len(rows) == 1:
        return _full(rows[0])
    cells = [("file", "exercise", "passed", "first thing to look at")]
    for row in rows:
        first = next((item["message"] for item in row["checks"] if not item["passed"]), "")
        text = row["error"] or first
        lines = text.split("\n")
        shown = lines[1] if len(lines) > 1 and lines[0].endswith("not yet.") else lines[0]
        cells.append((row["file"], str(row["exercise"] or "?"),
                      f"{row['passed']} of {row['total']}", shown[:90]))
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    table = [
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in cells
    ]
    done = sum(row["passed"] == row["total"] > 0 for row in rows)
    return "\n".join([*table, f"{done} of {len(rows)} files are complete"])


def _full(row: dict[str, Any]) -> str:
    """Return the row of one file, with every message in full."""
    lines = [f"{row['file']}: {row['passed']} of {row['total']} checks passed"]
    if row["error"]:
        lines.append(f"  {row['error']}")
    for item in row["checks"]:
        mark = "passed" if item["passed"] else "failed"
        message = item["message"].replace("\n", "\n    ")
        lines.append(f"  {mark}  {item['check']}" + (
            f"\n    {message}" if message and not item["passed"] else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    # Discard what the submission prints, without keeping it in memory.
    with contextlib.redirect_stdout(io.TextIOWrapper(open(os.devnull, "wb"))):
        _run(Path(sys.argv[1]), Path(sys.argv[2]))
