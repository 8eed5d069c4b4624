"""DoRA: weight-decomposed low-rank adaptation. Liu et al. 2024, arXiv:2402.09353, equation 5.

A column of a weight matrix has a length and a direction. LoRA changes both at once; DoRA learns
the lengths separately, as a vector m, and uses A and B to change the directions:

    V  = W + scale * A B                  (in, out)
    n  = ||V|| of each column             (out,): sqrt(sum over the input axis of V²)
    W' = (m / n) * V                      m starts as ||W||, so W' starts as W

With G = xᵀ dout, the gradient of W', and D = V / n, the directions:

    dm = sum over the input axis of G * D
    dV = (m / n) * G                      with n held constant (section 4.3), as in PEFT
    dV = (m / n) * (G - D * dm)           with n differentiated too: the part along D vanishes
    dA = scale * dV Bᵀ,   dB = scale * Aᵀ dV
"""

from __future__ import annotations

import numpy as np

from minilora.lora.layer import LinearWithLoRA
from minilora.nn.fast import matmul, weight_grad
from minilora.nn.layers import Linear
from minilora.nn.module import Parameter
from minilora.nn.validate import Rng, check_dout, check_flag


class DoRALinear(LinearWithLoRA):
    """y = x W' + b with W' = (m / ||W + scale * A B||) * (W + scale * A B), W and b frozen.

    Liu et al. 2024, equation 5. x is (..., in_features) and y (..., out_features). With dropout,
    y = x W + b + dropout(x) (W' - W), as in PEFT. Unlike LoRA's, this backward forms the gradient
    of the whole weight, (in, out), but no optimizer keeps moments for it.

    Parameters
    ----------
    linear, rank, alpha, scaling, dropout, rng : as for `LinearWithLoRA`
    detach_norm : if True, backward treats the norm as a constant, as the paper's section 4.3
        proposes and PEFT does; if False, it gives the full gradient

    Attributes
    ----------
    linear, lora, dropout : as in `LinearWithLoRA`
    magnitude : Parameter (out_features,), m; it starts as the lengths of the columns of W
    """

    def __init__(
        self, linear: Linear, rank: int, alpha: float, *,
        scaling: str = "alpha/r", dropout: float = 0.0, rng: Rng = None, detach_norm: bool = True,
    ):
        check_flag(detach_norm=detach_norm)
        super().__init__(linear, rank, alpha, scaling=scaling, dropout=dropout, rng=rng)
        self.magnitude = Parameter(column_norms(linear.weight.data))
        self.detach_norm = detach_norm

    def decompose(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the directions D = V / ||V|| (in, out), and m / ||V|| (out,)."""
        v = self.linear.weight.data + self.lora.delta_weight()
        norms = column_norms(v)
        return v / norms, self.magnitude.data / norms

    def delta_weight(self) -> np.ndarray:
        """Return W' - W, (in_features, out_features)."""
        direction, _ = self.decompose()
        return self.magnitude.data * direction - self.linear.weight.data

    def task_parameters(self) -> list[Parameter]:
        """Return A, B and m."""
        return [*super().task_parameters(), self.magnitude]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features)."""
        if self.merged:
            return super().forward(x)
        direction, gain = self.decompose()
        delta = self.magnitude.data * direction - self.linear.weight.data  # W' - W
        y = self.linear(x)
        x = self.dropout(np.asarray(x).astype(delta.dtype, copy=False))
        self._save(x, delta, direction, gain, self.lora.A.data, self.lora.B.data)
        return y + matmul(x, delta)

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """Fill dm, dA and dB as at the top of this file; dx is the sum of both branches."""
        if self.merged:
            return self.merged_backward(dout)
        x, delta, direction, gain, a, b = self._take()
        if self.linear.weight.requires_grad:
            raise RuntimeError(f"{self.title()}: W' depends on W, so W cannot be trained here; "
                               "freeze it")
        dout = check_dout(self, dout, (*x.shape[:-1], delta.shape[1]), delta.dtype)
        g = weight_grad(x, dout)
        dm = (g * direction).sum(axis=0)
        dv = gain * (g if self.detach_norm else g - direction * dm)
        for parameter, gradient in (
            (self.magnitude, dm), (self.lora.A, self.lora.scale * (dv @ b.T)),
            (self.lora.B, self.lora.scale * (a.T @ dv)),
        ):
            if parameter.requires_grad:
                parameter.accumulate(gradient)
        dx_delta = self.dropout.backward(matmul(dout, delta.T))
        return self.linear.backward(dout) + dx_delta


def column_norms(weight: np.ndarray) -> np.ndarray:
    """Return the Euclidean norm of each column, (in, out) -> (out,); never 0."""
    norms = np.sqrt(np.square(weight).sum(axis=0))
    return np.maximum(norms, np.finfo(weight.dtype).tiny)  # a column of zeros stays zero
