"""The README keeps its promises: its code runs, its table is the committed result."""

import json
import re
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora import check
from minilora.lab import compare, teach
from minilora.lora import layer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEACHERS = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    scope = {}
    for block in blocks:  # the later ones go on from the earlier ones
        exec(compile(block, "README.md", "exec"), scope)


def test_the_layer_in_the_readme_is_the_layer_of_the_library():
    scope = {}
    block = re.search(r"```python\n(import numpy.*?class LoRA.*?)```", README, re.DOTALL).group(1)
    exec(block, scope)
    rng = np.random.default_rng(0)
    layer = ml.LinearWithLoRA(ml.Linear(6, 5, bias=False, dtype=np.float64, rng=0), 2, 8, rng=0)
    short = scope["LoRA"](layer.linear.weight.data, 2, 8, rng)
    for p, array in ((layer.lora.A, short.A), (layer.lora.B, short.B)):
        assert p.shape == array.shape
    assert not short.B.any() and np.abs(short.A).max() <= 6**-0.5
    short.A, short.B = rng.standard_normal((6, 2)), rng.standard_normal((2, 5))
    layer.lora.A.data[...], layer.lora.B.data[...] = short.A, short.B
    x, dout = rng.standard_normal((3, 6)), rng.standard_normal((3, 5))
    np.testing.assert_allclose(short.forward(x), layer(x))
    np.testing.assert_allclose(short.backward(dout), layer.backward(dout))
    np.testing.assert_allclose(short.dA, layer.lora.A.grad)
    np.testing.assert_allclose(short.dB, layer.lora.B.grad)


def test_the_table_is_the_committed_result():
    result = json.loads((ROOT / "figures" / "compare.json").read_text())
    assert compare.table(result) in README
    assert f"starts at {result['docs_base']:.3f}" in " ".join(README.split())
    (_, full, *_, rank_8), gains = compare.costs(result), compare.gains(result)[-1]
    for number in (*rank_8[2:5], *full[3:5], f"reach {gains[2]}"):
        assert number in README.replace(compare.table(result), ""), number
    assert result["settings"]["steps"] == compare.Settings().steps
    assert result["settings"]["base"] == "base"


def test_the_lesson_is_the_committed_result():
    usual = json.loads((ROOT / "figures" / "teach.json").read_text())["rows"][0]
    text = " ".join(README.split())
    right = sum(count for count, _ in usual["exact"].values())
    losses = usual["validation_losses"]
    assert f"With {usual['trained']:,} trained numbers" in text
    assert f"falls from {losses[0]:.2f} to {losses[-1]:.3f} nats" in text
    assert f"{right} of {len(usual['answers'])} held-out commands" in text
    quoted = re.findall(r"after:  '(.*)'", README)
    answers = [given for _, _, _, given in usual["answers"]]
    assert len(quoted) == 2 and set(quoted) <= set(answers)
    assert usual["lesson"] == json.loads(json.dumps(asdict(teach.Lesson())))


@pytest.mark.parametrize("page", [README, TEACHERS], ids=["README", "teachers' page"])
def test_the_quoted_message_is_what_the_check_prints(page):
    wrong, quoted = re.search(
        r"such as `(dA = .*?)` in exercise 4.*?```\n(.*?)\n```", page, re.DOTALL).groups()

    def answer(dout, x, A, B, scale):
        scope = {"dout": dout, "x": x, "A": A, "B": B, "scale": scale}
        exec(wrong, scope)
        return scale * dout @ B.T @ A.T, scope["dA"], scale * (x @ A).T @ dout

    with pytest.raises(check.CheckFailed) as failure:
        check.lora_backward(answer)
    assert str(failure.value) == quoted


def test_files_the_teachers_page_points_to_exist():
    folder = ROOT / "notebooks"
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEACHERS) if "://" not in link]
    assert len(links) >= 9 + 12 and all((folder / link).exists() for link in links)
    for path in sorted(folder.glob("[0-9]*.ipynb")) + sorted(folder.glob("exercises/[0-9]*.ipynb")):
        assert str(path.relative_to(folder)) in links, path
    for name in re.findall(r"`((?:tests|minilora|notebooks|exercises)/[\w/]+\.py)`", TEACHERS):
        at = folder if name.startswith("exercises") else ROOT
        assert (at / name).exists() or "13_name" in name, name


def test_files_it_points_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
    for name in re.findall(r"`(\w+\.py)`", README):
        assert any((ROOT / "minilora").rglob(name)), name


def test_the_layer_in_the_readme_is_the_one_that_the_heart_opens_with():
    code = re.search(r"```python\nimport numpy as np\n\n(class LoRA.*?)```", README, re.S).group(1)
    assert textwrap.indent(code.rstrip(), "    ") in layer.__doc__


def test_figures_holds_what_the_readme_shows():
    shown = set(re.findall(r"\]\(figures/([^)]+)\)", README)) | {"compare.json", "teach.json"}
    tracked = {p.name for p in (ROOT / "figures").iterdir() if p.is_file()}
    assert tracked == shown
