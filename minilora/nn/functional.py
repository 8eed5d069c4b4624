"""The mathematics without parameters: pure functions, each with its gradient.

Letters used for shapes: B batch, T time (positions), C channels (features), H heads,
D = C / H head width, V vocabulary, N = all leading axes together, ``...`` any axes.

This is the form to read. Some functions have a faster twin of the same name in `fast`, which the
layers call; tests check that both agree. Every function keeps the dtype of its input. Constants
are therefore Python floats: in NumPy 2 an `np.float64` would turn float32 into float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora.nn.validate import token_ids

IGNORE_INDEX = -100  # a target that cross-entropy skips, as in PyTorch


# ---- Matrix products


def rows(x: np.ndarray) -> np.ndarray:
    """Flatten all axes but the last: (..., C) -> (N, C)."""
    return x.reshape(-1, x.shape[-1])


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply the last axis by a matrix: (..., n) @ (n, m) -> (..., m), in one product."""
    return (rows(x) @ weight).reshape(*x.shape[:-1], weight.shape[-1])


def weight_grad(x: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """Gradient of W in y = x W, summed over all rows: xᵀ dout, (..., n), (..., m) -> (n, m)."""
    return rows(x).T @ rows(dout)


# ---- GELU, tanh form. Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2.

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian error linear unit and its derivative: (...) -> two arrays (...).

    y = x/2 (1 + tanh u),    u = sqrt(2/pi) (x + 0.044715 x³)
    y' = (1 + tanh u)/2 + x/2 (1 - tanh² u) u'

    Forward already has tanh u, so it computes the derivative too; backward is dx = dout * y'.
    """
    square = np.clip(x, -30.0, 30.0) ** 2  # beyond, tanh u is 1 or -1 whatever the cubic term
    u = GELU_SCALE * x * (1.0 + GELU_CUBIC * square)
    du = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * square)
    t = np.tanh(u)
    return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du


# ---- Soft-max


def softmax(x: np.ndarray) -> np.ndarray:
    """Soft-max over the last axis, p = exp(x - max) / sum of exp(x - max): (..., C) -> (..., C)."""
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def softmax_backward(dout: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Gradient of `softmax` from its output p: dx = p * (dout - sum(dout * p))."""
    return p * (dout - (dout * p).sum(axis=-1, keepdims=True))


# ---- Layer normalisation. Ba, Kiros & Hinton 2016, "Layer Normalization", equation 4.


def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float = 1e-5
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Normalise the last axis: y = xhat * weight + bias, xhat = (x - mean) / sqrt(var + eps).

    x (..., C), weight (C,), bias (C,) -> y (..., C) and the cache (xhat (..., C), rstd (..., 1)).
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    var = (centred * centred).mean(axis=-1, keepdims=True)
    rstd = 1.0 / np.sqrt(var + eps)
    xhat = centred * rstd
    y = xhat * weight
    return y if bias is None else y + bias, (xhat, rstd)


def layer_norm_backward(
    dout: np.ndarray, cache: tuple[np.ndarray, np.ndarray], weight: np.ndarray
) -> np.ndarray:
    """Gradient of `layer_norm` with respect to x: dout (..., C) -> dx (..., C).

    With g = dout * weight:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    """
    xhat, rstd = cache
    g = dout * weight
    mean_g = g.mean(axis=-1, keepdims=True)
    mean_gx = (g * xhat).mean(axis=-1, keepdims=True)
    return rstd * (g - mean_g - xhat * mean_gx)


# ---- Causal attention. Vaswani et al. 2017, "Attention Is All You Need", equation 1.


def causal_mask(t: int, dtype: Any) -> np.ndarray:
    """Mask (T, T): 0 for a position itself and the past, -inf for the future."""
    return np.triu(np.full((t, t), -np.inf, dtype=dtype), k=1)


def attention_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """P = softmax(q kᵀ / sqrt(D) + mask): q, k (B, H, T, D) -> P (B, H, T, T)."""
    scores = q @ k.swapaxes(-1, -2) * (1.0 / math.sqrt(q.shape[-1]))
    return softmax(scores + causal_mask(q.shape[-2], q.dtype))


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, tuple]:
    """out = P v with P = softmax(q kᵀ / sqrt(D) + mask), all (B, H, T, D), and the cache."""
    p = attention_weights(q, k)
    return p @ v, (q, k, v, p)


def causal_attention_backward(
    dout: np.ndarray, cache: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients (dq, dk, dv) of `causal_attention`, all (B, H, T, D).

    dv = Pᵀ dout,  dP = dout vᵀ,  dS = softmax_backward(dP, P) / sqrt(D),  dq = dS k,
    dk = dSᵀ q. The mask needs no gradient: P is 0 wherever it is -inf.
    """
    q, k, v, p = cache
    dv = p.swapaxes(-1, -2) @ dout
    ds = softmax_backward(dout @ v.swapaxes(-1, -2), p) * (1.0 / math.sqrt(q.shape[-1]))
    return ds @ k, ds.swapaxes(-1, -2) @ q, dv


# ---- Cross-entropy


def cross_entropy(
    logits: np.ndarray, targets: np.ndarray, ignore_index: int = IGNORE_INDEX
) -> tuple[float, np.ndarray]:
    """Return (loss, dlogits): the mean negative log-likelihood in nats, and its gradient.

    loss = -(1/n) sum of log softmax(logits)[target]     over the n targets not ignored
    dlogits = (softmax(logits) - onehot(target)) / n     and 0 for ignored targets

    Parameters
    ----------
    logits : floats (..., V); dlogits has the same shape and dtype
    targets : integers (...) in 0..V-1, or `ignore_index`

    Raises
    ------
    ValueError : if the shapes do not fit, a target is out of range, or all are ignored
    TypeError : if logits are not floating-point or targets are not integers
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if logits.dtype.kind != "f":
        raise TypeError(f"logits must be floating-point numbers, got dtype {logits.dtype}")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits must have shape (..., V) with V at least 1, got {logits.shape}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must have shape {logits.shape[:-1]} to match logits "
                         f"{logits.shape}, got {targets.shape}")
    flat = token_ids(targets, logits.shape[-1], "target", ignore_index).reshape(-1)
    kept = np.flatnonzero(flat != ignore_index)
    if not len(kept):
        raise ValueError(f"cross_entropy needs a target that is not ignore_index ({ignore_index})")
    at_target = kept, flat[kept]
    z = rows(logits) - rows(logits).max(axis=-1, keepdims=True)
    z_target, p = z[at_target], np.exp(z, out=z)  # in place: with a large V, these are large
    sums = p.sum(axis=-1, keepdims=True)
    loss = float(np.mean(np.log(sums[kept, 0]) - z_target))  # not log p: p may be 0
    p /= sums
    p[at_target] -= 1.0
    p[flat == ignore_index] = 0.0
    p *= 1.0 / len(kept)
    return loss, p.reshape(logits.shape)
