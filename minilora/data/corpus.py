"""Text without a download: corpora that every CPython contains, read at run time.

There are two corpora: "docs", the English prose of the Python language reference that `help()`
prints (`pydoc_data.topics`), and "code", the Python sources of standard-library modules. The
texts differ slightly between Python releases, and so do losses on them.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
import zlib

import numpy as np

from minilora.data.tokenizer import CharTokenizer, plain

CODE_MODULES = (
    "argparse", "ast", "bisect", "calendar", "collections", "configparser", "copy", "csv",
    "dataclasses", "difflib", "fractions", "functools", "gettext", "heapq", "inspect",
    "json.decoder", "json.encoder", "random", "shutil", "statistics", "string", "textwrap",
)
HELD_OUT_SHARE = 0.1
PARAGRAPHS_A_SECTION = 7  # on average


def corpus(name: str) -> str:
    """Return a whole corpus as text in the tokenizer's characters.

    Parameters
    ----------
    name
        "docs" or "code".

    Raises
    ------
    ValueError
        If there is no corpus of this name.
    """
    if name == "docs":
        return plain(_docs())
    if name == "code":
        return plain("\n\n".join(module_source(module) for module in CODE_MODULES))
    raise ValueError(f"corpus must be 'docs' or 'code', got {name!r}")


def _docs() -> str:
    """Return the topics of help(), each paragraph once."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # Pyodide and other stripped installations
        print("pydoc_data is missing: using docstrings as the docs corpus", file=sys.stderr)
        topics = {name: docstrings(name) for name in CODE_MODULES}
    # A fifth is repetition, which would put the same paragraphs in both parts of `split`.
    seen, kept = set(), []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def module_source(module: str) -> str:
    """Return the Python source of a standard-library module."""
    return inspect.getsource(importlib.import_module(module))


def docstrings(module: str) -> str:
    """Return the docstrings of a module and of what it defines, separated by blank lines."""
    loaded = importlib.import_module(module)
    members = [value for _, value in sorted(vars(loaded).items(), key=lambda item: item[0])]
    texts = [textwrap.dedent(m.__doc__) for m in [loaded, *members] if isinstance(m.__doc__, str)]
    return "\n\n".join(texts)


def split(text: str) -> tuple[str, str]:
    """Split a text into a training part and a held-out part of about a tenth.

    A section is several paragraphs. The checksum of a paragraph decides whether a section begins
    there, and to which part it goes. A paragraph therefore stays in its part if a Python release
    changes the text elsewhere, and what the shipped models were trained on is not held out in
    another release.

    Returns
    -------
    training
        The training text.
    held_out
        The held-out text.
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
    """Return a corpus as token ids.

    Parameters
    ----------
    name
        "docs" or "code".

    Returns
    -------
    training
        (T,), the ids of the training part.
    held_out
        (T,), the ids of the held-out part.
    """
    training, held_out = split(corpus(name))
    tokenizer = CharTokenizer()
    return tokenizer.encode(training), tokenizer.encode(held_out)
