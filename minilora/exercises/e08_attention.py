"""Exercise 8: the gradients of causal attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.arrays import normal, softmax
from minilora.exercises.comparison import Case
from minilora.exercises.engine import check
from minilora.exercises.outcome import Passed
from minilora.exercises.task import Mistake, Task

NUMBER = 8
# Name of the check: the name that a submission must define.
DEFINED = {"attention_backward": "attention_backward"}


def _probabilities(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return the causal softmax of the scores (T, T)."""
    scores = q @ k.T / q.shape[1] ** 0.5
    return softmax(scores + np.triu(np.full(scores.shape, -np.inf, scores.dtype), k=1))


def _reference(
    dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of q, k and v, each (T, D)."""
    p, scale = _probabilities(q, k), q.shape[1] ** -0.5
    dp = dout @ v.T
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ dout


def _case(t: int, d: int, scale: float = 1.5) -> Case:
    """Return dout, q, k and v, each (t, d)."""
    case = {name: 1.5 * normal(t, d, seed=i) for i, name in enumerate(("dout", "q", "k", "v"))}
    return case | {"q": scale * case["q"], "k": scale * case["k"]}


def _masked(scores: np.ndarray, change: str) -> np.ndarray:
    """Return the scores (T, T) with the causal mask, or with the mistake `change` in it."""
    ones = np.ones_like(scores)
    if change == "zeros":
        return scores * np.tril(ones)
    if change == "product":
        return scores - np.inf * np.triu(ones, 1)
    if change.startswith("-"):  # a finite number for the mask
        return scores + float(change) * np.triu(ones, 1)
    masks = {"no mask": ones, "mask late": ones, "future": np.triu(ones),
             "strict": np.tril(ones, -1), "one more": np.tril(ones, 1),
             "two less": np.tril(ones, -2)}
    return np.where(masks.get(change, np.tril(ones)) > 0, scores, -np.inf)


def _wrong_probabilities(q: np.ndarray, k: np.ndarray, change: str) -> np.ndarray:
    """Return the probabilities (T, T), with the mistake `change` if it concerns them."""
    t, d = q.shape
    factor = {"no scale at all": 1.0, "scale late": 1.0, "1/D": 1 / d, "times": d**0.5,
              "T": t**-0.5}.get(change, d**-0.5)
    scores = _masked((k @ q.T if change == "exchanged" else q @ k.T) * factor, change)
    own = scores.max(axis=-1, keepdims=True)
    shift = {"overflow": 0.0, "one maximum": scores.max(), "column maximum": scores.max(axis=0),
             "flat maximum": own[:, 0]}.get(change, own)
    e = np.exp(scores - shift)
    sums = {"column sums": e.sum(axis=0), "flat sum": e.sum(axis=-1), "all": e.sum(),
            "one": 1.0}.get(change, e.sum(axis=-1, keepdims=True))
    p = softmax(scores, 0) if change == "columns" else e / sums
    return p * np.tril(np.ones_like(p)) if change == "mask late" else p


def _wrong(output: int, change: str) -> Callable[..., np.ndarray]:
    """Return a function that computes one of the three gradients with the mistake `change`."""

    def wrong(dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        d = q.shape[1]
        if change == "names":
            q, k = k, q
        p = _wrong_probabilities(q, k, change)
        dp = dout @ (k if change == "k for v" else v).T
        dp = {"v for dout": v @ v.T, "dp transposed": dp.T}.get(change, dp)
        product, rows = dp * p, {"axis": -1, "keepdims": True}
        inner = {
            "axis": product.sum(axis=0), "flat inner": product.sum(axis=-1),
            "mean": product.mean(**rows), "everything": product.sum(),
            "minus": -product.sum(**rows),
        }.get(change, product.sum(**rows))
        ds = {
            "no inner": p * dp,
            "no p": dp - inner,
            "own slope": p * (1 - p) * dp,
            "plain sum": p * (dp - dp.sum(**rows)),
            "p twice": p * p * (dp - inner),
            "dp alone": dp,
            "upper": np.triu(p * (dp - inner)),
        }.get(change, p * (dp - inner))
        factors = {"no scale": 1.0, "no scale at all": 1.0, "1/D": 1 / d, "times": d**0.5,
                   "T": len(q) ** -0.5, "twice": 1 / d}
        ds = ds * factors.get(change, d**-0.5)
        return {
            "with v": (ds @ v, ds.T @ v, p.T @ q),
            "with dout": (ds @ dout, ds.T @ dout, p.T @ k),
            "swap": (ds.T @ q, ds @ k, p.T @ dout),
            "not transposed": (ds.T @ k, ds @ q, p @ dout),
            "own": (ds @ q, ds.T @ k, p.T @ v),
            "entries": (ds @ k, ds.T @ q, p.sum(axis=0)[:, None] * dout),
        }.get(change, (ds @ k, ds.T @ q, p.T @ dout))[output]

    return wrong


_FINITE = "the mask is a finite number, which large scores outweigh: take -inf."
# Mistakes on the way to P, and on the way back: words, and the name of the change
_FORWARD = [
    ("every number is nan, as where a mask is made by multiplying: -inf * 0 is nan. Choose with "
     "np.where, or take np.triu(np.full((T, T), -np.inf), k=1).", "product"),
    ("the mask is one off: each position sees the next one as well (k=1).", "one more"),
    ("the mask is one off twice: it hides the diagonal and the one before (k=1).", "two less"),
    ("the mask makes scores 0, and exp(0) is 1: the masked ones must be -inf.", "zeros"),
    *((_FINITE, number)
      for number in ("-1", "-2", "-3", "-5", "-10", "-20")),
    ("q and k are exchanged in the scores: they are q kᵀ.", "exchanged"),
    ("q and k are exchanged throughout, as if the arguments came in another order.", "names"),
    ("it is multiplied by sqrt(D); the scores are divided by it.", "times"),
    ("the factor is 1 / sqrt(T); it is 1 / sqrt(D).", "T"),
    ("the maximum is of all scores, so that rows with small ones underflow: each row has its own, "
     "max(axis=-1, keepdims=True).", "one maximum"),
    ("the maximum is over the wrong axis: max(axis=-1, keepdims=True).", "column maximum"),
    ("the maximum lacks keepdims=True, so that it is subtracted from columns.", "flat maximum"),
    ("the sum of the exponentials lacks keepdims=True, so that it divides columns.", "flat sum"),
    ("the exponentials are summed over the wrong axis: sum(axis=-1, keepdims=True).",
     "column sums"),
    ("the exponentials are divided by the sum of all; each row has its own.", "all"),
    ("the exponentials are not divided by their sum.", "one"),
]
_BACK = [
    ("the sum of dP * P lacks keepdims=True, so that it is subtracted from columns.", "flat inner"),
    ("there is a mean where the sum of dP * P should be.", "mean"),
    ("the sum of dP * P is over everything; each row has its own.", "everything"),
    ("the sum of dP * P is added; it is subtracted.", "minus"),
    ("the factor 1 / sqrt(D) is in it twice on the way back.", "twice"),
    ("P is in front twice.", "p twice"),
    ("the soft-max's gradient is missing: this is dP, not dS.", "dp alone"),
    ("dS is cut to the wrong side of the diagonal; where P is 0, it is 0 by itself.", "upper"),
    ("v stands where dout should: dP = dout vᵀ.", "v for dout"),
    ("dP is transposed: dP = dout vᵀ.", "dp transposed"),
    ("the last product is with v; dq holds k, and dk holds q.", "with v"),
    ("the last product is with dout; dq holds k, and dk holds q.", "with dout"),
    ("k stands where v should: dP = dout vᵀ.", "k for v"),
]
_OWN = ("q stands where k should: dq = dS k.", "k stands where q should: dk = dSᵀ q.",
        "v stands where dout should: dv = Pᵀ dout.")
_MASK = "the causal mask is missing: a position must not look at later ones."
_LATE = ("the mask is put on after the soft-max, so the rows do not sum to 1: it belongs into the "
         "scores, as -inf.")
_INNER = "the soft-max's second term is missing: dS = P * (dP - sum of dP * P in the row)."
_SCALE = "the factor 1 / sqrt(D) is missing on the way back."
_ALL = "the factor 1 / sqrt(D) is missing, in the scores and on the way back."

ATTENTION_BACKWARD = Task(
    name="attention_backward",
    outputs=("dq", "dk", "dv"),
    reference=_reference,
    cases=[_case(*c) for c in [(3, 2), (2, 2), (4, 3), (1, 3), (5, 1), (7, 4), (4, 4),
                               (5, 4, 40.0)]],
    mistakes={
        name: [
            Mistake(_MASK, _wrong(i, "no mask")),
            Mistake(_LATE, _wrong(i, "mask late")),
            Mistake(_ALL, _wrong(i, "no scale at all")),
            Mistake("exp overflows where scores are large: subtract each row's maximum first.",
                    _wrong(i, "overflow")),
            Mistake("the mask is on the wrong side: it hides the past and shows the future.",
                    _wrong(i, "future")),
            Mistake("the mask hides the diagonal as well: a position looks at itself, too (k=1).",
                    _wrong(i, "strict")),
            *(Mistake(says, _wrong(i, change)) for says, change in _FORWARD),
            Mistake("the factor is 1 / D; it is 1 / sqrt(D).", _wrong(i, "1/D")),
            Mistake("the soft-max is over the wrong axis: each row of scores is one distribution.",
                    _wrong(i, "columns")),
            Mistake("the factor 1 / sqrt(D) is missing in the scores; it is there on the way back.",
                    _wrong(i, "scale late")),
            *([] if name == "dv" else [
                Mistake(_INNER, _wrong(i, "no inner")),
                Mistake(_SCALE, _wrong(i, "no scale")),
                Mistake("the sum in the soft-max's gradient is over the wrong axis: each row of P "
                        "is one distribution.", _wrong(i, "axis")),
                Mistake("P (1 - P) is only the diagonal of the soft-max's gradient: every P_i "
                        "depends on every S_j.", _wrong(i, "own slope")),
                Mistake("the sum in the soft-max's gradient is of dP * P, not of dP.",
                        _wrong(i, "plain sum")),
                Mistake("P is missing in front: dS = P * (dP - sum of dP * P).",
                        _wrong(i, "no p")),
                Mistake("dq and dk are swapped: dq = dS k, dk = dSᵀ q.", _wrong(i, "swap")),
                *(Mistake(says, _wrong(i, change)) for says, change in _BACK),
            ]),
            Mistake(_OWN[i], _wrong(i, "own")),
            *([] if name != "dv" else [
                Mistake("q stands where dout should: dv = Pᵀ dout.", _wrong(i, "with v")),
                Mistake("k stands where dout should: dv = Pᵀ dout.", _wrong(i, "with dout")),
            ]),
            *([] if name != "dv" else [
                Mistake("P is summed and multiplied entry by entry; dv is a product of matrices, "
                        "Pᵀ dout.", _wrong(i, "entries")),
                *(Mistake(_FINITE, _wrong(i, number))
                  for number in ("-50", "-100", "-1000")),
            ]),
            Mistake("a transpose is missing or too much: dq = dS k, dk = dSᵀ q, dv = Pᵀ dout.",
                    _wrong(i, "not transposed")),
        ]
        for i, name in enumerate(("dq", "dk", "dv"))
    },
    read={"dq": "go back step by step: from out = P v to P, from P to S, from S to q.",
          "dk": "go back step by step: from out = P v to P, from P to S, from S to k.",
          "dv": "out = P v is a product of matrices, as in exercise 1."},
    factors=lambda dout, **_: {"sqrt(D)": dout.shape[1] ** 0.5, "T": len(dout)},
    forward=lambda q, k, v: _probabilities(q, k) @ v,
)


def attention_backward(function: Callable[..., Any]) -> Passed:
    """Check exercise 8: dq, dk, dv = attention_backward(dout, q, k, v).

    Parameters
    ----------
    function
        Takes dout, q, k and v, each (T, D); returns the gradients of q, k and v.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(ATTENTION_BACKWARD, function)
