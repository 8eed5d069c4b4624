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
# - derive the two gradients of LoRA from the one you know, $dW$,
# - find out why one factor starts at zero, and whether it matters which,
# - meet $\alpha$ and the three ways of scaling.
#
# You need: notebook 1.

# %%
# %matplotlib inline
import numpy as np

import minilora as ml
from minilora.data.batches import random_batches
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
            left, s, right = np.linalg.svd(array - old[name], full_matrices=False)
            state[name] = old[name] + (left[:, :r] * s[:r]) @ right[:r]
    cut = ml.load_base("small")
    cut.load_state_dict(state)
    loss = ml.evaluate(cut, data.code_held_out)
    survives[f"rank {r}"] = (history.validation_losses[0] - loss) / gain
assert np.isclose(survives["rank 64"], 1.0, atol=1e-3)
plots.bars(survives, "share of the gain kept", form="{:.0%}", baseline=1.0)

# %% [markdown]
# ## The gradients, derived from dW
#
# The weight that the input sees is $W' = W + s\,AB$, with a fixed number $s$ (more on it below),
# and notebook 1 gave its gradient: $dW = x^\top G$. Now the chain rule, one step further. $W'_{kj}
# = W_{kj} + s \sum_q A_{kq} B_{qj}$, so
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
# ## Why B = 0 and A is not
#
# Look at the factors inside $dA = s\,x^\top (G B^\top)$ and $dB = s\,(xA)^\top G$: $dA$ contains
# $B$, and $dB$ contains $A$.
#
# - *Both zero*: both gradients are zero. Nothing ever moves.
# - *Both random*: the model starts from $W + s\,AB$, which is not the base any more.
# - *B zero, A random*: starts exactly at the base, $dA = 0$ for one step, but $dB \ne 0$.
# - *A zero, B random*: the same with the parts exchanged; we come to it below.
#
# The first three on the small model, 100 steps each:


# %%
def start(kind):
    rng = np.random.default_rng(1)  # the same B in every run
    model = ml.replace_linear_with_lora(ml.load_base("small"), rank=8, alpha=16, rng=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.A") and kind in ("both zero", "A zero, B random"):
            parameter.data[...] = 0.0
        if name.endswith("lora.B") and kind in ("both random", "A zero, B random"):
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
# The flat line is the stuck one. The perturbed start has to repair first what it broke.
#
# And $A = 0$, $B$ random? It starts at the base, too, and one might think that it makes no
# difference. Try both at several learning rates. ($B$ is drawn in $\pm 1/\sqrt{r}$, since its input
# has $r$ numbers.)

# %%
rates = (0.005, 0.01, 0.02, 0.04)
final = {}
for kind in ("B zero, A random", "A zero, B random"):
    runs = [compare.fine_tune(start(kind), data, lr, 100, validate_every=100) for lr in rates]
    final[kind] = [run.validation_losses[-1] for run in runs]
    print(f"{kind}: " + "".join(f"  lr {lr:g}: {loss:.3f}"
                                for lr, loss in zip(rates, final[kind], strict=True)))
worse = np.subtract(final["A zero, B random"], final["B zero, A random"])
print("A zero is worse by" + "".join(f"  lr {lr:g}: {difference:+.3f}"
                                   for lr, difference in zip(rates, worse, strict=True)))
assert worse[0] < 0.02 < 0.04 < worse[3] == worse.max() and worse[1:].min() > 0.01
plots.lines({kind: (rates, losses) for kind, losses in final.items()},
            "peak learning rate (log scale)", "loss on held-out code\n(nats per character)",
            xscale="log")

# %% [markdown]
# $A = 0$ is worse, least at the lowest rate and most at the highest: $B = 0$ tolerates larger
# ones. This is one seed, and the smaller differences may come out otherwise with another. But
# Hayou, Ghosh and Yu 2024 (*The impact of initialization on LoRA finetuning dynamics*,
# arXiv:2406.08447) derive it for wide networks and find it with RoBERTa and Llama: the two starts
# look alike, and $B = 0$ allows larger learning rates and is better on average. So $B$ is the zero
# one.
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
# $\alpha$ is often called a learning rate for the branch. How far that is true depends on the
# optimizer, and on the first $A$. Put $A' = \sqrt{s}\,A$ and $B' = \sqrt{s}\,B$: the branch is
# $xA'B'$. Adam moves $A$ and $B$ by steps whose size does not depend on the scale of their
# gradients, so it moves $A'$ and $B'$ by $\sqrt{s}$ times as much. *Four* times $\alpha$ is thus
# *twice* the learning rate, with an $A'$ that is twice as large at the start. In plain gradient
# descent the gradients have another $\sqrt{s}$ in them, and four times $\alpha$ is four times the
# rate. To see it, raise $\alpha$ to four times and take the rest back:


# %%
def after_30_steps(optimizer, alpha, lr, size_of_A=1.0):
    model = ml.replace_linear_with_lora(ml.load_base("small"), 8, alpha, rng=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.A"):
            parameter.data *= size_of_A
    trained = optimizer([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    ml.fit(model, random_batches(data.code, 16, 64, rng=0), trained, 30, progress=False)
    return ml.evaluate(model, data.code_held_out)


for optimizer, lr, part in ((ml.AdamW, 0.01, 1 / 2), (ml.SGD, 0.2, 1 / 4)):
    losses = [after_30_steps(optimizer, 16, lr), after_30_steps(optimizer, 64, lr * part, 1 / 2),
              after_30_steps(optimizer, 64, lr * part)]
    print(f"{optimizer.__name__:5}  alpha 16, lr {lr:g}: {losses[0]:.4f}   "
          f"alpha 64, lr {lr * part:g}, A halved: {losses[1]:.4f}, not halved: {losses[2]:.4f}")
    assert abs(losses[1] - losses[0]) < 0.001 < 0.005 < abs(losses[2] - losses[0])

# %% [markdown]
# Nothing changes if $A$ is scaled along, and something does if it is not. So by itself $\alpha$ is
# *not* a learning rate: it also sets how large $A$ is at the start, compared with what it learns.
#
# Dividing by $r$ is meant to let you change $r$ without tuning everything again: $AB$ is a sum of
# $r$ products, so more rank means more of them. How well does each keep that promise? Same
# $\alpha$, same learning rate, growing rank; we look at how far one of the matrices has moved after
# the same 30 steps, and at the loss.

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
# in so few steps. With $\alpha/\sqrt{r}$ they improve with the rank. To keep a learning rate that
# suited a low rank from being too high for a high one, either is enough (notebook 9 repairs it with
# $\alpha/r$); to get something for the higher rank as well, take $\alpha/\sqrt{r}$.
#
# A common habit is to raise $\alpha$ with the rank, $\alpha = 2r$ under $\alpha/r$. That makes $s =
# 2$ for every rank, so it *is* the first convention, with another constant. `minilora compare` does
# so; at its small ranks it works well.
#
# ## A second convention, rarely mentioned: the size of A
#
# The paper (section 4.1) draws $A$ from a Gaussian. Its code, `loralib`, draws it from Kaiming's
# uniform distribution, in $\pm \sqrt{6 / ((1 + a^2)\,\text{fan in})}$ with $a = \sqrt{5}$, which is
# $\pm 1/\sqrt{\text{fan in}}$, and so do PEFT and this library. (With $a = 0$, the usual choice for
# ReLU, it would be 2.4 times as wide.) The fan-in of $A$ is the width of the input, and `loralib`
# and PEFT see it so. Code that hands an $(n, r)$ tensor to PyTorch's initialiser gets $r$ as the
# fan-in, since PyTorch reads the *last* axis:

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
# 4. For which $r$ do $A$ and $B$ together have as many numbers as a square $W$ of width $d$?
# 5. Could you train the singular values of $W$ alone? How many parameters would that be, and
#    which updates could it not express?
