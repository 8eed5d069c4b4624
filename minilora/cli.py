"""The command line: `minilora compare | pretrain | generate | info | ...`.

Each command has a function that adds its options and, below it, the function that runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from minilora.data.generate import sample_tokens
from minilora.data.tokenizer import CharTokenizer, load_tokenizer
from minilora.exercises import grade
from minilora.files.bases import load_model
from minilora.files.checkpoint import save_checkpoint
from minilora.files.gguf import describe_gguf, is_gguf
from minilora.files.llama import to_hf_llama
from minilora.files.peft_config import CONFIG_FILE, WEIGHTS_FILE
from minilora.files.peft_read import describe_adapter, load_adapter
from minilora.files.safetensors import describe_safetensors, printable
from minilora.lab import bench, bench_llm, compare, plots
from minilora.lab.counting import PUBLISHED
from minilora.lab.counting_llama import base_bytes
from minilora.lab.pretrain import RECIPES, pretrain
from minilora.lab.tasks import TASKS
from minilora.lab.teach import STUDY, Lesson, demonstrate, study
from minilora.lora.wrap import merge_lora
from minilora.nn.llama import Llama
from minilora.options import filled, names, positive, ranks, temperature, whole

Parser = argparse.ArgumentParser
MODEL_HELP = "base, small, smollm2, a checkpoint, a GGUF file, or a folder saved by transformers"


# ---- Commands


def training_options(parser: Parser) -> None:
    """Add the options that `compare` and `pretrain` share."""
    parser.add_argument("--threads", type=whole(1),
                        help="threads that share each batch (default: as many as pay off)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def compare_options(parser: Parser) -> None:
    """Add the options of `minilora compare`; options not given keep the defaults of `Settings`."""
    add = parser.add_argument
    add("--ranks", type=ranks, metavar="2,8", help="LoRA ranks (default: 2,8)")
    add("--steps", type=whole(2), help="training steps of each run (default: 300)")
    add("--lr", type=positive,
        help="one learning rate for all methods (default: each method's own, "
        f"{compare.FULL_LEARNING_RATE:g} full, {compare.LORA_LEARNING_RATE:g} LoRA)")
    add("--alpha", type=positive, help="LoRA alpha (default: twice the rank)")
    add("--target-modules", type=names, metavar="q_proj,v_proj",
        help="names or globs of the layers to adapt (default: every Linear)")
    add("--seeds", type=whole(1), help="runs of each method (default: 1)")
    add("--base", choices=sorted(RECIPES), help="shipped model (default: base)")
    add("--out", type=filled, default="runs/compare",
        help="folder for figures, numbers, adapters (default: %(default)s)")
    add("--quick", action="store_true",
        help=f"the small model and {compare.QUICK.steps} steps, about 15 seconds")
    training_options(parser)


def compare_command(args: argparse.Namespace) -> int:
    """Run the comparison, print its table, and write figures beside its numbers."""
    settings = compare.QUICK if args.quick else compare.Settings()
    given = {
        "ranks": args.ranks, "steps": args.steps, "lr": args.lr, "alpha": args.alpha,
        "target_modules": args.target_modules, "seeds": args.seeds, "base": args.base,
        "threads": args.threads,
    }
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    result = compare.compare(settings, args.out, progress=not args.no_progress)
    print(f"\nFine-tuning the {settings.base} model, trained on English docs, on Python code: "
          f"{settings.steps} steps.\n")
    print(compare.table(result))
    print("\nLosses in nats per character on held-out text; docs before: "
          f"{result['docs_base']:.3f}. MB = 10^6 bytes.")
    written = ", ".join([*plots.COMPARISON, compare.RESULT, "adapters/"])
    print(f"Written to {args.out}: {written}")
    if len(result["runs"]) < len(settings.plan):
        print("interrupted: the runs that were complete are above")
        return 130
    return 0


def pretrain_options(parser: Parser) -> None:
    """Add the options of `minilora pretrain`."""
    add = parser.add_argument
    add("--model", choices=sorted(RECIPES), default="base",
        help="which recipe (default: %(default)s)")
    add("--steps", type=whole(1), help="training steps (default: the recipe's)")
    add("--seed", type=whole(0), default=0, help="seed of weights and batches (default: 0)")
    add("--out", type=filled, help="file to write (default: MODEL.safetensors)")
    training_options(parser)


def pretrain_command(args: argparse.Namespace) -> int:
    """Train a base model and print its losses on held-out docs."""
    out = args.out or f"{args.model}.safetensors"
    history = pretrain(args.model, out, args.steps, args.seed, args.threads, not args.no_progress)
    if not history.steps:
        raise KeyboardInterrupt
    for step, loss in zip(history.validation_steps, history.validation_losses, strict=False):
        print(f"step {step:5d}: {loss:.4f} nats per character on held-out docs")
    print(f"interrupted; written to {out}.interrupted" if history.interrupted else
          f"written to {out}")
    return 130 if history.interrupted else 0


def generate_options(parser: Parser) -> None:
    """Add the options of `minilora generate`."""
    add = parser.add_argument
    add("--prompt", default="The ", help=r"text to continue; \n is a new line")
    add("--base", type=filled, default="base", help=f"{MODEL_HELP} (default: base)")
    add("--adapter", type=filled, help="folder of an adapter, as compare writes them")
    add("--tokens", type=whole(0), default=400,
        help="characters to write, or tokens of a language model (default: 400)")
    add("--temperature", type=temperature, default=0.8,
        help="0 always takes the likeliest character (default: 0.8)")
    add("--top-k", type=whole(1), default=20,
        help="draw from the k likeliest characters (default: 20)")
    add("--seed", type=whole(0), default=0, help="seed of the draws (default: 0)")


def generate_command(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation, character by character."""
    model = load_model(args.base)
    if args.adapter:
        load_adapter(model, args.adapter)
    tokenizer = load_tokenizer(args.base) if isinstance(model, Llama) else CharTokenizer()
    prompt = args.prompt.replace("\\n", "\n")
    if not prompt:
        raise ValueError("the prompt is empty: give the model at least one character")
    ids = tokenizer.encode(prompt)
    tokens = sample_tokens(model, ids, args.tokens, args.temperature, args.top_k, args.seed,
                           getattr(tokenizer, "eos", None))
    texts = tokenizer.decode_stream(int(token[0]) for token in tokens)
    print(prompt + next(texts, ""), end="", flush=True)  # so that an error comes before any text
    for text in texts:
        print(text, end="", flush=True)
    print()


def teach_options(parser: Parser) -> None:
    """Add the options of `minilora teach`; those not given keep the defaults of `Lesson`."""
    add, usual = parser.add_argument, Lesson()
    add("--task", choices=sorted(TASKS), default="commands", help="(default: %(default)s)")
    add("--base", type=filled, default="smollm2", help="smollm2, a GGUF file, or a folder of "
        "transformers; its tokenizer needs SmolLM2's template (default: smollm2)")
    add("--rank", type=whole(1), default=usual.rank, help="LoRA rank (default: %(default)s)")
    add("--alpha", type=positive, help="LoRA alpha (default: twice the rank)")
    add("--projections", type=names, metavar="q_proj,v_proj", default=usual.projections,
        help="layers to adapt in each block (default: all seven)")
    add("--upper", type=whole(0), default=usual.upper, metavar="BLOCKS",
        help="adapt only this many of the uppermost blocks; 0 for all (default: %(default)s)")
    add("--steps", type=whole(1), default=usual.steps, help="(default: %(default)s)")
    add("--lr", type=positive, default=usual.learning_rate, help="(default: %(default)s)")
    add("--batch-size", type=whole(1), default=usual.batch_size, help="(default: %(default)s)")
    add("--seed", type=whole(0), default=0, help="of A and of the examples' order (default: 0)")
    add("--study", action="store_true", help=f"{len(STUDY)} lessons with different settings, "
        "about 20 minutes")
    add("--out", type=filled, default="runs/teach", help="folder to write (default: %(default)s)")
    training_options(parser)


def teach_command(args: argparse.Namespace) -> None:
    """Teach a language model a task, and show what it answers before and after."""
    model = load_model(args.base)
    if not isinstance(model, Llama):
        raise ValueError(f"{args.base} is a GPT; a lesson needs a language model such as smollm2")
    tokenizer = load_tokenizer(args.base)
    how = args.out, args.threads, not args.no_progress
    if args.study:
        return study(model, tokenizer, args.task, *how)
    lesson = Lesson(args.rank, args.alpha or 2.0 * args.rank, args.projections, args.upper,
                    args.steps, args.lr, args.batch_size, args.seed)
    return demonstrate(model, tokenizer, args.task, lesson, *how)


def info_options(parser: Parser) -> None:
    """Add the argument of `minilora info`."""
    parser.add_argument("path", help="folder of an adapter, or a safetensors or GGUF file")


def info_command(args: argparse.Namespace) -> None:
    """Print the contents of an adapter, a checkpoint or a GGUF file."""
    path = Path(args.path)
    if path.is_dir() and not (path / CONFIG_FILE).exists() and (path / "config.json").exists():
        path /= "model.safetensors"  # a model saved by transformers
    is_adapter = path.is_dir() or path.name in (CONFIG_FILE, WEIGHTS_FILE)
    print(describe_adapter(path) if is_adapter else
          describe_gguf(path) if is_gguf(path) else describe_safetensors(path))


def merge_options(parser: Parser) -> None:
    """Add the arguments of `minilora merge`."""
    parser.add_argument("base", help=MODEL_HELP)
    parser.add_argument("adapter", help="folder of an adapter")
    parser.add_argument("out", help="checkpoint to write, in float32; of a Llama, a folder")


def merge_command(args: argparse.Namespace) -> None:
    """Merge an adapter into a base for good, and write a plain checkpoint."""
    model = load_model(args.base)
    load_adapter(model, args.adapter)
    merge_lora(model, unload=True)
    if isinstance(model, Llama):
        to_hf_llama(model, args.out)
    else:
        save_checkpoint(model, args.out)
    print(f"written to {args.out}: {model.num_parameters():,} parameters, A and B are merged")


def count_options(parser: Parser) -> None:
    """Add the options of `minilora count`."""
    add = parser.add_argument
    add("model", help=f"one of {', '.join(PUBLISHED)}")
    add("--rank", type=whole(1), default=8, help="LoRA rank (default: 8)")
    add("--target-modules", type=names, metavar="q_proj,v_proj",
        help="names or globs of the layers to adapt (default: all Linears in the blocks)")


def count_command(args: argparse.Namespace) -> None:
    """Print the parameters and bytes of a published model and of LoRA on it, by formula."""
    if args.model not in PUBLISHED:
        raise ValueError(f"{args.model!r} is not among {', '.join(PUBLISHED)}")
    architecture = PUBLISHED[args.model]
    targets = list(args.target_modules) if args.target_modules else None
    total = architecture.num_parameters
    lora = architecture.lora_parameters(args.rank, targets)
    rows = {
        f"{args.model} ({architecture.source})": f"{total:,} parameters",
        "weights in float32": f"{4 * total:,} bytes",
        "weights with the layers' matrices in 4 bits (NF4)":
            f"{base_bytes(architecture, 'nf4'):,} bytes",
        f"LoRA r={args.rank} on {', '.join(targets or architecture.linears)}":
            f"{lora:,} parameters, {lora / total:.4%}",
        "gradients and AdamW moments in float32, full": f"{12 * total:,} bytes",
        "gradients and AdamW moments in float32, LoRA": f"{12 * lora:,} bytes",
        "one task on disk in float16, full": f"{2 * total:,} bytes",
        "one task on disk in float16, LoRA": f"{2 * lora:,} bytes",
    }
    for name, value in rows.items():
        print(f"{name}: {value}")


def check_options(parser: Parser) -> None:
    """Add the options of `minilora check`."""
    add = parser.add_argument
    add("path", help="a notebook, a .py file, or a folder of them")
    add("--json", action="store_true", help="print everything as JSON")
    add("--seconds", type=positive, default=30.0, help="time limit for each file (default: 30)")


def check_command(args: argparse.Namespace) -> int:
    """Grade a file or a folder of submissions; return 0 if every file is complete, else 1."""
    rows = grade.grade(args.path, args.seconds)
    text = json.dumps(rows, indent=2) if args.json else grade.report(rows)
    encoding = sys.stdout.encoding or "utf-8"  # a message may have what the terminal has not
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0 if all(map(grade.is_complete, rows)) else 1


def bench_options(parser: Parser) -> None:
    """Add the options of `minilora bench`."""
    add = parser.add_argument
    add("--sizes", type=names, default=tuple(bench.SIZES), metavar="XS,S,M,L",
        help="model sizes to time (default: all)")
    add("--llm", action="store_true",
        help="time and weigh LoRA on SmolLM2-135M instead, in 4 bits and in float32")
    add("--peers", action="store_true", help="time PyTorch and PEFT as well, and print the ratios")
    add("--seconds", type=positive, default=6.0, help="seconds for each comparison (default: 6)")


def bench_command(args: argparse.Namespace) -> None:
    """Print the timing table."""
    print(bench_llm.report(args.peers, args.seconds) if args.llm else
          bench.report(args.sizes, args.peers, args.seconds))


# ---- The parser and the entry point


def build_parser() -> Parser:
    """Return the parser for all commands."""
    table = {
        "compare": (compare_options, compare_command, "fine-tune the base on Python code, in full "
                    "and with LoRA; print a table, write figures"),
        "pretrain": (pretrain_options, pretrain_command, "train a base model on the docs corpus"),
        "generate": (generate_options, generate_command, "continue a text with a model"),
        "teach": (teach_options, teach_command, "teach a language model in 4 bits a task"),
        "info": (info_options, info_command, "show what is in an adapter, checkpoint or GGUF file"),
        "merge": (merge_options, merge_command, "merge an adapter into a base for good"),
        "count": (count_options, count_command,
                  "count the parameters of a published model and of LoRA"),
        "check": (check_options, check_command, "grade an exercise, or a folder of submissions"),
        "bench": (bench_options, bench_command, "time training steps on one thread"),
    }
    parser = Parser(
        prog="minilora", description="LoRA from scratch in NumPy, with its promises measured."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, run, text) in table.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        add_options(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Bad input prints one sentence to stderr and returns 2. Ctrl-C returns 130.
    """
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args) or 0
        sys.stdout.flush()  # here, where a reader that has gone is not an error
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
