"""Select modules of a model by names and globs."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from typing import Any

from minilora.lora.layer import LinearWithLoRA
from minilora.lora.saved import ModuleToSave
from minilora.lora.surgery import base_modules, check_tree, inside, wrappers
from minilora.nn.layers import Linear, TiedHead
from minilora.nn.module import Module
from minilora.nn.validate import closest


def find_targets(model: Module, target_modules: str | list[str] | None = None) -> dict[str, Linear]:
    """Return {dotted name: Linear} for the Linears that match and are not wrapped yet.

    Raises
    ------
    ValueError : if a name matches no Linear, plain or wrapped; the message lists the names
    TypeError : if the model is a bare layer or not a Module
    """
    check_tree(model)
    wrapped = wrappers(model)
    return {path: linear for path, linear in _matching(model, target_modules).items()
            if path not in wrapped}


def _matching(model: Module, target_modules: str | list[str] | None) -> dict[str, Linear]:
    """Return {dotted name: Linear} for the Linears that match, without their wrappers."""
    saved = {path: m for path, m in wrappers(model).items() if isinstance(m, ModuleToSave)}
    linears = {path: module for path, module in base_modules(model).items()
               if isinstance(module, Linear) and (path in saved or not inside(path, saved))}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no Linear layer to adapt")
    return {path: linears[path] for path in match_names(list(linears), target_modules)}


def warn_of_rank(rank: int, linears: Iterable[Linear]) -> None:
    """Warn if the rank is above min(in, out) of every layer."""
    most = max((min(linear.weight.shape) for linear in linears), default=rank)
    if rank > most:
        warnings.warn(f"rank {rank} is above min(in, out) = {most}: A B cannot have a rank above "
                      f"that, so rank {most} could learn the same with fewer parameters",
                      stacklevel=3)


def keeps(model: Module, target_modules: str | list[str] | None, *wanted: Any) -> bool:
    """Return whether the adapted layers that match are frozen but for their adapters.

    Warns if their (type, rank, alpha, scaling, dropout) are not the wanted ones.
    """
    wrapped = wrappers(model)
    kept = {path: layer for path in _matching(model, target_modules)
            if isinstance(layer := wrapped.get(path), LinearWithLoRA)}
    other = [path for path, layer in kept.items() if wanted != (
        type(layer), layer.lora.rank, layer.lora.alpha, layer.lora.scaling, layer.dropout.p)]
    if other:
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        old = kept[other[0]].lora
        warnings.warn(f"{other[0]}{more} has an adapter already, of rank {old.rank} and alpha "
                      f"{old.alpha:g}, and keeps it: call remove_lora first for a new one",
                      stacklevel=3)
    return not any(layer.linear.is_trainable() for layer in kept.values())


def find_modules(model: Module, names: str | list[str]) -> dict[str, Module]:
    """Return {dotted name: module} for the modules that match and are not saved whole yet.

    Raises
    ------
    ValueError : if a name matches nothing, a module with LoRA layers, or a tied head
    TypeError : if the model is a bare layer or not a Module
    """
    check_tree(model)
    wrapped = wrappers(model)
    known = {path: m for path, m in base_modules(model).items()
             if path and (path in wrapped or not inside(path, wrapped))}
    for path in [path for path, module in known.items() if isinstance(module, TiedHead)]:
        if path in ([names] if isinstance(names, str) else names):
            raise ValueError(f"{path} is a tied head and has no matrix of its own: save the "
                             "embedding, or put a Linear there first")
        del known[path]
    found: dict[str, Module] = {}
    for path in match_names(list(known), names, "module"):
        if type(known[path]).forward is Module.forward:
            raise ValueError(f"{path} is a {type(known[path]).__name__} without a forward: name "
                             "the modules in it")
        if inside(path, found) or isinstance(wrapped.get(path), ModuleToSave):
            continue
        if any(inside(name, [path]) for name in wrapped):
            raise ValueError(f"{path} has LoRA layers: it cannot be trained whole as well")
        found[path] = known[path]
    return found


def match_names(
    known: list[str], patterns: str | list[str] | tuple[str, ...] | None,
    what: str = "Linear layer",
) -> list[str]:
    """Return the known names that a pattern matches, or all of them if `patterns` is None.

    A pattern is a dotted name, or the end of one after a dot; * and ? are wildcards.

    Raises
    ------
    ValueError : if a pattern matches nothing; the message lists the names and suggests one
    TypeError : if a pattern is not a str
    """
    if patterns is None:
        return known
    patterns = patterns if isinstance(patterns, (list, tuple)) else [patterns]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"the name of a {what} must be a str, got {pattern!r}")
    if not patterns:
        raise ValueError(f"the list is empty: name a {what}, or pass None")
    for pattern in patterns:
        if not any(_matches(path, pattern) for path in known):
            ends = sorted({path.rpartition(".")[2] for path in known})
            raise ValueError(
                f"target {pattern!r} fits no {what}{closest(pattern, ends + known)} "
                f"(there are: {', '.join(ends)}; dotted names run from {known[0]} to {known[-1]})"
            )
    return [path for path in known if any(_matches(path, pattern) for pattern in patterns)]


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
