"""The mathematics without parameters: pure functions, each beside its gradient.

Letters used for shapes: B batch, T time (positions), C channels (features), H heads,
D = C / H head width, V vocabulary, N = all leading axes together, ``...`` any axes.

Every function keeps the dtype of its input. Constants are Python floats for that reason:
in NumPy 2 a `np.float64` constant would turn a float32 array into float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

IGNORE_INDEX = -100  # a target that cross-entropy passes over, as in PyTorch
BLOCK = 32_768  # floats worked on at a time: 128 KiB, so that a chain of operations stays in cache

THIN = 32  # a matrix with a side of at most this is multiplied in pieces, see `_product`


def rows(x: np.ndarray) -> np.ndarray:
    """Flatten all axes but the last: (..., C) -> (N, C)."""
    return x.reshape(-1, x.shape[-1])


def row_blocks(x: np.ndarray) -> Iterator[slice]:
    """Yield slices of the rows of x (N, C) that hold about `BLOCK` numbers each.

    An element-wise chain on a whole activation reads and writes main memory once for every
    operation; block by block, only the first read and the last write leave the cache.
    """
    step = max(1, BLOCK // max(1, x.shape[-1]))
    for start in range(0, len(x), step):
        yield slice(start, start + step)


def matmul(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multiply the last axis by a matrix: (..., n) @ (n, m) -> (..., m)."""
    out = _product(rows(x), weight)
    return out.reshape(*x.shape[:-1], weight.shape[-1])


def weight_grad(x: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """Gradient of W in y = x W, summed over all rows: xᵀ dout, (..., n), (..., m) -> (n, m)."""
    return rows(x).T @ rows(dout)


def column_sums(x: np.ndarray) -> np.ndarray:
    """Sum over all rows, (..., C) -> (C,): by a product with ones, four times as fast as sum."""
    x = rows(x)
    return np.ones(len(x), dtype=x.dtype) @ x


def row_sums(x: np.ndarray) -> np.ndarray:
    """Sum of each row, (..., C) -> (..., 1), by a product with ones as well."""
    return x @ np.ones((x.shape[-1], 1), dtype=x.dtype)


def scatter_sum(ids: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Sum the rows of values (..., C) that have the same id (...): -> (n, C).

    What `np.add.at(zeros, ids, values)` does, by sorting, in a third to a seventh of its time.
    """
    ids, values = ids.ravel(), rows(values)
    out = np.zeros((n, values.shape[-1]), dtype=values.dtype)
    if ids.size:
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
        out[ids[starts]] = np.add.reduceat(values[order], starts, axis=0)
    return out


def _product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (N, n) @ weight (n, m), thin products in pieces of about a million multiply-adds.

    BLAS handles a product with a side of r = 8 about twice as fast in such pieces.
    """
    n_rows = len(x)
    pieces = 1
    if min(weight.shape) <= THIN:
        while n_rows * weight.size > 1_000_000 * pieces and n_rows % (2 * pieces) == 0:
            pieces *= 2
    if pieces == 1:
        return x @ weight
    return (x.reshape(pieces, -1, x.shape[-1]) @ weight).reshape(n_rows, -1)


# ---- GELU, the tanh form of GPT-2: y = x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3)
# Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2.

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def gelu(x: np.ndarray) -> np.ndarray:
    """Gaussian error linear unit, tanh form: (...) -> (...)."""
    return gelu_with_derivative(x)[0]


def gelu_backward(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Gradient of `gelu` at its input x: dx = dout * gelu'(x), (...) -> (...)."""
    return dout * gelu_with_derivative(x)[1]


def gelu_with_derivative(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return gelu(x) and gelu'(x), each of the shape of x.

    Since (1 + tanh u) / 2 is the logistic function of 2u, with s = 1 / (1 + exp(-2u)):

        y = x s,    y' = s + y (1 - s) 2u',    u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)

    The forward pass has s at hand, so it works out the derivative too, and backward is left
    with one product. Block by block; x*x because a float32 power costs 100 products.
    """
    if not x.size:
        return x.copy(), x.copy()
    x2d = rows(x) if x.ndim else x.reshape(1, 1)
    y, derivative = np.empty_like(x2d), np.empty_like(x2d)
    slope0, cubic = 2.0 * GELU_SCALE, 2.0 * GELU_SCALE * GELU_CUBIC  # 2u = slope0 v + cubic v³
    with np.errstate(over="ignore"):  # exp(-2u) = inf is right: s = 0
        for block in row_blocks(x2d):
            v, out, slope = x2d[block], y[block], derivative[block]
            square = v * v
            s = square * -cubic
            s -= slope0
            s *= v  # -2u
            np.exp(s, out=s)
            s += 1.0
            np.divide(1.0, s, out=s)  # the logistic function of 2u
            np.multiply(v, s, out=out)
            square *= 3.0 * cubic
            square += slope0  # 2u'
            square *= out
            np.subtract(1.0, s, out=slope)
            slope *= square
            slope += s
    return y.reshape(x.shape), derivative.reshape(x.shape)


# ---- Soft-max


def softmax(x: np.ndarray) -> np.ndarray:
    """Soft-max over the last axis, p = exp(x - max) / sum of exp(x - max): (..., C) -> (..., C)."""
    p = x - x.max(axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def softmax_backward(dout: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Gradient of `softmax` from its output p: dx = p * (dout - sum(dout * p))."""
    return p * (dout - (dout * p).sum(axis=-1, keepdims=True))


# ---- Layer normalisation. Ba, Kiros & Hinton 2016, "Layer Normalization", equation 4.


def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float = 1e-5
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Normalise the last axis: y = xhat * weight + bias, xhat = (x - mean) / sqrt(var + eps).

    x (..., C), weight (C,), bias (C,) -> y (..., C) and the cache (xhat (N, C), rstd (N, 1)).
    Below, `x @ mean_of` is the mean of each row and vecdot(x, x) / C that of its squares.
    """
    x2d = rows(x)
    n, c = x2d.shape
    mean_of = np.full((c, 1), 1.0 / c, dtype=x.dtype)
    y, xhat = np.empty_like(x2d), np.empty_like(x2d)
    rstd = np.empty((n, 1), dtype=x.dtype)
    for block in row_blocks(x2d):
        centred, r = xhat[block], rstd[block]
        np.subtract(x2d[block], x2d[block] @ mean_of, out=centred)
        var = np.vecdot(centred, centred)[:, None] * (1.0 / c)
        np.divide(1.0, np.sqrt(var + eps), out=r)
        centred *= r
        np.multiply(centred, weight, out=y[block])
        if bias is not None:
            y[block] += bias
    return y.reshape(x.shape), (xhat, rstd)


def layer_norm_backward(
    dout: np.ndarray, cache: tuple[np.ndarray, np.ndarray], weight: np.ndarray
) -> np.ndarray:
    """Gradient of `layer_norm` with respect to x, of the shape of dout (..., C).

    With g = dout * weight:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    """
    xhat, rstd = cache
    d2d = rows(dout)
    c = d2d.shape[-1]
    mean_of = np.full((c, 1), 1.0 / c, dtype=dout.dtype)
    dx = np.empty_like(d2d)
    for block in row_blocks(d2d):
        g = d2d[block] * weight
        np.multiply(xhat[block], (np.vecdot(g, xhat[block]) * (1.0 / c))[:, None], out=dx[block])
        dx[block] += g @ mean_of
        np.subtract(g, dx[block], out=dx[block])
        dx[block] *= rstd[block]
    return dx.reshape(dout.shape)


# ---- Cross-entropy


def cross_entropy(
    logits: np.ndarray, targets: np.ndarray, ignore_index: int = IGNORE_INDEX
) -> tuple[float, np.ndarray]:
    """Mean negative log-likelihood in nats, and its gradient.

    loss = -(1/n) sum log softmax(logits)[target]        over the n targets not ignored
    dlogits = (softmax(logits) - onehot(target)) / n     and 0 where the target is ignored

    logits (..., V) and int targets (...) -> loss (float), dlogits (..., V).
    Raises ValueError where shapes differ, a target is outside 0..V-1, or all are ignored, and
    TypeError for logits that are not floating-point or targets that are not integers.
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if logits.dtype.kind != "f":
        raise TypeError(f"logits must be floating-point numbers, got dtype {logits.dtype}")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits must have shape (..., V) with V at least 1, got {logits.shape}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have shape {logits.shape[:-1]} to match logits {logits.shape}, "
            f"got {targets.shape}"
        )
    flat = token_ids(targets, logits.shape[-1], "target", ignore_index).reshape(-1)
    kept = np.flatnonzero(flat != ignore_index)
    if not len(kept):
        raise ValueError(f"cross_entropy needs a target that is not ignore_index ({ignore_index})")
    index = kept, flat[kept]  # of the entry of the right token in each row
    z = rows(logits)
    p = z - z.max(axis=-1, keepdims=True)  # softmax, with log p kept apart: p may underflow to 0
    log_p = p[index]
    np.exp(p, out=p)
    sums = row_sums(p)
    log_p -= np.log(sums[kept, 0])
    p /= sums
    loss = -float(log_p.mean())
    p[index] -= 1.0
    if len(kept) < len(flat):
        p[flat == ignore_index] = 0.0
    p *= 1.0 / len(kept)
    return loss, p.reshape(logits.shape)


def token_ids(
    ids: np.ndarray, vocab_size: int, what: str = "id", ignore_index: int | None = None
) -> np.ndarray:
    """Return `ids` as an array once every one is known to be a whole number in 0..vocab_size-1.

    NumPy would take -1 for the last row without a word. `ignore_index` is let through.
    Raises TypeError for other dtypes and ValueError that names the first bad value.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what}s must be integers, got dtype {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = (ids < 0) | (ids >= vocab_size)
        if ignore_index is not None:
            bad &= ids != ignore_index
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"{what} {ids[where]} at {where} is not in 0..{vocab_size - 1}")
    return ids


# ---- Causal attention. Vaswani et al. 2017, "Attention Is All You Need", equation 1.


def causal_mask(t: int, dtype: np.dtype) -> np.ndarray:
    """(T, T): 0 where a position may look (itself and the past), -inf where it may not."""
    return np.triu(np.full((t, t), -np.inf, dtype=dtype), k=1)


def attention_weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """P = softmax(q kᵀ / sqrt(D) + mask), the textbook form: (B, H, T, D) twice -> (B, H, T, T)."""
    scores = q @ k.swapaxes(-1, -2) * (1.0 / math.sqrt(q.shape[-1]))
    return softmax(scores + causal_mask(q.shape[-2], q.dtype))


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, tuple]:
    """out = softmax(q kᵀ / sqrt(D) + mask) v, all (B, H, T, D), and the cache for backward.

    Equal to ``attention_weights(q, k) @ v``, with one saving: the soft-max is left as
    E = exp(scores - max), and the division by its row sums s is done on the (T, D) output
    instead of on the (T, T) weights.
    """
    scale = 1.0 / math.sqrt(q.shape[-1])
    k_t = np.ascontiguousarray(k.swapaxes(-1, -2))
    v = np.ascontiguousarray(v)
    e = (q * scale) @ k_t
    e += causal_mask(q.shape[-2], q.dtype)
    e -= e.max(axis=-1, keepdims=True)
    np.exp(e, out=e)
    s = row_sums(e)
    out = e @ v
    out /= s
    return out, (q, k, v, e, s, out)


def causal_attention_backward(
    dout: np.ndarray, cache: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients (dq, dk, dv) of `causal_attention`, all (B, H, T, D).

    With P = E / s:  dV = Pᵀ dout,  dP = dout vᵀ,  dS = P * (dP - sum(dP * P)),
    dq = dS k / sqrt(D),  dk = dSᵀ q / sqrt(D).

    sum(dP * P) over the T keys equals sum(dout * out) over the D channels, and 1/s is
    multiplied into dout (T, D), so that no (T, T) array is normalised here either.
    """
    q, k, v, e, s, out = cache
    scale = 1.0 / math.sqrt(q.shape[-1])
    g = dout / s
    dv = e.swapaxes(-1, -2) @ g
    ds = g @ v.swapaxes(-1, -2)
    ds -= np.vecdot(g, out)[..., None]
    ds *= e
    ds *= scale
    return ds @ k, ds.swapaxes(-1, -2) @ q, dv
