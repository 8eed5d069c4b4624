"""QLoRA: LoRA on a base whose weights are stored in few bits.

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314. The base is frozen, so its weights need no
precision for updates: they can be rounded to 4 bits. A and B, their gradients and all computation
stay in floating point. `quantize` rounds the weights, before or after LoRA is added.
"""

from __future__ import annotations

from minilora.lora.saved import ModuleToSave
from minilora.lora.surgery import base_modules, check_tree, inside, lora_layers, wrappers
from minilora.lora.targets import match_names
from minilora.nn.layers import Linear
from minilora.nn.module import M, Module
from minilora.nn.normal_float import NF4
from minilora.nn.quantized import Q4_1, Int8, QuantizedParameter, in_floats
from minilora.nn.validate import check_flag, closest

FORMATS = {"nf4": NF4, "int8": Int8, "q4_1": Q4_1, "q8_0": Int8}


def quantize(
    model: M, kind: str = "nf4", target_modules: str | list[str] | None = None,
    double: bool = True,
) -> M:
    """Store the weights of a model's Linears in 4 or 8 bits, in place, and return the model.

    These weights are frozen. Everything is checked, and every new weight made, before the model is
    changed. What is quantised already is quantised anew.

    Parameters
    ----------
    kind : "nf4" (4.127 bits a weight), "int8" or "q8_0" (8.5), "q4_1" (5)
    target_modules : names or globs; None: every Linear but lm_head, as transformers does
    double : if False, the scales of "nf4" stay in 32 bits (4.5 bits a weight)

    Raises
    ------
    ValueError : for another kind or option, if a name matches nothing, or if a weight is not finite
    RuntimeError : if LoRA layers are merged
    TypeError : if the model is a bare layer or not a Module
    """
    if kind not in FORMATS:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}, got {kind!r}"
                         f"{closest(str(kind), FORMATS)}")
    check_flag(double=double)
    if not double and kind != "nf4":
        raise ValueError(f"only nf4 has scales that are quantised too, not {kind}")
    options = {} if double else {"double": False}
    linears = _linears(model)
    names = match_names(list(linears), target_modules)
    if target_modules is None:
        names = [name for name in names if name.rpartition(".")[2] != "lm_head"]
    new: dict[int, QuantizedParameter] = {}  # by id: two layers may share a weight
    for name in names:
        weight = linears[name].weight
        try:
            new[id(weight)] = FORMATS[kind].quantize(weight.data, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for linear in linears.values():
        linear.weight = new.get(id(linear.weight), linear.weight)
    return model


def dequantize(model: M) -> M:
    """Store quantised weights in floating point again, in place; return the model.

    Their values stay as they are: what rounding has lost is lost. They are frozen. Raises
    RuntimeError if LoRA layers are merged.
    """
    _linears(model)  # for its errors
    return in_floats(model)


def stored_bytes(model: Module) -> int:
    """Return the bytes of all parameters as they are stored."""
    return sum(p.nbytes if isinstance(p, QuantizedParameter) else p.data.nbytes
               for p in model.parameters())


def _linears(model: Module) -> dict[str, Linear]:
    """Return {dotted name: Linear} of the base, but for those that are trained whole for a task."""
    check_tree(model)
    if any(layer.merged for _, layer in lora_layers(model)):
        raise RuntimeError("some LoRA layers are merged: unmerge_lora first")
    saved = [path for path, w in wrappers(model).items() if isinstance(w, ModuleToSave)]
    return {path: module for path, module in base_modules(model).items()
            if isinstance(module, Linear) and not inside(path, saved)}
