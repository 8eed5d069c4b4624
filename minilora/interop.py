"""To and from Hugging Face: PEFT's adapters and transformers' GPT-2, without torch.

Adapters are stored in the layout of PEFT, so that there is one format and not two. A folder
holds `adapter_config.json` (rank, alpha, targets) and `adapter_model.safetensors` with, for each
adapted layer, two arrays: lora_A.weight (r, in) and lora_B.weight (out, r). Those are the
transposes of our A and B, and this is the one file where anything is transposed.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from minilora.checkpoint import (
    CheckpointError,
    check_checkpoint_sizes,
    check_plain,
    load_safetensors,
    save_safetensors,
    write_atomically,
)
from minilora.gpt import GPT, GPTConfig
from minilora.layers import Linear
from minilora.lora import SCALINGS, LinearWithLoRA, freeze_base, lora_layers
from minilora.module import Module, closest, float_dtype, make_rng

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings that change what an adapter computes, with the value at which they do nothing.
UNSUPPORTED = {
    "bias": ("none",), "use_dora": (False, None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "layers_to_transform": (None,), "exclude_modules": (None, []), "lora_bias": (False, None),
    "trainable_token_indices": (None,), "layer_replication": (None,), "megatron_config": (None,),
    "target_parameters": (None, []), "alora_invocation_tokens": (None,),
}


def save_adapter(model: Module, path: str | Path) -> None:
    """Write the A and B of every LoRA layer, and nothing else, to the folder `path`.

    PEFT's scale is alpha / r (or alpha / sqrt(r)); of a layer that scales by alpha alone,
    alpha * r is written, which stands for the same update. Raises ValueError where there is
    no LoRA layer, or where ranks or scales differ between layers.
    """
    _refuse_bare(model)
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers to save: call replace_linear_with_lora")
    kinds = {(layer.lora.rank, layer.lora.alpha, layer.lora.scaling) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(f"all layers must have one rank, alpha and scaling; found {sorted(kinds)}")
    ((rank, alpha, scaling),) = kinds
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha * rank if scaling == "alpha" else alpha,
        "use_rslora": scaling == "alpha/sqrt(r)",
        "lora_dropout": next(iter(layers.values())).dropout.p,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora.A.data.T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora.B.data.T
    text = json.dumps(config, indent=2).encode()  # should it fail, then before anything is written
    save_safetensors(Path(path) / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_atomically(Path(path) / CONFIG_FILE, text)


def load_adapter(model: Module, path: str | Path) -> Module:
    """Attach the adapter in the folder `path` (or one of its two files) and return the model.

    Plain Linears are wrapped; layers that are wrapped already, as an earlier adapter left
    them, get the new A and B. The base is frozen and otherwise untouched. Everything is
    checked before anything is changed: CheckpointError where the files are not sound or do
    not fit the model, with all the names and shapes that differ.
    """
    _refuse_bare(model)
    settings, factors = read_adapter(path)
    modules = dict(model.named_modules())
    names = [name for name, m in modules.items() if isinstance(m, (Linear, LinearWithLoRA))]
    faults = []
    for name, (a, b) in factors.items():
        module = modules.get(name)
        if isinstance(module, LinearWithLoRA):
            if module.merged:
                faults.append(f"{name} is merged: unmerge it first")
            module = module.linear
        if not isinstance(module, Linear):
            faults.append(f"the model has no linear layer {name!r}{closest(name, names)}")
        elif (a.shape[0], b.shape[1]) != module.weight.shape:
            faults.append(
                f"{name} is {module.weight.shape} in the model, "
                f"{(a.shape[0], b.shape[1])} in the adapter"
            )
    faults += [
        f"{name} has a LoRA layer that the adapter does not: remove_lora first"
        for name, _ in lora_layers(model) if name not in factors
    ]
    if faults:
        raise CheckpointError(f"{path} does not fit the model: " + "; ".join(faults))
    rng = make_rng(0)
    replaced: dict[int, LinearWithLoRA] = {}
    for name, (a, b) in factors.items():
        layer = modules[name]
        linear = layer.linear if isinstance(layer, LinearWithLoRA) else layer
        with warnings.catch_warnings(action="ignore"):  # of a rank that is not ours to choose
            new = LinearWithLoRA(linear, rng=rng, **settings)
        if isinstance(layer, LinearWithLoRA) and layer.lora.rank == new.lora.rank:
            # The same Parameters stay, since an optimizer may hold them.
            new.lora.A, new.lora.B = layer.lora.A, layer.lora.B
        new.lora.A.data[...], new.lora.B.data[...] = a, b
        replaced[id(layer)] = new.train(linear.training)
    for parent in modules.values():
        for child_name, child in list(parent.named_children()):
            if id(child) in replaced:  # at every place where it stands
                setattr(parent, child_name, replaced[id(child)])
    freeze_base(model)
    return model


def read_adapter(
    path: str | Path,
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Read an adapter without a model: its settings and {layer: (A (in, r), B (r, out))}.

    `path` is the folder or one of its two files. CheckpointError where they are not sound.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    settings = _read_config(folder / CONFIG_FILE)
    return settings, _read_factors(folder / WEIGHTS_FILE, settings["rank"])


def describe_adapter(path: str | Path) -> str:
    """Say what is in an adapter: its settings, and for each layer shapes and size of its update.

    The size is the Frobenius norm of scale * A B, by the (r, r) products AᵀA and BBᵀ, so that
    the update itself, as large as the weight, need not be formed.
    """
    settings, factors = read_adapter(path)
    scale = SCALINGS[settings["scaling"]](settings["alpha"], settings["rank"])
    count = sum(a.size + b.size for a, b in factors.values())
    lines = [
        f"LoRA adapter: rank {settings['rank']}, alpha {settings['alpha']}, scaling "
        f"{settings['scaling']} = {scale:g}, dropout {settings['dropout']:g}",
        f"{len(factors)} layers, {count:,} parameters, "
        f"{sum(a.nbytes + b.nbytes for a, b in factors.values()):,} bytes",
        "norm of the update, scale * A B, by layer:",
    ]
    for name, (a, b) in factors.items():
        a, b = a.astype(np.float64), b.astype(np.float64)
        norm = abs(scale) * np.sqrt(np.clip(((a.T @ a) * (b @ b.T)).sum(), 0.0, None))
        lines.append(f"  {name}: {norm:.4g}  ({a.shape[0]}, {b.shape[1]})")
    return "\n".join(lines)


def _refuse_bare(model: Module) -> None:
    if isinstance(model, (Linear, LinearWithLoRA)):
        raise TypeError("an adapter belongs to a model with named layers, not to a bare Linear")


def _read_config(path: Path) -> dict[str, Any]:
    """Return rank, alpha, scaling and dropout; what cannot be honoured is an error."""
    config = _read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} does not describe a LoRA adapter (peft_type LORA)")
    _refuse_settings(path, config, UNSUPPORTED)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout = config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r must be a whole number of 1 or more, got {rank!r}")
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise CheckpointError(f"{path}: {key} must be a finite number, got {value!r}")
    if not 0.0 <= dropout < 1.0:
        raise CheckpointError(f"{path}: lora_dropout must be in 0..1, got {dropout}")
    if config.get("use_rslora", False) not in (True, False, None):
        raise CheckpointError(f"{path}: use_rslora must be true or false")
    scaling = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r"
    return {"rank": rank, "alpha": alpha, "scaling": scaling, "dropout": float(dropout)}


def _read_factors(path: Path, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {layer: (A (in, r), B (r, out))} from the tensors of a PEFT adapter."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_safetensors(path).items():
        name, dot, factor = key.removesuffix(".weight").rpartition(".")
        if not dot or factor not in ("lora_A", "lora_B") or not key.endswith(".weight"):
            raise CheckpointError(f"{path}: {key} is not a lora_A.weight or lora_B.weight")
        if array.ndim != 2 or array.dtype.kind != "f":
            raise CheckpointError(f"{path}: {key} must be a matrix of floating-point numbers")
        pair = pairs.setdefault(name.removeprefix(PREFIX), {})
        if factor in pair:
            raise CheckpointError(f"{path}: {key} stands twice, with and without {PREFIX}")
        pair[factor] = array.T
    factors = {}
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise CheckpointError(f"{path}: {name} has only {next(iter(pair))}")
        a, b = pair["lora_A"], pair["lora_B"]
        if a.shape[1] != rank or b.shape[0] != rank:
            raise CheckpointError(
                f"{path}: {name} has factors of rank {a.shape[1]} and {b.shape[0]}, "
                f"the configuration says {rank}"
            )
        factors[name] = a, b
    if not factors:
        raise CheckpointError(f"{path} holds no LoRA factors")
    return factors


# ---- GPT-2 checkpoints of transformers. Its Conv1D stores weights (in, out), as we do; q, k and
# v stand side by side in one matrix, c_attn (d, 3d).

HF_NAMES = {
    "attn.c_proj": "attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    "ln_1": "ln_1", "ln_2": "ln_2",
}
HF_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of the tanh form
HF_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, stored by older versions


def from_hf_gpt2(folder: str | Path, dtype: Any = np.float32) -> GPT:
    """Load a GPT-2 that transformers saved: config.json and model.safetensors, whole or sharded.

    Dropout is set to 0: GPT-2's is on the attention weights too. CheckpointError where a file is
    not sound, is no GPT-2, or has a setting that this library cannot honour.
    """
    folder, dtype = Path(folder), float_dtype(dtype)
    config = _hf_config(folder / "config.json")
    tensors = {
        name.removeprefix("transformer."): array
        for name, array in _hf_tensors(folder).items() if not name.endswith(HF_BUFFERS)
    }
    state = {}
    for name, array in tensors.items():
        layer, dot, kind = name.rpartition(".")
        if layer.endswith(".attn.c_attn"):
            prefix = layer.removesuffix("c_attn")
            if array.shape[-1:] != (3 * config.d_model,):
                raise CheckpointError(f"{folder}: {name} has shape {array.shape}, not (.., 3d)")
            for part, piece in zip("qkv", np.split(array, 3, axis=-1), strict=True):
                state[f"{prefix}{part}_proj.{kind}"] = piece
        elif name == "lm_head.weight":
            if not config.tie_weights:  # tied, it is wte once more
                state[name] = array.T
        else:
            h, _, rest = layer.partition(".")[2].partition(".")
            ours = f"h.{h}.{HF_NAMES[rest]}" if rest in HF_NAMES else layer
            state[f"{ours}{dot}{kind}"] = array
    try:
        check_checkpoint_sizes(config, {name: array.shape for name, array in state.items()})
        model = GPT(config, dtype=dtype)
        model.load_state_dict(state)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a GPT-2 of its config: {error.args[0]}") from None
    return model


def _hf_config(path: Path) -> GPTConfig:
    hf = _read_json(path)
    width = hf.get("n_embd")
    neutral = {
        "model_type": ("gpt2",), "activation_function": HF_ACTIVATIONS,
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "n_inner": (None, 4 * width if isinstance(width, int) else None),
    }
    _refuse_settings(path, hf, neutral)
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
    shards = _read_json(index).get("weight_map")
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


def _refuse_settings(path: Path, settings: dict[str, Any], neutral: dict[str, tuple]) -> None:
    """Raise CheckpointError for a setting that has a value other than those known to do nothing."""
    for key, values in neutral.items():
        if key in settings and settings[key] not in values:
            raise CheckpointError(f"{path}: {key} = {settings[key]!r} is not supported")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value
