"""Load whatever somebody names as a base."""

from __future__ import annotations

from pathlib import Path

from minilora.files.checkpoint import load_base, load_checkpoint, save_checkpoint
from minilora.files.gguf import is_gguf
from minilora.files.gguf_llama import load_gguf
from minilora.files.gpt2 import from_hf_gpt2
from minilora.files.hf_folder import HF_CONFIG
from minilora.files.llama import from_hf_llama, to_hf_llama
from minilora.files.origin import WrongBase, origin, to_load
from minilora.files.peft_read import load_adapter, read_adapter
from minilora.files.settings import read_json
from minilora.nn.gpt import GPT
from minilora.nn.llama import Llama


def load_model(name: str) -> GPT | Llama:
    """Load a base by its name, a checkpoint, a GGUF file, or a folder of transformers."""
    if name in ("base", "small", "smollm2"):  # even if there is such a file; ./base means that one
        return load_base(name)
    path = Path(name)
    if path.is_dir():
        kind = read_json(path / HF_CONFIG).get("model_type")
        return from_hf_llama(name) if kind == "llama" else from_hf_gpt2(name)
    if path.is_file() and is_gguf(path):
        return load_gguf(name)
    return load_checkpoint(name) if path.suffix or "/" in name or path.is_file() else (
        load_base(name))


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


def save_model(model: GPT | Llama, path: Path) -> Path:
    """Write a whole model: a GPT as a checkpoint, a Llama as a folder of transformers.

    Returns what was written, which `load_model` loads.
    """
    if isinstance(model, Llama):
        to_hf_llama(model, path)
        return path
    path = path.with_name(f"{path.name}.safetensors")
    save_checkpoint(model, path)
    return path
