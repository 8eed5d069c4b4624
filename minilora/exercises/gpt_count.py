"""The number of a GPT's parameters, and how a wrong number may have come about."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minilora.exercises.comparison import Case


def gpt_count(vocab_size: int, context_length: int, d_model: int, n_layers: int) -> int:
    """Return the parameters of a GPT-2 whose head is tied to the token embedding."""
    d = d_model
    block = (4 * d * d + 4 * d) + (8 * d * d + 5 * d) + 2 * 2 * d
    return vocab_size * d + context_length * d + n_layers * block + 2 * d


def counted_with(**changes: int) -> Callable[..., int]:
    """Return a function that adds these multiples of V d, T d, d, L d or L d d to the count."""

    def wrong(vocab_size: int, context_length: int, d_model: int, n_layers: int) -> int:
        count = gpt_count(vocab_size, context_length, d_model, n_layers)
        of = {"V d": vocab_size * d_model, "T d": context_length * d_model, "d": d_model,
              "L d": n_layers * d_model, "L d d": n_layers * d_model**2}
        return count + sum(times * of[name.replace("_", " ")] for name, times in changes.items())

    return wrong


def counted_blocks(change: Callable[[int], int]) -> Callable[..., int]:
    """Return a function that counts another number of blocks."""
    return lambda vocab_size, context_length, d_model, n_layers: gpt_count(
        vocab_size, context_length, d_model, change(n_layers))


_TERMS = ("V d", "T d", "d", "L d²", "L d", "V")


def describe_count(runs: list[tuple[Case, np.ndarray]]) -> str:
    """Return the formula behind the counts, if it is one of the terms that belong there."""
    rows, counts = [], []
    for case, got in runs:
        v, t, d, n_layers = case.values()
        rows.append([v * d, t * d, d, n_layers * d * d, n_layers * d, v])
        counts.append(got)
    if len(rows) < len(_TERMS) or any(np.shape(count) for count in counts):
        return ""
    sizes = np.array(rows, float).max(axis=0)
    found = np.linalg.lstsq(np.array(rows) / sizes, np.array(counts, float), rcond=None)[0] / sizes
    whole = found.round()
    if any(int(np.dot(row, whole)) != count for row, count in zip(rows, counts, strict=True)):
        return ""
    return ("your counts are " + _formula(whole) + "; they should be "
            + _formula(np.array([1, 1, 2, 12, 13, 0])) + ". (V, T, d and L: the arguments.)")


def _formula(factors: np.ndarray) -> str:
    """Return the sum of the terms with these factors."""
    parts = [f"{int(factor)} {term}".removeprefix("1 ")
             for factor, term in zip(factors, _TERMS, strict=True) if factor]
    return " + ".join(parts).replace("+ -", "- ") or "0"
