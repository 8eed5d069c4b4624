"""The notebooks are what their sources say, and run from top to bottom."""

import importlib.util
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

MISSING = [n for n in ("jupytext", "nbclient", "ipykernel") if importlib.util.find_spec(n) is None]
if MISSING:
    reason = f"the extra 'notebooks' is not installed: no {', '.join(MISSING)}"
    pytest.skip(reason, allow_module_level=True)

import jupytext  # noqa: E402
import nbformat  # noqa: E402

FOLDER = Path(__file__).parent.parent / "notebooks"
sys.path.insert(0, str(FOLDER))
import build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # of the Jupyter packages, not ours


def text_cells(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def test_every_source_has_its_notebook_and_the_other_way_round():
    assert [s.stem for s in build.SOURCES] == sorted(p.stem for p in FOLDER.glob("*.ipynb"))
    assert len(build.SOURCES) >= 4


@pytest.mark.parametrize("source", build.SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_built_from_its_source(source):
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert text_cells(committed) == text_cells(jupytext.read(source)), (
        f"run: python notebooks/build.py {source.stem}"
    )
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "it must be executed"
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    first, last = committed.cells[0].source, committed.cells[-1].source
    assert first.startswith("# ") and "you will" in " ".join(first.lower().split())
    assert last.startswith("## Questions")


LONGEST = ("04_full_vs_lora", *build.NEEDS_MODEL)  # begin first
RUNS: dict[Path, Future] = {}


def start(sources):
    """Run notebooks in two processes, beside the other tests; conftest calls this."""
    pool = ProcessPoolExecutor(2)
    for source in sorted(sources, key=lambda path: path.stem not in LONGEST):
        if not build.missing(source):
            RUNS[source] = pool.submit(build.execute, source)
    pool.shutdown(wait=False)


@pytest.mark.parametrize("source", build.SOURCES, ids=lambda path: path.stem)
def test_the_notebook_runs_from_top_to_bottom(source):
    if reason := build.missing(source):
        pytest.skip(reason)
    notebook = RUNS[source].result()  # its own assertions fail if a claim does not hold
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not any(o.get("name") == "stderr" for o in outputs), "no warnings either"
