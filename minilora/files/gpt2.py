"""Read and write GPT-2 checkpoints of Hugging Face's transformers without torch.

The Conv1D of transformers stores weights as (in, out), like this library; its other linear
layers store (out, in). Its c_attn holds q, k and v side by side in one matrix (d, 3d).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.checkpoint import build_gpt, check_plain
from minilora.files.hf_folder import HF_CONFIG, HF_WEIGHTS, Arrays, read_folder
from minilora.files.settings import refuse_settings
from minilora.files.together import save_pair
from minilora.nn.gpt import GPT, GPTConfig
from minilora.nn.layers import Linear
from minilora.nn.validate import CheckpointError, float_dtype

HF_NAMES = {
    "attn.c_proj": "attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    "ln_1": "ln_1", "ln_2": "ln_2",
}
HF_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of the tanh form
HF_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, stored by older versions


# ---- Names


def our_names(layer: str) -> list[str]:
    """Return our names for a layer of GPT-2; other names are returned unchanged.

    Parameters
    ----------
    layer
        A dotted name, with or without "transformer." in front.

    Returns
    -------
    list
        Three names, of q, k and v, for c_attn; otherwise one.
    """
    layer = layer.removeprefix("transformer.")
    prefix, _, last = layer.rpartition(".")
    if last == "c_attn" and re.fullmatch(r"h\.\d+\.attn", prefix):
        return [f"{prefix}.{part}_proj" for part in "qkv"]
    block, _, rest = layer.removeprefix("h.").partition(".")
    known = rest in HF_NAMES and layer == f"h.{block}.{rest}"
    return [f"h.{block}.{HF_NAMES[rest]}"] if known else [layer]


def their_name(layer: str) -> str:
    """Return GPT-2's name for one of our layers, the inverse of `our_names`."""
    prefix, _, last = layer.rpartition(".")
    if prefix.endswith(".attn") and last in ("q_proj", "k_proj", "v_proj"):
        return f"transformer.{prefix}.c_attn"
    for theirs, ours in HF_NAMES.items():
        if layer.endswith(f".{ours}"):
            return f"transformer.{layer.removesuffix(ours)}{theirs}"
    return layer if layer == "lm_head" else f"transformer.{layer}"


# ---- Reading


def from_hf_gpt2(folder: str | Path, dtype: Any = np.float32) -> GPT:
    """Load a GPT-2 that transformers saved.

    Dropout is set to 0, because GPT-2 also applies it to the attention weights.

    Parameters
    ----------
    folder
        Contains config.json and model.safetensors, whole or sharded, of a GPT2LMHeadModel, a
        GPT2Model or a GPT2ForSequenceClassification, whose `score` becomes the head.
    dtype
        np.float32 or np.float64.

    Raises
    ------
    CheckpointError
        If a file is damaged, is not a GPT-2, or has a setting that is not supported.
    FileNotFoundError
        If a file is missing.
    """
    folder, dtype = Path(folder), float_dtype(dtype)
    settings, stored = read_folder(folder)
    config = _config(folder / HF_CONFIG, settings)
    tensors = _without_prefix(stored, folder)
    score = tensors.pop("score.weight", None)
    if score is not None and (
            score.ndim != 2 or score.shape[1] != config.d_model or not score.size):
        raise CheckpointError(f"{folder}: score.weight has shape {score.shape}, not (classes, d)")
    if config.tie_weights and _has_own_head(tensors):
        config = replace(config, tie_weights=False)  # like transformers, use the stored head
    state = _our_state(tensors, config.tie_weights, folder)
    try:
        model = build_gpt(config, state, dtype)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} does not hold the GPT-2 of its config: {error.args[0]}"
        ) from None
    if score is not None:
        head = Linear(config.d_model, len(score), bias=False, dtype=dtype, rng=0)
        head.weight.data[...] = score.T
        model.lm_head = head
    return model


def _config(path: Path, hf: dict[str, Any]) -> GPTConfig:
    """Return the sizes in config.json, and refuse settings that change what GPT-2 computes."""
    width = hf.get("n_embd")
    allowed = {
        "model_type": ("gpt2",), "activation_function": HF_ACTIVATIONS,
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,), "quantization_config": (None,),
        "pruned_heads": (None, {}),
        "n_inner": (None, 4 * width if isinstance(width, int) else None),
    }
    refuse_settings(path, hf, allowed)
    try:
        return GPTConfig(
            hf["vocab_size"], hf["n_positions"], hf["n_embd"], hf["n_layer"], hf["n_head"],
            tie_weights=hf.get("tie_word_embeddings", True),
            layer_norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a GPT-2: {error}") from None


def _without_prefix(stored: Arrays, folder: Path) -> Arrays:
    """Return the arrays without "transformer." in their names, and without the buffers."""
    for name, array in stored.items():
        if array.dtype.kind != "f" and not name.endswith(HF_BUFFERS):
            raise CheckpointError(f"{folder}: {name} must be floating-point, got {array.dtype}")
        if f"transformer.{name}" in stored:
            raise CheckpointError(
                f"{folder}: {name} appears twice, with and without transformer."
            )
    return {
        name.removeprefix("transformer."): array
        for name, array in stored.items() if not name.endswith(HF_BUFFERS)
    }


def _has_own_head(tensors: Arrays) -> bool:
    """Whether there is an lm_head that differs from wte."""
    head, wte = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    return head is not None and (wte is None or not np.array_equal(head, wte))


def _our_state(tensors: Arrays, tied: bool, folder: Path) -> Arrays:
    """Return the arrays in our names and orientation; a tied head is left out, since it is wte."""
    state: Arrays = {}
    for name, array in tensors.items():
        layer, dot, kind = name.rpartition(".")
        if name == "lm_head.weight":
            if not tied:
                state[name] = array.T
            continue
        ours = our_names(layer)
        if not array.ndim or array.shape[-1] % len(ours):
            raise CheckpointError(f"{folder}: {name} has shape {array.shape}, not (.., 3d)")
        for our, piece in zip(ours, np.split(array, len(ours), axis=-1), strict=True):
            state[f"{our}{dot}{kind}"] = piece
    return state


# ---- Writing


def to_hf_gpt2(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors for GPT2LMHeadModel of transformers.

    A model without biases is written with biases of zero, which compute the same function.

    Parameters
    ----------
    model
        The model to write. It is not changed.
    folder
        The folder to write; it is created if it does not exist.

    Raises
    ------
    ValueError
        If the model has LoRA layers, or is not what its configuration says.
    """
    check_plain(model)
    tensors = _their_state(model.state_dict(), model.config)
    settings = _their_config(model.config)
    save_pair(Path(folder) / HF_WEIGHTS, tensors, Path(folder) / HF_CONFIG, settings)


def _their_state(state: Arrays, config: GPTConfig) -> Arrays:
    """Return the arrays of a GPT in the names and orientation of transformers."""
    tensors = {f"transformer.{name}": state[name] for name in ("wte.weight", "wpe.weight")}
    for i in range(config.n_layers):
        qkv = [f"h.{i}.attn.{part}_proj" for part in "qkv"]
        tensors |= _their_layer(state, f"h.{i}.attn.c_attn", qkv)
        for theirs, ours in HF_NAMES.items():
            tensors |= _their_layer(state, f"h.{i}.{theirs}", [f"h.{i}.{ours}"])
    tensors |= _their_layer(state, "ln_f", ["ln_f"])
    if not config.tie_weights:
        tensors["lm_head.weight"] = state["lm_head.weight"].T
    return tensors


def _their_layer(state: Arrays, theirs: str, ours: list[str]) -> Arrays:
    """Return weight and bias of one of their layers: those of ours, side by side."""
    weights = [state[f"{name}.weight"] for name in ours]
    biases = [
        state.get(f"{name}.bias", np.zeros(weight.shape[-1], weight.dtype))
        for name, weight in zip(ours, weights, strict=True)
    ]
    return {
        f"transformer.{theirs}.weight": np.concatenate(weights, axis=-1),
        f"transformer.{theirs}.bias": np.concatenate(biases),
    }


def _their_config(config: GPTConfig) -> dict[str, Any]:
    """Return what config.json contains."""
    c = config
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
        "n_positions": c.context_length, "n_embd": c.d_model, "n_layer": c.n_layers,
        "n_head": c.n_heads, "activation_function": "gelu_new",
        "layer_norm_epsilon": c.layer_norm_eps, "tie_word_embeddings": c.tie_weights,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": 0.0,
        "bos_token_id": None, "eos_token_id": None,
    }
