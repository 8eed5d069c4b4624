"""Run the notebooks: python notebooks/build.py [NAME ...]

The `.py` files are what people edit (jupytext's percent format). This turns each into an
`.ipynb` of the same name, executes it from top to bottom, and writes it with its outputs. With
names, such as 02_low_rank_update, only those; "exercises" stands for the exercises.

An exercise has one source, in exercises/solutions, with text, starter, solution and checks. Two
notebooks are made of it: one for nbgrader beside it, and one without the solutions for learners
in exercises/. Cells tagged "solution" have the parts to be written between ### BEGIN SOLUTION and
### END SOLUTION; those tagged "check" are graded.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

from minilora.files.gguf_llama import find_smollm2
from minilora.lab.interact import STATIC

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("[0-9][0-9]_*.py"))
EXERCISES = sorted(HERE.glob("exercises/solutions/[0-9][0-9]_*.py"))
NEEDS_MODEL = ("10_a_real_language_model",)
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # as nbgrader has it


def read(source: Path) -> nbformat.NotebookNode:
    """Return the notebook of a source, without outputs."""
    notebook = jupytext.read(source)
    notebook.metadata.pop("jupytext", None)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # numbers instead of random ids: a rerun changes only outputs
    return notebook


def missing(source: Path) -> str:
    """Return what a notebook needs and is not installed; "" if nothing is missing."""
    if source.stem in NEEDS_MODEL:
        try:
            find_smollm2()
        except FileNotFoundError as error:
            return str(error)
    return ""


def with_solutions(source: Path) -> nbformat.NotebookNode:
    """Return the notebook of an exercise with its solutions and nbgrader's metadata."""
    notebook = read(source)
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.pop("tags", [])
        if cell.cell_type == "code":
            cell.metadata["nbgrader"] = {
                "schema_version": 3, "grade_id": f"{source.stem}-{i}", "task": False,
                "solution": "solution" in tags, "grade": "check" in tags,
                "locked": "solution" not in tags,
            } | ({"points": 1} if "check" in tags else {})
    return notebook


def without_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook for learners: what nbgrader's generate_assignment makes of it."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = strip(cell.source)
    return notebook


def strip(source: str) -> str:
    """Put a stub in the place of every solution. ValueError for a marker without its other."""
    lines, inside = [], False
    for line in source.split("\n"):
        marker = re.fullmatch(r"(\s*)### (BEGIN|END) SOLUTION", line)
        if marker:
            if inside == (marker[2] == "BEGIN"):
                raise ValueError(f"### {marker[2]} SOLUTION out of place in:\n{source}")
            inside = not inside
            lines += [marker[1] + part for part in STUB.split("\n")] if inside else []
        elif not inside:
            lines.append(line)
    if inside or len(lines) == source.count("\n") + 1:
        raise ValueError(f"no ### END SOLUTION, or no solution, in:\n{source}")
    return "\n".join(lines)


def build_exercise(source: Path) -> None:
    """Write both notebooks of an exercise."""
    notebook = with_solutions(source)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    nbformat.write(without_solutions(notebook), source.parent.parent / f"{source.stem}.ipynb")


def execute(source: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """Return the executed notebook of a source. CellExecutionError where a cell fails."""
    notebook = read(source)
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": HERE}}
    )
    with_static = os.environ | {STATIC: "1"}  # stored outputs have nobody who moves a slider
    client.execute(env=with_static)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = join_streams(cell.outputs)
    notebook.metadata.pop("language_info", None)  # names the Python release of whoever ran it
    return notebook


def join_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Make one output of printed text that arrived in pieces; where it is cut is chance."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def main(names: list[str]) -> None:
    """Build the named notebooks, or all."""
    known = {source.stem: source for source in SOURCES} | {"exercises": None}
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"no such notebook: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in names or known:
        start = time.perf_counter()
        if name == "exercises":
            for source in EXERCISES:
                build_exercise(source)
            continue
        if reason := missing(known[name]):
            print(f"{name}: left as it is. {reason}")
            continue
        notebook = execute(known[name])
        nbformat.validate(notebook)
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
