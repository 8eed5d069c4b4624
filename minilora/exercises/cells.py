"""The cells of a submission: read them from a file, make Python of them, run them."""

from __future__ import annotations
import __future__ as futures

import ast
import importlib.util
import inspect
import json
import linecache
import re
import sys
import types
from collections.abc import Callable, Coroutine
from typing import Any

from minilora.exercises.grade import exercise_numbers
from minilora.exercises.outcome import describe_exception

AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
FUTURES = sum(getattr(futures, name).compiler_flag for name in futures.all_feature_names)
TIMED = ("time", "prun", "capture")  # the magics that run Python as if they were not there
# A line of a notebook that is not Python: %magic, !shell, ?help, help?, names = !shell.
MAGIC = re.compile(r"\s*([%!?].*|.*\?\s*|[\w., ]+=\s*[%!].*)$")


# ---- Reading


def read_cells(data: bytes, suffix: str) -> tuple[list[str], int | None]:
    """Read the code of a submission.

    Parameters
    ----------
    data
        The contents of the file.
    suffix
        ".py" or ".ipynb".

    Returns
    -------
    list of str
        The code cells, without those that check an answer.
    int or None
        The number of the exercise, if a notebook's metadata give it.

    Raises
    ------
    ValueError
        If the file is not text, or not a notebook.
    """
    if suffix == ".py":
        return _cells_of_script(data), None
    try:
        cells = [cell for cell in json.loads(data)["cells"] if cell["cell_type"] == "code"]
        marks = [cell.get("metadata", {}).get("nbgrader", {}) for cell in cells]
        ids = [n for mark in marks for n in exercise_numbers(str(mark.get("grade_id", "")))[:1]]
        sources = ["".join(cell["source"]) for cell, mark in zip(cells, marks, strict=True)
                   if not mark.get("grade")]  # the checks in the file are ignored
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("the file is not a notebook") from None
    return sources, next(iter(ids), None)


def _cells_of_script(data: bytes) -> list[str]:
    """Return the cells of a .py file: one if it is Python, else those between its marks."""
    try:
        text = importlib.util.decode_source(data)  # by its byte-order mark or "# coding: ..."
    except (SyntaxError, LookupError, ValueError) as error:
        raise ValueError(f"the file is not text in the codec that it declares: {error}") from None
    try:
        parse(text, "file")
        return [text]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.split(r"(?m)^# (?:%%|In\[).*$", text)  # one wrong cell costs only itself


# ---- From cells to Python


def parse(source: str, name: str, flags: int = 0) -> ast.Module:
    """Return the tree of a cell; a cell may await."""
    return compile(source, name, "exec", ast.PyCF_ONLY_AST | AWAIT | flags, dont_inherit=True)


def as_python(source: str) -> str:
    """Return a cell as Python: unchanged if it is Python, else transformed as IPython does.

    The magics become calls of `get_ipython()`. Where IPython is not installed, they are left out.
    """
    try:
        parse(source, "cell")
        return source
    except SyntaxError:
        pass
    try:
        from IPython.core.inputtransformer2 import TransformerManager
    except ImportError:
        return _without_magics(source)
    return TransformerManager().transform_cell(source)


def _without_magics(source: str) -> str:
    """Return a cell without the lines that only IPython understands.

    These are lines at which Python's parser stops, so not those inside strings or brackets.
    """
    lines = source.strip("\n").split("\n")
    if lines[0].startswith("%%"):
        if lines[0][2:].partition(" ")[0] not in TIMED:
            return ""
        lines[0] = ""
    for _ in range(len(lines)):
        try:
            parse("\n".join(lines), "cell")
            break
        except SyntaxError as error:
            at = min(error.lineno or 1, len(lines)) - 1
            if not MAGIC.match(lines[at]):
                break
            indent = lines[at][: -len(lines[at].lstrip())]
            timed = re.match(r"\s*%(?:time|prun)\s+(.*)", lines[at])
            while not timed and lines[at].endswith("\\") and at + 1 < len(lines):
                lines[at : at + 2] = [lines[at][:-1] + lines[at + 1]]  # a command of several lines
            lines[at] = indent + (timed[1] if timed else "pass")
    return "\n".join(lines)


class _Notebook:
    """What `get_ipython()` gives a submission: magics run the Python in them, and nothing else."""

    def __init__(self, run: Callable[[str], None]) -> None:
        self._run = run

    def run_line_magic(self, magic: str, line: str, *_: Any) -> None:
        """Run the statement in `%time statement`."""
        if magic in TIMED:
            self._run(line)

    def run_cell_magic(self, magic: str, line: str, cell: str) -> None:
        """Run the cell below `%%time`."""
        if magic in TIMED:
            self._run(cell)

    def getoutput(self, *_: Any, **__: Any) -> list[str]:
        """Return the output of `names = !command`, which is not run."""
        return []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


# ---- Running


class Session:
    """The namespace in which the cells of a submission run.

    Attributes
    ----------
    scope
        What they define, by name.
    names
        The file names of their code objects.
    raised
        The first error, or "". Failed checks and gaps that were not filled in are none.
    """

    def __init__(self) -> None:
        module = types.ModuleType("submission")
        # As __main__, too: the grader's own module is not for submissions.
        sys.modules |= {"submission": module, "__main__": module}
        self.names: set[str] = {"<string>"}
        self.raised = ""
        self._flags = 0  # of the `from __future__` so far
        notebook = _Notebook(lambda source: self.run(source, f"<magic {len(self.names)}>"))
        self.scope = vars(module)
        self.scope.update(get_ipython=lambda: notebook, display=lambda *_, **__: None)

    def run(self, source: str, name: str) -> None:
        """Run a cell, statement by statement, so that a failed one does not stop the rest."""
        self.names.add(name)
        try:
            source = as_python(source)
            statements = parse(source, name, self._flags).body
        except BaseException as error:
            self._note(error)
            return
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        for statement in statements:
            try:
                self._execute(statement, name)
            except BaseException as error:
                self._note(error)

    def _execute(self, statement: ast.stmt, name: str) -> None:
        """Run one statement."""
        # dont_inherit: this file's own `from __future__` is not the submission's.
        code = compile(ast.Module([statement], []), name, "exec", AWAIT | self._flags,
                       dont_inherit=True)
        self._flags |= code.co_flags & FUTURES
        if code.co_flags & inspect.CO_COROUTINE:
            _complete(eval(code, self.scope))
        else:
            exec(code, self.scope)

    def _note(self, error: BaseException) -> None:
        """Keep the first error."""
        # By its name, since the submission's CheckFailed is another class than the grader's.
        if type(error).__name__ not in ("CheckFailed", "NotImplementedError"):
            self.raised = self.raised or describe_exception(error)


def _complete(coroutine: Coroutine) -> None:
    """Run a cell that awaits."""
    # Code that needs asyncio's loop has imported asyncio; importing it for every file takes long.
    if "asyncio" in sys.modules:
        sys.modules["asyncio"].run(coroutine)
        return
    try:
        coroutine.send(None)
    except StopIteration:
        pass
