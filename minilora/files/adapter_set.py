"""Many tasks on one base: several adapters at hand, one of them active, or a mixture in a batch.

The base is in memory once. A task is the handful of layers that stand in the place of the
base's while it is active, so switching moves no numbers at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.peft_read import load_adapter, save_adapter
from minilora.lora.adapter import Adapter, attach, get_adapter
from minilora.lora.dora import DoRALinear
from minilora.lora.wrap import (
    LinearWithLoRA,
    base_module,
    find_targets,
    install,
    remove_lora,
    replace_linear_with_lora,
    wrappers,
)
from minilora.nn.functional import matmul
from minilora.nn.layers import Embedding
from minilora.nn.module import Module, closest


class AdapterSet:
    """Named adapters on one base.

        tasks = AdapterSet(load_base())
        tasks.add("code", "figures/adapters/r8-seed0")     from a file
        tasks.add("new", rank=8, alpha=16)                 a fresh one, to be trained
        tasks.set_active("code")                           now `tasks.model` has this task
        tasks.set_active(None)                             and now it is the base, bit for bit
        logits = tasks(ids, ["code", None, "new"])         each row with its own

    model    the base, with the layers of the active task in it; train and use it as ever
    active   the name of that task, or None

    Raises ValueError where the model has an adapter already (put it in with `add`), or a name
    is taken or unknown.
    """

    def __init__(self, model: Module):
        if isinstance(model, Module) and wrappers(model):
            raise ValueError("the model has an adapter: get_adapter, remove_lora, and add it")
        find_targets(model)  # refuses what is no model with linear layers
        self.model = model
        self.active: str | None = None
        self._tasks: dict[str, dict[str, Module]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def add(self, name: str, source: Adapter | str | Path | None = None, **options: Any) -> None:
        """Add a task: an `Adapter`, one from a folder, or a fresh one; it does not become active.

        options   for a fresh one, the arguments of `replace_linear_with_lora`
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"a task needs a name, got {name!r}")
        if name in self._tasks:
            raise ValueError(f"there is a task {name!r} already: remove it first")
        if source is not None and options:
            raise TypeError(f"{', '.join(options)}: options are for a fresh adapter only")
        active, training = self.active, self.model.training
        self.set_active(None)
        try:
            if source is None:
                replace_linear_with_lora(self.model, **options)
            elif isinstance(source, Adapter):
                attach(self.model, source)
            else:
                load_adapter(self.model, source)
            self._tasks[name] = wrappers(self.model)
            remove_lora(self.model)
        finally:
            self.model.train(training)
            self.set_active(active)

    def set_active(self, name: str | None) -> None:
        """Make the model that of a task, or with None the base."""
        if name is not None:
            self._check(name)
        found, put = wrappers(self.model), self._tasks.get(self.active or "", {})
        if found.keys() != put.keys() or any(found[path] is not put[path] for path in put):
            raise RuntimeError(
                "the adapter on the model was changed by other means than this AdapterSet (such as "
                "load_adapter, remove_lora or merge_lora(unload=True)): make a new one"
            )
        if name is not None and name == self.active:
            return
        if found:
            remove_lora(self.model)
        install(self.model, {} if name is None else self._tasks[name])
        self.model.train(self.model.training)  # of the layers that came in as well
        self.active = name

    def remove(self, name: str) -> None:
        """Forget a task. If it is active, the model becomes the base."""
        self._check(name)
        if self.active == name:
            self.set_active(None)
        del self._tasks[name]

    def get(self, name: str) -> Adapter:
        """Return a copy of a task as an `Adapter`, to save, add up or compress."""
        with self._for_now(name) as model:
            return get_adapter(model)

    def save(self, name: str, path: str | Path) -> None:
        """Write a task to a folder; see `save_adapter`."""
        with self._for_now(name) as model:
            save_adapter(model, path)

    @contextlib.contextmanager
    def _for_now(self, name: str) -> Iterator[Module]:
        """Make a task the active one meanwhile."""
        active = self.active
        self.set_active(name)
        try:
            yield self.model
        finally:
            self.set_active(active)

    def __call__(self, inputs: np.ndarray, names: Sequence[str | None]) -> np.ndarray:
        """Forward a batch in which every row has its own task, or None for the base.

        inputs (B, ...) and B names -> the outputs, row by row those of each task alone. The
        products with the base's weights are done once for the whole batch; only the thin ones
        are done for each task, over the rows that it has. Dropout is off, and there is no
        backward. ValueError where the tasks' heads differ in width.
        """
        inputs, active, training = np.asarray(inputs), self.active, self.model.training
        if isinstance(names, str) or len(names) != len(inputs):
            raise ValueError(f"{len(inputs)} rows need a list of as many names, got {names!r}")
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                self._check(name)
                rows.setdefault(name, []).append(row)
        places: dict[str, list[tuple[list[int], Module]]] = {}
        for name, where in rows.items():
            for path, wrapper in self._tasks[name].items():
                places.setdefault(path, []).append((where, wrapper))
        bases = {path: base_module(parts[0][1]) for path, parts in places.items()}
        for path, base in bases.items():
            if any(other.startswith(f"{path}.") for other in places):
                raise ValueError(f"one task has {path} whole and another parts of it: their rows "
                                 "cannot share a batch")
            if isinstance(base, Embedding):
                raise ValueError(f"a task has its own {path}: embeddings cannot be mixed")
        self.set_active(None)
        self.model.eval()
        try:
            install(self.model, {path: _Mixed(bases[path], parts, len(inputs))
                                 for path, parts in places.items()})
            return self.model(inputs)
        finally:
            install(self.model, bases)
            self.model.training = training
            self.set_active(active)

    def _check(self, name: str) -> None:
        if name not in self._tasks:
            raise ValueError(f"there is no task {name!r}{closest(str(name), self._tasks)} "
                             f"(there are: {', '.join(self._tasks) or 'none'})")

    def __repr__(self) -> str:
        return f"AdapterSet({', '.join(self._tasks)}; active: {self.active})"


class _Mixed(Module):
    """One layer in which some rows of the batch have a task's layer and the others the base's."""

    def __init__(self, base: Module | None, parts: list[tuple[list[int], Module]], n_rows: int):
        self.base = base
        self.rows = [rows for rows, _ in parts]
        self.n_rows = n_rows
        for i, (_, layer) in enumerate(parts):
            setattr(self, str(i), layer.eval())

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, ...) -> (B, ...): the base's product for all rows, the thin ones for some."""
        parts = [(rows, getattr(self, str(i))) for i, rows in enumerate(self.rows)]
        thin = [(rows, p) for rows, p in parts if isinstance(p, LinearWithLoRA)]
        whole = [(rows, p(x[rows])) for rows, p in parts if not isinstance(p, LinearWithLoRA)]
        if sum(len(rows) for rows, _ in whole) < self.n_rows:
            if self.base is None:
                raise ValueError("rows without a head of their own need a base that has one")
            y = self.base(x)
        else:  # every row has a module of its own
            y = np.empty((self.n_rows, *whole[0][1].shape[1:]), whole[0][1].dtype)
        for rows, layer in thin:
            if isinstance(layer, DoRALinear):
                y[rows] += matmul(x[rows], layer.delta_weight())
            else:
                y[rows] += layer.lora(x[rows])
        for rows, out in whole:
            if out.shape[1:] != y.shape[1:]:
                raise ValueError("rows whose heads differ in width cannot share a batch")
            y[rows] = out
        return y
