"""Read the vocabulary of a byte-level BPE from GGUF metadata or a tokenizer.json.

A setting is refused by name if it would change the tokens and is not supported. What the files say
about adding tokens at the beginning or the end is ignored: a tokenizer adds none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.files.settings import read_json, refuse_settings
from minilora.nn.validate import CheckpointError

# How text is split into words, in the syntax of tokenizer.json (see data/words.py).
DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
GGUF_RULES = {"gpt-2": [GPT2], "smollm": [DIGIT, GPT2], "llama-bpe": [LLAMA3]}
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF
TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

# What is allowed in a tokenizer.json, in its model, in a step of its pre_tokenizer, and so on.
TOP = {"normalizer": (None,), "truncation": (None,), "padding": (None,)}
MODEL = {"type": ("BPE",), "dropout": (None, 0), "continuing_subword_prefix": (None, ""),
         "end_of_word_suffix": (None, ""), "fuse_unk": (False,), "byte_fallback": (False,)}
STEP = {"type": ("ByteLevel", "Digits", "Split"), "add_prefix_space": (False,),
        "behavior": ("Isolated",), "invert": (False,)}
ADDED = {"single_word": (False,), "lstrip": (False,), "rstrip": (False,)}

# These files write a byte as a letter: as itself if that is printable, else as one from U+0100 on.
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = {byte: 256 + i for i, byte in enumerate(OTHERS)}
BYTES = {letter: byte for byte, letter in LETTERS.items()} | dict.fromkeys(OTHERS, 0xFFFD)


@dataclass
class Vocabulary:
    """What a byte-level BPE consists of.

    `added` are tokens that are found in a text before it is split, one group after the other. The
    special ones among them, which control a model, are no result of merging bytes: they are in
    `tokens` but not in `ids`.
    """

    tokens: list[bytes]  # in the order of their ids
    ids: dict[bytes, int]
    ranks: dict[tuple[bytes, bytes], int]  # of pairs to merge, lowest first
    added: list[dict[str, int]]
    special: dict[str, int]
    rules: list[str]
    eos: int | None = None
    ignore_merges: bool = False  # a word that is a token stays whole, as in Llama 3


def from_metadata(metadata: Mapping[str, Any]) -> Vocabulary:
    """Return the vocabulary in the metadata of a GGUF file. Raises CheckpointError."""
    with _named("GGUF"):
        refuse_settings(Path("GGUF"), dict(metadata), {
            "tokenizer.ggml.model": ("gpt2",), "tokenizer.ggml.pre": tuple(GGUF_RULES),
            "tokenizer.ggml.add_space_prefix": (False,)})
        found = {key: metadata[f"tokenizer.ggml.{key}"]
                 for key in ("model", "pre", "tokens", "merges", "token_type")}
        kinds = list(zip(found["tokens"], found["token_type"], strict=True))
        special, user = ({token: i for i, (token, kind) in enumerate(kinds) if kind == wanted}
                         for wanted in (CONTROL, USER_DEFINED))
        return _checked(found["tokens"], found["merges"], [special | user], special,
                        GGUF_RULES[found["pre"]], metadata.get("tokenizer.ggml.eos_token_id"),
                        ignore_merges=found["pre"] == "llama-bpe")


def read_vocabulary(path: Path, eos: str | None = None) -> Vocabulary:
    """Return the vocabulary in a tokenizer.json of Hugging Face's tokenizers.

    `eos` is the token that ends a text; without it, the eos_token of the tokenizer_config.json in
    the same folder, if there is one. Raises CheckpointError and FileNotFoundError.
    """
    settings, beside = read_json(path), path.with_name(TOKENIZER_CONFIG)
    if eos is None and beside.exists():
        eos = read_json(beside).get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
    with _named(path):
        model, added = settings["model"], settings.get("added_tokens") or []
        refuse_settings(path, settings, TOP)
        _refuse(path, "model", model, MODEL)
        _refuse(path, "decoder", settings.get("decoder") or {}, {"type": ("ByteLevel",)})
        for token in added:
            _refuse(path, "added_tokens", token, ADDED)
        ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError(f"its {len(ids)} tokens need the ids 0..{len(ids) - 1}")
        if eos is not None and eos not in ids:
            raise ValueError(f"eos_token {eos!r} is not in the vocabulary")
        special = {token["content"]: token["id"] for token in added if token["special"]}
        groups = [{token["content"]: token["id"] for token in added
                   if bool(token["normalized"]) is late}
                  for late in (False, True)]
        found = _checked(sorted(ids, key=ids.__getitem__), model["merges"], groups, special,
                         _rules(path, settings["pre_tokenizer"]), ids.get(eos),
                         model.get("ignore_merges", False))
        if any(bytes([byte]) not in found.ids for byte in range(256)):  # unknown bytes become it
            _refuse(path, "model", model, {"unk_token": (None,)})
        return found


def _rules(path: Path, pre_tokenizer: Any) -> list[str]:
    """Return the rules in a pre_tokenizer, the last step of which must turn text into bytes."""
    whole: dict[str, Any] = pre_tokenizer or {"type": None}
    steps: list[dict[str, Any]] = whole.get("pretokenizers", [whole])
    rules = []
    for step in steps:
        _refuse(path, "pre_tokenizer", step, STEP)
        if step["type"] == "Digits":
            rules.append(DIGIT if step["individual_digits"] else DIGITS)
        elif step["type"] == "Split":
            known = (DIGIT, DIGITS, GPT2, LLAMA3, QWEN2)  # another may mean something else in `re`
            _refuse(path, "pattern", {"Regex": None} | step["pattern"], {"Regex": known})
            rules.append(step["pattern"]["Regex"])
        elif step.get("use_regex", True):
            rules.append(GPT2)
    if [step["type"] == "ByteLevel" for step in steps] != [False] * (len(steps) - 1) + [True]:
        raise ValueError("the last step of pre_tokenizer, and no other, must be ByteLevel")
    return rules


def _refuse(path: Path, part: str, settings: dict[str, Any], allowed: dict[str, tuple]) -> None:
    """Refuse settings in a part of a tokenizer.json."""
    refuse_settings(path, {f"{part}.{key}": value for key, value in settings.items()},
                    {f"{part}.{key}": values for key, values in allowed.items()})


def _checked(
    tokens: Sequence[str], merges: Iterable[str | Sequence[str]], added: list[dict[str, int]],
    special: dict[str, int], rules: list[str], eos: int | None, ignore_merges: bool,
) -> Vocabulary:
    """Return a vocabulary in bytes. Raises ValueError if its parts do not fit each other."""
    written = {text for group in added for text in group}  # as they are, not in letters for bytes
    whole = [t.encode() if t in written else _bytes(t) for t in tokens]
    control, ranks = set(special.values()), {}
    ids = {whole[i]: i for i in reversed(range(len(whole))) if i not in control}  # the first wins
    for rank, merge in enumerate(merges):
        left, right = map(_bytes, merge.split(" ") if isinstance(merge, str) else merge)
        if not {left, right, left + right} <= ids.keys():
            raise ValueError(f"merge {merge!r} does not make a token of two tokens")
        ranks[left, right] = rank
    if eos is not None and not 0 <= eos < len(whole):
        raise ValueError(f"the id {eos} of its eos token is not in 0..{len(whole) - 1}")
    return Vocabulary(whole, ids, ranks, added, special, rules, eos, ignore_merges)


def _bytes(token: str) -> bytes:
    """Return the bytes of a token written in letters."""
    return token.translate(BYTES).encode("latin-1")


@contextlib.contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Name the file in an error that its contents cause."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise CheckpointError(f"{path} does not hold a byte-level BPE: {what}") from None
