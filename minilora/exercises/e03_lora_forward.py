"""Exercise 3: the LoRA layer, with its initial values, scale and forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.comparison import same
from minilora.exercises.outcome import CheckFailed, Passed, failed, run
from minilora.nn.module import Parameter

NUMBER = 3
# Name of the check: the name that a submission must define.
DEFINED = {"lora_forward": "LoRALayer"}

_NAME = "LoRALayer"


def lora_forward(cls: type) -> Passed:
    """Check exercise 3: a class LoRALayer(in_dim, out_dim, rank, alpha, rng).

    Parameters
    ----------
    cls
        Its instances have A (in_dim, rank), B (rank, out_dim), scale, and
        forward(x) with x (..., in_dim).

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    if not isinstance(cls, type):
        raise failed(_NAME, f"Give the class itself, not {type(cls).__name__}.")

    def make(n: int, m: int, r: int, alpha: float, seed: int = 0) -> Any:
        layer = run(_NAME, lambda: cls(n, m, r, alpha, np.random.default_rng(seed)))
        for attribute in ("A", "B", "scale"):
            if not hasattr(layer, attribute):
                raise failed(_NAME, f"It has no attribute {attribute}: set self.{attribute}.")
        return layer

    for n, m, r, alpha in ((6, 4, 2, 8), (3, 5, 3, 1.5), (4, 4, 1, 2), (2, 7, 2, 9)):
        layer = make(n, m, r, alpha)
        _check_factors(_array(layer.A), _array(layer.B), n, m, r)
        _check_scale(layer.scale, alpha, r)
    _check_init(make)
    for n, m, r, alpha in ((6, 4, 2, 8), (3, 5, 3, 1.5), (4, 4, 1, 2)):
        for shape in ((5, n), (2, 3, n), (n,)):
            _check_forward(make(n, m, r, alpha), np.random.default_rng(1), shape, m)
    return Passed(_NAME, "Checked shapes, start, scale and forward.")


def _array(value: Any) -> np.ndarray:
    """Return the numbers of an array or a Parameter."""
    return np.asarray(value.data if isinstance(value, Parameter) else value)


# ---- A, B and scale


def _check_factors(a: np.ndarray, b: np.ndarray, n: int, m: int, r: int) -> None:
    """Check dtype and shapes of A and B."""
    read = "y = scale * x A B, with x (.., n), A (n, r), B (r, m)."
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        raise failed(_NAME, f"A and B are to be floating-point numbers, yours are {a.dtype} and "
                     f"{b.dtype}: steps of training are no whole numbers.", read)
    if (a.shape, b.shape) == ((n, r), (r, m)):
        return
    if (a.shape, b.shape) == ((r, m), (n, r)):
        raise failed(_NAME, "A and B are swapped: A comes first, (in, rank), then B, (rank, out).",
                     read)
    if (a.shape, b.shape) == ((r, n), (m, r)):
        raise failed(_NAME, f"A and B are transposed: A has shape {a.shape} where (in, rank) = "
                     f"{(n, r)} was expected. PyTorch keeps them so; here x A B needs no "
                     "transpose.", read)
    for what, array, shape in (("A", a, (n, r)), ("B", b, (r, m))):
        if array.shape != shape:
            more = ": it is transposed" if array.shape == shape[::-1] else ""
            raise failed(_NAME, f"{what} has shape {array.shape} where {shape} was expected{more}.",
                         read)


def _check_scale(scale: Any, alpha: float, r: int) -> None:
    """Check that scale is alpha / r."""
    read = "scale = alpha / r: with it, r can be changed without a new learning rate."
    if not isinstance(scale, (int, float, np.number)):
        raise failed(_NAME, f"scale should be a number, yours is a {type(scale).__name__}.", read)
    for value, text in (
        (alpha, "scale is alpha: divide it by the rank."),
        (1.0, "scale is 1: alpha / r is missing."),
        (r / alpha, "scale is r / alpha: it is the other way round."),
        (alpha / r**0.5, "scale is alpha / sqrt(r), that of rsLoRA; here it is alpha / r."),
        (alpha * r, "scale is alpha * r: divide."),
        (alpha // r, "scale is rounded down: use / and not //."),
    ):
        if math.isclose(scale, value) and not math.isclose(value, alpha / r):
            raise failed(_NAME, text, read)
    if not math.isclose(scale, alpha / r):
        raise failed(_NAME, f"For alpha {alpha} and rank {r}, scale is {scale}, not {alpha / r}.",
                     read)


# ---- The initial values


_INIT = "A is uniform in ±1/sqrt(in), B is zero: then the model starts as the base, and learns."


def _init_failed(text: str) -> CheckFailed:
    """Return the error for wrong initial values."""
    return failed(_NAME, text, _INIT)


def _check_init(make: Callable[..., Any]) -> None:
    """Check the initial values on a layer that is large enough for statistics."""
    n, m, r = 400, 300, 16
    layer = make(n, m, r, 16)
    a, b = _array(layer.A), _array(layer.B)
    _check_zeros(a, b)
    _check_distribution(a, m)
    if not np.array_equal(a, _array(make(n, m, r, 16).A)):
        raise _init_failed("Two layers with the same rng differ: draw with the rng that is given, "
                           "not with np.random.")
    if np.array_equal(a, _array(make(n, m, r, 16, seed=1).A)):
        raise _init_failed("Layers with different rngs have the same A: draw with the rng that is "
                           "given.")


def _check_zeros(a: np.ndarray, b: np.ndarray) -> None:
    """Check that B is zero and A is not."""
    if not a.any() and not b.any():
        raise _init_failed("A and B are both zero. Then both gradients are zero as well (dA holds "
                           "B, dB holds A), and nothing ever moves.")
    if not a.any():
        raise _init_failed("A is zero and B is not. The update is zero, too, but the usual choice "
                           "is the other one: B = 0.")
    if b.any():
        raise _init_failed("B is not zero: the model does not start as the base.")


def _check_distribution(a: np.ndarray, m: int) -> None:
    """Check that A is uniform between -1/sqrt(in) and 1/sqrt(in)."""
    n, r = a.shape
    if np.linalg.matrix_rank(a) < r:
        raise _init_failed("The columns of A are not independent: draw each number of A anew.")
    bound, largest = n**-0.5, float(np.abs(a).max())
    if len(np.unique(a)) < a.size / 10:
        raise _init_failed("A takes a few values only: draw uniformly between the bounds.")
    if a.min() >= 0:
        raise _init_failed("A has no negative numbers: draw from -1/sqrt(in) to 1/sqrt(in).")
    for value, text in (
        (r**-0.5, "1/sqrt(rank): take the number of inputs, A's first axis."),
        (m**-0.5, "1/sqrt(out): take the number of inputs."),
        (1.0, "1: divide by sqrt(in)."),
        (1 / n, "1/in: take the root, 1/sqrt(in)."),
        ((6 / (n + r)) ** 0.5, "sqrt(6/(in + rank)): that is Xavier's bound; LoRA takes "
         "1/sqrt(in)."),
        (6**0.5 * bound, "sqrt(6/in): that is Kaiming's bound for a = 0; LoRA takes a = sqrt(5), "
         "which gives 1/sqrt(in)."),
    ):
        if abs(largest / value - 1) < 0.01 and abs(value / bound - 1) > 0.1:
            raise _init_failed(f"A is drawn up to {text}")
    if largest > 1.001 * bound or np.abs(a).std() < 0.2 * largest:
        kind = "normal, not uniform" if largest > 3 * a.std() else "too large"
        raise _init_failed(f"A looks {kind}: |A| goes up to {largest:.4f}, where 1/sqrt({n}) = "
                           f"{bound:.4f}.")
    if largest < 0.98 * bound or abs(a.mean()) > 0.05 * bound:
        raise _init_failed(f"A should fill -{bound:.4f} to {bound:.4f} evenly; yours goes from "
                           f"{a.min():.4f} to {a.max():.4f}.")


# ---- Forward


def _check_forward(layer: Any, rng: np.random.Generator, shape: tuple[int, ...], m: int) -> None:
    """Check forward for one shape of x, with new numbers in A and B."""
    a, b = (rng.standard_normal(_array(f).shape) for f in (layer.A, layer.B))
    for attribute, value in (("A", a), ("B", b)):
        holder = getattr(layer, attribute)
        if isinstance(holder, Parameter):
            holder.data = value.copy()
        else:
            setattr(layer, attribute, value.copy())
    x = rng.standard_normal(shape)
    given, s = x.copy(), float(layer.scale)
    got = run(_NAME, lambda: layer.forward(given))
    if got is None:
        raise failed(_NAME, "forward returns nothing.")
    got, read = np.asarray(got), "y = scale * x A B."
    if not np.array_equal(given, x):
        raise failed(_NAME, "forward changes its input x in place.")
    if same(got, s * (x @ a @ b)):
        again = np.asarray(run(_NAME, lambda: layer.forward(x.copy())))
        if not same(again, got) or not (same(_array(layer.A), a) and same(_array(layer.B), b)):
            raise failed(_NAME, "forward changes A or B: a second call gives something else.")
        return
    for value, text in (
        (x @ a @ b, "the scale is missing."), (s * s * (x @ a @ b), "the scale is in it twice."),
        (s * (x @ a), "B is missing."), (s * (x @ a @ b) + (x if shape[-1] == m else 0),
         "x is added; the sum with x W is for the layer around this one."),
        (np.zeros((*shape[:-1], m)), "forward uses a product that was made in the constructor, or "
         "a copy of B; it has to use self.A and self.B as they are now."),
        (x @ a @ b / s, "it is divided by the scale."),
        (s * a.shape[1] * (x @ a @ b), "it is multiplied by alpha instead of the scale, "
         "alpha / r."),
    ):
        if same(got, value):
            raise failed(_NAME, f"forward: {text}", read)
    if got.shape != (*shape[:-1], m):
        raise failed(_NAME, f"forward of x {shape} should have shape {(*shape[:-1], m)}, yours has "
                     f"{got.shape}.", read)
    raise failed(_NAME, f"forward of x {shape} is wrong: expected\n{(s * (x @ a @ b)).round(4)}\n"
                 f"yours =\n{got.round(4)}", read)
