"""Grade submitted files: `minilora check FILE` or a folder of them.

Each file runs in a process of its own with a time limit, so that an endless loop or a crash
costs one row and not the run. What counts are the functions that the file defines: the checks
are called from here, whatever the file's own check cells say. (It is no sandbox: run strangers'
code where it can do no harm.)
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

from minilora import check
from minilora.exercises.engine import CheckFailed, describe_exception

# Exercise number: {check: the name that the file has to define}
EXERCISES = {
    1: {"linear_forward": "linear_forward", "linear_backward": "linear_backward"},
    2: {"cross_entropy": "cross_entropy"},
    3: {"lora_forward": "LoRALayer"},
    4: {"lora_backward": "lora_backward"},
    5: {"replace_linear": "replace_linear"},
    6: {"adamw": "adamw_step"},
    7: {"layer_norm_backward": "layer_norm_backward"},
    8: {"attention_backward": "attention_backward"},
    9: {"merge": "MergeableLinear"},
    10: {"lora_parameters": "lora_parameters", "gpt_parameters": "gpt_parameters",
         "find_errors": "find_errors"},
    11: {"train": "settings"},
    12: {"diagnosis": "diagnose"},
}
CHECKS = {name: getattr(check, name) for checks in EXERCISES.values() for name in checks}
MOST = 2_000_000  # bytes of a file
MEMORY = 8 << 30  # bytes that its process may ask for


def grade(path: str | Path, seconds: float = 30.0) -> list[dict[str, Any]]:
    """Grade a file, or every .py and .ipynb below a folder; return one row for each.

    A row has "file", "exercise" (a number or None), "checks" (a list of "check", "passed",
    "message"), "passed", "total", and "error" ("" or what kept the file from being graded).
    Raises FileNotFoundError, and ValueError for a folder without such files or another file.
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
    """Run one file in another process and return its row."""
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
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
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
    """Add a failed row for every check that the exercise has and the process did not reach."""
    row["exercise"] = row["exercise"] or next(iter(exercise_numbers(path.stem)), None)
    done = {item["check"] for item in row["checks"]}
    for name in row.get("wanted") or EXERCISES.get(row["exercise"], {}):
        if name not in done:
            row["checks"].append({"check": name, "passed": False, "message": row["error"]})
    row["total"] = len(row["checks"])
    row["passed"] = sum(item["passed"] for item in row["checks"])
    if not row["total"] and not row["error"]:
        row["error"] = "it defines nothing that an exercise asks for"


def exercise_numbers(name: str) -> list[int]:
    """Return the numbers in a name that an exercise has: [4] of "smith_04_lora_backward"."""
    digits = map(int, re.findall(r"(?<!\d)(\d{1,2})(?!\d)", name))
    return [number for number in digits if number in EXERCISES]


# ---- In the other process


def read_cells(path: Path) -> tuple[list[str], int | None]:
    """Return the pieces of code of a file, and the exercise that a notebook's metadata names."""
    if path.stat().st_size > MOST:
        raise ValueError(f"the file has more than {MOST:,} bytes")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return re.split(r"(?m)^# %%.*$", text) if "# %%" in text else [text], None
    try:
        notebook = json.loads(text)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        marks = [cell.get("metadata", {}).get("nbgrader", {}) for cell in cells]
        ids = [n for mark in marks for n in exercise_numbers(str(mark.get("grade_id", "")))[:1]]
        sources = ["".join(cell["source"]) for cell, mark in zip(cells, marks, strict=True)
                   if not mark.get("grade")]  # their own checks would only take time
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("the file is no notebook") from None
    return sources, next(iter(ids), None)


def _run(path: Path, answer: Path) -> None:
    """Run the file's cells, then the checks; write what came of it after each step."""
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

    def own(name: str) -> bool:  # and not imported from somewhere
        return getattr(scope.get(name), "__module__", "submission") == "submission"

    defined_here = {
        n: checks for n, checks in EXERCISES.items()
        if any(name in scope and own(name) for name in checks.values())
    }
    if number is None:  # a number in the file's name counts if it fits, or if there is nothing else
        named = [n for n in exercise_numbers(path.stem) if n in defined_here or not defined_here]
        number = next(iter(named), None)
    wanted = EXERCISES.get(number) or {
        check: name for checks in defined_here.values() for check, name in checks.items()
    }
    write(exercise=number, wanted=list(wanted))
    for name, defined in wanted.items():
        result = {"check": name, "passed": False, "message": ""}
        if defined not in scope:
            result["message"] = f"{defined} is not defined. {raised}".strip()
        elif not own(defined):
            result["message"] = f"{defined} is imported, and not the file's own."
        else:
            try:
                result["message"] = repr(CHECKS[name](scope[defined]))
                result["passed"] = True
            except CheckFailed as failure:
                result["message"] = str(failure)
            except (Exception, SystemExit) as error:
                result["message"] = describe_exception(error)
        row["checks"].append(result)
        write()
    write(finished=True, error="" if wanted else raised)


def _execute(cells: list[str], file: str, scope: dict[str, Any]) -> str:
    """Run the cells in `scope`, going on after errors; return the first that is no failed check."""
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
        for statement in statements:  # one by one: a failed check must not stop what follows
            try:
                exec(compile(ast.Module([statement], []), name, "exec"), scope)
            except (CheckFailed, NotImplementedError):
                pass
            except (Exception, SystemExit) as error:
                raised = raised or describe_exception(error)
    return raised


# ---- Reports


def report(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text: one file in full, several as a table."""
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

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What the submission prints goes nowhere, and much of it takes no memory.
    with contextlib.redirect_stdout(io.TextIOWrapper(open(os.devnull, "wb"))):
        _run(Path(sys.argv[1]), Path(sys.argv[2]))
