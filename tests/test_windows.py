"""Commands as on Windows: without what Python lacks there, and on a terminal that is not UTF-8.

What is missing is taken away by tests/windows/sitecustomize.py, in the grader's processes, too.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.cli import main

HERE = Path(__file__).parent
SOLUTION = HERE.parent / "notebooks" / "exercises" / "solutions" / "01_linear.ipynb"
GOOD = "def lora_backward(dout, x, A, B, s):\n    print('ᵀ')\n" \
       "    d = s * dout @ B.T\n    return d @ A.T, x.T @ d, s * (x @ A).T @ dout\n"
LACKS = "import os, signal\nfor module, name in ((os, 'fork'), (os, 'killpg'), (os, 'setsid'), " \
        "(os, 'getpgrp'),\n        (os, 'sysconf'), (signal, 'SIGKILL')):\n" \
        "    assert not hasattr(module, name)\n" \
        "try:\n    import fcntl, resource\nexcept ImportError:\n"
FILES = {
    "hang_04.py": "while True: pass",
    "other_04.py": "def lora_backward(*a): raise ValueError('xᵀ \U0001f600')",
    "right_04.py": LACKS + "    " + GOOD.replace("\n", "\n    "),
    "wrong_04.py": GOOD.replace("x.T @ d,", "(x.T @ d).T,"),
}


def environment():
    above = [str(HERE / "windows")] if os.name != "nt" else []
    path = os.pathsep.join(above + list(filter(None, [os.environ.get("PYTHONPATH")])))
    return os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0",
                         "PYTHONWARNDEFAULTENCODING": "1"}


def minilora(*arguments):
    """Return the exit status of a command, and what it wrote to stdout and to stderr."""
    run = subprocess.run([sys.executable, "-m", "minilora", *map(str, arguments)],
                         capture_output=True, env=environment(), timeout=300)
    out, err = (text.decode("cp1252").replace("\r\n", "\n") for text in (run.stdout, run.stderr))
    ours = str(Path(ml.__file__).parent)
    assert "Traceback" not in err
    assert not [line for line in err.splitlines() if "EncodingWarning" in line and ours in line]
    return run.returncode, out, err


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_check_grades_every_file(folder):
    status, out, _ = minilora("check", folder, SOLUTION, "--seconds", "3", "--json")
    rows = {Path(row["file"]).name: row for row in json.loads(out)}
    assert status == 1 and list(rows) == [*FILES, SOLUTION.name]
    found = {name: (row["passed"], row["total"], row["error"]) for name, row in rows.items()}
    assert found == {
        "hang_04.py": (0, 1, "stopped after 3 seconds: an endless loop?"),
        "other_04.py": (0, 1, ""), "right_04.py": (1, 1, ""), "wrong_04.py": (0, 1, ""),
        SOLUTION.name: (2, 2, ""),
    }
    assert "xᵀ \U0001f600" in rows["other_04.py"]["checks"][0]["message"]


def test_check_prints_what_the_terminal_lacks_with_escapes(folder):
    wrong, other = folder / "wrong_04.py", folder / "other_04.py"
    status, out, _ = minilora("check", wrong)
    assert status == 1 and r"dA = scale * x\u1d40 (dout B\u1d40)" in out
    status, out, _ = minilora("check", other, "--csv")
    assert status == 1 and out.count("\n") == 2
    assert out.endswith("Your code raised ValueError: x\\u1d40 \\U0001f600\n")
    status, _, err = minilora("check", wrong, folder / "xᵀ.py")
    assert status == 2 and err.count("\n") == 1 and r"x\u1d40.py" in err
    assert minilora("check", folder / "right_04.py")[:2] == (
        0, f"{folder / 'right_04.py'}: 1 of 1 checks passed\n  passed  lora_backward\n"
           "1 of 1 file is complete\n")


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="on Windows, Ctrl-C would reach pytest as well")
@pytest.mark.parametrize("sent, status, text", [
    (signal.SIGINT, 130, b"\ninterrupted\n"), (getattr(signal, "SIGKILL", 9), -9, b"")])
def test_a_file_ends_at_once_with_the_grader(tmp_path, sent, status, text):
    pid = tmp_path / "pid"
    (tmp_path / "04.py").write_text(
        "import os\nopen('pid', 'w').write(str(os.getpid()))\n"
        f"os.rename('pid', {str(pid)!r})\nwhile True: pass")
    command = [sys.executable, "-m", "minilora", "check", tmp_path, "--seconds", "300"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as run:
        try:
            wait_for(pid.exists)
            run.send_signal(sent)
            assert run.wait(60) == status and run.stderr.read() == text
        finally:
            run.kill()
    wait_for(lambda: ended(pid.read_text()))


def test_models_and_adapters(tmp_path):
    path = tmp_path / "xᵀ.safetensors"
    ml.save_safetensors(path, {"xᵀ": np.zeros(2)})
    status, out, _ = minilora("info", path)
    assert status == 0 and out.endswith("  x\\u1d40: (2,) float64\n")
    status, _, err = minilora("info", tmp_path / "yᵀ.safetensors")
    assert status == 2 and r"y\u1d40.safetensors" in err
    status, out, _ = minilora("generate", "--base", "small", "--prompt", "def ", "--tokens", "5")
    assert status == 0 and len(out.rstrip("\n")) == 9
    assert minilora("count", "gpt2-small")[0] == 0


def test_compare_writes_all(tmp_path):
    out = tmp_path / "xᵀ"
    status, text, _ = minilora("compare", "--quick", "--steps", "2", "--ranks", "1", "--out", out)
    assert status == 0 and "= base, exactly" in text and r"x\u1d40: loss_curves.png" in text
    assert json.loads((out / "compare.json").read_bytes())["settings"]["steps"] == 2
    assert (out / "adapters" / "r1-seed0" / "adapter_model.safetensors").exists()
    assert not list(out.glob(".minilora*"))


def test_a_terminal_of_any_encoding_shows_every_name(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    ml.save_safetensors(path, {"xᵀé": np.zeros(2)})
    for encoding, shown in (("ascii", rb"x\u1d40\xe9"), ("latin-1", b"x\\u1d40\xe9"),
                            ("utf-8", "xᵀé".encode())):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        assert main(["info", str(path)]) == 0
        assert main(["info", str(tmp_path / "xᵀé")]) == 2
        for stream in streams:
            stream.flush()
            assert shown in stream.buffer.getvalue()


class Written:
    """A stream that has only what `print` needs."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_stream_without_an_encoding_does(monkeypatch):
    stream = Written()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["count", "gpt2-small"]) == 0 and "124,439,808 parameters" in stream.text
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where there is no console
    assert main(["count", "gpt2-small"]) == 0
