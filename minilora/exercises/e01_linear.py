"""Exercise 1: forward and backward of a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.arrays import normal
from minilora.exercises.comparison import Case
from minilora.exercises.engine import check
from minilora.exercises.outcome import Passed
from minilora.exercises.task import Mistake, Task

NUMBER = 1
# Name of the check: the name that a submission must define.
DEFINED = {"linear_forward": "linear_forward", "linear_backward": "linear_backward"}

_SHAPES = [(2, 3, 2), (3, 3, 3), (1, 2, 4), (4, 1, 3), (5, 4, 1), (1, 1, 1), (6, 5, 7)]  # N, n, m


def _forward_case(n_rows: int, n: int, m: int) -> Case:
    """Return x (N, n), W (n, m) and b (m,)."""
    return {"x": normal(n_rows, n), "W": normal(n, m, seed=1), "b": normal(m, seed=2)}


def _backward_case(n_rows: int, n: int, m: int) -> Case:
    """Return dout (N, m), x (N, n) and W (n, m)."""
    return {"dout": normal(n_rows, m, seed=3), "x": normal(n_rows, n), "W": normal(n, m, seed=1)}


LINEAR_FORWARD = Task(
    name="linear_forward",
    outputs=("y",),
    reference=lambda x, W, b: x @ W + b,
    cases=[_forward_case(*shape) for shape in _SHAPES],
    mistakes={"y": [
        Mistake("the bias is missing.", lambda x, W, b: x @ W),
        Mistake("the bias is added twice.", lambda x, W, b: x @ W + 2 * b),
        Mistake("the bias is subtracted.", lambda x, W, b: x @ W - b),
        Mistake("only the sum of the bias is added.", lambda x, W, b: x @ W + b.sum()),
        Mistake("W is transposed: it is (n, m) here, so y = x W.", lambda x, W, b: x @ W.T + b),
        Mistake("the weight is used entry by entry (*) instead of as a product of matrices (@).",
                lambda x, W, b: x * W + b),
        Mistake("only the mean of the bias is added.", lambda x, W, b: x @ W + b.mean()),
        Mistake("only the first number of the bias is added.", lambda x, W, b: x @ W + b[0]),
        Mistake("the bias is added once for each row; once is enough.",
                lambda x, W, b: x @ W + len(x) * b),
        Mistake("the bias is added once for each input, inside the sum; it comes after the sum.",
                lambda x, W, b: x @ W + x.shape[1] * b),
        Mistake("the sum over k is missing: only its last term is there (= instead of +=).",
                lambda x, W, b: np.outer(x[:, -1], W[-1]) + b),
        Mistake("only the first row of x is used.", lambda x, W, b: x[0] @ W + b),
        Mistake("the product is subtracted.", lambda x, W, b: b - x @ W),
        Mistake("the bias is multiplied.", lambda x, W, b: x @ W * b),
        Mistake("the last column of y is not filled.", lambda x, W, b: np.concatenate(
            [(x @ W + b)[:, :-1], np.zeros((len(x), 1))], axis=1)),
    ]},
    read={"y": "y = x W + b, with x (N, n), W (n, m), b (m,)."},
)

LINEAR_BACKWARD = Task(
    name="linear_backward",
    outputs=("dx", "dW", "db"),
    reference=lambda dout, x, W: (dout @ W.T, x.T @ dout, dout.sum(axis=0)),
    cases=[_backward_case(*shape) for shape in _SHAPES],
    mistakes={
        "dx": [
            Mistake("W is not transposed: dx = dout Wᵀ.", lambda dout, x, W: dout @ W),
            Mistake("it is dout alone; the chain rule multiplies by Wᵀ.", lambda dout, x, W: dout),
            Mistake("it is transposed: dx = dout Wᵀ has the shape of x, (N, n).",
                    lambda dout, x, W: W @ dout.T),
            Mistake("it is x Wᵀ: it is dout that comes back, not x.", lambda dout, x, W: x @ W.T),
            Mistake("it is Wᵀ alone; dout is missing.", lambda dout, x, W: W.T),
            Mistake("it is divided by m; every column of dout counts in full.",
                    lambda dout, x, W: dout @ W.T / W.shape[1]),
        ],
        "dW": [
            Mistake("it is transposed: dW = xᵀ dout has the shape of W, (n, m).",
                    lambda dout, x, W: dout.T @ x),
            Mistake("this is the gradient of the mean over the rows, not of the sum: no division "
                    "by N.", lambda dout, x, W: x.T @ dout / len(x)),
            Mistake("x is not transposed: dW = xᵀ dout.", lambda dout, x, W: x @ dout),
            Mistake("only the first row of the batch is in it.",
                    lambda dout, x, W: np.outer(x[0], dout[0])),
            Mistake("only the last row of the batch is in it; the rows are to be added up.",
                    lambda dout, x, W: np.outer(x[-1], dout[-1])),
            Mistake("sums of x and of dout are multiplied; it is the sum of their products.",
                    lambda dout, x, W: np.outer(x.sum(0), dout.sum(0))),
            Mistake("it is xᵀ alone; dout is missing.", lambda dout, x, W: x.T),
            Mistake("it is divided by m; nothing is divided here.",
                    lambda dout, x, W: x.T @ dout / W.shape[1]),
            Mistake("it is divided by n; nothing is divided here.",
                    lambda dout, x, W: x.T @ dout / len(W)),
            Mistake("W is in it; the gradient of W holds x and dout only.",
                    lambda dout, x, W: W * (x.T @ dout)),
        ],
        "db": [
            Mistake("this is the mean over the rows, not the sum.",
                    lambda dout, x, W: dout.mean(axis=0)),
            Mistake("it is summed over the wrong axis: b is added to every row, so sum over the "
                    "rows, axis=0.", lambda dout, x, W: dout.sum(axis=1)),
            Mistake("it is summed over both axes; b has one entry for each column.",
                    lambda dout, x, W: dout.sum()),
            Mistake("the sum over the rows is missing.", lambda dout, x, W: dout),
            Mistake("it has shape (1, m); b has shape (m,). Leave keepdims out.",
                    lambda dout, x, W: dout.sum(axis=0, keepdims=True)),
            Mistake("only the first row is in it.", lambda dout, x, W: dout[0]),
            Mistake("it is N everywhere: that would be the gradient if dout were all ones.",
                    lambda dout, x, W: np.full(dout.shape[1], float(len(dout)))),
            Mistake("only the last row is in it; the rows are to be added up.",
                    lambda dout, x, W: dout[-1]),
            Mistake("it is the largest of the rows; add them up.",
                    lambda dout, x, W: dout.max(axis=0)),
            Mistake("it is the sum of x; add up dout.", lambda dout, x, W: x.sum(axis=0)),
            Mistake("it is divided by m; nothing is divided here.",
                    lambda dout, x, W: dout.sum(axis=0) / dout.shape[1]),
        ],
    },
    read={"dx": "every x_i reaches y_j through W_ij, so dx_i = sum over j of dout_j W_ij.",
          "dW": "W_ij is used once for each row: dW_ij = sum over rows of x_i dout_j.",
          "db": "b_j is added in every row: db_j = sum over rows of dout_j."},
    factors=lambda dout, x, W: {"N (the number of rows)": len(x)},
    forward=lambda x, W: x @ W,
)


def linear_forward(function: Callable[..., Any]) -> Passed:
    """Check exercise 1: y = linear_forward(x, W, b).

    Parameters
    ----------
    function
        Takes x (N, n), W (n, m) and b (m,); returns y (N, m).

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(LINEAR_FORWARD, function)


def linear_backward(function: Callable[..., Any]) -> Passed:
    """Check exercise 1: dx, dW, db = linear_backward(dout, x, W).

    Parameters
    ----------
    function
        Takes dout (N, m), x (N, n) and W (n, m); returns the gradients of x, W and b.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(LINEAR_BACKWARD, function)
