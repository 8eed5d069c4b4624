"""JSON files with the settings of a model or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minilora.files.safetensors import MAX_HEADER, open_regular
from minilora.nn.validate import CheckpointError

# PEFT knows this setting, in which others may put what they like, and ignores it.
PLACE = "auto_mapping"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file contains anything else."""
    with open_regular(path) as file:
        text = file.read(MAX_HEADER + 1)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"{path} has more than {MAX_HEADER:,} bytes")
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def refuse_settings(
    path: Path, settings: dict[str, Any], allowed: dict[str, tuple[Any, ...]]
) -> None:
    """Raise CheckpointError if a setting of the file `path` has none of its allowed values."""
    for key, values in allowed.items():
        if key in settings and settings[key] not in values:
            raise CheckpointError(f"{path}: {key} = {repr(settings[key])[:80]} is not supported")
