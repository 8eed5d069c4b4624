"""Exercise 7: the gradients of LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora.exercises.arrays import normal
from minilora.exercises.comparison import Case
from minilora.exercises.engine import check
from minilora.exercises.outcome import Passed
from minilora.exercises.task import Mistake, Task

NUMBER = 7
# Name of the check: the name that a submission must define.
DEFINED = {"layer_norm_backward": "layer_norm_backward"}


def _normalised(x: np.ndarray, eps: float, ddof: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the normalised x (N, C) and 1 / sqrt(var + eps) (N, 1)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(x.var(axis=-1, keepdims=True, ddof=ddof) + eps)
    return centred * rstd, rstd


def _mean(x: np.ndarray) -> np.ndarray:
    """Return the mean of each row (N, 1)."""
    return x.mean(axis=-1, keepdims=True)


def _reference(
    dout: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of x (N, C), weight (C,) and bias (C,)."""
    xhat, rstd = _normalised(x, eps)
    g = dout * weight
    dx = rstd * (g - _mean(g) - xhat * _mean(g * xhat))
    return dx, (dout * xhat).sum(axis=0), dout.sum(axis=0)


def _forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """Return the output of LayerNorm (N, C)."""
    return _normalised(x, eps)[0] * weight + bias


def _case(n: int, c: int, eps: float = 0.01) -> Case:
    """Return dout and x (n, c), weight and bias (c,), and eps."""
    return {"dout": normal(n, c, seed=3), "x": 2 * normal(n, c) + 1, "weight": normal(c, seed=4),
            "bias": normal(c, seed=5), "eps": eps}


def _dx(change: str) -> Callable[..., np.ndarray]:
    """Return a function that computes dx with the mistake `change`."""

    def wrong(
        dout: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float
    ) -> np.ndarray:
        xhat, rstd = _normalised(x, eps, ddof=1 if change == "ddof" else 0)
        g, c = dout if change == "no weight" else dout * weight, x.shape[1]
        if change in ("no eps", "hard eps"):
            xhat, rstd = _normalised(x, 0.0 if change == "no eps" else 1e-5)
        if change == "no root":
            rstd = 1 / (x.var(axis=-1, keepdims=True) + eps)
            xhat = (x - _mean(x)) * rstd
        if change == "everything":
            xhat = (x - x.mean()) / np.sqrt(x.var() + eps)
            return (g - g.mean() - xhat * (g * xhat).mean()) / np.sqrt(x.var() + eps)
        if change == "eps outside":
            std = x.std(axis=-1, keepdims=True) + eps
            xhat, rstd = (x - _mean(x)) / std, 1 / std
        return {
            "only rstd": rstd * g,
            "no mean": rstd * (g - xhat * _mean(g * xhat)),
            "no projection": rstd * (g - _mean(g)),
            "no rstd": g - _mean(g) - xhat * _mean(g * xhat),
            "sums": rstd * (g - c * _mean(g) - c * xhat * _mean(g * xhat)),
            "no xhat": rstd * (g - _mean(g) - _mean(g * xhat)),
            "x": rstd * (g - _mean(g) - x * _mean(g * x)),
            "axis": rstd * (g - g.mean(axis=0) - xhat * (g * xhat).mean(axis=0)),
            "plus": rstd * (g - _mean(g) + xhat * _mean(g * xhat)),
            "weight late": weight * rstd * (dout - _mean(dout) - xhat * _mean(dout * xhat)),
        }.get(change, rstd * (g - _mean(g) - xhat * _mean(g * xhat)))

    return wrong


def _with(
    formula: Callable[[SimpleNamespace], np.ndarray],
    mean: Callable[[np.ndarray], Any] = _mean,
    root: Callable[[np.ndarray, float], Any] = lambda x, eps: np.sqrt(_var(x) + eps),
) -> Callable[..., np.ndarray]:
    """Return a function that computes a gradient by a formula, from another mean or root."""

    def wrong(**case: Any) -> np.ndarray:
        s = SimpleNamespace(**case)
        s.mu, s.rstd, s.g = mean(s.x), 1 / root(s.x, s.eps), s.dout * s.weight
        s.centred = s.x - s.mu
        s.xhat = s.centred * s.rstd
        return formula(s)

    return wrong


def _var(x: np.ndarray) -> np.ndarray:
    """Return the variance of each row (N, 1)."""
    return x.var(axis=-1, keepdims=True)


def _right(s: SimpleNamespace) -> np.ndarray:
    """Return the right dx of what `s` holds."""
    return s.rstd * (s.g - _mean(s.g) - s.xhat * _mean(s.g * s.xhat))


def _by_batch(s: SimpleNamespace) -> np.ndarray:
    """Return dx of BatchNorm, whose means are over the rows."""
    return s.rstd * (s.g - s.g.mean(axis=0) - s.xhat * (s.g * s.xhat).mean(axis=0))


def _dweight(s: SimpleNamespace) -> np.ndarray:
    """Return the right dweight of what `s` holds."""
    return (s.dout * s.xhat).sum(axis=0)


def _column_mean(x: np.ndarray) -> np.ndarray:
    """Return the mean of each column (C,)."""
    return x.mean(axis=0)


def _column_root(x: np.ndarray, eps: float) -> np.ndarray:
    """Return sqrt(var + eps) of each column (C,)."""
    return np.sqrt(x.var(axis=0) + eps)


# Another mean, root or epsilon: {words: the arguments of _with}
_STATISTICS: list[tuple[str, dict[str, Any]]] = [
    ("mean and variance are of each column, as in BatchNorm; every row has its own (axis=-1).",
     {"mean": _column_mean, "root": _column_root}),
    ("the mean is of each column; every row has its own (axis=-1).", {"mean": _column_mean}),
    ("the variance is of each column; every row has its own (axis=-1).", {"root": _column_root}),
    ("the mean is of all numbers; every row has its own (axis=-1).", {"mean": np.mean}),
    ("the variance is of all numbers; every row has its own (axis=-1).",
     {"root": lambda x, eps: np.sqrt(x.var() + eps)}),
    ("the median stands for the mean.", {"mean": lambda x: np.median(x, -1, keepdims=True)}),
    ("the mean is not subtracted from x.", {"mean": lambda x: 0.0}),
    ("xhat is that of RMSNorm: the mean is not subtracted, and squares stand for the variance.",
     {"mean": lambda x: 0.0, "root": lambda x, eps: np.sqrt(_mean(x * x) + eps)}),
    ("the root is taken twice (std is a root already): it is sqrt(var + eps).",
     {"root": lambda x, eps: np.sqrt(x.std(axis=-1, keepdims=True) + eps)}),
    ("it is multiplied by sqrt(var + eps), not divided by it.",
     {"root": lambda x, eps: 1 / np.sqrt(_var(x) + eps)}),
    ("eps is added twice.", {"root": lambda x, eps: np.sqrt(_var(x) + 2 * eps)}),
    ("the mean of the squares stands for the variance; subtract the mean first.",
     {"root": lambda x, eps: np.sqrt(_mean(x * x) + eps)}),
    ("eps is multiplied by the variance; it is added.",
     {"root": lambda x, eps: np.sqrt(_var(x) * (1 + eps))}),
    ("the larger of variance and eps is taken; add them.",
     {"root": lambda x, eps: np.sqrt(np.maximum(_var(x), eps))}),
    ("eps is squared.", {"root": lambda x, eps: np.sqrt(_var(x) + eps**2)}),
    ("eps is subtracted; it is added.", {"root": lambda x, eps: np.sqrt(_var(x) - eps)}),
    *((f"eps is {value:g} whatever is given.",
       {"root": lambda x, eps, value=value: np.sqrt(_var(x) + value)})
      for value in (1e-6, 1e-8)),
]
# Errors in the formula of dx
_FORMULAS: list[tuple[str, Callable[[SimpleNamespace], np.ndarray]]] = [
    ("1 / sqrt(var + eps) stands outside the brackets twice.", lambda s: s.rstd * _right(s)),
    ("1 / sqrt(var + eps) stands outside the brackets three times.",
     lambda s: s.rstd**2 * _right(s)),
    ("it is multiplied by sqrt(var + eps) outside the brackets; it is to be divided by it.",
     lambda s: _right(s) / s.rstd**2),
    ("1 / sqrt(var + eps) is multiplied to g only; the brackets are missing.", lambda s: (
        s.rstd * s.g - _mean(s.g) - s.xhat * _mean(s.g * s.xhat))),
    ("sum(g * xhat) stands where the mean should: divide by C.", lambda s: s.rstd * (
        s.g - _mean(s.g) - s.xhat * (s.g * s.xhat).sum(-1, keepdims=True))),
    ("sum(g) stands where the mean should: divide by C.", lambda s: s.rstd * (
        s.g - s.g.sum(-1, keepdims=True) - s.xhat * _mean(s.g * s.xhat))),
    ("the sums are divided by N; the means are over the C numbers of a row.", lambda s: s.rstd * (
        s.g - (_mean(s.g) + s.xhat * _mean(s.g * s.xhat)) * s.x.shape[1] / len(s.x))),
    ("mean(g * x) stands where mean(g * xhat) should.",
     lambda s: s.rstd * (s.g - _mean(s.g) - s.xhat * _mean(s.g * s.x))),
    ("x * mean(g * xhat) stands where xhat * mean(g * xhat) should.",
     lambda s: s.rstd * (s.g - _mean(s.g) - s.x * _mean(s.g * s.xhat))),
    ("x - mean is not divided by sqrt(var + eps) in xhat.", lambda s: s.rstd * (
        s.g - _mean(s.g) - s.centred * _mean(s.g * s.centred))),
    ("the mean(g) is added; it is subtracted.",
     lambda s: s.rstd * (s.g + _mean(s.g) - s.xhat * _mean(s.g * s.xhat))),
    ("both means are added; they are subtracted.",
     lambda s: s.rstd * (s.g + _mean(s.g) + s.xhat * _mean(s.g * s.xhat))),
    ("dout stands where g should in the first mean: g = dout * weight.", lambda s: s.rstd * (
        s.g - _mean(s.dout) - s.xhat * _mean(s.g * s.xhat))),
    ("dout stands where g should in the mean of g * xhat: g = dout * weight.", lambda s: s.rstd * (
        s.g - _mean(s.g) - s.xhat * _mean(s.dout * s.xhat))),
    ("the weight is in the last term a second time.", lambda s: s.rstd * (
        s.g - _mean(s.g) - s.weight * s.xhat * _mean(s.g * s.xhat))),
    ("the last term, xhat * mean(g * xhat), is halved.", lambda s: s.rstd * (
        s.g - _mean(s.g) - s.xhat * _mean(s.g * s.xhat) / 2)),
    ("the last term, xhat * mean(g * xhat), is in it twice.", lambda s: s.rstd * (
        s.g - _mean(s.g) - 2 * s.xhat * _mean(s.g * s.xhat))),
    ("the brackets end too early, so that the last term is added.", lambda s: s.rstd * s.g - (
        _mean(s.g) - s.xhat * _mean(s.g * s.xhat))),
    ("it is g alone: xhat depends on x by 1 / sqrt(var + eps), mean and variance.",
     lambda s: s.g),
    ("the weight is in it twice.", lambda s: s.weight * _right(s)),
    ("dout stands where g should, outside the means: g = dout * weight.", lambda s: s.rstd * (
        s.dout - _mean(s.g) - s.xhat * _mean(s.g * s.xhat))),
    ("the largest number of a row stands where a mean should.", lambda s: s.rstd * (
        s.g - _mean(s.g) - s.xhat * (s.g * s.xhat).max(-1, keepdims=True))),
    ("the bias is in xhat; it is added after.", lambda s: s.rstd * (
        s.g - _mean(s.g) - (s.xhat + s.bias) * _mean(s.g * (s.xhat + s.bias)))),
    ("the means are over all numbers; each is over its row.",
     lambda s: s.rstd * (s.g - s.g.mean() - s.xhat * (s.g * s.xhat).mean())),
]

LAYER_NORM_BACKWARD = Task(
    name="layer_norm_backward",
    outputs=("dx", "dweight", "dbias"),
    reference=_reference,
    cases=[_case(*c) for c in [(2, 3), (4, 4), (1, 5), (3, 2), (6, 8, 1e-5), (5, 7, 1.0)]],
    mistakes={
        "dx": [
            Mistake("mean and variance were taken for constants: they depend on x, too.",
                    _dx("only rstd")),
            Mistake("the term mean(g) is missing: the mean of x depends on every x.",
                    _dx("no mean")),
            Mistake("the term xhat * mean(g * xhat) is missing: the variance depends on every x.",
                    _dx("no projection")),
            Mistake("the factor 1 / sqrt(var + eps) is missing.", _dx("no rstd")),
            Mistake("there are sums where means should be: divide by C.", _dx("sums")),
            Mistake("the weight is missing: g = dout * weight.", _dx("no weight")),
            Mistake("mean(g * xhat) is to be multiplied by xhat.", _dx("no xhat")),
            Mistake("it has x where the normalised xhat should be.", _dx("x")),
            Mistake("the means are over the wrong axis: every row is normalised by itself.",
                    _dx("axis")),
            Mistake("one sign is wrong: both means are subtracted.", _dx("plus")),
            Mistake("the weight comes in at the end; it belongs inside: g = dout * weight first.",
                    _dx("weight late")),
            Mistake("the variance divides by C - 1; LayerNorm's divides by C.", _dx("ddof")),
            Mistake("eps is added outside the root: it is sqrt(var + eps).", _dx("eps outside")),
            Mistake("eps is missing, or not added.", _dx("no eps")),
            Mistake("eps is 1e-5 whatever is given.", _dx("hard eps")),
            Mistake("the root is missing: it is 1 / sqrt(var + eps).", _dx("no root")),
            Mistake("mean and variance are of all numbers; every row has its own (axis=-1).",
                    _dx("everything")),
            *(Mistake(says, _with(_right, **change)) for says, change in _STATISTICS),
            *(Mistake(says, _with(_by_batch, **change)) for says, change in _STATISTICS[:1]),
            *(Mistake(says, _with(formula)) for says, formula in _FORMULAS),
        ],
        "dweight": [
            Mistake("it has x where the normalised xhat should be.",
                    lambda dout, x, **_: (dout * x).sum(axis=0)),
            Mistake("it is the mean over the rows, not the sum.",
                    lambda dout, x, eps, **_: (dout * _normalised(x, eps)[0]).mean(axis=0)),
            Mistake("it is the sum over the wrong axis: weight has one entry for each column.",
                    lambda dout, x, eps, **_: (dout * _normalised(x, eps)[0]).sum(axis=1)),
            Mistake("the sum over the rows is missing.",
                    lambda dout, x, eps, **_: dout * _normalised(x, eps)[0]),
            Mistake("xhat is missing: that is dbias.", lambda dout, **_: dout.sum(axis=0)),
            Mistake("the variance divides by C - 1; LayerNorm's divides by C.",
                    lambda dout, x, eps, **_: (dout * _normalised(x, eps, 1)[0]).sum(axis=0)),
            Mistake("the weight itself is in it.", lambda dout, x, weight, eps, **_: (
                dout * weight * _normalised(x, eps)[0]).sum(axis=0)),
            Mistake("sums of dout and xhat are multiplied; it is the sum of their products.",
                    _with(lambda s: s.dout.sum(axis=0) * s.xhat.sum(axis=0))),
            Mistake("the output y stands where xhat should.", _with(
                lambda s: (s.dout * (s.xhat * s.weight + s.bias)).sum(axis=0))),
            Mistake("it is summed over rows and columns; weight has one entry for each column.",
                    _with(lambda s: (s.dout * s.xhat).sum())),
            Mistake("x - mean is not divided by sqrt(var + eps).",
                    _with(lambda s: (s.dout * s.centred).sum(axis=0))),
            *(Mistake(says, _with(_dweight, **change)) for says, change in _STATISTICS),
        ],
        "dbias": [
            Mistake("it is the mean over the rows, not the sum.",
                    lambda dout, **_: dout.mean(axis=0)),
            Mistake("it is the sum over the wrong axis: bias has one entry for each column.",
                    lambda dout, **_: dout.sum(axis=1)),
            Mistake("the sum over the rows is missing.", lambda dout, **_: dout),
            Mistake("the weight is in it; the bias is added after the weight.",
                    lambda dout, weight, **_: (dout * weight).sum(axis=0)),
        ],
    },
    read={"dx": "x reaches the loss in three ways: directly, and by its row's mean and variance.",
          "dweight": "the weight multiplies xhat in every row.",
          "dbias": "the bias is added in every row."},
    factors=lambda dout, **_: {"N (the number of rows)": len(dout),
                               "C (the width)": dout.shape[1]},
    forward=_forward,
)


def layer_norm_backward(function: Callable[..., Any]) -> Passed:
    """Check exercise 7: dx, dweight, dbias = layer_norm_backward(dout, x, weight, bias, eps).

    Parameters
    ----------
    function
        Takes dout and x (N, C), weight and bias (C,), and eps; returns the gradients of x,
        weight and bias.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(LAYER_NORM_BACKWARD, function)
