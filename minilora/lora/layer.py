"""LoRA: low-rank adaptation. Hu et al. 2021, arXiv:2106.09685, section 4.1, equation 3.

A trained network, the base, is to learn a new task. All its weights are frozen, and beside the
weight W, of shape (n, m), of each chosen linear layer the product of two thin matrices is learned,
A (n, r) and B (r, m). These are r (n + m) numbers instead of n m: for n = m = 768 and r = 8, 12,288
instead of 589,824. A B has rank at most r. The hypothesis is that the change of W which a new task
needs is close to a matrix of low rank. A task is stored as its A and B, and alpha. All of it but
the update of A and B, for an input x of shape (N, n):

    class LoRA:  # y = x W + scale * x A B, with W frozen
        def __init__(self, W, rank, alpha, rng):
            n, m = W.shape
            self.W, self.scale = W, alpha / rank
            self.A = rng.uniform(-1, 1, (n, rank)) / n**0.5
            self.B = np.zeros((rank, m))  # so it starts out equal to the base

        def forward(self, x):
            self.x = x
            return x @ self.W + self.scale * (x @ self.A @ self.B)

        def backward(self, dout):
            dxA = self.scale * dout @ self.B.T
            self.dA = self.x.T @ dxA
            self.dB = self.scale * (self.x @ self.A).T @ dout
            return dout @ self.W.T + dxA @ self.A.T

alpha sets how much the product counts. x A B is a sum of r terms; dividing by r reduces the need to
retune when the rank is changed (section 4.1).

The gradients. Together the two terms are y = x W' with W' = W + scale * A B. If W' were a weight of
its own, its gradient would be dW' = xᵀ dout, and the chain rule gives dA = scale * dW' Bᵀ and
dB = scale * Aᵀ dW'. `backward` multiplies in another order, so that dW', as large as W, is never
formed. With B = 0 only B moves in the first step; with A = 0 as well nothing ever would.

Below, the same as two modules: the branch x A B by itself, and the frozen layer with its branch.
(A `Parameter` is an array with a gradient, to which `accumulate` adds. `_save` keeps values for
backward, `_take` returns them. check_width and check_dout return their argument, checked and in the
layer's dtype. `matmul` and `weight_grad` are x @ W and xᵀ dout for any number of axes.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.lora.merging import Mergeable
from minilora.lora.scaling import lora_scale
from minilora.nn.fast import matmul, weight_grad
from minilora.nn.layers import Dropout, Linear, kaiming_uniform
from minilora.nn.module import Module, Parameter
from minilora.nn.validate import Rng, check_dout, check_sizes, check_width, make_rng


class LoRALayer(Module):
    """y = scale * x A B: x (..., in_dim) -> y (..., out_dim)

    Hu et al. 2021, equation 3. Raises TypeError or ValueError naming an invalid hyperparameter.

    Attributes
    ----------
    A : Parameter (in_dim, rank), uniform between ±1/sqrt(in_dim), as in the paper's code
    B : Parameter (rank, out_dim), zeros
    scale : float, alpha / rank; `scaling` may also be "alpha/sqrt(r)" (rsLoRA) or "alpha"
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, *,
        scaling: str = "alpha/r", dtype: Any = np.float32, rng: Rng = None,
    ):
        check_sizes("LoRALayer", in_dim=in_dim, out_dim=out_dim)
        self.scale = lora_scale(rank, alpha, scaling)
        self.A = Parameter(kaiming_uniform((in_dim, rank), in_dim, rng, dtype))
        self.B = Parameter(np.zeros((rank, out_dim), dtype=dtype))
        self.rank, self.alpha, self.scaling = int(rank), float(alpha), scaling

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_dim) -> y (..., out_dim). Raises ValueError for other widths."""
        x = check_width(self, x, self.A.shape[0], self.A.dtype)
        xa = matmul(x, self.A.data)  # (..., rank)
        self._save(x, xa)
        return matmul(self.scale * xa, self.B.data)

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dA = scale * xᵀ (dout Bᵀ),  dB = scale * (x A)ᵀ dout,  dx = scale * (dout Bᵀ) Aᵀ."""
        x, xa = self._take()
        dout = check_dout(self, dout, (*x.shape[:-1], self.B.shape[1]), x.dtype)
        dxa = self.scale * matmul(dout, self.B.data.T)
        if self.A.requires_grad:
            self.A.accumulate(weight_grad(x, dxa))
        if self.B.requires_grad:
            self.B.accumulate(self.scale * weight_grad(xa, dout))
        return matmul(dxa, self.A.data.T)

    def delta_weight(self) -> np.ndarray:
        """Return the update of the weight, scale * A B: (in_dim, out_dim)."""
        return self.scale * (self.A.data @ self.B.data)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}"


class LinearWithLoRA(Mergeable):
    """y = linear(x) + lora(dropout(x)), with the linear frozen: (..., n) -> (..., m)

    `merge()`, from `Mergeable`, forms W' = W + scale * A B once, beside W. From then on the layer
    is x W' + b, as cheap as a plain Linear, and cannot be trained, until `unmerge()` forgets W'.

    Attributes
    ----------
    linear : the `Linear` that was given, frozen; its weights are never written to
    lora : a new `LoRALayer` of the same sizes and dtype
    dropout : Dropout on the input of the LoRA branch only, as in the paper's code and in PEFT
    """

    def __init__(
        self, linear: Linear, rank: int, alpha: float, *,
        scaling: str = "alpha/r", dropout: float = 0.0, rng: Rng = None,
    ):
        if not isinstance(linear, Linear):
            raise TypeError(f"{type(self).__name__} wraps a Linear, got {type(linear).__name__}")
        rng, (n, m), dtype = make_rng(rng), linear.weight.shape, linear.weight.dtype
        self.linear = linear
        self.dropout = Dropout(dropout, rng)
        self.lora = LoRALayer(n, m, rank, alpha, scaling=scaling, dtype=dtype, rng=rng)
        linear.freeze()  # last, so that an error above leaves it unchanged

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features)."""
        if self.merged:
            return self.merged_linear()(x)
        y = self.lora(self.dropout(x))
        y += self.linear(x)
        return y

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dx is the sum of what the two branches pass down."""
        if self.merged:
            return self.merged_backward(dout)
        dx = self.dropout.backward(self.lora.backward(dout))
        dx += self.linear.backward(dout)
        return dx

    def delta_weight(self) -> np.ndarray:
        """Return W' - W = scale * A B, (in_features, out_features)."""
        return self.lora.delta_weight()

    def task_parameters(self) -> list[Parameter]:
        """Return A and B: all that is learned, and all that is stored for a task."""
        return [self.lora.A, self.lora.B]
