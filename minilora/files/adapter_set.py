"""Several adapters on one base: one of them is active, or each row of a batch has its own.

The base is in memory once. A task is a set of layers that replace the base's while the task is
active, so switching copies no numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.peft_read import load_adapter
from minilora.files.peft_write import save_adapter
from minilora.lora.adapter import Adapter, attach, get_adapter
from minilora.lora.dora import DoRALinear
from minilora.lora.layer import LinearWithLoRA
from minilora.lora.surgery import install, unwrapped, wrappers
from minilora.lora.targets import find_targets
from minilora.lora.wrap import remove_lora, replace_linear_with_lora
from minilora.nn.functional import matmul
from minilora.nn.layers import Embedding
from minilora.nn.module import Module
from minilora.nn.validate import closest
from minilora.train.mode import evaluating


class AdapterSet:
    """Named adapters on one base.

        tasks = AdapterSet(load_base())
        tasks.add("code", "runs/compare/adapters/r8-seed0")  from a folder
        tasks.add("new", rank=8, alpha=16)                   fresh, to be trained
        tasks.set_active("code")                             tasks.model has this task
        tasks.set_active(None)                               tasks.model is the base, bit for bit
        logits = tasks(ids, ["code", None, "new"])           one task for each row

    Parameters
    ----------
    model
        The base, without an adapter.

    Attributes
    ----------
    model
        The base, with the layers of the active task in it. Train and use it like any model.
    active
        The name of the active task, or None.
    names
        The names of all tasks.

    Raises
    ------
    ValueError
        If the model already has an adapter.
    """

    def __init__(self, model: Module):
        if isinstance(model, Module) and wrappers(model):
            raise ValueError("the model already has an adapter: call get_adapter and remove_lora, "
                             "then add it")
        find_targets(model)  # raises if there are no linear layers
        self.model = model
        self.active: str | None = None
        self._tasks: dict[str, Mapping[str, Module]] = {}

    @property
    def names(self) -> list[str]:
        """The names of all tasks."""
        return list(self._tasks)

    def add(self, name: str, source: Adapter | str | Path | None = None, **options: Any) -> None:
        """Add a task. It does not become active.

        Parameters
        ----------
        name
            The name of the new task.
        source
            An `Adapter`, or the folder of one. None makes a fresh adapter.
        **options
            Arguments of `replace_linear_with_lora`, for a fresh adapter only.

        Raises
        ------
        ValueError
            If the name is taken, or if the adapter does not fit the base.
        TypeError
            If the name is not text or is empty, or if there are both a source and options.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"a task needs a name, got {name!r}")
        if name in self._tasks:
            raise ValueError(f"a task {name!r} exists already: remove it first")
        if source is not None and options:
            raise TypeError(f"{', '.join(options)}: options are only for a fresh adapter")
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
        """Give the model the layers of a task, or with None those of the base.

        Raises
        ------
        ValueError
            If there is no task of this name.
        RuntimeError
            If anything else has changed the adapter on the model.
        """
        if name is not None:
            self._check(name)
        found, put = wrappers(self.model), self._tasks.get(self.active or "", {})
        if found.keys() != put.keys() or any(found[path] is not put[path] for path in put):
            raise RuntimeError(
                "the adapter on the model was changed by other means than this AdapterSet (such as "
                "load_adapter, remove_lora or merge_lora(unload=True)): make a new set"
            )
        if name is not None and name == self.active:
            return
        if found:
            remove_lora(self.model)
        install(self.model, {} if name is None else {**self._tasks[name]})
        self.model.train(self.model.training)  # the installed layers may be in another mode
        self.active = name

    def remove(self, name: str) -> None:
        """Remove a task. If it is active, the model becomes the base."""
        self._check(name)
        if self.active == name:
            self.set_active(None)
        del self._tasks[name]

    def get(self, name: str) -> Adapter:
        """Return a copy of a task as an `Adapter`, to be saved, added or compressed."""
        with self._temporarily(name) as model:
            return get_adapter(model)

    def save(self, name: str, path: str | Path) -> None:
        """Write a task to a folder; see `save_adapter`."""
        with self._temporarily(name) as model:
            save_adapter(model, path)

    @contextlib.contextmanager
    def _temporarily(self, name: str) -> Iterator[Module]:
        """Make a task active until the context ends, and yield the model."""
        active = self.active
        self.set_active(name)
        try:
            yield self.model
        finally:
            self.set_active(active)

    def __call__(self, inputs: np.ndarray, names: Sequence[str | None]) -> np.ndarray:
        """Run the model on a batch in which each row has its own task.

        The base's products are computed once for the whole batch, those with A and B once for
        each task. Dropout is off, and there is no backward.

        Parameters
        ----------
        inputs
            (B, ...), such as token ids (B, T).
        names
            B names of tasks; None means the base.

        Returns
        -------
        ndarray
            (B, ...). Each row is what its task alone would give.

        Raises
        ------
        ValueError
            If a task is unknown, or if tasks cannot share a batch (different widths of heads,
            an embedding of its own, a whole module in one and parts of it in another).
        """
        inputs, active = np.asarray(inputs), self.active
        if isinstance(names, str) or len(names) != len(inputs):
            raise ValueError(f"{len(inputs)} rows need a list of as many names, got {names!r}")
        places = self._places(names)
        bases = {path: unwrapped(parts[0][1]) for path, parts in places.items()}
        for path, base in bases.items():
            if any(other.startswith(f"{path}.") for other in places):
                raise ValueError(f"one task has {path} whole and another parts of it: their rows "
                                 "cannot share a batch")
            if isinstance(base, Embedding):
                raise ValueError(f"a task has its own {path}: embeddings cannot be mixed")
        self.set_active(None)
        try:
            with evaluating(self.model):
                install(self.model, {path: _Mixed(bases[path], parts, len(inputs))
                                     for path, parts in places.items()})
                return self.model(inputs)
        finally:
            install(self.model, bases)
            self.set_active(active)

    def _places(self, names: Sequence[str | None]) -> dict[str, list[tuple[list[int], Module]]]:
        """Return {dotted name: [(rows of a task, its layer there)]} for a task for each row."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                self._check(name)
                rows.setdefault(name, []).append(row)
        places: dict[str, list[tuple[list[int], Module]]] = {}
        for name, where in rows.items():
            for path, wrapper in self._tasks[name].items():
                places.setdefault(path, []).append((where, wrapper))
        return places

    def _check(self, name: str) -> None:
        """Raise ValueError if there is no task of this name."""
        if name not in self._tasks:
            raise ValueError(f"there is no task {name!r}{closest(str(name), self._tasks)} "
                             f"(there are: {', '.join(self._tasks) or 'none'})")

    def __repr__(self) -> str:
        return f"AdapterSet({', '.join(self._tasks)}; active: {self.active})"


class _Mixed(Module):
    """A layer that applies a task's layer to some rows of a batch and the base's to the others."""

    def __init__(self, base: Module, parts: list[tuple[list[int], Module]], n_rows: int):
        self.base = base
        self.rows = [rows for rows, _ in parts]
        self.n_rows = n_rows
        for i, (_, layer) in enumerate(parts):
            setattr(self, str(i), layer.eval())

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, ...) -> (B, ...): the base's product for all rows, plus each task's for its own."""
        parts = [(rows, getattr(self, str(i))) for i, rows in enumerate(self.rows)]
        thin = [(rows, p) for rows, p in parts if isinstance(p, LinearWithLoRA)]
        whole = [(rows, p(x[rows])) for rows, p in parts if not isinstance(p, LinearWithLoRA)]
        if sum(len(rows) for rows, _ in whole) < self.n_rows:
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
