"""Data parallelism with threads: each takes a share of the batch on the same weights.

NumPy lets go of Python's lock inside its loops and products, so two threads, each with a
one-thread BLAS, use two cores for everything, where BLAS alone uses them for products only.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minilora.nn.functional import IGNORE_INDEX, cross_entropy
from minilora.nn.module import Module
from minilora.nn.validate import check_sizes


def default_threads() -> int:
    """Return how many threads pay: the cores, at most 4; 1 where BLAS cannot be told to use one."""
    try:
        import threadpoolctl  # noqa: F401
    except ImportError:
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, 4)


def replicate(model: Module) -> Module:
    """Return a copy that shares the weights but has caches, gradients and dropout of its own."""
    memo = {id(p.data): p.data for p in model.parameters()}  # deepcopy takes these as copied
    memo |= {id(p.grad): None for p in model.parameters()}
    memo |= {id(module._cache): None for _, module in model.named_modules()}
    twin = copy.deepcopy(model, memo)
    for (_, module), (_, copied) in zip(model.named_modules(), twin.named_modules(), strict=True):
        if isinstance(getattr(module, "rng", None), np.random.Generator):
            copied.rng = module.rng.spawn(1)[0]  # of the original, so that no two are alike
    return twin


class DataParallel:
    """Loss and gradients of one batch by several threads; use it in a `with` statement.

    model     its gradients are filled, as by one `model.backward`
    threads   1 or more; with 1 nothing is copied
    """

    def __init__(self, model: Module, threads: int = 1):
        check_sizes("DataParallel", threads=threads)
        self.models = [model, *(replicate(model) for _ in range(threads - 1))]
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> DataParallel:
        if len(self.models) > 1:
            self.pool = self._resources.enter_context(ThreadPoolExecutor(len(self.models)))
            self._resources.enter_context(one_blas_thread())
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def loss_and_gradients(self, ids: np.ndarray, targets: np.ndarray) -> float:
        """Forward and backward of ids and targets (B, ...); return the mean loss in nats.

        Each part's mean counts by its number of targets; those with IGNORE_INDEX do not count.
        """
        ids, targets, total = np.asarray(ids), np.asarray(targets), num_targets(targets)
        if ids.shape[:1] != targets.shape[:1]:
            raise ValueError(f"ids {ids.shape} and targets {targets.shape} differ in batch size")
        for twin in self.models[1:]:
            twin.zero_grad()
        if len(self.models) == 1 or not total:  # cross_entropy says what is wrong with none
            return _work(self.models[0], ids, targets, 1.0)
        parts = zip(
            np.array_split(ids, len(self.models)), np.array_split(targets, len(self.models)),
            strict=True,
        )
        parts = [(x, t) for x, t in parts if num_targets(t)]
        shares = [(model, x, t, num_targets(t) / total)
                  for model, (x, t) in zip(self.models, parts, strict=False)]
        loss = sum(self.pool.map(_work, *zip(*shares, strict=True)))
        for twin in self.models[1:]:
            for p, q in zip(self.models[0].parameters(), twin.parameters(), strict=True):
                if q.grad is not None:
                    p.accumulate(q.grad)
        return loss

    def mean_loss(self, batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """Return the mean loss over all targets of the batches, dropout off."""
        if not batches:
            raise ValueError("evaluation needs at least one batch")
        training = self.models[0].training
        for model in self.models:
            model.eval()
        try:
            shares = [batches[i :: len(self.models)] for i in range(len(self.models))]
            run = self.pool.map if len(self.models) > 1 else map
            total = sum(run(_total_loss, self.models, shares))
        finally:
            for model in self.models:
                model.train(training)
        return total / sum(num_targets(targets) for _, targets in batches)


def _work(model: Module, ids: np.ndarray, targets: np.ndarray, share: float) -> float:
    loss, dlogits = cross_entropy(model(ids), targets)
    dlogits *= share
    model.backward(dlogits)
    return loss * share


def _total_loss(model: Module, batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    return sum(
        cross_entropy(model(ids), targets)[0] * num_targets(targets) for ids, targets in batches
    )


def num_targets(targets: np.ndarray) -> int:
    """Count the targets that are not IGNORE_INDEX."""
    return int(np.count_nonzero(np.asarray(targets) != IGNORE_INDEX))


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread meanwhile; needs threadpoolctl, and does nothing without it."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(1):
        yield


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next step instead of giving it back each time.

    A step allocates and frees the same arrays as the last one. By default most of that
    memory goes back to the system and is faulted in and zeroed again: 16,000 page faults a
    step at d_model 128, a quarter of its time. Holds for the whole process; elsewhere than
    on Linux with glibc it does nothing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
            mallopt(trim_threshold, 1 << 30)
            mallopt(mmap_threshold, 1 << 25)
