"""Exercise 4: the gradients of a LoRA layer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.arrays import normal
from minilora.exercises.comparison import Case
from minilora.exercises.engine import check
from minilora.exercises.outcome import Passed, failed, run
from minilora.exercises.task import Mistake, Task

NUMBER = 4
# Name of the check: the name that a submission must define.
DEFINED = {"lora_backward": "lora_backward"}


def _case(n_rows: int, n: int, m: int, r: int, scale: float) -> Case:
    """Return dout (N, m), x (N, n), A (n, r), B (r, m) and the scale."""
    return {"dout": normal(n_rows, m, seed=3), "x": normal(n_rows, n), "A": normal(n, r, seed=4),
            "B": normal(r, m, seed=5), "scale": scale}


def _check_memory(function: Callable[..., Any]) -> None:
    """Check that no array as large as W is made, by the peak memory for thin inputs."""
    n = 800
    case = _case(2, n, n, 1, 2.0)
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        run("lora_backward", lambda: function(*case.values()))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()
    if peak > 0.5 * 8 * n * n:
        raise failed("lora_backward", "The values are right, but an array as large as W is formed "
                     "on the way. Set the brackets so that one side is always thin: "
                     "x.T @ (dout @ B.T), (x @ A).T @ dout, (dout @ B.T) @ A.T.",
                     "the last paragraph of the mathematics.")


LORA_BACKWARD = Task(
    name="lora_backward",
    outputs=("dx", "dA", "dB"),
    reference=lambda dout, x, A, B, scale: (
        scale * dout @ B.T @ A.T, scale * x.T @ (dout @ B.T), scale * (x @ A).T @ dout),
    cases=[_case(*c) for c in [
        (2, 3, 2, 1, 2.0), (3, 3, 3, 3, 0.5), (1, 4, 2, 2, 4.0), (5, 1, 3, 1, 0.25),
        (6, 5, 1, 2, 2.0), (4, 6, 7, 3, 1.5), (1, 1, 1, 1, 3.0)]],
    mistakes={
        "dx": [
            Mistake("this is the gradient of the base's branch or lacks the scale and A.",
                    lambda dout, x, A, B, scale: dout @ B.T),
            Mistake("A and B are the wrong way round: dx = scale * dout Bᵀ Aᵀ.",
                    lambda dout, x, A, B, scale: scale * dout @ A @ B),
            Mistake("A is not transposed: dx = scale * dout Bᵀ Aᵀ.",
                    lambda dout, x, A, B, scale: scale * dout @ B.T @ A),
            Mistake("B is not transposed: dx = scale * dout Bᵀ Aᵀ.",
                    lambda dout, x, A, B, scale: scale * dout @ B @ A.T),
            Mistake("x is added; the gradient does not hold x.",
                    lambda dout, x, A, B, scale: scale * dout @ B.T @ A.T + x),
            Mistake("it is the forward pass of x; what goes back is dout.",
                    lambda dout, x, A, B, scale: scale * x @ A @ B),
            Mistake("it is the forward pass of dout: take the transposes, in reverse order.",
                    lambda dout, x, A, B, scale: scale * dout @ A.T @ B.T),
        ],
        "dA": [
            Mistake("it is transposed: A is (n, r), so dA = scale * xᵀ (dout Bᵀ).",
                    lambda dout, x, A, B, scale: (scale * x.T @ (dout @ B.T)).T),
            Mistake("B is not transposed.", lambda dout, x, A, B, scale: scale * x.T @ (dout @ B)),
            Mistake("A stands where B should: dA holds B, and dB holds A.",
                    lambda dout, x, A, B, scale: scale * x.T @ dout @ A),
            Mistake("sums over the rows are multiplied; it is the sum of the rows' products.",
                    lambda dout, x, A, B, scale: scale * np.outer(x.sum(0), (dout @ B.T).sum(0))),
            Mistake("A itself is added.",
                    lambda dout, x, A, B, scale: scale * x.T @ (dout @ B.T) + A),
            Mistake("B is left out: this is the gradient of W.",
                    lambda dout, x, A, B, scale: scale * x.T @ dout),
            Mistake("this is the gradient of the mean over the rows, not of the sum.",
                    lambda dout, x, A, B, scale: scale * x.T @ (dout @ B.T) / len(x)),
        ],
        "dB": [
            Mistake("it is transposed: B is (r, m), so dB = scale * (x A)ᵀ dout.",
                    lambda dout, x, A, B, scale: (scale * (x @ A).T @ dout).T),
            Mistake("A is left out: this is the gradient of W.",
                    lambda dout, x, A, B, scale: scale * x.T @ dout),
            Mistake("this is the gradient of the mean over the rows, not of the sum.",
                    lambda dout, x, A, B, scale: scale * (x @ A).T @ dout / len(x)),
            Mistake("sums over the rows are multiplied; it is the sum of the rows' products.",
                    lambda dout, x, A, B, scale: scale * np.outer((x @ A).sum(0), dout.sum(0))),
            Mistake("B itself is added.",
                    lambda dout, x, A, B, scale: scale * (x @ A).T @ dout + B),
            Mistake("B stands where A should.",
                    lambda dout, x, A, B, scale: scale * (x @ B).T @ dout),
        ],
    },
    read={"dx": "x goes through A, then B, then the scale; the way back is the reverse.",
          "dA": "start from dW of exercise 1; A is one factor of the product A B.",
          "dB": "start from dW of exercise 1; B is one factor of the product A B."},
    factors=lambda dout, x, A, B, scale: {
        "scale = alpha / r": scale, "N": len(x), "r": A.shape[1], "n": len(A), "m": B.shape[1]},
    forward=lambda x, A, B, scale: scale * x @ A @ B,
    more=_check_memory,
)


def lora_backward(function: Callable[..., Any]) -> Passed:
    """Check exercise 4: dx, dA, dB = lora_backward(dout, x, A, B, scale).

    Parameters
    ----------
    function
        Takes dout (N, m), x (N, n), A (n, r), B (r, m) and a number; returns the gradients of
        x, A and B.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(LORA_BACKWARD, function)
