"""PEFT's adapter_config.json: its settings, and which layers they select.

The rules are those of PEFT, so that a configuration means the same here as there.
"""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

from minilora.files.patterns import PatternError, compiled, ends
from minilora.files.settings import refuse_settings
from minilora.nn.validate import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
BASE_WEIGHT = ".base_layer.weight"  # the base's own weight, stored with an adapted head
HEADS = ("lm_head", "score")  # of GPT-2 as a language model and as a classifier

# The settings that are read. Any other must be off, except the silent ones, which do not
# change what an adapter computes. (fan_in_fan_out says how the base stores its weights.)
HONOURED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "bias", "modules_to_save",
}
SILENT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
}
OFF = (None, False, [], {})
# Other ways to initialise A and B also change the weights of the base.
INITS = (True, None, "gaussian", "orthogonal", "eva", False)
DEFAULTS = {
    "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none",
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "target_modules": None,
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
}
NUMBER = re.compile(r"\.(\d+)\.")  # of a layer, inside a name

Config = dict[str, Any]


# ---- Reading


def checked_config(path: Path, settings: Config) -> Config:
    """Check the settings of an adapter.

    Parameters
    ----------
    path
        Their file, adapter_config.json, for the errors.
    settings
        {setting: value} as in the file.

    Returns
    -------
    dict
        The settings; those that were missing have their defaults.

    Raises
    ------
    CheckpointError
        If they are not about LoRA, or one is wrong or not supported.
    """
    config = dict(settings)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} does not describe a LoRA adapter (peft_type LORA)")
    allowed: dict[str, tuple[Any, ...]] = {key: OFF for key in config
                                           if key not in HONOURED | SILENT}
    allowed |= {"init_lora_weights": INITS, "bias": ("none", "lora_only", "all")}
    refuse_settings(path, config, allowed)
    config |= {key: copy.copy(DEFAULTS[key]) for key in DEFAULTS if config.get(key) is None}
    _check_numbers(path, config)
    _check_names(path, config)
    _check_layer_selection(path, config)
    _check(path, config, "target_modules", config["target_modules"] is not None, "given")
    return config


def _check(path: Path, config: Config, key: str, right: bool, what: str) -> None:
    """Raise CheckpointError, stating what the setting must be, unless it is right."""
    if not right:
        raise CheckpointError(f"{path}: {key} must be {what}, got {str(config.get(key))[:80]}")


def _check_numbers(path: Path, config: Config) -> None:
    """Check rank, alpha, dropout, the switches, and the patterns for rank and alpha."""
    check = functools.partial(_check, path, config)
    for key in ("use_rslora", "use_dora"):
        check(key, isinstance(config[key], bool), "true or false")
    check("r", _is_rank(config.get("r")), "a whole number of 1 or more")
    check("lora_alpha", _is_number(config.get("lora_alpha")), "a finite number")
    dropout = config["lora_dropout"]
    check("lora_dropout", _is_number(dropout) and 0 <= dropout < 1, "in 0..1")
    for key, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config[key]
        right = (isinstance(patterns, dict) and all(map(is_right, patterns.values()))
                 and all(map(_is_pattern, patterns)))
        check(key, right, "regular expressions with their numbers")


def _check_names(path: Path, config: Config) -> None:
    """Check the settings that name modules."""
    for key in ("target_modules", "exclude_modules"):
        value = config[key]
        right = _is_pattern(value) if isinstance(value, str) else value is None or _is_names(value)
        _check(path, config, key, right, "names or a regular expression")
    _check(path, config, "modules_to_save", _is_names(config["modules_to_save"]), "a list of names")


def _check_layer_selection(path: Path, config: Config) -> None:
    """Check layers_to_transform and layers_pattern."""
    index, pattern = config["layers_to_transform"], config["layers_pattern"]
    right = index is None or type(index) is int or (
        isinstance(index, list) and all(type(i) is int for i in index)
    )
    _check(path, config, "layers_to_transform", right, "a number or a list of numbers")
    pattern = [pattern] if isinstance(pattern, str) else pattern or []
    right = _is_names(pattern) and all(map(_is_pattern, pattern))
    _check(path, config, "layers_pattern", right, "names")
    if isinstance(config["target_modules"], str) and index not in (None, []):
        raise CheckpointError(f"{path}: layers_to_transform needs a list as target_modules; PEFT "
                              "does not define it for a regular expression")


def _is_rank(value: Any) -> bool:
    """Whether it is a whole number of 1 or more."""
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float32 can hold."""
    return type(value) in (int, float) and abs(value) < 1e30


def _is_names(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_pattern(text: str) -> bool:
    """Whether it is a regular expression that `patterns` supports."""
    try:
        compiled(text)
        return True
    except PatternError:
        return False


# ---- Rules


def by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a layer's name.

    Parameters
    ----------
    patterns
        {regex: value}. A regex matches the whole name, or its end from a dot on.
    name
        Dotted name of the layer.
    default
        Returned if no pattern matches.
    """
    starts = _starts(name)
    stops = {len(name), len(name.removesuffix("\n"))}  # as $
    for pattern, value in patterns.items():
        if any(not stops.isdisjoint(ends(pattern, name, start)) for start in starts):
            return value
    return default


def _starts(name: str) -> list[int]:
    """Return where a name or the end of one begins: at 0, and after each dot of the first line."""
    return [0, *(i + 1 for i, c in enumerate(name.partition("\n")[0]) if c == ".")]


def targeted(config: Config, name: str) -> bool:
    """Whether PEFT would adapt a linear layer of this name.

    target_modules is a list of names or their ends; a regex for the whole name; or "all-linear",
    which means every layer but the head. exclude_modules and modules_to_save take precedence.
    """
    exclude, targets = config.get("exclude_modules"), config["target_modules"]
    if exclude and _names_or_regex(exclude, name):
        return False
    if inside(name, config.get("modules_to_save") or []):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return name not in HEADS
    if not _names_or_regex(targets, name):
        return False
    return name in targets or _in_selected_layer(config, name)  # a full name needs no layer


def _in_selected_layer(config: Config, name: str) -> bool:
    """Whether layers_to_transform, if given, lists the number of the layer in the name."""
    index, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if index is None or index == []:
        return True
    # The number is the first in the name, or the first after one of layers_pattern.
    for before in [patterns] if isinstance(patterns, str) else patterns or [r".*?\.[^.]*"]:
        for stop in (stop for start in _starts(name) for stop in ends(before, name, start)):
            if found := NUMBER.match(name, stop):
                return int(found[1]) in ([index] if isinstance(index, int) else index)
    return False


def _names_or_regex(wanted: str | list[str], name: str) -> bool:
    """Whether the regex matches the whole name, or the list has the name or its end."""
    if isinstance(wanted, str):
        return len(name) in ends(wanted, name)
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def inside(name: str, modules: list[str]) -> bool:
    """Whether the name, or that of a module around it, ends with one of `modules`."""
    parts = name.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(outer.endswith(module) for outer in around for module in modules)


def stored_whole(config: Config, module: str, kind: str, adapted: bool) -> bool:
    """Whether the configuration says that a parameter is stored whole.

    Parameters
    ----------
    config
        The settings.
    module
        Dotted name of the parameter's module, as in the file.
    kind
        The parameter's own name, such as "bias".
    adapted
        Whether the module has a LoRA layer.
    """
    if inside(module, config["modules_to_save"]):
        return True
    biases = config["bias"] == "all" or config["bias"] == "lora_only" and adapted
    return kind == "bias" and biases
