"""The tree of a model: view it with or without wrappers, and replace modules in it.

A wrapper replaces a module of the base: a `LinearWithLoRA` replaces a Linear, a `ModuleToSave` any
module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

from minilora.lora.layer import LinearWithLoRA
from minilora.lora.saved import ModuleToSave
from minilora.nn.large import forget
from minilora.nn.layers import Linear
from minilora.nn.module import Module, Parameter


def unwrapped(module: Module) -> Module:
    """Return the base's module: the one that a wrapper wraps, or else the module itself."""
    if isinstance(module, ModuleToSave):
        return module.original
    return module.linear if isinstance(module, LinearWithLoRA) else module


def base_modules(model: Module) -> dict[str, Module]:
    """Return {dotted name: module} of the base, like `named_modules` but without wrappers."""

    def walk(module: Module, path: str) -> Iterator[tuple[str, Module]]:
        module = unwrapped(module)
        yield path, module
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return dict(walk(model, ""))


def wrappers(model: Module) -> dict[str, LinearWithLoRA | ModuleToSave]:
    """Return {dotted name: wrapper} for every wrapper that is not inside another."""
    found: dict[str, LinearWithLoRA | ModuleToSave] = {}
    for path, module in model.named_modules():
        if isinstance(module, (LinearWithLoRA, ModuleToSave)) and not inside(path, found):
            found[path] = module
    return found


def inside(path: str, outer: Iterable[str]) -> bool:
    """Return whether the dotted name is one of `outer`, or is below one of them."""
    return any(path == name or not name or path.startswith(f"{name}.") for name in outer)


def lora_layers(model: Module) -> Iterator[tuple[str, LinearWithLoRA]]:
    """Yield (dotted name, layer) for every LinearWithLoRA in the model, each once."""
    seen = set()
    for path, module in model.named_modules():
        if isinstance(module, LinearWithLoRA) and id(module) not in seen:
            seen.add(id(module))
            yield path, module


def require_lora(model: Module) -> list[LinearWithLoRA]:
    """Return every LinearWithLoRA once. Raises ValueError if there is none."""
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers")
    return layers


def check_tree(model: Module) -> None:
    """Raise TypeError unless the model is a Module whose layers can be replaced in place."""
    if not isinstance(model, Module):
        raise TypeError(f"expected a Module to adapt, got {type(model).__name__}")
    use = {Linear: "LinearWithLoRA", LinearWithLoRA: "its .linear", ModuleToSave: "its .original"}
    for kind, instead in use.items():
        if isinstance(model, kind):
            raise TypeError(f"a bare {type(model).__name__} cannot be replaced in place without "
                            f"a model around it: use {instead}")


def install(model: Module, modules: Mapping[str, Module]) -> None:
    """Put each module in the place of its dotted name. No backward fits an earlier forward."""
    for path, module in modules.items():
        parent_path, _, name = path.rpartition(".")
        parent = functools.reduce(getattr, filter(None, parent_path.split(".")), model)
        setattr(parent, name, module)
    forget(model)


def task_parameters(model: Module) -> dict[str, Parameter]:
    """Return {dotted name: Parameter} for the whole task: A, B, magnitudes, saved modules."""
    task = {}
    for path, wrapper in wrappers(model).items():
        base = {id(p) for p in unwrapped(wrapper).parameters()}
        for name, parameter in wrapper.named_parameters():
            if id(parameter) not in base:
                task[f"{path}.{name}" if path else name] = parameter
    return task


def freeze_base(model: Module) -> None:
    """Freeze all but the task's parameters."""
    task = {id(p) for p in task_parameters(model).values()}
    for parameter in model.parameters():
        if id(parameter) not in task:
            parameter.requires_grad, parameter.grad = False, None
