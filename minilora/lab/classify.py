"""Classification with a GPT: a new head of a few outputs, read at the last token of each text.

    model.lm_head = Linear(d_model, num_classes)

Attention only looks back, so only the last position has seen the whole text
(Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 3.2).
Targets are IGNORE_INDEX at all other positions, so `fit` and `evaluate` work unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minilora.data.corpus import corpus, split
from minilora.data.tokenizer import CharTokenizer
from minilora.nn.functional import IGNORE_INDEX
from minilora.nn.module import Module
from minilora.nn.validate import Rng, check_sizes, make_rng
from minilora.train.mode import evaluating
from minilora.train.parallel import Batch

LABELS = ("prose", "code")
SHORTEST = 20  # characters; shorter lines, such as "else:", could be of either kind


def encode_labelled(
    texts: Sequence[str], labels: Sequence[int], context_length: int
) -> Batch:
    """Encode texts, with each label as the target at the last token of its text.

    Texts longer than the context are cut. Shorter ones are padded at the end, which earlier
    positions do not see.

    Returns
    -------
    ids, targets : ndarray of int, (N, context_length)

    Raises
    ------
    ValueError
        If there are no texts, a text is empty, or the number of labels differs.
    """
    check_sizes("encode_labelled", context_length=context_length)
    if not len(texts) or len(texts) != len(labels):
        raise ValueError(f"{len(texts)} texts need as many labels, got {len(labels)}")
    tokenizer = CharTokenizer()
    ids = np.zeros((len(texts), context_length), dtype=np.int64)
    targets = np.full_like(ids, IGNORE_INDEX)
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        tokens = tokenizer.encode(text)[:context_length]
        if not len(tokens):
            raise ValueError(f"text {i} is empty: there is no last token to read")
        ids[i, : len(tokens)] = tokens
        targets[i, len(tokens) - 1] = label
    return ids, targets


def prose_or_code(context_length: int, limit: int = 4000, rng: Rng = 0) -> tuple[Batch, Batch]:
    """Make a task from the standard library: does a line come from the docs or from the code?

    Each text is one line of a corpus without its indentation, and appears once. The classes are
    prose 0 and code 1, in equal numbers. Some lines of the docs are code, so no classifier can be
    right about every line.

    Parameters
    ----------
    context_length : int
        Longer lines are cut.
    limit : int
        The most training texts of each class; a tenth as many are held out.
    rng : int or Generator
        Chooses the texts and their order.

    Returns
    -------
    training, held_out : pair of (ids, targets)
        As from `encode_labelled`, in random order.
    """
    check_sizes("prose_or_code", limit=limit)
    rng = make_rng(rng)
    corpora = [split(corpus(name)) for name in ("docs", "code")]
    parts, seen = [], set()
    for part, most in ((0, limit), (1, max(1, limit // 10))):
        classes = [_lines(texts[part], seen) for texts in corpora]
        count = min(most, *map(len, classes))
        texts = [lines[i] for lines in classes for i in rng.permutation(len(lines))[:count]]
        seen.update(*classes)
        order = rng.permutation(2 * count)
        ids, targets = encode_labelled(texts, [0] * count + [1] * count, context_length)
        parts.append((ids[order], targets[order]))
    return parts[0], parts[1]


def _lines(text: str, seen: set[str]) -> list[str]:
    """Return the distinct lines of a text that are long enough and not in `seen`."""
    lines = dict.fromkeys(line.strip() for line in text.split("\n"))
    return [line for line in lines if len(line) >= SHORTEST and line not in seen]


def shuffled_batches(data: Batch, batch_size: int, rng: Rng = 0) -> Iterator[Batch]:
    """Yield (ids, targets) of `batch_size` rows without end; each pass takes every row once."""
    check_sizes("shuffled_batches", batch_size=batch_size)
    ids, targets = data
    rng = make_rng(rng)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(ids))])
        yield ids[order[:batch_size]], targets[order[:batch_size]]
        order = order[batch_size:]


def predict(model: Module, data: Batch, batch_size: int = 64) -> np.ndarray:
    """Return the likeliest class of each text, (N,), with dropout off."""
    ids, targets = data
    found = []
    with evaluating(model):
        for start in range(0, len(ids), batch_size):
            last = (targets[start : start + batch_size] != IGNORE_INDEX).argmax(axis=1)
            logits = model(ids[start : start + batch_size])
            found.append(logits[np.arange(len(last)), last].argmax(axis=-1))
    return np.concatenate(found)


def accuracy(model: Module, data: Batch) -> float:
    """Return the share of texts whose likeliest class is their label."""
    _, targets = data
    return float((predict(model, data) == targets[targets != IGNORE_INDEX]).mean())
