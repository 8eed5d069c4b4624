"""The command line: `minilora compare | pretrain | generate | info | ...`; see `commands`."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from minilora.commands import adapters, experiments, finetune, grading, models
from minilora.commands.options import Parser
from minilora.files.safetensors import printable

COMMANDS = (experiments.COMMANDS | finetune.COMMANDS | adapters.COMMANDS | models.COMMANDS
            | grading.COMMANDS)


def build_parser() -> Parser:
    """Return the parser for all commands."""
    parser = Parser(
        prog="minilora", description="LoRA from scratch in NumPy, with its promises measured."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        add_options(command)
    return parser


@contextlib.contextmanager
def notes(command: str) -> Iterator[None]:
    """Print warnings as sentences, without the line of code that they come from."""

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        print(f"minilora {command}: {printable(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Bad input prints one sentence to stderr and returns 2. Ctrl-C returns 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a notebook's streams have none
            reconfigure(errors="backslashreplace")  # a terminal may lack characters, such as ᵀ
    args = build_parser().parse_args(argv)
    try:
        with notes(args.command):
            status = args.run(args) or 0
        print(end="", flush=True)  # here, where a reader that has gone is not an error
        return status
    except BrokenPipeError:  # the reader has stopped, as in `minilora generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        print(f"minilora {args.command}: not enough memory", file=sys.stderr)
        return 2
    except (ValueError, TypeError, KeyError, FloatingPointError, OSError, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"minilora {args.command}: {printable(str(text))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
