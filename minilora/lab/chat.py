"""A conversation with a language model on the terminal: `minilora chat`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minilora.data.bpe import BPETokenizer
from minilora.data.cache import Unpacked, worth_unpacking
from minilora.data.chat import END, SYSTEM
from minilora.data.generate import sample_tokens
from minilora.data.tokenizer import tokenizer_of
from minilora.files.adapter_set import AdapterSet
from minilora.files.bases import load_model
from minilora.files.origin import Origin, origin, to_load
from minilora.files.peft_read import read_adapter
from minilora.nn.llama import Llama

HELP = """/adapter NAME   answer with this adapter from now on; /adapter none: with the base
/adapter        list the adapters
/clear          forget what was said, which switching does not
/quit           leave (as does Ctrl-D); Ctrl-C stops an answer"""
NONE = "none"  # the name of the base without an adapter
LEAST = 16  # tokens that are kept for an answer


class Chat:
    """A conversation, of which each turn may be answered with another adapter.

    Parameters
    ----------
    model : Llama
        A base without an adapter.
    tokenizer : BPETokenizer
    system : str or None
        The system message; None for none.
    max_new_tokens, temperature, top_k, seed
        As for `generate`.
    """

    def __init__(
        self, model: Llama, tokenizer: BPETokenizer, system: str | None = SYSTEM,
        max_new_tokens: int = 256, temperature: float = 0.0, top_k: int = 20, seed: int = 0,
    ):
        self.adapters, self.tokenizer, self.system = AdapterSet(model), tokenizer, system
        self.max_new_tokens, self.temperature, self.top_k = max_new_tokens, temperature, top_k
        self.seed, self.messages = seed, []

    def add(self, given: str) -> str:
        """Load an adapter, "NAME=DIR" or "DIR", and return its name."""
        name, folder = named(given)
        if name == NONE or not name:
            raise ValueError(f"an adapter cannot have the name {name!r}: give one by NAME=DIR")
        self.adapters.add(name, folder)
        return name

    def switch(self, name: str) -> str:
        """Answer with another adapter, and return a sentence that says so."""
        self.adapters.set_active(None if name == NONE else name)
        return "(the base, without an adapter)" if name == NONE else f"(with the adapter {name})"

    def listing(self) -> str:
        """Return the names of the adapters, with a star at the active one."""
        active = self.adapters.active or NONE
        return "\n".join(f"{'*' if name == active else ' '} {name}"
                         for name in (NONE, *self.adapters.names))

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to what a user says as it is written. It is remembered at the end.

        The oldest turns are forgotten if the context is full. Raises ValueError if even the last
        message is too long for it.
        """
        model: Any = self.adapters.model
        tokenizer = self.tokenizer
        said = [*self.messages, {"role": "user", "content": text}]
        limit = model.config.context_length - LEAST
        while len(ids := tokenizer.chat(said, self.system)) > limit:
            if len(said) < 3:
                raise ValueError(f"this is {len(ids)} tokens long, too long for the context of "
                                 f"{model.config.context_length}")
            said = said[2:]
        end = tokenizer.special[END]
        tokens = sample_tokens(model, ids, self.max_new_tokens, self.temperature, self.top_k,
                               self.seed + len(self.messages), end)
        parts: list[str] = []
        try:
            for part in tokenizer.decode_stream((int(t[0]) for t in tokens), skip_special=True):
                parts.append(part)
                yield part
        finally:
            self.messages = [*said, {"role": "assistant", "content": "".join(parts)}]


def named(given: str) -> tuple[str, str]:
    """Return name and folder of "NAME=DIR", or of "DIR", which is named as the folder is."""
    name, equals, folder = given.partition("=")
    if equals and not os.path.isdir(given):  # a folder may have "=" in its name
        return name, folder
    return Path(given).resolve().name, given


def chat(
    base: str | None, adapters: Sequence[str], system: str | None, max_new_tokens: int,
    temperature: float, top_k: int, seed: int,
) -> None:
    """Read lines from standard input and answer them until its end, or /quit.

    Parameters
    ----------
    base : str or None
        What `load_model` loads; None: what the first adapter was made for, or smollm2.
    adapters : sequence of str
        "NAME=DIR" or "DIR". The first is active at the beginning.
    system : str or None
        The system message; "" for none, None for that of the template.
    max_new_tokens, temperature, top_k, seed
        As for `generate`.

    Raises
    ------
    ValueError
        If the base is not a language model, or if an adapter does not fit it.
    """
    if base is None:
        first = named(adapters[0])[1] if adapters else ""
        made = origin(read_adapter(first)[0]) if first else Origin()
        base = to_load(made, first, "smollm2")
    model = load_model(base)
    if not isinstance(model, Llama):
        raise ValueError(f"{base} is a GPT; chat needs a language model, such as smollm2")
    tokenizer = tokenizer_of(model, base)
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(f"{base} has a tokenizer of characters, so it has no chat template")
    talk = Chat(model, tokenizer, SYSTEM if system is None else system or None, max_new_tokens,
                temperature, top_k, seed)
    tokenizer.chat("", talk.system)  # for its error, if it has not the template's tokens
    names = [talk.add(given) for given in adapters]
    if names:
        talk.switch(names[0])
    if worth_unpacking(model):
        with Unpacked(model):
            return _loop(talk)
    return _loop(talk)


def _loop(talk: Chat) -> None:
    if sys.stdin is None:
        raise ValueError("there is no standard input to read from")
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="replace")  # what is no text would end the conversation
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # here, because it may print something on import
        print(f"{talk.listing()}\n/help shows the commands")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            _command(talk, line)
        elif line:
            _say(talk, line)


def _say(talk: Chat, line: str) -> None:
    try:
        for part in talk.answer(line):
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except ValueError as error:
        print(f"({error})", end="")
    print(flush=True)


def _command(talk: Chat, line: str) -> None:
    match line.split(maxsplit=1):  # a name may have spaces
        case ["/adapter"]:
            print(talk.listing())
        case ["/adapter", name]:
            try:
                known = name == NONE or name in talk.adapters.names
                print(talk.switch(name if known else talk.add(name)))
            except (ValueError, KeyError, OSError) as error:
                print(f"({error})")
        case ["/clear"]:
            talk.messages = []
        case ["/help"]:
            print(HELP)
        case _:
            print(f"({line.split()[0]} is not a command; /help shows what there is)")
