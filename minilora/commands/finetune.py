"""The command that fine-tunes a base on one's own data: finetune."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.commands.options import (
    DATA_HELP,
    Command,
    Parser,
    below_one,
    filled,
    names,
    positive,
    whole,
)
from minilora.files.bases import NAMES
from minilora.files.settings import read_json
from minilora.lab.finetune import KINDS
from minilora.lab.finetune_run import CHECKPOINT, SAVE_EVERY, Outcome, Plan, check_new, planned, run
from minilora.nn.validate import closest

# {option: (how its value is read, what it means)}; the same names are those of a settings file.
OPTIONS = {
    "val": (filled, "held-out data, like DATA (default: a part of DATA)"),
    "val-fraction": (below_one, "share of DATA that is held out; 0 for none (default: 0.1)"),
    "base": (filled, "base, small, smollm2, or the path of a model (default: base for texts, "
             "smollm2 for prompts)"),
    "rank": (whole(1), "LoRA rank (default: 8)"),
    "alpha": (positive, "LoRA alpha (default: twice the rank)"),
    "target-modules": (names, "names or globs of the layers to adapt, as in q_proj,v_proj "
                       "(default: every Linear)"),
    "lr": (positive, "learning rate (default: {0.lr:g} for a character model, {1.lr:g} for a "
           "language model; with --full, {0.full_lr:g} and {1.full_lr:g})"),
    "steps": (whole(1), "training steps (default: {0.steps} for a character model, {1.steps} "
              "for a language model)"),
    "batch-size": (whole(1), "windows of text, or conversations, in a batch (default: "
                   "{0.batch_size} for a character model; for a language model, "
                   "{1.batch_size} windows or {2.batch_size} conversations)"),
    "context-length": (whole(1), "tokens in a window of text, or the most in a conversation, whose "
                       "end is cut off (default: all that a character model can take; for a "
                       "language model, {1.context_length}, or {2.context_length} in a "
                       "conversation)"),
    "seed": (whole(0), "seed of A and of the order of the data (default: 0)"),
    "threads": (whole(1), "threads that share each batch (default: as many as pay off)"),
    "save-every": (whole(0), "steps between two saves of the whole state; with 0, only Ctrl-C "
                   f"saves it (default: {SAVE_EVERY})"),
}
# {name in a settings file: how it is read, or None for a flag}
SETTINGS: dict[str, Callable[[str], Any] | None] = {"data": filled, "full": None} | {
    name.replace("-", "_"): kind for name, (kind, _) in OPTIONS.items()}


def finetune_options(parser: Parser) -> None:
    """Add the options of `minilora finetune`; those not given keep the defaults of `Settings`."""
    add = parser.add_argument
    add("data", nargs="?", type=filled, metavar="DATA", help=DATA_HELP)
    add("--out", type=filled, help="folder for the result: adapter, loss curve, numbers, settings")
    for name, (kind, text) in OPTIONS.items():
        add(f"--{name}", type=kind, help=text.format(*KINDS.values()))
    add("--full", action="store_true", default=None, help="train all weights, without LoRA")
    add("--config", type=filled, metavar="FILE", help="JSON with any of these settings, such as "
        "the settings.json of an earlier run; options on the command line take precedence")
    add("--resume", type=filled, metavar="DIR", help="go on with the run in this folder, "
        "which was ended early")
    add("--overwrite", action="store_true", help="write to --out even if something is in it")
    add("--no-progress", action="store_true", help="no progress bar")


def finetune_command(args: argparse.Namespace) -> int:
    """Fine-tune a base on your own data, or go on with a run that was ended early."""
    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if args.resume:
        folder = Path(args.resume)
        plan = planned(folder)
        _check_same(plan, with_absolute_paths(given), args)
    else:
        _check_together(given)
        if args.config:
            given = read_settings(args.config) | given
        if "data" not in given or not args.out:
            raise ValueError("finetune needs DATA and --out DIR, or --resume DIR")
        folder, plan = Path(args.out), Plan.from_flat(with_absolute_paths(given))
        check_new(folder, args.overwrite, Path(plan.data))
    outcome = run(plan, folder, bool(args.resume), not args.no_progress)
    if not outcome.files:
        done = len(outcome.history.steps)
        print(f"interrupted after {done} of {outcome.plan.settings.steps} steps; to go on"
              f"{'' if outcome.saved else ' from the last save'}:\n"
              f"    minilora finetune --resume {shlex.quote(str(folder))}")
        if not outcome.plan.settings.full:
            print(f"The adapter so far is in {folder / CHECKPOINT}.")
        return 130
    _show(outcome, folder)
    return 0


def _check_together(given: dict[str, Any]) -> None:
    """Raise ValueError if one option makes another meaningless."""
    for one, others in (("full", ("rank", "alpha", "target_modules")), ("val", ("val_fraction",))):
        for other in others:
            if given.get(one) and other in given:
                raise ValueError(f"--{other.replace('_', '-')} means nothing with --{one}: leave "
                                 "one of them out")


def with_absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings that mean the same in another working directory."""
    paths = {name: os.path.abspath(given[name]) for name in ("data", "val", "base")
             if name in given and not (name == "base" and given[name] in NAMES)
             and os.path.exists(given[name])}  # if not, an error shows what was typed
    return given | paths


def read_settings(path: str) -> dict[str, Any]:
    """Read a file of settings. Raises ValueError if it has one that is unknown or wrong."""
    settings = {}
    for key, value in read_json(Path(path)).items():
        name = key.replace("-", "_")
        if name not in SETTINGS:
            raise ValueError(f"{path}: there is no setting {key!r}{closest(name, SETTINGS)}")
        if value is None:
            continue
        try:
            settings[name] = _setting(value, SETTINGS[name])
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{path}: {key}: {error}") from None
    return settings


def _setting(value: Any, kind: Callable[[str], Any] | None) -> Any:
    """Return a value of a JSON file as its option would be; `kind` is None for a flag."""
    if kind is None:
        if not isinstance(value, bool):
            raise ValueError(f"{json.dumps(value)[:80]} is neither true nor false")
        return value
    several = kind is names and isinstance(value, list) and all(isinstance(v, str) for v in value)
    number = type(value) in (int, float) and kind not in (names, filled)
    if not (several or number or isinstance(value, str)):
        raise ValueError(f"{json.dumps(value)[:80]} is of the wrong type")
    return kind(",".join(value) if several else str(value))


def _check_same(plan: Plan, given: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise ValueError if an option is not what the run that is resumed began with."""
    if args.config or args.overwrite or args.out not in (None, args.resume):
        raise ValueError("--resume takes everything from its folder: leave out --out, --config "
                         "and --overwrite")
    for name, value in given.items():
        if (old := plan.flat()[name]) != (list(value) if isinstance(value, tuple) else value):
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            raise ValueError(f"the run in {args.resume} began with {option} {old}, and cannot go "
                             f"on with {value}: leave it out")


def _show(outcome: Outcome, folder: Path) -> None:
    """Print what a complete run has come to."""
    job, losses = outcome.job, outcome.history.validation_losses
    for (prompt, before), (_, after) in zip(outcome.before, outcome.after, strict=True):
        print(f"{prompt!r}\n    before: {before!r}\n    after:  {after!r}")
    total, trained = job.model.num_parameters(), job.model.num_parameters(trainable_only=True)
    base = total if job.settings.full else total - trained
    print(f"\ntrained {trained:,} numbers, {trained / base:.1%} of the base's {base:,}, in "
          f"{outcome.history.seconds[-1]:.0f} s")
    if losses:
        print(f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after "
              f"({KINDS[job.kind].unit})")
    print(f"Written to {folder}: {', '.join(outcome.files)}")


COMMANDS = {
    "finetune": Command(finetune_options, finetune_command,
                        "fine-tune a base on your own text, or on prompts with answers", (
                            "minilora finetune notes.txt --out runs/notes --save-every 100",
                            "minilora finetune pairs.jsonl --base smollm2 --out runs/pairs",
                            "minilora finetune --resume runs/notes")),
}
