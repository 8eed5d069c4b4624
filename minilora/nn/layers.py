"""The layers of a transformer. Each backward reverses the steps of the forward above it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from minilora.nn.fast import gelu, layer_norm, layer_norm_backward, matmul, weight_grad
from minilora.nn.functional import rows
from minilora.nn.module import Module, Parameter
from minilora.nn.validate import (
    Rng,
    check_dout,
    check_dropout,
    check_flag,
    check_float,
    check_kept,
    check_sizes,
    check_width,
    float_dtype,
    make_rng,
    token_ids,
)


def kaiming_uniform(shape: tuple[int, ...], fan_in: int, rng: Rng, dtype: Any) -> np.ndarray:
    """Draw uniformly from ±1/sqrt(fan_in).

    This is Kaiming's bound sqrt(6 / ((1 + a²) fan_in)) with a = sqrt(5), as in PyTorch's
    `Linear` and for LoRA's A. He et al. 2015, "Delving Deep into Rectifiers", equation 15.
    """
    bound = fan_in**-0.5
    return 2.0 * bound * make_rng(rng).random(shape, dtype=float_dtype(dtype)) - bound


class Linear(Module):
    """y = x W + b: x (..., in_features) -> y (..., out_features)

    Raises TypeError or ValueError if a size is not a whole number of 1 or more.

    Attributes
    ----------
    weight : Parameter (in_features, out_features), uniform in ±1/sqrt(in_features); in PyTorch, Wᵀ
    bias : Parameter (out_features,), from the same distribution, or None
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        dtype: Any = np.float32, rng: Rng = None,
    ):
        check_sizes("Linear", in_features=in_features, out_features=out_features)
        check_flag(bias=bias)
        rng = make_rng(rng)
        weight = kaiming_uniform((in_features, out_features), in_features, rng, dtype)
        self.weight = Parameter(weight)
        self.bias: Parameter | None = None
        if bias:
            self.bias = Parameter(kaiming_uniform((out_features,), in_features, rng, dtype))

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features). Raises ValueError for other widths."""
        x = check_width(self, x, self.in_features, self.weight.dtype)
        y = matmul(x, self.weight.data)
        if self.bias is not None:
            y += self.bias.data
        self._save(x if self.weight.requires_grad else None, y.shape)  # frozen: no input kept
        return y

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dW = xᵀ dout,  db = sum of dout over the rows,  dx = dout Wᵀ."""
        x, shape = self._take()
        dout = check_dout(self, dout, shape, self.weight.dtype)
        if self.bias is not None and self.bias.requires_grad:
            self.bias.accumulate(rows(dout).sum(axis=0))
        if self.weight.requires_grad:
            self.weight.accumulate(weight_grad(check_kept(self, x), dout))
        return matmul(dout, self.weight.data.T)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"in_features={self.in_features}, out_features={self.out_features}{bias}"


class Embedding(Module):
    """y = W[ids], one row of the table for each id: ids (...) -> y (..., embedding_dim)

    Attributes
    ----------
    weight : Parameter (num_embeddings, embedding_dim), normal with standard deviation 1
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, dtype: Any = np.float32, rng: Rng = None
    ):
        check_sizes("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        shape = num_embeddings, embedding_dim
        self.weight = Parameter(make_rng(rng).standard_normal(shape, float_dtype(dtype)))

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Integer ids (...) -> y (..., embedding_dim). Raises ValueError for ids out of range."""
        ids = token_ids(ids, self.weight.shape[0])
        self._save(ids)
        return self.weight.data[ids]

    def backward(self, dout: np.ndarray) -> None:
        """dW[id] = sum of dout over the positions with that id. Ids have no gradient."""
        (ids,) = self._take()
        if self.weight.requires_grad:
            shape = (*ids.shape, self.weight.shape[1])
            dout = check_dout(self, dout, shape, self.weight.dtype)
            dweight = np.zeros_like(self.weight.data)
            np.add.at(dweight, ids.reshape(-1), rows(dout))  # adds once for each time an id occurs
            self.weight.accumulate(dweight)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class TiedHead(Module):
    """y = x Wᵀ with the W of an embedding: logits without a matrix of their own.

    Press & Wolf 2017, "Using the Output Embedding to Improve Language Models", section 3.

    Attributes
    ----------
    weight : the Parameter (num_embeddings, embedding_dim) of `owner.name`, whatever module is there
    """

    def __init__(self, owner: Module, name: str = "wte"):
        self._embedding = functools.partial(getattr, owner, name)  # looked up, since no child

    @property
    def weight(self) -> Parameter:
        return self._embedding().weight

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., embedding_dim) -> y (..., num_embeddings). Raises ValueError for other widths."""
        x = check_width(self, x, self.weight.shape[1], self.weight.dtype)
        y = matmul(x, self.weight.data.T)
        self._save(x if self.weight.requires_grad else None, y.shape)
        return y

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dW = doutᵀ x,  dx = dout W."""
        x, shape = self._take()
        dout = check_dout(self, dout, shape, self.weight.dtype)
        if self.weight.requires_grad:
            self.weight.accumulate(weight_grad(dout, check_kept(self, x)))
        return matmul(dout, self.weight.data)

    def extra_repr(self) -> str:
        return "{1}, {0}".format(*self.weight.shape)


class LayerNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the last axis: (..., width).

    Ba, Kiros & Hinton 2016, "Layer Normalization", equation 4.

    Attributes
    ----------
    weight : Parameter (width,), ones
    bias : Parameter (width,), zeros, or None
    """

    def __init__(self, width: int, bias: bool = True, eps: float = 1e-5, dtype: Any = np.float32):
        check_sizes("LayerNorm", width=width)
        self.weight = Parameter(np.ones(width, dtype=float_dtype(dtype)))
        self.bias = Parameter(np.zeros(width, dtype=float_dtype(dtype))) if bias else None
        self.eps = eps

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., width) -> y (..., width). Raises ValueError for other widths."""
        x = check_width(self, x, self.weight.size, self.weight.dtype)
        bias = None if self.bias is None else self.bias.data
        y, cache = layer_norm(x, self.weight.data, bias, self.eps)
        self._save(cache, y.shape)
        return y

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dweight = sum of dout * xhat,  dbias = sum of dout; dx: see `layer_norm_backward`."""
        cache, shape = self._take()
        dout = check_dout(self, dout, shape, self.weight.dtype)
        if self.bias is not None and self.bias.requires_grad:
            self.bias.accumulate(rows(dout).sum(axis=0))
        if self.weight.requires_grad:
            xhat, _ = cache
            self.weight.accumulate(rows(dout * xhat).sum(axis=0))
        return layer_norm_backward(dout, cache, self.weight.data)

    def extra_repr(self) -> str:
        return f"{self.weight.size}, eps={self.eps}"


class GELU(Module):
    """y = gelu(x) in its tanh form, elementwise; equation and source are in `functional.gelu`."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (...) -> y (...). Raises TypeError unless x is floating-point."""
        y, slope = gelu(check_float(self, x))
        self._save(slope)
        return y

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dx = dout * gelu'(x)."""
        (slope,) = self._take()
        return check_dout(self, dout, slope.shape, slope.dtype) * slope


class Dropout(Module):
    """y = x * mask / (1 - p) in training; else y = x. A number is kept with probability 1 - p.

    Srivastava et al. 2014, "Dropout", in the inverted form: evaluation needs no scaling.
    Raises ValueError unless 0 <= p < 1.
    """

    def __init__(self, p: float = 0.0, rng: Rng = None):
        check_dropout(p)
        self.p = float(p)
        self.rng = make_rng(rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (...) -> y (...). Raises TypeError unless x is floating-point."""
        if not self.training or self.p == 0.0:
            self._save(None)
            return x
        x = check_float(self, x)
        mask = (self.rng.random(x.shape, dtype=np.float32) >= self.p).astype(x.dtype)
        mask *= 1.0 / (1.0 - self.p)
        self._save(mask)
        return x * mask

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dx = dout * mask / (1 - p); the stored mask includes the division."""
        (mask,) = self._take()
        return dout if mask is None else check_dout(self, dout, mask.shape, mask.dtype) * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"
