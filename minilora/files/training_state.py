"""The whole state of a training run in one file, from which it goes on in the same bits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.safetensors import load_metadata, load_with_metadata, save_safetensors
from minilora.nn.module import Module
from minilora.nn.validate import CheckpointError
from minilora.train.history import History
from minilora.train.optim import Optimizer

RUN = "run"  # the key in the metadata
EACH_STEP = "steps", "losses", "learning_rates", "seconds"  # what a record has of each step


def save_state(
    path: str | Path, model: Module, optimizer: Optimizer, history: History, about: dict[str, Any]
) -> None:
    """Write what a run has come to, replacing an older state only once this one is complete.

    It has all trainable parameters, the state of the optimizer, those of the random generators in
    the model (of dropout), the record, and `about`: what else is needed to go on, as JSON. The
    position in the data is the number of steps in the record.
    """
    state = optimizer.state_dict()
    tensors = {f"model/{name}": p.data for name, p in model.named_parameters() if p.requires_grad}
    for i, entry in state["state"].items():
        tensors |= {f"moment/{i}/{j}": array for j, array in enumerate(entry["moments"])}
    run = {
        "groups": state["param_groups"], "about": about, "history": asdict(history),
        "steps": {i: entry["step"] for i, entry in state["state"].items()},
        "generators": {name: generator.bit_generator.state
                       for name, generator in _generators(model).items()},
    }
    save_safetensors(path, tensors, {RUN: json.dumps(run, default=np.ndarray.tolist)})


def read_about(path: str | Path) -> dict[str, Any]:
    """Return the `about` of a state. Raises CheckpointError if the file is not a state."""
    return _run(path, load_metadata(path))["about"]


def load_state(path: str | Path, model: Module, optimizer: Optimizer) -> History:
    """Put model and optimizer, made as for the beginning of the run, into a state.

    Returns
    -------
    History
        To be given to `fit`.

    Raises
    ------
    CheckpointError
        If the file is damaged, or does not fit them.
    FileNotFoundError
        If there is none.
    """
    tensors, metadata = load_with_metadata(path)
    run = _run(path, metadata)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generators = _generators(model)
    try:
        arrays = {name: tensors[f"model/{name}"] for name in trained}
        if bad := [name for name, p in trained.items() if p.shape != arrays[name].shape]:
            raise ValueError(f"{bad[0]} has another shape")
        history = History(**run["history"])
        if len({len(getattr(history, series)) for series in EACH_STEP}) > 1:
            raise ValueError("its record has gaps")
        optimizer.load_state_dict({"param_groups": run["groups"], "state": {
            int(i): {"step": step, "moments": _moments(tensors, i)}
            for i, step in run["steps"].items()}})
        for name, generator in generators.items():
            generator.bit_generator.state = run["generators"][name]
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} is not a state of this run: {fault}") from None
    for name, p in trained.items():
        p.data[...] = arrays[name]
    return history


def _run(path: str | Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        run = json.loads(metadata[RUN])
        if not isinstance(run["about"], dict):
            raise TypeError
        return run
    except (KeyError, ValueError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is not the state of a training run") from None


def _moments(tensors: dict[str, np.ndarray], i: str) -> list[np.ndarray]:
    """Return the moments of parameter i, in order."""
    count = sum(name.startswith(f"moment/{i}/") for name in tensors)
    return [tensors[f"moment/{i}/{j}"] for j in range(count)]


def _generators(model: Module) -> dict[str, np.random.Generator]:
    """Return {dotted name of a module: its random generator}."""
    found = {name: getattr(module, "rng", None) for name, module in model.named_modules()}
    return {name: rng for name, rng in found.items() if isinstance(rng, np.random.Generator)}
