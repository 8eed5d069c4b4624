"""LoRA: low-rank adaptation. Hu et al. 2021, arXiv:2106.09685, section 4.1, equation 3.

A linear layer y = x W + b is frozen, and a product of two thin matrices is learned beside it:

    forward     y  = x W + b + scale * x A B         A: (in, r), B: (r, out), r small

    gradients   dA = scale * xᵀ (dout Bᵀ)            (in, r)
                dB = scale * (x A)ᵀ dout             (r, out)
                dx = dout Wᵀ + scale * (dout Bᵀ) Aᵀ  (.., in)

They follow from the full gradient dW = xᵀ dout by the chain rule through W + scale * A B:
dA = scale * dW Bᵀ and dB = scale * Aᵀ dW. In the order above, dW, as large as W, is never
formed, and no optimizer keeps two moments of that size for it.

B starts at zero, so the adapted model starts out equal to the base; A starts random, so
that dB is not zero and learning can begin. (dA is zero at the first step, since B is.)
"""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.nn.functional import matmul, weight_grad
from minilora.nn.layers import (
    Dropout,
    Linear,
    Rng,
    kaiming_uniform,
)
from minilora.nn.module import Module, Parameter, closest, make_rng
from minilora.nn.validate import check_dout, check_dropout, check_sizes, check_width

SCALINGS = {
    "alpha": lambda alpha, rank: alpha,  # the first tutorials and their books
    "alpha/r": lambda alpha, rank: alpha / rank,  # Hu et al. 2021, section 4.1; PEFT
    "alpha/sqrt(r)": lambda alpha, rank: alpha / rank**0.5,  # rsLoRA: Kalajdzievski 2023, eq. 7
}
INITS = ("fan-in", "rank-fan-in")
FOLDED_AT_MOST = 256 * 1024  # numbers in a weight; see `folding_pays`


class LoRALayer(Module):
    """y = scale * x A B

    A       (in_dim, rank), Kaiming-uniform with a = sqrt(5): uniform in ±1/sqrt(in_dim)
    B       (rank, out_dim), zeros
    scale   float: alpha / rank by default; `scaling` may also be "alpha" or "alpha/sqrt(r)"

    init="rank-fan-in" draws A in ±1/sqrt(rank) instead, as code does that hands PyTorch's
    kaiming_uniform_ an (in, rank) tensor, of which it takes the last axis for the fan-in.

    Raises ValueError for a rank below 1, a scaling or an init that does not exist, and an
    alpha that is not a finite number; warns where the rank is above min(in_dim, out_dim),
    where a smaller one could express the same updates.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, scaling: str = "alpha/r",
        init: str = "fan-in", dtype: Any = np.float32, rng: Rng = None,
    ):
        check_hyperparameters(rank, alpha, scaling, init)
        check_sizes("LoRALayer", in_dim=in_dim, out_dim=out_dim)
        if rank > min(in_dim, out_dim):
            _warn_of_rank(rank, min(in_dim, out_dim))
        fan_in = in_dim if init == "fan-in" else rank
        self.A = Parameter(kaiming_uniform((in_dim, rank), fan_in, rng, dtype))
        self.B = Parameter(np.zeros((rank, out_dim), dtype=dtype))
        self.alpha = alpha.item() if isinstance(alpha, np.generic) else alpha
        self.scaling = scaling
        self.scale = float(SCALINGS[scaling](alpha, rank))

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_dim) -> scale * x A B (..., out_dim)."""
        x = check_width(self, x, self.A.shape[0], self.A.data.dtype)
        xa = matmul(x, self.A.data)
        self._save(x, xa)
        y = matmul(xa, self.B.data)
        y *= self.scale
        return y

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """dA = scale * xᵀ (dout Bᵀ),  dB = scale * (x A)ᵀ dout,  dx = scale * (dout Bᵀ) Aᵀ."""
        x, xa = self._take()
        dout = check_dout(self, dout, (*x.shape[:-1], self.B.shape[1]), x.dtype)
        dxa = self.accumulate_gradients(x, xa, dout)
        return matmul(dxa, self.A.data.T) if input_grad else None

    def accumulate_gradients(self, x: np.ndarray, xa: np.ndarray, dout: np.ndarray) -> np.ndarray:
        """Add dA and dB to the gradients, from x and x A; return scale * dout Bᵀ (..., rank)."""
        dxa = matmul(dout, self.B.data.T)
        dxa *= self.scale
        if self.A.requires_grad:
            self.A.accumulate(weight_grad(x, dxa))
        if self.B.requires_grad:
            self.B.accumulate(self.scale * weight_grad(xa, dout))
        return dxa

    def delta_weight(self) -> np.ndarray:
        """Return the update this layer stands for: scale * A B, (in_dim, out_dim)."""
        return self.scale * (self.A.data @ self.B.data)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:g}"


class LinearWithLoRA(Module):
    """y = linear(x) + lora(dropout(x)), with the linear frozen.

    linear   the `Linear` that is wrapped; wrapping freezes it, its weights stay as they are
    lora     a `LoRALayer` of the same sizes and dtype; the other arguments are its own
    dropout  on the input of the LoRA branch only, as in the paper's code and in PEFT

    `merge()` adds scale * A B into the weight, so that the layer costs no more than a plain
    one; `unmerge()` puts the very array back that was there before. Raises TypeError where
    `linear` is not a `Linear`.
    """

    def __init__(
        self, linear: Linear, rank: int, alpha: float, scaling: str = "alpha/r",
        dropout: float = 0.0, init: str = "fan-in", rng: Rng = None,
    ):
        if not isinstance(linear, Linear):
            raise TypeError(f"LinearWithLoRA wraps a Linear, got {type(linear).__name__}")
        rng = make_rng(rng)
        sizes = linear.in_features, linear.out_features
        lora = LoRALayer(*sizes, rank, alpha, scaling, init, linear.weight.data.dtype, rng)
        drop = Dropout(dropout, rng)
        self.linear = linear.freeze()  # only now that nothing can fail any more
        self.dropout, self.lora = drop, lora
        self._unmerged: tuple[Parameter, ...] = ()

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features)."""
        if not self.merged and self._folding_pays(x):
            return self._forward_folded(x)
        self._save(None, None, self.merged)
        if self.merged:
            return self.linear(x)
        return self.linear(x) + self.lora(self.dropout(x))

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """dx is the sum of what the two branches pass down."""
        x, weight, merged = self._take()
        if merged != self.merged:
            raise RuntimeError(f"{self._title()} was merged or unmerged since its forward")
        if merged:
            if self.is_trainable():
                raise RuntimeError(f"{self._title()} is merged: unmerge it before training")
            return self.linear.backward(dout, input_grad)
        if weight is not None:
            return self._backward_folded(x, weight, dout, input_grad)
        dx_linear = self.linear.backward(dout, input_grad)
        dx_lora = self.dropout.backward(self.lora.backward(dout, input_grad), input_grad)
        return dx_linear + dx_lora if input_grad else None

    @property
    def merged(self) -> bool:
        """Whether the weight of `linear` holds W + scale * A B just now."""
        return bool(self._unmerged)

    def delta_weight(self) -> np.ndarray:
        """Return what merging adds to the weight: scale * A B, (in_features, out_features)."""
        return self.lora.delta_weight()

    def merge(self) -> None:
        """Add scale * A B into the weight. RuntimeError where that was done already."""
        if self.merged:
            raise RuntimeError(f"{self._title()} is merged already; merging twice would add twice")
        # A new Parameter, since another layer may share the old one. The old one waits in a
        # tuple, where it does not count as a parameter of this layer.
        old = self.linear.weight
        self.linear.weight = Parameter(old.data + self.delta_weight(), requires_grad=False)
        self._unmerged = (old,)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. RuntimeError where nothing is merged."""
        if not self.merged:
            raise RuntimeError(f"{self._title()} is not merged, there is nothing to undo")
        (self.linear.weight,), self._unmerged = self._unmerged, ()

    def extra_repr(self) -> str:
        return "merged" if self.merged else ""

    def _title(self) -> str:
        return f"{type(self).__name__} around {self.linear._title()}"

    # An optimisation, to be skipped on first reading; see `folding_pays`.
    def _folding_pays(self, x: np.ndarray) -> bool:
        n_in, n_out = self.linear.weight.shape
        dropping = self.training and self.dropout.p > 0.0
        return (
            folding_pays(n_in, n_out, np.size(x) // n_in)
            and not dropping and type(self.linear) is Linear and not self.linear.is_trainable()
        )

    def _forward_folded(self, x: np.ndarray) -> np.ndarray:
        x = check_width(self, x, self.linear.in_features, self.linear.weight.data.dtype)
        weight = self.lora.delta_weight()
        weight += self.linear.weight.data
        self._save(x, weight, False)
        y = matmul(x, weight)
        if self.linear.bias is not None:
            y += self.linear.bias.data
        return y

    def _backward_folded(
        self, x: np.ndarray, weight: np.ndarray, dout: np.ndarray, input_grad: bool
    ) -> np.ndarray | None:
        if self.linear.is_trainable():
            raise RuntimeError(f"{self._title()} was frozen in forward and is not in backward")
        dout = check_dout(self, dout, (*x.shape[:-1], weight.shape[1]), weight.dtype)
        self.lora.accumulate_gradients(x, matmul(x, self.lora.A.data), dout)
        return matmul(dout, weight.T) if input_grad else None


def folding_pays(n_in: int, n_out: int, n_rows: int) -> bool:
    """Whether it is cheaper to form W' = W + scale * A B once a step, and do one product, x W'.

    That costs in * out * r multiply-adds and the memory of a second W until backward is done;
    it saves N * r * (in + out), the products (x A) B and (dout Bᵀ) Aᵀ over all N rows, and two
    sums as large as the activations. So it pays where in * out < N (in + out), and we ask for
    half of that, so that it clearly does: 6 to 10% of a step at d_model 32 to 256. Not for
    larger weights: there is less to gain then (r / d), and the second W is what is dear.
    """
    return n_in * n_out < n_rows * (n_in + n_out) / 2 and n_in * n_out <= FOLDED_AT_MOST


class ModuleToSave(Module):
    """y = module(x): a module that is trained whole for a task, in the place of the base's.

    original   the base's module, frozen and kept for `remove_lora`; None where there was none
    module     what stands in for it; by default a trainable copy

    For what a low-rank update is not enough for, such as the new head of a classifier. Like A
    and B it belongs to the task and is stored with it. (The name is PEFT's, `modules_to_save`.)
    """

    def __init__(self, original: Module | None, module: Module | None = None):
        if not isinstance(original if module is None else module, Module):
            raise TypeError("ModuleToSave needs a Module to train")
        self.module = copy.deepcopy(original).unfreeze() if module is None else module
        self.original = original if original is None else original.freeze()

    @property
    def weight(self) -> Parameter:
        return self.module.weight

    def forward(self, *inputs: Any) -> Any:
        """Do what the module does."""
        return self.module(*inputs)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Do what the module's backward does."""
        return self.module.backward(dout, input_grad)


def replace_linear_with_lora(
    model: Module,
    rank: int,
    alpha: float,
    target_modules: str | list[str] | None = None,
    scaling: str = "alpha/r",
    dropout: float = 0.0,
    init: str = "fan-in",
    rng: Rng = None,
    modules_to_save: str | list[str] | None = None,
    use_dora: bool = False,
) -> Module:
    """Freeze the model, wrap its Linear layers in `LinearWithLoRA`, in place; return the model.

    target_modules    names or globs, such as ["q_proj", "v_proj"] or "h.0.*". A name fits a
                      layer whose dotted name is that name or ends with it; None: every Linear
    modules_to_save   names or globs of modules to train whole and store with A and B, such as
                      the new head of a classifier; see `ModuleToSave`
    use_dora          wrap in `DoRALinear` instead
    other arguments   as for `LoRALayer` and `LinearWithLoRA`

    What is wrapped already is left alone, so the same call again changes nothing. All is
    checked before anything is changed: ValueError for a name that fits nothing, or for
    bad hyper-parameters, TypeError where the model itself is a bare Linear, which cannot be
    replaced in place. A rank above min(in, out) is warned of where that is so in every
    target; in one narrow layer, such as a two-class head, it is as good as inevitable.
    """
    from minilora.lora.dora import DoRALinear  # here, since it is built on this file

    check_hyperparameters(rank, alpha, scaling, init)
    check_dropout(dropout)
    saved = find_modules(model, modules_to_save) if modules_to_save is not None else {}
    targets = {
        path: linear for path, linear in find_targets(model, target_modules).items()
        if not any(path == name or path.startswith(f"{name}.") for name in saved)
    }
    if not targets and not saved:
        return model
    if targets and all(rank > min(linear.weight.shape) for linear in targets.values()):
        _warn_of_rank(rank, max(min(linear.weight.shape) for linear in targets.values()))
    rng, kind = make_rng(rng), DoRALinear if use_dora else LinearWithLoRA
    wrapped: dict[int, Module] = {}  # a module at two places gets one wrapper
    with warnings.catch_warnings(action="ignore"):
        for linear in targets.values():
            if id(linear) not in wrapped:
                layer = kind(linear, rank, alpha, scaling, dropout, init, rng)
                wrapped[id(linear)] = layer.train(linear.training)
    for module in saved.values():
        if id(module) not in wrapped:
            wrapped[id(module)] = ModuleToSave(module).train(module.training)
    install(model, {path: wrapped[id(module)] for path, module in (targets | saved).items()})
    freeze_base(model)
    return model


def install(model: Module, modules: dict[str, Module | None]) -> None:
    """Put each module in the place that its dotted name says."""
    for path, module in modules.items():
        parent_path, _, name = path.rpartition(".")
        parent = model
        for part in filter(None, parent_path.split(".")):
            parent = getattr(parent, part)
        setattr(parent, name, module)


def freeze_base(model: Module) -> None:
    """Freeze every parameter that is not of the task."""
    task = {id(p) for p in task_parameters(model).values()}
    for parameter in model.parameters():
        if id(parameter) not in task:
            parameter.requires_grad, parameter.grad = False, None


def outer_modules(model: Module, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """Yield (dotted name, module) as `named_modules`, but nothing that is inside a wrapper."""
    yield prefix, model
    if not isinstance(model, (LinearWithLoRA, ModuleToSave)):
        for name, child in model.named_children():
            yield from outer_modules(child, f"{prefix}.{name}" if prefix else name)


def wrappers(model: Module) -> dict[str, LinearWithLoRA | ModuleToSave]:
    """Return {dotted name: wrapper} at every place where there is one."""
    return {
        path: module for path, module in outer_modules(model)
        if isinstance(module, (LinearWithLoRA, ModuleToSave))
    }


def base_module(module: Module | None) -> Module | None:
    """Return what the base has in this place: the module itself unless it is a wrapper."""
    if isinstance(module, ModuleToSave):
        return module.original
    return module.linear if isinstance(module, LinearWithLoRA) else module


def task_parameters(model: Module) -> dict[str, Parameter]:
    """Return {dotted name: Parameter} for all that belongs to the task: A, B, saved modules."""
    task = {}
    for path, wrapper in wrappers(model).items():
        base = {id(p) for p in getattr(base_module(wrapper), "parameters", tuple)()}
        for name, parameter in wrapper.named_parameters():
            if id(parameter) not in base:
                task[f"{path}.{name}" if path else name] = parameter
    return task


def lora_layers(model: Module) -> Iterator[tuple[str, LinearWithLoRA]]:
    """Yield (dotted name, layer) for every LinearWithLoRA in the model, each once."""
    seen = set()
    for path, module in model.named_modules():
        if isinstance(module, LinearWithLoRA) and id(module) not in seen:
            seen.add(id(module))
            yield path, module


def find_modules(model: Module, names: str | list[str]) -> dict[str, Module]:
    """Return {dotted name: module} for what the names or globs fit; not for what is saved already.

    Raises ValueError where one fits no module or one with LoRA layers, TypeError as find_targets.
    """
    _check_model(model)
    for name in [names] if isinstance(names, str) else names:
        if isinstance(name, str) and getattr(model, name, model) is None:
            raise ValueError(f"{name} is None in this model (a tied head has no matrix of its "
                             "own): put a module there first")
    known = {path: module for path, module in outer_modules(model) if path}
    found: dict[str, Module] = {}
    for path in match_names(list(known), names, "module"):
        if any(path.startswith(f"{outer}.") for outer in found):
            continue  # it is in a module that is saved as a whole
        if any(isinstance(module, LinearWithLoRA) for _, module in outer_modules(known[path])):
            raise ValueError(f"{path} has LoRA layers: it cannot be trained whole as well")
        if not isinstance(known[path], ModuleToSave):
            found[path] = known[path]
    return found


def find_targets(model: Module, target_modules: str | list[str] | None = None) -> dict[str, Linear]:
    """Return {dotted name: Linear} for the plain Linears that the names or globs fit.

    Raises ValueError where one fits no Linear, plain or wrapped: it lists those there are; and
    TypeError where the model itself is a bare Linear.
    """
    _check_model(model)
    known = {
        path: module for path, module in outer_modules(model)
        if isinstance(base_module(module), Linear)
    }
    if not known:
        raise ValueError(f"{type(model).__name__} has no Linear layer to adapt")
    names = match_names(list(known), target_modules)
    return {name: known[name] for name in names if isinstance(known[name], Linear)}


def _check_model(model: Module) -> None:
    if isinstance(model, Linear):
        raise TypeError("a bare Linear cannot be replaced in place: use LinearWithLoRA")
    if not isinstance(model, Module):
        raise TypeError(f"expected a Module to adapt, got {type(model).__name__}")


def match_names(
    known: list[str], target_modules: str | list[str] | None, what: str = "Linear layer"
) -> list[str]:
    """Return the names, of those known, that a target fits; all where there is no target.

    ValueError that lists what there is where a target fits none, TypeError for other than text.
    """
    if target_modules is None:
        return known
    patterns = target_modules if isinstance(target_modules, (list, tuple)) else [target_modules]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"the names of a {what} are text, or globs, got {pattern!r}")
    if not patterns:
        raise ValueError(f"the list is empty: name a {what}, or pass None")
    for pattern in patterns:
        if not any(_fits(path, pattern) for path in known):
            raise ValueError(_no_such_target(pattern, known, what))
    return [path for path in known if any(_fits(path, pattern) for pattern in patterns)]


def _fits(path: str, pattern: str) -> bool:
    """Whether the pattern is the dotted name, or its end from a dot on; * and ? are wild."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _no_such_target(pattern: str, paths: list[str], what: str) -> str:
    ends = sorted({path.rpartition(".")[2] for path in paths})
    return (
        f"target {pattern!r} fits no {what}{closest(pattern, ends + paths)} "
        f"(there are: {', '.join(ends)}; dotted names run from {paths[0]} to {paths[-1]})"
    )


def check_hyperparameters(rank: int, alpha: float, scaling: str, init: str) -> None:
    """Raise TypeError or ValueError that says which of them cannot be, and what could."""
    check_sizes("LoRA", rank=rank)
    if not isinstance(alpha, (int, float, np.integer, np.floating)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}; got {scaling!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}")


def _warn_of_rank(rank: int, most: int) -> None:
    warnings.warn(
        f"rank {rank} is above min(in, out) = {most}: A B cannot have a rank above that, "
        f"so rank {most} could learn the same with fewer parameters",
        stacklevel=3,
    )


def _adapted(model: Module) -> list[LinearWithLoRA]:
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers")
    return layers


def merge_lora(model: Module, unload: bool = False) -> Module:
    """Merge every LoRA layer into its weight (x W + scale * x A B in one product).

    With `unload` it is for good: plain Linears take the place of the LoRA layers, A and B are
    gone, saved modules stay in the place of the base's, and the model can be saved like any
    other. Without, `unmerge_lora` undoes it.

    Raises ValueError where there is no LoRA layer, RuntimeError where one is merged already;
    nothing is changed then.
    """
    layers = _adapted(model)
    if unload:
        _refuse_bare(model)
    if not (unload and all(layer.merged for layer in layers)):
        if any(layer.merged for layer in layers):
            raise RuntimeError("some or all layers are merged already; merging twice would add "
                               "twice")
        for layer in layers:
            layer.merge()
    if unload:
        for path, wrapper in wrappers(model).items():
            kept = wrapper.module if isinstance(wrapper, ModuleToSave) else wrapper
            install(model, {path: kept.linear if isinstance(kept, LinearWithLoRA) else kept})
    return model


def unmerge_lora(model: Module) -> Module:
    """Undo `merge_lora`: every base weight is what it was, bit for bit. Errors likewise."""
    layers = _adapted(model)
    if not all(layer.merged for layer in layers):
        raise RuntimeError("some or all layers are not merged, there is nothing to undo in them")
    for layer in reversed(layers):
        layer.unmerge()
    return model


def remove_lora(model: Module) -> Module:
    """Take every LoRA layer out, merged or not: the base as it was, bit for bit, still frozen.

    Where a saved module stood in for one of the base's, that is back, too. Raises ValueError
    where there is nothing to remove, TypeError where the model itself is a LoRA layer.
    """
    if not wrappers(model):
        _adapted(model)  # says so
    _refuse_bare(model)
    for _, layer in reversed(list(lora_layers(model))):
        if layer.merged:
            layer.unmerge()
    install(model, {path: base_module(wrapper) for path, wrapper in wrappers(model).items()})
    return model


def _refuse_bare(model: Module) -> None:
    if isinstance(model, (LinearWithLoRA, ModuleToSave)):
        use = ".linear" if isinstance(model, LinearWithLoRA) else ".original"
        raise TypeError(f"a bare {type(model).__name__} cannot be replaced in place: use its {use}")


def lora_state_dict(model: Module) -> dict[str, np.ndarray]:
    """Return {dotted name: a copy of the array} for A and B: all that a task is.

    With DoRA also the magnitudes, and with modules to save theirs.
    `model.load_state_dict(task, strict=False)` puts the task back.
    """
    return {name: parameter.data.copy() for name, parameter in task_parameters(model).items()}
