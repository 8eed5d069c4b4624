"""Commands for adapters: eval, chat, list."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from minilora.commands.options import (
    DATA_HELP,
    MODEL_HELP,
    Command,
    Parser,
    filled,
    temperature,
    whole,
)
from minilora.data.datasets import load_data, to_evaluate
from minilora.data.encoded import Examples
from minilora.data.tokenizer import tokenizer_of
from minilora.files.bases import load_adapted
from minilora.files.peft_config import CONFIG_FILE
from minilora.files.peft_read import adapter_row
from minilora.files.safetensors import printable
from minilora.lab import markdown
from minilora.lab.chat import chat
from minilora.lab.finetune import (
    KINDS,
    Settings,
    encode,
    exact_answers,
    kind_of,
    loss_of,
    with_usual,
)
from minilora.lab.finetune_run import usual_base
from minilora.train.loop import evaluate

BATCH_SIZE = 16


def eval_options(parser: Parser) -> None:
    """Add the options of `minilora eval`."""
    add = parser.add_argument
    add("data", type=filled, metavar="DATA", help=DATA_HELP)
    add("--base", type=filled,
        help=f"{MODEL_HELP} (default: the one that the adapter was made for; without an adapter, "
        "base for texts and smollm2 for prompts)")
    add("--adapter", type=filled, help="folder of an adapter")
    add("--context-length", type=whole(1), help="tokens in a window of text, or the most in a "
        "conversation (default: as for finetune)")
    add("--threads", type=whole(1),
        help="threads that share the work (default: as many as pay off)")


def eval_command(args: argparse.Namespace) -> None:
    """Print the loss and perplexity on all of some data, and the answers that are exactly right."""
    data = load_data(to_evaluate(args.data))
    model, base = load_adapted(args.base or (None if args.adapter else usual_base(data)),
                               args.adapter)
    kind, tokenizer = kind_of(model, data), tokenizer_of(model, base)
    settings = with_usual(Settings(context_length=args.context_length), model, kind)
    encoded = encode(data, tokenizer, settings.context_length)
    loss = evaluate(model, encoded.evaluation(BATCH_SIZE), args.threads, loss_of(model))
    print(f"loss: {loss:.4f} {KINDS[kind].unit}")
    print(f"perplexity: {np.exp(loss):.4g}")
    if isinstance(encoded, Examples):
        right = exact_answers(model, tokenizer, encoded)
        print(f"answers that are exactly right: {right} of {len(encoded.answers)}")


def chat_options(parser: Parser) -> None:
    """Add the options of `minilora chat`."""
    add = parser.add_argument
    add("--base", type=filled, help="smollm2, a GGUF file, or a folder saved by transformers "
        "(default: the one that the first adapter was made for, or smollm2)")
    add("--adapter", type=filled, action="append", default=[], metavar="[NAME=]DIR",
        help="folder of an adapter; several may be given, /adapter NAME switches between them")
    add("--system", help="the system message (default: that of the model's template; '' for none)")
    add("--tokens", type=whole(1), default=256, help="most tokens in an answer (default: 256)")
    add("--temperature", type=temperature, default=0.0,
        help="0 always takes the likeliest token (default: 0)")
    add("--top-k", type=whole(1), default=20, help="draw from the k likeliest (default: 20)")
    add("--seed", type=whole(0), default=0, help="seed of the draws (default: 0)")


def chat_command(args: argparse.Namespace) -> None:
    """Talk with a language model."""
    chat(args.base, args.adapter, args.system, args.tokens, args.temperature, args.top_k, args.seed)


def list_options(parser: Parser) -> None:
    """Add the argument of `minilora list`."""
    parser.add_argument("folder", type=filled, metavar="DIR", help="where to look")


def list_command(args: argparse.Namespace) -> None:
    """Print a table of the adapters in a folder and below it."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = sorted(path.parent for path in folder.rglob(CONFIG_FILE))
    if not found:
        raise ValueError(f"there is no adapter in {folder} or below it")
    rows, faults = [["adapter", "base", "rank", "targets", "bytes", "held-out loss"]], []
    for path in found:
        name = str(path.relative_to(folder)) if path != folder else path.name or "."
        try:
            rows.append([printable(cell) for cell in (name, *adapter_row(path))])
        except (OSError, ValueError) as error:
            faults.append(f"{printable(name)}: {printable(str(error))}")
    if len(rows) > 1:
        print(markdown.table(rows, left=(0, 1, 3)))
    for fault in faults:
        print(fault)


COMMANDS = {
    "eval": Command(eval_options, eval_command, "print the loss of a model on your own data", (
        "minilora eval more_notes.txt --adapter runs/notes",
        "minilora eval pairs.jsonl --base smollm2")),
    "chat": Command(chat_options, chat_command, "talk with a language model and its adapters", (
        "minilora chat",
        "minilora chat --adapter runs/pairs --adapter house=runs/teach/adapter")),
    "list": Command(list_options, list_command, "list the adapters in a folder and below it",
                    ("minilora list runs",)),
}
