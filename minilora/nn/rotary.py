"""Rotary positions: Su et al. 2021, "RoFormer", arXiv:2104.09864, equations 15 and 34.

Queries and keys are turned by angles that grow with their position. Attention takes their scalar
product, which depends only on the difference of the angles, and so on how far apart they are.
Channels are paired as in transformers, i with i + D/2; the paper pairs neighbours, 2i - 1 and 2i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.nn.validate import check_sizes


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's way to longer contexts: slow rotations become slower by `factor`.

    A pair of channels that makes more than `high_freq_factor` turns in `original_context_length`
    positions is fast, and stays as it is; one that makes fewer than `low_freq_factor` is slow; in
    between, the two frequencies are mixed. Source: `apply_scaling` in Meta's llama-models.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int

    def __post_init__(self) -> None:
        check_sizes("RopeScaling", original_context_length=self.original_context_length)
        as_floats(self, **dict.fromkeys(vars(self), (0.0, 1e30)))
        object.__setattr__(self, "original_context_length", int(self.original_context_length))
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor, got "
                             f"{self.low_freq_factor} and {self.high_freq_factor}")


def as_floats(config: Any, **ranges: tuple[float, float]) -> None:
    """Make numbers of a frozen dataclass floats. TypeError or ValueError if not in their ranges."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not least < value < most:
            raise ValueError(f"{name} must be between {least:g} and {most:g}, got {value}")
        object.__setattr__(config, name, float(value))


def rope_frequencies(
    head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Return by how much one position turns each pair of channels: theta^(-2i / D), (D / 2,)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if (s := scaling) is None:
        return frequencies
    turns = s.original_context_length * frequencies / (2.0 * math.pi)
    fast = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    fast = np.clip(fast, 0.0, 1.0)
    return fast * frequencies + (1.0 - fast) * frequencies / s.factor


def rope_tables(
    positions: np.ndarray, frequencies: np.ndarray, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine of position times frequency: (..., T) -> two (..., T, D / 2)."""
    angles = np.asarray(positions)[..., None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn each pair of channels (i, i + D/2) by its angle: x (..., T, D) -> (..., T, D).

    The inverse of a rotation is its transpose, the rotation by the opposite angle: with -sin, this
    is backward. (q turned by s) · (k turned by t) = q · (k turned by t - s).
    """
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
