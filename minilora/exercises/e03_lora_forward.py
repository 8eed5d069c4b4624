"""Exercise 3: the LoRA layer, with its initial values, scale and forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from minilora.exercises.comparison import same, show_difference
from minilora.exercises.outcome import CheckFailed, Passed, array_of, either, failed, run
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
            value = getattr(layer, attribute)
            if attribute != "scale" and not isinstance(value, (np.ndarray, Parameter)):
                raise failed(_NAME, f"{attribute} should be an array, yours is a "
                             f"{type(value).__name__}.")
        return layer

    sizes, scales = ((6, 4, 2, 8), (3, 5, 3, 1.5), (4, 4, 1, 2), (2, 7, 2, 9)), []
    for n, m, r, alpha in sizes:
        layer = make(n, m, r, alpha)
        _check_factors(_array(layer.A), _array(layer.B), n, m, r)
        scales.append(layer.scale)
    _check_scale(scales, sizes)
    _check_init(make)
    _check_apart(make)
    _check_forward((make(n, m, r, alpha), shape)  # one after the other
                   for n, m, r, alpha in ((6, 4, 2, 8), (3, 5, 3, 1.5), (4, 4, 1, 2))
                   for shape in ((5, n), (2, 3, n), (n,)))
    _check_in_turn(make)
    return Passed(_NAME, "Checked shapes, start, scale, forward, and two layers in turn.")


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


def _check_scale(scales: list[Any], sizes: tuple[tuple[int, int, int, float], ...]) -> None:
    """Check that the scale of each size is alpha / r."""
    read = "scale = alpha / r: with it, r can be changed without a new learning rate."
    for scale in scales:
        if not isinstance(scale, (int, float, np.number)):
            raise failed(_NAME, f"scale should be a number, yours is a {type(scale).__name__}.",
                         read)
    causes = [[text for value, text in _scales(*size) if math.isclose(scale, value)]
              for scale, size in zip(scales, sizes, strict=True)]
    for scale, (n, m, r, alpha) in zip(scales, sizes, strict=True):
        if not math.isclose(scale, alpha / r):
            text = either(text for text in causes[0] if all(text in more for more in causes))
            raise failed(_NAME, f"For in {n}, out {m}, alpha {alpha} and rank {r} scale is "
                         f"{scale}, not {alpha / r}. {text}".rstrip(), read)


def _scales(n: int, m: int, r: int, alpha: float) -> list[tuple[float, str]]:
    """Return wrong scales, and what is wrong with them."""
    return [
        (alpha, "scale is alpha: divide it by the rank."),
        (1.0, "scale is 1: alpha / r is missing."),
        (r / alpha, "scale is r / alpha: it is the other way round."),
        (alpha / r**0.5, "scale is alpha / sqrt(r), that of rsLoRA; here it is alpha / r."),
        (alpha * r, "scale is alpha * r: divide."),
        (alpha // r, "scale is rounded down: use / and not //, int or round."),
        (1 / r, "scale is 1 / r: alpha is missing."),
        (alpha / r**2, "scale is alpha / r², divided by the rank twice."),
        (alpha**2 / r, "scale is alpha² / r: alpha is in it twice."),
        (alpha / n, "scale is alpha / in: divide by the rank."),
        (alpha / m, "scale is alpha / out: divide by the rank."),
        (r, "scale is the rank: it is alpha / r."),
        (2.0, "scale is always 2: it is alpha / r."),
        (round(alpha / r), "scale is rounded: alpha / r is to be kept as it is."),
    ]


# ---- The initial values


_INIT = "A is uniform in ±1/sqrt(in), B is zero: then the model starts as the base, and learns."


def _init_failed(text: str) -> CheckFailed:
    """Return the error for wrong initial values."""
    return failed(_NAME, text, _INIT)


def _check_init(make: Callable[..., Any]) -> None:
    """Check the initial values on a layer that is large enough for statistics."""
    n, m, r, alpha = 400, 300, 16, 40  # with alpha = r, a scale too much would not show
    layer = make(n, m, r, alpha)
    a, b = _array(layer.A), _array(layer.B)
    _check_zeros(a, b)
    _check_distribution(a, m, alpha)
    if not np.array_equal(a, _array(make(n, m, r, alpha).A)):
        raise _init_failed("Two layers with the same rng differ: draw with the rng that is given, "
                           "not with np.random.")
    if np.array_equal(a, _array(make(n, m, r, alpha, seed=1).A)):
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


def _wrong_bounds(n: int, m: int, r: int, alpha: float) -> list[tuple[float, str]]:
    """Return bounds that A may be drawn between by mistake, and what is wrong with them."""
    bound, kaiming = n**-0.5, "LoRA takes a = sqrt(5), which gives 1/sqrt(in)."
    return [
        (r**-0.5, "1/sqrt(rank): take the number of inputs, A's first axis."),
        (m**-0.5, "1/sqrt(out): take the number of inputs."),
        ((n + m) ** -0.5, "1/sqrt(in + out): take the number of inputs."),
        (1.0, "1: divide by sqrt(in)."),
        (1 / n, "1/in: take the root, 1/sqrt(in)."),
        (n**0.5, "sqrt(in): divide by it."),
        ((6 / (n + r)) ** 0.5, "sqrt(6/(in + rank)): that is Xavier's bound; LoRA takes "
         "1/sqrt(in)."),
        ((6 / (n + m)) ** 0.5, "sqrt(6/(in + out)): that is Xavier's bound; LoRA takes "
         "1/sqrt(in)."),
        (6**0.5 * bound, f"sqrt(6/in): that is Kaiming's bound for a = 0; {kaiming}"),
        (3**0.5 * bound, f"sqrt(3/in): that is Kaiming's bound for a = 1; {kaiming}"),
        (2**0.5 * bound, "sqrt(2/in): take 1/sqrt(in)."),
        (bound / 2, "half of 1/sqrt(in): rng.uniform takes both ends, -1/sqrt(in) and 1/sqrt(in)."),
        (2 * bound, "twice 1/sqrt(in)."),
        (alpha / r * bound, "1/sqrt(in) times the scale: the scale belongs into forward alone."),
        (r / alpha * bound, "1/sqrt(in) divided by the scale: it belongs into forward alone."),
        (alpha * bound, "1/sqrt(in) times alpha: the scale belongs into forward alone."),
        (r**-0.5 * bound, "1/sqrt(in * rank): the rank does not count here."),
        (bound / r, "1/sqrt(in) divided by the rank: the rank does not count here."),
        *((value, f"{value:g}, whatever the number of inputs: take 1/sqrt(in).")
          for value in (0.5, 0.1, 0.05, 0.02, 0.01, 0.001)),
    ]


def _check_distribution(a: np.ndarray, m: int, alpha: float) -> None:
    """Check that A is uniform between -1/sqrt(in) and 1/sqrt(in)."""
    n, r = a.shape
    if np.linalg.matrix_rank(a) < r:
        raise _init_failed("The columns of A are not independent: draw each number of A anew.")
    bound, largest = n**-0.5, float(np.abs(a).max())
    if len(np.unique(a)) < a.size / 10:
        raise _init_failed("A takes a few values only: draw uniformly between the bounds.")
    if a.min() >= 0:
        raise _init_failed("A has no negative numbers: draw from -1/sqrt(in) to 1/sqrt(in).")
    if a.max() <= 0:
        raise _init_failed("A has no positive numbers: draw from -1/sqrt(in) to 1/sqrt(in).")
    uniform = abs(a.std() / largest - 3**-0.5) < 0.03 and abs(a.mean()) < 0.05 * largest
    causes = either(f"A is drawn up to {text}" for value, text in _wrong_bounds(n, m, r, alpha)
                    if abs(largest / value - 1) < 0.01)
    if uniform and causes and abs(largest / bound - 1) > 0.01:
        raise _init_failed(causes)
    if largest > 1.001 * bound or np.abs(a).std() < 0.2 * largest:
        kind = "normal, not uniform" if largest > 3 * a.std() else "too large"
        raise _init_failed(f"A looks {kind}: |A| goes up to {largest:.4f}, where 1/sqrt({n}) = "
                           f"{bound:.4f}.")
    if largest < 0.98 * bound or abs(a.mean()) > 0.05 * bound:
        raise _init_failed(f"A should fill -{bound:.4f} to {bound:.4f} evenly; yours goes from "
                           f"{a.min():.4f} to {a.max():.4f}.")


def _check_apart(make: Callable[..., Any]) -> None:
    """Check that a second layer leaves the first as it was, and shares no array with it."""
    first = make(6, 4, 2, 8)
    a, b, scale = _array(first.A).copy(), _array(first.B).copy(), first.scale
    second = make(6, 4, 2, 3, seed=1)
    read = "what belongs to one layer is an attribute of self, and a new array."
    for what, same_as_before in (("A", same(_array(first.A), a)), ("B", same(_array(first.B), b)),
                                 ("scale", first.scale == scale)):
        if not same_as_before:
            raise failed(_NAME, f"Making a second layer changes {what} of the first: it is kept in "
                         "the class, or in a global, and not in self.", read)
    for what in ("A", "B"):
        if np.shares_memory(_array(getattr(first, what)), _array(getattr(second, what))):
            raise failed(_NAME, f"Two layers share one {what}: training one would change the "
                         "other. Make a new array in the constructor.", read)


# ---- Forward


def _fill(layer: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Put new numbers into A and B, and return them."""
    a, b = (rng.standard_normal(_array(f).shape) for f in (layer.A, layer.B))
    for attribute, value in (("A", a), ("B", b)):
        holder = getattr(layer, attribute)
        if isinstance(holder, Parameter):
            holder.data = value.copy()
        else:
            setattr(layer, attribute, value.copy())
    return a, b


def _check_in_turn(make: Callable[..., Any]) -> None:
    """Check forward of two layers in turn, with A and B that change as if by training."""
    layers, rng = (make(6, 4, 2, 8), make(6, 4, 2, 3, seed=1)), np.random.default_rng(2)
    for step in range(3):
        factors = [_fill(layer, rng) if step < 2 else (_array(layer.A), _array(layer.B))
                   for layer in layers]
        if step == 2:  # in place, as an optimizer does it
            for array in (array for pair in factors for array in pair):
                array *= 0.5
        for layer, (a, b) in zip(layers, factors, strict=True):
            x = rng.standard_normal((5, 6))
            if same(_forward(layer, x), float(layer.scale) * (x @ a @ b)):
                continue
            if step == 0:
                raise failed(_NAME, "With two layers, forward of one is wrong: it uses what "
                             "belongs to the other, from the class or a global. Use self alone.")
            raise failed(_NAME, "forward is right at first, but not after x, A and B have changed: "
                         "it keeps something that it computed before. Use self.A and self.B as "
                         "they are now.")


def _check_forward(trials: Iterable[tuple[Any, tuple[int, ...]]]) -> None:
    """Check forward of each layer for a shape of x, with new numbers in A and B."""
    wrong, texts = [], []
    for layer, shape in trials:
        first_a = _array(layer.A).copy()
        a, b = _fill(layer, np.random.default_rng(1))
        x = np.random.default_rng(2).standard_normal(shape)
        got, want = _forward(layer, x), float(layer.scale) * (x @ a @ b)
        if same(got, want):
            again = _forward(layer, x)
            if not same(again, got) or not (same(_array(layer.A), a) and same(_array(layer.B), b)):
                raise failed(_NAME, "forward changes A or B: a second call gives something else.")
            continue
        wrong.append((shape, got, want))
        texts.append([text for value, text in _wrong_outputs(
            float(layer.scale), x, a, b, first_a) if same(got, value)])
    if not wrong:
        return
    read, (shape, got, want) = "y = scale * x A B.", wrong[0]
    if causes := either(text for text in texts[0] if all(text in others for others in texts)):
        raise failed(_NAME, f"forward: {causes}", read)
    if got.shape != want.shape:
        raise failed(_NAME, f"forward of x {shape} should have shape {want.shape}, yours has "
                     f"{got.shape}.", read)
    raise failed(_NAME, f"forward of x {shape} is wrong.\n"
                 + show_difference("scale * x A B", got, want), read)


def _forward(layer: Any, x: np.ndarray) -> np.ndarray:
    """Return the output of a layer as an array, after checking that x has not been changed."""
    given = x.copy()
    got = run(_NAME, lambda: layer.forward(given))
    if got is None:
        raise failed(_NAME, "forward returns nothing.")
    if not np.array_equal(given, x):
        raise failed(_NAME, "forward changes its input x in place.")
    return array_of(_NAME, "forward", got)


def _wrong_outputs(
    s: float, x: np.ndarray, a: np.ndarray, b: np.ndarray, first_a: np.ndarray
) -> list[tuple[np.ndarray, str]]:
    """Return what known mistakes make of the scale, x, A, B, and A as it was at first."""
    m = b.shape[1]
    return [
        (x @ a @ b, "the scale is missing."), (s * s * (x @ a @ b), "the scale is in it twice."),
        (s * (x @ a), "B is missing."), (s * (x @ a @ b) + (x if x.shape[-1] == m else 0),
         "x is added; the sum with x W is for the layer around this one."),
        (np.zeros((*x.shape[:-1], m)), "it is zero: forward uses a product that was made in the "
         "constructor, or a copy of B, or a global; it has to use self.A and self.B as they are "
         "now."),
        (s * (x @ first_a @ b), "it uses a copy of A from the constructor, or a global; it has to "
         "use self.A as it is now."),
        (x @ first_a @ b, "it uses a copy of A from the constructor, without the scale."),
        (x @ a @ b / s, "it is divided by the scale."),
        (s * a.shape[1] * (x @ a @ b), "it is multiplied by alpha instead of the scale, "
         "alpha / r."),
        (s * (np.maximum(x @ a, 0) @ b), "the negative numbers of x A are cut off at 0; the layer "
         "is linear."),
        (np.maximum(s * (x @ a @ b), 0), "the negative numbers are cut off at 0; the layer is "
         "linear."),
        (s * (x @ a @ b) / a.shape[1], "it is divided by the rank once more; the scale is "
         "divided by it already."),
        (-s * (x @ a @ b), "it has the wrong sign."),
    ]
