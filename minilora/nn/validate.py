"""What bad input gets: one sentence that names the value and what was expected.

Kept apart so that the layers read like their equations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.nn.module import Module


def check_sizes(owner: str, **sizes: Any) -> None:
    """Raise TypeError or ValueError unless every size is a whole number of 1 or more."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool):
            raise TypeError(f"{owner}: {name} must be a whole number, got {size!r}")
        if size < 1:
            raise ValueError(f"{owner}: {name} must be 1 or more, got {size}")


def check_width(module: Module, x: Any, width: int, dtype: np.dtype) -> np.ndarray:
    """Return x as an array (..., width) of `dtype`, or say what is wrong with it.

    Floating-point input of another precision is converted, so that every activation keeps
    the dtype of the model. Raises TypeError for other dtypes, ValueError for other widths.
    """
    x = check_float(module, x).astype(dtype, copy=False)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"{module._title()} expects input of shape (..., {width}), got {x.shape}"
        )
    return x


def check_dout(module: Module, dout: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return dout as an array of `dtype`; ValueError unless it has the shape of the output."""
    dout = np.asarray(dout, dtype=dtype)
    if dout.shape != shape:
        raise ValueError(f"{module._title()} expects dout of shape {shape}, got {dout.shape}")
    return dout


def check_float(module: Module, x: Any) -> np.ndarray:
    """Return x as an array; TypeError unless it is floating-point."""
    x = np.asarray(x)
    if x.dtype.kind != "f":
        raise TypeError(f"{module._title()} expects floating-point input, got dtype {x.dtype}")
    return x


def check_dropout(p: float) -> None:
    """Raise TypeError or ValueError unless 0 <= p < 1."""
    if not isinstance(p, (int, float, np.integer, np.floating)):
        raise TypeError(f"dropout must be a number, got {p!r}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout needs 0 <= p < 1, got {p}")
