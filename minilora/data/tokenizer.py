"""Characters as tokens, and the tokenizer of each base."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from minilora.data.bpe import BPETokenizer
from minilora.files.checkpoint import save_checkpoint
from minilora.files.gguf import is_gguf, read_gguf
from minilora.files.gguf_llama import find_smollm2
from minilora.files.llama import to_hf_llama
from minilora.files.tokenizer_folder import copy_tokenizer
from minilora.files.vocabulary import TOKENIZER_FILE
from minilora.nn.gpt import GPT
from minilora.nn.llama import Llama
from minilora.nn.validate import token_ids

TOLERABLE_SHARE = 0.02  # of characters that a model does not have


class CharTokenizer:
    """One token for each of 96 characters: newline and printable ASCII.

    The vocabulary is fixed, so a checkpoint fits every corpus and Python version.
    """

    characters = "\n" + "".join(map(chr, range(32, 127)))
    vocab_size = len(characters)

    def encode(self, text: str) -> np.ndarray:
        """Convert text to token ids.

        Parameters
        ----------
        text
            Characters of the vocabulary only; `plain` converts other text.

        Returns
        -------
        ndarray
            (len(text),), int64.

        Raises
        ------
        ValueError
            If a character is not in the vocabulary. The message names it.
        TypeError
            If `text` is not a str.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, got {type(text).__name__}")
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = codes.astype(np.int64) - 31
        ids[codes == ord("\n")] = 0
        unknown = (codes != ord("\n")) & ((codes < 32) | (codes > 126))
        if unknown.any():
            at = int(unknown.argmax())
            raise ValueError(
                f"character {text[at]!r} at {at} is not newline or printable ASCII; "
                "`plain` converts what it can"
            )
        return ids

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Convert token ids, (T,), to text.

        Raises
        ------
        ValueError
            If an id is outside 0..95.
        TypeError
            If the ids are not integers.
        """
        ids = np.asarray(ids)
        ids = token_ids(ids, self.vocab_size) if ids.size else ids.astype(np.int64)
        return "".join(self.characters[i] for i in ids.ravel())

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as they come. Raises as `decode` does."""
        return (self.decode(np.asarray([i])) for i in ids)


_KNOWN = frozenset(CharTokenizer.characters)
_PLAIN = str.maketrans({
    "\t": "    ", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2013": "-", "\u2014": "--", "\u2026": "...", "\u00a0": " ", "\u2022": "*",
})


def plain(text: str) -> str:
    """Return the text in the tokenizer's 96 characters.

    Tabs, typographic quotes, dashes and the like become ASCII. Other characters are dropped.
    """
    return "".join(c for c in text.translate(_PLAIN) if c in _KNOWN)


def plain_with_warning(text: str) -> str:
    """Return `plain(text)`, with a warning that says which characters it lacks, if there are any.

    With more than 2% of them, it recommends a model that has them all.
    """
    lost = Counter(c for c in text.translate(_PLAIN) if c not in _KNOWN)
    if not lost:
        return plain(text)
    share = lost.total() / len(text)
    most = ", ".join(f"{c!r} {n:,}" for c, n in lost.most_common(5))
    advice = ("; the language model smollm2 has tokens for all of them"
              if share > TOLERABLE_SHARE else "")
    more = ", ..." if len(lost) > 5 else ""
    warnings.warn(f"{lost.total():,} of {len(text):,} characters ({share:.2%}) are not among the "
                  f"{CharTokenizer.vocab_size} of this model, and are left out: {most}{more}"
                  f"{advice}", stacklevel=2)
    return plain(text)


def load_tokenizer(name: str | Path = "base") -> CharTokenizer | BPETokenizer:
    """Load the tokenizer of a base that `load_base` knows, or of a folder of transformers.

    Parameters
    ----------
    name
        "base" or "small"; "smollm2"; or the path of a GGUF file, of a tokenizer.json, or of the
        folder that has one.

    Raises
    ------
    CheckpointError
        If the file is damaged, or if its tokenizer is of a kind that is not supported.
    FileNotFoundError
        If there is no such file.
    """
    if name in ("base", "small"):
        return CharTokenizer()
    path = find_smollm2() if name == "smollm2" else Path(name)
    if path.is_file() and is_gguf(path):
        return BPETokenizer.from_gguf(read_gguf(path, any_kind=True)[0])
    return BPETokenizer.from_json(path / TOKENIZER_FILE if path.is_dir() else path)


def tokenizer_of(model: GPT | Llama, name: str) -> CharTokenizer | BPETokenizer:
    """Load the tokenizer of a GPT or Llama that was loaded by a name; see `load_tokenizer`."""
    known = model.config.vocab_size == CharTokenizer.vocab_size
    return CharTokenizer() if known else load_tokenizer(name)


def save_model(model: GPT | Llama, base: str, path: str | Path) -> None:
    """Write a whole model: a GPT as a checkpoint, a Llama as a folder of transformers.

    The folder has the tokenizer of the base, copied if that is a folder, too. A warning says why if
    there is none. Raises as `save_checkpoint` and `to_hf_llama` do.
    """
    if not isinstance(model, Llama):
        return save_checkpoint(model, path)
    to_hf_llama(model, path)
    try:
        if base != "smollm2" and Path(base).is_dir():
            copy_tokenizer(Path(base), Path(path))
        elif isinstance(tokenizer := load_tokenizer(base), BPETokenizer):
            tokenizer.save(path)
    except (ValueError, FileNotFoundError) as error:  # the model is good without one
        warnings.warn(f"{path} is without a tokenizer: {error}", stacklevel=2)
