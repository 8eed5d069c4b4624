"""Commands that use and convert models and adapters: generate, info, merge."""

from __future__ import annotations

import argparse

from minilora.commands.options import MODEL_HELP, Command, Parser, filled, temperature, whole
from minilora.data.generate import sample_tokens
from minilora.data.tokenizer import save_model, tokenizer_of
from minilora.files.bases import describe, load_adapted, load_model
from minilora.files.peft_read import load_adapter
from minilora.lora.wrap import merge_lora


def generate_options(parser: Parser) -> None:
    """Add the options of `minilora generate`."""
    add = parser.add_argument
    add("--prompt", default="The ", help=r"text to continue; \n is a new line")
    add("--base", type=filled,
        help=f"{MODEL_HELP} (default: the one that the adapter was made for, or base)")
    add("--adapter", type=filled, help="folder of an adapter")
    add("--tokens", type=whole(0), default=400,
        help="characters to write, or tokens of a language model (default: 400)")
    add("--temperature", type=temperature, default=0.8,
        help="0 always takes the likeliest character (default: 0.8)")
    add("--top-k", type=whole(1), default=20,
        help="draw from the k likeliest characters (default: 20)")
    add("--seed", type=whole(0), default=0, help="seed of the draws (default: 0)")


def generate_command(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation, character by character."""
    model, base = load_adapted(args.base, args.adapter)
    tokenizer = tokenizer_of(model, base)
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


def info_options(parser: Parser) -> None:
    """Add the argument of `minilora info`."""
    parser.add_argument("model", type=filled, help=f"{MODEL_HELP}; or the folder of an adapter")


def info_command(args: argparse.Namespace) -> None:
    """Print the contents of a model or an adapter."""
    print(describe(args.model))


def merge_options(parser: Parser) -> None:
    """Add the arguments of `minilora merge`."""
    add = parser.add_argument
    add("base", type=filled, help=MODEL_HELP)
    add("adapter", type=filled, help="folder of an adapter")
    add("out", type=filled, help="checkpoint to write, in float32; for a Llama, a "
        "folder as transformers writes it, with the tokenizer")


def merge_command(args: argparse.Namespace) -> None:
    """Merge an adapter into a base for good; write a checkpoint, or a folder with a tokenizer."""
    model = load_model(args.base)
    load_adapter(model, args.adapter)
    merge_lora(model, unload=True)
    save_model(model, args.base, args.out)
    print(f"written to {args.out}: {model.num_parameters():,} parameters, A and B are merged")


COMMANDS = {
    "generate": Command(
        generate_options, generate_command, "continue a text with a model",
        ('minilora generate --prompt "def " --tokens 200',
         'minilora generate --prompt "def " --adapter runs/compare/adapters/r8-seed0',
         'minilora generate --base smollm2 --prompt "Once upon a time" --temperature 0')),
    "info": Command(
        info_options, info_command, "show what is in a model or an adapter",
        ("minilora info base",
         "minilora info runs/compare/adapters/r8-seed0")),
    "merge": Command(
        merge_options, merge_command, "merge an adapter into a base for good",
        ("minilora merge base runs/compare/adapters/r8-seed0 merged.safetensors",
         "minilora merge smollm2 runs/teach/adapter merged")),
}
