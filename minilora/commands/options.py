"""What commands consist of, and the values of their options: a function parses a text, or says
what is wrong with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

Parser = argparse.ArgumentParser
MODEL_HELP = "base, small, smollm2, a checkpoint, a GGUF file, or a folder saved by transformers"
DATA_HELP = ("a text file, a folder of text files, or a .jsonl of prompts and completions, of chat "
             "messages, or of texts")


class Command(NamedTuple):
    """A command: what adds its options, what runs it, and what its help says."""

    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int | None]
    text: str


def whole(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number of `least` or more."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def positive(text: str) -> float:
    """Parse a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def below_one(text: str) -> float:
    """Parse a number of 0 or more and less than 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more and less than 1")
    return value


def temperature(text: str) -> float:
    """Parse a number of 0 or more."""
    try:
        return 0.0 if float(text) == 0.0 else positive(text)
    except ValueError:
        return positive(text)  # which raises the error


def filled(text: str) -> str:
    """Parse a path or name that is not empty, as of a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def ranks(text: str) -> tuple[int, ...]:
    """Parse "2,8"; each rank once, in the order given."""
    return tuple(dict.fromkeys(whole(1)(part) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Parse "q_proj,v_proj"."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return parts
