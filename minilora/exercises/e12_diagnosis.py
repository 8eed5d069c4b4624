"""Exercise 12: find the layer that an adapter changes most, and the update's effective rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.outcome import Passed, either, failed, run
from minilora.lora.adapter import Adapter, Factors

NUMBER = 12
# Name of the check: the name that a submission must define.
DEFINED = {"diagnosis": "diagnose"}

_NAME = "diagnose"
_READ = ("||scale A B|| in the Frobenius norm; singular values squared and summed up to 90% of "
         "their sum.")


def diagnosis(function: Callable[[Adapter], tuple[str, int]]) -> Passed:
    """Check exercise 12: layer, rank = diagnose(adapter).

    Parameters
    ----------
    function
        Takes an adapter; returns the name of the layer that is changed most, and the effective
        rank of its update.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    adapters = [_adapter(seed) for seed in range(32)]
    answers = [(adapter, _answer(function, adapter)) for adapter in adapters]
    _check_layer(answers)
    _check_rank(answers)
    return Passed(_NAME, f"Checked on {len(answers)} adapters.")


def effective_rank(f: Factors, share: float = 0.9) -> int:
    """Return how many singular values of the update hold `share` of its squared norm."""
    return _rank_of(f.delta_weight(), share)


def _rank_of(matrix: np.ndarray, share: float = 0.9) -> int:
    """Return how many singular values of a matrix hold `share` of its squared norm."""
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(squares), share * squares.sum() * (1 - 1e-9)) + 1)


def _adapter(seed: int) -> Adapter:
    """Return an adapter whose layers differ in scale, size, and how fast singular values fall."""
    rng, layers = np.random.default_rng(seed), {}
    paths = ["h.0.attn.q_proj", "h.0.mlp.up_proj", "h.0.mlp.down_proj", "h.1.attn.v_proj"]
    for path in rng.permutation(paths).tolist():
        n, m = {"up": (12, 30), "do": (30, 12)}.get(path.rpartition(".")[2][:2], (12, 12))
        r = int(rng.integers(2, 9))
        a, b = rng.standard_normal((n, r)), rng.standard_normal((r, m))
        b *= np.exp(-rng.uniform(0.0, 1.2) * np.arange(r))[:, None]
        layers[path] = Factors(a, rng.uniform(0.2, 3.0) * b, float(rng.uniform(1, 40)))
    if seed % 2:  # one layer has the largest singular value, another the largest norm
        peak, flat = rng.permutation(list(layers))[:2].tolist()
        largest = max(f.norm() for f in layers.values())
        for path, values in ((peak, [2.0]), (flat, [1.2] * 4)):
            u, _ = np.linalg.qr(rng.standard_normal((len(layers[path].A), len(values))))
            v, _ = np.linalg.qr(rng.standard_normal((layers[path].B.shape[1], len(values))))
            layers[path] = Factors(u, largest * np.array(values)[:, None] * v.T, float(len(values)))
    return Adapter(layers)


def _answer(function: Callable[[Adapter], Any], adapter: Adapter) -> tuple[str, int]:
    """Return the learner's answer for an adapter, after checking its types."""
    given = copy.deepcopy(adapter)
    got = run(_NAME, lambda: function(given))
    if list(given.layers) != list(adapter.layers) or any(
        not np.array_equal(x, y) for p in adapter.layers
        for x, y in zip(adapter.layers[p].arrays, given.layers[p].arrays, strict=True)
    ):
        raise failed(_NAME, "It changes the adapter that it was given.")
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise failed(_NAME, "It should return two things, the name of the layer and the rank.")
    name = str.__str__(got[0]) if isinstance(got[0], str) else ""  # plain, so it compares as text
    if name not in adapter.layers:
        raise failed(_NAME, f"The first thing should be the name of a layer, one of "
                     f"{', '.join(adapter.layers)}; yours is {got[0]!r:.80}.")
    if not isinstance(got[1], (int, np.integer)) or isinstance(got[1], bool):
        raise failed(_NAME, f"The second thing should be a whole number; yours is {got[1]!r}.")
    return name, int(got[1])


# ---- The layer

_norm = np.linalg.norm
# What a learner may take for the size of an update, and what is wrong with it.
_WRONG_SIZES: list[tuple[Callable[[Factors], Any], str]] = [
    (lambda f: _norm(f.A @ f.B), "you leave the scale out, and layers may differ in it."),
    (lambda f: _norm(f.A) * _norm(f.B), "the norm of a product is not the product of the norms; "
     "and the scale is missing."),
    (lambda f: abs(f.scale) * _norm(f.A) * _norm(f.B),
     "the norm of a product is not the product of the norms."),
    (lambda f: f.scale**2 * _norm(f.A @ f.B), "the scale is in it twice."),
    (lambda f: _norm(f.A @ f.B) / f.scale, "it is divided by the scale."),
    (lambda f: _norm(f.delta_weight(), 1), "norm(..., 1) is the largest column sum; the Frobenius "
     "norm is np.linalg.norm(matrix)."),
    (lambda f: _norm(f.delta_weight(), np.inf), "norm(..., inf) is the largest row sum; the "
     "Frobenius norm is np.linalg.norm(matrix)."),
    (lambda f: f.delta_weight().std(), "a standard deviation divides by the size of the layer."),
    (lambda f: f.delta_weight().max(), "that is the largest entry; all count."),
    (lambda f: f.scale * (_norm(f.A) + _norm(f.B)), "you add the norms of A and B; their product "
     "counts."),
    (lambda f: f.scale * _norm(f.B), "you look at B and the scale alone."),
    (lambda f: f.scale * _norm(f.A), "you look at A and the scale alone."),
    (lambda f: f.A.size + f.B.size, "that is the layer with the most numbers."),
    (lambda f: _norm(f.A), "you look at A alone."),
    (lambda f: _norm(f.B), "you look at B alone."),
    (lambda f: _norm(f.A) + _norm(f.B), "you add the norms of A and B; their product counts."),
    (lambda f: _norm(f.delta_weight(), 2), "that is the largest singular value; the Frobenius "
     "norm counts all of them."),
    (lambda f: np.abs(f.delta_weight()).max(), "that is the largest entry; all count."),
    (lambda f: _norm(f.delta_weight(), "nuc"), "you add the singular values; the Frobenius norm "
     "adds their squares."),
    (lambda f: np.abs(f.delta_weight()).sum(), "you add the entries; the norm adds their "
     "squares."),
    (lambda f: np.abs(f.delta_weight()).mean(), "that is the mean entry: it divides by the "
     "size of the layer."),
    (lambda f: _norm(f.delta_weight()) / f.delta_weight().size ** 0.5,
     "you divide by the size of the layer."),
    (lambda f: f.norm() / len(f.A) ** 0.5, "you divide by the size of the layer."),
    (lambda f: -f.norm(), "that is the layer that changed least."),
    (lambda f: f.scale, "that is the layer with the largest scale."),
    (lambda f: f.delta_weight().sum(), "a sum of entries lets positive and negative cancel."),
    (lambda f: f.rank, "that is the layer with the largest rank."),
]


def _check_layer(answers: list[tuple[Adapter, tuple[str, int]]]) -> None:
    """Check the names of the layers."""

    def most(size: Callable[[Factors], Any]) -> list[str]:
        return [max(a.layers, key=lambda p, a=a: size(a.layers[p])) for a, _ in answers]

    got, right = [layer for _, (layer, _) in answers], most(Factors.norm)
    if got == right:
        return
    causes = [text for size, text in _WRONG_SIZES if got == most(size)]
    for place, text in ((0, "you always name the first layer."), (-1, "you always name the last "
                                                                   "layer.")):
        causes += [text] * (got == [list(a.layers)[place] for a, _ in answers])
    causes += ["it is the last name in the alphabet, not the layer with the largest norm: "
               "max(norms, key=norms.get)."] * (got == [max(a.layers) for a, _ in answers])
    if causes:
        raise failed(_NAME, f"The layer is wrong: {either(causes)}", _READ)
    first = next(i for i, layer in enumerate(got) if layer != right[i])
    layers = answers[first][0].layers
    norms = ", ".join(f"{p} {f.norm():.2f}" for p, f in layers.items())
    raise failed(_NAME, f"The layer is wrong: you say {got[first]}; the norms are {norms}.", _READ)


# ---- The effective rank


def _entropy_rank(weights: np.ndarray) -> float:
    """Return the exponential of the entropy of the weights (r,), divided by their sum."""
    p = weights / weights.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _reach(s: np.ndarray, power: float, share: float) -> int:
    """Return how many of the values `s` (r,), raised to `power`, hold `share` of their sum."""
    sums = np.cumsum(s**power)
    return int(np.searchsorted(sums, share * sums[-1]) + 1)


# What a learner may take for the effective rank, given the singular values (r,), and what is
# wrong with it.
_WRONG_RANKS: list[tuple[Callable[[np.ndarray], Any], str]] = [
    (lambda s: _reach(s, 1, 0.9), "you add the singular values; add their squares."),
    (lambda s: _reach(s, 2, 0.9) - 1, "it is off by one: the value that passes 90% counts."),
    (lambda s: _reach(s, 2, 0.9) + 1, "it is off by one: what passes 90% is the last."),
    (lambda s: len(s), "that is the rank r itself, the most that it could be."),
    (lambda s: _reach(s, 2, 0.99), "that is for 99%."),
    (lambda s: _reach(s, 2, 0.95), "that is for 95%."),
    (lambda s: _reach(s, 2, 0.5), "that is for 50%."),
    (lambda s: _reach(s, 2, 0.8), "that is for 80%."),
    (lambda s: _reach(s, 2, 0.81), "that is for 0.9², 81%; s² is squared already."),
    (lambda s: (s**2 > 0.1 * s[0] ** 2).sum(), "you count squares above a tenth of the largest."),
    (lambda s: (s > s.mean()).sum(), "you count values above the mean."),
    (lambda s: len(s) + 1 - _reach(s, 2, 0.9), "you count the values from the one on that passes "
     "90%; count up to it."),
    (lambda s: 13 - _reach(s, 2, 0.9), "you count the values from the one on that passes 90%; "
     "count up to it."),
    (lambda s: _reach(s[::-1], 2, 0.9), "you start with the smallest singular values."),
    (lambda s: 12 - len(s) + _reach(s[::-1], 2, 0.9), "you start with the smallest singular "
     "values."),
    (lambda s: round((s**2).sum() ** 2 / (s**4).sum()), "that is the participation ratio, another "
     "measure."),
    (lambda s: np.ceil((s**2).sum() ** 2 / (s**4).sum()), "that is the participation ratio, "
     "another measure."),
    (lambda s: round(_entropy_rank(s**2)), "that is the exponential of the entropy, another "
     "measure."),
    (lambda s: round(_entropy_rank(s)), "that is the exponential of the entropy, another "
     "measure."),
    (lambda s: (s > 0.1 * s[0]).sum(), "you count values above a tenth of the largest."),
    (lambda s: _reach(s, 4, 0.9), "you square the singular values twice."),
    (lambda s: 12, "np.linalg.matrix_rank, or the number of all singular values, is not it."),
]


# Other matrices whose effective rank a learner may take.
_WRONG_UPDATES: list[tuple[str, Callable[[Adapter, str], np.ndarray]]] = [
    ("that is the effective rank of A alone.",
     lambda adapter, path: adapter.layers[path].A),
    ("that is the effective rank of B alone.",
     lambda adapter, path: adapter.layers[path].B),
    ("that is the effective rank of the adapter's last layer, not of the one that you name.",
     lambda adapter, path: list(adapter.layers.values())[-1].delta_weight()),
    ("that is the effective rank of the adapter's first layer, not of the one that you name.",
     lambda adapter, path: next(iter(adapter.layers.values())).delta_weight()),
]


def _check_rank(answers: list[tuple[Adapter, tuple[str, int]]]) -> None:
    """Check the effective ranks of the layers that were named."""
    updates = [adapter.layers[path] for adapter, (path, _) in answers]
    got, right = [rank for _, (_, rank) in answers], [effective_rank(f) for f in updates]
    if got == right:
        return
    values = [np.linalg.svd(f.delta_weight(), compute_uv=False)[: f.rank] for f in updates]
    if set(got) == {1}:
        raise failed(_NAME, "The effective rank is wrong: it is always 1. Are the squares added up "
                     "one after the other (cumsum), and divided by the sum of all?", _READ)
    causes = [text for rule, text in _WRONG_RANKS if got == [int(rule(s)) for s in values]]
    for text, wrong in _WRONG_UPDATES:
        if got == [_rank_of(wrong(adapter, path)) for adapter, (path, _) in answers]:
            causes.append(text)
    if causes:
        raise failed(_NAME, f"The effective rank is wrong: {either(causes)}", _READ)
    first = next(i for i, rank in enumerate(got) if rank != right[i])
    squares = np.linalg.svd(updates[first].delta_weight(), compute_uv=False) ** 2
    shares = np.cumsum(squares / squares.sum())[: updates[first].rank]
    held = ", ".join(f"{share:.3f}" for share in shares)
    path = answers[first][1][0]
    raise failed(_NAME, f"The effective rank of {path} is wrong: you say {got[first]}; the first "
                 f"singular values hold {held} of the squared norm.", _READ)
