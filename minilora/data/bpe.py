"""Byte-level BPE, the tokenizer of GPT-2, SmolLM2 and Llama 3: special tokens, decoding, chat."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.chat import END, START, SYSTEM, TEMPLATE, conversation
from minilora.data.words import WordEncoder, any_of
from minilora.files.tokenizer_folder import write_vocabulary
from minilora.files.vocabulary import Vocabulary, from_metadata, read_vocabulary
from minilora.nn.validate import check_flag, token_ids


class BPETokenizer:
    """A tokenizer with `vocab_size`, `special` ({text: id}), and `eos` (an id or None).

    A byte without a token is left out, as in the reference: SmolLM2 lacks six control characters
    and the first byte of most code points from U+40000 on.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.special, self.eos = vocabulary.special, vocabulary.eos
        self.vocab_size, self._tokens = len(vocabulary.tokens), vocabulary.tokens
        self._words = WordEncoder(vocabulary)
        self._added = {text: i for group in vocabulary.added for text, i in group.items()}
        self._groups = {flag: [any_of(text for text in group if flag or text not in self.special)
                               for group in vocabulary.added] for flag in (True, False)}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> BPETokenizer:
        """Make the tokenizer in a GGUF file's metadata. Raises CheckpointError for other kinds."""
        return cls(from_metadata(metadata))

    @classmethod
    def from_json(cls, path: str | Path, eos: str | None = None) -> BPETokenizer:
        """Make the tokenizer in a tokenizer.json. Its post_processor is ignored: no BOS is added.

        `eos` is a token; by default that of the tokenizer_config.json beside the file, if there is
        one. Raises CheckpointError if a setting is not supported, and FileNotFoundError.
        """
        return cls(read_vocabulary(Path(path), eos))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer for AutoTokenizer of transformers, and for `load_tokenizer`.

        The template of `chat` is written too, if the tokenizer has its tokens. In transformers,
        special tokens in what somebody says are not plain text.
        """
        chats = {START, END} <= self.special.keys()
        write_vocabulary(Path(folder), self._words.vocabulary, TEMPLATE if chats else None)

    def encode(self, text: str, special: bool = True) -> np.ndarray:
        """Convert text to token ids, (T,) int64.

        Parameters
        ----------
        text
            Any text without lone surrogates.
        special
            Whether special tokens in the text, such as <|im_end|>, become one id each. If not,
            they are plain text, and a stranger's text cannot control the model.

        Raises
        ------
        ValueError
            If the text has a lone surrogate.
        TypeError
            If `text` is not a str.
        """
        check_flag(special=special)
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"character {text[error.start]!r} at {error.start}"
            raise ValueError(f"{where} is a lone surrogate, which UTF-8 does not have") from None
        return np.array(self._encode(text, self._groups[special]), dtype=np.int64)

    def _encode(self, text: str, groups: list[re.Pattern[str]]) -> list[int]:
        """Find the added tokens of the first group, and encode what is between."""
        if not groups:
            return self._words.encode(text)
        ids: list[int] = []
        for i, part in enumerate(groups[0].split(text)):
            ids += [self._added[part]] if i % 2 else self._encode(part, groups[1:])
        return ids

    def decode(self, ids: np.ndarray | Sequence[int], skip_special: bool = False) -> str:
        """Convert token ids, (T,), to text. Bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside of the vocabulary, and TypeError for other types.
        """
        return "".join(self.decode_stream(np.asarray(ids).ravel(), skip_special))

    def decode_stream(self, ids: Iterable[int], skip_special: bool = False) -> Iterator[str]:
        """Yield the text of ids as they come. A character waits for the last of its bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        left_out = set(self.special.values()) if skip_special else ()
        for i in ids:
            if text := decoder.decode(b"" if i in left_out else self.token_bytes(i)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def token_bytes(self, i: int) -> bytes:
        """Return the bytes of one token: parts of characters, perhaps. Raises like `decode`."""
        return self._tokens[token_ids(i, self.vocab_size)]

    def chat(
        self, messages: str | Sequence[Mapping[str, str]], system: str | None = SYSTEM
    ) -> np.ndarray:
        """Convert a conversation to token ids, (T,) int64, by the template of SmolLM2.

        The ids end where an `answer` begins, unless the last message is the assistant's.

        Parameters
        ----------
        messages
            What one user says, or [{"role": "system", "user" or "assistant", "content": str}, ...].
            Contents are plain text.
        system
            The system message if `messages` begin with none; None for none at all.

        Raises ValueError for other messages, or if the tokenizer has not the template's tokens.
        """
        messages = conversation(messages, system)
        start, newline, parts = [self._control(START)], self.encode("\n"), []
        opening = np.append(start, self.encode("assistant\n"))
        for m in messages:
            if m["role"] == "assistant":  # as training and generation see it
                parts += [opening, self.answer(m["content"]), newline]
            else:
                parts += [start, self.answer(f"{m['role']}\n{m['content']}"), newline]
        return np.concatenate(parts if messages[-1]["role"] == "assistant" else [*parts, opening])

    def answer(self, text: str) -> np.ndarray:
        """Return the ids of a plain text and of <|im_end|>: what follows the ids of `chat`."""
        return np.append(self.encode(text, special=False), self._control(END))

    def _control(self, token: str) -> int:
        if token not in self.special:
            raise ValueError(f"this tokenizer has no {token}, so it has no chat template")
        return self.special[token]
