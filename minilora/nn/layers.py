"""The layers of a transformer: each forward with its backward right below it.

A backward goes through the steps of its forward in reverse order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.nn.functional import (
    column_sums,
    gelu_with_derivative,
    layer_norm,
    layer_norm_backward,
    matmul,
    rows,
    scatter_sum,
    token_ids,
    weight_grad,
)
from minilora.nn.module import Module, Parameter, float_dtype, make_rng
from minilora.nn.validate import check_dout, check_dropout, check_float, check_sizes, check_width

Rng = np.random.Generator | int | None


def kaiming_uniform(shape: tuple[int, ...], fan_in: int, rng: Rng, dtype: Any) -> np.ndarray:
    """Draw uniformly from ±1/sqrt(fan_in).

    This is Kaiming's bound sqrt(6 / ((1 + a²) fan_in)) with the a = sqrt(5) that PyTorch's
    `Linear` and LoRA's A use. He et al. 2015, "Delving Deep into Rectifiers", equation 15.
    """
    bound = fan_in**-0.5
    uniform = make_rng(rng).random(shape, dtype=float_dtype(dtype))
    uniform *= 2.0 * bound
    uniform -= bound
    return uniform


class Linear(Module):
    """y = x W + b

    weight   (in_features, out_features), uniform in ±1/sqrt(in_features)
    bias     (out_features,), drawn likewise, or None

    The weight is stored the way the equation is written, so no transpose is needed (PyTorch
    stores the transpose). Raises ValueError where a size is below 1.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        dtype: Any = np.float32, rng: Rng = None,
    ):
        check_sizes("Linear", in_features=in_features, out_features=out_features)
        rng = make_rng(rng)
        self.weight = Parameter(
            kaiming_uniform((in_features, out_features), in_features, rng, dtype)
        )
        self.bias = None
        if bias:
            self.bias = Parameter(kaiming_uniform((out_features,), in_features, rng, dtype))

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features)."""
        weight = self.weight.data
        x = check_width(self, x, weight.shape[0], weight.dtype)
        y = matmul(x, weight)
        if self.bias is not None:
            y += self.bias.data
        self._save(x if self.weight.requires_grad else None, y.shape)  # frozen: no input kept
        return y

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """dW = xᵀ dout,  db = sum of dout over the rows,  dx = dout Wᵀ."""
        x, shape = self._take()
        weight = self.weight.data
        dout = check_dout(self, dout, shape, weight.dtype)
        if self.bias is not None and self.bias.requires_grad:
            self.bias.accumulate(column_sums(dout))
        if self.weight.requires_grad:
            if x is None:
                raise RuntimeError(f"{self._title()} was frozen in forward and is not in backward")
            self.weight.accumulate(weight_grad(x, dout))
        return matmul(dout, weight.T) if input_grad else None

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"in_features={self.in_features}, out_features={self.out_features}{bias}"


class Embedding(Module):
    """y = W[ids]: one row of the table for each id.

    weight   (num_embeddings, embedding_dim), normal with standard deviation 1
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: Any = np.float32, rng: Rng = None
    ):
        check_sizes("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        table = make_rng(rng).standard_normal((num_embeddings, embedding_dim), float_dtype(dtype))
        self.weight = Parameter(table)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Ints ids (...) in 0..num_embeddings-1 -> y (..., embedding_dim)."""
        ids = token_ids(ids, self.weight.shape[0])
        self._save(ids)
        return self.weight.data[ids]

    def backward(self, dout: np.ndarray, input_grad: bool = False) -> None:
        """dW[id] = sum of dout over the places where id stood. Ids have no gradient."""
        (ids,) = self._take()
        if self.weight.requires_grad:
            shape = (*ids.shape, self.weight.shape[1])
            dout = check_dout(self, dout, shape, self.weight.data.dtype)
            self.weight.accumulate(scatter_sum(ids, dout, self.weight.shape[0]))

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class LayerNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the last axis.

    weight   (width,), ones
    bias     (width,), zeros, or None
    """

    def __init__(
        self, width: int, bias: bool = True, eps: float = 1e-5, dtype: Any = np.float32
    ):
        check_sizes("LayerNorm", width=width)
        self.weight = Parameter(np.ones(width, dtype=float_dtype(dtype)))
        self.bias = Parameter(np.zeros(width, dtype=float_dtype(dtype))) if bias else None
        self.eps = eps

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., width) -> y (..., width)."""
        x = check_width(self, x, self.weight.size, self.weight.data.dtype)
        bias = None if self.bias is None else self.bias.data
        y, cache = layer_norm(x, self.weight.data, bias, self.eps)
        self._save(cache, y.shape)
        return y

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """dweight = sum of dout * xhat,  dbias = sum of dout; dx: see `layer_norm_backward`."""
        cache, shape = self._take()
        dout = check_dout(self, dout, shape, self.weight.data.dtype)
        if self.bias is not None and self.bias.requires_grad:
            self.bias.accumulate(column_sums(dout))
        if self.weight.requires_grad:
            xhat, _ = cache
            self.weight.accumulate(column_sums(rows(dout) * xhat))
        return layer_norm_backward(dout, cache, self.weight.data) if input_grad else None

    def extra_repr(self) -> str:
        return f"{self.weight.size}, eps={self.eps}"


class GELU(Module):
    """y = gelu(x), the tanh form; see `functional.gelu`."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (...) -> y (...)."""
        y, derivative = gelu_with_derivative(check_float(self, x))
        self._save(derivative)
        return y

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """dx = dout * gelu'(x)."""
        (derivative,) = self._take()
        dout = check_dout(self, dout, derivative.shape, derivative.dtype)
        return dout * derivative if input_grad else None


class Dropout(Module):
    """y = x * mask / (1 - p) in training, each number kept with probability 1 - p; else y = x.

    Srivastava et al. 2014, "Dropout", in the inverted form that needs nothing at test time.
    Raises ValueError unless 0 <= p < 1.
    """

    def __init__(self, p: float = 0.0, rng: Rng = None):
        check_dropout(p)
        self.p = float(p)
        self.rng = make_rng(rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (...) -> y (...)."""
        x = check_float(self, x)
        if not self.training or self.p == 0.0:
            self._save(None)
            return x
        mask = (self.rng.random(x.shape, dtype=np.float32) >= self.p).astype(x.dtype)
        mask *= 1.0 / (1.0 - self.p)
        self._save(mask)
        return x * mask

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """dx = dout * mask / (1 - p); the mask that is kept has the division in it."""
        (mask,) = self._take()
        if not input_grad:
            return None
        return dout if mask is None else check_dout(self, dout, mask.shape, mask.dtype) * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"
