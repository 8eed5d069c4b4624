"""Argument checks; each error names the value and what was expected.

They are here so that the layers read like their equations. (Skip on first reading.)
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

Rng = np.random.Generator | int | None
FLOAT_TYPES = (np.float32, np.float64)


def float_dtype(dtype: Any) -> np.dtype:
    """Return `dtype` as a numpy dtype. Raises TypeError unless it is float32 or float64."""
    found = np.dtype(dtype)
    if found not in FLOAT_TYPES:
        raise TypeError(f"dtype must be float32 or float64, got {found}")
    return found


def make_rng(rng: Rng) -> np.random.Generator:
    """Return a Generator: `rng` itself, one seeded with an int, or a fresh one for None."""
    if rng is None or isinstance(rng, (int, np.integer, np.random.Generator)):
        if isinstance(rng, (int, np.integer)) and rng < 0:
            raise ValueError(f"a seed must be 0 or more, got {rng}")
        return np.random.default_rng(rng)
    raise TypeError(f"rng must be a numpy Generator, an int or None, got {type(rng).__name__}")


def closest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the known name nearest to `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_sizes(owner: str, **sizes: Any) -> None:
    """Raise TypeError or ValueError unless every size is a whole number of 1 or more."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool):
            raise TypeError(f"{owner}: {name} must be a whole number, got {size!r}")
        if size < 1:
            raise ValueError(f"{owner}: {name} must be 1 or more, got {size}")


def check_dropout(p: float) -> None:
    """Raise TypeError or ValueError unless 0 <= p < 1."""
    if not isinstance(p, (int, float, np.integer, np.floating)):
        raise TypeError(f"dropout must be a number, got {p!r}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout needs 0 <= p < 1, got {p}")


def check_flag(**flags: Any) -> None:
    """Raise TypeError unless every value is True or False: "no" would count as True."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def hides(value: Any, kinds: tuple[type, ...], known: Iterable[Any]) -> bool:
    """Return whether a container has an object of these kinds inside, other than known ones."""
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return False
    waiting, seen = [value], {id(thing) for thing in known if isinstance(thing, kinds)}
    while waiting:
        if id(item := waiting.pop()) not in seen:
            seen.add(id(item))
            if isinstance(item, kinds):
                return True
            if isinstance(item, (list, tuple, dict, set, frozenset)):
                parts = [item, item.values()] if isinstance(item, dict) else [item]
                waiting += [x for part in parts for x in itertools.islice(part, 1000)]
    return False


def last_numbers(array: np.ndarray) -> np.ndarray:
    """Return the array, or if it is large, its last numbers: at most 1024, without copying any."""
    while array.size > 1024:
        array = array[-1] if array.ndim > 1 else array[-1024:]
    return array


def check_float(owner: Any, x: Any) -> np.ndarray:
    """Return x as an array. Raises TypeError unless it is floating-point."""
    x = np.asarray(x)
    if x.dtype.kind != "f":
        raise TypeError(f"{owner.title()} expects floating-point input, got dtype {x.dtype}")
    return x


def check_width(owner: Any, x: Any, width: int, dtype: np.dtype) -> np.ndarray:
    """Return x (..., width) in the model's dtype, which every activation has.

    Raises TypeError unless x is floating-point, and ValueError for other widths.
    """
    x = check_float(owner, x).astype(dtype, copy=False)
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"{owner.title()} expects input of shape (..., {width}), got {x.shape}")
    return x


def check_dout(owner: Any, dout: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return dout as an array of `dtype`. Raises ValueError unless it has the output's shape."""
    dout = np.asarray(dout, dtype=dtype)
    if dout.shape != shape:
        raise ValueError(f"{owner.title()} expects dout of shape {shape}, got {dout.shape}")
    return dout


def check_kept(owner: Any, x: np.ndarray | None) -> np.ndarray:
    """Return the input that forward kept. Raises RuntimeError if it was frozen then."""
    if x is None:
        raise RuntimeError(f"{owner.title()} was frozen in forward but not in backward")
    return x


def token_ids(
    ids: Any, vocab_size: int, what: str = "id", ignore_index: int | None = None
) -> np.ndarray:
    """Return `ids` as an array of whole numbers in 0..vocab_size-1, or `ignore_index`.

    (NumPy would silently take -1 for the last row.) Raises TypeError for other dtypes and
    ValueError naming the first bad value.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what}s must be integers, got dtype {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = (ids < 0) | (ids >= vocab_size)
        if ignore_index is not None:
            bad &= ids != ignore_index
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"{what} {ids[where]} at {where} is not in 0..{vocab_size - 1}")
    return ids


class CheckpointError(ValueError):
    """A file is damaged, or its contents do not fit the model; the message names the fault."""
