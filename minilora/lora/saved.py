"""Modules that are trained whole for a task, because a low-rank update is not enough for them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from minilora.nn.module import Module, Parameter
from minilora.nn.quantized import in_floats


class ModuleToSave(Module):
    """y = module(x): a module that is trained whole and replaces one of the base's.

    The usual case is the new head of a classifier. Like A and B it belongs to the task and is
    stored with it. (The name follows PEFT's `modules_to_save`.) Shapes are those of the module.
    Raises TypeError if `original` is not a Module.

    Parameters
    ----------
    original : the base's module; frozen, and kept for `remove_lora`
    module : the module to use instead; by default a trainable copy, with quantised weights in
        floating point
    """

    def __init__(self, original: Module, module: Module | None = None):
        for given in (original, *([] if module is None else [module])):
            if not isinstance(given, Module):
                raise TypeError(f"ModuleToSave needs a Module, got {type(given).__name__}")
        if module is None:
            module = in_floats(copy.deepcopy(original)).unfreeze()
        self.module = module
        self.original = original.freeze()

    @property
    def weight(self) -> Parameter:
        return self.module.weight

    def forward(self, *inputs: Any) -> np.ndarray:
        """Call the module."""
        return self.module(*inputs)

    def backward(self, dout: np.ndarray) -> Any:
        """Call the module's backward."""
        return self.module.backward(dout)
