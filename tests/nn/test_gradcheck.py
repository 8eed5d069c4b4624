import math
import re

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
    "mistake, name, words",
    [("mean", "bias", r"at \(\d,\): expected"), ("sign", "input", r"at \(\d, \d\): expected"),
     ("one entry", "weight", r"at \(2, 1\): expected"),
     ("nan", "weight", r"inf  at \(0, 0\): expected .*, got nan"),
     ("forgotten", "weight", "inf  backward left no gradient"),
     ("shape", "input", r"inf  expected shape \(5, 4\), got \(10, 4\)"),
     ("in place", "dout", "inf  backward changed its argument"),
     ("overwrites", "weight", "inf  a second backward did not add to the gradient of the first")],
)
def test_mistakes_are_found_and_named(rng, mistake, name, words):
    report = ml.gradcheck(Wrong(mistake), rng.standard_normal((5, 4)))
    assert not report.passed
    assert [e.name for e in report.entries if not e.error <= report.tolerance] == [name]
    wrong = [line for line in str(report).splitlines() if line.startswith(f"WRONG {name} ")]
    assert len(wrong) == 1 and re.search(rf" {words}", wrong[0])


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


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_errors_are_relative_to_the_gradients_of_an_array(rng, size):
    x = size * rng.standard_normal((5, 4))
    assert ml.gradcheck(Wrong(None), x, tolerance=2e-6).passed
    report = ml.gradcheck(Wrong("one entry"), x)
    assert [e.name for e in report.entries if not e.error <= report.tolerance] == ["weight"]


def test_gradients_of_zero_are_right():
    assert ml.gradcheck(ml.GELU(), np.full(5, -100.0)).passed


def test_a_report_can_be_repeated_and_tells_faults_from_errors(rng):
    layer, x = ml.Linear(40, 40, dtype=np.float64, rng=0), rng.standard_normal((5, 40))
    reports = [ml.gradcheck(layer, x, **options) for options in ({}, {"rng": 0}, {"rng": 1})]
    assert reports[0] == reports[1] != reports[2]
    entry = next(e for e in ml.gradcheck(Wrong("forgotten"), x[:, :4]).entries if e.note)
    assert (entry.name, entry.error, entry.index) == ("weight", math.inf, ())
    assert math.isnan(entry.expected) and math.isnan(entry.got)


def test_a_right_backward_passes_and_nothing_is_left_behind(rng):
    layer = Wrong(None)
    before = layer.state_dict()
    report = ml.gradcheck(layer, rng.standard_normal((5, 4)))
    assert report.passed and report.max_error < 1e-8
    assert all(np.array_equal(before[name], array) for name, array in layer.state_dict().items())
    assert layer.weight.grad is None


def test_of_a_large_array_a_sample_is_compared(rng):
    passes = []

    class Counting(ml.GELU):
        def forward(self, x):
            passes.append(x)
            return super().forward(x)

    x = rng.standard_normal(60)
    for options, compared in (({}, 50), ({"max_entries": 7}, 7), ({"max_entries": 99}, 60)):
        passes.clear()
        assert ml.gradcheck(Counting(), x, **options).passed
        assert len(passes) == 3 + 2 * compared, "one for the shape, two for backward, two each"


@pytest.mark.parametrize("entry", [0, 31, 59])
def test_every_entry_is_compared_if_there_are_no_more_than_allowed(rng, entry):
    class OffByOneEntry(ml.GELU):
        def backward(self, dout):
            dx = super().backward(dout)
            dx[entry] += 0.1
            return dx

    assert not ml.gradcheck(OffByOneEntry(), rng.standard_normal(60), max_entries=60).passed
    with pytest.raises(ValueError, match="max_entries < 1"):
        ml.gradcheck(ml.GELU(), rng.standard_normal(60), max_entries=0)
    assert ml.gradcheck(ml.GELU(), rng.standard_normal(60), max_entries=1).passed


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
