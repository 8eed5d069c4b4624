"""Commands that run experiments: compare, pretrain, teach, count, bench."""

from __future__ import annotations

import argparse
from dataclasses import replace

from minilora.commands.options import Command, Parser, filled, names, positive, ranks, whole
from minilora.data.tokenizer import load_tokenizer
from minilora.files.bases import load_model
from minilora.lab import bench, bench_llm, compare, plots
from minilora.lab.counting import PUBLISHED
from minilora.lab.counting_llama import base_bytes
from minilora.lab.pretrain import RECIPES, pretrain
from minilora.lab.tasks import TASKS
from minilora.lab.teach import STUDY, Lesson, demonstrate, study
from minilora.nn.llama import Llama


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
    print(f"{compare.table(result)}\n")
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


def teach_options(parser: Parser) -> None:
    """Add the options of `minilora teach`; those not given keep the defaults of `Lesson`."""
    add, usual = parser.add_argument, Lesson()
    add("--task", choices=sorted(TASKS), default="commands",
        help="what to teach (default: %(default)s)")
    add("--base", type=filled, default="smollm2", help="smollm2, a GGUF file, or a folder of "
        "transformers; its tokenizer needs SmolLM2's template (default: smollm2)")
    add("--rank", type=whole(1), default=usual.rank, help="LoRA rank (default: %(default)s)")
    add("--alpha", type=positive, help="LoRA alpha (default: twice the rank)")
    add("--projections", type=names, metavar="q_proj,v_proj", default=usual.projections,
        help="layers to adapt in each block (default: all seven)")
    add("--upper", type=whole(0), default=usual.upper, metavar="BLOCKS",
        help="adapt only this many of the uppermost blocks; 0 for all (default: %(default)s)")
    add("--steps", type=whole(1), default=usual.steps,
        help="training steps (default: %(default)s)")
    add("--lr", type=positive, default=usual.learning_rate,
        help="learning rate (default: %(default)s)")
    add("--batch-size", type=whole(1), default=usual.batch_size,
        help="examples in a batch (default: %(default)s)")
    add("--seed", type=whole(0), default=0,
        help="seed of A and of the examples' order (default: 0)")
    add("--study", action="store_true", help=f"{len(STUDY)} lessons, each with settings of "
        "its own instead of those given; about 20 minutes")
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


def count_options(parser: Parser) -> None:
    """Add the options of `minilora count`."""
    add = parser.add_argument
    add("model", metavar="model", choices=list(PUBLISHED), help=f"one of {', '.join(PUBLISHED)}")
    add("--rank", type=whole(1), default=8, help="LoRA rank (default: 8)")
    add("--target-modules", type=names, metavar="q_proj,v_proj",
        help="names or globs of the layers to adapt (default: all Linears in the blocks)")


def count_command(args: argparse.Namespace) -> None:
    """Print the parameters and bytes of a published model and of LoRA on it, by formula."""
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


def bench_options(parser: Parser) -> None:
    """Add the options of `minilora bench`."""
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    either("--sizes", type=names, default=tuple(bench.SIZES), metavar="XS,S,M,L",
           help="model sizes to time (default: all)")
    either("--llm", action="store_true",
           help="time and weigh LoRA on SmolLM2-135M instead, in 4 bits and in float32")
    add("--peers", action="store_true", help="time PyTorch and PEFT as well, and print the ratios")
    add("--seconds", type=positive, default=6.0, help="seconds for each comparison (default: 6)")


def bench_command(args: argparse.Namespace) -> None:
    """Print the timing table."""
    print(bench_llm.report(args.peers, args.seconds) if args.llm else
          bench.report(args.sizes, args.peers, args.seconds))


COMMANDS = {
    "compare": Command(
        compare_options, compare_command,
        "compare full fine-tuning with LoRA: the base model learns Python code",
        ("minilora compare --quick --out runs/quick",
         "minilora compare --ranks 1,4,16 --seeds 3 --out runs/ranks",
         "minilora compare --target-modules q_proj,v_proj --out runs/attention")),
    "pretrain": Command(
        pretrain_options, pretrain_command, "train a base model on the docs corpus",
        ("minilora pretrain --model small --steps 200 --out runs/small.safetensors",
         "minilora generate --base runs/small.safetensors")),
    "teach": Command(
        teach_options, teach_command, "teach a language model in 4 bits a task",
        ("minilora teach",
         "minilora teach --task docstrings --rank 16 --out runs/docstrings",
         "minilora teach --study --out runs/study")),
    "count": Command(
        count_options, count_command, "count the parameters of a published model and of LoRA",
        ("minilora count gpt3-175b --rank 4 --target-modules q_proj,v_proj",
         "minilora count llama-3.2-1b")),
    "bench": Command(
        bench_options, bench_command, "time training steps on one thread",
        ("minilora bench --sizes XS,S --seconds 2",
         "minilora bench --llm")),
}
