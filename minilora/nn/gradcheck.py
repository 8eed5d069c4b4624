"""Check a hand-written backward against central differences.

The derivative of f at x is (f(x + h) - f(x - h)) / 2h up to an error of order h². Here f is
the module's output contracted with a fixed random `dout`, so that one number depends on
every output, and backward(dout) must be its gradient. In float64 with h = 1e-5 a right
backward agrees to 1e-7 or better, and a wrong one is off by far more than 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from minilora.nn.layers import Rng
from minilora.nn.module import Module, make_rng


@dataclass(frozen=True)
class Entry:
    """The worst entry of one array; for the scale of its error see `_worst_entries`."""

    name: str
    error: float
    index: tuple[int, ...]
    expected: float
    got: float
    note: str = ""


@dataclass
class GradCheck:
    """The report: one `Entry` for each array; print it to read it."""

    tolerance: float
    entries: list[Entry] = field(default_factory=list)

    @property
    def max_error(self) -> float:
        return max((entry.error for entry in self.entries), default=0.0)

    @property
    def passed(self) -> bool:
        return bool(self.entries) and all(e.error <= self.tolerance for e in self.entries)

    def __str__(self) -> str:
        width = max([len(entry.name) for entry in self.entries], default=0)
        lines = []
        for e in self.entries:
            ok = e.error <= self.tolerance
            where = e.note or f"at {e.index}: expected {e.expected:.6g}, got {e.got:.6g}"
            line = f"{'ok   ' if ok else 'WRONG'} {e.name:{width}}  {e.error:.1e}"
            lines.append(line if ok else f"{line}  {where}")
        return "\n".join(lines)


def numerical_gradient(
    f: Callable[[], float], x: np.ndarray, indices: list[tuple[int, ...]], h: float = 1e-5
) -> np.ndarray:
    """Central differences of f() with respect to the entries of x at `indices`.

    x is changed in place and restored after each entry; f must read it anew at each call.
    """
    slopes = np.empty(len(indices))
    for i, index in enumerate(indices):
        old = x[index]
        x[index] = old + h
        above = f()
        x[index] = old - h
        below = f()
        x[index] = old
        slopes[i] = (above - below) / (2.0 * h)
    return slopes


def gradcheck(
    module: Module, x: np.ndarray, tolerance: float = 1e-6, max_entries: int = 100, rng: Rng = 0
) -> GradCheck:
    """Compare module.backward with central differences, for x and every trainable parameter.

    x may be floating-point input or integer ids (which have no gradient). Of an array with
    more than `max_entries` numbers that many are drawn at random. Gradients that the module
    held are gone afterwards; parameters and x are as they were.

    A backward that changes its dout, or sets a gradient where it should add to it, is wrong too.

    Raises TypeError unless parameters and x are float64: float32 is too coarse to tell; and
    ValueError where there is nothing to compare.
    """
    rng, x = make_rng(rng), np.array(x)
    arrays = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    if x.dtype.kind == "f":
        arrays["input"] = x
    if max_entries < 1 or not all(array.size for array in arrays.values()):
        raise ValueError("gradcheck needs numbers to compare: x is empty or max_entries below 1")
    for name, array in arrays.items():
        if array.dtype != np.float64:
            raise TypeError(f"gradcheck needs float64, but {name} is {array.dtype}: use astype")

    generators = {
        id(m.rng): m.rng for _, m in module.named_modules()
        if isinstance(getattr(m, "rng", None), np.random.Generator)
    }
    states = {key: g.bit_generator.state for key, g in generators.items()}

    def forward() -> np.ndarray:
        for key, generator in generators.items():  # the same dropout mask every time
            generator.bit_generator.state = states[key]
        return module(x)

    dout = rng.standard_normal(forward().shape)
    module.zero_grad()
    forward()
    given = dout.copy()
    dx = module.backward(given)
    gradients = {name: p.grad for name, p in module.named_parameters()} | {"input": dx}
    faults = {name: _fault(gradients[name], array) for name, array in arrays.items()}
    once = {name: np.array(g) for name, g in gradients.items() if g is not None}
    forward()
    module.backward(dout.copy())
    for name, p in module.named_parameters():
        if name in arrays and not faults[name] and not np.allclose(p.grad, 2.0 * once[name]):
            faults[name] = "a second backward did not add to the gradient of the first"
    compared = {}
    for name, array in arrays.items():
        if faults[name]:
            continue
        count = min(max_entries, array.size)
        flat = np.sort(rng.choice(array.size, count, replace=False))
        indices = [tuple(int(j) for j in np.unravel_index(i, array.shape)) for i in flat]
        expected = numerical_gradient(lambda: float((forward() * dout).sum()), array, indices)
        compared[name] = indices, expected, np.array([once[name][index] for index in indices])
    module.zero_grad()
    if not np.array_equal(given, dout):
        faults["dout"] = "backward changed its argument"
    wrong = [Entry(name, np.inf, (), np.nan, np.nan, note) for name, note in faults.items() if note]
    return GradCheck(tolerance, _worst_entries(compared) + wrong)


def _fault(gradient: np.ndarray | None, array: np.ndarray) -> str:
    """Say what is wrong with a gradient before its numbers are looked at, or nothing."""
    if gradient is None:
        return "backward left no gradient"
    if np.shape(gradient) != array.shape:
        return f"expected shape {array.shape}, got {np.shape(gradient)}"
    return ""


def _worst_entries(compared: dict[str, tuple[list, np.ndarray, np.ndarray]]) -> list[Entry]:
    """Find the largest error of each array, relative to the largest gradient in it.

    Some gradients are zero whatever happens, such as that of k_proj's bias (soft-max does not
    see a shift), and differences only show round-off there: so the yardstick is never less
    than a thousandth of the largest gradient anywhere.
    """
    largest = {name: np.abs(expected).max() for name, (_, expected, _) in compared.items()}
    most = max(largest.values(), default=0.0)
    entries = []
    for name, (indices, expected, got) in compared.items():
        yardstick = max(largest[name], 1e-3 * most, 1e-8)
        errors = np.abs(expected - got) / yardstick
        errors[np.isnan(errors)] = np.inf
        i = int(errors.argmax())
        entries.append(Entry(name, float(errors[i]), indices[i], float(expected[i]), float(got[i])))
    return entries
