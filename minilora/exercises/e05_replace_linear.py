"""Exercise 5: replace every Linear of a model by a LinearWithLoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.outcome import Passed, failed, run
from minilora.lora.layer import LinearWithLoRA
from minilora.nn.gpt import GPT, GPTConfig
from minilora.nn.layers import GELU, LayerNorm, Linear
from minilora.nn.module import Module, Sequential

NUMBER = 5
# Name of the check: the name that a submission must define.
DEFINED = {"replace_linear": "replace_linear"}

_NAME = "replace_linear"
_RANK, _ALPHA = 2, 6
_NESTED = ("A layer was replaced inside an already replaced layer: the Linear in a LinearWithLoRA "
           "is found again by the recursion. Do not go into a LinearWithLoRA.")


def replace_linear(function: Callable[..., Module]) -> Passed:
    """Check exercise 5: model = replace_linear(model, rank, alpha).

    Parameters
    ----------
    function
        Takes a model, a rank and alpha; freezes the model, replaces its Linears in place and
        returns it.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    ids = np.arange(6)[None]
    config = GPTConfig(11, 6, 8, 2, 2)
    for make, data in ((_Net, x), (lambda: GPT(config), ids)):
        model, untouched = make(), make()
        _check_first_call(function, model, data, untouched(data))
        _check_second_call(function, model, data)
        half = make()
        if isinstance(half, _Net):
            _check_partly_replaced(function, half)
    return Passed(_NAME, "Checked on two models, with a second call of the same.")


class _Net(Module):
    """A model with Linears at three depths, and with other layers."""

    def __init__(self) -> None:
        self.first: Module = Linear(4, 6, rng=0)
        self.norm = LayerNorm(6)
        self.body = Sequential(Linear(6, 6, rng=1), GELU(), Sequential(Linear(6, 5, rng=2)))
        self.last = Linear(5, 3, bias=False, rng=3)

    def forward(self, *inputs: np.ndarray) -> np.ndarray:
        """Return y (N, 3) for x (N, 4)."""
        (x,) = inputs
        return self.last(self.body(self.norm(self.first(x))))


# ---- The calls


def _check_first_call(
    function: Callable[..., Module], model: Module, data: np.ndarray, expected: np.ndarray
) -> None:
    """Check the call that replaces all Linears of a model."""
    linears = _linears(model)
    dtypes = {path: p.data.dtype for path, p in model.named_parameters()}
    result: Any = run(_NAME, lambda: function(model, _RANK, _ALPHA))
    if result is None:
        raise failed(_NAME, "It returns nothing; return the model.")
    if result is not model:
        raise failed(_NAME, f"It returns {type(result).__name__}, another object than the model "
                     "it was given: change that one in place, with setattr, and return it.")
    _check_replaced(model, linears)
    _check_frozen(model)
    _check_new(model, set(dtypes.values()))
    if not np.allclose(model(data), expected, atol=1e-5):
        raise failed(_NAME, "The model's output has changed. With B = 0 it must not.")


def _check_second_call(function: Callable[..., Module], model: Module, data: np.ndarray) -> None:
    """Check that a second call changes nothing, after B has changed as if by training."""
    tree = repr(model)
    for layer in _wrapped(model).values():
        layer.lora.B.data += 0.5
    trained = model(data)
    run(_NAME, lambda: function(model, _RANK, _ALPHA))
    if _nested(model):
        raise failed(_NAME, _NESTED)
    if not np.array_equal(model(data), trained):
        raise failed(_NAME, "A second call throws away what A and B have learned: leave "
                     "layers that are wrapped already as they are.")
    if repr(model) != tree:
        raise failed(_NAME, "The same call a second time changes the model; it should change "
                     "nothing.")
    _check_frozen(model, again=True)


def _check_partly_replaced(function: Callable[..., Module], model: _Net) -> None:
    """Check a model in which the first Linear is wrapped already."""
    first = model.first
    assert isinstance(first, Linear)
    model.first = LinearWithLoRA(first, _RANK, _ALPHA)
    wanted = {path: m for path, m in _linears(model).items() if path != "first.linear"}
    run(_NAME, lambda: function(model, _RANK, _ALPHA))
    _check_replaced(model, wanted | {"first": first})


# ---- The state of a model


def _linears(model: Module) -> dict[str, Linear]:
    """Return the Linears of a model by their paths."""
    return {path: m for path, m in model.named_modules() if type(m) is Linear}


def _wrapped(model: Module) -> dict[str, LinearWithLoRA]:
    """Return the LinearWithLoRAs of a model by their paths."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LinearWithLoRA)}


def _nested(model: Module) -> bool:
    """Return whether there is a LinearWithLoRA inside another one."""
    return any(isinstance(inner, LinearWithLoRA) and inner is not outer
               for outer in _wrapped(model).values() for _, inner in outer.named_modules())


def _check_replaced(model: Module, linears: dict[str, Linear]) -> None:
    """Check that these Linears, and nothing else, are wrapped as they should be."""
    read = "for every child: replace it if it is a Linear, else go into it."
    if _nested(model):
        raise failed(_NAME, _NESTED, read)
    wrapped = _wrapped(model)
    _check_none_left([path for path in linears if path not in wrapped], linears, read)
    for path, linear in linears.items():
        layer = wrapped[path]
        if layer.linear is not linear:
            raise failed(_NAME, f"{path} has a new Linear inside: wrap the one that was there, it "
                         "has the weights.", read)
        if layer.lora.rank != _RANK or layer.lora.alpha != _ALPHA:
            raise failed(_NAME, f"{path} has rank {layer.lora.rank} and alpha {layer.lora.alpha}, "
                         "not the rank 2 and alpha 6 that were given.", read)
        if layer.dropout.p:
            raise failed(_NAME, f"{path} has dropout, which was not asked for.", read)
        if layer.merged:
            raise failed(_NAME, f"{path} comes back merged; a merged layer cannot be trained.",
                         read)
        if layer.lora.scale != 3.0:
            raise failed(_NAME, f"{path} has the scale {layer.lora.scale:g}, not alpha / r = 3: "
                         "leave the scaling as it is by default.", read)
    extra = [path for path in wrapped if path not in linears]
    if extra:
        raise failed(_NAME, f"There are LoRA layers where no Linear was: {', '.join(extra)}.", read)


def _check_new(model: Module, dtypes: set[np.dtype]) -> None:
    """Check that each LoRA layer has its own A and B, with the start and dtype they should have."""
    seen: dict[int, str] = {}
    for path, layer in _wrapped(model).items():
        for what, p in (("A", layer.lora.A), ("B", layer.lora.B)):
            first = seen.setdefault(id(p.data), path)
            if first != path:
                raise failed(_NAME, f"{first} and {path} share one {what}: each Linear needs a "
                             "LinearWithLoRA, and so A and B, of its own.")
        if not layer.lora.A.data.any():
            raise failed(_NAME, f"A of {path} is zero, like B: then nothing is ever learned. Leave "
                         "both as LinearWithLoRA makes them.")
        if layer.lora.B.data.any():
            raise failed(_NAME, f"B of {path} is not zero, so the model does not start as the "
                         "base. Leave A and B as LinearWithLoRA makes them.")
    for path, p in model.named_parameters():
        if p.data.dtype not in dtypes:
            raise failed(_NAME, f"{path} has become {p.data.dtype}: keep the dtype of the model.")


def _check_none_left(left: list[str], linears: dict[str, Linear], read: str) -> None:
    """Raise CheckFailed if any Linear was not replaced, and say why if possible."""
    if not left:
        return
    if len(left) == len(linears):
        raise failed(_NAME, "No Linear was replaced. Test for the kind, isinstance(child, Linear), "
                     "and not for names. And assign to the parent, setattr(parent, name, "
                     "LinearWithLoRA(...)): a new value for the loop variable changes nothing.",
                     read)
    if any("." in path for path in set(linears) - set(left)) and all("." in path for path in left):
        raise failed(_NAME, f"Not deep enough, or not every branch; left are {', '.join(left[:4])}."
                     " Loops inside loops reach some depth only; a function that calls itself for "
                     "each child reaches any.", read)
    if all("." in path for path in left):
        raise failed(_NAME, f"Only the top level was replaced; left are {', '.join(left[:4])}. "
                     "Call the function for the children that are no Linear (recursion).", read)
    raise failed(_NAME, f"These Linears were not replaced: {', '.join(left[:4])}.", read)


def _check_frozen(model: Module, again: bool = False) -> None:
    """Check that LoRA's parameters, and no others, are trainable."""
    read = "Freeze the whole model first; new LoRA layers come in trainable."
    if again:
        read = "A second call changes nothing: what is LoRA's already must not be frozen."
    trainable = {path for path, p in model.named_parameters() if p.requires_grad}
    lora = {path for path, _ in model.named_parameters() if ".lora." in path}
    when = " after the second call" if again else ""
    if not trainable & lora:
        raise failed(_NAME, f"Nothing of LoRA is trainable{when}: it was frozen together with the "
                     "rest. Freeze before replacing" + (
                         ", and leave out what is LoRA's already (its names have .lora. in them)."
                         if again else "."), read)
    if trainable - lora:
        rest = sorted(trainable - lora)
        raise failed(_NAME, f"The base is not frozen: {', '.join(rest[:4])} can still be trained"
                     f"{when}. LinearWithLoRA freezes only the Linear that it wraps.", read)
    if lora - trainable:
        raise failed(_NAME, f"{sorted(lora - trainable)[0]} is frozen{when}; A and B are to be "
                     "trained.", read)
