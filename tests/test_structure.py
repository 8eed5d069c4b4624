"""The rooms of the package: who may use whom, and how much a reader meets at once."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "minilora"
# Each may use those before it.
ROOMS = ["nn", "lora", "train", "files", "data", "lab", "exercises", "commands"]
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(("minilora", *p.relative_to(ROOT).with_suffix("").parts)): p for p in FILES}
# Inside functions: packages that are large, or that not everybody has, and our file that needs one.
LAZY = {"matplotlib", "tqdm", "torch", "peft", "transformers", "threadpoolctl", "IPython",
        "ipywidgets", "readline", "resource", "minilora.lab.torch_peer"}
SCREEN = 50  # lines
FLAT = {"__init__.py", "__main__.py", "check.py", "cli.py"}


def imports(path, inside_functions=None):
    """Yield (what is imported, whether inside a function); "minilora.nn.gpt" for our modules."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    local = {id(node) for function in ast.walk(tree)
             if isinstance(function, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        else:
            continue
        for name in names:
            yield name, id(node) in local


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[-1] in ROOMS else None


def test_nothing_lies_outside_the_rooms():
    assert {p.name for p in ROOT.glob("*.py")} == FLAT
    assert {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"} == {
        *ROOMS, "weights"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = path.relative_to(ROOT).parts[0]
    for name, inside in imports(path):
        if inside:
            assert name in LAZY or name.partition(".")[0] in LAZY, f"{name} inside a function"
        if here in ROOMS and name.startswith("minilora"):
            there = room(name)
            assert there in ROOMS, f"{path} imports {name}, which is above all rooms"
            assert ROOMS.index(there) <= ROOMS.index(here), f"{here} must not use {there}"


def test_there_is_no_cycle():
    graph = {name: {i for i, _ in imports(path) if i in MODULES and i != name}
             for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(MODULES)


def test_the_file_that_writes_files_needs_no_model():
    names = [name for name, _ in imports(ROOT / "files" / "safetensors.py")]
    assert [name for name in names if name.startswith("minilora")] == ["minilora.nn.validate"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_function_fits_a_screen(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= SCREEN]
    assert not long
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def lines(*patterns):
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_lora_is_short_and_the_rest_can_be_read_in_an_afternoon():
    """The README names these files and numbers."""
    assert lines("lora/layer.py") <= 160
    later = {"fast", "gradcheck", "llama", "rotary", "large", "quantized", "normal_float"}
    nn = [f"nn/{p.name}" for p in (ROOT / "nn").glob("*.py") if p.stem not in later]
    afternoon = lines(*nn, "lora/layer.py", "lora/wrap.py", "train/optim.py", "train/loop.py")
    assert 1000 < afternoon <= 1700, afternoon


def test_the_layer_that_is_read_is_the_layer_that_runs():
    """One step of a small GPT goes through every LoRALayer, forward and back, once."""
    code = """
import collections, numpy as np, minilora as ml
from minilora.lora import layer
calls = collections.Counter()
for cls in (layer.LoRALayer, layer.LinearWithLoRA):
    for name in ("forward", "backward"):
        def traced(self, *args, _f=getattr(cls, name), _n=f"{cls.__name__}.{name}"):
            calls[_n] += 1
            return _f(self, *args)
        setattr(cls, name, traced)
model = ml.replace_linear_with_lora(ml.load_base(), rank=8, alpha=16, rng=0)
ids = np.zeros((16, 128), int)
_, dlogits = ml.cross_entropy(model(ids), ids)
model.backward(dlogits)
print(dict(calls))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(run.stdout) == {
        f"{cls}.{name}": 24 for cls in ("LinearWithLoRA", "LoRALayer")
        for name in ("forward", "backward")}
