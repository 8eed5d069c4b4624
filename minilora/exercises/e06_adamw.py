"""Exercise 6: one step of AdamW."""

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

NUMBER = 6
# Name of the check: the name that a submission must define.
DEFINED = {"adamw": "adamw_step"}


def _reference(
    p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the new p, m and v: Loshchilov & Hutter 2019, algorithm 2."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p), m, v


def _case(shape: tuple[int, ...], t: int, decay: float = 0.1, eps: float = 0.01) -> Case:
    """Return p, g, m and v of one shape, and the numbers."""
    return {"p": normal(*shape), "g": normal(*shape, seed=1), "m": 0.3 * normal(*shape, seed=2),
            "v": normal(*shape, seed=3) ** 2, "t": t, "lr": 0.1, "beta1": 0.9, "beta2": 0.99,
            "eps": eps, "weight_decay": decay}


def _wrong_corrections(beta1: float, beta2: float, t: int, change: str) -> tuple[float, float]:
    """Return the divisors of m and v, with the mistake `change` if it concerns them."""
    t += {"late t": 1, "early t": -1}.get(change, 0)
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    if change == "product":
        return 1 / c1, 1 / c2
    return {
        "no corrections": (1.0, 1.0),
        "no c1": (1.0, c2),
        "no c2": (c1, 1.0),
        "linear": (1 - beta1 * t, 1 - beta2 * t),
        "no power": (1 - beta1, 1 - beta2),
        "power outside": ((1 - beta1) ** t, (1 - beta2) ** t),
        "one beta": (c1, c1),
    }.get(change, (c1, c2))


def _wrong(change: str) -> Callable[..., np.ndarray]:
    """Return a function that computes the new p with the mistake `change`."""

    def wrong(
        p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int,
        lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> np.ndarray:
        decay = weight_decay * p
        if change == "coupled":
            g = g + decay
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        c1, c2 = _wrong_corrections(beta1, beta2, t, change)
        m_hat, v_hat = m / c1, np.ones_like(v) if change == "no v" else v / c2
        root = {
            "inside": np.sqrt(v_hat + eps),
            "no root": v_hat + eps,
            "no eps": np.sqrt(v_hat),
        }.get(change, np.sqrt(v_hat) + eps)
        step = (g if change == "no m" else m_hat) / root
        if change in ("coupled", "no decay"):
            decay = 0.0
        return {
            "eps late": p - lr * (m_hat / np.sqrt(v_hat) + eps + decay),
            "decay inside": p - lr * (m_hat + decay) / root,
            "decay plus": p - lr * step + decay,
            "decay after": (p - lr * step) * (1 - lr * weight_decay),
            "decay without lr": p - lr * step - decay,
            "decay up": p - lr * (step - decay),
            "up": p + lr * (step + decay),
            "no lr": p - (step + decay),
        }.get(change, p - lr * (step + decay))

    return wrong


def _with(formula: Callable[[SimpleNamespace], np.ndarray]) -> Callable[..., np.ndarray]:
    """Return a function that computes the new p by a formula of all that is given or derived."""

    def wrong(**case: Any) -> np.ndarray:
        s = SimpleNamespace(**case)
        _, s.m, s.v = _reference(**case)
        s.m_hat, s.v_hat = s.m / (1 - s.beta1**s.t), s.v / (1 - s.beta2**s.t)
        s.root = np.sqrt(s.v_hat) + s.eps
        s.step, s.decay = s.m_hat / s.root, s.weight_decay * s.p
        return formula(s)

    return wrong


def _new_p(formula: Callable[[SimpleNamespace], Any]) -> Callable[..., np.ndarray]:
    """Return a function that computes the new p with another fraction than m_hat / root."""
    return _with(lambda s: s.p - s.lr * (formula(s) + s.decay))


# The step, the learning rate and the decay
_PARTS = [
    Mistake("the learning rate is missing on the step; it is there on the decay.",
            _with(lambda s: s.p - s.step - s.lr * s.decay)),
    Mistake("the learning rate is in it twice.",
            _with(lambda s: s.p - s.lr**2 * (s.step + s.decay))),
    Mistake("the learning rate is in the step twice.",
            _with(lambda s: s.p - s.lr * (s.lr * s.step + s.decay))),
    Mistake("the learning rate is in the decay twice.",
            _with(lambda s: s.p - s.lr * (s.step + s.lr * s.decay))),
    Mistake("the learning rate is divided by t; here it stays as it is.",
            _with(lambda s: s.p - s.lr / s.t * (s.step + s.decay))),
    Mistake("the learning rate is divided by the root of t; here it stays as it is.",
            _with(lambda s: s.p - s.lr / s.t**0.5 * (s.step + s.decay))),
    Mistake("the step alone is returned; it is to be subtracted from p.",
            _with(lambda s: -s.lr * (s.step + s.decay))),
    Mistake("the step alone is returned; it is to be subtracted from p.",
            _with(lambda s: s.lr * (s.step + s.decay))),
    Mistake("the decay is of g; it is of p.",
            _with(lambda s: s.p - s.lr * (s.step + s.weight_decay * s.g))),
    Mistake("the decay is of the sign of p; it is of p.",
            _with(lambda s: s.p - s.lr * (s.step + s.weight_decay * np.sign(s.p)))),
    Mistake("the decay is of the square of p; it is of p.",
            _with(lambda s: s.p - s.lr * (s.step + s.weight_decay * s.p**2))),
    Mistake("the decay is not multiplied by p.",
            _with(lambda s: s.p - s.lr * (s.step + s.weight_decay))),
    Mistake("the decay is taken twice, of p and of the new p.",
            _with(lambda s: (s.p - s.lr * (s.step + s.decay)) * (1 - s.lr * s.weight_decay))),
    Mistake("the decay is taken twice, once without lr.", _with(lambda s: (
        (1 - s.weight_decay) * s.p * (1 - s.lr * s.weight_decay) - s.lr * s.step))),
    *(Mistake(f"the decay is {rate:g} whatever is given.", _with(
        lambda s, rate=rate: s.p - s.lr * (s.step + rate * s.p))) for rate in (0.1, 0.01, 0.001)),
]
# The fraction m_hat / (sqrt(v_hat) + eps)
_FRACTIONS = [
    Mistake("epsilon is subtracted; it is added.",
            _new_p(lambda s: s.m_hat / (np.sqrt(s.v_hat) - s.eps))),
    Mistake("epsilon is squared.", _new_p(lambda s: s.m_hat / (np.sqrt(s.v_hat) + s.eps**2))),
    Mistake("it adds the root of epsilon.",
            _new_p(lambda s: s.m_hat / (np.sqrt(s.v_hat) + s.eps**0.5))),
    Mistake("epsilon is added twice.",
            _new_p(lambda s: s.m_hat / (np.sqrt(s.v_hat) + 2 * s.eps))),
    Mistake("epsilon is added twice, inside the root and outside.",
            _new_p(lambda s: s.m_hat / (np.sqrt(s.v_hat + s.eps) + s.eps))),
    Mistake("epsilon is added to v before its bias correction.",
            _new_p(lambda s: s.m_hat / ((np.sqrt(s.v) + s.eps) / (1 - s.beta2**s.t) ** 0.5))),
    *(Mistake(f"epsilon is {eps:g} whatever is given.",
              _new_p(lambda s, eps=eps: s.m_hat / (np.sqrt(s.v_hat) + eps)))
      for eps in (1e-3, 1e-4, 1e-5, 1e-6)),
    Mistake("the root is of the mean of all v; every number has its own.",
            _new_p(lambda s: s.m_hat / (np.sqrt(s.v_hat.mean()) + s.eps))),
    Mistake("it does not divide by the root of v, and m is not corrected.", _new_p(lambda s: s.m)),
    Mistake("the absolute value of m is in it.", _new_p(lambda s: abs(s.m_hat) / s.root)),
    Mistake("g stands for the root of v, which is a mean of squares.",
            _new_p(lambda s: s.m_hat / (abs(s.g) / (1 - s.beta2**s.t) ** 0.5 + s.eps))),
    Mistake("epsilon is added to m as well.", _new_p(lambda s: (s.m_hat + s.eps) / s.root)),
    Mistake("the power of t is missing in the bias correction of m: 1 - beta1**t.",
            _new_p(lambda s: s.m / (1 - s.beta1) / s.root)),
    Mistake("the power of t is missing in the bias correction of v: 1 - beta2**t.", _new_p(
        lambda s: s.m_hat / (np.sqrt(s.v / (1 - s.beta2)) + s.eps))),
    Mistake("the bias correction of m has beta1 * t; it is beta1 to the power of t.",
            _new_p(lambda s: s.m / (1 - s.beta1 * s.t) / s.root)),
    Mistake("the bias correction of v has beta2 * t; it is beta2 to the power of t.", _new_p(
        lambda s: s.m_hat / (np.sqrt(s.v / (1 - s.beta2 * s.t)) + s.eps))),
    Mistake("the root is taken twice.", _new_p(lambda s: s.m_hat / (s.v_hat**0.25 + s.eps))),
    Mistake("it does not divide by the root of v.", _new_p(lambda s: s.m_hat)),
    Mistake("only the sign of the mean is used.", _new_p(lambda s: np.sign(s.m_hat))),
    Mistake("it uses g, corrected like m, instead of m.",
            _new_p(lambda s: s.g / (1 - s.beta1**s.t) / s.root)),
    Mistake("g is mixed into m a second time, as in Nesterov's method.", _new_p(lambda s: (
        s.beta1 * s.m + (1 - s.beta1) * s.g) / (1 - s.beta1**s.t) / s.root)),
    Mistake("1 + beta1^t stands in the bias correction; it is 1 - beta1^t.",
            _new_p(lambda s: s.m / (1 + s.beta1**s.t) / s.root)),
    Mistake("1 + beta2^t stands in the bias correction; it is 1 - beta2^t.", _new_p(
        lambda s: s.m_hat / (np.sqrt(s.v / (1 + s.beta2**s.t)) + s.eps))),
    *(Mistake("t is off by one in the bias correction of m; it counts from 1.",
              _new_p(lambda s, d=d: s.m / (1 - s.beta1 ** (s.t + d)) / s.root)) for d in (-1, 1)),
    *(Mistake("t is off by one in the bias correction of v; it counts from 1.", _new_p(
        lambda s, d=d: s.m_hat / (np.sqrt(s.v / (1 - s.beta2 ** (s.t + d))) + s.eps)))
      for d in (-1, 1)),
    Mistake("beta2 is in both bias corrections.",
            _new_p(lambda s: s.m / (1 - s.beta2**s.t) / s.root)),
]

ADAMW = Task(
    name="adamw_step",
    outputs=("p", "m", "v"),
    order=("m", "v", "p"),
    reference=_reference,
    cases=[_case((3,), 1), _case((2, 3), 2), _case((4, 1), 7),
           _case((2, 2), 100), _case((3, 2), 3, 0.0), _case((1,), 5, 0.5, 1e-8)],
    mistakes={
        "p": [
            Mistake("the bias correction is missing: m / (1 - beta1^t), v / (1 - beta2^t).",
                    _wrong("no corrections")),
            Mistake("the bias correction of m is missing.", _wrong("no c1")),
            Mistake("the bias correction of v is missing.", _wrong("no c2")),
            Mistake("the bias correction multiplies instead of dividing.", _wrong("product")),
            Mistake("the bias correction has beta * t; it is beta to the power of t.",
                    _wrong("linear")),
            Mistake("t is off by one in the bias correction; it counts from 1.", _wrong("late t")),
            Mistake("t is off by one in the bias correction; it counts from 1, and the caller has "
                    "done so.", _wrong("early t")),
            Mistake("epsilon is inside the root; it is added to the root: sqrt(v) + eps.",
                    _wrong("inside")),
            Mistake("epsilon is not there, is not the one that is given, or is not added.",
                    _wrong("no eps")),
            Mistake("epsilon is added to the fraction; it belongs to the root, in brackets.",
                    _wrong("eps late")),
            Mistake("the power of t is missing in the bias correction: 1 - beta**t.",
                    _wrong("no power")),
            Mistake("the power is outside: it is 1 - beta**t, not (1 - beta)**t.",
                    _wrong("power outside")),
            Mistake("beta1 is in both bias corrections.", _wrong("one beta")),
            Mistake("the decay is divided by the root as well; it stands outside the fraction.",
                    _wrong("decay inside")),
            Mistake("the decay is added and lacks the factor lr.", _wrong("decay plus")),
            Mistake("the decay is coupled to the gradient (g + decay * p), as in plain Adam with "
                    "L2. AdamW takes it off the weights directly.", _wrong("coupled")),
            Mistake("the weight decay is missing.", _wrong("no decay")),
            Mistake("the weight decay lacks the factor lr.", _wrong("decay without lr")),
            Mistake("the weight decay is taken of the weights after the step, not before.",
                    _wrong("decay after")),
            Mistake("the weight decay has the wrong sign: it makes weights grow.",
                    _wrong("decay up")),
            Mistake("it goes up the gradient; the step is subtracted.", _wrong("up")),
            Mistake("the learning rate is missing.", _wrong("no lr")),
            Mistake("the root over v is missing.", _wrong("no root")),
            Mistake("it uses g instead of the mean m.", _wrong("no m")),
            Mistake("it does not divide by the root of v.", _wrong("no v")),
            Mistake("nothing has changed.", lambda p, **_: p),
            *_PARTS, *_FRACTIONS,
        ],
        "m": [
            Mistake("the factors beta1 and 1 - beta1 are swapped.",
                    lambda g, m, beta1, **_: (1 - beta1) * m + beta1 * g),
            Mistake("the bias correction was stored in m. Keep m as it is; correct a copy.",
                    lambda g, m, beta1, t, **_: (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)),
            Mistake("g has no factor 1 - beta1.", lambda g, m, beta1, **_: beta1 * m + g),
            Mistake("it uses beta2.", lambda g, m, beta2, **_: beta2 * m + (1 - beta2) * g),
            Mistake("the decay was added to the gradient.",
                    lambda p, g, m, beta1, weight_decay, **_:
                    beta1 * m + (1 - beta1) * (g + weight_decay * p)),
            Mistake("g is squared in m; that is for v.",
                    lambda g, m, beta1, **_: beta1 * m + (1 - beta1) * g * g),
            Mistake("it is not updated.", lambda m, **_: m),
            Mistake("g is subtracted; it is added.",
                    lambda g, m, beta1, **_: beta1 * m - (1 - beta1) * g),
            Mistake("both factors are beta1; that of g is 1 - beta1.",
                    lambda g, m, beta1, **_: beta1 * (m + g)),
            Mistake("the old m is missing.", lambda g, beta1, **_: (1 - beta1) * g),
            Mistake("the old m has no factor beta1.",
                    lambda g, m, beta1, **_: m + (1 - beta1) * g),
            Mistake("the absolute value of g is in it.",
                    lambda g, m, beta1, **_: beta1 * m + (1 - beta1) * abs(g)),
            Mistake("g is divided by its size or norm; it is used as it is.",
                    lambda g, m, beta1, **_: beta1 * m + (1 - beta1) * g / g.size),
            Mistake("g is divided by its size or norm; it is used as it is.",
                    lambda g, m, beta1, **_: beta1 * m + (1 - beta1) * g / np.sqrt((g * g).sum())),
            Mistake("g is clipped; it is used as it is.",
                    lambda g, m, beta1, **_: beta1 * m + (1 - beta1) * g.clip(-1, 1)),
            Mistake("it is g itself; m is a mean of old and new.", lambda g, **_: g),
        ],
        "v": [
            Mistake("g is not squared.", lambda g, v, beta2, **_: beta2 * v + (1 - beta2) * g),
            Mistake("it uses beta1.", lambda g, v, beta1, **_: beta1 * v + (1 - beta1) * g * g),
            Mistake("the factors beta2 and 1 - beta2 are swapped.",
                    lambda g, v, beta2, **_: (1 - beta2) * v + beta2 * g * g),
            Mistake("the bias correction was stored in v. Keep v as it is; correct a copy.",
                    lambda g, v, beta2, t, **_: (beta2 * v + (1 - beta2) * g * g) / (1 - beta2**t)),
            Mistake("g² has no factor 1 - beta2.", lambda g, v, beta2, **_: beta2 * v + g * g),
            Mistake("the first factor is beta1.", lambda g, v, beta1, beta2, **_:
                    beta1 * v + (1 - beta2) * g * g),
            Mistake("the factor 1 - beta2 is squared along with g.",
                    lambda g, v, beta2, **_: beta2 * v + ((1 - beta2) * g) ** 2),
            Mistake("it averages the square of m instead of that of g.",
                    lambda g, m, v, beta1, beta2, **_:
                    beta2 * v + (1 - beta2) * (beta1 * m + (1 - beta1) * g) ** 2),
            Mistake("it is not updated.", lambda v, **_: v),
            Mistake("g² is subtracted; it is added.",
                    lambda g, v, beta2, **_: beta2 * v - (1 - beta2) * g * g),
            Mistake("both factors are beta2; that of g² is 1 - beta2.",
                    lambda g, v, beta2, **_: beta2 * (v + g * g)),
            Mistake("the old v is missing.", lambda g, beta2, **_: (1 - beta2) * g * g),
            Mistake("the old v has no factor beta2.",
                    lambda g, v, beta2, **_: v + (1 - beta2) * g * g),
            Mistake("the absolute value of g is in it; it is the square.",
                    lambda g, v, beta2, **_: beta2 * v + (1 - beta2) * abs(g)),
            Mistake("the third power of g is in it; it is the square.",
                    lambda g, v, beta2, **_: beta2 * v + (1 - beta2) * g**3),
            Mistake("the squares are added up; every number has its own v.",
                    lambda g, v, beta2, **_: beta2 * v + (1 - beta2) * (g * g).sum()),
            Mistake("the mean of the squares is in it; every number has its own v.",
                    lambda g, v, beta2, **_: beta2 * v + (1 - beta2) * (g * g).mean()),
            Mistake("the square of the old m is in it; it is that of g.",
                    lambda g, m, v, beta2, **_: beta2 * v + (1 - beta2) * m * m),
            Mistake("it is g² itself; v is a mean of old and new.", lambda g, **_: g * g),
            Mistake("the decay was added to the gradient.",
                    lambda p, g, v, beta2, weight_decay, **_:
                    beta2 * v + (1 - beta2) * (g + weight_decay * p) ** 2),
        ],
    },
    read={"p": "what is corrected, where epsilon and the decay stand, and what lr multiplies.",
          "m": "m is a mean of the old m and of g, whose weights add up to 1.",
          "v": "v is a mean like m, but of the squares of g."},
)


def adamw(function: Callable[..., Any]) -> Passed:
    """Check exercise 6: p, m, v = adamw_step(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay).

    Parameters
    ----------
    function
        Takes the arrays p, g, m and v of one shape and the numbers; returns the new p, m and v.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(ADAMW, function)
