"""The factor in front of A B."""

from __future__ import annotations

import math

import numpy as np

from minilora.nn.validate import check_sizes


def lora_scale(rank: int, alpha: float, scaling: str = "alpha/r") -> float:
    """Return the factor in front of A B, or raise an error naming the invalid hyperparameter.

    "alpha/r"         Hu et al. 2021, section 4.1, and PEFT
    "alpha/sqrt(r)"   rsLoRA: Kalajdzievski 2023, equation 7
    "alpha"           used by early tutorials and books
    """
    check_sizes("LoRA", rank=rank)
    if not isinstance(alpha, (int, float, np.integer, np.floating)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    try:
        alpha = float(alpha)  # a float16 would lose digits when divided
    except OverflowError:  # an int of hundreds of digits
        alpha = math.inf
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    scales = {"alpha": alpha, "alpha/r": alpha / rank, "alpha/sqrt(r)": alpha / rank**0.5}
    if not isinstance(scaling, str) or scaling not in scales:
        raise ValueError(f"scaling must be one of {', '.join(scales)}; got {scaling!r}")
    return scales[scaling]
