"""Optimizers, learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from minilora.nn.functional import BLOCK
from minilora.nn.module import Module, Parameter


class Optimizer:
    """Parameter groups and what all optimizers share.

    `parameters` is an iterable of Parameters, or of dicts such as
    ``{"params": [...], "lr": 1e-3, "weight_decay": 0.0}``, whose settings win over the
    defaults. A parameter without a gradient (a frozen one, say) is passed over, and nothing
    is ever allocated for it. Raises ValueError for settings that cannot be.
    """

    def __init__(self, parameters: Iterable[Any], **defaults: Any):
        if isinstance(parameters, (Parameter, Module, dict)):
            raise TypeError(
                f"an optimizer takes an iterable of Parameters, got one {type(parameters).__name__}"
            )
        entries = list(parameters)
        if entries and not isinstance(entries[0], dict):
            entries = [{"params": entries}]
        self.param_groups: list[dict[str, Any]] = []
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("params"), Iterable):
                raise TypeError('a parameter group is a dict with an iterable of "params"')
            unknown = set(entry) - set(defaults) - {"params"}
            if unknown:
                raise ValueError(
                    f"unknown settings in a parameter group: {', '.join(sorted(unknown))}; "
                    f"there are {', '.join(defaults)}"
                )
            self.param_groups.append(defaults | entry | {"params": list(entry["params"])})
        everything = [p for group in self.param_groups for p in group["params"]]
        for p in everything:
            if not isinstance(p, Parameter):
                raise TypeError(f"an optimizer takes Parameters, got {type(p).__name__}")
        if not everything:
            raise ValueError("an optimizer needs at least one Parameter")
        if len({id(p) for p in everything}) < len(everything):
            raise ValueError("a Parameter stands in the optimizer twice")
        for group in self.param_groups:
            for name in ("lr", "weight_decay", "eps"):
                if not 0.0 <= group.get(name, 0.0) < math.inf:
                    raise ValueError(f"{name} must be 0 or more and finite, got {group[name]}")
            for beta in (group.get("momentum", 0.0), *group.get("betas", ())):
                if not 0.0 <= beta < 1.0:
                    raise ValueError(f"momentum and betas must be in 0..1 (1 excluded), got {beta}")
        self.state: dict[Parameter, list[np.ndarray]] = {}

    def zero_grad(self) -> None:
        """Forget every gradient (`.grad = None`)."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:
                    self.update(p, group)

    def update(self, p: Parameter, group: dict[str, Any]) -> None:
        raise NotImplementedError

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments held so far."""
        return sum(array.nbytes for arrays in self.state.values() for array in arrays)

    def _moments(self, p: Parameter, count: int) -> list[np.ndarray]:
        if p not in self.state:
            self.state[p] = [np.zeros_like(p.data) for _ in range(count)]
        return self.state[p]


def blocks(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield matching pieces of `BLOCK` numbers, so that a chain of operations stays in cache."""
    in_one = arrays[0].ndim > 0 and arrays[0].size <= BLOCK
    if in_one or not all(array.flags.c_contiguous for array in arrays):
        yield list(arrays)
        return
    flat = [array.reshape(-1) for array in arrays]  # views, since they are C-contiguous
    for start in range(0, flat[0].size, BLOCK):
        yield [array[start : start + BLOCK] for array in flat]


class SGD(Optimizer):
    """Gradient descent with momentum:  v = momentum v + g;  w = w - lr v.

    Decay is added to the gradient, g = dW + weight_decay w, as in PyTorch's SGD.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float = 1e-2, momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, p: Parameter, group: dict[str, Any]) -> None:
        g = p.grad
        if group["weight_decay"]:
            g = g + group["weight_decay"] * p.data
        if group["momentum"]:
            (v,) = self._moments(p, 1)
            v *= group["momentum"]
            v += g
            g = v
        p.data -= group["lr"] * g


class AdamW(Optimizer):
    """Adam with decoupled weight decay. Loshchilov & Hutter 2017, algorithm 2, as in PyTorch.

    w = w - lr weight_decay w
    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g²
    w = w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    t counts the updates of each parameter by itself, from 1.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
    ):
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.steps: dict[Parameter, int] = {}

    def update(self, p: Parameter, group: dict[str, Any]) -> None:
        (b1, b2), lr = group["betas"], group["lr"]
        t = self.steps[p] = self.steps.get(p, 0) + 1
        # Numerator and denominator are both multiplied by sqrt(1 - b2^t): one pass less.
        root = math.sqrt(1.0 - b2**t)
        eps, step_size = group["eps"] * root, lr * root / (1.0 - b1**t)
        decay = 1.0 - lr * group["weight_decay"]
        for w, g, m, v in blocks(p.data, p.grad, *self._moments(p, 2)):
            m *= b1
            m += (1.0 - b1) * g
            v *= b2
            v += (1.0 - b2) * g * g
            update = np.sqrt(v)
            update += eps
            np.divide(m, update, out=update)
            update *= step_size
            if decay != 1.0:
                w *= decay
            w -= update


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients so that their global L2 norm is at most `max_norm`.

    Returns the norm before that.
    Pascanu, Mikolov & Bengio 2013, algorithm 1. A norm that is not finite leaves them alone.
    Raises ValueError unless max_norm is above 0.
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in gradients))
    if max_norm < norm < math.inf:
        for g in gradients:
            np.multiply(g, max_norm / norm, out=g)
    return norm


def cosine_schedule(
    lr: float, steps: int, warmup: int = 0, final: float = 0.1
) -> Callable[[int], float]:
    """Return step -> learning rate: linear warm-up, then half a cosine down to final * lr.

    Step 0 gets lr / warmup, not 0, so that no step is wasted. Loshchilov & Hutter 2016,
    "SGDR", equation 5. Raises ValueError unless 0 <= warmup < steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"cosine_schedule needs 0 <= warmup < steps, got {warmup} and {steps}")

    def at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return lr * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done)))

    return at


def constant_schedule(lr: float) -> Callable[[int], float]:
    """Return step -> lr, whatever the step."""
    return lambda step: lr
