"""Run the notebooks: python notebooks/build.py [NAME ...]

The `.py` files are what people edit (jupytext's percent format). This turns each into an
`.ipynb` of the same name, executes it from top to bottom, and writes it with its outputs. With
names, such as 02_low_rank_update, only those.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("[0-9][0-9]_*.py"))


def execute(source: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """Return the executed notebook of a source. CellExecutionError where a cell fails."""
    notebook = jupytext.read(source)
    notebook.metadata.pop("jupytext", None)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # numbers instead of random ids: a rerun changes only outputs
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": HERE}}
    )
    client.execute()
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
    known = {source.stem: source for source in SOURCES}
    unknown = set(names) - set(known)
    if unknown:
        sys.exit(f"no such notebook: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in names or known:
        start = time.perf_counter()
        notebook = execute(known[name])
        nbformat.validate(notebook)
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
