"""Evaluate a model, or train it, without disturbing what else is done with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from minilora.nn.module import Module
from minilora.train.optim import Optimizer

_trained: set[int] = set()
_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(*models: Module) -> Iterator[None]:
    """Switch dropout off inside the `with` statement, and forget what its forwards kept.

    So a backward after it is an error: it would use the wrong forward.
    """
    states = [vars(module) for model in models for _, module in model.named_modules()]
    modes = [state.get("training", True) for state in states]
    for state in states:  # not by setattr, since this is done for each token that is generated
        state["training"] = False
    try:
        yield
    finally:
        for state, mode in zip(states, modes, strict=True):
            state["training"], state["_cache"] = mode, None


@contextlib.contextmanager
def training(model: Module) -> Iterator[None]:
    """Switch to training, and raise RuntimeError if the model is trained elsewhere meanwhile."""
    with _lock:
        if id(model) in _trained:
            raise RuntimeError("this model is being trained already, by another thread or by a "
                               "fit around this one: give each its own copy")
        _trained.add(id(model))
    try:
        model.train()
        yield
    finally:
        _trained.discard(id(model))


def check_trainable(model: Module, optimizer: Optimizer) -> None:
    """Raise ValueError if the optimizer could not train anything of the model."""
    if not model.is_trainable():
        raise ValueError("nothing to train: every parameter of the model is frozen")
    of_model = {id(p) for p in model.parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad and id(p) in of_model for p in trained):
        raise ValueError("the optimizer holds none of the model's trainable parameters: make it "
                         "after replace_linear_with_lora, from the parameters that require "
                         "gradients")
