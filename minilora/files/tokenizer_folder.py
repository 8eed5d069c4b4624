"""A tokenizer beside a model: the files that transformers expects, written or copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minilora.files.safetensors import write_atomically
from minilora.files.vocabulary import LETTERS, TOKENIZER_CONFIG, TOKENIZER_FILE, Vocabulary

GENERATION = "generation_config.json"  # where transformers looks for the token that ends a text
KNOWN = (
    TOKENIZER_FILE, TOKENIZER_CONFIG, GENERATION, "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)


def write_vocabulary(folder: Path, vocabulary: Vocabulary, chat_template: str | None) -> None:
    """Write tokenizer.json and the settings that transformers wants beside it.

    `chat_template` is in the language of Jinja. Raises ValueError, before anything is written, if
    two tokens would be written alike.
    """
    ids, eos = _ids(vocabulary), vocabulary.eos
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template,
        "eos_token": None if eos is None else list(ids)[eos],
    }
    files = {TOKENIZER_FILE: _tokenizer(vocabulary, ids), TOKENIZER_CONFIG: settings,
             GENERATION: {"eos_token_id": eos}}
    for name, contents in files.items():
        text = json.dumps(contents, indent=2, ensure_ascii=False)
        write_atomically(folder / name, text.encode())


def _ids(v: Vocabulary) -> dict[str, int]:
    """Return {token: id}, in which added tokens are as they are, and others in letters."""
    added, ids = {i for group in v.added for i in group.values()}, {}
    for i, token in enumerate(v.tokens):
        text = token.decode() if i in added else _letters(token)
        if (first := ids.setdefault(text, i)) != i:
            raise ValueError(f"the tokens {first} and {i} are both written as {text!r}, and a "
                             f"{TOKENIZER_FILE} could not hold both")
    return ids


def _letters(token: bytes) -> str:
    """Return a token with a letter for each of its bytes."""
    return token.decode("latin-1").translate(LETTERS)


def _tokenizer(v: Vocabulary, ids: dict[str, int]) -> dict[str, Any]:
    """Return the contents of a tokenizer.json."""
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": late, "special": text in v.special}
        for late, group in zip((False, True), v.added, strict=False) for text, i in group.items()
    ]
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
        for rule in v.rules
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]), "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, to_bytes]},
        "post_processor": None, "decoder": to_bytes,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": v.ignore_merges, "vocab": ids,
            "merges": [" ".join(map(_letters, pair))
                       for pair in sorted(v.ranks, key=v.ranks.__getitem__)],
        },
    }


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what a folder of transformers has of a tokenizer, of any kind.

    Raises FileNotFoundError if it has nothing of one.
    """
    found = [name for name in KNOWN if (source / name).is_file()]
    for name in found:
        write_atomically(folder / name, (source / name).read_bytes())
    if not set(found) - {GENERATION}:
        raise FileNotFoundError(f"{source} has no tokenizer")
