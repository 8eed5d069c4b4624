"""Exercise 6: one step of AdamW."""

from __future__ import annotations

from collections.abc import Callable
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
        ],
    },
    read={"p": "p - lr * (m_hat / (sqrt(v_hat) + eps) + decay * p), m_hat = m / (1 - beta1^t).",
          "m": "m = beta1 m + (1 - beta1) g.", "v": "v = beta2 v + (1 - beta2) g²."},
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
