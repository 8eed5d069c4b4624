"""Check that a model is what its configuration says, since a file holds no more than that."""

from __future__ import annotations

from minilora.lora.surgery import wrappers
from minilora.nn.module import Module


def check_unwrapped(model: Module) -> None:
    """Raise ValueError if the model has LoRA layers."""
    if wrappers(model):
        raise ValueError("the model has LoRA layers: store them with save_adapter, or remove_lora")


def check_shapes(
    model: Module, expected: dict[str, tuple[int, ...]], replaced_head: str = ""
) -> None:
    """Raise ValueError if the parameters have not these names and shapes.

    `replaced_head` is what to say of the head instead of names and shapes.
    """
    found = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            if replaced_head and name.startswith("lm_head."):
                raise ValueError(replaced_head)
            raise ValueError(f"{name} is {found.get(name)}, the config says {expected.get(name)}: "
                             "a module was replaced, and no file could hold both")


def not_there(name: str, module: Module, model: str) -> ValueError:
    """Return the error for a module that computes something else than the configuration says."""
    return ValueError(f"{name} is {module.title()}, which a {model} of this config does not have "
                      "there: no file could hold both")
