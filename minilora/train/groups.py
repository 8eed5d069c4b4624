"""Parameter groups: what an optimizer is given, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from minilora.nn.module import Module, Parameter


def parameter_groups(parameters: Iterable[Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of an optimizer; `Optimizer` says what they may be given as.

    Raises ValueError or TypeError for an invalid setting or parameter.
    """
    if isinstance(parameters, (Parameter, Module, dict)):
        raise TypeError("an optimizer takes an iterable of Parameters, got one "
                        f"{type(parameters).__name__}")
    groups = list(parameters)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [_group(group, defaults) for group in groups]
    everything = [p for group in groups for p in group["params"]]
    for p in everything:
        if not isinstance(p, Parameter):
            raise TypeError(f"an optimizer takes Parameters, got {type(p).__name__}")
    if not everything:
        raise ValueError("an optimizer needs at least one Parameter")
    if len({id(p) for p in everything}) < len(everything):
        raise ValueError("a Parameter is in the optimizer twice")
    return groups


def _group(group: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter group with the defaults filled in, checked."""
    if not isinstance(group, dict) or not isinstance(group.get("params"), Iterable):
        raise TypeError('a parameter group is a dict with an iterable of "params"')
    unknown = set(group) - set(defaults) - {"params"}
    if unknown:
        raise ValueError(f"unknown settings in a parameter group: {', '.join(sorted(unknown))}; "
                         f"the settings are {', '.join(defaults)}")
    group = defaults | group | {"params": list(group["params"])}
    betas = group.get("betas", (0.0, 0.0))
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, such as (0.9, 0.999), got {betas!r}")
    numbers = {name: group[name] for name in ("lr", "weight_decay", "eps") if name in group}
    shares = {"momentum": group.get("momentum", 0.0), "betas[0]": betas[0], "betas[1]": betas[1]}
    for name, value in (numbers | shares).items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0.0 <= value < (1.0 if name in shares else math.inf):
            bound = "less than 1" if name in shares else "finite"
            raise ValueError(f"{name} must be 0 or more and {bound}, got {value}")
    return group
