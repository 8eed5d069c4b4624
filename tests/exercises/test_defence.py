"""What the grader is defended against, and what it is not: the lines of grade.py's docstring."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.exercises.grade import grade, report

GOOD = "def lora_backward(dout, x, A, B, s):\n" \
       "    d = s * dout @ B.T\n    return d @ A.T, x.T @ d, s * (x @ A).T @ dout\n"
WRONG = GOOD.replace("s * ", "")
linux = pytest.mark.skipif(sys.platform != "linux", reason="a process has a supervisor on Linux")


def graded(tmp_path, text, seconds=60, name="04.py"):
    path = tmp_path / name
    path.write_text(text)
    (row,) = grade(path, seconds)
    return row


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- Defended: each file has its own row


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_what_is_no_file_costs_its_own_row(tmp_path, capsysbinary):
    (tmp_path / "a.py").write_text(GOOD)
    os.mkfifo(tmp_path / "b.py")
    (tmp_path / "c.py").symlink_to("/dev/zero")
    (tmp_path / "d.ipynb").symlink_to("missing")
    (tmp_path / "e.py").mkdir()
    (tmp_path / "e.py" / "a.py").write_text(GOOD)
    (tmp_path / "f.py").write_text("x")
    (tmp_path / "f.py").chmod(0)
    (tmp_path / "g\x1b[2J\r\n50 of 50.py").write_text(GOOD)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/h\xff.py")).write_text(GOOD)
    (tmp_path / "i.py").write_text("raise ValueError('\x1b[2J\\ud800 \\U0001f600')")
    rows = {Path(row["file"]).relative_to(tmp_path).as_posix()[:4]: row for row in grade(tmp_path)}
    assert sorted(rows) == ["a.py", "b.py", "c.py", "d.ip", "e.py", "f.py", "g\x1b[2", "h\udcff.p",
                            "i.py"]
    for name in ("a.py", "e.py", "g\x1b[2", "h\udcff.p"):
        assert (rows[name]["passed"], rows[name]["error"]) == (1, ""), rows[name]
    for name in ("b.py", "c.py", "d.ip"):
        assert rows[name]["error"] == "it is not a regular file"
    assert os.geteuid() == 0 or rows["f.py"]["error"] == "it cannot be read: Permission denied"
    for args in (["--json"], []):
        assert main(["check", str(tmp_path), *args]) == 1
        out = capsysbinary.readouterr().out.decode()
        assert "\x1b" not in out and "\r" not in out
    assert r"g\x1b[2J\r\n50 of 50.py" in out and r"h\udcff.py" in out and r"\x1b[2J" in out
    assert out.endswith("4 of 9 files are complete\n")


@pytest.mark.parametrize("text", [
    "import os\nos.closerange(0, 100)",
    "import os\nfor n in range(100):\n    try: os.write(n, b'x' * 10**6)\n    except OSError: pass",
    "import os\nos._exit(0)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "import sys\nwhile True: sys.stdout.write('x' * 10**6)",
    "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(60)",
    "import os\nos.kill(os.getppid(), 19)\nwhile True: pass",
    "import ctypes\nctypes.string_at(0)",
    "import os\nfor _ in range(3000): os.mkdir('a'); os.chdir('a')\nos._exit(0)",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
])
def test_hostile_code_costs_its_own_row(tmp_path, text):
    started = time.monotonic()
    row = graded(tmp_path, f"{GOOD}\n{text}", seconds=3)
    assert row["error"] and (row["passed"], row["total"]) == (0, 1), row
    assert time.monotonic() - started < 30


def test_no_file_changes_the_row_of_another(tmp_path):
    for name in "ac":
        (tmp_path / f"{name}.py").write_text(WRONG)
    (tmp_path / "b.py").write_text(
        f"import pathlib\nfor f in pathlib.Path({str(tmp_path)!r}).glob('*.py'):\n"
        f"    f.write_text({GOOD!r})\n{GOOD}")
    assert [row["passed"] for row in grade(tmp_path, 60)] == [0, 1, 0]


# ---- Defended: only the grader's messages count

FORGED = """
import itertools, json, os, sys
row = {"file": "mueller.py", "exercise": 4, "passed": 50, "total": 50, "finished": True,
       "error": "", "checks": [{"check": "lora_backward", "passed": True, "message": ""}]}
messages = [["exercise", 4, ["lora_backward"]], ["check", "lora_backward", True, ""], ["end", ""]]
lines = [json.dumps(row), *("0" * 128 + " " + json.dumps(m) for m in messages)]
"""


@pytest.mark.parametrize("text", [
    "for n in range(60):\n    try: os.write(n, '\\n'.join(lines[1:] + ['']).encode())\n"
    "    except OSError: pass\nos._exit(0)",
    "for n in range(60):\n    try: os.write(n, b'\\n' + b'x' * 10**7)\n    except OSError: pass",
    "print(*lines, sep='\\n', flush=True)\nopen('answer.json', 'w').write(lines[0])\nos._exit(0)",
    "for name in sys.argv[1:] + os.listdir('.'):\n    open(name, 'w').write(lines[0])",
    "dumps = json.dumps\njson.dumps = lambda m, **k: dumps(['check', 'lora_backward', True, ''])",
    "json.JSONEncoder.encode = lambda *a: lines[2][129:]",
    "import hashlib\nnew = hashlib.blake2b\ndef blake2b(data, key):\n"
    "    os.write(1, key)\n    return new(b'2 ' + lines[2][129:].encode(), key=key)\n"
    "hashlib.blake2b = blake2b",
])
def test_forged_results_do_not_count(tmp_path, text):
    row = graded(tmp_path, WRONG + FORGED + text)
    assert row["file"] == str(tmp_path / "04.py")
    assert (row["passed"], row["total"]) == (0, 1), row


def test_a_forged_message_costs_the_points_of_its_file(tmp_path):
    text = GOOD + "import os\ndef adamw_step(*a):\n    for n in range(3, 60):\n" \
           "        try: os.write(n, b'x\\n')\n        except OSError: pass\n"
    row = graded(tmp_path, text, name="x.py")
    assert row["passed"] == 0 and "something other than the grader" in row["error"]


# ---- Defended: what it replaces is put back

LIES = "import numpy as np\nnp.array_equal = lambda *a, **k: True\n" \
       "np.isfinite = lambda a: np.zeros(np.shape(a), bool)"
REPLACED = [
    LIES, "import builtins\nbuiltins.any = lambda *a: False",
    "import builtins\nbuiltins.bool = lambda *a: True",
    "from minilora.exercises import engine, comparison, outcome, e04_lora_backward as e\n"
    "engine.same = comparison.same = lambda *a: True\ne.check = engine.check = lambda *a: 'right'\n"
    "engine.check.__code__ = (lambda *a: 'right').__code__\ne.LORA_BACKWARD.cases.clear()\n"
    "object.__setattr__(e.LORA_BACKWARD, 'reference', lora_backward)\n"
    "outcome.failed = lambda *a, **k: None",
    "from minilora import check\nfrom minilora.exercises import grade, submission\n"
    "check.lora_backward = lambda f: 'right'\ngrade.CHECKS['lora_backward'] = check.lora_backward\n"
    "submission.run_check = lambda *a: (True, 'right')",
    "import sys\nfor m in [*sys.modules.values()]:\n"
    "    if hasattr(m, 'run_check'): m.run_check = lambda *a: (True, '')",
    "import sys\nsys.settrace(lambda *a: None)\nsys.modules['numpy'] = None\nsys.path.clear()",
]
WHEN_CALLED = WRONG.replace("s):", "s):\n    " + LIES.replace("\n", "\n    ") + "\n   ")
IN_PLACE = GOOD.replace("    return", "    dout *= 1.5; dout /= 1.5000001\n    return")


@pytest.mark.parametrize("text", [WHEN_CALLED, *(WRONG + text for text in REPLACED), *(
    f"import copy\n{text} = (lambda x, memo=None, _nil=[]: x){end}\n{IN_PLACE}"
    for text, end in (("copy.deepcopy", ""), ("copy.deepcopy.__code__", ".__code__")))])
def test_what_is_replaced_does_not_make_an_answer_right(tmp_path, text):
    row = graded(tmp_path, text)
    assert (row["passed"], row["total"], row["error"]) == (0, 1, "")
    assert "not yet" in row["checks"][0]["message"]


def test_layers_and_training_that_are_replaced_do_not_make_an_answer_right(tmp_path):
    text = "from minilora.train import loop\nfrom minilora.exercises import e11_training as e\n" \
           "e.train_with = lambda s: {'gain': 9, 'trainable': 1}\n" \
           "loop.fit = e.fit = lambda *a, **k: None\n" \
           "loop.evaluate.__code__ = (lambda model, batches, threads=None: "\
           "-100 * __import__('time').monotonic()).__code__\n" \
           "settings = dict(rank=1, alpha=1, learning_rate=1e-5, target_modules=['q_proj'])"
    row = graded(tmp_path, text, name="11.py")
    assert row["passed"] == 0 and "A gain of" in row["checks"][0]["message"]


DISTURBANCES = [
    "import os, random, sys, warnings\nimport numpy as np\nnp.seterr(all='raise')\n"
    "warnings.simplefilter('error')\nrandom.seed(1)\nos.chdir('/')\nos.environ.clear()\n"
    "sys.setrecursionlimit(60)",
    "import os, shutil\nshutil.rmtree(os.getcwd())",
    "import os\nos.makedirs('a/b')\nos.chmod('a', 0)\nos.symlink('/', 'root')",
    "import sys\nsys.path.clear()\nsys.modules.clear()\nsys.meta_path.clear()",
    "import sys\nsys.modules = {}\nsys.stdout = sys.stderr = None",
    "import builtins\nfor n in ('len', 'open', 'isinstance', 'setattr', '__import__'):\n"
    "    delattr(builtins, n)",
    "import sys\nsys.stdout.close()\nsys.stdin.close()\nprint(1)",
    "print('x' * 10**8)\ninput()\nexit()\nraise KeyboardInterrupt",
    "raise type('E', (BaseException,), {'__str__': lambda s: 1 / 0})",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
    "import atexit, time\natexit.register(time.sleep, 600)",
    "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except OSError: pass",
    "import os\nos.fork()\nos.fork()", "import os\nos.killpg(0, 15) if os.fork() else 1",
    "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: p.map(abs, [1, -2])",
    "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()",
]


@pytest.mark.parametrize("text", DISTURBANCES)
def test_what_a_right_answer_may_do(tmp_path, text):
    if "os.killpg" in text:
        text = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + text
    row = graded(tmp_path, f"{text}\n{GOOD}")
    assert (row["passed"], row["total"], row["error"]) == (1, 1, ""), report([row])


# ---- Defended: its processes end

DAEMON = """
import os, signal, sys, time
if not os.fork():
    os.setsid()
    if not os.fork():
        for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)
        os.closerange(0, 100)
        open({0!r} + "_", "w").write(str(os.getpid()))
        os.rename({0!r} + "_", {0!r})
        while True: time.sleep(1)
    os._exit(0)
while not os.path.exists({0!r}): time.sleep(0.01)
"""


@linux
@pytest.mark.parametrize("after, seconds", [
    ("", 60), ("while True: pass", 10), ("os._exit(0)", 60), ("os.kill(os.getpid(), 9)", 60)])
def test_the_processes_of_a_file_end_with_it(tmp_path, after, seconds):
    pid = tmp_path / "pid"
    row = graded(tmp_path, GOOD + DAEMON.format(str(pid)) + after, seconds)
    assert not alive(int(pid.read_text()))
    assert row["passed"] == (not after)


@linux
def test_they_end_with_the_grader(tmp_path):
    paths = tmp_path / "daemon", tmp_path / "busy"
    busy = tmp_path / "04.py"
    busy.write_text(DAEMON.format(str(paths[0])) + "open('pid', 'w').write(str(os.getpid()))\n"
                    f"os.rename('pid', {str(paths[1])!r})\nwhile True: pass")
    grader = subprocess.Popen([sys.executable, "-m", "minilora", "check", str(busy), "--seconds",
                               "600"], stdout=subprocess.DEVNULL)
    try:
        wait_for(paths[1].exists)
    finally:
        grader.kill()
        grader.wait()
    pids = [int(path.read_text()) for path in paths]
    wait_for(lambda: not any(map(alive, pids)))


def test_where_there_are_no_process_groups(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "killpg", raising=False)
    monkeypatch.delattr(signal, "SIGKILL", raising=False)
    assert graded(tmp_path, GOOD)["passed"] == 1
    assert "stopped after" in graded(tmp_path, "while True: pass", 3)["error"]


@pytest.mark.skipif(os.name == "nt", reason="there they are missing anyway")
def test_where_a_file_has_no_supervisor(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os, signal\ndel os.fork, os.killpg\n"
                                               "del signal.SIGKILL\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = "import os\nassert not hasattr(os, 'fork')\n"
    assert graded(tmp_path, text + GOOD)["passed"] == 1
    assert "stopped after" in graded(tmp_path, text + "while True: pass", 3)["error"]
    row = graded(tmp_path, text + GOOD + "import threading, time\n"
                 "threading.Thread(target=time.sleep, args=(600,)).start()")
    assert (row["passed"], row["error"]) == (1, "")


# ---- Defended: the answer is the file's own

REFERENCE = "from minilora.exercises.e04_lora_backward import LORA_BACKWARD\n" \
            "ref = LORA_BACKWARD.reference\nimport functools, types\nimport numpy as np\n"


@pytest.mark.parametrize("text", [
    "lora_backward = ref", "lora_backward = functools.partial(ref)",
    "ref.__module__ = 'submission'\nref.__name__ = 'lora_backward'\nlora_backward = ref",
    "lora_backward = types.FunctionType(ref.__code__, ref.__globals__, 'lora_backward')",
    "def lora_backward(*a): pass\nlora_backward.__code__ = ref.__code__",
    "@functools.wraps(ref)\ndef lora_backward(*a): return ref(*a)",
    "lora_backward = functools.lru_cache(ref)", "lora_backward = np.vectorize(ref)",
    "lora_backward = np.errstate(all='ignore')(ref)",
    "class F: __call__ = staticmethod(ref)\nlora_backward = F()",
    "class F: f = staticmethod(ref)\nlora_backward = F().f",
    "lora_backward = types.MethodType(lambda self, *a: self(*a), ref).__self__",
    "lora_backward = functools.partial(functools.partial(ref))",
])
def test_the_reference_is_not_an_answer(tmp_path, text):
    row = graded(tmp_path, REFERENCE + text)
    assert (row["passed"], row["total"]) == (0, 1)
    assert "minilora's own, minilora.exercises.e04_lora_backward." in row["checks"][0]["message"]


@pytest.mark.parametrize("name, text", [
    ("LoRALayer", "from minilora import LoRALayer"),
    ("LoRALayer", "class LoRALayer(ml.LoRALayer): 1"),
    ("LoRALayer", "class LoRALayer:\n    __init__ = ml.LoRALayer.__init__\n"
                  "    forward = ml.LoRALayer.forward"),
    ("LoRALayer", "LoRALayer = type('LoRALayer', (ml.LoRALayer,), {'__module__': 'submission'})"),
    ("replace_linear", "replace_linear = ml.replace_linear_with_lora"),
    ("replace_linear", "import functools\n"
                       "replace_linear = functools.partial(ml.replace_linear_with_lora, rng=0)"),
    ("cross_entropy", "cross_entropy = ml.cross_entropy"),
])
def test_minilora_is_not_an_answer(tmp_path, name, text):
    row = graded(tmp_path, f"import minilora as ml\n{text}", name="x.py")
    (check,) = row["checks"]
    assert row["passed"] == 0 and f"{name} is imported" in check["message"]
    assert "minilora's own, minilora." in check["message"]


@pytest.mark.parametrize("name, text", [
    ("find_errors", "class Any(str):\n    __eq__ = lambda *a: True\n    __lt__ = lambda *a: False\n"
                    "    __hash__ = str.__hash__\n"
                    "def find_errors(table): return [Any('?') for row in table]"),
    ("diagnosis", "class Any(str):\n    __eq__ = lambda *a: True\n    __hash__ = str.__hash__\n"
                  "def diagnose(adapter): return Any('?'), 1"),
    ("lora_backward", "import numpy as np\nclass Any(np.ndarray):\n"
                      "    def __array_function__(self, f, *a): return True\n"
                      "    def __array_ufunc__(self, *a): return np.array(True)\n"
                      "def lora_backward(dout, x, A, B, s): return x.view(Any), A.view(Any), B"),
])
def test_results_that_are_equal_to_anything_are_not_right(tmp_path, name, text):
    checks = {check["check"]: check for check in graded(tmp_path, text, name="x.py")["checks"]}
    assert not checks[name]["passed"] and "not yet" in checks[name]["message"]


# ---- Not defended


def test_not_defended_an_answer_that_calls_the_reference(tmp_path):
    text = REFERENCE + "def lora_backward(*a): return ref(*a)"
    assert graded(tmp_path, text)["passed"] == 1


def test_not_defended_code_that_looks_through_its_process(tmp_path):
    text = "import sys\nframe = sys._getframe()\nwhile 'send' not in frame.f_locals:\n" \
           "    frame = frame.f_back\nsend = frame.f_locals['send']\n" \
           "send('exercise', 4, ['lora_backward'])\nsend('check', 'lora_backward', True, '')\n" \
           "send('end', '')\n"
    assert graded(tmp_path, WRONG + text)["passed"] == 1


def test_not_defended_what_the_user_may_use(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = "import os, socket, subprocess, sys\n" \
               f"socket.create_connection({server.getsockname()!r}).sendall(b'all')\n" \
               f"open({str(other)!r}, 'w').write('2')\nopen('big', 'wb').write(bytes(10**8))\n" \
               "many = [subprocess.Popen(['sleep', '60']) for _ in range(50)]\n" \
               "if os.path.getsize('big') == 10**8 and not any(p.poll() for p in many):\n    "
        row = graded(tmp_path, text + GOOD.replace("\n", "\n    "))
        with server.accept()[0] as connection:
            assert row["passed"] == 1 and connection.recv(3) == b"all"
    assert other.read_text() == "2"


@linux
def test_not_defended_a_daemon_that_kills_the_supervisor(tmp_path):
    pid = tmp_path / "pid"
    kill = "os.kill(os.getppid(), 9)\ntime.sleep(60)"
    row = graded(tmp_path, GOOD + DAEMON.format(str(pid)) + kill)
    left = int(pid.read_text())
    assert alive(left) and row["passed"] == 0
    os.kill(left, signal.SIGKILL)


# ---- The status


def test_the_status_and_the_last_line_agree(tmp_path, capsys):
    texts = [GOOD, GOOD + "import threading, time\nthreading.Thread(target=time.sleep, args=(99,))"
             ".start()", WRONG, GOOD + "def adamw_step(*a):\n    import os\n    os._exit(0)"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text)
        status = main(["check", str(tmp_path / f"{i}.py")])
        last = capsys.readouterr().out.splitlines()[-1]
        assert (status, last) == ((0, "1 of 1 file is complete") if i < 2 else
                                  (1, "0 of 1 file is complete"))
    assert main(["check", str(tmp_path), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)) == 4
