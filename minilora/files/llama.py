"""Read and write Llamas of Hugging Face's transformers without torch.

The names of parameters are the same. A linear layer is stored as (out, in), the transpose of ours.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.hf_folder import HF_CONFIG, HF_WEIGHTS, read_folder
from minilora.files.plain import check_shapes, check_unwrapped, not_there
from minilora.files.settings import refuse_settings
from minilora.files.together import save_pair
from minilora.nn.llama import GroupedQueryAttention, Llama, LlamaConfig, RMSNorm, RopeScaling
from minilora.nn.module import Parameter
from minilora.nn.validate import CheckpointError, float_dtype

EMBEDDING = "model.embed_tokens.weight"


# ---- Building


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of every parameter of a Llama."""
    c = config
    heads, groups = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (c.d_model,), "self_attn.q_proj": (c.d_model, heads),
        "self_attn.k_proj": (c.d_model, groups), "self_attn.v_proj": (c.d_model, groups),
        "self_attn.o_proj": (heads, c.d_model), "post_attention_layernorm": (c.d_model,),
        "mlp.gate_proj": (c.d_model, c.d_ff), "mlp.up_proj": (c.d_model, c.d_ff),
        "mlp.down_proj": (c.d_ff, c.d_model),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab_size, c.d_model)}
    for i in range(c.n_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (c.d_model,)
    return shapes if c.tie_weights else shapes | {"lm_head.weight": (c.d_model, c.vocab_size)}


def build_llama(config: LlamaConfig, parameters: dict[str, Parameter], source: Any) -> Llama:
    """Return a Llama that consists of these parameters; no others are drawn or allocated.

    Raises
    ------
    CheckpointError
        If they are not those of the configuration; `source` is named.
    """
    if config.n_layers > len(parameters):  # a file may claim any number
        raise CheckpointError(f"{source}: {config.n_layers} layers, but only {len(parameters)} "
                              "arrays")
    for name, shape in (expected := parameter_shapes(config)).items():
        found = parameters[name].shape if name in parameters else None
        if found != shape:
            raise CheckpointError(f"{source}: {name} should have shape {shape}, found {found}")
    if extra := sorted(parameters.keys() - expected.keys()):
        raise CheckpointError(f"{source}: a Llama of this config has no {', '.join(extra[:5])}")
    model = _smallest(config)
    for name, parameter in parameters.items():
        path = name.removesuffix(".weight").split(".")
        setattr(functools.reduce(getattr, path, model), "weight", parameter)  # noqa: B010
    return model


def _smallest(config: LlamaConfig) -> Llama:
    """Return a Llama with the modules of a configuration, but weights of the smallest sizes."""
    tiny = replace(config, vocab_size=1, d_model=1, d_ff=1, n_heads=1, n_kv_heads=1, head_dim=2)
    model = Llama(tiny)
    for _, module in model.named_modules():
        if isinstance(module, (Llama, GroupedQueryAttention)):
            module.config = config
    return model


def turned(name: str, array: np.ndarray) -> np.ndarray:
    """Return a parameter in the other orientation: ours from that of a file, or back."""
    return array if name == EMBEDDING or array.ndim < 2 else array.T


# ---- transformers


def from_hf_llama(folder: str | Path, dtype: Any = np.float32) -> Llama:
    """Load a Llama that transformers saved.

    Parameters
    ----------
    folder
        Contains config.json and model.safetensors, whole or sharded, of a LlamaForCausalLM, in
        float32, float16 or bfloat16.
    dtype
        np.float32 or np.float64, for the model.

    Raises
    ------
    CheckpointError
        If a file is damaged, is not a Llama, or has a setting that is not supported.
    FileNotFoundError
        If a file is missing.
    """
    folder, dtype = Path(folder), float_dtype(dtype)
    settings, stored = read_folder(folder)
    config = _hf_config(folder / HF_CONFIG, settings)
    head, embedding = stored.get("lm_head.weight"), stored.get(EMBEDDING)
    if config.tie_weights and head is not None:
        if embedding is not None and np.array_equal(head, embedding):
            del stored["lm_head.weight"]
        else:
            config = replace(config, tie_weights=False)  # like transformers, use the stored head
    parameters = {}
    for name in list(stored):
        array = stored.pop(name)  # one at a time, so that memory has each of them once
        if name.endswith(".rotary_emb.inv_freq"):  # stored by older versions; it is computed
            continue
        if array.dtype.kind != "f":
            raise CheckpointError(f"{folder}: {name} must be floating-point, got {array.dtype}")
        parameters[name] = Parameter(turned(name, array).astype(dtype), requires_grad=True)
    return build_llama(config, parameters, folder)


def _hf_config(path: Path, hf: dict[str, Any]) -> LlamaConfig:
    """Return the sizes in config.json, and refuse settings that change what a Llama computes."""
    refuse_settings(path, {"model_type": None, **hf}, {
        "model_type": ("llama",), "hidden_act": ("silu", "swish"), "attention_bias": (False, None),
        "mlp_bias": (False, None), "quantization_config": (None,), "pretraining_tp": (1, None),
        "partial_rotary_factor": (None, 1, 1.0),
    })
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    try:
        heads = hf["num_attention_heads"]
        kv_heads, theta = hf.get("num_key_value_heads"), rope.get("rope_theta", 10000.0)
        return LlamaConfig(
            hf["vocab_size"], hf["hidden_size"], hf["intermediate_size"], hf["num_hidden_layers"],
            heads, heads if kv_heads is None else kv_heads,
            hf.get("max_position_embeddings", 2048), hf.get("head_dim") or 0,
            hf.get("tie_word_embeddings", False), hf.get("rope_theta") or theta,
            _rope_scaling(path, rope), hf.get("rms_norm_eps", 1e-6),
        )
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a Llama: {error}") from None


def _rope_scaling(path: Path, rope: dict[str, Any]) -> RopeScaling | None:
    """Return Llama 3's scaling, or None if there is none; CheckpointError for another kind."""
    refuse_settings(path, rope, {"partial_rotary_factor": (None, 1, 1.0)})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{path}: rope scaling of kind {str(kind)[:80]!r} is not supported")
    return RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                       rope["original_max_position_embeddings"])


def to_hf_llama(model: Llama, folder: str | Path) -> None:
    """Write config.json and model.safetensors for LlamaForCausalLM of transformers.

    Parameters
    ----------
    model
        The model to write. It is not changed. Quantised weights are written in floating point.
    folder
        The folder to write; it is created if it does not exist.

    Raises
    ------
    ValueError
        If the model has LoRA layers, or is not what its configuration says.
    """
    check_plain_llama(model)
    tensors = {name: turned(name, p.data) for name, p in model.named_parameters()}
    c = model.config
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if (s := c.rope_scaling) is not None:
        rope |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                 "high_freq_factor": s.high_freq_factor,
                 "original_max_position_embeddings": s.original_context_length}
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": c.vocab_size,
        "hidden_size": c.d_model, "intermediate_size": c.d_ff, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim, "max_position_embeddings": c.context_length, "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta, "rope_scaling": (
            None if s is None else {k: v for k, v in rope.items() if k != "rope_theta"}),
        "rope_parameters": rope, "tie_word_embeddings": c.tie_weights, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": None, "eos_token_id": None,
    }
    save_pair(Path(folder) / HF_WEIGHTS, tensors, Path(folder) / HF_CONFIG, settings)


def check_plain_llama(model: Llama) -> None:
    """Raise ValueError if the model has LoRA layers, or is not what its configuration says."""
    if not isinstance(model, Llama):
        raise ValueError(f"expected a Llama, got {type(model).__name__}")
    check_unwrapped(model)
    check_shapes(model, parameter_shapes(model.config))
    usual = {name: type(module).forward for name, module in _smallest(model.config).named_modules()}
    for name, module in model.named_modules():
        same = type(module).forward is usual.get(name)
        if isinstance(module, RMSNorm):
            same = same and module.eps == model.config.rms_norm_eps
        if isinstance(module, GroupedQueryAttention):
            same = same and module.config == model.config
        if not same:
            raise not_there(name, module, "Llama")
