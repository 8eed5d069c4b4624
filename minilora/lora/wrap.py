"""LoRA on a whole model: add it, merge it, remove it."""

from __future__ import annotations

import numpy as np

from minilora.lora.dora import DoRALinear
from minilora.lora.layer import LinearWithLoRA
from minilora.lora.saved import ModuleToSave
from minilora.lora.scaling import lora_scale
from minilora.lora.surgery import (
    check_tree,
    freeze_base,
    inside,
    install,
    lora_layers,
    require_lora,
    task_parameters,
    unwrapped,
    wrappers,
)
from minilora.lora.targets import find_modules, find_targets, keeps, warn_of_rank
from minilora.nn.module import M, Module
from minilora.nn.validate import Rng, check_dropout, check_flag, make_rng


def replace_linear_with_lora(
    model: M,
    rank: int,
    alpha: float,
    target_modules: str | list[str] | None = None,
    scaling: str = "alpha/r",
    dropout: float = 0.0,
    rng: Rng = None,
    modules_to_save: str | list[str] | None = None,
    use_dora: bool = False,
) -> M:
    """Freeze a model, wrap its Linear layers in `LinearWithLoRA` in place, and return the model.

    Layers that are already wrapped are left alone, so repeating a call changes nothing, but it
    freezes their base again. All arguments are checked before anything is changed. Warns if a call
    adds nothing, but asks for other settings, and of a rank above min(in, out) of every target.

    Parameters
    ----------
    rank, alpha, scaling : see `lora_scale`; dropout : probability in the LoRA branches
    target_modules : names or globs, such as ["q_proj", "v_proj"] or "h.0.*"; a name matches a
        layer if it is the layer's dotted name or the end of it. None: every Linear
    modules_to_save : names or globs of modules to train whole, see `ModuleToSave`
    use_dora : wrap in `DoRALinear` instead

    Raises
    ------
    ValueError : if a name matches nothing, or a hyperparameter is invalid (or TypeError)
    TypeError : if the model is a bare Linear, which cannot be replaced in place
    """
    lora_scale(rank, alpha, scaling)  # for its errors
    check_dropout(dropout)
    check_flag(use_dora=use_dora)
    saved = find_modules(model, modules_to_save) if modules_to_save is not None else {}
    targets = {path: linear for path, linear in find_targets(model, target_modules).items()
               if not inside(path, saved)}
    rng, kind = make_rng(rng), DoRALinear if use_dora else LinearWithLoRA
    if not (targets or saved) and keeps(model, target_modules, kind, rank, alpha, scaling, dropout):
        return model
    warn_of_rank(rank, targets.values())
    new: dict[int, Module] = {}  # by id: a module in two places has one wrapper
    for linear in targets.values():
        if id(linear) not in new:
            layer = kind(linear, rank, alpha, scaling=scaling, dropout=dropout, rng=rng)
            new[id(linear)] = layer.train(linear.training)
    new |= {id(module): ModuleToSave(module).train(module.training) for module in saved.values()}
    install(model, {path: new[id(module)] for path, module in (targets | saved).items()})
    freeze_base(model)
    return model


def lora_state_dict(model: Module) -> dict[str, np.ndarray]:
    """Return {dotted name: a copy of the array}: A (in, rank), B (rank, out), saved modules, ...

    `model.load_state_dict(task, strict=False)` restores the task.
    """
    return {name: parameter.data.copy() for name, parameter in task_parameters(model).items()}


def merge_lora(model: M, unload: bool = False) -> M:
    """Merge every LoRA layer, W' = W + scale * A B (in, out), and return the model.

    Parameters
    ----------
    unload : if True, replace the layers by plain Linears and discard A and B; saved modules
        replace the base's. If False, `unmerge_lora` undoes the merge.

    Raises
    ------
    ValueError : if there is no LoRA layer
    RuntimeError : without `unload`, if a layer is already merged; nothing is changed
    """
    check_flag(unload=unload)
    layers = require_lora(model)
    if unload:
        check_tree(model)
        merged = {id(layer): layer.to_linear() for layer in layers}
        kept = {path: w.module if isinstance(w, ModuleToSave) else w
                for path, w in wrappers(model).items()}
        install(model, {path: merged.get(id(module), module) for path, module in kept.items()})
        return model
    if any(layer.merged for layer in layers):
        raise RuntimeError("some layers are merged already; merging twice would double the update")
    for layer in layers:
        layer.merge()
    return model


def unmerge_lora(model: M) -> M:
    """Undo `merge_lora` and return the model. Raises RuntimeError if a layer is not merged."""
    layers = require_lora(model)
    if not all(layer.merged for layer in layers):
        raise RuntimeError("some layers are not merged: there is nothing to undo in them")
    for layer in layers:
        layer.unmerge()
    return model


def remove_lora(model: M) -> M:
    """Remove LoRA layers, merged or not, and saved modules; return the frozen, unchanged base.

    Raises
    ------
    ValueError : if there is nothing to remove
    TypeError : if the model is a bare layer or not a Module
    """
    check_tree(model)
    found = wrappers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoRA layers")
    for _, layer in lora_layers(model):
        if layer.merged:
            layer.unmerge()  # in case the layer is installed again, as by AdapterSet
    install(model, {path: unwrapped(wrapper) for path, wrapper in found.items()})
    return model
