import math

import numpy as np
import pytest

import minilora as ml
from minilora.nn.functional import weight_grad
from minilora.nn.gradcheck import Entry, GradCheck


class Wrong(ml.Linear):
    """A Linear whose backward has the mistake it is told to make."""

    def __init__(self, mistake):
        super().__init__(4, 3, dtype=np.float64, rng=0)
        self.mistake = mistake

    def backward(self, dout, input_grad=True):
        x, _ = self._take()
        dw, db, dx = weight_grad(x, dout), dout.sum(0), dout @ self.weight.data.T
        if self.mistake == "mean":
            db = dout.mean(0)
        elif self.mistake == "sign":
            dx = -dx
        elif self.mistake == "one entry":
            dw[2, 1] *= 1 + 1e-4
        elif self.mistake == "shape":
            dx = np.concatenate([dx, dx])
        elif self.mistake == "in place":
            dout *= 2.0
        elif self.mistake == "overwrites":
            self.weight.grad = None
        elif self.mistake == "nan":
            dw[0, 0] = np.nan
        if self.mistake != "forgotten":
            self.weight.accumulate(dw)
        self.bias.accumulate(db)
        return dx


@pytest.mark.parametrize(
    "mistake, name",
    [("mean", "bias"), ("sign", "input"), ("one entry", "weight"), ("nan", "weight"),
     ("forgotten", "weight"), ("shape", "input"), ("in place", "dout"), ("overwrites", "weight")],
)
def test_mistakes_are_found_and_named(rng, mistake, name):
    report = ml.gradcheck(Wrong(mistake), rng.standard_normal((5, 4)))
    assert not report.passed
    assert [e.name for e in report.entries if not e.error <= report.tolerance] == [name]
    assert f"WRONG {name}" in str(report)
    if mistake == "one entry":
        assert "at (2, 1): expected" in str(report)


def test_the_report_as_text():
    report = GradCheck(1e-6, [Entry("weight", 1e-6, (2, 1), 0.25, 0.5, ""),
                              Entry("a.bias", 2e-6, (0,), 1 / 3, 0.5, ""),
                              Entry("x", math.inf, (), math.nan, math.nan, "backward left none")])
    assert str(report).splitlines() == [
        "ok    weight  1.0e-06",
        "WRONG a.bias  2.0e-06  at (0,): expected 0.333333, got 0.5",
        "WRONG x       inf  backward left none",
    ]
    assert report.max_error == math.inf and not report.passed
    assert GradCheck(1e-6, report.entries[:1]).passed
    assert str(GradCheck(1e-6)) == "" and GradCheck(1e-6).max_error == 0.0


def test_a_right_backward_passes_and_nothing_is_left_behind(rng):
    layer = Wrong(None)
    before = layer.state_dict()
    report = ml.gradcheck(layer, rng.standard_normal((5, 4)))
    assert report.passed and report.max_error < 1e-8
    assert all(np.array_equal(before[name], array) for name, array in layer.state_dict().items())
    assert layer.weight.grad is None


def test_float32_is_refused():
    with pytest.raises(TypeError, match="gradcheck needs float64, but weight is float32"):
        ml.gradcheck(ml.Linear(2, 2), np.zeros((1, 2)))
    with pytest.raises(TypeError, match="input is float32"):
        ml.gradcheck(ml.GELU(), np.zeros((1, 2), np.float32))


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match="needs numbers to compare"):
        ml.gradcheck(ml.GELU(), np.zeros((0, 3)))


def test_nothing_to_check_is_not_a_pass():
    assert not ml.gradcheck(ml.Embedding(3, 2, np.float64).freeze(), np.array([0])).passed
