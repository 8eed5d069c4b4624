"""Text generation: tokens sampled one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from minilora.data.cache import Cache, Unpacked, can_cache, whole_logits, worth_unpacking
from minilora.data.chat import END
from minilora.nn.gpt import GPT
from minilora.nn.llama import Llama
from minilora.nn.validate import Rng, check_flag, make_rng, token_ids
from minilora.train.mode import evaluating

Stop = int | Collection[int] | None
TOGETHER = 16  # prompts that are answered together
FEW = 2  # tokens, for which computing quantised weights once would take longer than it saves


def generate(
    model: GPT | Llama, ids: np.ndarray, max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, rng: Rng = None, stop: Stop = None, float_copy: bool | None = None,
) -> np.ndarray:
    """Continue token ids with tokens that are sampled one at a time, with dropout off.

    Each token is drawn from softmax(logits / temperature). A GPT reads only the last
    `context_length` tokens. The text of a Llama ends with the token that follows a full context.

    Parameters
    ----------
    model
        A GPT or Llama whose head has one output for each token of the vocabulary.
    ids
        The prompt, (B, T) or (T,), with T at least 1.
    max_new_tokens
        The largest number of tokens to add.
    temperature
        Below 1 favours likely tokens; 0 always takes the likeliest.
    top_k
        Draw from the `top_k` likeliest tokens (more if logits are equal); None for all.
    rng
        A numpy Generator, a seed, or None for a fresh seed.
    stop
        A token that ends a text, or several. A text that has ended repeats it until all have.
    float_copy
        Whether to compute quantised weights once, into 4 bytes for each, instead of for every
        token (see `Unpacked`). None: if more than two tokens are wanted, and the memory is there.

    Returns
    -------
    ndarray
        The prompt and its n new tokens, (B, T + n) or (T + n,). Without `stop`, a GPT writes
        max_new_tokens.

    Raises
    ------
    ValueError
        If an argument is out of range, the prompt is empty or longer than a Llama's context, or
        the head is a classifier's.
    TypeError
        If ids or counts are not integers.
    FloatingPointError
        If the model's logits are nan.
    """
    ids = token_ids(ids, model.config.vocab_size)
    new = sample_tokens(model, ids, max_new_tokens, temperature, top_k, rng, stop, float_copy)
    return np.concatenate([ids, *new], axis=-1)


def sample_tokens(
    model: GPT | Llama, ids: np.ndarray, max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, rng: Rng = None, stop: Stop = None, float_copy: bool | None = None,
) -> Iterator[np.ndarray]:
    """Yield the new tokens of `generate` one at a time, each (B, 1), or (1,) for ids (T,).

    Between two tokens the model can be used, but its weights must not be changed.
    """
    ids = token_ids(ids, model.config.vocab_size).astype(np.int64)
    if ids.ndim not in (1, 2) or not ids.shape[-1]:
        raise ValueError(f"ids must be (T,) or (B, T) with T at least 1, got {ids.shape}")
    token = np.zeros((len(np.atleast_2d(ids)), 1), np.int64)
    for rows, new in _write(model, list(np.atleast_2d(ids)), max_new_tokens, temperature, top_k,
                            stop, rng, float_copy):
        token[rows, 0] = new
        yield token[0].copy() if ids.ndim == 1 else token.copy()


def generate_batch(
    model: GPT | Llama, prompts: Sequence[np.ndarray], max_new_tokens: int,
    temperature: float = 0.0, top_k: int | None = None, stop: Stop = None, rng: Rng = None,
    float_copy: bool | None = None,
) -> list[np.ndarray]:
    """Continue several prompts of any lengths at once, each as if it were alone.

    Parameters
    ----------
    prompts
        B arrays of ids, each (T,) with a T of its own, at least 1.
    stop
        A token that ends a text, or several. Texts that have ended cost nothing more.
    model, max_new_tokens, temperature, top_k, rng, float_copy
        As for `generate`.

    Returns
    -------
    list of ndarray
        The new tokens of each text, (n,) int64 with n up to max_new_tokens, without the last if it
        is one of `stop`.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        As `generate` does.
    """
    arrays = [np.asarray(prompt) for prompt in prompts]
    for i, array in enumerate(arrays):
        if array.ndim != 1 or not array.size:
            raise ValueError(f"prompt {i} must be (T,) with T at least 1, got {array.shape}")
    arrays = [token_ids(array, model.config.vocab_size).astype(np.int64) for array in arrays]
    texts: list[list[int]] = [[] for _ in arrays]
    for rows, tokens in _write(model, arrays, max_new_tokens, temperature, top_k, stop, rng,
                               float_copy):
        for row, token in zip(rows, tokens, strict=True):
            texts[row].append(int(token))
    ends = _stop_ids(model, stop)
    return [np.array(text[:-1] if text and text[-1] in ends else text, np.int64) for text in texts]


def answer_prompts(
    model: GPT | Llama, tokenizer: Any, prompts: Sequence[np.ndarray], max_new_tokens: int
) -> list[str]:
    """Return what a model answers to prompts (T,), by the likeliest tokens, as far as they go.

    The tokenizer is a BPETokenizer. Each prompt ends where an answer begins, as its `chat` returns
    it.
    """
    texts = []
    for i in range(0, len(prompts), TOGETHER):
        new = generate_batch(model, prompts[i : i + TOGETHER], max_new_tokens,
                             stop=tokenizer.special[END])
        texts += [tokenizer.decode(ids, skip_special=True).strip() for ids in new]
    return texts


def _write(
    model: GPT | Llama, texts: list[np.ndarray], max_new_tokens: int, temperature: float,
    top_k: int | None, stop: Stop, rng: Rng, float_copy: bool | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the numbers of the texts that have not ended, and the next token of each: both (n,)."""
    _check(model, texts, max_new_tokens, temperature, top_k)
    rng, ends, limit = make_rng(rng), _stop_ids(model, stop), model.config.context_length
    rows, cache = np.arange(len(texts)), None
    if texts and can_cache(model):
        room = min(max(map(len, texts)) + max_new_tokens, limit)
        cache = Cache(model, len(texts), room)
    weights = _weights(model, max_new_tokens, float_copy)
    shape = len(texts), model.config.vocab_size
    for _ in range(max_new_tokens):
        if not texts:
            return
        if max(map(len, texts)) > limit:
            cache = None  # a GPT's window moves on, and with it all positions
        with weights, evaluating(model):  # not while the caller has the token
            logits = whole_logits(model, texts) if cache is None else cache.next_logits(texts)
        if logits.shape[-1] != shape[1]:
            raise ValueError(f"the model's head has {logits.shape[-1]} outputs, not one for "
                             f"each of {shape[1]} tokens")
        if np.isnan(logits).any():
            raise FloatingPointError("the model's logits are nan")
        # Drawn for all, so that what is drawn for one text does not depend on where others end.
        noise = rng.gumbel(size=shape)[rows] if temperature > 0.0 else None
        tokens = _sample(logits.astype(np.float64), temperature, top_k, noise)
        yield rows, tokens
        texts = [np.append(text, token) for text, token in zip(texts, tokens, strict=True)]
        full = [isinstance(model, Llama) and len(text) > limit for text in texts]
        on = ~(np.isin(tokens, ends) | full)
        texts, rows = [text for text, goes in zip(texts, on, strict=True) if goes], rows[on]
        if cache is not None:
            cache.keep(on)


def _check(
    model: GPT | Llama, prompts: list[np.ndarray], max_new_tokens: int, temperature: float,
    top_k: int | None,
) -> None:
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
    for name, value, least in (("top_k", top_k, 1), ("max_new_tokens", max_new_tokens, 0)):
        if value is not None and not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    longest, limit = max(map(len, prompts), default=0), model.config.context_length
    if isinstance(model, Llama) and longest > limit:
        raise ValueError(f"a prompt of {longest} tokens is longer than the context of {limit}")


def _stop_ids(model: GPT | Llama, stop: Stop) -> list[int]:
    """Return the ids of the tokens that end a text."""
    given = [] if stop is None else [stop] if isinstance(stop, (int, np.integer)) else list(stop)
    return [int(token_ids(i, model.config.vocab_size, "stop id")) for i in given]


def _weights(
    model: GPT | Llama, max_new_tokens: int, float_copy: bool | None
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which the model is used."""
    if float_copy is None:
        float_copy = max_new_tokens > FEW and worth_unpacking(model)
    check_flag(float_copy=float_copy)
    return Unpacked(model) if float_copy else contextlib.nullcontext()


def _sample(
    logits: np.ndarray, temperature: float, top_k: int | None, noise: np.ndarray | None
) -> np.ndarray:
    """Draw a token for each row from softmax(logits / temperature): (B, V) -> (B,).

    Adding Gumbel noise (B, V) to the logits and taking the largest draws exactly from the soft-max.
    Without noise it takes the likeliest.
    """
    logits = logits - logits.max(axis=-1, keepdims=True)  # so that dividing cannot overflow
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < smallest, -np.inf, logits)
    if noise is not None:
        with np.errstate(over="ignore"):  # -inf is correct: it is never drawn
            logits = logits / temperature + noise
    return logits.argmax(axis=-1)
