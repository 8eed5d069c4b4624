"""The command that grades exercises: check."""

from __future__ import annotations

import argparse
import json

from minilora.commands.options import Command, Parser, positive
from minilora.exercises import grade


def check_options(parser: Parser) -> None:
    """Add the options of `minilora check`."""
    add = parser.add_argument
    add("path", help="a notebook, a .py file, or a folder of them")
    add("--json", action="store_true", help="print everything as JSON")
    add("--seconds", type=positive, default=30.0, help="time limit for each file (default: 30)")


def check_command(args: argparse.Namespace) -> int:
    """Grade a file or a folder of submissions; return 0 if every file is complete, else 1."""
    rows = grade.grade(args.path, args.seconds)
    print(json.dumps(rows, indent=2) if args.json else grade.report(rows))
    return 0 if all(map(grade.is_complete, rows)) else 1


COMMANDS = {
    "check": Command(check_options, check_command, "grade an exercise, or a folder of submissions"),
}
