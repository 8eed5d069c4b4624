"""The exercise notebooks match their sources, and the learners' versions have no solutions."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("jupytext") is None:
    pytest.skip("the extra 'notebooks' is not installed: no jupytext", allow_module_level=True)

import nbformat  # noqa: E402

FOLDER = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))
import build  # noqa: E402

from minilora import check  # noqa: E402
from minilora.exercises.grade import EXERCISES  # noqa: E402


def sources(notebook):
    return [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


@pytest.mark.parametrize("source", build.EXERCISES, ids=lambda path: path.stem)
def test_both_notebooks_are_built_from_the_source(source):
    notebook = build.with_solutions(source)
    student = FOLDER / "exercises" / f"{source.stem}.ipynb"
    for path, expected in ((source.with_suffix(".ipynb"), notebook),
                           (student, build.without_solutions(notebook))):
        committed = nbformat.read(path, as_version=4)
        assert sources(committed) == sources(expected), "run: python notebooks/build.py exercises"
        assert not any(cell.get("outputs") for cell in committed.cells)


@pytest.mark.parametrize("source", build.EXERCISES, ids=lambda path: path.stem)
def test_what_an_exercise_has(source):
    notebook = build.with_solutions(source)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in (r"^# Exercise \d+\. ", r"\*\*Goal\.\*\*", r"^\*.*You need: ", "^## Hints",
                 "^## What you should see", "^## To think about"):
        assert re.search(part, text, re.MULTILINE), part
    assert text.count("<details><summary>Hint") == text.count("</details>") >= 3
    number = int(source.stem[:2])
    marks = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
    code = [cell.source for cell, mark in zip(notebook.cells, marks, strict=True)
            if mark.get("grade")]
    assert len(code) == len(EXERCISES[number])
    for name, defined in EXERCISES[number].items():
        assert f"check.{name}({defined})" in code
    ids = [mark["grade_id"] for mark in marks if mark]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("source", build.EXERCISES, ids=lambda path: path.stem)
def test_no_solution_is_left_in_the_learners_version(source):
    solved = build.with_solutions(source)
    student = build.without_solutions(solved)
    assert "BEGIN SOLUTION" not in "".join(cell.source for cell in student.cells)
    for cell, stub in zip(solved.cells, student.cells, strict=True):
        if cell.metadata.get("nbgrader", {}).get("solution"):
            inside = re.findall(r"### BEGIN SOLUTION\n(.*?)\s*### END SOLUTION", cell.source, re.S)
            assert inside and "raise NotImplementedError()" in stub.source
            assert not any(part.strip() in stub.source for part in inside)
            compile(stub.source, "stub", "exec")
        else:
            assert cell.source == stub.source


def run_notebook(notebook):
    """Run the code cells here; return the exceptions of those cells that raised one."""
    scope, errors = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            try:
                exec(compile(cell.source, "cell", "exec"), scope)
            except Exception as error:
                errors.append((cell.metadata.get("nbgrader", {}), error))
    return errors


@pytest.mark.parametrize("source", build.EXERCISES, ids=lambda path: path.stem)
def test_the_solutions_run_and_the_stubs_say_that_they_are_stubs(source, capsys):
    notebook = build.with_solutions(source)
    assert run_notebook(notebook) == []
    for mark, error in run_notebook(build.without_solutions(notebook)):
        if mark.get("grade"):
            assert isinstance(error, check.CheckFailed) and "ot implemented yet" in str(error)
        else:
            assert isinstance(error, NotImplementedError)


@pytest.mark.parametrize("source, words", [
    ("### BEGIN SOLUTION\nx = 1", "no ### END"), ("### END SOLUTION", "END SOLUTION out of place"),
    ("### BEGIN SOLUTION\n### BEGIN SOLUTION", "BEGIN SOLUTION out of place"),
    ("x = 1", "or no solution"),
])
def test_markers_that_do_not_match(source, words):
    with pytest.raises(ValueError, match=words):
        build.strip(source)


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("nbgrader") is None, reason="no nbgrader")
def test_nbgrader_makes_the_same_of_them(tmp_path):
    target = tmp_path / "source" / "lora"
    target.mkdir(parents=True)
    for source in build.EXERCISES:
        shutil.copy(source.with_suffix(".ipynb"), target)
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", "lora", "--create"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for alembic
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PATH": path})
    assert run.returncode == 0, run.stderr
    for source in build.EXERCISES:
        released = nbformat.read(tmp_path / "release" / "lora" / f"{source.stem}.ipynb", 4)
        ours = build.without_solutions(build.with_solutions(source))
        assert [c.source for c in released.cells] == [c.source for c in ours.cells]
