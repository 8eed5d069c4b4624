"""GPT-2 checkpoints of Hugging Face's transformers, to and from, without torch.

Its Conv1D stores weights (in, out), as we do; its other linears (out, in). q, k and v stand side
by side in one matrix, c_attn (d, 3d).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.checkpoint import (
    CheckpointError,
    check_checkpoint_sizes,
    check_plain,
    load_safetensors,
    save_safetensors,
    write_atomically,
)
from minilora.nn.gpt import GPT, GPTConfig
from minilora.nn.layers import Linear
from minilora.nn.module import float_dtype

HF_NAMES = {
    "attn.c_proj": "attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    "ln_1": "ln_1", "ln_2": "ln_2",
}
HF_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of the tanh form
HF_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, stored by older versions


def our_names(layer: str) -> list[str]:
    """Return our names for a layer of GPT-2, "transformer." in front or not; three for c_attn.

    Whatever is no such layer keeps its name.
    """
    layer = layer.removeprefix("transformer.")
    prefix, _, last = layer.rpartition(".")
    if last == "c_attn" and re.fullmatch(r"h\.\d+\.attn", prefix):
        return [f"{prefix}.{part}_proj" for part in "qkv"]
    block, _, rest = layer.removeprefix("h.").partition(".")
    known = rest in HF_NAMES and layer == f"h.{block}.{rest}"
    return [f"h.{block}.{HF_NAMES[rest]}"] if known else [layer]


def their_name(layer: str) -> str:
    """Return GPT-2's name for one of our layers: the other way round."""
    prefix, _, last = layer.rpartition(".")
    if prefix.endswith(".attn") and last in ("q_proj", "k_proj", "v_proj"):
        return f"transformer.{prefix}.c_attn"
    for theirs, ours in HF_NAMES.items():
        if layer.endswith(f".{ours}"):
            return f"transformer.{layer.removesuffix(ours)}{theirs}"
    return layer if layer == "lm_head" else f"transformer.{layer}"


def from_hf_gpt2(folder: str | Path, dtype: Any = np.float32) -> GPT:
    """Load a GPT-2 that transformers saved: config.json and model.safetensors, whole or sharded.

    GPT2LMHeadModel, GPT2Model, or GPT2ForSequenceClassification, whose `score` becomes the head.
    Dropout is set to 0: GPT-2's is on the attention weights too. CheckpointError where a file is
    not sound, is no GPT-2, or has a setting that this library cannot honour.
    """
    folder, dtype = Path(folder), float_dtype(dtype)
    config = _hf_config(folder / "config.json")
    stored = _hf_tensors(folder)
    tensors = {
        name.removeprefix("transformer."): array
        for name, array in stored.items() if not name.endswith(HF_BUFFERS)
    }
    for name in stored:
        if f"transformer.{name}" in stored:
            raise CheckpointError(f"{folder}: {name} stands twice, with and without transformer.")
    score = tensors.pop("score.weight", None)
    if score is not None and (score.ndim != 2 or score.shape[1] != config.d_model):
        raise CheckpointError(f"{folder}: score.weight has shape {score.shape}, not (classes, d)")
    head = tensors.get("lm_head.weight")
    if config.tie_weights and head is not None and not np.array_equal(
        head, tensors.get("wte.weight")
    ):
        config = replace(config, tie_weights=False)  # as transformers does: the stored head counts
    state = {}
    for name, array in tensors.items():
        layer, dot, kind = name.rpartition(".")
        if name == "lm_head.weight":
            if not config.tie_weights:  # tied, it is wte once more
                state[name] = array.T
            continue
        ours = our_names(layer)
        if not array.ndim or array.shape[-1] % len(ours):
            raise CheckpointError(f"{folder}: {name} has shape {array.shape}, not (.., 3d)")
        for our, piece in zip(ours, np.split(array, len(ours), axis=-1), strict=True):
            state[f"{our}{dot}{kind}"] = piece
    try:
        check_checkpoint_sizes(config, {name: array.shape for name, array in state.items()})
        model = GPT(config, dtype=dtype)
        model.load_state_dict(state)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a GPT-2 of its config: {error.args[0]}") from None
    if score is not None:
        model.lm_head = Linear(config.d_model, len(score), bias=False, dtype=dtype, rng=0)
        model.lm_head.weight.data[...] = score.T
    return model


def _hf_config(path: Path) -> GPTConfig:
    hf = read_json(path)
    width = hf.get("n_embd")
    neutral = {
        "model_type": ("gpt2",), "activation_function": HF_ACTIVATIONS,
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "n_inner": (None, 4 * width if isinstance(width, int) else None),
    }
    refuse_settings(path, hf, neutral)
    try:
        return GPTConfig(
            hf["vocab_size"], hf["n_positions"], hf["n_embd"], hf["n_layer"], hf["n_head"],
            tie_weights=hf.get("tie_word_embeddings", True),
            layer_norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a GPT-2: {error}") from None


def _hf_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Read model.safetensors, or all the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return load_safetensors(folder / "model.safetensors")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")
        and shard.isprintable() for shard in shards.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map names to files of this folder")
    tensors = {}
    for shard in sorted(set(shards.values())):
        tensors |= load_safetensors(folder / shard)
    if set(tensors) != set(shards):
        odd = sorted(set(tensors) ^ set(shards))
        raise CheckpointError(f"{index} and its shards disagree on {', '.join(odd[:5])}")
    return tensors


def to_hf_gpt2(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors as transformers' GPT2LMHeadModel loads them.

    A model without biases gets zeros for them, which is the same function. ValueError for a
    model with LoRA layers or another head.
    """
    check_plain(model)
    state, c = model.state_dict(), model.config
    tensors = {f"transformer.{name}": state[name] for name in ("wte.weight", "wpe.weight")}

    def put(theirs: str, *ours: str) -> None:
        weights = [state[f"{name}.weight"] for name in ours]
        biases = [
            state.get(f"{name}.bias", np.zeros(weight.shape[-1], weight.dtype))
            for name, weight in zip(ours, weights, strict=True)
        ]
        tensors[f"transformer.{theirs}.weight"] = np.concatenate(weights, axis=-1)
        tensors[f"transformer.{theirs}.bias"] = np.concatenate(biases)

    for i in range(c.n_layers):
        put(f"h.{i}.attn.c_attn", *(f"h.{i}.attn.{part}_proj" for part in "qkv"))
        for theirs, ours in HF_NAMES.items():
            put(f"h.{i}.{theirs}", f"h.{i}.{ours}")
    put("ln_f", "ln_f")
    if not c.tie_weights:
        tensors["lm_head.weight"] = state["lm_head.weight"].T
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
        "n_positions": c.context_length, "n_embd": c.d_model, "n_layer": c.n_layers,
        "n_head": c.n_heads, "activation_function": "gelu_new",
        "layer_norm_epsilon": c.layer_norm_eps, "tie_word_embeddings": c.tie_weights,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": 0.0,
        "bos_token_id": None, "eos_token_id": None,
    }
    text = json.dumps(config, indent=2).encode()
    save_safetensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
    write_atomically(Path(folder) / "config.json", text)


def refuse_settings(path: Path, settings: dict[str, Any], neutral: dict[str, tuple]) -> None:
    """Raise CheckpointError for a setting that has a value other than those known to do nothing."""
    for key, values in neutral.items():
        if key in settings and settings[key] not in values:
            raise CheckpointError(f"{path}: {key} = {repr(settings[key])[:80]} is not supported")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. CheckpointError where the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
