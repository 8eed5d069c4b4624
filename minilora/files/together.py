"""Files that belong together: weights with their settings, and all results of one command.

One file can be replaced at once, several cannot. So whatever moment a process is killed at, a
reader must find all files of one save, or notice that they are of two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.safetensors import (
    errors_name,
    load_metadata,
    load_with_metadata,
    save_safetensors,
    temporary_in,
    write_atomically,
)
from minilora.files.settings import PLACE, read_json
from minilora.nn.validate import CheckpointError

FINGERPRINT = "minilora_fingerprint"
READY = ".minilora-next"  # the name of what is complete, but not in its place yet

Settings = dict[str, Any]
Arrays = dict[str, np.ndarray]
_saving = threading.Lock()


# ---- Weights with their settings


def save_pair(weights: Path, tensors: Arrays, config: Path, settings: Settings) -> None:
    """Write a safetensors file and the JSON file that it cannot be used without.

    Both get a fingerprint of the two. The settings are first written beside `config`: until the
    new weights are in place, the old pair is complete, and from then on the new one is.
    """
    fingerprint = _fingerprint(tensors, settings)
    place = settings.get(PLACE, {}) | {FINGERPRINT: fingerprint}
    text = json.dumps(settings | {PLACE: place}, indent=2).encode()
    config.parent.mkdir(parents=True, exist_ok=True)
    with _locked(config.parent):
        _settle(weights, config)  # after a save that was killed
        try:
            with errors_name(config):
                write_atomically(_upcoming(config), text)
            save_safetensors(weights, tensors, {"format": "pt", FINGERPRINT: fingerprint})
        finally:
            _settle(weights, config)


def _settle(weights: Path, config: Path) -> None:
    """Put the upcoming settings in their place if they are those of the weights; or remove them."""
    upcoming = _upcoming(config)
    with contextlib.suppress(FileNotFoundError, CheckpointError):
        if _mark(read_json(upcoming)) == load_metadata(weights).get(FINGERPRINT, ""):
            write_atomically(config, upcoming.read_bytes())
    upcoming.unlink(missing_ok=True)


def load_pair(weights: Path, config: Path) -> tuple[Settings, Arrays]:
    """Read what `save_pair` or another library wrote; theirs have no fingerprint.

    Raises CheckpointError if a file is damaged, or if they are from two saves.
    """
    pair = _read_pair(weights, config)
    if pair is None:  # perhaps somebody is writing
        with _locked(config.parent):
            pair = _read_pair(weights, config)
    if pair is None:
        raise CheckpointError(f"{config} and {weights.name} are from two different saves: save "
                              "both again, or take both from the same copy")
    return pair


def _read_pair(weights: Path, config: Path) -> tuple[Settings, Arrays] | None:
    """Read both files; None if they are from two saves."""
    settings, upcoming = _read_if_there(config), _read_if_there(_upcoming(config))
    if settings is None and upcoming is None:
        settings = read_json(config)  # for its error
    tensors, metadata = load_with_metadata(weights)
    mark = metadata.get(FINGERPRINT)
    for found in (settings, upcoming):
        if found is not None and mark is not None and _mark(found) == mark:
            return found, tensors
    if settings is not None and (mark is None or _mark(settings) is None):
        return settings, tensors
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other thread or process writes a pair to the folder, and keep them waiting."""
    with _saving, contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system may have no locks
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # in forked processes, too
        yield


def _upcoming(config: Path) -> Path:
    return config.with_name(f".{config.name}{READY}")


def _read_if_there(path: Path) -> Settings | None:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None


def _mark(settings: Settings) -> Any:
    place = settings.get(PLACE)
    return place.get(FINGERPRINT) if isinstance(place, dict) else None


def _fingerprint(tensors: Arrays, settings: Settings) -> str:
    """Return a text that differs for any other weights or settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# ---- All results of one command


@contextlib.contextmanager
def results(folder: Path, record: str) -> Iterator[Path]:
    """Yield a temporary folder, whose files move into `folder` together when the context ends.

    `record` is the file that describes the others: the old one is removed before they move, and
    the new one comes last. If the process is killed while they move, the next call moves the rest.
    If an error ends the context, `folder` stays as it was. Raises FileExistsError if something is
    in the way of a file; then they wait in `folder`/.minilora-next for the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _move_ready(folder, record)
    temporary = temporary_in(folder)
    temporary.mkdir()
    try:
        yield temporary
        _move_ready(folder, record)  # those of another process, if there are any
        os.rename(temporary, folder / READY)
        _move_ready(folder, record)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_ready(folder: Path, record: str) -> None:
    """Move results that are complete to their places."""
    ready = folder / READY
    if not ready.is_dir():
        return
    if (ready / record).exists():
        files = [path for path in ready.rglob("*") if path.is_file() and path != ready / record]
        files = [*sorted(files), ready / record]
        places = {path: folder / path.relative_to(ready) for path in files}
        for place in places.values():
            above = [p for p in place.parents if folder in p.parents and p.exists()]
            if place.is_dir() or not all(p.is_dir() and os.access(p, os.W_OK) for p in above):
                raise FileExistsError(f"something is in the way of {place}: move it, and the next "
                                      f"call puts there what is in {ready}")
        (folder / record).unlink(missing_ok=True)
        for path, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    shutil.rmtree(ready, ignore_errors=True)
