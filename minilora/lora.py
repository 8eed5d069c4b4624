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

import fnmatch
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.checks import check_dout, check_dropout, check_sizes, check_width
from minilora.functional import matmul, weight_grad
from minilora.layers import (
    Dropout,
    Linear,
    Rng,
    kaiming_uniform,
)
from minilora.module import Module, Parameter, closest, make_rng

SCALINGS = {
    "alpha": lambda alpha, rank: alpha,  # the first tutorials and their books
    "alpha/r": lambda alpha, rank: alpha / rank,  # Hu et al. 2021, section 4.1; PEFT
    "alpha/sqrt(r)": lambda alpha, rank: alpha / rank**0.5,  # rsLoRA: Kalajdzievski 2023, eq. 7
}
INITS = ("fan-in", "rank-fan-in")


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

    def merge(self) -> None:
        """Add scale * A B into the weight. RuntimeError where that was done already."""
        if self.merged:
            raise RuntimeError(f"{self._title()} is merged already; merging twice would add twice")
        # A new Parameter, since another layer may share the old one. The old one waits in a
        # tuple, where it does not count as a parameter of this layer.
        old = self.linear.weight
        self.linear.weight = Parameter(old.data + self.lora.delta_weight(), requires_grad=False)
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

    # An optimisation, to be skipped on first reading. When the input has many rows, it is
    # cheaper to form W' = W + scale * A B once a step and do one product with it, x W'. That
    # costs in * out * r multiply-adds and the memory of a second W until backward is done; it
    # saves N * r * (in + out), the products (x A) B and (dout Bᵀ) Aᵀ over all N rows, and two
    # sums as large as the activations. So it pays where in * out < N (in + out), and we ask
    # for half of that, so that it clearly does: 6 to 10% of a step at d_model 32 to 256.
    def _folding_pays(self, x: np.ndarray) -> bool:
        n_in, n_out = self.linear.weight.shape
        n_rows = np.size(x) // n_in
        dropping = self.training and self.dropout.p > 0.0
        return (
            n_in * n_out < n_rows * (n_in + n_out) / 2
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


def replace_linear_with_lora(
    model: Module,
    rank: int,
    alpha: float,
    target_modules: str | list[str] | None = None,
    scaling: str = "alpha/r",
    dropout: float = 0.0,
    init: str = "fan-in",
    rng: Rng = None,
) -> Module:
    """Freeze the model, wrap its Linear layers in `LinearWithLoRA`, in place; return the model.

    target_modules   names or globs, such as ["q_proj", "v_proj"] or "h.0.*". A name fits a
                     layer whose dotted name is that name or ends with it; None: every Linear
    other arguments  as for `LoRALayer` and `LinearWithLoRA`

    Layers that are wrapped already are left alone, so the same call again changes nothing. All is
    checked before anything is changed: ValueError for a target that fits no Linear, or for
    bad hyper-parameters, TypeError where the model itself is a bare Linear, which cannot be
    replaced in place. A rank above min(in, out) is warned of where that is so in every
    target; in one narrow layer, such as a two-class head, it is as good as inevitable.
    """
    check_hyperparameters(rank, alpha, scaling, init)
    check_dropout(dropout)
    targets = find_targets(model, target_modules)
    if not targets:
        return model
    rng = make_rng(rng)
    wrapped: dict[int, LinearWithLoRA] = {}  # a Linear at two places gets one LoRA layer

    def replace(parent: Module, prefix: str = "") -> None:
        for name, child in list(parent.named_children()):
            path = prefix + name
            if isinstance(child, Linear) and path in targets:
                if id(child) not in wrapped:
                    layer = LinearWithLoRA(child, rank, alpha, scaling, dropout, init, rng)
                    wrapped[id(child)] = layer.train(child.training)
                setattr(parent, name, wrapped[id(child)])
            elif not isinstance(child, LinearWithLoRA):
                replace(child, path + ".")

    if all(rank > min(linear.weight.shape) for linear in targets.values()):
        _warn_of_rank(rank, max(min(linear.weight.shape) for linear in targets.values()))
    freeze_base(model)
    with warnings.catch_warnings(action="ignore"):
        replace(model)
    return model


def freeze_base(model: Module) -> None:
    """Freeze every parameter but the A and B of LoRA layers."""
    lora = {id(p) for _, layer in lora_layers(model) for p in layer.lora.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in lora:
            parameter.requires_grad, parameter.grad = False, None


def lora_layers(model: Module) -> Iterator[tuple[str, LinearWithLoRA]]:
    """Yield (dotted name, layer) for every LinearWithLoRA in the model, each once."""
    seen = set()
    for path, module in model.named_modules():
        if isinstance(module, LinearWithLoRA) and id(module) not in seen:
            seen.add(id(module))
            yield path, module


def find_targets(model: Module, target_modules: str | list[str] | None = None) -> dict[str, Linear]:
    """Return {dotted name: Linear} for the plain Linears that the names or globs fit.

    Raises ValueError where one fits no Linear, plain or wrapped: it lists those there are; and
    TypeError where the model itself is a bare Linear.
    """
    if isinstance(model, Linear):
        raise TypeError("a bare Linear cannot be replaced in place: use LinearWithLoRA")
    if not isinstance(model, Module):
        raise TypeError(f"expected a Module to adapt, got {type(model).__name__}")
    inner = {id(layer.linear) for _, layer in lora_layers(model)}  # these are not targets
    known = {
        path: module for path, module in model.named_modules()
        if isinstance(module, (Linear, LinearWithLoRA)) and id(module) not in inner
    }
    if not known:
        raise ValueError(f"{type(model).__name__} has no Linear layer to adapt")
    names = match_names(list(known), target_modules)
    return {name: known[name] for name in names if isinstance(known[name], Linear)}


def match_names(known: list[str], target_modules: str | list[str] | None) -> list[str]:
    """Return the names, of those known, that a target fits; all where there is no target.

    ValueError that lists what there is where a target fits none, TypeError for other than text.
    """
    if target_modules is None:
        return known
    patterns = target_modules if isinstance(target_modules, (list, tuple)) else [target_modules]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"target_modules takes names or globs, got {pattern!r}")
    if not patterns:
        raise ValueError("target_modules is empty: name a layer, or pass None for every Linear")
    for pattern in patterns:
        if not any(_fits(path, pattern) for path in known):
            raise ValueError(_no_such_target(pattern, known))
    return [path for path in known if any(_fits(path, pattern) for pattern in patterns)]


def _fits(path: str, pattern: str) -> bool:
    """Whether the pattern is the dotted name, or its end from a dot on; * and ? are wild."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _no_such_target(pattern: str, paths: list[str]) -> str:
    ends = sorted({path.rpartition(".")[2] for path in paths})
    return (
        f"target {pattern!r} fits no Linear layer{closest(pattern, ends + paths)} "
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
    gone, and the model can be saved like any other. Without, `unmerge_lora` undoes it.

    Raises ValueError where there is no LoRA layer, RuntimeError where one is merged already;
    nothing is changed then.
    """
    layers = _adapted(model)
    if unload:
        _refuse_bare(model)
        if all(layer.merged for layer in layers):
            return _unwrap(model)
    if any(layer.merged for layer in layers):
        raise RuntimeError("some or all layers are merged already; merging twice would add twice")
    for layer in layers:
        layer.merge()
    return _unwrap(model) if unload else model


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

    Raises ValueError where there is none, TypeError where the model itself is one.
    """
    layers = _adapted(model)
    _refuse_bare(model)
    for layer in reversed(layers):
        if layer.merged:
            layer.unmerge()
    return _unwrap(model)


def _refuse_bare(model: Module) -> None:
    if isinstance(model, LinearWithLoRA):
        raise TypeError("a bare LinearWithLoRA cannot be replaced in place: use its .linear")


def _unwrap(model: Module) -> Module:
    """Put the Linear in the place of every LoRA layer, with the weight that it has now."""
    for _, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LinearWithLoRA):
                setattr(parent, name, child.linear)
    return model


def lora_state_dict(model: Module) -> dict[str, np.ndarray]:
    """Return {dotted name: a copy of the array} for A and B alone: all that a task is.

    `model.load_state_dict(task, strict=False)` puts the task back.
    """
    return {
        f"{path}.lora.{name}" if path else f"lora.{name}": parameter.data.copy()
        for path, layer in lora_layers(model)
        for name, parameter in layer.lora.named_parameters()
    }
