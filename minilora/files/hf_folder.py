"""The folder in which transformers saves a model: config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.safetensors import load_safetensors
from minilora.files.settings import read_json
from minilora.files.together import load_pair
from minilora.nn.validate import CheckpointError

HF_CONFIG, HF_WEIGHTS = "config.json", "model.safetensors"
Arrays = dict[str, np.ndarray]


def read_folder(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """Read config.json, and model.safetensors or all the shards that its index names.

    Raises
    ------
    CheckpointError
        If a file is damaged, or index and shards disagree.
    FileNotFoundError
        If a file is missing.
    """
    index = _index(folder)
    if index is None:
        return load_pair(folder / HF_WEIGHTS, folder / HF_CONFIG)
    return read_json(folder / HF_CONFIG), _read_shards(folder, index)


def weight_files(folder: Path) -> list[Path]:
    """Return the path of model.safetensors, or of all shards. CheckpointError as `read_folder`."""
    index = _index(folder)
    names = [HF_WEIGHTS] if index is None else sorted(set(_weight_map(index).values()))
    return [folder / name for name in names]


def _index(folder: Path) -> Path | None:
    """Return the path of the index of shards; None if there is one file, or nothing."""
    index = folder / f"{HF_WEIGHTS}.index.json"
    return None if (folder / HF_WEIGHTS).exists() or not index.exists() else index


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: {name of a tensor: name of its shard}."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")
        and shard.isprintable() for shard in shards.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map names to files of this folder")
    return shards


def _read_shards(folder: Path, index: Path) -> Arrays:
    """Read all the shards that an index names."""
    shards = _weight_map(index)
    tensors: Arrays = {}
    for shard in sorted(set(shards.values())):
        part = load_safetensors(folder / shard)
        if twice := sorted(set(tensors) & set(part)):
            raise CheckpointError(f"{index}: {twice[0]} is in two shards")
        tensors |= part
    if set(tensors) != set(shards):
        odd = sorted(set(tensors) ^ set(shards))
        raise CheckpointError(f"{index} and its shards disagree on {', '.join(odd[:5])}")
    return tensors
