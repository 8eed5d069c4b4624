"""A whole GPT in one safetensors file, with its configuration as metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.safetensors import load_metadata, load_safetensors, save_safetensors
from minilora.lora.adapter import replaced_head
from minilora.lora.surgery import wrappers
from minilora.nn.attention import CausalSelfAttention
from minilora.nn.gpt import GPT, GPTConfig
from minilora.nn.layers import LayerNorm
from minilora.nn.validate import CheckpointError, float_dtype

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
        If the model has LoRA layers, if its head, blocks, `eps` or `n_heads` are not those of
        its configuration, or if a number does not fit `dtype`.
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
    if wrappers(model):
        raise ValueError("the model has LoRA layers: store them with save_adapter, or remove_lora")
    if replaced_head(model):
        raise ValueError("the head of the model was replaced; a checkpoint holds a whole GPT")
    for name, module in model.named_modules():
        for kind, attribute, setting in CONFIGURED:
            value, configured = getattr(module, attribute, None), getattr(model.config, setting)
            if isinstance(module, kind) and value != configured:
                raise ValueError(f"{name}.{attribute} is {value}, the config says {configured}: "
                                 "no file could hold both")
    if len(model.h) != model.config.n_layers:
        raise ValueError(
            f"the model has {len(model.h)} blocks, its config says {model.config.n_layers}"
        )


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
    tensors = load_safetensors(path)
    metadata = load_metadata(path)
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
    check_checkpoint_sizes(config, {name: array.shape for name, array in tensors.items()})
    model = GPT(config, dtype=dtype)
    model.load_state_dict(tensors)
    return model


def check_checkpoint_sizes(config: GPTConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that a file really has the sizes that it claims, before a model is built.

    Parameters
    ----------
    config
        The sizes that the file claims.
    shapes
        {name: shape} of the file's arrays, under our names.

    Raises
    ------
    ValueError
        If the embeddings or a block do not have these sizes.
    """
    expected = {
        "wte.weight": (config.vocab_size, config.d_model),
        "wpe.weight": (config.context_length, config.d_model),
    }
    for i in range(min(config.n_layers, len(shapes) + 1)):
        expected[f"h.{i}.mlp.up_proj.weight"] = (config.d_model, 4 * config.d_model)
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise ValueError(f"{name} should have shape {shape}, found {shapes.get(name)}")


def load_base(name: str = "base", dtype: Any = np.float32) -> GPT:
    """Load a shipped base model, made by ``minilora pretrain``.

    Parameters
    ----------
    name
        "base" (822,016 parameters) or "small" (110,336).
    dtype
        np.float32 or np.float64.

    Raises
    ------
    ValueError
        If no such model is shipped.
    """
    known = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))
    if name not in known:
        raise ValueError(f"the shipped models are {', '.join(known) or 'missing'}; got {name!r}")
    return load_checkpoint(WEIGHTS / f"{name}.safetensors", dtype)
