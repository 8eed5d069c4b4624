"""The exercises whose answer is a function of arrays: references, inputs, and known mistakes.

Exercises 1, 2, 4, 6, 7 and 8. Each `Mistake` makes an error that learners make, on purpose; see
`engine`. `read` names the lines of the derivation in the exercise that are worth reading again.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np

from minilora.exercises.engine import Case, Mistake, Task, failed, run

Array = np.ndarray


def _normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# ---- 1. Linear

SHAPES = [(2, 3, 2), (3, 3, 3), (1, 2, 4), (4, 1, 3), (5, 4, 1), (1, 1, 1), (6, 5, 7)]  # N, n, m


def _linear_case(n_rows: int, n: int, m: int) -> Case:
    return {"x": _normal(n_rows, n), "W": _normal(n, m, seed=1), "b": _normal(m, seed=2)}


def _linear_backward_case(n_rows: int, n: int, m: int) -> Case:
    return {"dout": _normal(n_rows, m, seed=3), "x": _normal(n_rows, n), "W": _normal(n, m, seed=1)}


LINEAR_FORWARD = Task(
    name="linear_forward",
    outputs=("y",),
    reference=lambda x, W, b: x @ W + b,
    cases=[_linear_case(*shape) for shape in SHAPES],
    mistakes={"y": [
        Mistake("the bias is missing.", lambda x, W, b: x @ W),
        Mistake("the bias is added twice.", lambda x, W, b: x @ W + 2 * b),
        Mistake("the bias is subtracted.", lambda x, W, b: x @ W - b),
        Mistake("only the sum of the bias is added.", lambda x, W, b: x @ W + b.sum()),
        Mistake("W is transposed: it is (n, m) here, so y = x W.", lambda x, W, b: x @ W.T + b),
        Mistake("the weight is used entry by entry (*) instead of as a product of matrices (@).",
                lambda x, W, b: x * W + b),
    ]},
    read={"y": "y = x W + b, with x (N, n), W (n, m), b (m,)."},
)

LINEAR_BACKWARD = Task(
    name="linear_backward",
    outputs=("dx", "dW", "db"),
    reference=lambda dout, x, W: (dout @ W.T, x.T @ dout, dout.sum(axis=0)),
    cases=[_linear_backward_case(*shape) for shape in SHAPES],
    mistakes={
        "dx": [
            Mistake("W is not transposed: dx = dout Wᵀ.", lambda dout, x, W: dout @ W),
            Mistake("it is dout alone; the chain rule multiplies by Wᵀ.", lambda dout, x, W: dout),
            Mistake("it is transposed: dx = dout Wᵀ has the shape of x, (N, n).",
                    lambda dout, x, W: W @ dout.T),
            Mistake("it is x Wᵀ: it is dout that comes back, not x.", lambda dout, x, W: x @ W.T),
        ],
        "dW": [
            Mistake("it is transposed: dW = xᵀ dout has the shape of W, (n, m).",
                    lambda dout, x, W: dout.T @ x),
            Mistake("this is the gradient of the mean over the rows, not of the sum: no division "
                    "by N.", lambda dout, x, W: x.T @ dout / len(x)),
            Mistake("x is not transposed: dW = xᵀ dout.", lambda dout, x, W: x @ dout),
            Mistake("only the first row of the batch is in it.",
                    lambda dout, x, W: np.outer(x[0], dout[0])),
            Mistake("only the last row of the batch is in it; the rows are to be added up.",
                    lambda dout, x, W: np.outer(x[-1], dout[-1])),
            Mistake("sums of x and of dout are multiplied; it is the sum of their products.",
                    lambda dout, x, W: np.outer(x.sum(0), dout.sum(0))),
        ],
        "db": [
            Mistake("this is the mean over the rows, not the sum.",
                    lambda dout, x, W: dout.mean(axis=0)),
            Mistake("it is summed over the wrong axis: b is added to every row, so sum over the "
                    "rows, axis=0.", lambda dout, x, W: dout.sum(axis=1)),
            Mistake("it is summed over both axes; b has one entry for each column.",
                    lambda dout, x, W: dout.sum()),
            Mistake("the sum over the rows is missing.", lambda dout, x, W: dout),
            Mistake("it has shape (1, m); b has shape (m,). Leave keepdims out.",
                    lambda dout, x, W: dout.sum(axis=0, keepdims=True)),
            Mistake("only the first row is in it.", lambda dout, x, W: dout[0]),
            Mistake("it is all ones: that would be the gradient if dout were.",
                    lambda dout, x, W: np.full(dout.shape[1], float(len(dout)))),
        ],
    },
    read={"dx": "every x_i reaches y_j through W_ij, so dx_i = sum over j of dout_j W_ij.",
          "dW": "W_ij is used once for each row: dW_ij = sum over rows of x_i dout_j.",
          "db": "b_j is added in every row: db_j = sum over rows of dout_j."},
    factors=lambda dout, x, W: {"N (the number of rows)": len(x)},
    forward=lambda x, W: x @ W,
)


# ---- 2. Soft-max cross-entropy


def _softmax(z: Array, axis: int = -1) -> Array:
    p = np.exp(z - z.max(axis=axis, keepdims=True))
    return p / p.sum(axis=axis, keepdims=True)


def _one_hot(targets: Array, width: int, shift: int = 0) -> Array:
    return np.eye(width, dtype=np.float32)[(targets + shift) % width]


def _entropy(logits: Array, targets: Array, axis: int = -1) -> Array:
    z = logits - logits.max(axis=axis, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=axis, keepdims=True))
    return -log_p[np.arange(len(targets)), targets]


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """The reference of exercise 2."""
    p = _softmax(logits)
    return _entropy(logits, targets).mean(), (p - _one_hot(targets, p.shape[1])) / len(targets)


def _entropy_case(n: int, v: int, scale: float = 1.0, shift: float = 0.0) -> Case:
    targets = np.random.default_rng([n, v]).integers(0, v, n)
    logits = scale * _normal(n, v) + shift
    if n > 1:  # rows that are far apart, of which the first is not predicted well
        targets[0] = logits[0].argmin()
        logits[-1] -= 3.0
    return {"logits": logits, "targets": targets}


def _naive(logits: Array, targets: Array) -> Array:
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return -np.log(p[np.arange(len(targets)), targets])


def _sums(logits: Array) -> Array:
    return np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)


def _shifted(logits: Array, targets: Array, shift: Any) -> tuple[Array, Array]:
    """Loss and gradient with another number than each row's maximum subtracted."""
    z = logits - shift
    e = np.exp(z)
    log_p = z - np.log(e.sum(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    rows = np.arange(len(targets))
    return -log_p[rows, targets].mean(), (p - _one_hot(targets, p.shape[1])) / len(targets)


OVERFLOW = ("exp overflows where logits are large. Subtract the row's maximum first: it changes "
            "nothing, since numerator and denominator get the same factor.")


CROSS_ENTROPY = Task(
    name="cross_entropy",
    outputs=("loss", "dlogits"),
    reference=cross_entropy,
    cases=[_entropy_case(2, 3), _entropy_case(3, 3), _entropy_case(1, 4), _entropy_case(5, 2),
           _entropy_case(4, 7, 3.0), _entropy_case(3, 5, 1.0, 1000.0), _entropy_case(3, 4, 400.0),
           {"logits": np.array([[0.0, 0.0, 0.0, 750.0], [0.0, 1.0, 2.0, 0.0]]),
            "targets": np.array([0, 2])},
           _entropy_case(3, 4, 1.0, -1000.0), _entropy_case(3, 3, 600.0), _entropy_case(2, 1)],
    mistakes={
        "loss": [
            Mistake("this is the sum over the rows, not the mean.",
                    lambda logits, targets: _entropy(logits, targets).sum()),
            Mistake("the minus sign is missing: the loss is -log p, which is positive.",
                    lambda logits, targets: -_entropy(logits, targets).mean()),
            Mistake("the logarithm is to base 2 (or 10); nats need the natural one, np.log.",
                    lambda logits, targets: _entropy(logits, targets).mean() / np.log(2.0)),
            Mistake("this is one loss for each row; return their mean.", _entropy),
            Mistake("the soft-max is over the wrong axis: each row is one distribution.",
                    lambda logits, targets: _entropy(logits, targets, axis=0).mean()),
            Mistake(OVERFLOW, lambda logits, targets: _naive(logits, targets).mean()),
            Mistake("the maximum must be each row's own: max(axis=-1, keepdims=True). One for all "
                    "rows makes rows with small logits underflow.",
                    lambda logits, targets: _shifted(logits, targets, logits.max())[0]),
            Mistake("the mean was subtracted; it is the maximum that keeps exp from overflowing.",
                    lambda logits, targets: _shifted(
                        logits, targets, logits.mean(axis=-1, keepdims=True))[0]),
            Mistake("the maximum was taken over the wrong axis: max(axis=-1, keepdims=True).",
                    lambda logits, targets: _shifted(logits, targets, logits.max(axis=0))[0]),
            Mistake("the maximum is missing, and exp of very small logits underflows to 0 (or "
                    "overflows).",
                    lambda logits, targets: _shifted(logits, targets, 0.0)[0]),
            Mistake("adding a small number inside the logarithm (or clipping) hides the problem "
                    "and gives wrong losses. Take z - max - log(sum(exp(z - max))).",
                    lambda logits, targets: -np.log(
                        _softmax(logits)[np.arange(len(targets)), targets] + 1e-12).mean()),
            Mistake("clipping probabilities hides the problem and gives wrong losses. Take z - max "
                    "- log(sum(exp(z - max))).",
                    lambda logits, targets: -np.log(np.maximum(
                        _softmax(logits)[np.arange(len(targets)), targets], 1e-12)).mean()),
            Mistake("the sum of the exponentials is missing (the denominator).",
                    lambda logits, targets: -(logits - logits.max(-1, keepdims=True))[
                        np.arange(len(targets)), targets].mean()),
            Mistake("the maximum was subtracted in the exponentials, and not from the logit.",
                    lambda logits, targets: (_entropy(logits, targets)
                                             - logits.max(axis=-1)).mean()),
            Mistake("the logarithm is missing.", lambda logits, targets: -_softmax(logits)[
                np.arange(len(targets)), targets].mean()),
            Mistake("the exponentials are summed over the whole batch: "
                    "sum(axis=-1, keepdims=True).",
                    lambda logits, targets: (_entropy(logits, targets) + np.log(_sums(logits).sum())
                                             - np.log(_sums(logits)[:, 0])).mean()),
            Mistake("log of a probability that has underflowed to 0 is -inf. Take z - max - "
                    "log(sum(exp(z - max))) instead of log(p).",
                    lambda logits, targets: -np.log(
                        _softmax(logits)[np.arange(len(targets)), targets]).mean()),
            Mistake("the mean is over all N V entries; divide by N, one target for each row.",
                    lambda logits, targets: _entropy(logits, targets).sum() / logits.size),
            Mistake("this is the mean of p, without a logarithm.",
                    lambda logits, targets: _softmax(logits)[
                        np.arange(len(targets)), targets].mean()),
            Mistake("the targets are off by one.",
                    lambda logits, targets: _entropy(
                        logits, (targets + 1) % logits.shape[1]).mean()),
            Mistake("the targets are off by one.",
                    lambda logits, targets: _entropy(
                        logits, (targets - 1) % logits.shape[1]).mean()),
        ],
        "dlogits": [
            Mistake("it is the gradient of the sum, not of the mean: divide by N.",
                    lambda logits, targets: _softmax(logits) - _one_hot(targets, logits.shape[1])),
            Mistake("the sign is wrong: it is p - onehot, so that a step against it raises the "
                    "logit of the target.", lambda logits, targets: (
                        _one_hot(targets, logits.shape[1]) - _softmax(logits)) / len(targets)),
            Mistake("the 1 is not subtracted at the targets.",
                    lambda logits, targets: _softmax(logits) / len(targets)),
            Mistake("the 1 is not subtracted at the targets, and it is not divided by N.",
                    lambda logits, targets: _softmax(logits)),
            Mistake("it is divided by V or by N V; the mean is over the N rows.",
                    lambda logits, targets: (_softmax(logits) - _one_hot(
                        targets, logits.shape[1])) / logits.size),
            Mistake("it is divided by V; the mean is over the N rows.",
                    lambda logits, targets: (_softmax(logits) - _one_hot(
                        targets, logits.shape[1])) / logits.shape[1]),
            Mistake("the targets are off by one.", lambda logits, targets: (_softmax(
                logits) - _one_hot(targets, logits.shape[1], 1)) / len(targets)),
            Mistake("the targets are off by one.", lambda logits, targets: (_softmax(
                logits) - _one_hot(targets, logits.shape[1], -1)) / len(targets)),
            Mistake("the soft-max is over the wrong axis: each row is one distribution.",
                    lambda logits, targets: (_softmax(logits, 0) - _one_hot(
                        targets, logits.shape[1])) / len(targets)),
            Mistake(OVERFLOW, lambda logits, targets: (
                np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
                - _one_hot(targets, logits.shape[1])) / len(targets)),
            Mistake("the maximum must be each row's own: max(axis=-1, keepdims=True).",
                    lambda logits, targets: _shifted(logits, targets, logits.max())[1]),
            Mistake("the 1 is subtracted after dividing by N; divide p - onehot as a whole.",
                    lambda logits, targets: _softmax(logits) / len(targets) - _one_hot(
                        targets, logits.shape[1])),
            Mistake("1 is subtracted in whole columns: p[:, targets] takes every row. Index with "
                    "both, p[np.arange(N), targets].", lambda logits, targets: (_softmax(
                        logits) - _one_hot(targets, logits.shape[1]).max(axis=0)) / len(targets)),
            Mistake("1 is subtracted in the whole row or column instead of at one place: index "
                    "with both p[np.arange(N), targets].", lambda logits, targets: (
                        _softmax(logits) - 1) / len(targets)),
        ],
    },
    read={"loss": "loss = -(1/N) sum of log p[target], log p = z - max - log sum exp(z - max).",
          "dlogits": "d(-log p_t)/dz_j = p_j - (1 if j is the target, else 0); 1/N of the mean."},
    factors=lambda logits, targets: {"N (the number of rows)": len(targets)},
)


# ---- 4. LoRA backward


def _thin(function: Any) -> None:
    """See that no array as large as W is made: peak memory, for W large and all else thin."""
    n = 800
    case = _lora_case(2, n, n, 1, 2.0)
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        run("lora_backward", lambda: function(*case.values()))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()
    if peak > 0.5 * 8 * n * n:
        raise failed("lora_backward", "The values are right, but an array as large as W is formed "
                     "on the way. Set the brackets so that one side is always thin: "
                     "x.T @ (dout @ B.T), (x @ A).T @ dout, (dout @ B.T) @ A.T.",
                     "the last paragraph of the mathematics.")


def _lora_case(n_rows: int, n: int, m: int, r: int, scale: float) -> Case:
    return {"dout": _normal(n_rows, m, seed=3), "x": _normal(n_rows, n), "A": _normal(n, r, seed=4),
            "B": _normal(r, m, seed=5), "scale": scale}


LORA_BACKWARD = Task(
    name="lora_backward",
    outputs=("dx", "dA", "dB"),
    reference=lambda dout, x, A, B, scale: (
        scale * dout @ B.T @ A.T, scale * x.T @ (dout @ B.T), scale * (x @ A).T @ dout),
    cases=[_lora_case(*c) for c in [
        (2, 3, 2, 1, 2.0), (3, 3, 3, 3, 0.5), (1, 4, 2, 2, 4.0), (5, 1, 3, 1, 0.25),
        (6, 5, 1, 2, 2.0), (4, 6, 7, 3, 1.5), (1, 1, 1, 1, 3.0)]],
    mistakes={
        "dx": [
            Mistake("this is the gradient of the base's branch or lacks the scale and A.",
                    lambda dout, x, A, B, scale: dout @ B.T),
            Mistake("A and B are the wrong way round: dx = scale * dout Bᵀ Aᵀ.",
                    lambda dout, x, A, B, scale: scale * dout @ A @ B),
            Mistake("it is the forward pass of dout: take the transposes, in reverse order.",
                    lambda dout, x, A, B, scale: scale * dout @ A.T @ B.T),
        ],
        "dA": [
            Mistake("it is transposed: A is (n, r), so dA = scale * xᵀ (dout Bᵀ).",
                    lambda dout, x, A, B, scale: (scale * x.T @ (dout @ B.T)).T),
            Mistake("B is not transposed.", lambda dout, x, A, B, scale: scale * x.T @ (dout @ B)),
            Mistake("A stands where B should: dA holds B, and dB holds A.",
                    lambda dout, x, A, B, scale: scale * x.T @ dout @ A),
            Mistake("B is left out: this is the gradient of W.",
                    lambda dout, x, A, B, scale: scale * x.T @ dout),
            Mistake("this is the gradient of the mean over the rows, not of the sum.",
                    lambda dout, x, A, B, scale: scale * x.T @ (dout @ B.T) / len(x)),
        ],
        "dB": [
            Mistake("it is transposed: B is (r, m), so dB = scale * (x A)ᵀ dout.",
                    lambda dout, x, A, B, scale: (scale * (x @ A).T @ dout).T),
            Mistake("A is left out: this is the gradient of W.",
                    lambda dout, x, A, B, scale: scale * x.T @ dout),
            Mistake("this is the gradient of the mean over the rows, not of the sum.",
                    lambda dout, x, A, B, scale: scale * (x @ A).T @ dout / len(x)),
            Mistake("B stands where A should.",
                    lambda dout, x, A, B, scale: scale * (x @ B).T @ dout),
        ],
    },
    read={"dx": "x goes through A, then B, then the scale; back: scale, then Bᵀ, then Aᵀ.",
          "dA": "dA = scale * xᵀ (dout Bᵀ): from dW = xᵀ dout by the chain rule, scale * dW Bᵀ.",
          "dB": "dB = scale * (x A)ᵀ dout: from dW by the chain rule, dB = scale * Aᵀ dW."},
    factors=lambda dout, x, A, B, scale: {"scale = alpha / r": scale, "N": len(x)},
    forward=lambda x, A, B, scale: scale * x @ A @ B,
    more=_thin,
)


# ---- 6. AdamW


def adamw_step(
    p: Array, g: Array, m: Array, v: Array, t: int, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float,
) -> tuple[Array, Array, Array]:
    """The reference of exercise 6. Loshchilov & Hutter 2019, algorithm 2, with Adam's section 2."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p), m, v


def _adamw_case(shape: tuple[int, ...], t: int, decay: float = 0.1, eps: float = 0.01) -> Case:
    return {"p": _normal(*shape), "g": _normal(*shape, seed=1), "m": 0.3 * _normal(*shape, seed=2),
            "v": _normal(*shape, seed=3) ** 2, "t": t, "lr": 0.1, "beta1": 0.9, "beta2": 0.99,
            "eps": eps, "weight_decay": decay}


def _adamw(**changes: Any) -> Any:
    """Make a version of AdamW's new p with something wrong in it."""

    def wrong(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
        if changes.get("coupled"):
            g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        if changes.get("no_v"):
            v = np.ones_like(v) * (1 - beta2**t)
        t = t + changes.get("t", 0)
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        m_hat = m if changes.get("no_c1") else m / c1
        v_hat = v if changes.get("no_c2") else v / c2
        if changes.get("product"):
            m_hat, v_hat = m * c1, v * c2
        if changes.get("linear"):
            m_hat, v_hat = m / (1 - beta1 * t), v / (1 - beta2 * t)
        root = np.sqrt(v_hat + eps) if changes.get("inside") else np.sqrt(v_hat) + eps
        if changes.get("no_root"):
            root = v_hat + eps
        if changes.get("no_power"):
            m_hat, v_hat = m / (1 - beta1), v / (1 - beta2)
            root = np.sqrt(v_hat) + eps
        if changes.get("power_outside"):
            m_hat, v_hat = m / (1 - beta1) ** t, v / (1 - beta2) ** t
            root = np.sqrt(v_hat) + eps
        if changes.get("one_beta"):
            root = np.sqrt(v / c1) + eps
        if changes.get("eps_late"):
            return p - lr * (m_hat / np.sqrt(v_hat) + eps + weight_decay * p)
        if changes.get("decay_inside"):
            return p - lr * (m_hat + weight_decay * p) / root
        if changes.get("decay_plus"):
            return p - lr * m_hat / root + weight_decay * p
        if changes.get("no_eps"):
            root = np.sqrt(v_hat)
        step = m_hat / root
        if changes.get("no_m"):
            step = g / root
        decay = 0.0 if changes.get("coupled") or changes.get("no_decay") else weight_decay * p
        if changes.get("after"):
            new = p - lr * step
            return new - lr * weight_decay * new
        if changes.get("decay_no_lr"):
            return p - lr * step - decay
        if changes.get("up"):
            return p + lr * (step + decay)
        if changes.get("decay_up"):
            return p - lr * (step - decay)
        if changes.get("no_lr"):
            return p - (step + decay)
        return p - lr * (step + decay)

    return wrong


ADAMW = Task(
    name="adamw_step",
    outputs=("p", "m", "v"),
    order=("m", "v", "p"),
    reference=adamw_step,
    cases=[_adamw_case((3,), 1), _adamw_case((2, 3), 2), _adamw_case((4, 1), 7),
           _adamw_case((2, 2), 100), _adamw_case((3, 2), 3, 0.0), _adamw_case((1,), 5, 0.5, 1e-8)],
    mistakes={
        "p": [
            Mistake("the bias correction is missing: m / (1 - beta1^t), v / (1 - beta2^t).",
                    _adamw(no_c1=True, no_c2=True)),
            Mistake("the bias correction of m is missing.", _adamw(no_c1=True)),
            Mistake("the bias correction of v is missing.", _adamw(no_c2=True)),
            Mistake("the bias correction multiplies instead of dividing.", _adamw(product=True)),
            Mistake("the bias correction has beta * t; it is beta to the power of t.",
                    _adamw(linear=True)),
            Mistake("t is off by one in the bias correction; it counts from 1.", _adamw(t=1)),
            Mistake("t is off by one in the bias correction; it counts from 1, and the caller has "
                    "done so.", _adamw(t=-1)),
            Mistake("epsilon is inside the root; it is added to the root: sqrt(v) + eps.",
                    _adamw(inside=True)),
            Mistake("epsilon is not there, is not the one that is given, or is not added.",
                    _adamw(no_eps=True)),
            Mistake("epsilon is added to the fraction; it belongs to the root, in brackets.",
                    _adamw(eps_late=True)),
            Mistake("the power of t is missing in the bias correction: 1 - beta**t.",
                    _adamw(no_power=True)),
            Mistake("the power is outside: it is 1 - beta**t, not (1 - beta)**t.",
                    _adamw(power_outside=True)),
            Mistake("beta1 is in both bias corrections.", _adamw(one_beta=True)),
            Mistake("the decay is divided by the root as well; it stands outside the fraction.",
                    _adamw(decay_inside=True)),
            Mistake("the decay is added and lacks the factor lr.", _adamw(decay_plus=True)),
            Mistake("the decay is coupled to the gradient (g + decay * p), as in plain Adam with "
                    "L2. AdamW takes it off the weights directly.", _adamw(coupled=True)),
            Mistake("the weight decay is missing.", _adamw(no_decay=True)),
            Mistake("the weight decay lacks the factor lr.", _adamw(decay_no_lr=True)),
            Mistake("the weight decay is taken of the weights after the step, not before.",
                    _adamw(after=True)),
            Mistake("the weight decay has the wrong sign: it makes weights grow.",
                    _adamw(decay_up=True)),
            Mistake("it goes up the gradient; the step is subtracted.", _adamw(up=True)),
            Mistake("the learning rate is missing.", _adamw(no_lr=True)),
            Mistake("the root over v is missing.", _adamw(no_root=True)),
            Mistake("it uses g instead of the mean m.", _adamw(no_m=True)),
            Mistake("it does not divide by the root of v.", _adamw(no_v=True)),
            Mistake("nothing has changed.", lambda p, **_: p),
        ],
        "m": [
            Mistake("the factors beta1 and 1 - beta1 are swapped.",
                    lambda g, m, beta1, **_: (1 - beta1) * m + beta1 * g),
            Mistake("the bias correction was stored in m. Keep m as it is; correct a copy.",
                    lambda g, m, beta1, t, **_: (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)),
            Mistake("g has no factor 1 - beta1.", lambda g, m, beta1, **_: beta1 * m + g),
            Mistake("it uses beta2.", lambda g, m, beta2, **_: beta2 * m + (1 - beta2) * g),
            Mistake("the decay was added to the gradient.",
                    lambda p, g, m, beta1, weight_decay, **_:
                    beta1 * m + (1 - beta1) * (g + weight_decay * p)),
            Mistake("g is squared in m; that is for v.",
                    lambda g, m, beta1, **_: beta1 * m + (1 - beta1) * g * g),
            Mistake("it is not updated.", lambda m, **_: m),
        ],
        "v": [
            Mistake("g is not squared.", lambda g, v, beta2, **_: beta2 * v + (1 - beta2) * g),
            Mistake("it uses beta1.", lambda g, v, beta1, **_: beta1 * v + (1 - beta1) * g * g),
            Mistake("the factors beta2 and 1 - beta2 are swapped.",
                    lambda g, v, beta2, **_: (1 - beta2) * v + beta2 * g * g),
            Mistake("the bias correction was stored in v. Keep v as it is; correct a copy.",
                    lambda g, v, beta2, t, **_: (beta2 * v + (1 - beta2) * g * g) / (1 - beta2**t)),
            Mistake("g² has no factor 1 - beta2.", lambda g, v, beta2, **_: beta2 * v + g * g),
            Mistake("the first factor is beta1.", lambda g, v, beta1, beta2, **_:
                    beta1 * v + (1 - beta2) * g * g),
            Mistake("the factor 1 - beta2 is squared along with g.",
                    lambda g, v, beta2, **_: beta2 * v + ((1 - beta2) * g) ** 2),
            Mistake("it averages the square of m instead of that of g.",
                    lambda g, m, v, beta1, beta2, **_:
                    beta2 * v + (1 - beta2) * (beta1 * m + (1 - beta1) * g) ** 2),
            Mistake("it is not updated.", lambda v, **_: v),
        ],
    },
    read={"p": "p - lr * (m_hat / (sqrt(v_hat) + eps) + decay * p), m_hat = m / (1 - beta1^t).",
          "m": "m = beta1 m + (1 - beta1) g.", "v": "v = beta2 v + (1 - beta2) g²."},
)


# ---- 7. LayerNorm backward


def _norm(x: Array, eps: float, ddof: int = 0) -> tuple[Array, Array]:
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(x.var(axis=-1, keepdims=True, ddof=ddof) + eps)
    return centred * rstd, rstd


def _mean(x: Array) -> Array:
    return x.mean(axis=-1, keepdims=True)


def layer_norm_backward(
    dout: Array, x: Array, weight: Array, bias: Array, eps: float
) -> tuple[Array, Array, Array]:
    """The reference of exercise 7."""
    xhat, rstd = _norm(x, eps)
    g = dout * weight
    dx = rstd * (g - _mean(g) - xhat * _mean(g * xhat))
    return dx, (dout * xhat).sum(axis=0), dout.sum(axis=0)


def _norm_forward(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    return _norm(x, eps)[0] * weight + bias


def _norm_case(n: int, c: int, eps: float = 0.01) -> Case:
    return {"dout": _normal(n, c, seed=3), "x": 2 * _normal(n, c) + 1, "weight": _normal(c, seed=4),
            "bias": _normal(c, seed=5), "eps": eps}


def _dx(change: str) -> Any:
    """Make a version of LayerNorm's dx with something wrong in it."""

    def wrong(dout, x, weight, bias, eps):
        xhat, rstd = _norm(x, eps, ddof=1 if change == "ddof" else 0)
        g, c = dout if change == "no weight" else dout * weight, x.shape[1]
        if change in ("no eps", "hard eps"):
            xhat, rstd = _norm(x, 0.0 if change == "no eps" else 1e-5)
        if change == "no root":
            rstd = 1 / (x.var(axis=-1, keepdims=True) + eps)
            xhat = (x - _mean(x)) * rstd
        if change == "everything":
            xhat = (x - x.mean()) / np.sqrt(x.var() + eps)
            return (g - g.mean() - xhat * (g * xhat).mean()) / np.sqrt(x.var() + eps)
        if change == "eps outside":
            std = x.std(axis=-1, keepdims=True) + eps
            xhat, rstd = (x - _mean(x)) / std, 1 / std
        return {
            "only rstd": rstd * g,
            "no mean": rstd * (g - xhat * _mean(g * xhat)),
            "no projection": rstd * (g - _mean(g)),
            "no rstd": g - _mean(g) - xhat * _mean(g * xhat),
            "sums": rstd * (g - c * _mean(g) - c * xhat * _mean(g * xhat)),
            "no xhat": rstd * (g - _mean(g) - _mean(g * xhat)),
            "x": rstd * (g - _mean(g) - x * _mean(g * x)),
            "axis": rstd * (g - g.mean(axis=0) - xhat * (g * xhat).mean(axis=0)),
            "plus": rstd * (g - _mean(g) + xhat * _mean(g * xhat)),
            "weight late": weight * rstd * (dout - _mean(dout) - xhat * _mean(dout * xhat)),
        }.get(change, rstd * (g - _mean(g) - xhat * _mean(g * xhat)))

    return wrong


LAYER_NORM_BACKWARD = Task(
    name="layer_norm_backward",
    outputs=("dx", "dweight", "dbias"),
    reference=layer_norm_backward,
    cases=[_norm_case(*c) for c in [(2, 3), (4, 4), (1, 5), (3, 2), (6, 8, 1e-5), (5, 7, 1.0)]],
    mistakes={
        "dx": [
            Mistake("mean and variance were taken for constants: they depend on x, too.",
                    _dx("only rstd")),
            Mistake("the term mean(g) is missing: the mean of x depends on every x.",
                    _dx("no mean")),
            Mistake("the term xhat * mean(g * xhat) is missing: the variance depends on every x.",
                    _dx("no projection")),
            Mistake("the factor 1 / sqrt(var + eps) is missing.", _dx("no rstd")),
            Mistake("there are sums where means should be: divide by C.", _dx("sums")),
            Mistake("the weight is missing: g = dout * weight.", _dx("no weight")),
            Mistake("mean(g * xhat) is to be multiplied by xhat.", _dx("no xhat")),
            Mistake("it has x where the normalised xhat should be.", _dx("x")),
            Mistake("the means are over the wrong axis: every row is normalised by itself.",
                    _dx("axis")),
            Mistake("one sign is wrong: both means are subtracted.", _dx("plus")),
            Mistake("the weight comes in at the end; it belongs inside: g = dout * weight first.",
                    _dx("weight late")),
            Mistake("the variance divides by C - 1; LayerNorm's divides by C.", _dx("ddof")),
            Mistake("eps is added outside the root: it is sqrt(var + eps).", _dx("eps outside")),
            Mistake("eps is missing.", _dx("no eps")),
            Mistake("eps is 1e-5 whatever is given.", _dx("hard eps")),
            Mistake("the root is missing: it is 1 / sqrt(var + eps).", _dx("no root")),
            Mistake("mean and variance are of all numbers; every row has its own (axis=-1).",
                    _dx("everything")),
        ],
        "dweight": [
            Mistake("it has x where the normalised xhat should be.",
                    lambda dout, x, **_: (dout * x).sum(axis=0)),
            Mistake("it is the mean over the rows, not the sum.",
                    lambda dout, x, eps, **_: (dout * _norm(x, eps)[0]).mean(axis=0)),
            Mistake("it is the sum over the wrong axis: weight has one entry for each column.",
                    lambda dout, x, eps, **_: (dout * _norm(x, eps)[0]).sum(axis=1)),
            Mistake("the sum over the rows is missing.",
                    lambda dout, x, eps, **_: dout * _norm(x, eps)[0]),
            Mistake("xhat is missing: that is dbias.", lambda dout, **_: dout.sum(axis=0)),
            Mistake("the variance divides by C - 1; LayerNorm's divides by C.",
                    lambda dout, x, eps, **_: (dout * _norm(x, eps, 1)[0]).sum(axis=0)),
            Mistake("the weight itself is in it.", lambda dout, x, weight, eps, **_: (
                dout * weight * _norm(x, eps)[0]).sum(axis=0)),
        ],
        "dbias": [
            Mistake("it is the mean over the rows, not the sum.",
                    lambda dout, **_: dout.mean(axis=0)),
            Mistake("it is the sum over the wrong axis: bias has one entry for each column.",
                    lambda dout, **_: dout.sum(axis=1)),
            Mistake("the sum over the rows is missing.", lambda dout, **_: dout),
            Mistake("the weight is in it; the bias is added after the weight.",
                    lambda dout, weight, **_: (dout * weight).sum(axis=0)),
        ],
    },
    read={"dx": "dx = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(var + eps), g = dout * weight, "
                "means over each row.",
          "dweight": "dweight = sum over rows of dout * xhat.",
          "dbias": "dbias = sum over rows of dout."},
    factors=lambda dout, **_: {"N (the number of rows)": len(dout),
                               "C (the width)": dout.shape[1]},
    forward=_norm_forward,
)


# ---- 8. Causal attention backward


def _attend(q: Array, k: Array, v: Array, causal: bool = True, scaled: bool = True) -> Array:
    scores = q @ k.T
    if scaled:
        scores = scores / q.shape[1] ** 0.5
    if causal:
        scores = scores + np.triu(np.full(scores.shape, -np.inf, scores.dtype), k=1)
    return _softmax(scores)


def attention_backward(dout: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """The reference of exercise 8."""
    p, scale = _attend(q, k, v), q.shape[1] ** -0.5
    dp = dout @ v.T
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ dout


def _attention_case(t: int, d: int, scale: float = 1.5) -> Case:
    case = {name: 1.5 * _normal(t, d, seed=i) for i, name in enumerate(("dout", "q", "k", "v"))}
    return case | {"q": scale * case["q"], "k": scale * case["k"]}


def _attention(output: int, change: str) -> Any:
    """Make a version of one gradient of attention with something wrong in it."""

    def wrong(dout, q, k, v):
        d = q.shape[1]
        p = _attend(q, k, v, causal=change not in ("no mask", "future", "strict", "overflow"),
                    scaled=change not in ("no scale at all", "scale late"))
        scale = 1.0 if change in ("no scale", "no scale at all") else d**-0.5
        if change in ("future", "strict", "overflow", "columns", "1/D"):
            scores = q @ k.T * (1 / d if change == "1/D" else d**-0.5)
            ones = np.ones_like(scores)
            keep = {"future": np.triu(ones), "strict": np.tril(ones, -1)}.get(change, np.tril(ones))
            scores = np.where(keep > 0, scores, -np.inf)
            if change == "overflow":
                p = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            else:
                p = _softmax(scores, 0 if change == "columns" else -1)
            scale = 1 / d if change == "1/D" else scale
        dp = dout @ v.T
        inner = (dp * p).sum(axis=0 if change == "axis" else -1, keepdims=True)
        ds = p * (dp - inner)
        if change == "no inner":
            ds = p * dp
        if change == "no p":
            ds = dp - inner
        if change == "own slope":
            ds = p * (1 - p) * dp
        if change == "plain sum":
            ds = p * (dp - dp.sum(axis=-1, keepdims=True))
        if change == "mask late":
            p = _attend(q, k, v, causal=False) * np.tril(np.ones((len(q), len(q))))
            ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
        ds = ds * scale
        if change == "swap":
            return (ds.T @ q, ds @ k, p.T @ dout)[output]
        if change == "not transposed":
            return (ds.T @ k, ds @ q, p @ dout)[output]
        return (ds @ k, ds.T @ q, p.T @ dout)[output]

    return wrong


_MASK = "the causal mask is missing: a position must not look at later ones."
_LATE = ("the mask is put on after the soft-max, so the rows do not sum to 1: it belongs into the "
         "scores, as -inf.")
_INNER = "the soft-max's second term is missing: dS = P * (dP - sum of dP * P in the row)."
_SCALE = "the factor 1 / sqrt(D) is missing on the way back."
_ALL = "the factor 1 / sqrt(D) is missing, in the scores and on the way back."

ATTENTION_BACKWARD = Task(
    name="attention_backward",
    outputs=("dq", "dk", "dv"),
    reference=attention_backward,
    cases=[_attention_case(*c) for c in [(3, 2), (2, 2), (4, 3), (1, 3), (5, 1), (7, 4), (4, 4),
                                           (5, 4, 40.0)]],
    mistakes={
        name: [
            Mistake(_MASK, _attention(i, "no mask")),
            Mistake(_LATE, _attention(i, "mask late")),
            Mistake(_ALL, _attention(i, "no scale at all")),
            Mistake("exp overflows where scores are large: subtract each row's maximum first.",
                    _attention(i, "overflow")),
            Mistake("the mask is on the wrong side: it hides the past and shows the future.",
                    _attention(i, "future")),
            Mistake("the mask hides the diagonal as well: a position looks at itself, too (k=1).",
                    _attention(i, "strict")),
            Mistake("the factor is 1 / D; it is 1 / sqrt(D).", _attention(i, "1/D")),
            Mistake("the soft-max is over the wrong axis: each row of scores is one distribution.",
                    _attention(i, "columns")),
            Mistake("the factor 1 / sqrt(D) is missing in the scores; it is there on the way back.",
                    _attention(i, "scale late")),
            *([] if name == "dv" else [
                Mistake(_INNER, _attention(i, "no inner")),
                Mistake(_SCALE, _attention(i, "no scale")),
                Mistake("the sum in the soft-max's gradient is over the wrong axis: each row of P "
                        "is one distribution.", _attention(i, "axis")),
                Mistake("P (1 - P) is only the diagonal of the soft-max's gradient: every P_i "
                        "depends on every S_j.", _attention(i, "own slope")),
                Mistake("the sum in the soft-max's gradient is of dP * P, not of dP.",
                        _attention(i, "plain sum")),
                Mistake("P is missing in front: dS = P * (dP - sum of dP * P).",
                        _attention(i, "no p")),
                Mistake("dq and dk are swapped: dq = dS k, dk = dSᵀ q.", _attention(i, "swap")),
            ]),
            Mistake("a transpose is missing or too much: dq = dS k, dk = dSᵀ q, dv = Pᵀ dout.",
                    _attention(i, "not transposed")),
        ]
        for i, name in enumerate(("dq", "dk", "dv"))
    },
    read={"dq": "dS = P * (dP - sum(dP * P)), dP = dout vᵀ; dq = dS k / sqrt(D).",
          "dk": "dk = dSᵀ q / sqrt(D), with dS = P * (dP - sum(dP * P)).",
          "dv": "out = P v, so dv = Pᵀ dout, with P = softmax(q kᵀ / sqrt(D) + mask)."},
    factors=lambda dout, **_: {"sqrt(D)": dout.shape[1] ** 0.5, "T": len(dout)},
    forward=lambda q, k, v: _attend(q, k, v) @ v,
)

# ---- 10. Counting


def gpt_parameters(vocab_size: int, context_length: int, d_model: int, n_layers: int) -> int:
    """The reference of exercise 10: a GPT-2 with its head tied to the token embedding."""
    d = d_model
    block = (4 * d * d + 4 * d) + (8 * d * d + 5 * d) + 2 * 2 * d
    return vocab_size * d + context_length * d + n_layers * block + 2 * d


def _gpt(**changes: int) -> Any:
    """Make a count with something left out or put in."""

    def wrong(vocab_size, context_length, d_model, n_layers):
        count = gpt_parameters(vocab_size, context_length, d_model, n_layers)
        of = {"V d": vocab_size * d_model, "T d": context_length * d_model, "d": d_model,
              "L d": n_layers * d_model, "L d d": n_layers * d_model**2}
        return count + sum(times * of[name.replace("_", " ")] for name, times in changes.items())

    return wrong


LORA_PARAMETERS = Task(
    name="lora_parameters",
    outputs=("count",),
    reference=lambda shapes, rank: sum(rank * (n + m) for n, m in shapes),
    cases=[{"shapes": shapes, "rank": rank} for shapes, rank in [
        ([(3, 5)], 2), ([(4, 4)], 1), ([(3, 5), (5, 3), (7, 2)], 4), ([(768, 768)] * 24, 8),
        ([(768, 3072), (3072, 768)] * 12, 16), ([], 3)]],
    mistakes={"count": [
        Mistake("only A is counted; B has r * m numbers.",
                lambda shapes, rank: sum(rank * n for n, _ in shapes)),
        Mistake("only B is counted; A has n * r numbers.",
                lambda shapes, rank: sum(rank * m for _, m in shapes)),
        Mistake("this counts the whole matrices, n * m.",
                lambda shapes, rank: sum(n * m for n, m in shapes)),
        Mistake("n and m are multiplied: A and B are beside each other, n * r + r * m.",
                lambda shapes, rank: sum(rank * n * m for n, m in shapes)),
        Mistake("it takes every matrix for square: 2 * n * r is right only where n = m.",
                lambda shapes, rank: sum(2 * rank * n for n, _ in shapes)),
        Mistake("it takes every matrix for square: 2 * m * r is right only where n = m.",
                lambda shapes, rank: sum(2 * rank * m for _, m in shapes)),
        Mistake("only the first matrix is counted.",
                lambda shapes, rank: sum(rank * (n + m) for n, m in shapes[:1])),
        Mistake("only the last matrix is counted.",
                lambda shapes, rank: sum(rank * (n + m) for n, m in shapes[-1:])),
        Mistake("the rank is missing.", lambda shapes, rank: sum(n + m for n, m in shapes)),
        Mistake("biases are counted; LoRA has none.",
                lambda shapes, rank: sum(rank * (n + m) + m for n, m in shapes)),
    ]},
    read={"count": "A is (n, r) and B is (r, m): r (n + m) numbers for each matrix."},
    halves=False,
)

GPT_PARAMETERS = Task(
    name="gpt_parameters",
    outputs=("count",),
    reference=gpt_parameters,
    cases=[dict(zip(("vocab_size", "context_length", "d_model", "n_layers"), c, strict=True))
           for c in [(5, 3, 2, 1), (96, 64, 64, 2), (96, 128, 128, 4), (50257, 1024, 768, 12),
                     (50257, 1024, 1600, 48), (7, 11, 13, 5)]],
    mistakes={"count": [
        Mistake("the head is counted; it is tied to the token embedding, one matrix for both.",
                _gpt(V_d=1)),
        Mistake("the position embedding is missing: one row for each position.", _gpt(T_d=-1)),
        Mistake("the token embedding is missing.", _gpt(V_d=-1)),
        Mistake("the last LayerNorm, ln_f, is missing.", _gpt(d=-2)),
        Mistake("4 d are missing in each block: the biases of attention, or the weights and biases "
                "of the two LayerNorms.", _gpt(L_d=-4)),
        Mistake("all LayerNorms are missing: two in each block, and one at the end.",
                _gpt(L_d=-4, d=-2)),
        Mistake("LayerNorms have a weight and a bias, 2 d each.", _gpt(L_d=-2, d=-1)),
        Mistake("each block has two LayerNorms.", _gpt(L_d=-2)),
        Mistake("all biases of the linear layers are missing: 4 d in attention, 5 d in the MLP.",
                _gpt(L_d=-9)),
        Mistake("the biases of the MLP are missing: 4 d and d.", _gpt(L_d=-5)),
        Mistake("the MLP is four times as wide: it has two matrices of 4 d².", _gpt(L_d_d=-4)),
        Mistake("the output projection of attention is missing.", _gpt(L_d_d=-1)),
        Mistake("the output projection of attention is missing.", _gpt(L_d_d=-1, L_d=-1)),
        Mistake("biases and LayerNorms are missing.", _gpt(L_d=-13, d=-2)),
        Mistake("3 d are missing in each block: the biases of q, k and v, or the MLP's first bias, "
                "which has 4 d numbers and not d.", _gpt(L_d=-3)),
    ]},
    read={"count": "Embeddings (V + T) d; a block 12 d² + 9 d (biases) + 4 d (norms); ln_f 2 d."},
    halves=False,
)

TASKS = {task.name: task for task in (
    LINEAR_FORWARD, LINEAR_BACKWARD, CROSS_ENTROPY, LORA_BACKWARD, ADAMW, LAYER_NORM_BACKWARD,
    ATTENTION_BACKWARD, LORA_PARAMETERS, GPT_PARAMETERS,
)}
