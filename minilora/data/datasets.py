"""Text and conversations of one's own, from files or from Python values.

A dataset is a list of texts, or a list of conversations: lists of messages, each of them
``{"role": "system", "user" or "assistant", "content": str}``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.data.chat import Message, conversation

Conversation = list[Message]
Dataset = list[str] | list[Conversation]

LAYOUTS = '"prompt" and "completion", "messages", or "text"'
TRAINING, VALIDATION, TEST = "train.jsonl", "valid.jsonl", "test.jsonl"  # of a folder


def beside_training(path: str | Path, *parts: str) -> Path | None:
    """Return the first of these files that a folder has beside its train.jsonl, or None."""
    path = Path(path)
    if not (path / TRAINING).exists():
        return None
    return next((path / part for part in parts if (path / part).exists()), None)


def to_evaluate(path: str | Path) -> Path:
    """Return the part of some data that models are compared on: if there are parts, the test."""
    return beside_training(path, TEST, VALIDATION) or Path(path)


def load_data(path: str | Path) -> Dataset:
    """Read a dataset.

    Parameters
    ----------
    path
        A text file in UTF-8; a file whose name ends in .jsonl, with a JSON object in each line
        that has "prompt" and "completion" (texts or lists of messages), "messages", or "text"; or
        a folder of such files. Hidden files in a folder are ignored, and a warning names those
        that are not text. If a folder has a train.jsonl, only that is read.

    Raises
    ------
    ValueError
        If a file is empty, or if something in it is wrong; the message names file and line.
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not path.is_dir():
        return as_dataset(_read(path), str(path))
    if (path / TRAINING).exists():
        return load_data(path / TRAINING)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not any(
        name.startswith(".") for name in file.relative_to(path).parts)]
    rows: list[Any] = []
    for file in files:
        try:
            rows += _read(file)
        except UnicodeError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    return as_dataset(rows, str(path))


def _read(path: Path) -> list[Any]:
    """Return a text file as a list of one text, or the rows of a JSONL file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UnicodeError(f"{path} is not text in UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise UnicodeError(f"{path} is not text: it has a zero byte")
    if path.suffix != ".jsonl":
        return [text] if text.strip() else []
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_row(f"{path}, line {number}", line) for number, line in lines]


def _row(where: str, line: str) -> str | Conversation:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object with {LAYOUTS}")
    return document(row, where)


def as_dataset(rows: Any, where: str = "the data") -> Dataset:
    """Return Python values as a dataset.

    Parameters
    ----------
    rows
        A text, or a sequence of: texts; pairs (prompt, answer); conversations; or dicts as in the
        lines of a JSONL file.
    where
        What an error calls the rows.

    Raises
    ------
    ValueError
        If there is nothing, if a row is none of these, or if some are texts and some are not.
    """
    rows = [rows] if isinstance(rows, str) else rows
    if not isinstance(rows, Sequence) or isinstance(rows, bytes):
        raise ValueError(f"{where} must be a text or a list, got {type(rows).__name__}")
    found: Any = [document(row, f"{where}, row {i}") for i, row in enumerate(rows)]
    texts = [one for one in found if isinstance(one, str)]
    if not found or not all(text.strip() for text in texts):
        raise ValueError(f"{where} has no text" if not found else f"{where} has an empty text")
    if texts and len(texts) < len(found):
        raise ValueError(f"{where} has {len(texts)} texts and {len(found) - len(texts)} "
                         "conversations: they cannot be mixed")
    return found


def document(row: Any, where: str) -> str | Conversation:
    """Return one row of a dataset as a text or a conversation. Raises ValueError."""
    match row:
        case str():
            return _unicode(row, where)
        case {"messages": messages}:
            return _conversation(messages, where)
        case {"prompt": prompt, "completion": completion}:
            return _conversation(_messages(prompt, "user") + _messages(completion, "assistant"),
                                 where)
        case {"text": str(text)}:
            return _unicode(text, where)
        case [str(prompt), str(answer)]:
            return document({"prompt": prompt, "completion": answer}, where)
        case [*messages]:
            return _conversation(messages, where)
    keys = f" with {', '.join(map(repr, row))}" if isinstance(row, Mapping) else ""
    raise ValueError(f"{where} is {type(row).__name__}{keys}; it needs {LAYOUTS}"[:300])


def _messages(given: Any, role: str) -> list[Any]:
    """Return a prompt or completion, which is a text or a list of messages, as messages."""
    return given if isinstance(given, list) else [{"role": role, "content": given}]


def _conversation(messages: Any, where: str) -> Conversation:
    """Return a copy of messages after checking them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list that is not empty")
    try:
        conversation(messages, None)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    found: Conversation = [{"role": m["role"], "content": _unicode(m["content"], where)}
                           for m in messages]
    roles = [m["role"] for m in found]
    if "assistant" not in roles:
        raise ValueError(f"{where} has no answer: a message of the assistant")
    if roles[0] == "assistant" or ("assistant", "assistant") in zip(roles, roles[1:], strict=False):
        raise ValueError(f"{where}: an answer must follow a message of the user")
    if not all(m["content"].strip() for m in found if m["role"] == "assistant"):
        raise ValueError(f"{where} has an empty answer")
    return found


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!r} is a lone surrogate, which no text may "
                         "have") from None
    return text
