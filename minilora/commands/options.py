"""What commands consist of, their parser, and the values of their options.

The type of an option is a function that parses a text, or says what is wrong with it.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from minilora.nn.validate import closest

MODEL_HELP = "base, small, smollm2, a checkpoint, a GGUF file, or a folder saved by transformers"
DATA_HELP = ("a text file, a folder of text files, or a .jsonl file with a prompt and a "
             "completion, chat messages, or a text in each line")
OPTION = re.compile(r"--?[a-zA-Z][\w-]*")  # unlike negative numbers


class Parser(argparse.ArgumentParser):
    """A parser that names the closest option, command or choice if somebody mistypes one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, but end here, where the options are known, if some are not."""
        args = sys.argv[1:] if args is None else list(args)
        mine = itertools.takewhile(  # a parser with commands leaves what follows them to theirs
            lambda word: word.startswith("-") if self._subparsers else word != "--", args)
        for word in mine:  # first, or argparse would complain of the value of a mistyped option
            option, known = word.partition("=")[0], self._option_string_actions
            if OPTION.fullmatch(option) and not any(name.startswith(option) for name in known):
                self.error(f"there is no option {option}{closest(option, known)}")
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"{value!r} is not among {', '.join(known)}{closest(str(value), known)}")


class Command(NamedTuple):
    """A command: what adds its options, what runs it, what its help says, and how to call it."""

    add_options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int | None]
    text: str
    examples: tuple[str, ...]


def listed(examples: Iterable[str]) -> str:
    """Return examples as they are shown below the options."""
    return "\n  ".join(["examples:", *examples])


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
