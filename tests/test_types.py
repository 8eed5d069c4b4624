"""What editors and type checkers see: the package, a user's script, the README's examples."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("pyright") is None:
    pytest.skip("the extra 'types' is not installed: no pyright", allow_module_level=True)

ROOT = Path(__file__).parent.parent
TYPING = Path(__file__).parent / "typed"


def errors(*paths, cwd=ROOT):
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    run = subprocess.run([*command, *map(str, paths)], cwd=cwd, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr + run.stdout
    found = json.loads(run.stdout[run.stdout.index("{"):])["generalDiagnostics"]
    return [(Path(e["file"]).name, e["range"]["start"]["line"] + 1, e["message"]) for e in found
            if e["severity"] == "error"]


def test_the_package_has_no_type_error():
    assert errors() == []


def test_neither_has_a_user_s_script_nor_the_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    (tmp_path / "readme.py").write_text("\n".join(blocks), "utf-8")
    script = (TYPING / "user.py").read_text("utf-8")
    assert len(script.splitlines()) >= 40
    (tmp_path / "user.py").write_text(script, "utf-8")
    assert errors(tmp_path, cwd=tmp_path) == []


def test_mistakes_are_seen(tmp_path):
    text = (TYPING / "misuse.py").read_text("utf-8")
    (tmp_path / "misuse.py").write_text(text, "utf-8")
    wrong = [i for i, line in enumerate(text.splitlines(), 1) if line.endswith("# wrong")]
    assert sorted({line for _, line, _ in errors(tmp_path, cwd=tmp_path)}) == wrong
