"""The command line: `minilora compare | pretrain | generate | info | ...`; see `commands`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import minilora
from minilora.commands import adapters, doctor, experiments, finetune, grading, models
from minilora.commands.options import Parser, listed
from minilora.files.safetensors import printable

COMMANDS = (experiments.COMMANDS | finetune.COMMANDS | adapters.COMMANDS | models.COMMANDS
            | grading.COMMANDS | doctor.COMMANDS)
EXAMPLES = (
    "minilora compare --quick --out runs/quick",
    "minilora finetune notes.txt --out runs/notes",
    'minilora generate --prompt "def "',
    "minilora info base",
)


def build_parser() -> Parser:
    """Return the parser for all commands."""
    shown = argparse.RawDescriptionHelpFormatter  # the examples as they are written
    parser = Parser(
        prog="minilora", description="LoRA from scratch in NumPy, with its promises measured.",
        epilog=f"{listed(EXAMPLES)}\n\nminilora COMMAND --help says more about a command.",
        formatter_class=shown,
    )
    parser.add_argument("--version", action="version", version=f"minilora {minilora.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (add_options, run, text, examples) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text, epilog=listed(examples), formatter_class=shown)
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
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: what matters is an error of ours
        warnings.showwarning = show
        yield


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Bad input prints one sentence to stderr and returns 2; no command prints the help and returns
    2. Ctrl-C returns 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # a notebook's streams have none
            reconfigure(errors="backslashreplace")  # a terminal may lack characters, such as ᵀ
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
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
        print(f"minilora {args.command}: {printable(sentence(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def sentence(error: Exception) -> str:
    """Return what an error says, without the quotes and numbers that Python adds."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
