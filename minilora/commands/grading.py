"""The command that grades exercises: check."""

from __future__ import annotations

import argparse
import json

from minilora.commands.options import Command, Parser, filled, positive
from minilora.exercises import grade


def check_options(parser: Parser) -> None:
    """Add the options of `minilora check`."""
    add = parser.add_argument
    add("paths", nargs="+", type=filled, metavar="PATH",
        help="a notebook, a .py file, or a folder of them")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--csv", action="store_true",
                      help="print a row for each file, for a spreadsheet")
    add("--seconds", type=positive, default=30.0, help="time limit for each file (default: 30)")


def check_command(args: argparse.Namespace) -> int:
    """Grade files and folders of submissions; return 0 if every file is complete, else 1."""
    rows = grade.grade(args.paths, args.seconds)
    print(json.dumps(rows, indent=2) if args.json else
          grade.as_csv(rows) if args.csv else grade.report(rows))
    return 0 if all(map(grade.is_complete, rows)) else 1


COMMANDS = {
    "check": Command(
        check_options, check_command, "grade exercises, or folders of submissions",
        ("minilora check notebooks/exercises/01_linear.ipynb",
         "minilora check submissions --csv")),
}
