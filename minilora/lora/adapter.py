"""Adapters as things: take one off a model, attach it to another, add, shrink or extract them.

An `Adapter` is all that a task is, apart from any model: for each adapted layer the two thin
matrices with their scale (and, with DoRA, the magnitudes), and the parameters that are stored
whole, such as a new head. Names and orientation are those of this library; `peft_files` has the
files.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.files.checkpoint import CheckpointError, replaced_head
from minilora.lora.dora import DoRALinear
from minilora.lora.wrap import (
    SCALINGS,
    LinearWithLoRA,
    ModuleToSave,
    base_module,
    find_targets,
    freeze_base,
    install,
    lora_layers,
    outer_modules,
    remove_lora,
    wrappers,
)
from minilora.nn.gpt import GPT
from minilora.nn.layers import Linear
from minilora.nn.module import Module, Parameter, closest, make_rng
from minilora.nn.validate import check_sizes


@dataclass(frozen=True)
class Factors:
    """What an adapter has for one layer.

    A           (in, r)
    B           (r, out)
    alpha       together with `scaling` it gives `scale`, as in `LoRALayer`
    magnitude   (out,), of DoRA, else None
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
        return float(SCALINGS[self.scaling](self.alpha, self.rank))

    @property
    def arrays(self) -> list[np.ndarray]:
        return [a for a in (self.A, self.B, self.magnitude) if a is not None]

    def fault(self, dtype: Any = np.float64) -> str:
        """Say what is wrong with the shapes or numbers, "" where nothing is."""
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
        """Return the Frobenius norm of scale * A B, by the (r, r) products AᵀA and BBᵀ.

        So the update itself, as large as the weight, need not be formed.
        """
        a, b = self.A.astype(np.float64), self.B.astype(np.float64)
        return abs(self.scale) * float(np.sqrt(max(((a.T @ a) * (b @ b.T)).sum(), 0.0)))


def _is_finite(array: np.ndarray, dtype: Any) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.asarray(array, dtype)).all())


@dataclass(frozen=True)
class Adapter:
    """All that a task is.

    layers    {dotted name of a Linear: Factors}
    saved     {dotted name of a parameter: array}, for what is stored whole
    dropout   of the LoRA branches in training
    """

    layers: dict[str, Factors]
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    dropout: float = 0.0

    @property
    def nbytes(self) -> int:
        """The bytes of all its arrays."""
        arrays = [a for factors in self.layers.values() for a in factors.arrays]
        return sum(a.nbytes for a in [*arrays, *self.saved.values()])


# ---- Off a model, onto a model


def get_adapter(model: Module) -> Adapter:
    """Return a copy of the adapter that is on the model; the model stays as it is.

    Stored whole is what a `ModuleToSave` holds, whatever else is trainable, and the head of a
    GPT where it was replaced: no base has it. (If that head has a LoRA layer, its update is
    added to it: PEFT has no LoRA on saved modules either.) ValueError where nothing is adapted.
    """
    _refuse_bare(model)
    layers: dict[str, Factors] = {}
    saved: dict[str, np.ndarray] = {}
    dropout, seen = 0.0, set()
    for path, outer in outer_modules(model):
        module = outer.module if isinstance(outer, ModuleToSave) else outer
        if path == "lm_head" and isinstance(model, GPT) and replaced_head(model):
            saved |= _whole_head(module)
            continue
        if isinstance(module, LinearWithLoRA):
            if id(module) not in seen:
                layers[path] = _factors(module)
                dropout = max(dropout, module.dropout.p)
            seen.add(id(module))
        held = module.linear if isinstance(module, LinearWithLoRA) else module
        if isinstance(outer, ModuleToSave):
            base = outer.original
            shared = {id(p) for p in base.parameters()} if base is not None else set()
            whole = {name: p for name, p in held.named_parameters() if id(p) not in shared}
        else:
            whole = {name: p for name, p in vars(held).items()
                     if isinstance(p, Parameter) and p.requires_grad}
        if whole and not path:
            raise ValueError(f"{', '.join(whole)} of the model itself cannot be in an adapter")
        saved |= {f"{path}.{name}": p.data.copy() for name, p in whole.items()}
    if not layers:
        raise ValueError("the model has no LoRA layers to save: call replace_linear_with_lora")
    return Adapter(layers, saved, dropout)


def _factors(layer: LinearWithLoRA) -> Factors:
    lora = layer.lora
    magnitude = layer.magnitude.data.copy() if isinstance(layer, DoRALinear) else None
    return Factors(lora.A.data.copy(), lora.B.data.copy(), lora.alpha, lora.scaling, magnitude)


def _whole_head(head: Module) -> dict[str, np.ndarray]:
    linear = head.linear if isinstance(head, LinearWithLoRA) else head
    arrays = {f"lm_head.{name}": p.data.copy() for name, p in linear.named_parameters()}
    if linear is not head and not head.merged:
        arrays["lm_head.weight"] += head.delta_weight()
    return arrays


def attach(model: Module, adapter: Adapter) -> Module:
    """Attach an adapter to a model, in the place of the one that may be there; return the model.

    Its parameters are new ones: make the optimizer afterwards. The base is frozen and otherwise
    untouched. All is checked before anything is changed:
    CheckpointError that lists every name and shape that does not fit.
    """
    _refuse_bare(model)
    base = dict(base_modules(model))
    faults = [f"{name} is merged: unmerge_lora first"
              for name, layer in lora_layers(model) if layer.merged]
    faults += _misfits(model, base, adapter)
    if faults:
        raise CheckpointError("the adapter does not fit the model: " + "; ".join(faults))
    new: dict[str, Module] = {}
    rng = make_rng(0)  # of dropout, so that no two layers drop the same
    shared: dict[int, Parameter] = {}
    saved = by_module(adapter.saved)
    with warnings.catch_warnings(action="ignore"):  # of a rank that is not ours to choose
        for path in dict.fromkeys([*adapter.layers, *saved]):
            new[path] = _wrapper(
                model, base.get(path), path, adapter, saved.get(path, {}), rng, shared
            )
    by_id = {id(base[path]): wrapper for path, wrapper in new.items() if path in base}
    new |= {path: by_id[id(m)] for path, m in base.items() if id(m) in by_id}  # at every place
    if wrappers(model):
        remove_lora(model)
    install(model, new)
    freeze_base(model)
    return model


def base_modules(model: Module | None, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """Yield (dotted name, module) of the base, as if no wrapper were there."""
    model = base_module(model)
    if model is not None:
        yield prefix, model
        for name, child in model.named_children():
            yield from base_modules(child, f"{prefix}.{name}" if prefix else name)


def by_module(saved: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Group {"h.0.ln_1.bias": array} as {"h.0.ln_1": {"bias": array}}."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for name, array in saved.items():
        path, _, parameter = name.rpartition(".")
        grouped.setdefault(path, {})[parameter] = array
    return grouped


def _misfits(model: Module, base: dict[str, Module], adapter: Adapter) -> list[str]:
    """Say of everything in the adapter that does not fit the model why not."""
    linears = [path for path, module in base.items() if isinstance(module, Linear)]
    dtype = next(model.parameters()).data.dtype
    faults = []
    for path, factors in adapter.layers.items():
        found = base.get(path)
        odd = factors.fault(dtype)
        shape = (None, None) if odd else (factors.A.shape[0], factors.B.shape[1])
        if odd:
            faults.append(f"{path} has {odd}")
        elif not isinstance(found, Linear):
            faults.append(f"the model has no linear layer {path!r}{closest(path, linears)}")
        elif shape != found.weight.shape:
            faults.append(f"{path} is {found.weight.shape} in the model, {shape} in the adapter")
    faults += [f"{name} has nan or inf" for name, array in adapter.saved.items()
               if not _is_finite(array, dtype)]
    for path, arrays in by_module(adapter.saved).items():
        if path == "lm_head" and isinstance(model, GPT):
            weight = arrays.get("weight")
            if weight is None or weight.ndim != 2 or weight.shape[0] != model.config.d_model:
                faults.append(f"lm_head should be a matrix of {model.config.d_model} rows, got "
                              f"{None if weight is None else weight.shape}")
            elif arrays.keys() - {"weight", "bias"} or (
                "bias" in arrays and arrays["bias"].shape != weight.shape[1:]
            ):
                faults.append(f"lm_head of shape {weight.shape} comes with other parameters")
            continue
        own = vars(base[path]) if path in base else {}
        for name, array in arrays.items():
            if not isinstance(own.get(name), Parameter):
                faults.append(f"the model has no parameter {path}.{name}")
            elif own[name].shape != array.shape:
                faults.append(f"{path}.{name} is {own[name].shape} in the model, {array.shape} "
                              "in the adapter")
    return faults


def _wrapper(
    model: Module, original: Module | None, path: str, adapter: Adapter,
    arrays: dict[str, np.ndarray], rng: np.random.Generator, shared: dict[int, Parameter],
) -> Module:
    """Make what stands in the place of one module of the base; `arrays` are stored whole.

    One array that several layers share, as q, k and v do in a fused adapter, becomes one
    Parameter in all of them: `shared` remembers it.
    """
    dtype = next(model.parameters()).data.dtype
    own = {name: Parameter(np.asarray(array, dtype)) for name, array in arrays.items()}
    module = original
    if own:  # it shares what the task does not change
        module = Linear(1, 1) if original is None else copy.copy(original)
        module.__dict__["_cache"] = None
        if path == "lm_head" and isinstance(model, GPT):
            module.bias = None
        for name, parameter in own.items():
            setattr(module, name, parameter)
    factors = adapter.layers.get(path)
    if factors is not None:
        kind = LinearWithLoRA if factors.magnitude is None else DoRALinear
        module = kind(
            module, factors.rank, factors.alpha, factors.scaling, adapter.dropout, rng=rng
        )
        for owner, name, array in ((module.lora, "A", factors.A), (module.lora, "B", factors.B),
                                   (module, "magnitude", factors.magnitude)):
            if array is not None:
                fresh = Parameter(np.asarray(array, dtype))
                setattr(owner, name, shared.setdefault(id(array), fresh))
    module.train(model.training)
    if not own:
        return module
    wrapper = ModuleToSave(original, module).train(model.training)
    for parameter in own.values():
        parameter.requires_grad = True
    return wrapper


def _refuse_bare(model: Module) -> None:
    if isinstance(model, (Linear, LinearWithLoRA, ModuleToSave)):
        raise TypeError("an adapter belongs to a model with named layers, not to a bare Linear")
    if not isinstance(model, Module):
        raise TypeError(f"expected a Module with the adapter, got {type(model).__name__}")


# ---- Combining


def weighted_sum(
    adapters: list[Adapter], weights: list[float], combination_type: str = "cat"
) -> Adapter:
    """Return an adapter for the sum of weight * update over the adapters, layer by layer.

    "cat"      exact: the ranks are put side by side, [A1 A2] [w1 s1 B1; w2 s2 B2], so the
               rank of the sum is the sum of the ranks
    "linear"   the factors are added instead, with c = sqrt(w s): (c1 A1 + c2 A2)
               (c1 B1 + c2 B2). The rank stays, and the product has the cross terms c1 c2 A1 B2
               and c1 c2 A2 B1 besides. They have no meaning; how large they are is chance

    The names are PEFT's (`add_weighted_adapter`). A layer that only some adapters have counts
    for those. Raises ValueError for DoRA and modules that are stored whole, which have no sum;
    for different numbers of adapters and weights, and, with "linear", of different ranks.
    """
    if combination_type not in ("cat", "linear"):
        raise ValueError(f"combination_type must be cat or linear, got {combination_type!r}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if not np.isfinite(weights).all():
        raise ValueError(f"weights must be finite, got {weights}")
    if any(adapter.saved or _is_dora(adapter) for adapter in adapters):
        raise ValueError("DoRA and modules stored whole cannot be added up: what is added is A B")
    parts: dict[str, list[tuple[float, Factors]]] = {}
    for weight, adapter in zip(weights, adapters, strict=True):
        for path, factors in adapter.layers.items():
            parts.setdefault(path, []).append((weight * factors.scale, factors))
    for path, part in parts.items():
        shapes = {(f.A.shape[0], f.B.shape[1]) for _, f in part}
        if len(shapes) > 1:
            raise ValueError(f"{path} has different sizes in the adapters: {sorted(shapes)}")
    join = _cat if combination_type == "cat" else _linear
    layers = {path: join(path, part) for path, part in parts.items()}
    return Adapter(layers, dropout=max(adapter.dropout for adapter in adapters))


def _cat(path: str, part: list[tuple[float, Factors]]) -> Factors:
    a = np.concatenate([f.A for _, f in part], axis=1)
    b = np.concatenate([c * f.B for c, f in part], axis=0)
    return Factors(a, b, alpha=a.shape[1])  # so that the scale is 1


def _linear(path: str, part: list[tuple[float, Factors]]) -> Factors:
    ranks = {f.rank for _, f in part}
    if len(ranks) > 1:
        raise ValueError(f"{path}: factors of the ranks {sorted(ranks)} cannot be added; use cat")
    a = sum(abs(c) ** 0.5 * f.A for c, f in part)
    b = sum(float(np.sign(c)) * abs(c) ** 0.5 * f.B for c, f in part)
    return Factors(a, b, alpha=a.shape[1])


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
    """Return the closest adapter of at most this rank, and the error in each layer.

    The error is ||new - old|| / ||old|| in the Frobenius norm, sqrt(sum of the squared singular
    values that are dropped / of all) (Eckart and Young 1936). The SVD is of an (r, r) matrix:
    with A = Qa Ra and Bᵀ = Qb Rb, A B = Qa (Ra Rbᵀ) Qbᵀ. ValueError for DoRA.
    """
    check_sizes("compress", rank=rank)
    if _is_dora(adapter):
        raise ValueError("a DoRA update is not A B alone, it cannot be compressed this way")
    layers, errors = {}, {}
    for path, f in adapter.layers.items():
        if f.fault():
            raise ValueError(f"{path} has {f.fault()}")
        qa, ra = np.linalg.qr(f.A.astype(np.float64))
        qb, rb = np.linalg.qr(f.B.T.astype(np.float64))
        u, s, vt = np.linalg.svd(f.scale * (ra @ rb.T))
        layers[path], errors[path] = _best(qa @ u, s, vt @ qb.T, rank, f.A.dtype)
    return Adapter(layers, dict(adapter.saved), adapter.dropout), errors


def extract_lora(
    base: Module, tuned: Module, rank: int, target_modules: str | list[str] | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Return the best adapter of this rank for what fine-tuning did, and its error in each layer.

    That is the SVD of W_tuned - W_base, cut off after `rank` terms; the error as in `compress`.
    base and tuned are two models of the same shapes without adapters. Warns of parameters that
    differ and are not in the adapter, such as embeddings and norms.
    """
    check_sizes("extract_lora", rank=rank)
    if wrappers(base) or wrappers(tuned):
        raise ValueError("extract_lora compares two plain models: merge_lora or remove_lora first")
    old, new = dict(base.named_parameters()), dict(tuned.named_parameters())
    if {n: p.shape for n, p in old.items()} != {n: p.shape for n, p in new.items()}:
        raise ValueError("the two models differ in their parameters' names or shapes")
    layers, errors = {}, {}
    for path in find_targets(base, target_modules):
        w0, w1 = old[f"{path}.weight"].data, new[f"{path}.weight"].data
        if not (np.isfinite(w0).all() and np.isfinite(w1).all()):
            raise ValueError(f"{path}.weight has nan or inf in one of the models")
        u, s, vt = np.linalg.svd(w1.astype(np.float64) - w0, full_matrices=False)
        layers[path], errors[path] = _best(u, s, vt, rank, w0.dtype)
    left = [name for name, p in old.items() if name.removesuffix(".weight") not in layers
            and not np.array_equal(p.data, new[name].data)]
    if left:
        warnings.warn(f"{len(left)} parameters differ and are not in the adapter: "
                      f"{', '.join(left[:5])}{', ...' * (len(left) > 5)}", stacklevel=2)
    return Adapter(layers), errors


def _best(
    u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int, dtype: np.dtype
) -> tuple[Factors, float]:
    """Keep the first `rank` terms of an SVD, shared evenly between A and B; and the error."""
    rank = min(rank, len(s))
    root = np.sqrt(s[:rank])
    a, b = (u[:, :rank] * root).astype(dtype), (root[:, None] * vt[:rank]).astype(dtype)
    total = float(np.square(s).sum())
    error = float(np.square(s[rank:]).sum() / total) ** 0.5 if total else 0.0
    return Factors(a, b, alpha=rank), error


def _is_dora(adapter: Adapter) -> bool:
    return any(factors.magnitude is not None for factors in adapter.layers.values())
