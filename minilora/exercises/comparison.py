"""Compare arrays, and show how they differ."""

from __future__ import annotations

from typing import Any

import numpy as np

Case = dict[str, Any]  # the arguments of a function by name, in order


def same(got: Any, expected: Any, tolerance: float = 1e-7) -> bool:
    """Return whether two arrays are equal up to rounding.

    Shapes, infinities and nans must agree exactly.

    Parameters
    ----------
    got, expected
        Arrays or numbers.
    tolerance
        Largest difference allowed, relative to the largest finite entry of `expected`.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        return False
    if any(not np.array_equal(test(got), test(expected)) for test in (np.isnan, np.isposinf)):
        return False
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(got)) or not finite.any():
        return not finite.any() and not np.isfinite(got).any()
    size = float(np.abs(expected[finite]).max())
    return bool(np.abs(got[finite] - expected[finite]).max() <= tolerance * max(size, 1e-3))


def show_case(case: Case) -> str:
    """Return a line that describes an input: shapes of arrays, values of everything else."""
    parts = [
        f"{name} {value.shape}" if isinstance(value, np.ndarray) else f"{name} = {value}"
        for name, value in case.items()
    ]
    return "For " + ", ".join(parts) + ":"


def show_difference(name: str, got: np.ndarray, want: np.ndarray) -> str:
    """Return expected and actual values, and which entries differ.

    Parameters
    ----------
    name
        Name of the output.
    got, want
        Arrays of the same shape.
    """
    with np.printoptions(precision=4, suppress=True, threshold=24, linewidth=88):
        text = f"expected {name} =\n{want}\nyours =\n{got}"
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - want)
    text += f"\nlargest difference {np.nanmax(difference, initial=0.0):.2g}"
    if want.ndim and want.size > 1:
        wrong = ~(difference <= 1e-7 * np.abs(want[np.isfinite(want)]).max(initial=1e-3))
        count = int(wrong.sum())
        if count == want.size:
            text += "\nAll entries differ."
        else:
            at = [tuple(map(int, i)) for i in np.argwhere(wrong)[:4]]
            text += f"\n{count} of {want.size} entries differ: {', '.join(map(str, at))}" + (
                ", ..." if count > 4 else ".")
    if not np.isfinite(got).all():
        text += "\nYours has nan or inf in it."
    return text
