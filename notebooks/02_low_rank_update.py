# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. The low-rank update
#
# Fine-tuning changes a weight matrix: $W$ becomes $W + \Delta W$. LoRA (Hu et al. 2021,
# arXiv:2106.09685) bets that a $\Delta W$ of low rank is enough, and writes it as a product of
# two thin matrices, $\Delta W = s\,AB$. In this notebook you will
#
# - see what rank is, and what the singular value decomposition says about it,
# - look at a real $\Delta W$ and judge the bet for yourself,
# - find out why one factor starts at zero and the other does not,
# - meet $\alpha$ and the three ways of scaling,
# - derive the two gradients of LoRA from the one you know, $dW$.
#
# You need: notebook 1.

# %%
# %matplotlib inline
import numpy as np

import minilora as ml
from minilora.lab import compare, interact, plots

rng = np.random.default_rng(0)

# %% [markdown]
# ## Rank, with pictures
#
# A matrix of rank 1 is one column times one row: every row is a multiple of one row. A matrix
# of rank $r$ is a sum of $r$ such products. The SVD, $M = \sum_i \sigma_i u_i v_i^\top$ with
# $\sigma_1 \ge \sigma_2 \ge \dots$, finds the best ones in order: the first $r$ terms are the
# closest matrix of rank $r$, and what is missing has the size $\sqrt{\sigma_{r+1}^2 + \dots}$ in
# the Frobenius norm, the root of the sum of squares (Eckart and Young 1936).

# %%
u, v = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))
ring = np.exp(-30 * (np.hypot(u, v) - 0.6) ** 2)
picture = ring - np.exp(-20 * ((u - 0.3) ** 2 + (v + 0.2) ** 2)) + 0.4 * (u > v)
U, sigma, Vt = np.linalg.svd(picture)


def best(r):
    return (U[:, :r] * sigma[:r]) @ Vt[:r]


plots.matrices({"original, 4096 numbers": picture}
               | {f"rank {r}, {r * (64 + 64)} numbers": best(r) for r in (1, 3, 8)})

# %% [markdown]
# Move the slider and look at what is missing. (Without ipywidgets, and on a page of stored outputs,
# there are two pictures instead.)

# %%
interact.choose(
    lambda r: plots.matrices({
        f"rank {r}": best(r), "what is missing": picture - best(r),
        f"the term number {r}": sigma[r - 1] * np.outer(U[:, r - 1], Vt[r - 1]),
    }), "rank", range(1, 17), 2, 6,
)

# %%
for r in (1, 3, 8, 16):
    error = np.linalg.norm(picture - best(r))
    tail = np.sqrt((sigma[r:] ** 2).sum())
    print(f"rank {r:2d}: error {error:.4f} = tail of the singular values {tail:.4f}")
    assert np.isclose(error, tail)

# %% [markdown]
# A product $AB$ with $A: (n, r)$ and $B: (r, m)$ has rank at most $r$, and any matrix of rank $r$
# can be written so. It takes $r(n + m)$ numbers instead of $nm$:

# %%
for d, r in [(64, 8), (768, 8), (768, 1), (12288, 8)]:
    print(f"({d}, {d}), rank {r}: {2 * d * r:>11,} of {d * d:>11,} numbers, {2 * r / d:.2%}")

# %% [markdown]
# ## Is a real update of low rank?
#
# The small base model of this library has read English documentation. Let us fine-tune *all* of
# its weights on Python code and look at the singular values of what changed.

# %%
data = compare.Data.for_context(64)
before = ml.load_base("small")
full = ml.load_base("small")
history = compare.fine_tune(full, data, compare.FULL_LEARNING_RATE, 150)
print(f"loss on held-out code: {history.validation_losses[0]:.3f} -> "
      f"{history.validation_losses[-1]:.3f}")

names = ["h.0.attn.q_proj", "h.0.attn.v_proj", "h.1.mlp.up_proj", "h.1.mlp.down_proj"]
old, new = before.state_dict(), full.state_dict()
deltas = {name: new[f"{name}.weight"] - old[f"{name}.weight"] for name in names}
deltas |= {f"noise {shape}": rng.standard_normal(shape) for shape in ((64, 64), (64, 256))}
curves = {}
for name, delta in deltas.items():
    s = np.linalg.svd(delta, compute_uv=False)
    share = np.cumsum(s**2) / (s**2).sum()
    curves[name] = np.arange(1, len(s) + 1), share
    print(f"{name:18} first 8 of {len(s)} directions hold {share[7]:.0%} of the squared norm")
assert min(curves[name][1][7] for name in names[:2]) > curves["noise (64, 64)"][1][7]
assert min(curves[name][1][7] for name in names[2:]) > curves["noise (64, 256)"][1][7]
plots.lines(curves, "rank kept", "share of the squared norm of ΔW")

# %% [markdown]
# The curves rise steeply at first, then slowly: each is more concentrated than noise of its shape
# (the matrices of the MLP are 64 by 256), but *not* of low rank in the strict sense. LoRA does not
# need it to be. The question is not how well a low-rank matrix copies this $\Delta W$, but whether
# there is *some* low-rank update that does the job nearly as well; notebook 4 measures that. As a
# first hint, keep only the best rank-$r$ part of the update of every projection matrix, and see
# how much of the gain survives. (Embeddings, biases and layer norms keep all of their update. What
# that alone is worth is the bar at rank 0.)

# %%
gain = history.validation_losses[0] - history.validation_losses[-1]
survives = {}
for r in (0, 1, 4, 16, 64):
    state = dict(new)
    for name, array in new.items():
        if name.endswith("proj.weight"):
            U, s, Vt = np.linalg.svd(array - old[name], full_matrices=False)
            state[name] = old[name] + (U[:, :r] * s[:r]) @ Vt[:r]
    cut = ml.load_base("small")
    cut.load_state_dict(state)
    loss = ml.evaluate(cut, data.code_held_out)
    survives[f"rank {r}"] = (history.validation_losses[0] - loss) / gain
assert np.isclose(survives["rank 64"], 1.0, atol=1e-3)
plots.bars(survives, "share of the gain kept", form="{:.0%}", baseline=1.0)

# %% [markdown]
# ## Why B = 0 and A is not
#
# With $y = xW + s\,xAB$ the gradients (derived below) are $dA = s\,x^\top (G B^\top)$ and $dB =
# s\,(xA)^\top G$. Look at the factor inside: $dA$ contains $B$, and $dB$ contains $A$.
#
# - *Both zero*: both gradients are zero. Nothing ever moves.
# - *Both random*: the model starts from $W + s\,AB$, which is not the base any more.
# - *B zero, A random*: starts exactly at the base, $dA = 0$ for one step, but $dB \ne 0$.
#
# All three on the small model, 100 steps each:


# %%
def start(kind):
    model = ml.replace_linear_with_lora(ml.load_base("small"), rank=8, alpha=16, rng=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.A") and kind == "both zero":
            parameter.data[...] = 0.0
        if name.endswith("lora.B") and kind == "both random":
            bound = parameter.shape[0] ** -0.5
            parameter.data[...] = rng.uniform(-bound, bound, parameter.shape)
    return model


ids, targets = data.code_held_out[0]
curves, starts = {}, {}
for kind in ("B zero, A random", "both zero", "both random"):
    model = start(kind)
    _, dlogits = ml.cross_entropy(model(ids), targets)
    model.backward(dlogits)
    lora = model.h[0].attn.q_proj.lora
    da, db = np.abs(lora.A.grad).max(), np.abs(lora.B.grad).max()
    print(f"{kind:17} largest in dA: {da:.1e}   largest in dB: {db:.1e}")
    run = compare.fine_tune(model, data, compare.LORA_LEARNING_RATE, 100,
                            validate_every=20)
    curves[kind] = run.validation_steps, run.validation_losses
    starts[kind] = run.validation_losses[0]
base_loss = ml.evaluate(before, data.code_held_out)
assert starts["B zero, A random"] == starts["both zero"]
assert curves["both zero"][1][-1] == starts["both zero"], "stuck"
assert starts["both random"] > base_loss + 0.5
plots.lines(curves, "step", "loss on held-out code (nats per character)")

# %% [markdown]
# The flat line is the stuck one. The perturbed start has to repair first what it broke. (Which
# factor is the zero one is a choice: $A = 0$ and $B$ random also starts at the base.)
#
# ## What alpha is
#
# The update is $s\,AB$. Three conventions for $s$ are in use:
#
# | `scaling` | $s$ | where |
# |---|---|---|
# | `"alpha"` | $\alpha$ | first tutorials |
# | `"alpha/r"` | $\alpha / r$ | the LoRA paper, PEFT; the default here |
# | `"alpha/sqrt(r)"` | $\alpha / \sqrt{r}$ | rsLoRA, Kalajdzievski 2023 |
#
# $\alpha$ works like a learning rate for the branch. Dividing by $r$ is meant to let you change
# $r$ without tuning everything again: $AB$ is a sum of $r$ products, so more rank means more of
# them. How well does each keep that promise? Same $\alpha$, same learning rate, growing rank;
# we look at how far one of the matrices has moved after the same 30 steps, and at the loss.

# %%
ranks = (1, 4, 16, 64)
moved, losses = {}, {}
for scaling in ("alpha", "alpha/r", "alpha/sqrt(r)"):
    size, final = [], []
    for r in ranks:
        model = ml.replace_linear_with_lora(ml.load_base("small"), r, 4, scaling=scaling, rng=0)
        run = compare.fine_tune(model, data, 5e-3, 30)
        size.append(np.linalg.norm(model.h[0].mlp.up_proj.lora.delta_weight()))
        final.append(run.validation_losses[-1])
    moved[scaling], losses[scaling] = (ranks, size), final
print("loss after 30 steps at rank " + "".join(f"{r:>8}" for r in ranks))
for scaling, final in losses.items():
    print(f"{scaling:27}" + "".join(f"{loss:8.3f}" for loss in final))
plots.lines(moved, "rank r", "size of the update, |s AB|", xscale="log", yscale="log",
            title="first block's up_proj after 30 steps, alpha = 4")

# %% [markdown]
# The three lines meet at $r = 1$, where they are the same thing, and fan out from there. With
# $s = \alpha$ the update grows with the rank, with $\alpha/r$ it shrinks, and $\alpha/\sqrt{r}$ is
# the flattest of the three: that is the argument of the rsLoRA paper. The losses say what it means.
# With $\alpha/r$ they hardly change, which is handy for tuning, but a higher rank is not put to use
# in so few steps. With $\alpha/\sqrt{r}$ they improve with the rank.
#
# A common habit is to raise $\alpha$ with the rank, $\alpha = 2r$ under $\alpha/r$. That makes $s =
# 2$ for every rank, so it *is* the first convention, with another constant. `minilora compare` does
# so; at its small ranks it works well.
#
# ## A second convention, rarely mentioned: the size of A
#
# $A$ is drawn from Kaiming's uniform distribution, in $\pm 1/\sqrt{\text{fan in}}$. The fan-in of
# $A$ is the width of the input, and `loralib` and PEFT see it so. Code that hands an $(n, r)$
# tensor to PyTorch's initialiser gets $r$ as the fan-in, since PyTorch reads the *last* axis:

# %%
usual = ml.LoRALayer(768, 768, 16, 16, rng=0)
tutorial = ml.LoRALayer(768, 768, 16, 16, rng=0)
tutorial.A.data[...] = rng.uniform(-1, 1, (768, 16)) / np.sqrt(16)  # fan-in taken to be the rank
ratio = tutorial.A.data.std() / usual.A.data.std()
print(f"spread of A: {usual.A.data.std():.4f} and {tutorial.A.data.std():.4f}, "
      f"{ratio:.1f} times, sqrt(768 / 16) = {np.sqrt(768 / 16):.1f}")
assert np.isclose(ratio, np.sqrt(768 / 16), rtol=0.02)

# %% [markdown]
# So whoever copies $\alpha$ or a learning rate from one code base to the other gets another run.
#
# ## The gradients, derived from dW
#
# The weight that the input sees is $W' = W + s\,AB$, and notebook 1 gave its gradient: $dW =
# x^\top G$. Now the chain rule, one step further. $W'_{kj} = W_{kj} + s \sum_q A_{kq} B_{qj}$, so
#
# $$ dA_{kq} = \sum_j dW_{kj}\, s B_{qj} \;\Rightarrow\; dA = s\, dW B^\top \qquad
#    dB_{qj} = \sum_k s A_{kq}\, dW_{kj} \;\Rightarrow\; dB = s\, A^\top dW $$
#
# Computed like this, $dW$ would have to be formed, as large as $W$ itself. Put $dW = x^\top G$ in
# and move the brackets, and it never is: $dA = s\, x^\top (G B^\top)$, $dB = s\, (xA)^\top G$.
# Every intermediate result has $r$ columns. That is the whole trick in `minilora/lora/layer.py`.

# %%
linear = ml.Linear(6, 5, rng=0, dtype=np.float64)
x, dout = rng.standard_normal((40, 6)), rng.standard_normal((40, 5))
linear(x)
linear.backward(dout)
dW = linear.weight.grad.copy()  # of full fine-tuning

layer = ml.LinearWithLoRA(linear, rank=2, alpha=6, rng=0)
A, B, s = layer.lora.A, layer.lora.B, layer.lora.scale
B.data[...] = rng.standard_normal(B.shape)  # at B = 0 a wrong dA could not be told from a right one
linear.weight.data -= layer.lora.delta_weight()  # so that W' is the W above, and dW the same
layer(x)
layer.backward(dout)
print("dA = s dW B^T:", np.allclose(A.grad, s * dW @ B.data.T))
print("dB = s A^T dW:", np.allclose(B.grad, s * A.data.T @ dW))
assert np.allclose(A.grad, s * dW @ B.data.T) and np.allclose(B.grad, s * A.data.T @ dW)
report = ml.gradcheck(layer, x)
print(report)
assert report.passed

# %% [markdown]
# ## W stays frozen
#
# No gradient is computed for $W$, no memory is held for it, and after any amount of training it
# is what it was, to the last bit.

# %%
model = ml.load_base("small")
state = model.state_dict()
ml.replace_linear_with_lora(model, rank=8, alpha=16, rng=0)
compare.fine_tune(model, data, compare.LORA_LEARNING_RATE, 50)
ids, targets = data.code_held_out[0]
_, dlogits = ml.cross_entropy(model(ids), targets)
model.backward(dlogits)
print("gradient of a frozen weight:", model.h[0].attn.q_proj.linear.weight.grad)
same = [np.array_equal(array, state[name.replace(".linear.", ".")])
        for name, array in model.state_dict().items() if ".lora." not in name]
print(f"{sum(same)} of {len(same)} base arrays are bit-identical after training")
assert all(same) and len(same) == len(state)

# %% [markdown]
# ## Questions
#
# 1. $A$ is $(n, r)$ and $B$ is $(r, m)$. Replace $A$ by $AQ$ and $B$ by $Q^{-1}B$ for any
#    invertible $Q$. What changes in the model's output? And in the gradients of $A$ and $B$?
# 2. With $A = 0$ and $B$ random, which gradient is zero at the first step?
# 3. You trained with $r = 8$, $\alpha = 16$ under `"alpha/r"`. Which $\alpha$ gives the same $s$
#    under `"alpha/sqrt(r)"`?
# 4. For which $r$ does $AB$ have as many numbers as a square $W$ of width $d$?
# 5. Could you train the singular values of $W$ alone? How many parameters would that be, and
#    which updates could it not express?
