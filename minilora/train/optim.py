"""Optimizers: how gradients change parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minilora.nn.module import Parameter
from minilora.train.groups import parameter_groups
from minilora.train.optimizer_state import Resumable


class Optimizer(Resumable):
    """The base class: parameter groups, and a state for each parameter that can be put back.

    Parameters without a gradient, such as frozen ones, are skipped and get no state.

    Parameters
    ----------
    parameters : iterable of Parameters, or of groups: dicts such as
        ``{"params": [...], "lr": 1e-3, "weight_decay": 0.0}``, whose settings override the
        optimizer's

    Raises
    ------
    ValueError, TypeError : if a setting or a parameter is invalid
    """

    def __init__(self, parameters: Iterable[Any], **defaults: Any):
        self.param_groups = parameter_groups(parameters, defaults)
        self.state, self.steps = {}, {}  # moments, and numbers of updates

    def zero_grad(self) -> None:
        """Clear every gradient (`.grad = None`)."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:
                    self.update(p, p.grad, group)

    def update(self, p: Parameter, g: np.ndarray, group: dict[str, Any]) -> None:
        """Update one parameter from its gradient g."""
        raise NotImplementedError

    @property
    def state_bytes(self) -> int:
        """Bytes of all moments."""
        return sum(array.nbytes for arrays in self.state.values() for array in arrays)

    def _moments(self, p: Parameter, count: int) -> list[np.ndarray]:
        if p not in self.state:
            self.state[p] = [np.zeros_like(p.data) for _ in range(count)]
        return self.state[p]


class SGD(Optimizer):
    """Gradient descent with momentum:  v = momentum v + g;  w = w - lr v.

    v has the shape of w. As in PyTorch, g = dW + weight_decay w. Errors: see `Optimizer`.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float = 1e-2, momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, p: Parameter, g: np.ndarray, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            g = g + group["weight_decay"] * p.data
        if group["momentum"]:
            (v,) = self._moments(p, 1)
            v *= group["momentum"]
            v += g
            g = v
        p.data -= group["lr"] * g


class AdamW(Optimizer):
    """Adam with decoupled weight decay. Loshchilov & Hutter 2019, algorithm 2, as in PyTorch.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g²
    m_hat = m / (1 - b1^t)         v_hat = v / (1 - b2^t)
    w = w - lr weight_decay w - lr m_hat / (sqrt(v_hat) + eps)

    m and v have the shape of w. t counts the updates of each w from 1. Errors: see `Optimizer`.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
    ):
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, p: Parameter, g: np.ndarray, group: dict[str, Any]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        t = self.steps[p] = self.steps.get(p, 0) + 1
        m, v = self._moments(p, 2)
        m *= b1
        m += (1.0 - b1) * g
        v *= b2
        v += (1.0 - b2) * g * g
        m_hat = m / (1.0 - b1**t)
        v_hat = v / (1.0 - b2**t)
        p.data *= 1.0 - lr * group["weight_decay"]
        p.data -= lr * m_hat / (np.sqrt(v_hat) + group["eps"])
