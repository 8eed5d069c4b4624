"""Exercise 2: softmax cross-entropy and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.arrays import normal, softmax
from minilora.exercises.comparison import Case
from minilora.exercises.engine import check
from minilora.exercises.outcome import Passed
from minilora.exercises.task import Mistake, Task

NUMBER = 2
# Name of the check: the name that a submission must define.
DEFINED = {"cross_entropy": "cross_entropy"}


def _one_hot(targets: np.ndarray, width: int, shift: int = 0) -> np.ndarray:
    """Return an array (N, width) with a 1 at each target, moved `shift` columns to the right."""
    return np.eye(width, dtype=np.float32)[(targets + shift) % width]


def _entropy(logits: np.ndarray, targets: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the loss of each row (N,)."""
    z = logits - logits.max(axis=axis, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=axis, keepdims=True))
    return -log_p[np.arange(len(targets)), targets]


def _reference(logits: np.ndarray, targets: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return the loss and its gradient (N, V)."""
    p = softmax(logits)
    return _entropy(logits, targets).mean(), (p - _one_hot(targets, p.shape[1])) / len(targets)


def _case(n: int, v: int, scale: float = 1.0, shift: float = 0.0) -> Case:
    """Return logits (n, v) and targets (n,)."""
    targets = np.random.default_rng([n, v]).integers(0, v, n)
    logits = scale * normal(n, v) + shift
    if n > 1:  # rows far apart; the first is predicted badly
        targets[0] = logits[0].argmin()
        logits[-1] -= 3.0
    return {"logits": logits, "targets": targets}


def _naive(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the loss of each row (N,), without subtracting anything in the exponentials."""
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return -np.log(p[np.arange(len(targets)), targets])


def _sums(logits: np.ndarray) -> np.ndarray:
    """Return the sum of each row's exponentials (N, 1)."""
    return np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)


def _shifted(logits: np.ndarray, targets: np.ndarray, shift: Any) -> tuple[Any, np.ndarray]:
    """Return loss and gradient with `shift` subtracted instead of each row's maximum."""
    z = logits - shift
    e = np.exp(z)
    log_p = z - np.log(e.sum(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    rows = np.arange(len(targets))
    return -log_p[rows, targets].mean(), (p - _one_hot(targets, p.shape[1])) / len(targets)


def _exp(logits: np.ndarray) -> np.ndarray:
    """Return the exponentials (N, V), with each row's maximum subtracted."""
    return np.exp(logits - logits.max(axis=-1, keepdims=True))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities (N, V)."""
    return logits - logits.max(axis=-1, keepdims=True) - np.log(_sums(logits))


def _p_target(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the probability of each target (N,)."""
    return softmax(logits)[np.arange(len(targets)), targets]


def _log_sum(
    logits: np.ndarray, targets: np.ndarray, log: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Return the loss with another logarithm of the sums (N, 1)."""
    z = logits - logits.max(axis=-1, keepdims=True)
    return -(z[np.arange(len(targets)), targets] - log(_sums(logits))[:, 0]).mean()


def _with_epsilons() -> list[Mistake]:
    """Return the losses with a small number in the logarithm, added or as a bound."""

    def makes(eps: float, change: Callable[..., Any], everywhere: bool) -> Callable[..., Any]:
        return lambda logits, targets: -np.log(change(
            _p_target(logits, targets) / (1 + eps * everywhere), eps)).mean()

    sizes = [*(10.0**-k for k in range(3, 21)), *(np.finfo(t).eps for t in (float, np.float32)),
             1e-30, 1e-100, 1e-300, float(np.finfo(float).tiny)]
    return [
        Mistake(text + " hides the problem and gives wrong losses. Take z - max - "
                "log(sum(exp(z - max))).", makes(eps, change, everywhere))
        for eps in sizes for text, change, everywhere in (
            ("adding a small number inside the logarithm", np.add, False),
            ("adding small numbers inside the logarithm and to the sum", np.add, True),
            ("clipping probabilities", np.maximum, False),
            ("clipping probabilities", lambda p, e: np.clip(p, e, 1 - e), False))
    ]


_OVERFLOW = ("exp overflows where logits are large. Subtract the row's maximum first: it changes "
             "nothing, since numerator and denominator get the same factor.")

CROSS_ENTROPY = Task(
    name="cross_entropy",
    outputs=("loss", "dlogits"),
    reference=_reference,
    cases=[_case(2, 3), _case(3, 3), _case(1, 4), _case(5, 2),
           _case(4, 7, 3.0), _case(3, 5, 1.0, 1000.0), _case(3, 4, 400.0),
           {"logits": np.array([[0.0, 0.0, 0.0, 750.0], [0.0, 1.0, 2.0, 0.0]]),
            "targets": np.array([0, 2])},
           _case(3, 4, 1.0, -1000.0), _case(3, 3, 600.0), _case(2, 1)],
    mistakes={
        "loss": [
            Mistake("this is the sum over the rows, not the mean.",
                    lambda logits, targets: _entropy(logits, targets).sum()),
            Mistake("the minus sign is missing: the loss is -log p, which is positive.",
                    lambda logits, targets: -_entropy(logits, targets).mean()),
            *(Mistake(f"the logarithm is to base {base}; nats need the natural one, np.log.",
                      lambda logits, targets, base=base: _log_sum(
                          logits, targets, lambda s: np.log(s) / np.log(base)))
              for base in (2, 10)),
            Mistake("the mean of the exponentials stands where their sum should.",
                    lambda logits, targets: _entropy(logits, targets).mean()
                    - np.log(logits.shape[1])),
            Mistake("it is the largest of the rows; take the mean.",
                    lambda logits, targets: _entropy(logits, targets).max()),
            Mistake("the logarithm is of 1 + the sum of the exponentials (np.log1p).",
                    lambda logits, targets: _log_sum(logits, targets, np.log1p)),
            Mistake("this is one loss for each row; return their mean.", _entropy),
            Mistake("the soft-max is over the wrong axis: each row is one distribution.",
                    lambda logits, targets: _entropy(logits, targets, axis=0).mean()),
            Mistake(_OVERFLOW, lambda logits, targets: _naive(logits, targets).mean()),
            Mistake("log of a probability that has underflowed to 0 is -inf. Take z - max - "
                    "log(sum(exp(z - max))) instead of log(p).",
                    lambda logits, targets: -np.log(
                        softmax(logits)[np.arange(len(targets)), targets]).mean()),
            Mistake("the maximum must be each row's own: max(axis=-1, keepdims=True). One for all "
                    "rows makes rows with small logits underflow.",
                    lambda logits, targets: _shifted(logits, targets, logits.max())[0]),
            Mistake("the mean was subtracted; it is the maximum that keeps exp from overflowing.",
                    lambda logits, targets: _shifted(
                        logits, targets, logits.mean(axis=-1, keepdims=True))[0]),
            Mistake("the minimum was subtracted; it is the maximum that keeps exp from "
                    "overflowing.", lambda logits, targets: _shifted(
                        logits, targets, logits.min(axis=-1, keepdims=True))[0]),
            Mistake("the maximum was taken over the wrong axis: max(axis=-1, keepdims=True).",
                    lambda logits, targets: _shifted(logits, targets, logits.max(axis=0))[0]),
            Mistake("the maximum is missing, and exp of very small logits underflows to 0 (or "
                    "overflows).",
                    lambda logits, targets: _shifted(logits, targets, 0.0)[0]),
            *_with_epsilons(),
            Mistake("the sum of the exponentials is missing (the denominator).",
                    lambda logits, targets: -(logits - logits.max(-1, keepdims=True))[
                        np.arange(len(targets)), targets].mean()),
            Mistake("the maximum was subtracted in the exponentials, and not from the logit.",
                    lambda logits, targets: (_entropy(logits, targets)
                                             - logits.max(axis=-1)).mean()),
            Mistake("the logarithm is missing.", lambda logits, targets: -softmax(logits)[
                np.arange(len(targets)), targets].mean()),
            Mistake("the exponentials are summed over the whole batch: "
                    "sum(axis=-1, keepdims=True).",
                    lambda logits, targets: (_entropy(logits, targets) + np.log(_sums(logits).sum())
                                             - np.log(_sums(logits)[:, 0])).mean()),
            Mistake("the mean is over all N V entries; divide by N, one target for each row.",
                    lambda logits, targets: _entropy(logits, targets).sum() / logits.size),
            Mistake("it is the mean over all N V log-probabilities; only those of the targets "
                    "count.", lambda logits, targets: -_log_softmax(logits).mean()),
            Mistake("p[:, targets] takes N targets of every row. Index with both, "
                    "[np.arange(N), targets].",
                    lambda logits, targets: -_log_softmax(logits)[:, targets].mean()),
            Mistake("it is the sum over the rows, divided by V; divide by N.",
                    lambda logits, targets: _entropy(logits, targets).sum() / logits.shape[1]),
            Mistake("it takes the likeliest token instead of the target.",
                    lambda logits, targets: -_log_softmax(logits).max(axis=-1).mean()),
            Mistake("the logarithm is of the mean p; it is the mean of the logarithms.",
                    lambda logits, targets: -np.log(_p_target(logits, targets).mean())),
            Mistake("it is the perplexity, exp of the loss; return the loss.",
                    lambda logits, targets: np.exp(_entropy(logits, targets).mean())),
            Mistake("only the first row is in it.",
                    lambda logits, targets: _entropy(logits, targets)[0]),
            Mistake("it is 1 - p; the loss is -log p.",
                    lambda logits, targets: 1 - _p_target(logits, targets).mean()),
            Mistake("it is the square of 1 - p; the loss is -log p.",
                    lambda logits, targets: ((1 - _p_target(logits, targets)) ** 2).mean()),
            Mistake("the sums of the exponentials are over the wrong axis: "
                    "sum(axis=-1, keepdims=True).",
                    lambda logits, targets: _log_sum(logits, targets, lambda s: np.log(
                        _exp(logits).sum(axis=0))[targets][:, None])),
            Mistake("the sums of the exponentials lack keepdims=True: each row must keep its own.",
                    lambda logits, targets: _log_sum(logits, targets, lambda s: np.log(
                        s[:, 0])[targets][:, None])),
            Mistake("0 * log(0) is nan: pick the target's logarithm by its index instead of "
                    "multiplying by a one-hot array.",
                    lambda logits, targets: -(_one_hot(targets, logits.shape[1])
                                              * np.log(softmax(logits))).sum() / len(targets)),
            Mistake("this is the mean of p, without a logarithm.",
                    lambda logits, targets: softmax(logits)[
                        np.arange(len(targets)), targets].mean()),
            Mistake("the targets are off by one.",
                    lambda logits, targets: _entropy(
                        logits, (targets + 1) % logits.shape[1]).mean()),
            Mistake("the targets are off by one.",
                    lambda logits, targets: _entropy(
                        logits, (targets - 1) % logits.shape[1]).mean()),
        ],
        "dlogits": [
            Mistake("it is the gradient of the sum, not of the mean: divide by N.",
                    lambda logits, targets: softmax(logits) - _one_hot(targets, logits.shape[1])),
            Mistake("the sign is wrong: it is p - onehot, so that a step against it raises the "
                    "logit of the target.", lambda logits, targets: (
                        _one_hot(targets, logits.shape[1]) - softmax(logits)) / len(targets)),
            Mistake("the 1 is not subtracted at the targets.",
                    lambda logits, targets: softmax(logits) / len(targets)),
            Mistake("the 1 is not subtracted at the targets, and it is not divided by N.",
                    lambda logits, targets: softmax(logits)),
            Mistake("it is divided by V or by N V; the mean is over the N rows.",
                    lambda logits, targets: (softmax(logits) - _one_hot(
                        targets, logits.shape[1])) / logits.size),
            Mistake("it is divided by V; the mean is over the N rows.",
                    lambda logits, targets: (softmax(logits) - _one_hot(
                        targets, logits.shape[1])) / logits.shape[1]),
            Mistake("the targets are off by one.", lambda logits, targets: (softmax(
                logits) - _one_hot(targets, logits.shape[1], 1)) / len(targets)),
            Mistake("the targets are off by one.", lambda logits, targets: (softmax(
                logits) - _one_hot(targets, logits.shape[1], -1)) / len(targets)),
            Mistake("the soft-max is over the wrong axis: each row is one distribution.",
                    lambda logits, targets: (softmax(logits, 0) - _one_hot(
                        targets, logits.shape[1])) / len(targets)),
            Mistake(_OVERFLOW, lambda logits, targets: (
                np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
                - _one_hot(targets, logits.shape[1])) / len(targets)),
            Mistake("the maximum must be each row's own: max(axis=-1, keepdims=True).",
                    lambda logits, targets: _shifted(logits, targets, logits.max())[1]),
            Mistake("1 is added at the targets; it is subtracted.", lambda logits, targets: (
                softmax(logits) + _one_hot(targets, logits.shape[1])) / len(targets)),
            Mistake("it is -1 at the targets; there it is p - 1.", lambda logits, targets: np.where(
                _one_hot(targets, logits.shape[1]) > 0, -1, softmax(logits)) / len(targets)),
            Mistake("it is 0 except at the targets; every logit of a row has a gradient, p.",
                    lambda logits, targets: (softmax(logits) - 1) * _one_hot(
                        targets, logits.shape[1]) / len(targets)),
            Mistake("the logarithms of the probabilities are in it instead of the probabilities.",
                    lambda logits, targets: (_log_softmax(logits) - _one_hot(
                        targets, logits.shape[1])) / len(targets)),
            Mistake("the exponentials are not divided by their sum.", lambda logits, targets: (
                _exp(logits) - _one_hot(targets, logits.shape[1])) / len(targets)),
            Mistake("it is multiplied by p once more: p - onehot is the whole gradient already.",
                    lambda logits, targets: softmax(logits) * (softmax(logits) - _one_hot(
                        targets, logits.shape[1])) / len(targets)),
            Mistake("the 1 is subtracted after dividing by N; divide p - onehot as a whole.",
                    lambda logits, targets: softmax(logits) / len(targets) - _one_hot(
                        targets, logits.shape[1])),
            Mistake("1 is subtracted in whole columns: p[:, targets] takes every row. Index with "
                    "both, p[np.arange(N), targets].", lambda logits, targets: (softmax(
                        logits) - _one_hot(targets, logits.shape[1]).max(axis=0)) / len(targets)),
            Mistake("1 is subtracted in the whole row or column instead of at one place: index "
                    "with both p[np.arange(N), targets].", lambda logits, targets: (
                        softmax(logits) - 1) / len(targets)),
        ],
    },
    read={"loss": "loss = -(1/N) sum of log p[target], log p = z - max - log sum exp(z - max).",
          "dlogits": "d(-log p_t)/dz_j = p_j - (1 if j is the target, else 0); 1/N of the mean."},
    factors=lambda logits, targets: {"N (the number of rows)": len(targets)},
)


def cross_entropy(function: Callable[..., Any]) -> Passed:
    """Check exercise 2: loss, dlogits = cross_entropy(logits, targets).

    Parameters
    ----------
    function
        Takes logits (N, V) and integer targets (N,); returns the mean loss and its gradient (N, V).

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(CROSS_ENTROPY, function)
