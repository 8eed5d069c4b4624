"""Datasets as token ids: what fine-tuning draws its batches from, and evaluation covers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from minilora.data.answers import conversation_example, padded_batches, shuffled_batches
from minilora.data.batches import random_batches, sequential_batches
from minilora.data.bpe import BPETokenizer
from minilora.data.datasets import Conversation
from minilora.data.tokenizer import CharTokenizer, plain_with_warning
from minilora.nn.functional import IGNORE_INDEX
from minilora.train.parallel import Batch

Tokenizer = CharTokenizer | BPETokenizer
PROMPT = 32  # tokens of a text that a sample begins with


@dataclass
class Text:
    """A text, which is read in windows.

    Attributes
    ----------
    ids
        (T,), of all texts one after another: with a blank line between them if the tokens are
        characters, else with the token that ends a text.
    context_length
        Tokens of a window; fewer if the text is shorter.
    prompt
        (P,), the ids of its beginning.
    """

    ids: np.ndarray
    context_length: int
    prompt: np.ndarray

    @classmethod
    def encode(cls, texts: Sequence[str], tokenizer: Tokenizer, context_length: int) -> Self:
        """Encode texts. Characters without a token are left out, and a warning names them.

        Raises ValueError if fewer than 2 tokens are left.
        """
        if isinstance(tokenizer, CharTokenizer):
            ids = tokenizer.encode(plain_with_warning("\n\n".join(texts)))
        else:
            end = [] if tokenizer.eos is None else [tokenizer.eos]
            ids = np.concatenate([part for text in texts for part in (
                tokenizer.encode(text, special=False), np.array(end, np.int64))])
        return cls._of(ids, context_length)

    @classmethod
    def _of(cls, ids: np.ndarray, context_length: int) -> Self:
        if len(ids) < 2:
            raise ValueError(f"a text of {len(ids)} tokens is too short: there is nothing to "
                             "predict")
        length = min(context_length, len(ids) - 1)
        return cls(ids, length, ids[: min(length, PROMPT)])

    def split(self, share: float, seed: int = 0) -> tuple[Self, Self]:
        """Return the beginning, and the end with this share of the tokens.

        Nothing is drawn, so `seed` has no effect. Raises ValueError if the text is too short.
        """
        cut = len(self.ids) - max(2, round(share * len(self.ids)))
        if cut < 2:
            raise ValueError(f"a text of {len(self.ids)} tokens is too short to hold out a part")
        return (self._of(self.ids[:cut], self.context_length),
                self._of(self.ids[cut:], self.context_length))

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of windows at random places, without end."""
        return random_batches(self.ids, batch_size, self.context_length, seed)

    def evaluation(self, batch_size: int, most: int | None = None) -> list[Batch]:
        """Return batches that cover the text once, or at most this many windows of it."""
        limit = None if most is None else max(1, most // batch_size)
        return sequential_batches(self.ids, batch_size, self.context_length, limit)


@dataclass
class Examples:
    """Conversations, of which the answers are to be predicted.

    Attributes
    ----------
    rows
        Pairs (ids, targets), both (T,), as `conversation_example` returns them.
    prompts
        The ids (P,) of each conversation before its last answer, of those that are not cut off.
    questions, answers
        The last message before that answer, and the answer.
    """

    rows: list[tuple[np.ndarray, np.ndarray]]
    prompts: list[np.ndarray]
    questions: list[str]
    answers: list[str]

    @classmethod
    def encode(
        cls, conversations: Sequence[Conversation], tokenizer: BPETokenizer, context_length: int
    ) -> Self:
        """Encode conversations and cut them to `context_length`; a warning says how many are cut.

        Raises ValueError if no answer is left, or if the tokenizer has no chat template.
        """
        if not isinstance(tokenizer, BPETokenizer):
            raise ValueError("a tokenizer of characters has no chat template for conversations")
        found, long = cls([], [], [], []), 0
        for messages in conversations:
            ids, targets = conversation_example(tokenizer, messages)
            long += len(ids) > context_length
            ids, targets = ids[:context_length], targets[:context_length]
            if (targets != IGNORE_INDEX).any():
                last, prompt = _last_answer(messages, tokenizer, context_length)
                found.rows.append((ids, targets))
                found.prompts.append(prompt)
                found.questions.append(messages[last - 1]["content"])
                found.answers.append(messages[last]["content"])
        if long:
            lost = len(conversations) - len(found.rows)
            warnings.warn(f"{long:,} of {len(conversations):,} conversations are longer than "
                          f"{context_length:,} tokens: their ends are cut off, and {lost:,} are "
                          "left out, since nothing of an answer is left", stacklevel=2)
        if not found.rows:
            raise ValueError("no conversation has an answer within the first "
                             f"{context_length:,} tokens")
        return found

    def split(self, share: float, seed: int = 0) -> tuple[Self, Self]:
        """Return some for training, and others, this share of all, drawn at random.

        Raises ValueError if none would be left for training.
        """
        count = max(1, round(share * len(self.rows)))
        if count >= len(self.rows):
            raise ValueError(f"{len(self.rows)} conversations are too few to hold some out")
        order = np.random.default_rng(seed).permutation(len(self.rows)).tolist()
        return self._some(order[count:]), self._some(order[:count])

    def _some(self, numbers: Sequence[int]) -> Self:
        columns: Any = self.rows, self.prompts, self.questions, self.answers
        return type(self)(*([values[i] for i in numbers] for values in columns))

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield batches without end, in a new order whenever all have been used."""
        return shuffled_batches(self.rows, min(batch_size, len(self.rows)), seed)

    def evaluation(self, batch_size: int, most: int | None = None) -> list[Batch]:
        """Return batches of all, or of the first `most`."""
        return padded_batches(self.rows[:most], batch_size)


def _last_answer(
    messages: Conversation, tokenizer: BPETokenizer, context_length: int
) -> tuple[int, np.ndarray]:
    """Return the index of the last answer that begins within the context, and the ids before."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return next((i, prompt) for i in reversed(answers)
                if len(prompt := tokenizer.chat(messages[:i])) <= context_length)
