"""Translate an adapter from a file to the names and orientation of this library.

A file uses the layer names of the model that it was made for. If that is transformers' GPT-2,
c_attn becomes q, k and v here. Matrices that are stored whole are (out, in) in a file, except
those of transformers' Conv1D and of embeddings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.files.gpt2 import our_names, their_name
from minilora.files.peft_config import BASE_WEIGHT, HEADS, Config, stored_whole, targeted
from minilora.lora.adapter import Adapter, Factors, by_module
from minilora.lora.surgery import base_modules
from minilora.nn.gpt import GPT
from minilora.nn.layers import Embedding, Linear, TiedHead
from minilora.nn.llama import Llama
from minilora.nn.module import Module, Parameter
from minilora.nn.validate import CheckpointError

Modules = dict[str, Module]
Arrays = dict[str, np.ndarray]


# ---- The base


def linear_names(base: Modules) -> list[str]:
    """Return the dotted names of the Linears among the modules of a base."""
    return [name for name, module in base.items() if isinstance(module, Linear)]


def base_parameters(base: Modules) -> dict[str, Parameter]:
    """Return {dotted name: Parameter} for the modules of a base."""
    return {
        f"{path}.{kind}": value
        for path, module in base.items()
        for kind, value in vars(module).items() if isinstance(value, Parameter)
    }


def is_embedding(base: Modules, parameter: str) -> bool:
    """Whether the dotted name is that of an Embedding's parameter."""
    return isinstance(base.get(parameter.rpartition(".")[0]), Embedding)


def complete(model: Module, adapter: Adapter) -> Adapter:
    """Add from the base what PEFT stores together with something that is stored whole.

    It has no way to store one bias out of many, or a weight without its bias.
    """
    saved, base = adapter.saved, base_modules(model)
    rule = {"modules_to_save": whole_modules(saved), "bias": which_biases(adapter)}
    added: Arrays = {}
    for name, parameter in base_parameters(base).items():
        module, _, kind = name.rpartition(".")
        is_head = module == "lm_head" and _embedding(model)  # has what it has
        if not is_head and stored_whole(rule, module, kind, module in adapter.layers):
            added[name] = parameter.data
    return Adapter(adapter.layers, added | saved, adapter.dropout)


def whole_modules(saved: Arrays) -> list[str]:
    """Return the names of the modules of which more than the bias is stored whole."""
    return [module for module, arrays in by_module(saved).items() if arrays.keys() != {"bias"}]


def which_biases(adapter: Adapter) -> str:
    """Return PEFT's `bias`: "none", "lora_only" or "all"."""
    whole = whole_modules(adapter.saved)
    biased = [module for module in by_module(adapter.saved) if module not in whole]
    return "none" if not biased else "lora_only" if set(biased) <= set(adapter.layers) else "all"


# ---- Tied heads


def with_stored_head(model: Module, adapter: Adapter) -> Adapter:
    """Store a tied embedding as the head as well, since PEFT does not tie what it saves.

    The adapter is returned unchanged if it has no embedding, or if the model's head is not tied.
    """
    table = _embedding(model)
    if table not in adapter.saved or not isinstance(model.lm_head, TiedHead):
        return adapter
    head = {"lm_head.weight": adapter.saved[table].T}
    return Adapter(adapter.layers, adapter.saved | head, adapter.dropout)


def _embedding(model: Module) -> str:
    """Return the name of the table that a tied head shares; "" for other models."""
    return ("wte.weight" if isinstance(model, GPT) else
            "model.embed_tokens.weight" if isinstance(model, Llama) else "")


def _without_tied_head(model: Module, base: Modules, saved: Arrays) -> tuple[Arrays, bool]:
    """Return what is stored without a head that is tied, and whether the base's was added."""
    table = _embedding(model)
    if table not in saved or not model.config.tie_weights:
        return saved, False
    stored = "lm_head.weight" in saved  # if it is not, PEFT's head remains the base's embedding
    head = saved["lm_head.weight"] if stored else base_parameters(base)[table].data.T
    rest = {name: array for name, array in saved.items() if name != "lm_head.weight"}
    if np.array_equal(head.T, saved[table]):
        return rest, False
    return rest | {"lm_head.weight": head}, not stored


def _refuse_tied_target(model: Module, linears: list[str], adapter: Adapter) -> None:
    """Raise CheckpointError if the adapter is for a head that is tied."""
    table = _embedding(model)
    tied = table and model.config.tie_weights and "lm_head" not in linears
    if tied and "lm_head" in adapter.layers:
        raise CheckpointError("lm_head is a target, but the head of this model is tied to "
                              f"{table.removesuffix('.weight')}: it has no matrix of its own to "
                              "adapt")


# ---- Translation


def in_our_names(model: Module, config: Config, adapter: Adapter) -> tuple[Adapter, bool]:
    """Translate an adapter, after checking that it fits its configuration.

    Parameters
    ----------
    model
        The model that the adapter will be attached to. It is not changed.
    config
        The settings, from `checked_config`.
    adapter
        The adapter in the names and orientation of the file.

    Returns
    -------
    adapter
        The adapter in our names and orientation.
    frozen_head
        Whether its lm_head is the base's wte, which the task does not train.

    Raises
    ------
    CheckpointError
        If layers, configuration and model contradict each other.
    """
    if not isinstance(model, Module):
        raise TypeError(f"expected a Module to load onto, got {type(model).__name__}")
    base = base_modules(model)
    linears = linear_names(base)
    theirs = _has_their_names(model, linears, adapter)
    _check_targets(config, adapter, _their_linears(linears, adapter) if theirs else linears)
    _refuse_tied_target(model, linears, adapter)
    layers = _our_layers(adapter.layers, theirs)
    saved = _our_saved(model, base, adapter.saved)
    _check_complete(config, base, layers, saved, theirs)
    saved, frozen_head = _without_tied_head(model, base, saved)
    return Adapter(layers, saved, adapter.dropout), frozen_head


def _has_their_names(model: Module, linears: list[str], adapter: Adapter) -> bool:
    """Whether the adapter's layers have the names of transformers' GPT-2, and the model is one."""
    if not isinstance(model, GPT) or set(adapter.layers) <= set(linears):
        return False
    return any(our in linears for name in adapter.layers for our in our_names(name))


def _their_linears(linears: list[str], adapter: Adapter) -> list[str]:
    """Return GPT-2's names for our Linears, without "transformer." if the adapter's have none."""
    names = list(dict.fromkeys(map(their_name, linears)))
    if any(name.startswith("transformer.") for name in adapter.layers):
        return names
    return [name.removeprefix("transformer.") for name in names]


def _check_targets(config: Config, adapter: Adapter, linears: list[str]) -> None:
    """Check that there are factors for the targets and for nothing else."""
    untargeted = [name for name in adapter.layers if not targeted(config, name)]
    if untargeted:
        raise CheckpointError(f"target_modules does not fit {', '.join(untargeted[:5])}, for "
                              "which there are factors")
    missing = [n for n in linears if targeted(config, n) and n not in adapter.layers]
    if missing and set(adapter.layers) <= set(linears):
        raise CheckpointError("there are no factors for the targets " + ", ".join(missing[:5]))


def _our_layers(layers: dict[str, Factors], theirs: bool) -> dict[str, Factors]:
    """Return the factors under our names; those of one c_attn share its A."""
    ours: dict[str, Factors] = {}
    for name, f in layers.items():
        names = our_names(name) if theirs else [name]
        columns = _split(f.B, names, name)
        magnitudes = ([None] * len(names) if f.magnitude is None
                      else _split(f.magnitude, names, name))
        for our, b, magnitude in zip(names, columns, magnitudes, strict=True):
            _put(ours, our, Factors(f.A, b, f.alpha, f.scaling, magnitude))
    return ours


def _our_saved(model: Module, base: Modules, saved: Arrays) -> Arrays:
    """Return the arrays stored whole under our names, without those of the base."""
    parameters = base_parameters(base)
    ours: Arrays = {}
    for name, array in saved.items():
        plain = name.replace(BASE_WEIGHT, ".weight").replace(".original_module.", ".")
        module, _, kind = plain.rpartition(".")
        names = _our_modules(model, base, module)
        conv1d = module not in base and names != ["lm_head"]
        if array.ndim == 2 and not conv1d and not is_embedding(base, f"{names[0]}.{kind}"):
            array = array.T
        for our, piece in zip(names, _split(array, names, name), strict=True):
            if name == plain:
                _put(ours, f"{our}.{kind}", piece)
            else:
                _check_base(parameters, f"{our}.{kind}", piece)
    return ours


def _our_modules(model: Module, base: Modules, module: str) -> list[str]:
    """Return our names for a module of the file."""
    ours = our_names(module) if isinstance(model, GPT) and module not in base else [module]
    is_head = isinstance(model, GPT) and ours == ["score"]
    return ["lm_head"] if is_head else ours


def _split(array: np.ndarray, names: list[str], what: str) -> list[np.ndarray]:
    """Split the last axis into one part for each name."""
    if array.shape[-1] % len(names):
        raise CheckpointError(f"{what} has {array.shape[-1]} outputs, not 3d for q, k and v")
    return np.split(array, len(names), axis=-1)


def _put(place: dict[str, Any], name: str, value: Any) -> None:
    """Set place[name], which must not exist yet."""
    if name in place:
        raise CheckpointError(f"two entries of the file are for {name}")
    place[name] = value


# ---- Checks


def _check_base(parameters: dict[str, Parameter], name: str, array: np.ndarray) -> None:
    """Check that a parameter of the base that PEFT stored is equal to the model's."""
    if name not in parameters or not np.array_equal(parameters[name].data, array):
        raise CheckpointError(f"the file has the base's own {name} as well, and it differs from "
                              "this model's (another base, or one in half precision)")


def _check_complete(
    config: Config, base: Modules, layers: dict[str, Factors], saved: Arrays, theirs: bool
) -> None:
    """Check that everything that the configuration stores whole is there."""
    missing = []
    for name in base_parameters(base):
        path, _, kind = name.rpartition(".")
        module = their_name(path) if theirs else path
        if name not in saved and stored_whole(config, module, kind, path in layers):
            missing.append(f"{module}.{kind}")
    if isinstance(base[""], GPT) and not any(name.startswith("lm_head.") for name in saved):
        missing += [f"{head}.weight" for head in HEADS if head in config["modules_to_save"]]
    if missing:
        raise CheckpointError("the configuration says that there are "
                              + ", ".join(dict.fromkeys(missing[:5]))
                              + ", but the file does not have them")
    if config["modules_to_save"] and not saved:
        raise CheckpointError("the file has none of modules_to_save, "
                              + ", ".join(config["modules_to_save"]))
