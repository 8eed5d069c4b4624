"""Fine-tuning on prompts and answers: the loss counts the tokens of the answers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from minilora.data.bpe import BPETokenizer
from minilora.nn.functional import IGNORE_INDEX, cross_entropy
from minilora.nn.module import Module
from minilora.nn.validate import Rng, check_sizes, make_rng
from minilora.train.parallel import Batch


def answer_loss(
    model: Module, ids: np.ndarray, targets: np.ndarray, first: int = 0
) -> tuple[float, np.ndarray]:
    """Return the mean loss in nats over the targets, and its gradient: a `loss` for `fit`.

    Logits are computed only where there is a target, and columns after the last one are dropped.

    Parameters
    ----------
    model
        A Llama.
    ids
        Token ids (B, T), or if `first` is above 0, what `Llama.states` returned for that layer.
    targets
        (B, T), with IGNORE_INDEX where no token of an answer is predicted.
    first
        The first layer to run.

    Returns
    -------
    loss
        In nats per target.
    dlogits
        (n, V) for the n targets.

    Raises
    ------
    ValueError
        If the shapes do not fit each other, or if there is no target.
    """
    ids, targets = np.asarray(ids), np.asarray(targets)
    if targets.ndim != 2 or ids.shape[:2] != targets.shape:
        raise ValueError(f"inputs and targets must both be (B, T), got {ids.shape} and "
                         f"{targets.shape}")
    where = targets != IGNORE_INDEX
    end = int(np.flatnonzero(where.any(axis=0)).max(initial=0)) + 1
    where = where[:, :end]
    return cross_entropy(model(ids[:, :end], where, first), targets[:, :end][where])


def pad(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Put sequences of different lengths into one batch.

    Padding is on the right, where no position before it looks, and has no targets. So each row
    computes what it would compute alone.

    Parameters
    ----------
    examples
        Pairs (inputs, targets), with inputs (T,) token ids or (T, C) states, and targets (T,).

    Returns
    -------
    inputs
        (B, T) or (B, T, C), with zeros after the end of a row.
    targets
        (B, T), with IGNORE_INDEX there.

    Raises
    ------
    ValueError
        If there are no examples, or if the inputs and targets of one differ in length.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    for i, (x, t) in enumerate(examples):
        if len(x) != len(t):
            raise ValueError(f"example {i} has {len(x)} inputs, but {len(t)} targets")
    longest = max(len(targets) for _, targets in examples)
    first = np.asarray(examples[0][0])
    inputs = np.zeros((len(examples), longest, *first.shape[1:]), first.dtype)
    targets = np.full((len(examples), longest), IGNORE_INDEX)
    for i, (x, t) in enumerate(examples):
        inputs[i, : len(x)], targets[i, : len(t)] = x, t
    return inputs, targets


def example(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, targets), both (T,): the answer's tokens are targets, the prompt's are not."""
    prompt, answer = np.asarray(prompt), np.asarray(answer)
    if not len(prompt) or not len(answer):
        raise ValueError("a prompt and an answer must have at least one token each")
    targets = np.concatenate([np.full(len(prompt) - 1, IGNORE_INDEX), answer])
    return np.concatenate([prompt, answer])[:-1], targets


def conversation_example(
    tokenizer: BPETokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, targets), both (T,), of a conversation, in which all answers are targets.

    Parameters
    ----------
    tokenizer
        Its chat template is used, with the usual system message if there is none.
    messages
        As for `BPETokenizer.chat`. The last answer ends the example.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    ids, is_target = np.zeros(0, np.int64), np.zeros(0, bool)
    for i in answers:
        prompt, answer = tokenizer.chat(messages[:i]), tokenizer.answer(messages[i]["content"])
        is_target = np.append(is_target, np.zeros(len(prompt) - len(ids), bool))
        is_target = np.append(is_target, np.ones(len(answer), bool))
        ids = np.append(prompt, answer)
    return ids[:-1], np.where(is_target, ids, IGNORE_INDEX)[1:]


def padded_batches(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int
) -> list[Batch]:
    """Return all examples in order, in batches, for evaluation."""
    return [pad(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]


def shuffled_batches(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int, rng: Rng = 0
) -> Iterator[Batch]:
    """Yield batches of examples without end, in a new order whenever all have been used.

    What is left at the end of an order, too few for a batch, is skipped.

    Parameters
    ----------
    examples
        Pairs (inputs, targets), as `pad` takes them.
    batch_size
        B, the examples of a batch.
    rng
        A numpy Generator, a seed, or None for a fresh seed.

    Raises
    ------
    ValueError
        If there are fewer examples than `batch_size`.
    """
    check_sizes("shuffled_batches", batch_size=batch_size)
    if len(examples) < batch_size:
        raise ValueError(f"{len(examples)} examples are too few for batches of {batch_size}")
    rng, order = make_rng(rng), []
    while True:
        if len(order) < batch_size:
            order = rng.permutation(len(examples)).tolist()
        yield pad([examples[order.pop()] for _ in range(batch_size)])
