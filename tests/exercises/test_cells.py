"""Right answers in files of every kind, and wrong ones that look like magics."""

import json
import sys

import pytest

from minilora.exercises.cells import as_python, read_cells
from minilora.exercises.grade import grade, report

GPT = "def gpt_parameters(V, T, d, L):\n    return (V + T + 2) * d + L * (12 * d**2 + 13 * d)\n"
BODY = "\n    d = s * dout @ B.T\n    return d @ A.T, x.T @ d, s * (x @ A).T @ dout\n"
GOOD = "def lora_backward(dout, x, A, B, s):" + BODY
INDENTED = "    " + GOOD.replace("\n", "\n    ") + "\n"


def notebook(*cells, **more):
    return json.dumps({"cells": [{"cell_type": "code", "source": c, "metadata": {}} for c in cells],
                       "nbformat": 4, **more})


def graded(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (row,) = grade(path)
    return row


RIGHT_CELLS = {
    "line magics": ["%matplotlib inline\n!ls \\\n  -l\nimport numpy as np\nnp.sum?\n?np.sum\n%cd /",
                    GOOD],
    "assignments": ["files = !ls\nwhere = %pwd\nn = len(files)", GOOD],
    "timed cell": ["%%time\n" + GOOD], "captured": ["\n%%capture out --no-stderr\n" + GOOD],
    "timed line": ["def make():\n" + INDENTED + "    return lora_backward",
                   "%time lora_backward = make()"],
    "other languages": ["%%bash\ndef lora_backward(:", "%%html\n<b>", GOOD],
    "magic in a block": ["if True:\n    %matplotlib inline\n    !ls\n" + GOOD],
    "in a string": ['text = """\n%matplotlib inline\n!ls\n# %%\n"""\nassert text.count("%") == 3',
                    'if "%" in text:\n' + INDENTED],
    "continued": ["a = (17\n  % 10\n)\nassert a == 7", "if a == 7:\n" + INDENTED],
    "await": ["import asyncio\nasync def one():\n    await asyncio.sleep(0)\n    return 1",
              "one_ = await one()", "if one_ == 1:\n" + INDENTED],
    "await without asyncio": ["async def one(): return 1\nif await one():\n" + INDENTED],
    "display": ["display(1)\nget_ipython().run_line_magic('load_ext', 'x')\n"
                "get_ipython().ast_node_interactivity = 'all'", GOOD],
    "prompts": [">>> x = 1\n>>> y = 2", GOOD], "indented": ["    x = 1\n    y = 2", GOOD],
    "wrong cell": ["def f(:", "1 / 0", "raise KeyboardInterrupt", GOOD],
    "source as lists": [GOOD.splitlines(True)],
}


@pytest.mark.parametrize("cells", RIGHT_CELLS.values(), ids=RIGHT_CELLS)
def test_right_notebooks(tmp_path, cells):
    row = graded(tmp_path, "x.ipynb", notebook(*cells))
    assert (row["passed"], row["total"], row["error"]) == (1, 1, ""), report([row])


@pytest.mark.parametrize("cells", RIGHT_CELLS.values(), ids=RIGHT_CELLS)
def test_cells_are_python_without_ipython_as_well(cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.core.inputtransformer2", None)
    for cell in map("".join, cells):
        if cell.lstrip().startswith((">>>", "def f(:", "x = 1")):  # left to IPython, or wrong
            continue
        python = as_python(cell)
        compile(python, "cell", "exec", 0x2000)  # with await
        assert ("lora_backward(" in python) == ("lora_backward(" in cell and "bash" not in cell)


def test_only_what_is_not_python_changes():
    for cell in ('x = """\n%time\n!ls\n"""', "x = (3\n%2)", "x = [1,\n!= 3]"[:6] + "2]", "a\\\n%b"):
        assert as_python(cell) == cell
    assert "run_line_magic('time', 'x = 1')" in as_python("%time x = 1")


RIGHT_SCRIPTS = {
    "byte-order mark": "\ufeff" + GOOD,
    "latin-1": ("# -*- coding: latin-1 -*-\nname = 'J\xfcrgen'\nassert len(name) == 6\n"
                + GOOD).encode("latin-1"),
    "windows": GOOD.replace("\n", "\r\n"),
    "jupytext": '# ---\n# jupyter:\n# ---\n\n# %%\n# %matplotlib inline\nt = """\n# %% x\n"""\n\n'
                "# %% tags=['a']\n" + GOOD,
    "percent with magics": "# %%\n%matplotlib inline\n!ls\n# %% [markdown]\n# x\n# %%\n" + GOOD,
    "nbconvert": "#!/usr/bin/env python\n# coding: utf-8\n\n# In[1]:\n\n\n"
                 "get_ipython().run_line_magic('matplotlib', 'inline')\n\n# In[2]:\n\n\n" + GOOD,
    "wrong cell": "# %%\ndef f(:\n# %%\n" + GOOD,
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass Rank:\n    r: int = 1\n"
                 "    def again(self) -> 'Rank': return Rank(self.r)\nRank(2).again()\n"
                 "if Rank.__dataclass_fields__['r'].type is int:\n" + INDENTED,
    "future": "'''Mine.'''\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n"
              "@dataclass\nclass Rank:\n    r: Unknown = 1\n    k: 'int' = 2\n"
              "def lora_backward(dout: Missing, x, A, B, s) -> Missing:" + BODY,
    "typing": "import typing\nclass N(typing.NamedTuple):\n    r: int\nimport pickle\n"
              "pickle.dumps(N(1))\ntyping.get_type_hints(N)\nif N(1).r:\n" + INDENTED,
    "partial": "from functools import partial\ndef f(_, *a): return g(*a)\n"
               + GOOD.replace("lora_backward", "g") + "lora_backward = partial(f, 1)",
    "wraps": "import functools\ndef log(f):\n    @functools.wraps(f)\n    def g(*a): return f(*a)\n"
             "    return g\n@log\n" + GOOD,
    "library decorator": "import numpy as np\n@np.errstate(all='ignore')\n" + GOOD,
    "callable": "class F:\n    def __call__(self, dout, x, A, B, s):" + BODY.replace(
        "\n    ", "\n        ") + "lora_backward = F()",
    "bound method": "class F:\n    def f(self, dout, x, A, B, s):" + BODY.replace(
        "\n    ", "\n        ") + "lora_backward = F().f",
    "lambda": "lora_backward = lambda o, x, A, B, s: (s * o @ B.T @ A.T, x.T @ (s * o @ B.T), "
              "s * (x @ A).T @ o)",
    "exec": f"exec({GOOD!r})",
}


@pytest.mark.parametrize("text", RIGHT_SCRIPTS.values(), ids=RIGHT_SCRIPTS)
def test_right_scripts(tmp_path, text):
    row = graded(tmp_path, "x.py", text)
    assert (row["passed"], row["total"], row["error"]) == (1, 1, ""), report([row])


def test_cached_functions_and_layers_of_the_file_are_its_own(tmp_path):
    row = graded(tmp_path, "10.py", "import functools\n@functools.cache\n" + GPT)
    assert [check["passed"] for check in row["checks"]] == [False, True, False]
    text = "import numpy as np\nimport minilora as ml\nclass LoRALayer(ml.Module):\n" \
           "    def __init__(self, n, m, r, alpha, rng):\n        self.scale = alpha / r\n" \
           "        self.A = ml.Parameter(rng.uniform(-1, 1, (n, r)) / n**0.5)\n" \
           "        self.B = ml.Parameter(np.zeros((r, m)))\n" \
           "    def forward(self, x): return self.scale * (x @ self.A.data @ self.B.data)\n"
    row = graded(tmp_path, "x.py", text)
    assert (row["exercise"], row["passed"], row["total"]) == (None, 1, 1), report([row])


def test_a_long_message_is_cut(tmp_path):
    text = "def find_errors(table):\n" \
           "    raise type('\U0001f600' * 20_000, (Exception,), {})\n"
    row = graded(tmp_path, "x.py", text)
    assert row["total"] == 3 and 9_000 < len(row["checks"][2]["message"]) <= 10_000


def test_a_notebook_with_a_byte_order_mark(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        row = graded(tmp_path, "x.ipynb", notebook(GOOD, name="ü").encode(encoding))
        assert row["passed"] == 1, report([row])


@pytest.mark.parametrize("name, text", [
    ("x.py", "def lora_parameters(shapes, rank):\n    s = sum(rank * (n + m) for n, m in shapes)\n"
             "    return (s\n    % 1000003 + 1)"),
    ("x.py", 'def lora_parameters(shapes, rank):\n    return len("""\n%matplotlib inline\n""")'),
    ("x.ipynb", notebook("def lora_parameters(shapes, rank):\n    s = sum(rank * (n + m) "
                         "for n, m in shapes)\n    return (s\n        % 7)")),
])
def test_wrong_answers_that_look_like_magics(tmp_path, name, text):
    row = graded(tmp_path, name, text)
    (check,) = [check for check in row["checks"] if check["check"] == "lora_parameters"]
    assert not check["passed"] and "not yet" in check["message"]


@pytest.mark.parametrize("data, suffix", [
    (b"\xff\xfe\x00", ".py"), (b"# coding: nonsense\n", ".py"), (b"# coding: rot13\n", ".py"),
    (b"\x80", ".ipynb"), (b"[" * 100_000, ".ipynb"), (b"9" * 10_000, ".ipynb"), (b"[]", ".ipynb"),
    (b"null", ".ipynb"), (b'{"cells": [{"cell_type": "code", "source": 3}]}', ".ipynb"),
    (b'{"cells": [{"cell_type": "code", "source": "", "metadata": null}]}', ".ipynb"),
])
def test_what_is_no_submission(data, suffix):
    with pytest.raises(ValueError, match="codec|not a notebook"):
        read_cells(data, suffix)
