"""Check a hand-written backward against central differences.

The derivative of f at x is (f(x + h) - f(x - h)) / 2h up to an error of order h². Here f is
sum(output * dout) with a fixed random `dout`: one number that depends on every output. Its
gradient must be backward(dout). In float64 with h = 1e-5 a correct backward agrees to 1e-7 or
better, and a wrong one is off by far more than 1e-6. Where f bends sharply, as a narrow layer norm
does, the error of order h² is removed with a second step (Richardson's extrapolation); what
disagrees for all steps is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from minilora.nn.module import Module
from minilora.nn.validate import Rng, make_rng


@dataclass(frozen=True)
class Entry:
    """The entry of one array with the largest error, which `_worst_entries` scales."""

    name: str
    error: float
    index: tuple[int, ...]
    expected: float
    got: float
    note: str = ""


@dataclass
class GradCheck:
    """The report, with one `Entry` for each array. Print it to read it."""

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

    x is changed in place and restored after each entry; f must read it at each call.
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
    module: Module, x: np.ndarray, tolerance: float = 1e-6, max_entries: int = 50, rng: Rng = 0
) -> GradCheck:
    """Compare module.backward with central differences, for x and every trainable parameter.

    A backward that changes its dout, or overwrites a gradient instead of adding to it, fails too.
    The module's gradients are cleared; its parameters and x are unchanged.

    Parameters
    ----------
    x : float64 input of any shape that the module takes, or integer ids, which have no gradient
    tolerance : largest error, relative to the largest gradient in the array
    max_entries : numbers compared in each array; if it has more, they are drawn at random

    Returns
    -------
    report : GradCheck, whose `passed` is True if all arrays agree

    Raises
    ------
    TypeError : if a parameter or x is not float64; float32 is too coarse
    ValueError : if there is nothing to compare
    """
    rng, x = make_rng(rng), np.array(x)
    arrays = {name: p.data for name, p in module.named_parameters() if p.requires_grad}
    if x.dtype.kind == "f":
        arrays["input"] = x
    _check_arrays(arrays, max_entries)
    forward = _repeatable(module, x)
    dout = rng.standard_normal(forward().shape)
    gradients, faults = _gradients(module, forward, dout, arrays)
    f, compared = lambda: float((forward() * dout).sum()), {}
    for name, array in arrays.items():
        if name not in faults:
            flat = np.sort(rng.choice(array.size, min(max_entries, array.size), replace=False))
            indices = [tuple(int(j) for j in np.unravel_index(i, array.shape)) for i in flat]
            slopes = numerical_gradient(f, array, indices)
            compared[name] = indices, slopes, np.array([gradients[name][i] for i in indices])
    for h in (1e-5, 1e-6):  # a wrong gradient, or differences that are too coarse
        for name in [entry.name for entry in _worst_entries(compared) if entry.error > tolerance]:
            indices, _, got = compared[name]
            two, one = (numerical_gradient(f, arrays[name], indices, x) for x in (h, h / 2.0))
            compared[name] = indices, (4.0 * one - two) / 3.0, got
    module.zero_grad()
    wrong = [Entry(name, np.inf, (), np.nan, np.nan, note) for name, note in faults.items()]
    return GradCheck(tolerance, _worst_entries(compared) + wrong)


def _check_arrays(arrays: dict[str, np.ndarray], max_entries: int) -> None:
    if max_entries < 1 or not all(array.size for array in arrays.values()):
        raise ValueError("gradcheck needs numbers to compare: an array is empty or max_entries < 1")
    for name, array in arrays.items():
        if array.dtype != np.float64:
            raise TypeError(f"gradcheck needs float64, but {name} is {array.dtype}: use astype")


def _repeatable(module: Module, x: np.ndarray) -> Callable[[], np.ndarray]:
    """Return a function that runs forward on x, always with the same dropout masks."""
    generators = {
        id(m.rng): m.rng for _, m in module.named_modules()
        if isinstance(getattr(m, "rng", None), np.random.Generator)
    }
    states = {key: g.bit_generator.state for key, g in generators.items()}

    def forward() -> np.ndarray:
        for key, generator in generators.items():
            generator.bit_generator.state = states[key]
        return module(x)

    return forward


def _gradients(
    module: Module, forward: Callable[[], np.ndarray], dout: np.ndarray,
    arrays: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the gradients that backward gives for the arrays, and {name: what is wrong}."""
    module.zero_grad()
    forward()
    given = dout.copy()
    dx = module.backward(given)
    found = {name: p.grad for name, p in module.named_parameters()} | {"input": dx}
    faults = {name: fault for name, a in arrays.items() if (fault := _fault(found[name], a))}
    once = {name: np.array(found[name]) for name in arrays if name not in faults}
    forward()
    module.backward(dout.copy())
    for name, p in module.named_parameters():
        if name in once and (
            p.grad is None or not np.allclose(p.grad, 2.0 * once[name], equal_nan=True)
        ):
            faults[name] = "a second backward did not add to the gradient of the first"
    if not np.array_equal(given, dout):
        faults["dout"] = "backward changed its argument"
    return once, faults


def _fault(gradient: np.ndarray | None, array: np.ndarray) -> str:
    """Describe what is wrong with a gradient apart from its numbers; "" if nothing is."""
    if gradient is None:
        return "backward left no gradient"
    if np.shape(gradient) != array.shape:
        return f"expected shape {array.shape}, got {np.shape(gradient)}"
    return ""


def _worst_entries(compared: dict[str, tuple[list, np.ndarray, np.ndarray]]) -> list[Entry]:
    """Find the largest error of each array, relative to the largest gradient in it.

    Some gradients are always zero, such as that of k_proj's bias (soft-max ignores a shift).
    Differences show only round-off there, so the yardstick is at least a thousandth of the
    largest gradient of all arrays.
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
