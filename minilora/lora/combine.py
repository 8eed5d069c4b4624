"""Combine adapters: add them up, reduce their rank, or extract one from two models."""

from __future__ import annotations

import math
import warnings

import numpy as np

from minilora.lora.adapter import Adapter, Factors
from minilora.lora.surgery import wrappers
from minilora.lora.targets import find_targets
from minilora.nn.module import Module
from minilora.nn.validate import check_sizes


def weighted_sum(
    adapters: list[Adapter], weights: list[float], combination_type: str = "cat"
) -> Adapter:
    """Return an adapter whose updates are the sum of weight * update, layer by layer.

    A layer that only some adapters have is summed over those.

    Parameters
    ----------
    adapters : list of at least one Adapter
    weights : a finite number for each adapter
    combination_type : named as in PEFT's `add_weighted_adapter`.
        "cat" is exact: the factors are concatenated, [A1 A2] (in, r1 + r2) and
        [w1 s1 B1; w2 s2 B2] (r1 + r2, out), so the ranks add up.
        "linear" adds the factors, with c = sqrt(w s): (c1 A1 + c2 A2) (c1 B1 + c2 B2). The rank
        stays the same, but the product also has the cross terms c1 c2 A1 B2 and c1 c2 A2 B1,
        which have no meaning and can be of any size.

    Raises
    ------
    ValueError : if an adapter has DoRA or modules stored whole, if the numbers of adapters and
        weights or the sizes of a layer differ, or, with "linear", if the ranks differ
    """
    if combination_type not in ("cat", "linear"):
        raise ValueError(f"combination_type must be cat or linear, got {combination_type!r}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not np.isfinite(weights).all():
        raise ValueError(f"weights must be finite, got {weights}")
    if any(adapter.saved or _is_dora(adapter) for adapter in adapters):
        raise ValueError("DoRA and modules stored whole cannot be added up: only A B can")
    parts: dict[str, list[tuple[float, Factors]]] = {}
    for weight, adapter in zip(weights, adapters, strict=True):
        for path, factors in adapter.layers.items():
            parts.setdefault(path, []).append((weight * factors.scale, factors))
    for path, part in parts.items():
        shapes = {(f.A.shape[0], f.B.shape[1]) for _, f in part}
        if len(shapes) > 1:
            raise ValueError(f"{path} has different sizes in the adapters: {sorted(shapes)}")
    join = _cat if combination_type == "cat" else _linear
    layers = {path: join(path, part) for path, part in parts.items()}
    return Adapter(layers, dropout=max(adapter.dropout for adapter in adapters))


def _cat(path: str, part: list[tuple[float, Factors]]) -> Factors:
    a = np.concatenate([f.A for _, f in part], axis=1)
    b = np.concatenate([c * f.B for c, f in part], axis=0)
    return Factors(a, b, alpha=a.shape[1])  # so that the scale is 1


def _linear(path: str, part: list[tuple[float, Factors]]) -> Factors:
    ranks = {f.rank for _, f in part}
    if len(ranks) > 1:
        raise ValueError(f"{path}: factors of ranks {sorted(ranks)} cannot be added; use cat")
    # The sign goes to A, as in PEFT: the cross terms depend on where it is.
    a = np.sum([math.copysign(abs(c) ** 0.5, c) * f.A for c, f in part], axis=0)
    b = np.sum([abs(c) ** 0.5 * f.B for c, f in part], axis=0)
    return Factors(a, b, alpha=a.shape[1])


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
    """Return the closest adapter of at most this rank, and the error in each layer.

    With A = Qa Ra and Bᵀ = Qb Rb, A B = Qa (Ra Rbᵀ) Qbᵀ, so the SVD is of an (r, r) matrix only.

    Returns
    -------
    adapter : Adapter with A (in, rank) and B (rank, out)
    errors : {layer: ||new - old|| / ||old||} in the Frobenius norm. By Eckart and Young 1936 it
        is sqrt(sum of the squared singular values that were dropped / sum of all of them)

    Raises
    ------
    ValueError : if the rank is below 1, or the adapter has DoRA, nan or inf
    """
    check_sizes("compress", rank=rank)
    if _is_dora(adapter):
        raise ValueError("a DoRA update is not A B alone: it cannot be compressed this way")
    layers, errors = {}, {}
    for path, f in adapter.layers.items():
        if f.fault():
            raise ValueError(f"{path} has {f.fault()}")
        qa, ra = np.linalg.qr(f.A.astype(np.float64))
        qb, rb = np.linalg.qr(f.B.T.astype(np.float64))
        u, s, vt = np.linalg.svd(f.scale * (ra @ rb.T))
        layers[path], errors[path] = _best(qa @ u, s, vt @ qb.T, rank, f.A.dtype)
    return Adapter(layers, dict(adapter.saved), adapter.dropout), errors


def extract_lora(
    base: Module, tuned: Module, rank: int, target_modules: str | list[str] | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Return the best adapter of this rank for a fine-tuned model, and its error in each layer.

    The SVD of W_tuned - W_base (in, out) is truncated to `rank` terms; errors are as in
    `compress`. Warns about parameters that differ but are not in the adapter, such as embeddings.

    Parameters
    ----------
    base, tuned : two models of the same shapes, without adapters
    target_modules : as in `replace_linear_with_lora`

    Raises
    ------
    ValueError : if one has an adapter, the shapes differ, or a weight is not finite
    """
    check_sizes("extract_lora", rank=rank)
    if wrappers(base) or wrappers(tuned):
        raise ValueError("extract_lora compares two plain models: merge_lora or remove_lora first")
    old, new = dict(base.named_parameters()), dict(tuned.named_parameters())
    if {n: p.shape for n, p in old.items()} != {n: p.shape for n, p in new.items()}:
        raise ValueError("the two models differ in their parameters' names or shapes")
    layers, errors = {}, {}
    for path in find_targets(base, target_modules):
        w0, w1 = old[f"{path}.weight"].data, new[f"{path}.weight"].data
        if not (np.isfinite(w0).all() and np.isfinite(w1).all()):
            raise ValueError(f"{path}.weight has nan or inf in one of the models")
        u, s, vt = np.linalg.svd(w1.astype(np.float64) - w0, full_matrices=False)
        layers[path], errors[path] = _best(u, s, vt, rank, w0.dtype)
    left = [name for name, p in old.items() if name.removesuffix(".weight") not in layers
            and not np.array_equal(p.data, new[name].data)]
    if left:
        warnings.warn(f"{len(left)} parameters differ and are not in the adapter: "
                      f"{', '.join(left[:5])}{', ...' * (len(left) > 5)}", stacklevel=2)
    return Adapter(layers), errors


def _best(
    u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int, dtype: np.dtype
) -> tuple[Factors, float]:
    """Return the first `rank` terms of an SVD, split evenly between A and B, and the error."""
    rank = min(rank, len(s))
    root = np.sqrt(s[:rank])
    a, b = (u[:, :rank] * root).astype(dtype), (root[:, None] * vt[:rank]).astype(dtype)
    total = float(np.square(s).sum())
    error = float(np.square(s[rank:]).sum() / total) ** 0.5 if total else 0.0
    return Factors(a, b, alpha=rank), error


def _is_dora(adapter: Adapter) -> bool:
    return any(factors.magnitude is not None for factors in adapter.layers.values())
