"""Data parallelism with threads: each takes a share of the batch and uses the same weights.

NumPy releases Python's lock inside its loops and products, so two threads, each with a
one-thread BLAS, use two cores for everything; BLAS alone would use them for products only.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from minilora.nn.functional import IGNORE_INDEX, cross_entropy
from minilora.nn.layers import Dropout
from minilora.nn.module import M, Module, Parameter
from minilora.nn.validate import check_sizes
from minilora.train.blas import blas_threads
from minilora.train.mode import evaluating

Batch = tuple[np.ndarray, np.ndarray]  # ids and targets, both (B, T)
# (model, ids, targets) -> the mean loss over the targets, and its gradient for `model.backward`
Loss = Callable[[Module, np.ndarray, np.ndarray], tuple[float, np.ndarray]]

MOST_THREADS = 4
FLOPS_FOR_A_THREAD = 5e8  # with less work than this, sharing costs more than it saves


def usable_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads_that_pay(model: Module, batches: Iterable[Batch]) -> int:
    """Return how many threads pay off for this much work: at most one per core, and at most 4.

    A step takes about 6 FLOPs for each parameter and token.
    """
    tokens = sum(np.size(targets) for _, targets in batches)
    work = 6.0 * model.num_parameters() * tokens
    return max(1, min(usable_cores(), MOST_THREADS, int(work / FLOPS_FOR_A_THREAD)))


@functools.cache
def can_start_threads() -> bool:
    """Return whether this Python can start threads. In WebAssembly it usually cannot."""
    try:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
    except RuntimeError:
        return False
    return True


def replicate(model: M) -> M:
    """Return a copy that shares the weights but has caches, gradients and dropout of its own."""
    # so that deepcopy shares the weights; quantised ones are shared as they are
    memo = {id(p.data): p.data for p in model.parameters() if type(p) is Parameter}
    memo |= {id(p.grad): None for p in model.parameters()}
    memo |= {id(module._cache): None for _, module in model.named_modules()}
    twin = copy.deepcopy(model, memo)
    for (_, module), (_, copied) in zip(model.named_modules(), twin.named_modules(), strict=True):
        if isinstance(getattr(module, "rng", None), np.random.Generator):
            vars(copied)["rng"] = module.rng.spawn(1)[0]  # so that all differ
    return twin


def reseed(twin: Module, model: Module) -> None:
    """Seed a replica's dropout from the model's, so that a run can be repeated from its state."""
    for (_, module), (_, copied) in zip(model.named_modules(), twin.named_modules(), strict=True):
        if isinstance(module, Dropout) and module.p > 0.0:
            vars(copied)["rng"] = np.random.default_rng(module.rng.integers(1 << 63))


def follow(twin: Module, model: Module) -> bool:
    """Give a replica the arrays, the frozen state and the settings that the model has now.

    Returns False if the two have not the same modules any more.
    """
    pairs = itertools.zip_longest(model.named_modules(), twin.named_modules(), fillvalue=("", None))
    for (path, module), (name, copied) in pairs:
        if path != name or type(module) is not type(copied):
            return False
        if getattr(module, "merged", False) != getattr(copied, "merged", False):
            return False
        mine = vars(copied)
        for key, value in vars(module).items():
            if isinstance(value, Parameter):
                if type(mine.get(key)) is not type(value):
                    return False
                if type(value) is not Parameter:
                    mine[key] = value  # quantised: never changes
                else:
                    mine[key].data, mine[key].requires_grad = value.data, value.requires_grad
            elif isinstance(value, (int, float, str, np.generic)) and key != "training":
                mine[key] = value
            elif value is None and mine.get(key) is not None and key != "_cache":
                return False  # such as a bias that was removed
    return True


class DataParallel:
    """Loss and gradients of one batch by several threads; use it in a `with` statement.

    Parameters
    ----------
    model : its gradients are filled as by one `model.backward`
    threads : 1 or more; with 1 nothing is copied. None: as many as pay off for each batch
    loss : what is computed of each share of a batch
    """

    def __init__(
        self, model: Module, threads: int | None = None, loss: Loss | None = None
    ):
        if threads is not None:
            check_sizes("DataParallel", threads=threads)
        self.threads, self.loss = threads, loss or next_token_loss
        self.models = [model]  # and its replicas, made when needed
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def loss_and_gradients(self, ids: np.ndarray, targets: np.ndarray) -> float:
        """Run forward and backward on ids and targets (B, ...); return the mean loss in nats.

        Each share's mean is weighted by its number of targets, not counting IGNORE_INDEX.
        """
        ids, targets, total = np.asarray(ids), np.asarray(targets), num_targets(targets)
        if ids.shape[:1] != targets.shape[:1]:
            raise ValueError(f"ids {ids.shape} and targets {targets.shape} differ in batch size")
        models = self._models([(ids, targets)])
        for twin in models[1:]:
            twin.zero_grad()
            reseed(twin, models[0])
        if len(models) == 1 or not total:  # without targets, cross_entropy raises
            return self._work(models[0], ids, targets, 1.0)
        parts = zip(np.array_split(ids, len(models)), np.array_split(targets, len(models)),
                    strict=True)
        parts = [(x, t) for x, t in parts if num_targets(t)]
        shares = [(model, x, t, num_targets(t) / total)
                  for model, (x, t) in zip(models, parts, strict=False)]
        loss = sum(self.pool.map(self._work, *zip(*shares, strict=True)))
        for twin in models[1:]:
            for p, q in zip(models[0].parameters(), twin.parameters(), strict=True):
                if q.grad is not None:
                    p.accumulate(q.grad)
        return loss

    def mean_loss(self, batches: list[Batch]) -> float:
        """Return the mean loss in nats over all targets of the batches, with dropout off."""
        if not batches:
            raise ValueError("evaluation needs at least one batch")
        models = self._models(batches)
        with evaluating(*models):
            shares = [batches[i :: len(models)] for i in range(len(models))]
            run = self.pool.map if len(models) > 1 else map
            total = sum(run(self._total_loss, models, shares))
        return total / sum(num_targets(targets) for _, targets in batches)

    def _work(
        self, model: Module, ids: np.ndarray, targets: np.ndarray, share: float
    ) -> float:
        loss, dlogits = self._loss(model, ids, targets)
        if np.asarray(dlogits).dtype.kind not in "fiu":
            raise TypeError(f"the gradient of the loss must be an array, got {_short(dlogits)}")
        # A new array, because the loss may keep its own, or return it again.
        model.backward(dlogits if share == 1.0 else np.multiply(dlogits, share))
        return loss * share

    def _loss(self, model: Module, ids: np.ndarray, targets: np.ndarray) -> tuple[float, Any]:
        """Call the loss; TypeError if it does not return a pair that begins with a number."""
        found = self.loss(model, ids, targets)
        if not (isinstance(found, tuple) and len(found) == 2 and np.ndim(found[0]) == 0
                and np.asarray(found[0]).dtype.kind in "fiu"):
            raise TypeError("a loss must return (loss, dlogits), a number and its gradient, got "
                            f"{_short(found)}")
        return float(found[0]), found[1]

    def _total_loss(self, model: Module, batches: list[Batch]) -> float:
        return sum(self._loss(model, ids, targets)[0] * num_targets(targets)
                   for ids, targets in batches)

    def _models(self, batches: list[Batch]) -> list[Module]:
        """Return the model and one replica for each further thread."""
        threads = self.threads or threads_that_pay(self.models[0], batches)
        threads = min(threads, max(len(batches), *(len(ids) for ids, _ in batches)))  # shares
        if threads > 1 and not can_start_threads():
            threads = 1
        if threads > 1 and len(self.models) == 1:
            self._resources.enter_context(blas_threads(1))
            most = max(threads, MOST_THREADS)
            self.pool = self._resources.enter_context(ThreadPoolExecutor(most))
        for i in range(1, threads):
            if len(self.models) == i:
                self.models.append(replicate(self.models[0]))
            elif not follow(self.models[i], self.models[0]):
                self.models[i] = replicate(self.models[0])
        return self.models[:threads]


def next_token_loss(
    model: Module, ids: np.ndarray, targets: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the cross-entropy of model(ids) at the targets that are not IGNORE_INDEX."""
    return cross_entropy(model(ids), targets)


def _short(value: Any) -> str:
    """Name a value in an error: its type, or those of the parts of a tuple."""
    parts = ", ".join(type(part).__name__ for part in value) if isinstance(value, tuple) else ""
    return f"({parts})" if isinstance(value, tuple) else type(value).__name__


def num_targets(targets: np.ndarray) -> int:
    """Count the targets that are not IGNORE_INDEX."""
    return int(np.count_nonzero(np.asarray(targets) != IGNORE_INDEX))


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next step instead of returning it each time.

    A step allocates and frees the same arrays as the last one. By default most of that
    memory is returned to the system, then faulted in and zeroed again: 16,000 page faults a
    step at d_model 128, a quarter of its time. This affects the whole process. It does nothing
    except on Linux with glibc.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
            mallopt(trim_threshold, 1 << 30)
            mallopt(mmap_threshold, 1 << 25)
