"""Adapters on disk, in PEFT's layout, so that there is one format and not two.

A folder holds `adapter_config.json` (rank, alpha, targets) and `adapter_model.safetensors` with,
for each adapted layer, lora_A.weight (r, in) and lora_B.weight (out, r): the transposes of our A
and B. DoRA adds lora_magnitude_vector (out,); a module that is stored whole has its parameters
under its own name.

Layers are named as in the model that the adapter is for. `save_adapter` writes our names;
`save_peft` those of transformers' GPT-2, in which one fused layer, c_attn, is our q, k and v.
`load_adapter` reads both.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.checkpoint import (
    CheckpointError,
    load_safetensors,
    replaced_head,
    save_safetensors,
    write_atomically,
)
from minilora.files.gpt2 import our_names, read_json, refuse_settings, their_name
from minilora.lora.adapter import Adapter, Factors, attach, base_modules, by_module, get_adapter
from minilora.lora.dora import column_norms
from minilora.lora.wrap import base_module
from minilora.nn.gpt import GPT
from minilora.nn.layers import Embedding, Linear
from minilora.nn.module import Module, Parameter

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEADS = ("lm_head", "score")  # GPT-2's, with a language model and with a classifier

# Settings that are read below; all others must be off, apart from these, which say nothing about
# what an adapter computes. (fan_in_fan_out says how the base stores its weights.)
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
MAX_NAME = 500  # characters of a tensor's name
BASE_WEIGHT = ".base_layer.weight"  # PEFT stores the base's own, too, of a head that is adapted
# Other ways to initialise A and B change the weights of the base as well.
INITS = (True, None, "gaussian", "orthogonal", "eva", False)


# ---- Writing


def save_adapter(model: Module, path: str | Path) -> None:
    """Write the adapter that is on the model to the folder `path`, under our names.

    That is A and B of every LoRA layer, and whatever else is of the task, such as a new head;
    see `get_adapter`. PEFT's scale is alpha / r (or alpha / sqrt(r)); for a layer that scales
    by alpha alone, alpha * r is written, which stands for the same update. Raises ValueError
    where there is no LoRA layer, or where DoRA and plain layers are mixed.
    """
    adapter, base = _untied(model, get_adapter(model)), dict(base_modules(model))
    linears = [name for name, module in base.items() if isinstance(module, Linear)]
    saved = {
        name: array if array.ndim < 2 or _is_embedding(base, name) else array.T
        for name, array in adapter.saved.items()
    }
    settings = {"fan_in_fan_out": False, "task_type": None}
    _write(Adapter(adapter.layers, saved, adapter.dropout), path, linears, settings)


def save_peft(model: GPT, path: str | Path) -> None:
    """Write the adapter that is on a GPT for PEFT on the GPT-2 of transformers.

    q, k and v become c_attn: of rank r where they have the same A, else A's side by side and
    the B's in blocks, which is exact. A new head becomes `score`, that of
    GPT2ForSequenceClassification. Raises TypeError for another model, ValueError where PEFT has
    no place for something.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"save_peft is for a GPT, got {type(model).__name__}")
    adapter, base = _untied(model, get_adapter(model)), dict(base_modules(model))
    classifies = replaced_head(model) or _head_shape(adapter) not in (None, _vocabulary(model))
    fused: dict[str, dict[str, Factors]] = {}
    for name, factors in adapter.layers.items():
        fused.setdefault(their_name(name), {})[name] = factors
    layers = {
        name: _fuse([parts.get(our) for our in our_names(name)], base, our_names(name))
        for name, parts in fused.items()
    }
    saved: dict[str, np.ndarray] = {}
    for name, arrays in by_module(adapter.saved).items():
        theirs = their_name(name)
        for kind in arrays:
            pieces = [
                adapter.saved.get(f"{our}.{kind}", getattr(base.get(our), kind, None))
                for our in our_names(theirs)
            ]
            pieces = [p if isinstance(p, np.ndarray) else p.data for p in pieces]
            saved[f"{theirs}.{kind}"] = np.concatenate(pieces, axis=-1)
    if classifies:
        if "lm_head.bias" in saved:
            raise ValueError("GPT2ForSequenceClassification's head has no bias: make it a "
                             "Linear(..., bias=False)")
        saved = {name.replace("lm_head.", "score."): a for name, a in saved.items()}
    saved |= {f"{head}.weight": saved[f"{head}.weight"].T
              for head in HEADS if f"{head}.weight" in saved}
    linears = list(dict.fromkeys(their_name(n) for n, m in base.items() if isinstance(m, Linear)))
    settings = {"fan_in_fan_out": True, "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM"}
    _write(Adapter(layers, saved, adapter.dropout), path, linears, settings)


def _untied(model: Module, adapter: Adapter) -> Adapter:
    """Store a tied wte as both input and head, since PEFT does not tie what it saves."""
    tied = isinstance(model, GPT) and model.lm_head is None
    if not tied or "wte.weight" not in adapter.saved:
        return adapter
    head = {"lm_head.weight": adapter.saved["wte.weight"].T}
    return Adapter(adapter.layers, adapter.saved | head, adapter.dropout)


def _vocabulary(model: GPT) -> tuple[int, int]:
    return model.config.d_model, model.config.vocab_size


def _head_shape(adapter: Adapter) -> tuple[int, ...] | None:
    return adapter.saved["lm_head.weight"].shape if "lm_head.weight" in adapter.saved else None


def _is_embedding(base: dict[str, Module], parameter: str) -> bool:
    return isinstance(base.get(parameter.rpartition(".")[0]), Embedding)


def _fuse(parts: list[Factors | None], base: dict[str, Module], names: list[str]) -> Factors:
    """Make one layer of the parts of a fused one, [q, k, v], of which some may be missing.

    The distinct A's stand side by side; a part's B stands in the rows of its A and in its own
    columns, and all else is zero.
    """
    first = next(f for f in parts if f is not None)
    if len(parts) == 1:
        return first
    distinct: list[np.ndarray] = []
    for f in parts:
        if f is not None and not any(np.array_equal(f.A, a) for a in distinct):
            distinct.append(f.A)
    scales = {f.scale for f in parts if f is not None}
    scale = first.scale if len(scales) == 1 else 1.0
    a = np.concatenate(distinct, axis=1)
    columns, magnitudes = [], []
    for f, name in zip(parts, names, strict=True):
        weight = base[name].weight.data
        b = np.zeros((a.shape[1], weight.shape[1]), a.dtype)
        if f is not None:
            at = next(i for i, other in enumerate(distinct) if np.array_equal(f.A, other))
            start = sum(other.shape[1] for other in distinct[:at])
            b[start : start + f.rank] = f.B if scale == f.scale else (f.scale / scale) * f.B
        columns.append(b)
        m = None if f is None else f.magnitude
        magnitudes.append(column_norms(weight) if m is None else m)
    magnitude = None if first.magnitude is None else np.concatenate(magnitudes)
    b = np.concatenate(columns, axis=1)
    if len(distinct) == 1 and scale == first.scale:
        return Factors(a, b, first.alpha, first.scaling, magnitude)
    return Factors(a, b, scale * a.shape[1], "alpha/r", magnitude)


def _write(adapter: Adapter, path: str | Path, linears: list[str], extra: dict[str, Any]) -> None:
    """Write an adapter whose names, and the orientation of what is saved, are the file's."""
    layers = adapter.layers
    dora = [name for name, f in layers.items() if f.magnitude is not None]
    if dora and len(dora) < len(layers):
        raise ValueError("PEFT has one use_dora for all layers: DoRA and plain LoRA are mixed here")
    whole = [m for m, arrays in by_module(adapter.saved).items() if set(arrays) != {"bias"}]
    biases = [name.removesuffix(".bias") for name in adapter.saved
              if name.endswith(".bias") and name.removesuffix(".bias") not in whole]
    if both := set(whole) & set(layers):
        raise ValueError(f"{', '.join(sorted(both))}: PEFT has no LoRA on a module stored whole")
    rslora = all(f.scaling == "alpha/sqrt(r)" for f in layers.values())
    alphas = {
        name: f.alpha if f.scaling == "alpha/r" or rslora
        else f.alpha * f.rank if f.scaling == "alpha" else f.scale * f.rank
        for name, f in layers.items()
    }
    ranks = {name: f.rank for name, f in layers.items()}
    (rank, _), = Counter(ranks.values()).most_common(1)
    (alpha, _), = Counter(alphas.values()).most_common(1)
    names = sorted(layers)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "use_dora": bool(dora),
        # A pattern would fit the end of a name, too: ^ keeps "0" from fitting "1.0".
        "rank_pattern": {f"^{re.escape(n)}": ranks[n] for n in names if ranks[n] != rank},
        "alpha_pattern": {f"^{re.escape(n)}": alphas[n] for n in names if alphas[n] != alpha},
        "lora_dropout": adapter.dropout,
        "target_modules": names,
        "modules_to_save": whole or None,
        "bias": "none" if not biases else "lora_only" if set(biases) <= set(layers) else "all",
    } | extra
    if {name for name in linears if _targeted(config, name)} != set(layers):
        config["target_modules"] = "|".join(map(re.escape, names))  # a regex fits whole names
    tensors = {}
    for name, f in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = f.A.T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = f.B.T
        if f.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = f.magnitude
    for name, array in adapter.saved.items():
        module, _, kind = name.rpartition(".")
        inner = ".base_layer" if module in layers else ""
        tensors[f"{PREFIX}{module}{inner}.{kind}"] = array
    text = json.dumps(config, indent=2).encode()  # should it fail, then before anything is written
    save_safetensors(Path(path) / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_atomically(Path(path) / CONFIG_FILE, text)


# ---- Reading


def load_adapter(model: Module, path: str | Path) -> Module:
    """Attach the adapter in the folder `path` (or one of its two files) and return the model.

    An adapter that is on the model already is taken off. The base is frozen and otherwise
    untouched, and the model is in evaluation mode, as after PEFT's `from_pretrained`: `fit` or
    `train()` switch dropout on.

    Everything is checked before anything is changed: CheckpointError where the files are not
    sound, have a setting that cannot be honoured, or do not fit the model, with all the names
    and shapes that differ.
    """
    config, adapter = read_adapter(path)
    try:
        adapter, untied = _in_our_names(model, config, adapter)
        attach(model, adapter)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if untied:
        model.lm_head.freeze()
    return model.eval()


load_peft = load_adapter  # PEFT's files are our files


def read_adapter(path: str | Path) -> tuple[dict[str, Any], Adapter]:
    """Read an adapter without a model: its configuration, and what it holds under its own names.

    A and B are as ours, (in, r) and (r, out); what is saved whole is as in the file. `path` is
    the folder or one of its two files. CheckpointError where they are not sound.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(f"{folder} holds adapter_model.bin, a pickle, which can run code "
                              "when it is read: save it as safetensors first")
    config = _read_config(folder / CONFIG_FILE)
    found, saved = _sort_tensors(folder / WEIGHTS_FILE, config)
    layers = {}
    for name, parts in found.items():
        needed = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * config["use_dora"]
        if missing := [part for part in needed if part not in parts]:
            dora = " (use_dora is set)" if "lora_magnitude_vector" in missing else ""
            raise CheckpointError(f"{folder}: {name} has no {', '.join(missing)}{dora}")
        a, b, magnitude = parts["lora_A"].T, parts["lora_B"].T, parts.get("lora_magnitude_vector")
        rank = _by_pattern(config["rank_pattern"], name, config["r"])
        if a.shape[1] != rank or b.shape[0] != rank:
            raise CheckpointError(
                f"{folder}: {name} has factors of rank {a.shape[1]} and {b.shape[0]}, "
                f"the configuration says {rank} (r, or rank_pattern)"
            )
        if magnitude is not None and magnitude.shape != (b.shape[1],):
            raise CheckpointError(f"{folder}: {name} has a magnitude of shape {magnitude.shape} "
                                  f"where ({b.shape[1]},) was expected")
        alpha = _by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
        scaling = "alpha/sqrt(r)" if config["use_rslora"] else "alpha/r"
        layers[name] = Factors(a, b, alpha, scaling, magnitude)
    if not layers:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds no LoRA factors")
    return config, Adapter(layers, saved, float(config["lora_dropout"]))


def _read_config(path: Path) -> dict[str, Any]:
    """Return the settings, checked; what cannot be honoured is an error."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} does not describe a LoRA adapter (peft_type LORA)")
    others = {k: OFF for k in config if k not in HONOURED | SILENT}
    others["init_lora_weights"] = INITS
    others["bias"] = ("none", "lora_only", "all")
    refuse_settings(path, config, others)
    defaults = {
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "target_modules": None,
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    }
    config |= {k: v for k, v in defaults.items() if config.get(k) is None}

    def check(key: str, right: bool, what: str) -> None:
        if not right:
            raise CheckpointError(f"{path}: {key} must be {what}, got {str(config.get(key))[:80]}")

    for key in ("use_rslora", "use_dora"):
        check(key, isinstance(config[key], bool), "true or false")
    check("r", _is_rank(config.get("r")), "a whole number of 1 or more")
    check("lora_alpha", _is_number(config.get("lora_alpha")), "a finite number")
    dropout = config["lora_dropout"]
    check("lora_dropout", _is_number(dropout) and 0 <= dropout < 1, "in 0..1")
    for key, right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config[key]
        check(key, isinstance(patterns, dict) and all(map(right, patterns.values()))
              and all(map(_is_harmless, patterns)), "regular expressions with their numbers")
    for key in ("target_modules", "exclude_modules"):
        value = config[key]
        check(key, value is None or _is_names(value)
              or isinstance(value, str) and _is_harmless(value), "names or a regular expression")
    check("modules_to_save", _is_names(config["modules_to_save"]), "a list of names")
    index, pattern = config["layers_to_transform"], config["layers_pattern"]
    check("layers_to_transform", index is None or type(index) is int or isinstance(index, list)
          and all(type(i) is int for i in index), "a number or a list of numbers")
    pattern = [pattern] if isinstance(pattern, str) else pattern or []
    check("layers_pattern", _is_names(pattern) and all(map(_is_harmless, pattern)), "names")
    if isinstance(config["target_modules"], str) and index not in (None, []):
        raise CheckpointError(f"{path}: layers_to_transform needs a list as target_modules, PEFT "
                              "has no meaning for it beside a regular expression")
    check("target_modules", config["target_modules"] is not None, "given")
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_harmless(pattern: str) -> bool:
    """Whether it is a regular expression, and none that may take for ever, such as (a+)+."""
    if len(pattern) > 1000 or re.search(r"[*+}][^()]*\)[*+{]", pattern):
        return False
    try:
        re.compile(rf"(.*\.)?({pattern})$")  # as it is used, and by itself
        re.compile(pattern)
        return True
    except (re.error, RecursionError, OverflowError):
        return False


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of the name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _targeted(config: dict[str, Any], name: str) -> bool:
    """Whether PEFT would adapt a linear layer of this name; the rules are those of PEFT.

    A list fits names or their ends; a string is a regular expression for the whole name, or
    "all-linear", which is all but the head. layers_to_transform narrows a list down to layers
    by the first number in the name, after one of layers_pattern if that is given.
    """
    exclude, targets = config.get("exclude_modules"), config["target_modules"]
    if exclude and _names_or_regex(exclude, name):
        return False
    if _inside(name, config.get("modules_to_save") or []):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return name not in HEADS
    if not _names_or_regex(targets, name):
        return False
    if name in targets:
        return True  # a full name counts whatever its layer
    index, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if index is None or index == []:
        return True
    before = [patterns] if isinstance(patterns, str) else patterns or [r".*?\.[^.]*"]
    for pattern in before:
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(?P<layer_index>\d+)\.", name)
        if found:
            return int(found["layer_index"]) in ([index] if isinstance(index, int) else index)
    return False


def _names_or_regex(wanted: str | list[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _inside(name: str, modules: list[str]) -> bool:
    """Whether the name, or that of something it is in, ends with that of one of the modules."""
    parts = name.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(outer.endswith(module) for outer in around for module in modules)


FACTOR = re.compile(
    r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?P<weight>\.weight)?"
)


def _sort_tensors(
    path: Path, config: dict[str, Any]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return {layer: {"lora_A": (r, in), ...}} and {parameter stored whole: array}."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for key, array in load_safetensors(path).items():
        name = key.removeprefix(PREFIX)
        if name in tensors:
            raise CheckpointError(f"{path}: {key} stands twice, with and without {PREFIX}")
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: the name {name[:80]}... is too long")
        tensors[name] = array
    factors = {name: match for name in tensors if (match := FACTOR.fullmatch(name))
               and (match["weight"] or match["kind"] == "lora_magnitude_vector")}
    adapters = {match["adapter"] for match in factors.values()}
    if len(adapters) > 1:
        raise CheckpointError(f"{path} holds several adapters: {', '.join(map(str, adapters))}")
    adapter = next(iter(adapters), None)
    wrapper = r"\.modules_to_save" + (rf"(?:\.{re.escape(adapter)})?" if adapter else "")
    for name, array in tensors.items():
        if name in factors:
            layer, kind = factors[name]["layer"], factors[name]["kind"]
            place, short, axes = layers.setdefault(layer, {}), kind, 2
            if kind == "lora_magnitude_vector":
                axes = 1
                if not config["use_dora"]:
                    raise CheckpointError(f"{path}: {name} is of DoRA, but use_dora is not set")
        else:
            short = re.sub(rf"{wrapper}(?=\.)", "", name)
            short = re.sub(r"\.base_layer(?=\.bias$)", "", short)
            place, axes = saved, None
        _check_tensor(path, name, array, axes)
        if short in place and not np.array_equal(place[short], array):
            raise CheckpointError(f"{path}: {name} stands twice, with different numbers")
        place[short] = array
    for name in saved:
        module, _, kind = name.rpartition(".")
        known = _inside(module, config["modules_to_save"]) or kind == "bias" and (
            config["bias"] == "all" or config["bias"] == "lora_only" and module in layers
        ) or name.endswith(BASE_WEIGHT) and name.removesuffix(BASE_WEIGHT) in layers
        known = known or name == "lm_head.weight" and config.get("ensure_weight_tying")
        if ".lora_embedding_" in name:
            raise CheckpointError(f"{path}: {name} is LoRA on an embedding, which is not supported")
        if not known:
            raise CheckpointError(f"{path}: {name[:200]} is neither lora_A.weight nor "
                                  "lora_B.weight, nor does the configuration say that it is "
                                  "stored whole")
    return layers, saved


def _check_tensor(path: Path, name: str, array: np.ndarray, axes: int | None) -> None:
    if array.dtype.kind != "f" or array.ndim not in ((axes,) if axes else (1, 2)):
        kind = {1: "a vector", 2: "a matrix", None: "a matrix or a vector"}[axes]
        raise CheckpointError(f"{path}: {name} must be {kind} of floating-point numbers, got "
                              f"{array.dtype} {array.shape}")


def _in_our_names(
    model: Module, config: dict[str, Any], adapter: Adapter
) -> tuple[Adapter, bool]:
    """Translate an adapter into our names and orientation, once it fits its configuration.

    Also say whether the head is the base's wte, which is kept apart from a new one.
    """
    if not isinstance(model, Module):
        raise TypeError(f"expected a Module to load onto, got {type(model).__name__}")
    base = dict(base_modules(model))
    linears = [name for name, module in base.items() if isinstance(module, Linear)]
    hugging_face = isinstance(model, GPT) and not set(adapter.layers) <= set(linears) and any(
        our in linears for name in adapter.layers for our in our_names(name)
    )
    known = linears
    if hugging_face:
        bare = not any(name.startswith("transformer.") for name in adapter.layers)
        known = [n.removeprefix("transformer.") if bare else n
                 for n in dict.fromkeys(map(their_name, linears))]
    untargeted = [name for name in adapter.layers if not _targeted(config, name)]
    missing = [n for n in known if _targeted(config, n) and n not in adapter.layers]
    if untargeted:
        raise CheckpointError(f"target_modules does not fit {', '.join(untargeted[:5])}, for "
                              "which there are factors")
    if missing and set(adapter.layers) <= set(known):
        raise CheckpointError("there are no factors for the targets " + ", ".join(missing[:5]))
    if isinstance(model, GPT) and model.config.tie_weights and "lm_head" in adapter.layers and (
        "lm_head" not in linears
    ):
        raise CheckpointError("lm_head is a target, but the head of this model is tied to wte: it "
                              "has no matrix of its own to adapt")
    layers: dict[str, Factors] = {}
    saved: dict[str, np.ndarray] = {}

    def put(place: dict[str, Any], name: str, value: Any) -> None:
        if name in place:
            raise CheckpointError(f"two entries of the file are for {name}")
        place[name] = value

    for name, f in adapter.layers.items():
        ours = our_names(name) if hugging_face else [name]
        columns = _split(f.B, ours, name)
        lengths = [None] * len(ours) if f.magnitude is None else _split(f.magnitude, ours, name)
        for our, b, m in zip(ours, columns, lengths, strict=True):
            put(layers, our, Factors(f.A, b, f.alpha, f.scaling, m))  # one A for all of them
    for name, array in adapter.saved.items():
        plain = name.replace(BASE_WEIGHT, ".weight").replace(".original_module.", ".")
        module, _, kind = plain.rpartition(".")
        ours = our_names(module) if isinstance(model, GPT) and module not in base else [module]
        ours = ["lm_head"] if ours == ["score"] else ours
        conv1d = module not in base and ours != ["lm_head"]
        if array.ndim == 2 and not conv1d and not _is_embedding(base, f"{ours[0]}.{kind}"):
            array = array.T
        for our, piece in zip(ours, _split(array, ours, name), strict=True):
            if name == plain:
                put(saved, f"{our}.{kind}", piece)
            else:
                _check_base(base, our, kind, piece)
    _check_complete(config, base, layers, saved, hugging_face)
    untied = False
    if isinstance(model, GPT) and model.config.tie_weights and "wte.weight" in saved:
        # Where only the input was stored, PEFT's head stays the old wte.
        untied = "lm_head.weight" not in saved
        head = saved.pop("lm_head.weight", base_module(model.wte).weight.data.T)
        if not np.array_equal(head.T, saved["wte.weight"]):
            saved["lm_head.weight"] = head
    return Adapter(layers, saved, adapter.dropout), untied and "lm_head.weight" in saved


def _check_base(base: dict[str, Module], module: str, kind: str, array: np.ndarray) -> None:
    """See that what PEFT stored of the base besides is what the model has anyway."""
    parameter = getattr(base.get(module), kind, None)
    if parameter is None or not np.array_equal(parameter.data, array):
        raise CheckpointError(f"the file has the base's own {module}.{kind} as well, and it is not "
                              "what this model has there (another base, or one in half precision)")


def _check_complete(
    config: dict[str, Any], base: dict[str, Module], layers: dict[str, Factors],
    saved: dict[str, np.ndarray], hugging_face: bool,
) -> None:
    """See that all is there that the configuration says is stored whole."""
    missing = []
    for path, module in base.items():
        theirs = their_name(path) if hugging_face else path
        for kind, parameter in vars(module).items():
            if isinstance(parameter, Parameter) and f"{path}.{kind}" not in saved and (
                _inside(theirs, config["modules_to_save"])
                or kind == "bias" and config["bias"] == "all"
                or kind == "bias" and config["bias"] == "lora_only" and path in layers
            ):
                missing.append(f"{theirs}.{kind}")
    heads = set(HEADS) & set(config["modules_to_save"])
    if heads and not any(name.startswith("lm_head.") for name in saved):
        missing += [f"{head}.weight" for head in heads]
    if missing:
        raise CheckpointError("the configuration says that there are "
                              + ", ".join(dict.fromkeys(missing[:5]))
                              + ", but the file does not have them")
    if config["modules_to_save"] and not saved:
        raise CheckpointError("the file has none of modules_to_save, "
                              + ", ".join(config["modules_to_save"]))


def _split(array: np.ndarray, names: list[str], what: str) -> list[np.ndarray]:
    if array.shape[-1] % len(names):
        raise CheckpointError(f"{what} has {array.shape[-1]} outputs, not 3d for q, k and v")
    return np.split(array, len(names), axis=-1)


# ---- Describing


def describe_adapter(path: str | Path) -> str:
    """Say what is in an adapter: its settings, and for each layer shapes and size of its update.

    The size is the Frobenius norm of scale * A B.
    """
    config, adapter = read_adapter(path)
    layers = adapter.layers.values()
    ranks = sorted({f.rank for f in layers})
    scales = sorted({f.scale for f in layers})
    count = sum(a.size for f in layers for a in f.arrays)
    kind = "DoRA" if config["use_dora"] else "LoRA"
    rule = "alpha/sqrt(r)" if config["use_rslora"] else "alpha/r"
    targets = config["target_modules"]
    lines = [
        f"{kind} adapter: rank {_listed(ranks)}, alpha "
        f"{_listed(sorted({f.alpha for f in layers}))}, scaling {rule} = {_listed(scales)}, "
        f"dropout {adapter.dropout:g}",
        f"targets: {targets if isinstance(targets, str) else ', '.join(sorted(targets))}",
        f"{len(adapter.layers)} layers, {count:,} parameters, "
        f"{sum(a.nbytes for f in layers for a in f.arrays):,} bytes",
    ]
    if adapter.saved:
        size = sum(a.size for a in adapter.saved.values())
        lines.append(f"stored whole, {size:,} parameters: " + ", ".join(
            f"{name} {array.shape}" for name, array in adapter.saved.items()))
    lines.append("norm of the update, scale * A B, by layer:")
    for name, f in adapter.layers.items():
        rank = f", rank {f.rank}" if len(ranks) > 1 else ""
        lines.append(f"  {name}: {f.norm():.4g}  ({f.A.shape[0]}, {f.B.shape[1]}){rank}")
    return "\n".join(lines)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
