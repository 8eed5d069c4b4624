"""Adapters written to disk in PEFT's layout; `peft_read` describes it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.checkpoint import parameter_shapes
from minilora.files.gpt2 import our_names, their_name
from minilora.files.origin import settings_of
from minilora.files.peft_config import CONFIG_FILE, HEADS, PREFIX, WEIGHTS_FILE, Config, targeted
from minilora.files.peft_names import (
    Arrays,
    base_parameters,
    complete,
    in_our_names,
    is_embedding,
    linear_names,
    which_biases,
    whole_modules,
    with_stored_head,
)
from minilora.files.peft_read import as_adapter
from minilora.files.together import save_pair
from minilora.lora.adapter import Adapter, Factors, by_module, check_fits, get_adapter
from minilora.lora.dora import column_norms
from minilora.lora.surgery import base_modules
from minilora.nn.gpt import GPT
from minilora.nn.llama import Llama
from minilora.nn.module import Module
from minilora.nn.validate import CheckpointError

# ---- Under our names


def save_adapter(
    model: Module, path: str | Path, base: str | None = None, held_out_loss: float | None = None
) -> None:
    """Write the adapter that is on a model, under our names.

    It has A and B of every LoRA layer, and everything else that belongs to the task, such as a
    new head; see `get_adapter`. PEFT scales by alpha / r or alpha / sqrt(r). For a layer that
    scales by alpha alone, alpha * r is written, which gives the same update.

    Parameters
    ----------
    model
        Has LoRA layers. It is not changed.
    path
        The folder to write.
    base
        The name or path of the base, to be stored for those who load the adapter; None is enough
        for the bases that `load_base` knows by name.
    held_out_loss
        To be stored for those who compare adapters, in nats per token.

    Raises
    ------
    ValueError
        If there is no LoRA layer, or if PEFT cannot represent the adapter: DoRA and plain LoRA
        are mixed, a LoRA layer is also stored whole, a number is not finite, and the like.
        Nothing has been written then.
    """
    adapter = _storable(model)
    modules = base_modules(model)
    saved = {
        name: array if array.ndim < 2 or is_embedding(modules, name) else array.T
        for name, array in adapter.saved.items()
    }
    task = "CAUSAL_LM" if isinstance(model, Llama) else None  # our names are those of transformers
    settings = {"fan_in_fan_out": False, "task_type": task}
    settings |= settings_of(model, base, held_out_loss)
    adapter = Adapter(adapter.layers, saved, adapter.dropout)
    _write(model, adapter, Path(path), linear_names(modules), settings)


# ---- Under the names of transformers


def save_peft(model: GPT | Llama, path: str | Path, base: str | None = None) -> None:
    """Write the adapter that is on a GPT, for PEFT on the GPT-2 of transformers.

    A Llama has the names of transformers already, so for it this is `save_adapter`.

    q, k and v become c_attn, without approximation. If they have the same A, the rank stays; if
    not, it is the sum of their ranks. A new head becomes `score`, the head of
    GPT2ForSequenceClassification.

    Parameters
    ----------
    model
        Has LoRA layers. It is not changed.
    path
        The folder to write.
    base
        The name or path of the base, as for `save_adapter`.

    Raises
    ------
    TypeError
        If the model is not a GPT or a Llama.
    ValueError
        As `save_adapter`, or if a new head has a bias.
    """
    if isinstance(model, Llama):
        return save_adapter(model, path, base)
    if not isinstance(model, GPT):
        raise TypeError(f"save_peft is for a GPT or a Llama, got {type(model).__name__}")
    adapter = _storable(model)
    modules = base_modules(model)
    parameters = {name: parameter.data for name, parameter in base_parameters(modules).items()}
    shared = {id(modules[path]): f for path, f in adapter.layers.items()}  # a layer in two places
    everywhere = {path: shared[id(m)] for path, m in modules.items() if id(m) in shared}
    layers = _fused_layers(everywhere, parameters)
    saved = _fused_saved(adapter.saved, parameters)
    classifies = _classifies(model, adapter)
    if classifies:
        saved = _with_score(saved)
    saved |= {f"{head}.weight": saved[f"{head}.weight"].T
              for head in HEADS if f"{head}.weight" in saved}
    linears = list(dict.fromkeys(map(their_name, linear_names(modules))))
    settings = {"fan_in_fan_out": True, "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM"}
    settings |= settings_of(model, base)
    _write(model, Adapter(layers, saved, adapter.dropout), Path(path), linears, settings)


def _storable(model: Module) -> Adapter:
    """Return the model's adapter with everything that PEFT's layout needs.

    Raises ValueError if some layers are DoRA and some are plain, or if a parameter that is stored
    whole has not the size that the model's configuration says.
    """
    adapter = complete(model, with_stored_head(model, get_adapter(model)))
    sizes = parameter_shapes(model.config) if isinstance(model, GPT) else {}
    for name, array in adapter.saved.items():
        expected = sizes.get(name)
        if sizes and not name.startswith("lm_head.") and array.shape != expected:
            raise ValueError(f"{name} is {array.shape}, the config says {expected}: no base would "
                             "fit the adapter")
    if len({f.magnitude is None for f in adapter.layers.values()}) > 1:
        raise ValueError("PEFT has one use_dora for all layers: DoRA and plain LoRA are mixed here")
    return adapter


def _classifies(model: GPT, adapter: Adapter) -> bool:
    """Whether the head that is stored is not one logit for each token."""
    head = adapter.saved.get("lm_head.weight")
    vocabulary = (model.config.d_model, model.config.vocab_size)
    return head is not None and (head.shape != vocabulary or "lm_head.bias" in adapter.saved)


def _with_score(saved: Arrays) -> Arrays:
    """Rename the head to that of GPT2ForSequenceClassification."""
    if "lm_head.bias" in saved:
        raise ValueError("GPT2ForSequenceClassification's head has no bias: make it a "
                         "Linear(..., bias=False)")
    return {name.replace("lm_head.", "score."): array for name, array in saved.items()}


def _fused_saved(saved: Arrays, parameters: Arrays) -> Arrays:
    """Return what is stored whole under GPT-2's names; the base fills gaps in c_attn."""
    ours = parameters | saved
    fused: Arrays = {}
    for name, arrays in by_module(saved).items():
        theirs = their_name(name)
        for kind in arrays:
            parts = [f"{our}.{kind}" for our in our_names(theirs)]
            if missing := [part for part in parts if part not in ours]:
                raise ValueError(f"the model has no {missing[0]}, which {theirs} needs")
            pieces = [ours[part] for part in parts]
            fused[f"{theirs}.{kind}"] = np.concatenate(pieces, axis=-1)
    return fused


def _fused_layers(layers: dict[str, Factors], parameters: Arrays) -> dict[str, Factors]:
    """Return the factors under GPT-2's names."""
    names = dict.fromkeys(map(their_name, layers))
    return {theirs: _fuse(our_names(theirs), layers, parameters) for theirs in names}


def _fuse(names: list[str], layers: dict[str, Factors], parameters: Arrays) -> Factors:
    """Make one layer of [q, k, v], some of which may be missing; a single layer stays itself."""
    given = [layers[name] for name in names if name in layers]
    first = given[0]
    if len(names) == 1:
        return first
    distinct = _distinct([f.A for f in given])
    scale = first.scale if len({f.scale for f in given}) == 1 else 1.0
    weights = [parameters[f"{name}.weight"] for name in names]
    parts = [(layers.get(name), weight) for name, weight in zip(names, weights, strict=True)]
    # The B of a part is in the rows of its A and in its own columns; all else is zero.
    a = np.concatenate(distinct, axis=1)
    b = np.concatenate([_columns(f, w.shape[1], distinct, scale) for f, w in parts], axis=1)
    magnitude = None
    if first.magnitude is not None:
        magnitude = np.concatenate([_magnitude(f, weight) for f, weight in parts])
    if len(distinct) == 1 and scale == first.scale:
        return Factors(a, b, first.alpha, first.scaling, magnitude)
    return Factors(a, b, scale * a.shape[1], "alpha/r", magnitude)


def _distinct(matrices: list[np.ndarray]) -> list[np.ndarray]:
    """Return the matrices without those that are equal to an earlier one."""
    kept: list[np.ndarray] = []
    for matrix in matrices:
        if _position(matrix, kept) is None:
            kept.append(matrix)
    return kept


def _position(matrix: np.ndarray, among: list[np.ndarray]) -> int | None:
    """Return the index of the first matrix that is equal to this one, or None."""
    return next((i for i, other in enumerate(among) if np.array_equal(matrix, other)), None)


def _columns(
    f: Factors | None, width: int, distinct: list[np.ndarray], scale: float
) -> np.ndarray:
    """Return the columns of one part in the fused B, for the fused scale: (all ranks, width)."""
    ranks = [a.shape[1] for a in distinct]
    b = np.zeros((sum(ranks), width), np.result_type(*distinct))
    if f is not None:
        start = sum(ranks[: _position(f.A, distinct)])
        b[start : start + f.rank] = f.B if scale == f.scale else (f.scale / scale) * f.B
    return b


def _magnitude(f: Factors | None, weight: np.ndarray) -> np.ndarray:
    """Return the magnitudes of one part; those of the base's weight (in, out) if it has none."""
    return column_norms(weight) if f is None or f.magnitude is None else f.magnitude


# ---- The files


def _write(
    model: Module, adapter: Adapter, folder: Path, linears: list[str], extra: Config
) -> None:
    """Write an adapter in the file's names and orientation; `linears` are all of the model's."""
    settings, tensors = _settings(adapter, linears) | extra, _tensors(adapter)
    try:
        found, _ = in_our_names(model, *as_adapter(folder, settings, tensors))
        check_fits(model, found)
    except CheckpointError as error:  # a file that nobody could read must not replace another
        raise ValueError(f"PEFT's files cannot hold this adapter: {error}") from None
    save_pair(folder / WEIGHTS_FILE, tensors, folder / CONFIG_FILE, settings)


def _settings(adapter: Adapter, linears: list[str]) -> Config:
    """Return the settings that describe an adapter; ValueError if PEFT cannot express it."""
    layers, names, whole = adapter.layers, sorted(adapter.layers), whole_modules(adapter.saved)
    dora = any(f.magnitude is not None for f in layers.values())
    if both := set(whole) & set(layers):
        raise ValueError(f"{', '.join(sorted(both))}: PEFT has no LoRA on a module stored whole")
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        **_scale_settings(layers, dora),
        "lora_dropout": adapter.dropout,
        "target_modules": names,
        "modules_to_save": whole or None,
        "bias": which_biases(adapter),
    }
    if {name for name in linears if targeted(config, name)} != set(layers):
        config["target_modules"] = "|".join(map(re.escape, names))  # a regex fits whole names
    return config


def _scale_settings(layers: dict[str, Factors], use_dora: bool) -> Config:
    """Return rank and alpha: the most common ones, and patterns for the layers that differ."""
    rslora = all(f.scaling == "alpha/sqrt(r)" for f in layers.values())
    ranks = {name: f.rank for name, f in layers.items()}
    alphas = {name: _peft_alpha(f, rslora) for name, f in layers.items()}
    (rank, _), = Counter(ranks.values()).most_common(1)
    (alpha, _), = Counter(alphas.values()).most_common(1)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "use_dora": use_dora,
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
    }


def _peft_alpha(f: Factors, rslora: bool) -> float:
    """Return the alpha that gives the layer's scale by PEFT's rule."""
    if f.scaling == "alpha/r" or rslora:
        return f.alpha
    return f.alpha * f.rank if f.scaling == "alpha" else f.scale * f.rank


def _exceptions(values: dict[str, Any], common: Any) -> dict[str, Any]:
    """Return {pattern: value} for the layers whose value is not the common one."""
    # A pattern also fits the end of a name: ^ prevents "0" from matching "1.0".
    return {f"^{re.escape(n)}": values[n] for n in sorted(values) if values[n] != common}


def _tensors(adapter: Adapter) -> Arrays:
    """Return {PEFT's name: array} for everything in the adapter."""
    tensors: Arrays = {}
    for name, f in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = f.A.T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = f.B.T
        if f.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = f.magnitude
    for name, array in adapter.saved.items():
        module, _, kind = name.rpartition(".")
        inner = ".base_layer" if module in adapter.layers else ""
        tensors[f"{PREFIX}{module}{inner}.{kind}"] = array
    return tensors
