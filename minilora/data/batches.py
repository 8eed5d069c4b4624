"""Batches of token windows, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minilora.nn.validate import Rng, check_sizes, make_rng
from minilora.train.parallel import Batch


def random_batches(
    ids: np.ndarray, batch_size: int, context_length: int, rng: Rng = 0
) -> Iterator[Batch]:
    """Yield batches of windows at random positions, without end.

    Parameters
    ----------
    ids
        (T,), the token ids of a text.
    batch_size
        B, windows in a batch.
    context_length
        L, tokens in a window.
    rng
        A numpy Generator, a seed, or None for a fresh seed.

    Yields
    ------
    Batch
        (ids, targets), both (B, L). The targets are the ids one position later.

    Raises
    ------
    ValueError
        If the text has no more than L tokens.
    """
    ids = np.asarray(ids)
    check_sizes("random_batches", batch_size=batch_size, context_length=context_length)
    if len(ids) <= context_length:
        raise ValueError(f"{len(ids)} tokens are too few for a context of {context_length}")
    rng = make_rng(rng)
    while True:
        starts = rng.integers(0, len(ids) - context_length, size=batch_size)
        windows = ids[starts[:, None] + np.arange(context_length + 1)]
        yield windows[:, :-1], windows[:, 1:]


def sequential_batches(
    ids: np.ndarray, batch_size: int, context_length: int, limit: int | None = None
) -> list[Batch]:
    """Return batches that cover a text once, front to back, for evaluation.

    Tokens at the end that do not fill a window are dropped.

    Parameters
    ----------
    ids
        (T,), the token ids of a text.
    batch_size
        B, windows in a batch; the last batch may have fewer.
    context_length
        L, tokens in a window.
    limit
        The maximum number of batches, spread evenly over the text; None for all.

    Returns
    -------
    list
        Of (ids, targets), both (B, L). The targets are the ids one position later.

    Raises
    ------
    ValueError
        If the text has no more than L tokens.
    """
    ids = np.asarray(ids)
    check_sizes("sequential_batches", batch_size=batch_size, context_length=context_length)
    count = (len(ids) - 1) // context_length
    if count < 1:
        raise ValueError(f"{len(ids)} tokens are too few for a context of {context_length}")
    starts = np.arange(count) * context_length
    if limit is not None and limit * batch_size < count:
        starts = starts[np.linspace(0, count - 1, limit * batch_size).astype(int)]
    windows = ids[starts[:, None] + np.arange(context_length + 1)]
    return [
        (windows[i : i + batch_size, :-1], windows[i : i + batch_size, 1:])
        for i in range(0, len(windows), batch_size)
    ]
