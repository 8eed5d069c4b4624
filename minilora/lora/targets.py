"""Select modules of a model by names and globs."""

from __future__ import annotations

import fnmatch

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
    saved = {path: m for path, m in wrapped.items() if isinstance(m, ModuleToSave)}
    linears = {path: module for path, module in base_modules(model).items()
               if isinstance(module, Linear) and (path in saved or not inside(path, saved))}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no Linear layer to adapt")
    names = match_names(list(linears), target_modules)
    return {name: linears[name] for name in names if name not in wrapped}


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
