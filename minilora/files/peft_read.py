"""Adapters read from disk, in PEFT's layout.

A folder contains `adapter_config.json` (rank, alpha, targets) and `adapter_model.safetensors`.
For each adapted layer, the latter has lora_A.weight (r, in) and lora_B.weight (out, r): the
transposes of our A and B. DoRA adds lora_magnitude_vector (out,). A module that is stored whole
has its parameters under its own name.

Layers are named as in the model that the adapter is for: `save_adapter` writes our names;
`save_peft` writes those of transformers' GPT-2, in which one fused layer, c_attn, is our q, k
and v. `load_adapter` reads both.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from minilora.files.origin import WrongBase, fingerprint, origin
from minilora.files.patterns import bounded
from minilora.files.peft_config import (
    BASE_WEIGHT,
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    Config,
    by_pattern,
    checked_config,
    stored_whole,
)
from minilora.files.peft_names import Arrays, in_our_names
from minilora.files.safetensors import printable
from minilora.files.together import READY, load_pair
from minilora.lora.adapter import Adapter, Factors, attach
from minilora.nn.module import M
from minilora.nn.validate import CheckpointError

MAX_NAME = 500  # characters of a tensor's name
FACTOR = re.compile(
    r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?P<weight>\.weight)?"
)


@bounded()
def load_adapter(model: M, path: str | Path) -> M:
    """Attach an adapter from disk to a model, replacing any that it has.

    The base is frozen and otherwise unchanged. The model is put in evaluation mode, as PEFT's
    `from_pretrained` does; `fit` and `train()` switch dropout on.

    Parameters
    ----------
    model
        The model to attach to.
    path
        The folder of the adapter, or one of its two files.

    Returns
    -------
    Module
        The same model.

    Raises
    ------
    CheckpointError
        If the files are damaged, have a setting that is not supported, or do not fit the model.
        The message lists all names and shapes that differ, and the model is not changed.
    WrongBase
        If they do not fit, and were made for another base. (A warning if they do fit.)
    FileNotFoundError
        If there is no adapter at `path`.
    """
    config, adapter = read_adapter(path)
    made, mark = origin(config), fingerprint(model)
    other = made.fingerprint not in (None, mark)
    try:
        adapter, frozen_head = in_our_names(model, config, adapter)
        attach(model, adapter)
    except CheckpointError as error:
        if other and made.base:
            raise WrongBase(path, made.base) from None
        raise CheckpointError(f"{path}: {error}") from None
    if other:
        warnings.warn(f"{path} was made for {made.base or 'another base'}: the weights of this "
                      "model are not those", stacklevel=3)
    if frozen_head:
        dict(model.named_modules())["lm_head.module"].freeze()
    model.eval()
    return model


@bounded()
def read_adapter(path: str | Path) -> tuple[Config, Adapter]:
    """Read an adapter without a model.

    Parameters
    ----------
    path
        The folder of the adapter, or one of its two files.

    Returns
    -------
    config
        The settings, from `checked_config`.
    adapter
        The adapter under the names of the file. A and B are (in, r) and (r, out), as everywhere
        in this library; what is stored whole is as in the file.

    Raises
    ------
    CheckpointError
        If the files are damaged, are from two different saves, or have a setting that is not
        supported.
    FileNotFoundError
        If there is no adapter at `path`.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    if not any((folder / name).exists() for name in (CONFIG_FILE, f".{CONFIG_FILE}{READY}")):
        raise FileNotFoundError(_no_adapter(folder))
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(f"{folder} holds adapter_model.bin, a pickle, which can run code "
                              "when it is read: save it as safetensors first")
    return as_adapter(folder, *load_pair(folder / WEIGHTS_FILE, folder / CONFIG_FILE))


def _no_adapter(folder: Path) -> str:
    """Say that a folder has no adapter, and which one below it has."""
    if not folder.is_dir():
        return f"there is no adapter at {folder}: no such folder"
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    return (f"there is no adapter in {folder}: it has no {CONFIG_FILE}"
            + (f", but {below[0]} has one" if below else ""))


def as_adapter(folder: Path, settings: Config, tensors: Arrays) -> tuple[Config, Adapter]:
    """Return what `read_adapter` returns for a folder with these settings and tensors."""
    config = checked_config(folder / CONFIG_FILE, settings)
    found, saved = _sorted_tensors(folder / WEIGHTS_FILE, tensors, config)
    layers = {name: _factors(folder, config, name, parts) for name, parts in found.items()}
    if not layers:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds no LoRA factors")
    return config, Adapter(layers, saved, float(config["lora_dropout"]))


def _factors(folder: Path, config: Config, name: str, parts: Arrays) -> Factors:
    """Make the factors of one layer from its tensors, {"lora_A": (r, in), ...}."""
    needed = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * config["use_dora"]
    if missing := [part for part in needed if part not in parts]:
        dora = " (use_dora is set)" if "lora_magnitude_vector" in missing else ""
        raise CheckpointError(f"{folder}: {name} has no {', '.join(missing)}{dora}")
    a, b, magnitude = parts["lora_A"].T, parts["lora_B"].T, parts.get("lora_magnitude_vector")
    rank = by_pattern(config["rank_pattern"], name, config["r"])
    if a.shape[1] != rank or b.shape[0] != rank:
        raise CheckpointError(
            f"{folder}: {name} has factors of rank {a.shape[1]} and {b.shape[0]}, "
            f"the configuration says {rank} (r, or rank_pattern)"
        )
    if magnitude is not None and magnitude.shape != (b.shape[1],):
        raise CheckpointError(f"{folder}: {name} has a magnitude of shape {magnitude.shape}, "
                              f"expected ({b.shape[1]},)")
    alpha = by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    scaling = "alpha/sqrt(r)" if config["use_rslora"] else "alpha/r"
    return Factors(a, b, alpha, scaling, magnitude)


# ---- Sorting the tensors of a file


def _sorted_tensors(
    path: Path, stored: Arrays, config: Config
) -> tuple[dict[str, Arrays], Arrays]:
    """Return {layer: {"lora_A": (r, in), ...}} and {parameter stored whole: array}."""
    tensors = _named_tensors(path, stored)
    factors = {name: match for name in tensors if (match := FACTOR.fullmatch(name))
               and (match["weight"] or match["kind"] == "lora_magnitude_vector")}
    adapter = _adapter_name(path, factors)
    layers: dict[str, Arrays] = {}
    saved: Arrays = {}
    for name, array in tensors.items():
        match = factors.get(name)
        if match is None:
            place, short, axes = saved, _without_wrappers(name, adapter), (1, 2)
        else:
            place, short = layers.setdefault(match["layer"], {}), match["kind"]
            axes = (1,) if short == "lora_magnitude_vector" else (2,)
            if short == "lora_magnitude_vector" and not config["use_dora"]:
                raise CheckpointError(f"{path}: {name} belongs to DoRA, but use_dora is not set")
        _check_tensor(path, name, array, axes)
        if short in place and not np.array_equal(place[short], array):
            raise CheckpointError(f"{path}: {name} appears twice, with different numbers")
        place[short] = array
    _check_stored_whole(path, config, layers, saved)
    return layers, saved


def _named_tensors(path: Path, stored: Arrays) -> Arrays:
    """Return the tensors under their names without PEFT's prefix."""
    tensors: Arrays = {}
    for key, array in stored.items():
        name = key.removeprefix(PREFIX)
        if name in tensors:
            raise CheckpointError(f"{path}: {key} appears twice, with and without {PREFIX}")
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: the name {name[:80]}... is too long")
        tensors[name] = array
    return tensors


def _adapter_name(path: Path, factors: dict[str, re.Match[str]]) -> str | None:
    """Return the one name of an adapter in the names of the factors, or None."""
    adapters = {match["adapter"] for match in factors.values()}
    if len(adapters) > 1:
        names = ", ".join(sorted(map(str, adapters)))
        raise CheckpointError(f"{path} holds several adapters: {names}")
    return next(iter(adapters), None)


def _without_wrappers(name: str, adapter: str | None) -> str:
    """Return the name of a parameter without PEFT's modules_to_save and base_layer."""
    wrapper = r"\.modules_to_save" + (rf"(?:\.{re.escape(adapter)})?" if adapter else "")
    return re.sub(r"\.base_layer(?=\.bias$)", "", re.sub(rf"{wrapper}(?=\.)", "", name))


def _check_tensor(path: Path, name: str, array: np.ndarray, axes: tuple[int, ...]) -> None:
    """Check that a tensor is floating-point and has one of these numbers of axes."""
    if array.dtype.kind != "f" or array.ndim not in axes:
        kind = " or ".join({1: "a vector", 2: "a matrix"}[n] for n in sorted(axes, reverse=True))
        raise CheckpointError(f"{path}: {name} must be {kind} of floating-point numbers, got "
                              f"{array.dtype} {array.shape}")


def _check_stored_whole(
    path: Path, config: Config, layers: dict[str, Arrays], saved: Arrays
) -> None:
    """Check that the configuration accounts for every parameter that is stored whole."""
    for name in saved:
        if ".lora_embedding_" in name:
            raise CheckpointError(f"{path}: {name} is LoRA on an embedding, which is not supported")
    for name in saved:
        module, _, kind = name.rpartition(".")
        known = (
            stored_whole(config, module, kind, module in layers)
            or name.endswith(BASE_WEIGHT) and name.removesuffix(BASE_WEIGHT) in layers
            or name == "lm_head.weight" and config.get("ensure_weight_tying")
        )
        if not known:
            raise CheckpointError(f"{path}: {name[:200]} is neither lora_A.weight nor "
                                  "lora_B.weight, and the configuration does not say that it "
                                  "is stored whole")


# ---- Describing


def describe_adapter(path: str | Path) -> str:
    """Return a text about an adapter: its settings, its layers, and the norm of their updates.

    The norm is the Frobenius norm of scale * A B.

    Parameters
    ----------
    path
        The folder of the adapter, or one of its two files.
    """
    config, adapter = read_adapter(path)
    layers = adapter.layers.values()
    arrays = [array for f in layers for array in f.arrays]
    ranks = {f.rank for f in layers}
    alphas, scales = _listed(f.alpha for f in layers), _listed(f.scale for f in layers)
    kind = "DoRA" if config["use_dora"] else "LoRA"
    rule = "alpha/sqrt(r)" if config["use_rslora"] else "alpha/r"
    targets = config["target_modules"]
    lines = [
        f"{kind} adapter: rank {_listed(ranks)}, alpha {alphas}, "
        f"scaling {rule} = {scales}, dropout {adapter.dropout:g}",
        f"targets: {targets if isinstance(targets, str) else ', '.join(sorted(targets))}",
        f"{len(layers)} layers, {sum(a.size for a in arrays):,} parameters, "
        f"{sum(a.nbytes for a in arrays):,} bytes",
    ]
    made = origin(config)
    if made.base:
        lines.append(f"made for: {made.base}")
    if made.held_out_loss is not None:
        lines.append(f"held-out loss: {made.held_out_loss:.4g} nats per token")
    if adapter.saved:
        size = sum(a.size for a in adapter.saved.values())
        shapes = ", ".join(f"{name} {array.shape}" for name, array in adapter.saved.items())
        lines.append(f"stored whole, {size:,} parameters: {shapes}")
    lines.append("norm of the update, scale * A B, by layer:")
    for name, f in adapter.layers.items():
        rank = f", rank {f.rank}" if len(ranks) > 1 else ""
        lines.append(f"  {name}: {f.norm():.4g}  ({f.A.shape[0]}, {f.B.shape[1]}){rank}")
    return "\n".join(map(printable, lines))


def adapter_row(path: Path) -> list[str]:
    """Return base, ranks, targets, bytes on disk and held-out loss of an adapter, for a table."""
    config, adapter = read_adapter(path)
    made, targets = origin(config), {name.rpartition(".")[2] for name in adapter.layers}
    size = sum(file.stat().st_size for file in (path / CONFIG_FILE, path / WEIGHTS_FILE))
    return [made.base or "", _listed(f.rank for f in adapter.layers.values()),
            ", ".join(sorted(targets)), f"{size:,}",
            "" if made.held_out_loss is None else f"{made.held_out_loss:.4f}"]


def _listed(values: Iterable[float]) -> str:
    """Return the distinct numbers in ascending order, with commas between them."""
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
