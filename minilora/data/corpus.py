"""Real text without a download: what every CPython carries, read at run time.

Two corpora: "docs", the English prose of the Python language reference that `help()` prints
(`pydoc_data.topics`), and "code", the Python sources of standard-library modules. The text
differs a little between Python releases, so losses on it differ a little too.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
import zlib
from collections.abc import Iterator

import numpy as np

from minilora.nn.functional import token_ids
from minilora.nn.layers import Rng
from minilora.nn.module import make_rng
from minilora.nn.validate import check_sizes

CODE_MODULES = (
    "argparse", "ast", "bisect", "calendar", "collections", "configparser", "copy", "csv",
    "dataclasses", "difflib", "fractions", "functools", "gettext", "heapq", "inspect",
    "json.decoder", "json.encoder", "random", "shutil", "statistics", "string", "textwrap",
)
HELD_OUT_SHARE = 0.1
PARAGRAPHS_A_SECTION = 7  # on average


class CharTokenizer:
    """One token for each of 96 characters: newline and printable ASCII.

    The vocabulary is fixed, so that a checkpoint fits every corpus and Python version.
    """

    characters = "\n" + "".join(map(chr, range(32, 127)))
    vocab_size = len(characters)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids (len(text),). ValueError that names a character it does not know."""
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

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of ids (T,). ValueError for an id outside 0..95."""
        ids = np.asarray(ids)
        ids = token_ids(ids, self.vocab_size) if ids.size else ids.astype(np.int64)
        return "".join(self.characters[i] for i in ids.ravel())


_PLAIN = str.maketrans({
    "\t": "    ", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2013": "-", "\u2014": "--", "\u2026": "...", "\u00a0": " ", "\u2022": "*",
})


def plain(text: str) -> str:
    """Return the text in the tokenizer's 96 characters: quotes made ASCII, others dropped."""
    text = text.translate(_PLAIN)
    return "".join(c for c in text if c in _KNOWN)


_KNOWN = frozenset(CharTokenizer.characters)


def corpus(name: str) -> str:
    """Return the whole text of "docs" or "code". ValueError for another name."""
    if name == "docs":
        return plain(_docs())
    if name == "code":
        return plain("\n\n".join(module_source(module) for module in CODE_MODULES))
    raise ValueError(f"corpus must be 'docs' or 'code', got {name!r}")


def _docs() -> str:
    """The topics of help(), each paragraph once: the reference repeats itself by a fifth.

    Without that, held-out paragraphs would have been seen in training.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # Pyodide and other stripped installations
        print("pydoc_data is missing: using docstrings as the docs corpus", file=sys.stderr)
        topics = {name: docstrings(name) for name in CODE_MODULES}
    seen, kept = set(), []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def module_source(module: str) -> str:
    """Return the Python source of a standard-library module, without running it twice."""
    return inspect.getsource(importlib.import_module(module))


def docstrings(module: str) -> str:
    """Return the docstrings of a module and of what it defines, as paragraphs."""
    loaded = importlib.import_module(module)
    members = [value for _, value in sorted(vars(loaded).items(), key=lambda item: item[0])]
    texts = [textwrap.dedent(m.__doc__) for m in [loaded, *members] if isinstance(m.__doc__, str)]
    return "\n\n".join(texts)


def split(text: str) -> tuple[str, str]:
    """Cut a text into a training part and a held-out part of about a tenth.

    Sections of some paragraphs go to one part or the other by a checksum of their first
    paragraph, and begin where such a checksum says so. So a paragraph stays in its part when
    a Python release changes the text elsewhere, and what the shipped models have read in
    training is not held out by another release.
    """
    parts: tuple[list[str], list[str]] = [], []
    part = parts[0]
    for paragraph in text.split("\n\n"):
        mark = zlib.crc32(paragraph.encode())
        if mark % PARAGRAPHS_A_SECTION == 0:
            part = parts[mark // PARAGRAPHS_A_SECTION % round(1 / HELD_OUT_SHARE) == 0]
        part.append(paragraph)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def load_tokens(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the corpus "docs" or "code" as (training ids, held-out ids), each (T,)."""
    training, held_out = split(corpus(name))
    tokenizer = CharTokenizer()
    return tokenizer.encode(training), tokenizer.encode(held_out)


Batch = tuple[np.ndarray, np.ndarray]


def random_batches(
    ids: np.ndarray, batch_size: int, context_length: int, rng: Rng = 0
) -> Iterator[Batch]:
    """Yield (ids, targets) for ever, both (batch_size, context_length), from random places.

    The targets are the ids one place on. ValueError where the text is too short.
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
    """Return (ids, targets) batches that cover the text once, front to back, for evaluation.

    At most `limit` batches, spread evenly over the text. What is left over at the end and
    fills no window is dropped. ValueError where the text is too short for one window.
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
