"""Find, load and describe whatever somebody names as a base."""

from __future__ import annotations

from pathlib import Path

from minilora.files.checkpoint import base_file, load_checkpoint
from minilora.files.gguf import describe_gguf, is_gguf
from minilora.files.gguf_llama import load_gguf
from minilora.files.gpt2 import from_hf_gpt2
from minilora.files.hf_folder import HF_CONFIG, weight_files
from minilora.files.llama import from_hf_llama
from minilora.files.origin import WrongBase, origin, to_load
from minilora.files.peft_config import CONFIG_FILE, WEIGHTS_FILE
from minilora.files.peft_read import describe_adapter, load_adapter, read_adapter
from minilora.files.safetensors import describe_safetensors
from minilora.files.settings import read_json
from minilora.nn.gpt import GPT
from minilora.nn.llama import Llama
from minilora.nn.validate import CheckpointError, closest

NAMES = "base", "small", "smollm2"


def find_base(name: str) -> Path:
    """Return the file of a base that has a name, or else the path itself.

    "base" is the shipped model even if there is a file called so; "./base" is that file. Raises
    FileNotFoundError if there is nothing, or if the package of "smollm2" is not installed.
    """
    if name in NAMES:
        return base_file(name)
    if not Path(name).exists():
        raise FileNotFoundError(f"{name!r} is neither a file or folder, nor one of "
                                f"{', '.join(NAMES)}{closest(name, NAMES)}")
    return Path(name)


def load_model(name: str) -> GPT | Llama:
    """Load a base by its name, a checkpoint, a GGUF file, or a folder of transformers.

    Raises FileNotFoundError as `find_base` does, and CheckpointError if it is no such model.
    """
    path = find_base(name)
    if path.is_dir():
        if not (path / HF_CONFIG).exists():
            kind = "the folder of an adapter" if (path / CONFIG_FILE).exists() else "no model"
            raise CheckpointError(f"{name} is {kind}: it has no {HF_CONFIG}")
        kind = read_json(path / HF_CONFIG).get("model_type")
        return from_hf_llama(path) if kind == "llama" else from_hf_gpt2(path)
    return load_gguf(path) if is_gguf(path) else load_checkpoint(path)


def load_adapted(name: str | None, adapter: str | None) -> tuple[GPT | Llama, str]:
    """Load a base, attach an adapter, and return the model and what the base was loaded by.

    Without a name it is the base that the adapter was made for, or "base".
    """
    if not adapter:
        return load_model(name or "base"), name or "base"
    found = name or to_load(origin(read_adapter(adapter)[0]), adapter)
    model = load_model(found)
    try:
        load_adapter(model, adapter)
    except WrongBase as error:
        raise ValueError(f"{adapter} was made for {error.base}: add --base {error.base}") from None
    return model, found


def describe(name: str) -> str:
    """Return a text about a base that `load_model` can load, or about an adapter.

    Raises as `load_model` does.
    """
    path = find_base(name)
    if path.name in (CONFIG_FILE, WEIGHTS_FILE) or (path / CONFIG_FILE).exists():
        return describe_adapter(path)
    if not path.is_dir():
        return describe_gguf(path) if is_gguf(path) else describe_safetensors(path)
    if not (path / HF_CONFIG).exists():
        raise CheckpointError(f"{name} is neither an adapter nor a model: it has no {CONFIG_FILE}, "
                              f"and no {HF_CONFIG}")
    return "\n".join(map(describe_safetensors, weight_files(path)))
