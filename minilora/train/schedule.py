"""Learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from minilora.nn.module import Module, Parameter


def cosine_schedule(
    lr: float, steps: int, warmup: int = 0, final: float = 0.1
) -> Callable[[int], float]:
    """Return step -> learning rate: linear warm-up, then half a cosine down to final * lr.

    Step 0 has lr / warmup, not 0, so that no step is wasted. Loshchilov & Hutter 2016,
    "SGDR", equation 5. `steps` and `warmup` are counts of steps, and `final` is a share of lr.
    Raises ValueError unless 0 <= warmup < steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"cosine_schedule needs 0 <= warmup < steps, got {warmup} and {steps}")

    def at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return lr * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done)))

    return at


def _norm(g: np.ndarray) -> float:
    square = float(np.vdot(g, g))
    if 1e-30 < square < math.inf:
        return math.sqrt(square)
    largest = float(np.abs(g).max(initial=0.0))
    if not 0.0 < largest < math.inf:
        return largest
    scaled = g.astype(np.float64) / largest  # the squares are too large or small for the dtype
    return largest * math.sqrt(float(np.vdot(scaled, scaled)))


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients so that their global L2 norm is at most `max_norm` (above 0).

    Pascanu, Mikolov & Bengio 2013, algorithm 1. Gradients may have any
    shapes; they are unchanged if the norm is not finite.

    Returns
    -------
    norm : float, before scaling

    Raises
    ------
    ValueError : if `max_norm` is not above 0
    TypeError : for a single Parameter, or a model
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    if isinstance(parameters, (Parameter, Module)):
        raise TypeError("clip_grad_norm takes an iterable of Parameters, got one "
                        f"{type(parameters).__name__}")
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.hypot(*(_norm(g) for g in gradients))
    if max_norm < norm < math.inf:
        for g in gradients:
            np.multiply(g, max_norm / norm, out=g)
    return norm
