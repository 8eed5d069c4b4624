"""Answers that learners give to each check: wrong ones with a part of the diagnosis, right ones.

None instead of the diagnosis: the check must fail, but need not say why.
"""

import math
import types

import numpy as np

import minilora as ml
from minilora import GELU, GPT, Linear, LinearWithLoRA, Parameter, Sequential


def answers(text):
    """Return (words, function) for each snippet: a line of words, then the code."""
    found = []
    for block in text.strip().split("\n---\n"):
        words, _, code = block.partition("\n")
        scope = {"np": np, "math": math, "ml": ml, "Linear": Linear, "Parameter": Parameter,
                 "LinearWithLoRA": LinearWithLoRA, "Sequential": Sequential, "GELU": GELU,
                 "GPT": GPT}
        exec(compile(code, f"<{words}>", "exec"), scope)
        own = [v for v in scope.values() if isinstance(v, (types.FunctionType, type))
               and getattr(v, "__module__", None) in (None, "builtins")]
        found.append((None if words == "?" else words, own[-1]))
    return found


def changed(right, *rows):
    """Return wrong answers made from a right one by rows of (words, old code, new code)."""
    for _, old, _ in rows:
        assert old in right, old
    return [pair for words, old, new in rows
            for pair in answers(f"{words}\n{right.replace(old, new)}")]


WRONG, RIGHT = {}, {}

WRONG["linear_forward"] = answers("""
bias is missing
def f(x, W, b): return x @ W
---
bias is added twice
def f(x, W, b): return x @ W + b + b
---
subtracted
def f(x, W, b): return x @ W - b
---
W is transposed
def f(x, W, b): return x @ W.T + b if W.shape[0] == W.shape[1] else x @ W.T + b
---
returns nothing
def f(x, W, b): y = x @ W + b
---
input x in place
def f(x, W, b):
    x *= 1.0001
    return x / 1.0001 @ W + b
---
entry by entry
def f(x, W, b): return x * W + b
---
sum of the bias
def f(x, W, b): return x @ W + b.sum()
---
float64 for float32
def f(x, W, b): return x @ W + b * np.float64(1.0)
---
reuses the buffer
def make():
    store = {}
    def f(x, W, b):
        key = x.shape, W.shape, x.dtype
        y = store.setdefault(key, np.zeros((len(x), W.shape[1]), x.dtype))
        np.matmul(x, W, out=y)
        y += b
        return y
    return f
f2 = make()
def g(*a): return f2(*a)
---
raised NameError
def f(x, W, b): return x @ weight + b
---
with other numbers of the same shapes
store = {}
def f(x, W, b): return x @ store.setdefault(W.shape, W.copy()) + b
---
with other numbers of the same shapes
def f(x, W, b, first={}): return x @ W + first.setdefault(b.shape, b.copy())
---
called again with the same inputs
calls = []
def f(x, W, b):
    calls.append(1)
    return x @ W + len(calls) * b
---
Is a transpose (.T) missing
def f(x, W, b): return x.T @ W + b
---
One of them has an axis less
def f(x, W, b): return x @ W + (x @ W).max(axis=-1) + b
---
on other shapes your code fails
def f(x, W, b): return x @ W + x.mean(axis=-1) + b
---
its shape is
def f(x, W, b): return (x @ W).mean(axis=0) + b
---
rounded to 3 digits
def f(x, W, b): return np.round(x @ W + b, 3)
---
cut off at 0
def f(x, W, b): return np.maximum(x @ W + b, 0)
---
once for each input, inside the sum
def f(x, W, b): return (x[:, :, None] * W + b).sum(axis=1)
---
only its last term is there
def f(x, W, b):
    y = np.zeros((len(x), len(b)), x.dtype)
    for i in range(len(x)):
        for k in range(len(W)): y[i] = x[i, k] * W[k] + b
    return y
""")
RIGHT["linear_forward"] = answers("""
einsum
def f(x, W, b): return np.einsum("ki,ij->kj", x, W) + b
---
loops
def f(x, W, b):
    y = np.zeros((len(x), len(b)), x.dtype)
    for k in range(len(x)):
        for j in range(len(b)):
            y[k, j] = (x[k] * W[:, j]).sum() + b[j]
    return y
---
in place on its own array
def f(x, W, b):
    y = x @ W
    y += b
    return y
""")

WRONG["linear_backward"] = answers("""
W is not transposed
def f(dout, x, W): return dout @ W, x.T @ dout, dout.sum(0)
---
transposed: dW = x
def f(dout, x, W): return dout @ W.T, dout.T @ x, dout.sum(0)
---
mean over the rows, not of the sum
def f(dout, x, W): return dout @ W.T, x.T @ dout / len(x), dout.sum(0)
---
mean over the rows, not the sum
def f(dout, x, W): return dout @ W.T, x.T @ dout, dout.mean(0)
---
wrong axis
def f(dout, x, W): return dout @ W.T, x.T @ dout, dout.sum(axis=1)
---
(1, m); b has shape (m,)
def f(dout, x, W): return dout @ W.T, x.T @ dout, dout.sum(0, keepdims=True)
---
sum over the rows is missing
def f(dout, x, W): return dout @ W.T, x.T @ dout, dout
---
both axes
def f(dout, x, W): return dout @ W.T, x.T @ dout, dout.sum()
---
yours returns 2 things
def f(dout, x, W): return dout @ W.T, x.T @ dout
---
wrong sign
def f(dout, x, W): return -dout @ W.T, x.T @ dout, dout.sum(0)
---
last row
def f(dout, x, W):
    for xi, di in zip(x, dout): dW = np.outer(xi, di)
    return dout @ W.T, dW, dout.sum(0)
---
changes its input dout
def f(dout, x, W):
    dx = dout @ W.T
    dout *= 2
    return dx, x.T @ dout / 2, dout.sum(0) / 2
---
it is dout that comes back
def f(dout, x, W): return x @ W.T, x.T @ dout, dout.sum(0)
---
only the last row is in it
def f(dout, x, W): return dout @ W.T, x.T @ dout, dout[-1].copy()
---
divided by m
def f(dout, x, W): return dout @ W.T, x.T @ dout / W.shape[1], dout.sum(0)
---
dx is right in a first call, but not in the next
store = {}
def f(dout, x, W):
    return dout @ store.setdefault(W.shape, W.copy()).T, x.T @ dout, dout.sum(0)
---
called again with the same inputs
def f(dout, x, W, total={}):
    total[W.shape] = total.get(W.shape, 0) + x.T @ dout
    return dout @ W.T, total[W.shape].copy(), dout.sum(0)
---
it is 1.5 times what it should be, in every case
def f(dout, x, W): return dout @ W.T, 1.5 * x.T @ dout, dout.sum(0)
---
the input W is added
def f(dout, x, W): return dout @ W.T, x.T @ dout + W, dout.sum(0)
---
it is the input x, unchanged
def f(dout, x, W): return x.copy(), x.T @ dout, dout.sum(0)
---
?
def f(dout, x, W): return dout @ W.T, x.T @ dout, dout.sum(0) + 1e-3
---
?
def f(dout, x, W):
    return dout @ W.T, x.T @ dout, dout.sum(0) if len(x) > 1 else 0 * dout[0]
""")
RIGHT["linear_backward"] = answers("""
einsum
def f(dout, x, W):
    return (np.einsum("kj,ij->ki", dout, W), np.einsum("ki,kj->ij", x, dout),
            np.einsum("kj->j", dout))
---
rows one by one
def f(dout, x, W):
    dx, dW, db = np.zeros_like(x), np.zeros_like(W), np.zeros(W.shape[1], W.dtype)
    for k in range(len(x)):
        dx[k] = W @ dout[k]
        dW += np.outer(x[k], dout[k])
        db += dout[k]
    return [dx, dW, db]
---
transposes elsewhere
def f(dout, x, W):
    return (W @ dout.T).T.copy(), (dout.T @ x).T.copy(), np.ones(len(x), x.dtype) @ dout
""")

WRONG["cross_entropy"] = answers("""
sum over the rows, not the mean
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t)); p[r, t] -= 1
    return -lp[r, t].sum(), p / len(t)
---
gradient of the sum
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t)); p[r, t] -= 1
    return -lp[r, t].mean(), p
---
minus sign
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t)); p[r, t] -= 1
    return lp[r, t].mean(), p / len(t)
---
exp overflows
def f(z, t):
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True); r = np.arange(len(t))
    loss = -np.log(p[r, t]).mean(); p[r, t] -= 1
    return loss, p / len(t)
---
underflowed
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    r = np.arange(len(t)); loss = -np.log(p[r, t]).mean(); p[r, t] -= 1
    return loss, p / len(t)
---
1 is not subtracted at the targets.
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t))
    return -lp[r, t].mean(), p / len(t)
---
sign is wrong
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t)); p[r, t] -= 1
    return -lp[r, t].mean(), -p / len(t)
---
off by one
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t)); p[r, t - 1] -= 1
    return -lp[r, t].mean(), p / len(t)
---
one loss for each row
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t)); p[r, t] -= 1
    return -lp[r, t], p / len(t)
---
input logits in place
def f(z, t):
    z -= z.max(-1, keepdims=True); p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(-1, keepdims=True)); r = np.arange(len(t)); p[r, t] -= 1
    return -lp[r, t].mean(), p / len(t)
---
wrong axis
def f(z, t):
    z = z - z.max(0, keepdims=True); p = np.exp(z) / np.exp(z).sum(0, keepdims=True)
    lp = z - np.log(np.exp(z).sum(0, keepdims=True)); r = np.arange(len(t)); p[r, t] -= 1
    return -lp[r, t].mean(), p / len(t)
---
?
def f(z, t):
    z = z - z.max(-1, keepdims=True); p = np.exp(z) / (np.exp(z).sum(-1, keepdims=True) + 1e-2)
    r = np.arange(len(t)); loss = -np.log(p[r, t] + 1e-300).mean(); p[r, t] -= 1
    return loss, p / len(t)
""")
ENTROPY = """def f(z, t):
    r = np.arange(len(t))
    m = z.max(-1, keepdims=True)
    e = np.exp(z - m)
    s = e.sum(-1, keepdims=True)
    loss = -(z - m - np.log(s))[r, t].mean()
    p = e / s
    p[r, t] -= 1
    p = p / len(t)
    return loss, p
"""


WRONG["cross_entropy"] += changed(
    ENTROPY,
    ("must be each row's own", "z.max(-1, keepdims=True)", "z.max()"),
    ("wrong axis", "z.max(-1, keepdims=True)", "z.max(0)"),
    ("not from the logit", "(z - m - np.log(s))", "(z - np.log(s))"),
    ("hides the problem", "-(z - m - np.log(s))[r, t].mean()",
     "-np.log((e / s)[r, t] + 1e-12).mean()"),
    ("clipping", "-(z - m - np.log(s))[r, t].mean()",
     "-np.log(np.clip((e / s)[r, t], 1e-12, 1)).mean()"),
    ("subtracted after dividing", "    p[r, t] -= 1\n    p = p / len(t)",
     "    p = p / len(t)\n    p[r, t] -= 1"),
    ("whole columns", "p[r, t] -= 1", "p[:, t] -= 1"),
    ("logarithm is missing", "-(z - m - np.log(s))[r, t].mean()", "-(e / s)[r, t].mean()"),
    ("summed over the whole batch", "s = e.sum(-1, keepdims=True)", "s = e.sum()"),
    ("denominator", "(z - m - np.log(s))", "(z - m)"),
    ("wrong order", "return loss, p", "return p, loss"),
    ("one axis too many", ".mean()", ".mean(keepdims=True)"),
    ("mean was subtracted", "z.max(-1, keepdims=True)", "z.mean(-1, keepdims=True)"),
    ("?", "z.max(-1, keepdims=True)", "np.abs(z).max()"),
    *(("adding a small number", "-(z - m - np.log(s))[r, t].mean()",
       f"-np.log((e / s)[r, t] + {eps}).mean()") for eps in (1e-7, 1e-8, 1e-10, 1e-15, 1e-300)),
    *(("clipping probabilities", "-(z - m - np.log(s))[r, t].mean()",
       f"-np.log(np.clip((e / s)[r, t], {eps}, 1 - {eps})).mean()") for eps in (1e-7, 1e-9, 1e-15)),
    ("keepdims=True keeps it", "s = e.sum(-1, keepdims=True)", "s = e.sum(-1)"),
    ("keepdims=True keeps it", "m = z.max(-1, keepdims=True)", "m = z.max(-1)"),
    ("over the wrong axis", "s = e.sum(-1, keepdims=True)", "s = e.sum(0)"),
    ("base 2", "np.log(s)", "np.log2(s)"), ("base 10", "np.log(s)", "np.log10(s)"),
    ("np.log1p", "np.log(s)", "np.log1p(s)"), ("1 is added", "-= 1", "+= 1"),
    ("it is -1 at the targets", "p[r, t] -= 1", "p[r, t] = -1"),
    ("N targets of every row", "(z - m - np.log(s))[r, t]", "(z - m - np.log(s))[:, t]"),
    ("all N V log-probabilities", "(z - m - np.log(s))[r, t]", "(z - m - np.log(s))"),
    ("0 * log(0) is nan", "-(z - m - np.log(s))[r, t].mean()",
     "-(np.eye(z.shape[1])[t] * np.log(e / s)).sum() / len(t)"),
    ("perplexity", "return loss", "return np.exp(loss)"),
    ("not divided by their sum", "p = e / s", "p = e.copy()"),
    ("rounded to 4 digits", "p = p / len(t)", "p = np.round(p / len(t), 4)"),
)
RIGHT["cross_entropy"] = answers("""
one hot
def f(z, t):
    m = z.max(axis=1, keepdims=True)
    lse = m + np.log(np.exp(z - m).sum(axis=1, keepdims=True))
    hot = np.zeros_like(z)
    hot[np.arange(len(t)), t] = 1
    return ((lse - z) * hot).sum() / len(t), (np.exp(z - lse) - hot) / len(t)
---
loops
def f(z, t):
    loss, d = 0.0, np.zeros_like(z)
    for k in range(len(t)):
        e = np.exp(z[k] - z[k].max())
        loss += float(np.log(e.sum()) - (z[k, t[k]] - z[k].max())) / len(t)
        d[k] = e / e.sum() / len(t)
        d[k, t[k]] -= 1 / len(t)
    return loss, d
""")

LAYER = '''STORE = {{}}
class L:
    def __init__(self, n, m, r, alpha, rng):
        {init}
    def forward(self, x):
        {forward}
'''
GOOD = ("self.A = rng.uniform(-n**-.5, n**-.5, (n, r)); self.B = np.zeros((r, m)); "
        "self.scale = alpha / r")
GO = "return self.scale * (x @ self.A @ self.B)"


def layers(*rows):
    return [answers(f"{words}\n" + LAYER.format(init=init or GOOD, forward=forward or GO))[0]
            for words, init, forward in rows]


WRONG["lora_forward"] = layers(
    ("shape (2, 6) where (in, rank)", "self.A = rng.uniform(-n**-.5, n**-.5, (r, n)); "
     "self.B = np.zeros((m, r)); self.scale = alpha / r",
     "return self.scale * (x @ self.A.T @ self.B.T)"),
    ("swapped", "self.B = rng.uniform(-n**-.5, n**-.5, (n, r)); self.A = np.zeros((r, m)); "
     "self.scale = alpha / r", "return self.scale * (x @ self.B @ self.A)"),
    ("both zero", "self.A = np.zeros((n, r)); self.B = np.zeros((r, m)); self.scale = alpha / r",
     None),
    ("B is not zero", "self.A = rng.uniform(-n**-.5, n**-.5, (n, r)); "
     "self.B = rng.uniform(-.1, .1, (r, m)); self.scale = alpha / r", None),
    ("A is zero and B is not", "self.B = rng.uniform(-n**-.5, n**-.5, (r, m)); "
     "self.A = np.zeros((n, r)); self.scale = alpha / r", None),
    ("scale is alpha", GOOD.replace("alpha / r", "alpha"), None),
    ("other way round", GOOD.replace("alpha / r", "r / alpha"), None),
    ("sqrt(r)", GOOD.replace("alpha / r", "alpha / r**0.5"), None),
    ("rounded down", GOOD.replace("alpha / r", "alpha // r"), None),
    ("1/sqrt(rank)", GOOD.replace("n**-.5", "r**-.5"), None),
    ("normal, not uniform", GOOD.replace("rng.uniform(-n**-.5, n**-.5, (n, r))",
                                         "rng.standard_normal((n, r)) * n**-.5"), None),
    ("no negative numbers", GOOD.replace("-n**-.5, n", "0, n"), None),
    ("not with np.random", GOOD.replace("rng.", "np.random."), None),
    ("with the rng that is given", GOOD.replace("rng.", "np.random.default_rng(0)."), None),
    ("scale is missing", None, "return x @ self.A @ self.B"),
    ("scale is in it twice", None, "return self.scale * x @ (self.scale * self.A) @ self.B"),
    ("made in the constructor", GOOD + "; self.AB = self.A @ self.B",
     "return self.scale * (x @ self.AB)"),
    ("no attribute scale", GOOD.replace("self.scale", "self.scaling"),
     "return self.scaling * (x @ self.A @ self.B)"),
    ("B is missing", None, "return self.scale * (x @ self.A)"),
    ("forward returns nothing", None, "y = self.scale * (x @ self.A @ self.B)"),
    ("changes A or B", None, "self.A = self.scale * self.A; return x @ self.A @ self.B"),
    ("not independent", GOOD.replace("rng.uniform(-n**-.5, n**-.5, (n, r))",
                                     "np.tile(rng.uniform(-1, 1, (n, 1)) * n**-.5, (1, r))"),
     None),
    ("floating-point", GOOD.replace("np.zeros((r, m))", "np.zeros((r, m), int)"), None),
    ("a few values", GOOD.replace("rng.uniform(-n**-.5, n**-.5, (n, r))",
                                  "rng.choice([-n**-.5, n**-.5], (n, r))"), None),
    ("Kaiming", GOOD.replace("-n**-.5, n**-.5", "-(6/n)**.5, (6/n)**.5"), None),
    ("Xavier", GOOD.replace("-n**-.5, n**-.5", "-(6/(n+r))**.5, (6/(n+r))**.5"), None),
    ("alpha instead of the scale", GOOD + "; self.alpha = alpha",
     "return self.alpha * (x @ self.A @ self.B)"),
    ("its input x in place", None, "x *= self.scale; return x @ self.A @ self.B"),
    ("times the scale", GOOD + "; self.A = self.scale * self.A", None),
    ("divided by the scale", GOOD + "; self.A = self.A / self.scale", None),
    ("times alpha", GOOD + "; self.A = alpha * self.A", None),
    ("1/sqrt(in * rank)", GOOD + "; self.A = self.A / r**.5", None),
    ("sqrt(3/in)", GOOD + "; self.A = self.A * 3**.5", None),
    ("0.01, whatever", GOOD.replace("n**-.5", ".01"), None),
    ("half of 1/sqrt(in)", GOOD + "; self.A = self.A / 2", None),
    ("no positive numbers", GOOD + "; self.A = -abs(self.A)", None),
    ("alpha is missing", GOOD.replace("alpha / r", "1 / r"), None),
    ("divided by the rank twice", GOOD.replace("alpha / r", "alpha / r / r"), None),
    ("changes A of the first", GOOD.replace("self.A", "L.A"), None),
    ("changes scale of the first", GOOD.replace("self.scale", "L.scale"), None),
    ("share one B", GOOD.replace("self.B", "L.B"), None),
    ("share one B", GOOD.replace("np.zeros((r, m))", "STORE.setdefault((r, m), np.zeros((r, m)))"),
     None),
    ("uses what belongs to the other", GOOD + "; L.last = self.scale",
     "return L.last * (x @ self.A @ self.B)"),
    ("it is zero", GOOD + "; STORE['AB'] = self.A, self.B",
     "return self.scale * (x @ STORE['AB'][0] @ STORE['AB'][1])"),
    ("copy of A from the constructor", GOOD + "; self.first = self.A",
     "return self.scale * (x @ self.first @ self.B)"),
    ("not after x, A and B have changed", None,
     "self.AB = getattr(self, 'AB', self.A @ self.B); return self.scale * (x @ self.AB)"),
    ("not after x, A and B have changed", None, "self.sA = getattr(self, 'sA', self.scale * self.A)"
     "; return x @ self.sA @ self.B"),
    ("not after x, A and B have changed", GOOD + "; self.y = {}",
     "return self.y.setdefault(x.shape, self.scale * (x @ self.A @ self.B))"),
    ("B should be an array", GOOD.replace("np.zeros((r, m))", "[[0.0] * m] * r"), None),
    ("forward should be numbers", None, GO + ", x"),
    ("?", None, "return 2.0 * (x @ self.A @ self.B)"),
    ("x A are cut off", None, "return self.scale * (np.maximum(x @ self.A, 0) @ self.B)"),
)
RIGHT["lora_forward"] = layers(
    ("parameters", "self.A = Parameter(rng.uniform(-n**-.5, n**-.5, (n, r))); "
     "self.B = Parameter(np.zeros((r, m))); self.scale = alpha / r",
     "return x @ self.A.data @ self.B.data * self.scale"),
    ("random", "self.A = (rng.random((n, r)) * 2 - 1) / n**.5; self.B = np.zeros((r, m)); "
     "self.scale = alpha / r", "return x @ (self.scale * (self.A @ self.B))"),
    ("einsum", "self.A = rng.uniform(-1, 1, (n, r)) / np.sqrt(n); self.B = np.zeros([r, m]); "
     "self.scale = float(alpha) / r",
     "return np.einsum('...i,ir,rj->...j', x, self.A, self.B) * self.scale"),
)

WRONG["lora_backward"] = answers("""
lacks the factor scale
def f(dout, x, A, B, s): return s * dout @ B.T @ A.T, x.T @ (dout @ B.T), s * (x @ A).T @ dout
---
lacks the factor scale
def f(dout, x, A, B, s): return s * dout @ B.T @ A.T, s * x.T @ (dout @ B.T), (x @ A).T @ dout
---
lacks the factor scale
def f(dout, x, A, B, s): return dout @ B.T @ A.T, s * x.T @ (dout @ B.T), s * (x @ A).T @ dout
---
scale = alpha / r once too often
def f(dout, x, A, B, s):
    d = s * dout
    return d @ B.T @ A.T, s * x.T @ (d @ B.T), (x @ A).T @ d
---
transposed: A is (n, r)
def f(dout, x, A, B, s):
    return s * dout @ B.T @ A.T, (s * x.T @ (dout @ B.T)).T, s * (x @ A).T @ dout
---
transposed: B is (r, m)
def f(dout, x, A, B, s):
    return s * dout @ B.T @ A.T, s * x.T @ (dout @ B.T), s * dout.T @ (x @ A)
---
A is left out
def f(dout, x, A, B, s): return s * dout @ B.T @ A.T, s * x.T @ (dout @ B.T), s * x.T @ dout
---
B is left out
def f(dout, x, A, B, s): return s * dout @ B.T @ A.T, s * x.T @ dout, s * (x @ A).T @ dout
---
mean over the rows
def f(dout, x, A, B, s):
    return s * dout @ B.T @ A.T, s * x.T @ (dout @ B.T) / len(x), s * (x @ A).T @ dout
---
lacks the scale and A
def f(dout, x, A, B, s): return dout @ B.T, s * x.T @ (dout @ B.T), s * (x @ A).T @ dout
---
all zeros
def f(dout, x, A, B, s): return s * dout @ B.T @ A.T, np.zeros_like(A), s * (x @ A).T @ dout
---
wrong way round
def f(dout, x, A, B, s): return s * dout @ A @ B, s * x.T @ (dout @ B.T), s * (x @ A).T @ dout
---
as large as W is formed
def f(dout, x, A, B, s):
    dW = x.T @ dout
    return dout @ (s * (A @ B)).T, s * (dW @ B.T), s * (A.T @ dW)
---
in the wrong order
def f(dout, x, A, B, s): return s * x.T @ (dout @ B.T), s * (x @ A).T @ dout, s * dout @ B.T @ A.T
---
is float32 for float64
def f(dout, x, A, B, s):
    dA = (s * x.T @ (dout @ B.T)).astype(np.float32)
    return s * dout @ B.T @ A.T, dA, s * (x @ A).T @ dout
---
lacks the factor r,
def f(dout, x, A, B, s):
    r = A.shape[1]
    return s * dout @ B.T @ A.T, s * x.T @ (dout @ B.T) / r, s * (x @ A).T @ dout
---
A is not transposed
def f(dout, x, A, B, s): return s * dout @ B.T @ A, s * x.T @ (dout @ B.T), s * (x @ A).T @ dout
---
not in the next
store = {}
def f(dout, x, A, B, s):
    old = store.setdefault(B.shape, B.copy())
    return s * dout @ old.T @ A.T, s * x.T @ (dout @ old.T), s * (x @ A).T @ dout
---
?
def f(dout, x, A, B, s):
    return s * dout @ B.T @ A.T, s * x.T @ (dout @ B.T) + 0.01 * A, s * (x @ A).T @ dout
""")
RIGHT["lora_backward"] = answers("""
brackets elsewhere
def f(dout, x, A, B, s):
    t = dout @ (s * B).T
    return t @ A.T, (t.T @ x).T.copy(), (dout.T @ (x @ A)).T * s
---
einsum
def f(dout, x, A, B, s):
    return (s * np.einsum("kj,rj,ir->ki", dout, B, A), s * np.einsum("ki,kj,rj->ir", x, dout, B),
            s * np.einsum("ki,ir,kj->rj", x, A, dout))
""")

WRONG["replace_linear"] = answers("""
Only the top level
def f(model, rank, alpha):
    model.freeze()
    for name, child in list(model.named_children()):
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
    return model
---
base is not frozen
def f(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        elif not isinstance(child, LinearWithLoRA): f(child, rank, alpha)
    return model
---
frozen together with the rest
def f(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        elif not isinstance(child, LinearWithLoRA): f(child, rank, alpha)
    model.freeze()
    return model
---
inside an already replaced layer
def g(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        else: g(child, rank, alpha)
def f(model, rank, alpha):
    for name, p in model.named_parameters():
        if ".lora." not in name: p.requires_grad = False
    g(model, rank, alpha)
    return model
---
returns nothing
def f(model, rank, alpha):
    ml.replace_linear_with_lora(model, rank, alpha)
---
another object
import copy
def f(model, rank, alpha): return ml.replace_linear_with_lora(copy.deepcopy(model), rank, alpha)
---
not the rank 2 and alpha 6
def f(model, rank, alpha): return ml.replace_linear_with_lora(model, alpha, rank)
---
No Linear was replaced
def f(model, rank, alpha):
    model.freeze()
    for _, child in model.named_modules():
        if isinstance(child, Linear): child = LinearWithLoRA(child, rank, alpha)
    return model
---
after the second call
def g(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        elif not isinstance(child, LinearWithLoRA): g(child, rank, alpha)
def f(model, rank, alpha):
    model.freeze()
    g(model, rank, alpha)
    return model
---
were not replaced: first
def f(model, rank, alpha):
    return ml.replace_linear_with_lora(model, rank, alpha, ["h.*", "lm_head"] if isinstance(
        model, GPT) else ["body.*", "last"])
---
throws away what A and B have learned
def g(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, LinearWithLoRA): child = child.linear
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        else: g(child, rank, alpha)
def f(model, rank, alpha):
    model.freeze()
    g(model, rank, alpha)
    return model
---
has the scale
def g(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, Linear):
            setattr(model, name, LinearWithLoRA(child, rank, alpha, scaling="alpha/sqrt(r)"))
        elif not isinstance(child, LinearWithLoRA): g(child, rank, alpha)
def f(model, rank, alpha):
    model.freeze()
    g(model, rank, alpha)
    return model
---
were not replaced
def f(model, rank, alpha):
    if any(isinstance(m, LinearWithLoRA) for _, m in model.named_modules()): return model
    return ml.replace_linear_with_lora(model, rank, alpha)
---
Not deep enough
def f(model, rank, alpha):
    model.freeze()
    for name, child in list(model.named_children()):
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        for n, c in list(child.named_children()):
            if isinstance(c, Linear) and not isinstance(child, LinearWithLoRA):
                setattr(child, n, LinearWithLoRA(c, rank, alpha))
    return model
---
and not for names
def f(model, rank, alpha):
    model.freeze()
    for name, child in list(model.named_children()):
        if name.endswith("proj"): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        else: f(child, rank, alpha)
    return model
---
new Linear inside
def g(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, Linear):
            new = Linear(child.in_features, child.out_features, child.bias is not None)
            setattr(model, name, LinearWithLoRA(new, rank, alpha))
        elif not isinstance(child, LinearWithLoRA): g(child, rank, alpha)
def f(model, rank, alpha):
    model.freeze()
    g(model, rank, alpha)
    return model
""")
REPLACE = """STORE = {}
def g(model, rank, alpha):
    for name, child in list(model.named_children()):
        if isinstance(child, Linear): setattr(model, name, LinearWithLoRA(child, rank, alpha))
        elif not isinstance(child, LinearWithLoRA): g(child, rank, alpha)
def f(model, rank, alpha):
    for name, p in model.named_parameters():
        if ".lora." not in name: p.requires_grad = False
    g(model, rank, alpha)
    for name, m in model.named_modules():
        if isinstance(m, LinearWithLoRA): pass
    return model
"""
WRONG["replace_linear"] += changed(
    REPLACE,
    ("comes back merged", "pass", "m.merge()"),
    ("has dropout", "(child, rank, alpha))", "(child, rank, alpha, dropout=0.1))"),
    ("A of first is zero", "pass", "m.lora.A.data = 0 * m.lora.A.data"),
    ("B of first is not zero", "pass", "m.lora.B.data = m.lora.B.data + 1"),
    ("has become float64", "pass", "m.lora.A.data = m.lora.A.data.astype(float)"),
    ("share one B", "pass", "m.lora.B.data = STORE.setdefault("
     "m.lora.B.data.shape, m.lora.B.data)"),
    ("share one A", "pass", "m.lora = STORE.setdefault("
     "(m.lora.A.data.shape, m.lora.B.data.shape), m.lora)"),
    ("The base is not frozen", "p.requires_grad", "p.grad"),
    ("not the rank 2 and alpha 6", "(child, rank, alpha))", "(child, 4, 8))"),
    ("body.0.lora.A is frozen", "pass", "m.lora.A.requires_grad = False"),
)
RIGHT["replace_linear"] = answers("""
the library's
def f(model, rank, alpha): return ml.replace_linear_with_lora(model, rank, alpha)
---
by paths
def f(model, rank, alpha):
    inner = {id(m.linear) for _, m in model.named_modules() if isinstance(m, LinearWithLoRA)}
    paths = [p for p, m in model.named_modules() if isinstance(m, Linear) and id(m) not in inner]
    for name, p in model.named_parameters():
        p.requires_grad = ".lora." in name
    for path in paths:
        *parents, last = path.split(".")
        parent = model
        for part in parents: parent = getattr(parent, part)
        setattr(parent, last, LinearWithLoRA(getattr(parent, last), rank, alpha))
    return model
""")

STEP = """def f(p, g, m, v, t, lr, b1, b2, eps, wd):
    pass
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    mh, vh = m / (1 - b1**t), v / (1 - b2**t)
    return p - lr * (mh / (np.sqrt(vh) + eps) + wd * p), m, v
"""


WRONG["adamw"] = changed(
    STEP,
    ("bias correction is missing", "m / (1 - b1**t), v / (1 - b2**t)", "m, v"),
    ("bias correction of m is missing", "m / (1 - b1**t)", "m"),
    ("bias correction of v is missing", "v / (1 - b2**t)", "v"),
    ("t is off by one", "mh, vh", "t += 1; mh, vh"),
    ("beta * t", "b1**t), v / (1 - b2**t", "b1 * t), v / (1 - b2 * t"),
    ("inside the root", "np.sqrt(vh) + eps", "np.sqrt(vh + eps)"),
    ("lacks the factor lr", "p - lr * (mh / (np.sqrt(vh) + eps) + wd * p)",
     "p - lr * mh / (np.sqrt(vh) + eps) - wd * p"),
    ("weight decay is missing", " + wd * p", ""),
    ("wrong sign", "+ wd * p", "- wd * p"),
    ("g is not squared", "g * g", "g"),
    ("uses beta1", "b2 * v + (1 - b2)", "b1 * v + (1 - b1)"),
    ("swapped", "b1 * m + (1 - b1) * g", "(1 - b1) * m + b1 * g"),
    ("bias correction was stored in m", "mh, vh = ", "m, vh = mh, vh = "),
    ("goes up the gradient", "p - lr * (", "p + lr * ("),
    ("learning rate is missing", "lr * (", "("),
    ("root over v is missing", "np.sqrt(vh)", "vh"),
    ("changes its input", "pass\n    m =", "p *= 1 - 0.0 * lr; p += 1e-3; p -= 0\n    m ="),
    ("power of t is missing", "b1**t), v / (1 - b2**t)", "b1), v / (1 - b2)"),
    ("power is outside", "(1 - b1**t), v / (1 - b2**t)", "(1 - b1)**t, v / (1 - b2)**t"),
    ("beta1 is in both", "1 - b2**t", "1 - b1**t"),
    ("belongs to the root, in brackets", "mh / (np.sqrt(vh) + eps)", "mh / np.sqrt(vh) + eps"),
    ("is not added", "np.sqrt(vh) + eps", "np.maximum(np.sqrt(vh), eps)"),
    ("not the one that is given", "np.sqrt(vh) + eps", "np.sqrt(vh) + 1e-8"),
    ("divided by the root as well", "(mh / (np.sqrt(vh) + eps) + wd * p)",
     "(mh + wd * p) / (np.sqrt(vh) + eps)"),
    ("first factor is beta1", "b2 * v + (1 - b2)", "b1 * v + (1 - b2)"),
    ("squared along with g", "(1 - b2) * g * g", "((1 - b2) * g) ** 2"),
    ("in the wrong order", "), m, v", "), v, m"),
    ("epsilon is added twice", "np.sqrt(vh) + eps", "np.sqrt(vh) + 2 * eps"),
    ("?", "np.sqrt(vh) + eps", "np.sqrt(vh) + 3 * eps"),
    ("missing on the step", "lr * (mh / (np.sqrt(vh) + eps) + wd * p)",
     "mh / (np.sqrt(vh) + eps) - lr * wd * p"),
    ("rate is in it twice", "lr * (", "lr * lr * ("),
    ("in the step twice", "lr * (mh", "lr * (lr * mh"),
    ("in the decay twice", "+ wd * p", "+ lr * wd * p"),
    ("decay is of g", "wd * p", "wd * g"), ("not multiplied by p", "wd * p", "wd"),
    ("0.01 whatever is given", "wd * p", "0.01 * p"),
    ("step alone", "p - lr * (", "-lr * ("), ("epsilon is squared", "+ eps", "+ eps**2"),
    ("root of epsilon", "+ eps", "+ eps**0.5"), ("epsilon is subtracted", "+ eps", "- eps"),
    ("inside the root and outside", "np.sqrt(vh)", "np.sqrt(vh + eps)"),
    ("before its bias correction", "(np.sqrt(vh) + eps)",
     "((np.sqrt(v) + eps) / np.sqrt(1 - b2**t))"),
    ("correction of m; it counts from 1", "b1**t)", "b1 ** (t - 1))"),
    ("1 + beta1^t", "1 - b1**t", "1 + b1**t"), ("old m is missing", "b1 * m + ", ""),
    ("the absolute value of g", "g * g", "abs(g)"),
    ("squares are added up", "g * g", "(g * g).sum()"),
    ("divided by its size", "    pass", "    g = g / g.size"),
    ("g is clipped", "    pass", "    g = np.clip(g, -1, 1)"),
    ("called again with the same inputs", "    pass",
     "    global calls; calls = globals().get('calls', 0) + 1; t = calls"),
    ("not in the next", "    pass",
     "    global old; old = globals().get('old', {}); m, v = old.setdefault(p.shape, (m, v))"),
)
WRONG["adamw"] += answers("""
coupled
def f(p, g, m, v, t, lr, b1, b2, eps, wd):
    old = g
    g = g + wd * p
    mm, vv = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    new = p - lr * (mm / (1 - b1**t)) / (np.sqrt(vv / (1 - b2**t)) + eps)
    return new, b1 * m + (1 - b1) * old, b2 * v + (1 - b2) * old * old
""")
RIGHT["adamw"] = answers("""
as in the paper's other form
def f(p, g, m, v, t, lr, b1, b2, eps, wd):
    m = m + (1 - b1) * (g - m)
    v = v + (1 - b2) * (g**2 - v)
    root = v**0.5 / (1 - b2**t) ** 0.5 + eps
    return p * (1 - lr * wd) - lr / (1 - b1**t) * m / root, m, v
---
in place on copies
def f(p, g, m, v, t, lr, b1, b2, eps, wd):
    p, m, v = p.copy(), m.copy(), v.copy()
    m *= b1; m += (1 - b1) * g
    v *= b2; v += (1 - b2) * g * g
    p -= lr * wd * p + lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p, m, v
""")

NORM = """def f(dout, x, w, b, eps):
    r = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    h = (x - x.mean(-1, keepdims=True)) * r
    g = dout * w
    dx = r * (g - g.mean(-1, keepdims=True) - h * (g * h).mean(-1, keepdims=True))
    return dx, (dout * h).sum(0), dout.sum(0)
"""


WRONG["layer_norm_backward"] = changed(
    NORM,
    ("taken for constants", " - g.mean(-1, keepdims=True) - h * (g * h).mean(-1, keepdims=True)",
     ""),
    ("mean(g) is missing", " - g.mean(-1, keepdims=True)", ""),
    ("xhat * mean(g * xhat) is missing", " - h * (g * h).mean(-1, keepdims=True)", ""),
    ("weight is missing", "g = dout * w", "g = dout"),
    ("1 / sqrt(var + eps) is missing", "dx = r * ", "dx = "),
    ("sums where means", "g.mean(-1, keepdims=True) - h * (g * h).mean(-1",
     "g.sum(-1, keepdims=True) - h * (g * h).sum(-1"),
    ("C - 1", "x.var(-1, keepdims=True)", "x.var(-1, keepdims=True, ddof=1)"),
    ("outside the root", "np.sqrt(x.var(-1, keepdims=True) + eps)",
     "(np.sqrt(x.var(-1, keepdims=True)) + eps)"),
    ("it has x where", "(dout * h).sum(0)", "(dout * x).sum(0)"),
    ("mean over the rows", "dout.sum(0)", "dout.mean(0)"),
    ("wrong axis", "g.mean(-1, keepdims=True) - h * (g * h).mean(-1, keepdims=True)",
     "g.mean(0) - h * (g * h).mean(0)"),
    ("one sign is wrong", "- h * (g", "+ h * (g"),
    ("sum over the rows is missing", "dout.sum(0)", "dout"),
    ("eps is missing", "+ eps)", ")"),
    ("1e-5 whatever", "+ eps)", "+ 1e-5)"),
    ("root is missing", "1 / np.sqrt(x.var(-1, keepdims=True) + eps)",
     "1 / (x.var(-1, keepdims=True) + eps)"),
    ("eps is added twice", "+ eps)", "+ 2 * eps)"),
    ("?", "+ eps)", "+ 3 * eps)"),
    ("as in BatchNorm", "(-1, keepdims=True", "(0, keepdims=True"),
    ("mean is of each column", "x.mean(-1, keepdims=True)", "x.mean(0)"),
    ("variance is of each column", "x.var(-1, keepdims=True)", "x.var(0)"),
    ("mean is of all numbers", "x.mean(-1, keepdims=True)", "x.mean()"),
    ("variance is of all numbers", "x.var(-1, keepdims=True)", "x.var()"),
    ("keepdims=True keeps it", "x.var(-1, keepdims=True)", "x.var(-1)"),
    ("keepdims=True keeps it", " - g.mean(-1, keepdims=True)", " - g.mean(-1)"),
    ("root is taken twice", "x.var(", "x.std("),
    ("outside the brackets twice", "dx = r", "dx = r * r"),
    ("sum(g) stands", "g.mean(", "g.sum("), ("divide by C", "(g * h).mean", "(g * h).sum"),
    ("mean(g) is added", "g - g.mean", "g + g.mean"),
    ("weight is in it twice", "dx = r", "dx = w * r"),
    ("mean of g * xhat: g = dout", "(g * h).mean", "(dout * h).mean"),
    ("larger of variance and eps", "x.var(-1, keepdims=True) + eps",
     "np.maximum(x.var(-1, keepdims=True), eps)"),
    ("output y stands", "(dout * h)", "(dout * (h * w + b))"),
    ("mean is not subtracted", "(x - x.mean(-1, keepdims=True))", "x"),
    ("multiplied by sqrt(var + eps)", "1 / np.sqrt", "np.sqrt"),
)
RIGHT["layer_norm_backward"] = answers("""
the long way
def f(dout, x, w, b, eps):
    c = x.shape[1]
    mu = x.mean(1)[:, None]
    var = ((x - mu) ** 2).mean(1)[:, None]
    s = (var + eps) ** -0.5
    dh = dout * w
    dvar = (dh * (x - mu)).sum(1)[:, None] * -0.5 * s**3
    dmu = -(dh * s).sum(1)[:, None]
    return dh * s + dvar * 2 * (x - mu) / c + dmu / c, (dout * (x - mu) * s).sum(0), dout.sum(0)
---
a matrix for each row
def f(dout, x, w, b, eps):
    c, dx, dw = x.shape[1], np.zeros_like(x), np.zeros_like(w)
    for k in range(len(x)):
        s = 1 / (x[k].var() + eps) ** 0.5
        h = (x[k] - x[k].mean()) * s
        J = s * (np.eye(c, dtype=x.dtype) - 1 / c - np.outer(h, h) / c)
        dx[k] = J @ (dout[k] * w)
        dw += dout[k] * h
    return dx, dw, dout.sum(0)
""")

HEAD = """def f(dout, q, k, v):
    t, d = q.shape
    scale = d**-0.5
    s = q @ k.T * scale + np.triu(np.full((t, t), -np.inf, q.dtype), k=1)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dout @ v.T
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ dout
"""


WRONG["attention_backward"] = changed(
    HEAD,
    ("mask is missing", " + np.triu(np.full((t, t), -np.inf, q.dtype), k=1)", ""),
    ("missing on the way back", "keepdims=True)) * scale", "keepdims=True))"),
    ("in the scores and on the way back", "scale = d**-0.5", "scale = 1.0"),
    ("second term is missing", "(dp - (dp * p).sum(-1, keepdims=True))", "dp"),
    ("wrong axis", "(dp * p).sum(-1", "(dp * p).sum(0"),
    ("in the wrong order", "ds @ k, ds.T @ q", "ds.T @ q, ds @ k"),
    ("overflows", "s - s.max(-1, keepdims=True)", "s"),
    ("hides the past", "np.triu(np.full((t, t), -np.inf, q.dtype), k=1)",
     "np.tril(np.full((t, t), -np.inf, q.dtype), k=-1)"),
    ("it is 1 / sqrt(D)", "d**-0.5", "1 / d"),
    ("missing in the scores", "q @ k.T * scale", "q @ k.T"),
    ("only the diagonal", "p * (dp - (dp * p).sum(-1, keepdims=True))", "p * (1 - p) * dp"),
    ("not of dP", "(dp * p).sum", "dp.sum"),
    ("rows with small ones underflow", "s - s.max(-1, keepdims=True)", "s - s.max()"),
    ("sees the next one as well", "k=1)", "k=2)"), ("hides the diagonal", "k=1)", "k=0)"),
    ("-inf * 0 is nan", "np.triu(np.full((t, t), -np.inf, q.dtype), k=1)",
     "np.triu(np.ones((t, t), q.dtype), k=1) * -np.inf"),
    ("-inf * 0 is nan", "np.triu(np.full((t, t), -np.inf, q.dtype), k=1)",
     "(1 - np.tril(np.ones((t, t), q.dtype))) * -np.inf"),
    ("exp(0) is 1", " + np.triu(np.full((t, t), -np.inf, q.dtype), k=1)",
     " * np.tril(np.ones((t, t), q.dtype))"),
    ("mask is a finite number", "-np.inf", "-5.0"),
    ("dP is transposed", "dout @ v.T", "v @ dout.T"),
    ("product is with v", "ds @ k", "ds @ v"),
    ("mask is a finite number", "-np.inf", "-10.0"),
    ("mask is a finite number", "-np.inf", "-100.0"),
    ("exchanged in the scores", "q @ k.T", "k @ q.T"),
    ("exchanged throughout", "t, d = q.shape", "t, d = q.shape; q, k = k, q"),
    ("q stands where k should", "ds @ k", "ds @ q"),
    ("k stands where q should", "ds.T @ q", "ds.T @ k"),
    ("k stands where v should", "dout @ v.T", "dout @ k.T"),
    ("sum of the exponentials lacks keepdims", "p.sum(-1, keepdims=True)\n    dp",
     "p.sum(-1)\n    dp"),
    ("summed over the wrong axis", "p.sum(-1, keepdims=True)\n    dp", "p.sum(0)\n    dp"),
    ("sum of dP * P lacks keepdims", "(dp * p).sum(-1, keepdims=True)", "(dp * p).sum(-1)"),
    ("maximum lacks keepdims", "s.max(-1, keepdims=True)", "s.max(-1)"),
    ("twice on the way back", "keepdims=True)) * scale", "keepdims=True)) * scale * scale"),
    ("1 / sqrt(T)", "d**-0.5", "t**-0.5"), ("is added; it is subtracted", "(dp - (dp", "(dp + (dp"),
    ("divided by it once too often", "p.T @ dout", "p.T @ dout * scale"),
    ("transpose is missing", "p.T @ dout", "p @ dout"),
    ("P is missing in front", "ds = p * (", "ds = ("),
    ("after the soft-max", "    dp = dout",
     "    s = q @ k.T * scale\n    p = np.exp(s - s.max(-1, keepdims=True))\n"
     "    p /= p.sum(-1, keepdims=True)\n    p = p * np.tril(np.ones((t, t), q.dtype))\n"
     "    dp = dout"),
    ("float64 for float32", ", -np.inf, q.dtype)", ", -np.inf)"),
    ("lacks the factor", "p.T @ dout", "p.T @ dout / t"),
    ("?", "d**-0.5", "(d + 1)**-0.5"),
    ("wrong sign", "ds @ k, ds.T", "-ds @ k, ds.T"),
)
RIGHT["attention_backward"] = answers("""
row by row
def f(dout, q, k, v):
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    c = q.shape[1] ** -0.5
    for i in range(len(q)):
        s = k[: i + 1] @ q[i] * c
        p = np.exp(s - s.max())
        p = p / p.sum()
        dv[: i + 1] += np.outer(p, dout[i])
        dp = v[: i + 1] @ dout[i]
        ds = p * (dp - p @ dp) * c
        dq[i] = ds @ k[: i + 1]
        dk[: i + 1] += np.outer(ds, q[i])
    return dq, dk, dv
---
where
def f(dout, q, k, v):
    t, d = q.shape
    s = np.where(np.tril(np.ones((t, t), bool)), q @ k.T / math.sqrt(d), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True)).astype(q.dtype)
    p = p / p.sum(-1, keepdims=True)
    dp = np.einsum("ic,jc->ij", dout, v)
    ds = p * dp - p * np.vecdot(p, dp)[:, None]
    return ds @ k / math.sqrt(d), ds.T @ q / math.sqrt(d), p.T @ dout
""")

MERGE = """class M:
    def __init__(self, W, A, B, s):
        self.W, self.A, self.B, self.s, self.merged = W, A, B, s, False
    def forward(self, x):
        y = x @ self.W
        return y if self.merged else y + self.s * (x @ self.A @ self.B)
    def merge(self):
        if self.merged: raise RuntimeError("twice")
        self.old = self.W
        self.W = self.W + self.s * (self.A @ self.B)
        self.merged = True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.W = self.old
        self.merged = False
"""


WRONG["merge"] = changed(
    MERGE,
    ("would add the update twice", '        if self.merged: raise RuntimeError("twice")\n', ""),
    ("forward still adds", "return y if self.merged else y + ", "return y + "),
    ("bit for bit", "self.W = self.old", "self.W = self.W - self.s * (self.A @ self.B)"),
    ("gave in place", "self.W = self.W + self.s * (self.A @ self.B)",
     "self.old = self.W.copy(); self.W += self.s * (self.A @ self.B)"),
    ("weight lacks the scale", "self.W + self.s * (self.A", "self.W + (self.A"),
    ("update is gone", "        self.W = self.W + self.s * (self.A @ self.B)\n", ""),
    ("where nothing is merged", '        if not self.merged: raise RuntimeError("not merged")\n',
     "        if not self.merged: return\n"),
    ("Yours raised ValueError", 'RuntimeError("twice")', 'ValueError("twice")'),
    ("has changed the weight before",
     '        if self.merged: raise RuntimeError("twice")\n        self.old = self.W\n'
     "        self.W = self.W + self.s * (self.A @ self.B)\n",
     "        if not self.merged: self.old = self.W\n"
     "        self.W = self.W + self.s * (self.A @ self.B)\n"
     '        if self.merged: raise RuntimeError("twice")\n'),
    ("merged should be True", "        self.merged = True\n", ""),
    ("forward lacks the scale", "y + self.s * (x", "y + (x"),
    ("subtracted in merging", "self.W + self.s", "self.W - self.s"),
    ("the update alone", "self.W + self.s * (self.A", "self.s * (self.A"),
    ("merged should be False after unmerge", "        self.merged = False\n", ""),
    ("no attribute merged", "self.merged", "self.done"),
    ("overwrite the weight that was kept",
     '        if self.merged: raise RuntimeError("twice")\n        self.old = self.W\n',
     '        self.old = self.W\n        if self.merged: raise RuntimeError("twice")\n'),
    ("leaves the update in the weight", "        self.W = self.old\n", ""),
    ("A that the caller gave in place", "self.merged = W, A, B, s, False",
     "self.merged = W, A, B, s, False; self.A *= 1.5; self.A /= 1.5000001"),
    ("changes its input x", "        y = x @ self.W\n", "        x *= 1.0; x += 1; x -= 1\n"
     "        y = x @ self.W\n"),
)
WRONG["merge"] += changed(
    MERGE,
    ("Making a second layer", "self.A", "M.A"), ("Making a second layer", "self.s", "M.s"),
    ("Making a second layer", "self.W", "M.W"),
    ("With two layers in turn, unmerge", "self.old", "M.old"),
    ("float64 after merging where all arrays are float32", "self.s * (self.A @ self.B)\n    ",
     "np.float64(self.s) * (self.A.astype(float) @ self.B)\n    "),
    ("after merging is right to a few digits", "self.W + self.s * (self.A @ self.B)",
     "(self.W + self.s * (self.A @ self.B)).astype(np.float32)"),
    ("float64 after merge and unmerge", "self.W = self.old", "self.W = self.old.astype(float)"),
    ("forward is right to a few digits", "= W, A, B, s",
     "= *(z.astype('f4') for z in (W, A, B)), s"),
    ("merged should be False at first", "s, False", "s, True"),
    ("the LoRA branch is gone", "self.merged = True", "self.merged = True; self.B = 0 * self.B"),
    ("forward subtracts", "y + self.s", "y - self.s"),
    ("should have shape", "return y if", "return self.W if"),
)
WRONG["merge"] += answers("""
With two layers in turn, unmerge
old = []
class M:
    def __init__(self, W, A, B, s): self.W, self.A, self.B, self.s, self.merged = W, A, B, s, False
    def forward(self, x):
        return x @ self.W if self.merged else x @ self.W + self.s * (x @ self.A @ self.B)
    def merge(self):
        if self.merged: raise RuntimeError("twice")
        old.append(self.W)
        self.W, self.merged = self.W + self.s * self.A @ self.B, True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.W, self.merged = old.pop(), False
---
With two layers in turn, unmerge
old = {}
class M:
    def __init__(self, W, A, B, s): self.W, self.A, self.B, self.s, self.merged = W, A, B, s, False
    def forward(self, x):
        return x @ self.W if self.merged else x @ self.W + self.s * (x @ self.A @ self.B)
    def merge(self):
        if self.merged: raise RuntimeError("twice")
        old[self.W.shape] = self.W
        self.W, self.merged = self.W + self.s * self.A @ self.B, True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.W, self.merged = old[self.W.shape], False
---
forward uses an update from before
class M:
    def __init__(self, W, A, B, s):
        self.W, self.A, self.B, self.s, self.merged, self.first = W, A, B, s, False, s * A @ B
    def forward(self, x): return x @ self.W if self.merged else x @ self.W + x @ self.first
    def merge(self):
        if self.merged: raise RuntimeError("twice")
        self.old, self.W, self.merged = self.W, self.W + self.first, True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.W, self.merged = self.old, False
---
moves nothing into the weight
class M:
    def __init__(self, W, A, B, s): self.W, self.A, self.B, self.s, self.merged = W, A, B, s, False
    def forward(self, x): return x @ self.W + self.s * (x @ self.A @ self.B)
    def merge(self):
        if self.merged: raise RuntimeError("twice")
        self.merged = True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.merged = False
---
uses an update from before
class M:
    def __init__(self, W, A, B, s):
        self.W, self.A, self.B, self.s, self.merged = W, A, B, s, False
        self.both = W + s * A @ B
    def forward(self, x):
        return x @ self.both if self.merged else x @ self.W + self.s * (x @ self.A @ self.B)
    def merge(self):
        if self.merged: raise RuntimeError("twice")
        self.merged = True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.merged = False
---
kept in the class
class M:
    merged = False
    def __init__(self, W, A, B, s): self.W, self.A, self.B, self.s = W, A, B, s
    def forward(self, x):
        y = x @ self.W
        return y if M.merged else y + self.s * (x @ self.A @ self.B)
    def merge(self):
        if M.merged: raise RuntimeError("twice")
        self.old, self.W = self.W, self.W + self.s * self.A @ self.B
        M.merged = True
    def unmerge(self):
        if not M.merged: raise RuntimeError("not merged")
        self.W = self.old
        M.merged = False
---
raised RuntimeError
class M:
    def __init__(self, W, A, B, s): self.W, self.A, self.B, self.s, self.merged = W, A, B, s, False
    def forward(self, x):
        y = x @ self.W
        return y if self.merged else y + self.s * (x @ self.A @ self.B)
    def merge(self):
        if hasattr(self, "old"): raise RuntimeError("twice")
        self.old, self.W, self.merged = self.W, self.W + self.s * self.A @ self.B, True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.W, self.merged = self.old, False
""")
RIGHT["merge"] = changed(
    MERGE,
    ("two weights", "        self.old = self.W\n", "        self.old = self.W.copy()\n"),
    ("property", "class M:\n", "class M:\n    extra = 1\n"),
) + answers("""
a base and a weight
class M:
    def __init__(self, W, A, B, s):
        self.base, self.A, self.B, self.s, self.weight = W, A, B, s, None
    @property
    def merged(self): return self.weight is not None
    def delta(self): return self.s * self.A @ self.B
    def forward(self, x):
        return x @ self.weight if self.merged else x @ self.base + x @ self.delta()
    def merge(self):
        if self.merged: raise RuntimeError("merged")
        self.weight = self.base + self.delta()
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.weight = None
""")

WRONG["lora_parameters"] = answers("""
only A
def f(shapes, r): return sum(n * r for n, m in shapes)
---
only B
def f(shapes, r): return sum(m * r for n, m in shapes)
---
multiplied
def f(shapes, r): return sum(n * m * r for n, m in shapes)
---
whole matrices
def f(shapes, r): return sum(n * m for n, m in shapes)
---
square: 2 * n * r
def f(shapes, r): return sum(2 * n * r for n, m in shapes)
---
rank is missing
def f(shapes, r): return sum(n + m for n, m in shapes)
---
biases are counted
def f(shapes, r): return sum(r * (n + m) + m for n, m in shapes)
---
brackets are missing
def f(shapes, r): return sum(n + m * r for n, m in shapes)
---
biases are counted, and twice
def f(shapes, r): return sum(r * (n + m) + 2 * m for n, m in shapes)
---
counted once only
def f(shapes, r): return sum(r * (n + m) for n, m in set(shapes))
---
frozen matrix is counted
def f(shapes, r): return sum(r * (n + m) + n * m for n, m in shapes)
---
smaller of n and m
def f(shapes, r): return sum(2 * r * min(n, m) for n, m in shapes)
---
number of matrices
def f(shapes, r): return len(shapes) * sum(r * (n + m) for n, m in shapes)
---
changes its input shapes
def f(shapes, r):
    c = 0
    while shapes:
        n, m = shapes.pop()
        c += r * (n + m)
    return c
---
only the first matrix is counted
def f(shapes, r):
    for n, m in shapes: return r * (n + m)
---
only the first matrix
def f(shapes, r): return r * sum(shapes[0])
---
last matrix
def f(shapes, r):
    c = 0
    for n, m in shapes: c = r * (n + m)
    return c
---
returns nothing
def f(shapes, r): print(end="")
""")
RIGHT["lora_parameters"] = answers("""
numpy
def f(shapes, r): return r * int(np.sum(shapes))
---
loop
def f(shapes, r):
    c = 0
    for n, m in shapes: c += n * r + r * m
    return c
""")

COUNT = """def f(V, T, d, L):
    emb = V * d + T * d
    att = 4 * (d * d + d)
    mlp = d * 4 * d + 4 * d + 4 * d * d + d
    ln = 2 * 2 * d
    return emb + L * (att + mlp + ln) + 2 * d
"""


WRONG["gpt_parameters"] = changed(
    COUNT,
    ("head is counted", "V * d + T", "2 * V * d + T"),
    ("position embedding is missing", "V * d + T * d", "V * d"),
    ("token embedding is missing", "V * d + T * d", "T * d"),
    ("ln_f, is missing", "(att + mlp + ln) + 2 * d", "(att + mlp + ln)"),
    ("4 d are missing in each block", "(att + mlp + ln)", "(att + mlp)"),
    ("two LayerNorms", "2 * 2 * d", "2 * d"),
    ("4 d are missing", "4 * (d * d + d)", "4 * d * d"),
    ("biases of the MLP", "d * 4 * d + 4 * d + 4 * d * d + d", "8 * d * d"),
    ("four times as wide", "d * 4 * d + 4 * d + 4 * d * d + d", "d * 4 * d + 4 * d + d"),
    ("output projection", "4 * (d * d + d)", "3 * (d * d + d)"),
    ("too many", "L * (att", "(L + 1) * (att"), ("too few", "L * (att", "(L - 1) * (att"),
    ("only one block", "L * (att", "(att"), ("for every block", "+ ln) + 2 * d", "+ ln + 2 * d)"),
    ("the mask is counted", "emb = ", "emb = T * T + "),
    ("V d + T d + 2 d + 12 L d² + 17 L d; they", "4 * (d * d + d)", "4 * (d * d + 2 * d)"),
    ("12 L d² + 16 L d; they should be V d + T d + 2 d + 12 L d² + 13 L d", "4 * d * d + d\n",
     "4 * d * d + 4 * d\n"),
    ("8 L d² + 12 L d", "d * 4 * d + 4 * d + 4 * d * d + d", "4 * d * d + 4 * d"),
    ("13 L d + V;", "+ 2 * d\n", "+ 2 * d + V\n"),
    ("?", "V * d + T * d", "V * d + T * d + T"),
)
RIGHT["gpt_parameters"] = answers("""
closed form
def f(V, T, d, L): return (V + T + 2) * d + L * (12 * d**2 + 13 * d)
---
built
def f(V, T, d, L):
    from minilora.lab.counting import gpt_architecture
    return gpt_architecture(ml.GPTConfig(V, T, d, L, 1, tie_weights=True)).num_parameters
""")

ERRORS = """def f(table):
    out = []
    for row in table:
        n = 2 * row["layers"] * row["matrices"] * row["d"] * row["rank"]
        k = len(row["printed"].rstrip("M").split(".")[1])
        if f"{n / 1e6:.{k}f}M" != row["printed"]:
            out.append(row["name"])
    return out
"""


WRONG["find_errors"] = changed(
    ERRORS,
    ("factor 2 is missing", '2 * row["layers"]', 'row["layers"]'),
    ("matrices are not counted", '* row["matrices"] ', ""),
    ("you round to two digits", ":.{k}f", ":.2f"),
    ("2**20", "n / 1e6", "n / 2**20"),
    ("you do not round", "f\"{n / 1e6:.{k}f}M\" != row[\"printed\"]",
     "n / 1e6 != float(row['printed'][:-1])"),
    ("you do not round", "f\"{n / 1e6:.{k}f}M\" != row[\"printed\"]",
     "n != round(float(row['printed'][:-1]) * 1e6)"),
    ("you cut the digits off", "f\"{n / 1e6:.{k}f}M\" != row[\"printed\"]",
     "n * 10**k // 10**6 != round(float(row['printed'][:-1]) * 10**k)"),
    ("1,260,000 parameters, printed 1.2M. That is no rounding",
     "f\"{n / 1e6:.{k}f}M\" != row[\"printed\"]",
     "abs(n / 1e6 - float(row['printed'][:-1])) >= 10**-k"),
    ("you round up", "f\"{n / 1e6:.{k}f}M\" != row[\"printed\"]",
     "math.ceil(n * 10**k / 10**6) != round(float(row['printed'][:-1]) * 10**k)"),
    ("a difference of 5%", "f\"{n / 1e6:.{k}f}M\" != row[\"printed\"]",
     "abs(n / 1e6 / float(row['printed'][:-1]) - 1) > 0.05"),
    ("a difference of 0.05M", "f\"{n / 1e6:.{k}f}M\" != row[\"printed\"]",
     "abs(n / 1e6 - float(row['printed'][:-1])) > 0.05"),
    ("Every row is listed", "}M\" !=", "}\" !="), ("Every row is listed", '* row["layers"] ', ""),
    ("factor 2 too much", "2 * row", "4 * row"), ("rank is in it twice", '["rank"]', '["rank"]**2'),
    ("as many digits as are printed", ":.{k}f", ":.0f"),
    ("yet you do not list it", ":.{k}f}M\" != row[\"printed\"]",
     ":.0f}\" != f'{float(row[\"printed\"][:-1]):.0f}'"),
    ("rows that are right", "!=", "=="),
    ("returns nothing", "    return out\n", ""),
    ("no row is listed", 'out.append(row["name"])', "pass"),
    ("changes the table", "        n = 2", "        row['seen'] = 1\n        n = 2"),
    ("yours are", 'out.append(row["name"])', 'out.append(row["name"]); out.append("x")'),
)
WRONG["find_errors"] += answers("""
yet you list it
def f(table): return ["GPT-2 medium", "GPT-2 large", "GPT-3, r=2 on four", "GPT-3, r=1"]
---
Return a list of names
def f(table): return len(table)
---
Return a list of names
def f(table): return table[:1]
---
yet you do not list it
def f(table): return ["GPT-2 medium", "GPT-2 large", "GPT-3, r=2 on four"] * (len(table) == 7)
""")
RIGHT["find_errors"] = answers("""
by rounding
def f(table):
    def right(row):
        n = 2 * row["layers"] * row["matrices"] * row["d"] * row["rank"] / 1e6
        digits = len(row["printed"].split(".")[1]) - 1
        return abs(round(n, digits) - float(row["printed"][:-1])) < 1e-9
    return [row["name"] for row in table if not right(row)]
""")

TELL = """def f(adapter):
    up = {{n: {update} for n, f in adapter.layers.items()}}
    most = max(up, key=lambda n: {size})
    s = np.linalg.svd(up[most], compute_uv=False)[: adapter.layers[most].rank]
    return most, {rank}
"""
BEST = {"update": "f.scale * f.A @ f.B", "size": "np.linalg.norm(up[n])",
        "rank": "int((np.cumsum(s**2) >= 0.9 * (s**2).sum()).argmax()) + 1"}


def tells(*rows):
    return [answers(f"{words}\n" + TELL.format(**(BEST | changes)))[0] for words, changes in rows]


WRONG["diagnosis"] = tells(
    ("leave the scale out", {"update": "f.A @ f.B"}),
    ("product of the norms", {"size": "np.linalg.norm(adapter.layers[n].A) * np.linalg.norm("
                              "adapter.layers[n].scale * adapter.layers[n].B)"}),
    ("A alone", {"size": "np.linalg.norm(adapter.layers[n].A)"}),
    ("changes the adapter", {"rank": "adapter.layers.clear() or 1"}),
    ("two things", {"rank": "1, 2"}),
    ("size of the layer", {"size": "np.linalg.norm(up[n]) / len(up[n]) ** 0.5"}),
    ("largest singular value", {"size": "np.linalg.norm(up[n], 2)"}),
    ("largest entry", {"size": "np.abs(up[n]).max()"}),
    ("size of the layer", {"size": "np.sqrt((up[n]**2).mean())"}),
    ("changed least", {"size": "-np.linalg.norm(up[n])"}),
    ("add their squares", {"rank": "int((np.cumsum(s) >= 0.9 * s.sum()).argmax()) + 1"}),
    ("off by one", {"rank": "int((np.cumsum(s**2) >= 0.9 * (s**2).sum()).argmax())"}),
    ("the rank r itself", {"rank": "len(s)"}),
    ("above a tenth", {"rank": "int((s > 0.1 * s[0]).sum())"}),
    ("99%", {"rank": "int((np.cumsum(s**2) >= 0.99 * (s**2).sum()).argmax()) + 1"}),
    ("whole number", {"rank": "(s**2).sum() / s[0]**2"}),
    ("?", {"rank": "int(round((s**2).sum() / s[0]**2))"}),
    ("scale is in it twice", {"update": "f.scale**2 * f.A @ f.B"}),
    ("largest column sum", {"size": "np.linalg.norm(up[n], 1)"}),
    ("largest row sum", {"size": "np.linalg.norm(up[n], np.inf)"}),
    ("always name the first", {"size": "0"}), ("last name in the alphabet", {"size": "n"}),
    ("standard deviation", {"size": "up[n].std()"}),
    ("for 80%", {"rank": "int((np.cumsum(s**2) >= 0.8 * (s**2).sum()).argmax()) + 1"}),
    ("up to it", {"rank": "int((np.cumsum(s**2) >= 0.9 * (s**2).sum()).sum())"}),
    ("always 1", {"rank": "int((np.cumsum(s**2) >= 0.9).argmax()) + 1"}),
    ("?", {"rank": "int((np.cumsum(s**2) >= 0.85 * (s**2).sum()).argmax()) + 1"}),
    ("always 1", {"rank": "int((s**2 >= 0.9 * (s**2).sum()).argmax()) + 1"}),
    ("smallest singular values",
     {"rank": "int((np.cumsum(s[::-1]**2) >= 0.9 * (s**2).sum()).argmax()) + 1"}),
    ("of B alone", {"rank": "int((np.cumsum((q := np.linalg.svd(adapter.layers[most].B, compute_uv="
                    "False)**2)) >= 0.9 * q.sum()).argmax()) + 1"}),
    ("participation ratio", {"rank": "int(np.ceil((s**2).sum()**2 / (s**4).sum()))"}),
)
RIGHT["diagnosis"] = tells(
    ("eigenvalues", {"rank": "1 + int(np.searchsorted(np.cumsum(np.sort(np.linalg.eigvalsh("
                     "up[most] @ up[most].T))[::-1]), 0.9 * np.linalg.norm(up[most])**2))"}),
    ("norm by trace", {"size": "np.trace(up[n] @ up[n].T)"}),
)


# ---- More right ones, in other styles; several keep things that may be kept


RIGHT["linear_forward"] += answers("""
matrix and vector, a list of rows
def f(x, W, b): return np.array([row @ W + b for row in x])
---
bias as a row of ones
def f(x, W, b):
    ones = np.ones((len(x), 1), x.dtype)
    return np.hstack([x, ones]) @ np.vstack([W, b])
---
counts its calls
calls = []
def f(x, W, b):
    calls.append(x.shape)
    return np.matmul(x, W) + b[None, :]
""")
RIGHT["linear_backward"] += answers("""
tensordot
def f(dout, x, W):
    return (np.tensordot(dout, W, axes=(1, 1)), np.tensordot(x, dout, axes=(0, 0)),
            np.add.reduce(dout, axis=0))
---
a sum of outer products
def f(dout, x, W):
    return dout.dot(W.T), sum(np.outer(a, d) for a, d in zip(x, dout)), sum(dout)
""")
RIGHT["cross_entropy"] += answers("""
logaddexp
def f(z, t):
    n = len(t)
    logp = z - np.logaddexp.reduce(z, axis=1)[:, None]
    g = np.exp(logp)
    g[range(n), t] -= 1
    return -np.mean(logp[range(n), t]), g / n
---
take_along_axis
def f(z, t):
    s = z - z.max(axis=1)[:, None]
    logp = s - np.log(np.sum(np.exp(s), axis=1))[:, None]
    loss = -np.take_along_axis(logp, t[:, None], axis=1).mean()
    return loss, (np.exp(logp) - (np.arange(z.shape[1]) == t[:, None])) / z.dtype.type(len(t))
---
where instead of a product
def f(z, t):
    s = z - np.max(z, -1, keepdims=True)
    logp = s - np.log(np.exp(s).sum(-1, keepdims=True))
    hot = np.eye(z.shape[1], dtype=bool)[t]
    return -logp[hot].sum() / len(t), np.where(hot, np.exp(logp) - 1, np.exp(logp)) / len(t)
""")
RIGHT["lora_forward"] += layers(
    ("two steps", None, "h = x @ self.A; h = h * self.scale; return h @ self.B"),
    ("keeps x for the way back", GOOD + "; self.x = None",
     "self.x = x; self.h = x @ self.A; return self.scale * self.h @ self.B"),
    ("float32", "self.A = rng.uniform(-n**-.5, n**-.5, (n, r)).astype('f4'); "
     "self.B = np.zeros((r, m), 'f4'); self.scale = np.float64(alpha / r)", None),
    ("a list of layers in the class", GOOD + "; STORE.setdefault('all', []).append(self)", None),
    ("parameters, drawn twice as wide", "self.A = Parameter(2 * rng.uniform(-.5, .5, (n, r)) / "
     "math.sqrt(n)); self.B = Parameter(np.zeros_like(self.A.data, shape=(r, m))); "
     "self.scale = alpha * r**-1", "return np.dot(x, self.A.data).dot(self.B.data) * self.scale"),
)
RIGHT["lora_backward"] += answers("""
scaled first
def f(dout, x, A, B, s):
    d = s * dout
    back = d @ B.T
    return back @ A.T, x.T @ back, (x @ A).T @ d
---
row by row
def f(dout, x, A, B, s):
    dx, dA, dB = np.zeros_like(x), np.zeros_like(A), np.zeros_like(B)
    for k in range(len(x)):
        back = s * (B @ dout[k])
        dx[k] = A @ back
        dA += np.outer(x[k], back)
        dB += np.outer(s * (x[k] @ A), dout[k])
    return dx, dA, dB
""")
RIGHT["replace_linear"] += answers("""
a stack instead of recursion
def f(model, rank, alpha):
    for name, p in model.named_parameters():
        if ".lora." not in name: p.requires_grad = False
    todo = [model]
    while todo:
        parent = todo.pop()
        for name, child in list(parent.named_children()):
            if isinstance(child, LinearWithLoRA): continue
            if isinstance(child, Linear): setattr(parent, name, LinearWithLoRA(child, rank, alpha))
            else: todo.append(child)
    return model
---
freezes, and trains A and B again
def g(model, rank, alpha):
    for name, child in list(model.named_children()):
        if type(child) is Linear: setattr(model, name, LinearWithLoRA(child, rank, alpha, rng=3))
        elif not isinstance(child, LinearWithLoRA): g(child, rank, alpha)
def f(model, rank, alpha):
    g(model, rank, alpha)
    for name, p in model.named_parameters(): p.requires_grad = ".lora." in name
    return model
""")
RIGHT["adamw"] += answers("""
corrections in the learning rate
def f(p, g, m, v, t, lr, b1, b2, eps, wd):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * np.square(g)
    c = math.sqrt(1 - b2**t)
    return p * (1 - lr * wd) - lr * c / (1 - b1**t) * m / (np.sqrt(v) + eps * c), m, v
---
number by number
def f(p, g, m, v, t, lr, b1, b2, eps, wd):
    new = [np.empty_like(p) for _ in range(3)]
    for i in np.ndindex(p.shape):
        mi, vi = b1 * m[i] + (1 - b1) * g[i], b2 * v[i] + (1 - b2) * g[i] ** 2
        step = mi / (1 - b1**t) / ((vi / (1 - b2**t)) ** 0.5 + eps)
        new[0][i], new[1][i], new[2][i] = p[i] - lr * step - lr * wd * p[i], mi, vi
    return new
""")
RIGHT["layer_norm_backward"] += answers("""
from the output's side
def f(dout, x, w, b, eps):
    mu = np.mean(x, axis=1, keepdims=True)
    std = np.sqrt(np.mean((x - mu) ** 2, axis=1, keepdims=True) + eps)
    h = (x - mu) / std
    c = x.shape[1]
    g = dout * w
    dx = (c * g - g.sum(1, keepdims=True) - h * (g * h).sum(1, keepdims=True)) / (c * std)
    return dx, np.einsum("nc,nc->c", dout, h), np.sum(dout, axis=0)
---
projections
def f(dout, x, w, b, eps):
    out = []
    for d, row in zip(dout, x):
        s = (row.var() + eps) ** 0.5
        h = (row - row.mean()) / s
        g = d * w
        out.append(((g - g.mean() - h * (g @ h) / len(h)) / s, d * h))
    return np.array([a for a, _ in out]), sum(b for _, b in out), dout.sum(axis=0)
""")
RIGHT["attention_backward"] += answers("""
a mask that is kept
masks = {}
def f(dout, q, k, v):
    t, d = q.shape
    mask = masks.setdefault(t, np.triu(np.ones((t, t), bool), k=1))
    s = (q @ k.T) * d**-0.5
    s[mask] = -np.inf
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    dp = dout @ v.T
    ds = p * dp
    ds = (ds - p * ds.sum(axis=1, keepdims=True)) * d**-0.5
    return ds @ k, ds.T @ q, p.T @ dout
---
a large finite number
def f(dout, q, k, v):
    t, d = q.shape
    s = np.where(np.arange(t)[:, None] >= np.arange(t), q @ k.T / d**0.5, -1e9).astype(q.dtype)
    e = np.exp(s - s.max(-1)[:, None])
    p = e / e.sum(-1)[:, None]
    dp = dout @ v.T
    ds = p * (dp - np.einsum("ij,ij->i", p, dp)[:, None])
    return (ds @ k) / d**0.5, (ds.T @ q) / d**0.5, p.T @ dout
---
the whole matrix of the soft-max
def f(dout, q, k, v):
    c = q.shape[1] ** -0.5
    s = q @ k.T * c
    s = s + np.triu(np.full(s.shape, -np.inf, q.dtype), 1)
    p = np.exp(s - s.max(-1, keepdims=True)); p /= p.sum(-1, keepdims=True)
    dp = dout @ v.T
    ds = np.stack([(np.diag(a) - np.outer(a, a)) @ b for a, b in zip(p, dp)]) * c
    return ds @ k, ds.T @ q, p.T @ dout
""")
RIGHT["merge"] += answers("""
copies of everything
class M:
    def __init__(self, W, A, B, s):
        self.base, self.A, self.B, self.s, self.merged = W.copy(), A.copy(), B.copy(), s, False
        self.W = self.base
    def forward(self, x):
        return x @ self.W if self.merged else x @ self.W + x @ self.A @ self.B * self.s
    def merge(self):
        if self.merged: raise RuntimeError("merged already")
        self.W, self.merged = self.base + self.s * self.A @ self.B, True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.W, self.merged = self.base, False
---
slots, one product, and counts its layers in the class
class M:
    __slots__ = ("W", "A", "B", "s", "old")
    made = 0
    def __init__(self, W, A, B, s):
        self.W, self.A, self.B, self.s, self.old = W, A, B, s, []
        type(self).made += 1
    merged = property(lambda self: bool(self.old))
    def weight(self): return self.W + self.s * self.A @ self.B
    def forward(self, x): return x @ (self.W if self.merged else self.weight())
    def merge(self):
        if self.merged: raise RuntimeError
        self.old.append(self.W)
        self.W = self.weight()
    def unmerge(self):
        if not self.merged: raise RuntimeError
        self.W = self.old.pop()
---
forward is exchanged
class M:
    def __init__(self, W, A, B, s):
        self.arrays, self.s, self.merged = (W, A, B), s, False
        self.forward = self.apart
    def apart(self, x):
        W, A, B = self.arrays
        return x @ W + self.s * ((x @ A) @ B)
    def merge(self):
        if self.merged: raise RuntimeError("merged")
        W, A, B = self.arrays
        sum = W + (self.s * A) @ B
        self.forward, self.merged = (lambda x: x @ sum), True
    def unmerge(self):
        if not self.merged: raise RuntimeError("not merged")
        self.forward, self.merged = self.apart, False
""")
RIGHT["lora_parameters"] += answers("""
a sum of arrays
def f(shapes, r): return sum(np.zeros((n, r)).size + np.zeros((r, m)).size for n, m in shapes)
---
a float that is whole
def f(shapes, r): return float(r * sum(map(sum, shapes)))
""")
RIGHT["gpt_parameters"] += answers("""
a list of shapes
def f(V, T, d, L):
    block = [(d, 3 * d), (3 * d,), (d, d), (d,), (d, 4 * d), (4 * d,), (4 * d, d), *[(d,)] * 5]
    return sum(math.prod(s) for s in [(V, d), (T, d), *block * L, (d,), (d,)])
""")
RIGHT["find_errors"] += answers("""
an interval, as a set
def f(table):
    wrong = set()
    for row in table:
        n = 2 * row["d"] * row["rank"] * row["matrices"] * row["layers"]
        value, digits = float(row["printed"][:-1]), len(row["printed"].split(".")[1]) - 1
        if abs(n / 1e6 - value) > 0.5 * 10**-digits + 1e-12: wrong.add(row["name"])
    return wrong
---
f with a width
def f(table):
    def text(row):
        n = sum(2 * row["d"] * row["rank"] for _ in range(row["layers"] * row["matrices"])) / 1e6
        return "%.*fM" % (len(row["printed"]) - row["printed"].index(".") - 2, n)
    return tuple(row["name"] for row in table if text(row) != row["printed"])
""")
RIGHT["diagnosis"] += tells(
    ("sorted by squared entries", {"size": "(up[n]**2).sum()"}),
    ("a loop", {"rank": "next(k for k in range(1, len(s) + 1) if (s[:k]**2).sum() >= "
                "0.9 * (up[most]**2).sum())"}),
    ("what is left", {"rank": "int(((s**2).sum() - np.cumsum(s**2) > 0.1 * (s**2).sum()).sum() + 1)"
                      }),
)
