"""DoRA: weight-decomposed low-rank adaptation. Liu et al. 2024, arXiv:2402.09353, equation 5.

A column of a weight matrix has a length and a direction. LoRA changes both at once; DoRA learns
the lengths on their own, as a vector m, and lets A and B change the directions:

    V  = W + scale * A B                  (in, out)
    n  = ||V|| of each column             (out,): sqrt(sum over the input axis of V²)
    W' = (m / n) * V                      m starts as ||W||, so W' starts as W

With G = xᵀ dout, the gradient of W', and D = V / n, the directions:

    dm = sum over the input axis of G * D
    dV = (m / n) * G                      n taken for a constant (section 4.3), as in PEFT
    dV = (m / n) * (G - D * dm)           n differentiated as well: what goes along D falls out
    dA = scale * dV Bᵀ,   dB = scale * Aᵀ dV
"""

from __future__ import annotations

import numpy as np

from minilora.lora.wrap import LinearWithLoRA
from minilora.nn.functional import matmul, weight_grad
from minilora.nn.layers import Linear, Rng
from minilora.nn.module import Parameter
from minilora.nn.validate import check_dout


class DoRALinear(LinearWithLoRA):
    """y = x W' + b with W' = (m / ||W + scale * A B||) * (W + scale * A B), W and b frozen.

    linear, lora   as in `LinearWithLoRA`, whose arguments these are
    magnitude      m, (out_features,): the lengths of the columns, at first those of W
    detach_norm    True: backward takes the norm for a constant, as the paper's section 4.3
                   proposes and PEFT does; False: the full gradient

    With dropout, y = x W + b + dropout(x) (W' - W), as in PEFT. Unlike LoRA's, this backward
    forms the gradient of the whole weight, (in, out), though no optimizer keeps moments for it.
    """

    def __init__(
        self, linear: Linear, rank: int, alpha: float, scaling: str = "alpha/r",
        dropout: float = 0.0, init: str = "fan-in", rng: Rng = None, detach_norm: bool = True,
    ):
        super().__init__(linear, rank, alpha, scaling, dropout, init, rng)
        self.magnitude = Parameter(column_norms(linear.weight.data))
        self.detach_norm = detach_norm

    def decompose(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the directions D = V / ||V|| (in, out), and m / ||V|| (out,)."""
        v = self.base_weight + self.lora.delta_weight()
        norms = column_norms(v)
        return v / norms, self.magnitude.data / norms

    @property
    def base_weight(self) -> np.ndarray:
        """The weight of the base, also while merged."""
        return (self._unmerged[0] if self.merged else self.linear.weight).data

    def delta_weight(self) -> np.ndarray:
        """Return W' - W, (in_features, out_features)."""
        direction, _ = self.decompose()
        return self.magnitude.data * direction - self.base_weight

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features)."""
        if self.merged:
            return super().forward(x)
        direction, gain = self.decompose()
        delta = self.magnitude.data * direction - self.linear.weight.data  # W' - W
        y = self.linear(x)
        x = self.dropout(np.asarray(x).astype(delta.dtype, copy=False))
        self._save((x, delta, direction, gain), None, False)
        return y + matmul(x, delta)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Fill dm, dA and dB as at the top of this file; dx is the sum of both branches."""
        if self._cache is None or self._cache[0] is None or self.merged:
            return super().backward(dout, input_grad)  # goes through the merged weight, or says no
        (x, delta, direction, gain), _, _ = self._take()
        dout = check_dout(self, dout, (*x.shape[:-1], delta.shape[1]), delta.dtype)
        g = weight_grad(x, dout)
        dm = (g * direction).sum(axis=0)
        dv = gain * (g if self.detach_norm else g - direction * dm)
        a, b, scale = self.lora.A, self.lora.B, self.lora.scale
        for parameter, gradient in (
            (self.magnitude, dm), (a, scale * (dv @ b.data.T)), (b, scale * (a.data.T @ dv))
        ):
            if parameter.requires_grad:
                parameter.accumulate(gradient)
        dx_linear = self.linear.backward(dout, input_grad)
        dx_delta = self.dropout.backward(matmul(dout, delta.T), input_grad)
        return dx_linear + dx_delta if input_grad else None


def column_norms(weight: np.ndarray) -> np.ndarray:
    """Return the Euclidean norm of each column, (in, out) -> (out,); at least a tiny number."""
    norms = np.sqrt(np.square(weight).sum(axis=0))
    return np.maximum(norms, np.finfo(weight.dtype).tiny)  # a column of zeros stays zero
