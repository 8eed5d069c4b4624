import importlib.util

import pytest

from minilora.lab import interact


@pytest.fixture
def shown(monkeypatch):
    seen = []
    monkeypatch.setattr(interact, "_display", lambda figure, title="": seen.append((figure, title)))
    return seen


def test_without_widgets_a_few_are_shown(monkeypatch, shown):
    monkeypatch.setenv(interact.STATIC, "1")
    interact.choose(lambda r: 10 * r, "rank", [1, 2, 3, 4])
    assert shown == [(10, "rank: 1"), (40, "rank: 4")]
    shown.clear()
    interact.choose(lambda r: 10 * r, "rank", [1, 2, 3, 4], 2, 3)
    assert shown == [(20, "rank: 2"), (30, "rank: 3")]
    shown.clear()
    interact.choose(str, "rank", ["one"])
    assert shown == [("one", "rank: one")]


def test_missing_widgets_are_noticed(monkeypatch):
    monkeypatch.delenv(interact.STATIC, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not interact.has_widgets()


@pytest.mark.skipif(importlib.util.find_spec("ipywidgets") is None, reason="no ipywidgets")
@pytest.mark.filterwarnings("ignore")
def test_with_widgets_there_is_a_slider(monkeypatch, shown):
    import ipywidgets

    monkeypatch.delenv(interact.STATIC, raising=False)
    sliders = []
    monkeypatch.setattr(ipywidgets, "interact",
                        lambda f, picked: sliders.append((f, picked)) or f(picked.value))
    factor = 10
    interact.choose(lambda r: factor * r, "rank", [1, 2, 3, 4], 2, 3)
    ((move, slider),) = sliders
    assert (slider.options, slider.value, slider.description) == ((1, 2, 3, 4), 2, "rank")
    assert shown == [(20, "")]
    factor = "overwritten by a later cell"
    for value in slider.options:
        move(value)
    assert shown[1:] == [(10, ""), (20, ""), (30, ""), (40, "")]


def test_what_cannot_be_chosen():
    with pytest.raises(ValueError, match="at least one value"):
        interact.choose(str, "rank", [])
    with pytest.raises(ValueError, match=r"5 is not among the values \[1, 2\]"):
        interact.choose(str, "rank", [1, 2], 5)
