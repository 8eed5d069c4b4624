"""Text generation: tokens sampled one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minilora.nn.gpt import GPT
from minilora.nn.validate import Rng, make_rng, token_ids
from minilora.train.mode import evaluating


def generate(
    model: GPT,
    ids: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    rng: Rng = None,
) -> np.ndarray:
    """Continue token ids with tokens that are sampled one at a time, with dropout off.

    Each token is drawn from softmax(logits / temperature). The model reads only the last
    `context_length` tokens.

    Parameters
    ----------
    model
        A GPT whose head has one output for each token of the vocabulary.
    ids
        The prompt, (B, T) or (T,), with T at least 1.
    max_new_tokens
        The number of tokens to add.
    temperature
        Below 1 favours likely tokens; 0 always takes the likeliest.
    top_k
        Draw from the `top_k` likeliest tokens (more if logits are equal); None for all.
    rng
        A numpy Generator, a seed, or None for a fresh seed.

    Returns
    -------
    ndarray
        The prompt and its continuation, (B, T + max_new_tokens) or (T + max_new_tokens,).

    Raises
    ------
    ValueError
        If an argument is out of range, the prompt is empty, or the head is a classifier's.
    TypeError
        If ids or counts are not integers.
    FloatingPointError
        If the model's logits are nan.
    """
    ids = token_ids(ids, model.wte.weight.shape[0])
    chunks = [ids, *sample_tokens(model, ids, max_new_tokens, temperature, top_k, rng)]
    return np.concatenate(chunks, axis=-1)


def sample_tokens(
    model: GPT,
    ids: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    rng: Rng = None,
) -> Iterator[np.ndarray]:
    """Yield the new tokens of `generate` one at a time, each (B, 1), or (1,) for ids (T,)."""
    ids = token_ids(ids, model.wte.weight.shape[0]).astype(np.int64)
    if ids.ndim not in (1, 2) or not ids.shape[-1]:
        raise ValueError(f"ids must be (T,) or (B, T) with T at least 1, got {ids.shape}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
    for name, value, least in (("top_k", top_k, 1), ("max_new_tokens", max_new_tokens, 0)):
        if value is not None and not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    rng, context = make_rng(rng), np.atleast_2d(ids)
    for _ in range(max_new_tokens):
        context = context[:, -model.config.context_length :]
        with evaluating(model):  # not while the caller has the token
            logits = model(context)[:, -1].astype(np.float64)
        if logits.shape[-1] != model.config.vocab_size:
            raise ValueError(f"the model's head has {logits.shape[-1]} outputs, not one for "
                             f"each of {model.config.vocab_size} tokens")
        if np.isnan(logits).any():
            raise FloatingPointError("the model's logits are nan")
        token = _sample(logits, temperature, top_k, rng)
        context = np.concatenate([context, token], axis=1)
        yield token[0] if ids.ndim == 1 else token


def _sample(
    logits: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator
) -> np.ndarray:
    """Draw a token for each row from softmax(logits / temperature): (B, V) -> (B, 1).

    Adding Gumbel noise to the logits and taking the largest draws exactly from the soft-max.
    """
    logits = logits - logits.max(axis=-1, keepdims=True)  # so that dividing cannot overflow
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < smallest, -np.inf, logits)
    if temperature > 0.0:
        with np.errstate(over="ignore"):  # -inf is correct: it is never drawn
            logits = logits / temperature + rng.gumbel(size=logits.shape)
    return logits.argmax(axis=-1, keepdims=True)
