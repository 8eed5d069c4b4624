"""Merging: the same function at the cost of a plain Linear.

x W + scale * x A B can be computed as one product, x W' with W' = W + scale * A B. Hu et al. 2021,
section 4.1, "No Additional Inference Latency". W' is kept beside W, which is never written to; so
unmerging only has to forget it, and the base is the base again, bit for bit.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from minilora.nn.large import forget
from minilora.nn.layers import Linear
from minilora.nn.module import Module, Parameter
from minilora.nn.quantized import QuantizedParameter


class Mergeable(Module):
    """A frozen Linear with a learned update of its weight.

    A subclass defines the update, `delta_weight`, and the Parameters it is made of,
    `task_parameters`; its forward and backward use `merged_linear` while it is merged. What W' was
    made of is read-only for that time, so that W' cannot become out of date unnoticed.

    Attributes
    ----------
    linear : Linear with the weight W
    merged : bool
    """

    linear: Linear
    _merged: tuple = ()  # while merged: a Linear with W', and the arrays W' was made of

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    def delta_weight(self) -> np.ndarray:
        """Return W' - W, (in_features, out_features)."""
        raise NotImplementedError

    def task_parameters(self) -> list[Parameter]:
        """Return the Parameters that belong to the task and not to the base."""
        raise NotImplementedError

    def to_linear(self) -> Linear:
        """Return a plain, frozen Linear with the weight W'; it shares the bias with `linear`."""
        linear = copy.copy(self.linear)
        linear._cache = None
        linear.weight = Parameter(linear.weight.data + self.delta_weight(), requires_grad=False)
        return linear

    def merge(self) -> None:
        """Form W' and use it from now on. Raises RuntimeError if already merged."""
        if self.merged:
            raise RuntimeError(f"{self.title()} is merged already; merging twice would add twice")
        self._merged = self.to_linear(), self._arrays()
        self._switched(writeable=False)

    def unmerge(self) -> None:
        """Discard W'. Raises RuntimeError if not merged."""
        if not self.merged:
            raise RuntimeError(f"{self.title()} is not merged, there is nothing to undo")
        self._switched(writeable=True)
        self._merged = ()

    def merged_linear(self) -> Linear:
        """Return the Linear with W'. Raises RuntimeError if W, A or B were replaced since."""
        linear, arrays = self._merged
        if any(a is not b for a, b in zip(self._arrays(), arrays, strict=True)):
            raise RuntimeError(f"{self.title()} was changed while it was merged: unmerge it, and "
                               "merge it again")
        return linear

    def merged_backward(self, dout: np.ndarray) -> np.ndarray:
        """dx = dout W'ᵀ. Raises RuntimeError if there is something to train."""
        if self.is_trainable():
            raise RuntimeError(f"{self.title()} is merged: unmerge it before training")
        return self.merged_linear().backward(dout)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.merged:  # the arrays of a copy are writable, those of a pickle are views of bytes
            for p in self._parameters():
                if type(p) is Parameter:
                    p.data = p.data if p.data.flags.owndata else p.data.copy()
            self._merged = self._merged[0], self._arrays()
            self._switched(writeable=False)

    def _arrays(self) -> list[Any]:
        """Return the arrays; of a quantised weight, computed at each read, the parts."""
        return [p.parts if isinstance(p, QuantizedParameter) else p.data
                for p in self._parameters()]

    def _parameters(self) -> list[Parameter]:
        parameters = self.linear.weight, self.linear.bias, *self.task_parameters()
        return [p for p in parameters if p is not None]

    def _switched(self, writeable: bool) -> None:
        """Lock or unlock the arrays that W' was made of; no backward fits an earlier forward."""
        for array in self._merged[1]:
            if isinstance(array, np.ndarray):
                array.flags.writeable = writeable
        forget(self)

    def title(self) -> str:
        return f"{type(self).__name__} around {self.linear.title()}"
