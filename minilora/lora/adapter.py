"""Adapters apart from a model: copy one from a model, attach it to another.

An `Adapter` is a whole task: A, B and the scale of each adapted layer (with DoRA also its
magnitudes), and the parameters that are stored whole, such as a new head. Names and orientation
are those of this library; `files` translates to and from PEFT's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.lora.dora import DoRALinear
from minilora.lora.layer import LinearWithLoRA
from minilora.lora.saved import ModuleToSave
from minilora.lora.scaling import lora_scale
from minilora.lora.surgery import (
    base_modules,
    check_tree,
    freeze_base,
    inside,
    install,
    unwrapped,
    wrappers,
)
from minilora.lora.wrap import remove_lora
from minilora.nn.gpt import GPT
from minilora.nn.layers import Linear
from minilora.nn.llama import Llama
from minilora.nn.module import M, Module, Parameter
from minilora.nn.validate import CheckpointError, Rng, closest, make_rng

MOST_FAULTS = 48  # of an adapter that are listed


@dataclass(frozen=True)
class Factors:
    """The part of an adapter that belongs to one layer.

    Attributes
    ----------
    A : ndarray (in, r)
    B : ndarray (r, out)
    alpha, scaling : determine `scale`; see `lora_scale`, which raises the errors
    magnitude : ndarray (out,) with DoRA, else None
    """

    A: np.ndarray
    B: np.ndarray
    alpha: float
    scaling: str = "alpha/r"
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def scale(self) -> float:
        return lora_scale(self.rank, self.alpha, self.scaling)

    @property
    def arrays(self) -> list[np.ndarray]:
        return [a for a in (self.A, self.B, self.magnitude) if a is not None]

    def fault(self, dtype: Any = np.float64) -> str:
        """Describe what is wrong with the shapes or numbers; "" if nothing is."""
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[1] != self.B.shape[0]:
            return f"factors of shapes {self.A.shape} and {self.B.shape}, not (in, r) and (r, out)"
        if self.magnitude is not None and self.magnitude.shape != self.B.shape[1:]:
            return f"a magnitude of shape {self.magnitude.shape}, not {self.B.shape[1:]}"
        if not all(_is_finite(array, dtype) for array in self.arrays):
            return "factors with nan or inf"
        return ""

    def delta_weight(self) -> np.ndarray:
        """Return scale * A B, (in, out)."""
        return self.scale * (self.A @ self.B)

    def norm(self) -> float:
        """Return the Frobenius norm of scale * A B.

        It follows from the (r, r) products AᵀA and BBᵀ, so the (in, out) update is not formed.
        """
        a, b = self.A.astype(np.float64), self.B.astype(np.float64)
        return abs(self.scale) * float(np.sqrt(max(((a.T @ a) * (b @ b.T)).sum(), 0.0)))


def _is_finite(array: np.ndarray, dtype: Any) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.asarray(array, dtype)).all())


@dataclass(frozen=True)
class Adapter:
    """A whole task, apart from any model.

    Attributes
    ----------
    layers : {dotted name of a Linear: Factors}
    saved : {dotted name of a parameter: array}, for parameters stored whole
    dropout : probability in the LoRA branches during training
    """

    layers: dict[str, Factors]
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    dropout: float = 0.0

    @property
    def nbytes(self) -> int:
        """The size of all arrays in bytes."""
        arrays = [a for factors in self.layers.values() for a in factors.arrays]
        return sum(a.nbytes for a in [*arrays, *self.saved.values()])


# ---- From a model


def get_adapter(model: Module) -> Adapter:
    """Return a copy of the adapter on the model. The model is not changed.

    Modules in a `ModuleToSave`, other trainable parameters, and a replaced head of a GPT are
    stored whole. (If that head has a LoRA layer, the stored copy has its update merged, because
    PEFT has no LoRA on modules stored whole.)

    Raises
    ------
    ValueError : if nothing is adapted, the model itself has trainable parameters of its own, its
        head was replaced by anything but a Linear, or a layer that is in two places is adapted in
        one of them
    TypeError : if the model is a bare layer or not a Module
    """
    check_tree(model)
    wrapped = wrappers(model)
    _check_places(model, wrapped)
    layers: dict[str, Factors] = {}
    saved: dict[str, np.ndarray] = {}
    dropout, seen = 0.0, set()
    for path, outer in model.named_modules():
        if inside(path, wrapped) and path not in wrapped:
            continue
        module = outer.module if isinstance(outer, ModuleToSave) else outer
        if path == "lm_head" and isinstance(model, (GPT, Llama)) and replaced_head(model):
            head = module.to_linear() if isinstance(module, LinearWithLoRA) else module
            if not isinstance(head, Linear):
                raise ValueError(f"the head was replaced by {head.title()}: an adapter can hold a "
                                 "Linear only")
            saved |= {f"lm_head.{name}": p.data.copy() for name, p in head.named_parameters()}
            continue
        if isinstance(module, LinearWithLoRA) and id(module) not in seen:
            seen.add(id(module))
            layers[path] = _factors(module)
            dropout = max(dropout, module.dropout.p)
        whole = _stored_whole(outer)
        if whole and not path:
            raise ValueError(f"{', '.join(whole)} of the model itself cannot be in an adapter")
        saved |= {f"{path}.{name}": p.data.copy() for name, p in whole.items()}
    if not layers:
        raise ValueError("the model has no LoRA layers to save: call replace_linear_with_lora")
    return Adapter(layers, saved, dropout)


def replaced_head(model: GPT | Llama) -> bool:
    """Return whether the head, without any LoRA on it, is not the one it was made with."""
    return not getattr(unwrapped(model.lm_head), "of_config", False)


def _check_places(model: Module, wrapped: dict[str, LinearWithLoRA | ModuleToSave]) -> None:
    """Raise ValueError if a module that is in several places is not wrapped alike in all."""
    base = base_modules(model)
    places = {id(base[path]): path for path in wrapped}
    for path, module in base.items():
        other = places.get(id(module), path)
        if wrapped.get(path) is not wrapped.get(other):
            raise ValueError(f"{path} and {other} are one layer of the base, but have not the same "
                             "adapter: an adapter is for a layer wherever it is")


def _factors(layer: LinearWithLoRA) -> Factors:
    lora = layer.lora
    magnitude = layer.magnitude.data.copy() if isinstance(layer, DoRALinear) else None
    return Factors(lora.A.data.copy(), lora.B.data.copy(), lora.alpha, lora.scaling, magnitude)


def _stored_whole(outer: Module) -> dict[str, Parameter]:
    """Return {name: Parameter} for the parameters of a module or wrapper to store whole."""
    module = outer.module if isinstance(outer, ModuleToSave) else outer
    held = module.linear if isinstance(module, LinearWithLoRA) else module
    if isinstance(outer, ModuleToSave):
        base = {id(p) for p in outer.original.parameters()}
        return {f"{path}.{name}" if path else name: p for path, m in held.named_modules()
                for name, p in vars(m).items() if isinstance(p, Parameter) and id(p) not in base}
    return {name: p for name, p in vars(held).items()
            if isinstance(p, Parameter) and p.requires_grad}


# ---- Onto a model


def attach(model: M, adapter: Adapter) -> M:
    """Attach an adapter to a model, replacing any that it has, and return the model.

    The adapter's parameters are new, so make the optimizer afterwards. The base is frozen and
    otherwise unchanged. Everything is checked before anything is changed.

    Raises
    ------
    CheckpointError : if names, shapes or numbers do not fit; the message lists them, up to 48
    TypeError : if the model is a bare layer or not a Module
    """
    check_fits(model, adapter)
    base = base_modules(model)
    new: dict[int, Module] = {}
    rng = make_rng(0)  # one for all layers, so that their dropout masks differ
    shared: dict[int, Parameter] = {}
    saved = by_module(adapter.saved)
    dtype = next(model.parameters()).dtype
    groups: dict[int, list[str]] = {}  # a module that is in several places may have several names
    for path in dict.fromkeys([*adapter.layers, *saved]):
        groups.setdefault(id(base[path]), []).append(path)
    for paths in groups.values():
        path = next((path for path in paths if path in adapter.layers), paths[0])
        original = base[path]
        arrays = {name: a for place in paths for name, a in saved.get(place, {}).items()}
        own = {name: Parameter(np.asarray(a, dtype)) for name, a in arrays.items()}
        module = original
        if own:
            is_head = path == "lm_head" and isinstance(model, (GPT, Llama))
            module = _copy_with(original, own, is_head)
        if path in adapter.layers:
            assert isinstance(module, Linear)  # checked by _misfits
            module = _adapted(module, adapter.layers[path], adapter.dropout, rng, shared)
        if own:
            module = ModuleToSave(original, module)
        for parameter in own.values():
            parameter.requires_grad = True
        new[id(original)] = module.train(model.training)
    if wrappers(model):
        remove_lora(model)
    install(model, {path: new[id(m)] for path, m in base.items() if id(m) in new})  # everywhere
    freeze_base(model)
    return model


def _copy_with(original: Module, own: dict[str, Parameter], is_head: bool) -> Module:
    """Return a copy with the Parameters in `own`; it shares all others with the original."""
    if is_head:  # may have any width, with or without a bias
        n, m = own["weight"].shape
        module: Module = Linear(n, m, bias="bias" in own, rng=0)
    else:
        module = copy.copy(original)
        module._cache = None
    for name, parameter in own.items():
        setattr(module, name, parameter)
    return module


def _adapted(
    linear: Linear, factors: Factors, dropout: float, rng: Rng, shared: dict[int, Parameter]
) -> LinearWithLoRA:
    """Wrap a Linear with given factors.

    An array that several layers share (q, k and v share A in a fused adapter) becomes one
    Parameter in all of them. `shared` records these.
    """
    kind = LinearWithLoRA if factors.magnitude is None else DoRALinear
    layer = kind(linear, factors.rank, factors.alpha, scaling=factors.scaling,
                 dropout=dropout, rng=rng)
    dtype = linear.weight.dtype
    for owner, name, array in ((layer.lora, "A", factors.A), (layer.lora, "B", factors.B),
                               (layer, "magnitude", factors.magnitude)):
        if array is not None:
            fresh = Parameter(np.asarray(array, dtype))
            setattr(owner, name, shared.setdefault(id(array), fresh))
    return layer


def by_module(saved: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Group {"h.0.ln_1.bias": array} as {"h.0.ln_1": {"bias": array}}."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for name, array in saved.items():
        path, _, parameter = name.rpartition(".")
        grouped.setdefault(path, {})[parameter] = array
    return grouped


def check_fits(model: Module, adapter: Adapter) -> None:
    """Raise the errors of `attach`. The model is not changed."""
    check_tree(model)
    if faults := _misfits(model, base_modules(model), adapter):
        text = "; ".join(faults[:MOST_FAULTS])
        if len(faults) > MOST_FAULTS:  # it is for another base; a page of names would hide that
            text = f"{len(faults)} of its parts do not fit it, such as: {faults[0]}"
        raise CheckpointError(f"the adapter does not fit the model: {text}")


def _misfits(model: Module, base: dict[str, Module], adapter: Adapter) -> list[str]:
    """Describe everything in the adapter that does not fit the model."""
    linears = [path for path, module in base.items() if isinstance(module, Linear)]
    dtype = next(model.parameters()).dtype
    faults = []
    for path, factors in adapter.layers.items():
        found, fault = base.get(path), factors.fault(dtype)
        if fault:
            faults.append(f"{path} has {fault}")
        elif not isinstance(found, Linear):
            faults.append(f"the model has no linear layer {path!r}{closest(path, linears)}")
        elif found.weight.shape != (shape := (factors.A.shape[0], factors.B.shape[1])):
            faults.append(f"{path} is {found.weight.shape} in the model, {shape} in the adapter")
    faults += [f"{name} has nan or inf" for name, array in adapter.saved.items()
               if not _is_finite(array, dtype)]
    for path, arrays in by_module(adapter.saved).items():
        if path == "lm_head" and isinstance(model, (GPT, Llama)):
            faults += _head_misfits(model.config.d_model, arrays)
            continue
        own = vars(base[path]) if path in base else {}
        for name, array in arrays.items():
            if not isinstance(own.get(name), Parameter):
                faults.append(f"the model has no parameter {path}.{name}")
            elif own[name].shape != array.shape:
                faults.append(f"{path}.{name} is {own[name].shape} in the model, {array.shape} "
                              "in the adapter")
    return faults


def _head_misfits(width: int, arrays: dict[str, np.ndarray]) -> list[str]:
    weight = arrays.get("weight")
    if weight is None or weight.ndim != 2 or weight.shape[0] != width or not weight.size:
        return [f"lm_head should be a matrix of {width} rows, got "
                f"{None if weight is None else weight.shape}"]
    if arrays.keys() - {"weight", "bias"} or (
        "bias" in arrays and arrays["bias"].shape != weight.shape[1:]
    ):
        return [f"lm_head of shape {weight.shape} comes with other parameters"]
    return []
