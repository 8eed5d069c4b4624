"""The command line: `minilora compare | pretrain | generate | info | ...`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.data.corpus import CharTokenizer
from minilora.files.checkpoint import (
    describe_checkpoint,
    load_base,
    load_checkpoint,
    save_checkpoint,
)
from minilora.files.gpt2 import from_hf_gpt2
from minilora.files.peft_read import CONFIG_FILE, WEIGHTS_FILE, describe_adapter, load_adapter
from minilora.lab import bench, compare
from minilora.lab.counting import PUBLISHED
from minilora.lab.pretrain import RECIPES, pretrain
from minilora.lora.wrap import merge_lora
from minilora.nn.gpt import GPT, sample_tokens
from minilora.train.parallel import default_threads, keep_freed_memory, one_blas_thread


def compare_command(args: argparse.Namespace) -> None:
    """Run the comparison, print its table, and write figures beside its numbers."""
    from minilora.lab import plots  # matplotlib takes its time to import, so only where it is used

    settings = compare.QUICK if args.quick else compare.Settings()
    given = {
        "ranks": args.ranks, "steps": args.steps, "lr": args.lr, "alpha": args.alpha,
        "target_modules": args.target_modules, "seeds": args.seeds, "base": args.base,
    }
    settings = replace(
        settings, threads=args.threads, **{k: v for k, v in given.items() if v is not None}
    )
    result = compare.compare(settings, args.out, progress=not args.no_progress)
    if not result["runs"]:
        print("interrupted before the first run was done")
        return
    print(f"\nFine-tuning the {settings.base} model, which has read English docs, on Python code: "
          f"{settings.steps} steps.\n")
    print(compare.table(result))
    print("\nLosses in nats per character on held-out text; docs before: "
          f"{result['docs_base']:.3f}. MB = 10^6 bytes.")
    for name, figure in plots.COMPARISON.items():
        plots.save(figure(result), Path(args.out) / name)
    written = ", ".join([*plots.COMPARISON, "compare.json", "adapters/"])
    print(f"Written to {args.out}: {written}")


def pretrain_command(args: argparse.Namespace) -> None:
    """Train a base model and say how its loss on held-out docs went."""
    out = args.out or f"{args.model}.safetensors"
    history = pretrain(args.model, out, args.steps, args.seed, args.threads, not args.no_progress)
    if not history.steps:
        print("interrupted before the first step was done; nothing written")
        return
    for step, loss in zip(history.validation_steps, history.validation_losses, strict=True):
        print(f"step {step:5d}: {loss:.4f} nats per character on held-out docs")
    print(f"interrupted; written to {out}.interrupted" if history.interrupted else
          f"written to {out}")


def load_model(name: str) -> GPT:
    """Return a shipped model by its name, a checkpoint, or a GPT-2 from a transformers folder."""
    if Path(name).is_dir():
        return from_hf_gpt2(name)
    is_path = Path(name).suffix or "/" in name or Path(name).is_file()
    return load_checkpoint(name) if is_path else load_base(name)


def generate_command(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation, character by character."""
    model = load_model(args.base)
    if args.adapter:
        load_adapter(model, args.adapter)
    tokenizer = CharTokenizer()
    prompt = args.prompt.replace("\\n", "\n")
    if not prompt:
        raise ValueError("the prompt is empty: give the model at least one character")
    ids = tokenizer.encode(prompt)
    tokens = sample_tokens(model, ids, args.tokens, args.temperature, args.top_k, args.seed)
    print(prompt, end="", flush=True)
    for token in tokens:
        print(tokenizer.decode(token), end="", flush=True)
    print()


def info_command(args: argparse.Namespace) -> None:
    """Print what is in an adapter or a checkpoint."""
    path = Path(args.path)
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (path / "config.json").exists():
        path /= "model.safetensors"  # a model of transformers
    is_adapter = path.is_dir() or path.name in (CONFIG_FILE, WEIGHTS_FILE)
    print(describe_adapter(path) if is_adapter else describe_checkpoint(path))


def merge_command(args: argparse.Namespace) -> None:
    """Merge an adapter into a base for good, and write a plain checkpoint."""
    model = load_adapter(load_model(args.base), args.adapter)
    save_checkpoint(merge_lora(model, unload=True), args.out)
    print(f"written to {args.out}: {model.num_parameters():,} parameters, nothing left of A and B")


def count_command(args: argparse.Namespace) -> None:
    """Print what a published model and LoRA on it have, by formula."""
    if args.model not in PUBLISHED:
        raise ValueError(f"{args.model!r} is not among {', '.join(PUBLISHED)}")
    architecture = PUBLISHED[args.model]
    targets = list(args.target_modules) if args.target_modules else None
    total = architecture.num_parameters
    lora = architecture.lora_parameters(args.rank, targets)
    rows = {
        f"{args.model} ({architecture.source})": f"{total:,} parameters",
        f"LoRA r={args.rank} on {', '.join(targets or architecture.linears)}":
            f"{lora:,} parameters, {lora / total:.4%}",
        "gradients and AdamW moments in float32, full": f"{12 * total:,} bytes",
        "gradients and AdamW moments in float32, LoRA": f"{12 * lora:,} bytes",
        "one task on disk in float16, full": f"{2 * total:,} bytes",
        "one task on disk in float16, LoRA": f"{2 * lora:,} bytes",
    }
    for name, value in rows.items():
        print(f"{name}: {value}")


def check_command(args: argparse.Namespace) -> int:
    """Grade a file or a folder of submissions; the status says whether all is right."""
    from minilora.exercises import grade

    rows = grade.grade(args.path, args.seconds)
    print(json.dumps(rows, indent=2) if args.json else grade.report(rows))
    return 0 if all(row["passed"] == row["total"] > 0 and not row["error"] for row in rows) else 1


def bench_command(args: argparse.Namespace) -> None:
    """Print the timing table."""
    keep_freed_memory()
    with one_blas_thread():
        print(bench.report(args.sizes, args.peers, args.seconds))


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


def ranks(text: str) -> tuple[int, ...]:
    """Parse "2,8"; each rank once, in the order given."""
    return tuple(dict.fromkeys(whole(1)(part) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Parse "q_proj,v_proj"."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return parts


def temperature(text: str) -> float:
    """Parse a number of 0 or more."""
    return 0.0 if text.strip() in ("0", "0.0") else positive(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="minilora", description="LoRA from scratch in NumPy, with its promises measured."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def training_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--threads", type=whole(1), default=default_threads(),
                         help="threads that share each batch (default: %(default)s)")
        sub.add_argument("--no-progress", action="store_true", help="no progress bars")

    sub = command("compare", compare_command,
                  "fine-tune the base on Python code, in full and with LoRA; table and figures")
    sub.add_argument("--ranks", type=ranks, metavar="2,8", help="LoRA ranks (default: 2,8)")
    sub.add_argument("--steps", type=whole(2), help="training steps of each run (default: 300)")
    sub.add_argument("--lr", type=positive,
                     help="one learning rate for all methods (default: each method's own, "
                     f"{compare.FULL_LEARNING_RATE:g} full, {compare.LORA_LEARNING_RATE:g} LoRA)")
    sub.add_argument("--alpha", type=positive, help="LoRA alpha (default: twice the rank)")
    sub.add_argument("--target-modules", type=names, metavar="q_proj,v_proj",
                     help="names or globs of the layers to adapt (default: every Linear)")
    sub.add_argument("--seeds", type=whole(1), help="runs of each method (default: 1)")
    sub.add_argument("--base", choices=sorted(RECIPES), help="shipped model (default: base)")
    sub.add_argument("--out", default="figures",
                     help="folder for figures, numbers, adapters (default: %(default)s)")
    sub.add_argument("--quick", action="store_true",
                     help=f"the small model and {compare.QUICK.steps} steps, about 15 seconds")
    training_options(sub)

    sub = command("pretrain", pretrain_command, "train a base model on the docs corpus")
    sub.add_argument("--model", choices=sorted(RECIPES), default="base",
                     help="which recipe (default: %(default)s)")
    sub.add_argument("--steps", type=whole(1), help="training steps (default: the recipe's)")
    sub.add_argument("--seed", type=whole(0), default=0,
                     help="seed of weights and batches (default: 0)")
    sub.add_argument("--out", help="file to write (default: MODEL.safetensors)")
    training_options(sub)

    sub = command("generate", generate_command, "let a model write")
    sub.add_argument("--prompt", default="The ", help=r"text to continue; \n is a new line")
    sub.add_argument("--base", default="base",
                     help="base, small, a checkpoint, or a folder of transformers (default: base)")
    sub.add_argument("--adapter", help="folder of an adapter, as compare writes them")
    sub.add_argument("--tokens", type=whole(0), default=400,
                     help="characters to write (default: 400)")
    sub.add_argument("--temperature", type=temperature, default=0.8,
                     help="0: always the likeliest (default: 0.8)")
    sub.add_argument("--top-k", type=whole(1), default=20,
                     help="draw among the k likeliest (default: 20)")
    sub.add_argument("--seed", type=whole(0), default=0, help="seed of the draws (default: 0)")

    sub = command("info", info_command, "say what is in an adapter or a checkpoint")
    sub.add_argument("path", help="folder of an adapter, or a safetensors file")

    sub = command("merge", merge_command, "merge an adapter into a base for good")
    sub.add_argument("base", help="base, small, a checkpoint, or a folder of transformers")
    sub.add_argument("adapter", help="folder of an adapter")
    sub.add_argument("out", help="checkpoint to write, in float32")

    sub = command("count", count_command, "count the parameters of a published model and of LoRA")
    sub.add_argument("model", help=f"one of {', '.join(PUBLISHED)}")
    sub.add_argument("--rank", type=whole(1), default=8, help="LoRA rank (default: 8)")
    sub.add_argument("--target-modules", type=names, metavar="q_proj,v_proj",
                     help="names or globs of the layers to adapt (default: all in the blocks)")

    sub = command("check", check_command, "grade an exercise, or a folder of submissions")
    sub.add_argument("path", help="a notebook, a .py file, or a folder of them")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")
    sub.add_argument("--seconds", type=positive, default=30.0,
                     help="time limit for each file (default: 30)")

    sub = command("bench", bench_command, "time training steps on one thread")
    sub.add_argument("--sizes", type=names, default=tuple(bench.SIZES), metavar="XS,S,M,L",
                     help="model sizes to time (default: all)")
    sub.add_argument("--peers", action="store_true", help="also PyTorch and PEFT, as ratios")
    sub.add_argument("--seconds", type=positive, default=6.0,
                     help="seconds for each comparison (default: 6)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; wrong input is one sentence on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # as of `minilora generate | head`: nobody reads on, so stop in peace
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        print(f"minilora {args.command}: not enough memory for that", file=sys.stderr)
        return 2
    except (ValueError, TypeError, KeyError, FloatingPointError, OSError, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"minilora {args.command}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
