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
# # 4. Full fine-tuning against LoRA
#
# The base has read English documentation. It shall learn Python code, once with all its weights
# and once with LoRA. This is the comparison of `minilora compare`, opened up and carried further,
# on the small base so that dozens of runs fit into minutes. You will
#
# - count parameters and bytes before and after,
# - give each method its own learning rate, and see that they differ,
# - see what rank buys, from 1 to 32,
# - ask which matrices to adapt, at an equal number of parameters,
# - time a step honestly: LoRA is hardly faster here, and the FLOP count says why,
# - measure forgetting, and get the base back exactly.
#
# You need: notebook 2.

# %%
# %matplotlib inline
import tempfile

import numpy as np

import minilora as ml
from minilora.lab import bench, compare, interact, plots
from minilora.lab.counting import linear_flops, training_flops

STEPS = 150
base = ml.load_base("small")
data = compare.Data.for_context(base.config.context_length)
code_before = ml.evaluate(base, data.code_held_out)
docs_before = ml.evaluate(base, data.docs_held_out)
print(f"{base.num_parameters():,} parameters; nats per character on held-out text: "
      f"docs {docs_before:.3f}, code {code_before:.3f}")

# %% [markdown]
# ## One replacement, and the count before and after

# %%
model = ml.load_base("small")
print(f"trainable before: {model.num_parameters(trainable_only=True):>8,}")
model.freeze()
print(f"after freezing:   {model.num_parameters(trainable_only=True):>8,}")
ml.replace_linear_with_lora(model, rank=8, alpha=16, rng=0)
trainable = model.num_parameters(trainable_only=True)
print(f"after replacing:  {trainable:>8,}  ({trainable / base.num_parameters():.1%} of the base)")
d = base.config.d_model
assert trainable == base.config.n_layers * 8 * (4 * (d + d) + 2 * (d + 4 * d))
print(model.h[0].attn.q_proj)

# %% [markdown]
# Since $B = 0$, nothing has changed for the input, not by a single bit:

# %%
ids, targets = data.code_held_out[0]
assert np.array_equal(model(ids), base(ids))
print("logits identical:", np.array_equal(model(ids), base(ids)))

# %% [markdown]
# ## Each method at its own learning rate
#
# A fair comparison gives each method the learning rate that suits it. 150 steps of AdamW with
# batches of 16, warm-up and a cosine; the same batches for everyone.


# %%
def run(rank, learning_rate, alpha=None, targets=None, seed=0):
    settings = compare.Settings(base="small", alpha=alpha, target_modules=targets)
    model, _ = compare.prepare(settings, rank, seed)
    try:
        history = compare.fine_tune(model, data, learning_rate, STEPS, seed,
                                    validate_every=STEPS)
    except FloatingPointError as error:
        print(error)
        return model, None, float("nan")
    return model, history, history.validation_losses[-1]


rates = {"full": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
         "LoRA r=8": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)}
runs = {
    name: {lr: run(None if name == "full" else 8, lr)[1:] for lr in values}
    for name, values in rates.items()
}
curves = {name: {lr: loss for lr, (_, loss) in runs[name].items()} for name in runs}
best = {name: min(curve, key=curve.get) for name, curve in curves.items()}
for name, curve in curves.items():
    print(f"{name:9}" + "".join(f"  {lr:g}: {loss:.3f}" for lr, loss in curve.items())
          + f"   best {best[name]:g}")
assert best["LoRA r=8"] > best["full"]
low, high = best["full"], best["LoRA r=8"]
assert curves["full"][low] < curves["LoRA r=8"][low]
assert curves["LoRA r=8"][high] < curves["full"][high]
plots.learning_rate_curves(curves, code_before, "loss on held-out code\n(nats per character)")

# %% [markdown]
# Two U-shaped curves, and LoRA's lies to the right: its best rate (the number below each curve) is
# several times higher. So the verdict depends on the rate: at the best one of full fine-tuning,
# full wins; at LoRA's best, LoRA does. A cross at the top is a run that ended off the chart.
#
# Why higher? The first step of AdamW moves every trained number by the learning rate. In full
# fine-tuning that is every entry of $W$. With LoRA it is $B$, and $B$ reaches the weight through
# $s\,A$, whose entries are below $2/\sqrt{64}$ for an input 64 wide. How much of the rate arrives
# at $W$?


# %%
def first_step(rank, learning_rate=1e-2):
    """Return by how much of the learning rate one step moves each matrix (root mean square)."""
    model, _ = compare.prepare(compare.Settings(base="small"), rank, 0)
    ids, targets = data.code_held_out[0]
    _, dlogits = ml.cross_entropy(model(ids), targets)
    model.backward(dlogits)
    ml.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate,
             weight_decay=0.0).step()
    new = ml.merge_lora(model, unload=True).state_dict() if rank else model.state_dict()
    old = base.state_dict()
    return {name: np.sqrt(np.mean((new[name] - old[name]) ** 2)) / learning_rate
            for name in new if name.startswith("h.0.") and name.endswith("proj.weight")}


moved_full, moved_lora = first_step(None), first_step(8)
for name in moved_full:
    print(f"{name:24} full {moved_full[name]:.2f}, LoRA r=8 {moved_lora[name]:.2f} of the rate")
    inputs = base.state_dict()[name].shape[0]
    assert np.isclose(moved_full[name], 1.0, atol=0.05)
    assert np.isclose(moved_lora[name], 2 * np.sqrt(8 / (3 * inputs)), rtol=0.15)

# %% [markdown]
# An entry of $s A\,\Delta B$ is a sum of $r$ terms of random sign: $s\sqrt{r/(3n)}$ of the rate,
# for an $A$ drawn in $\pm 1/\sqrt{n}$. That is 0.41 for an input of 64 and 0.20 for one of 256. So
# in five of the six matrices $W$ moves 2.4 times less: a part of the factor of five between the
# best rates, not all of it. Nor is it the whole story elsewhere: by this formula the factor would
# grow with the width of the model, and Schulman et al. 2025 (*LoRA without regret*, Thinking
# Machines Lab) found about ten throughout, in far wider models.
#
# The training losses behind the points of the curve for LoRA. (In a running notebook with
# ipywidgets there is a slider.) Too low a rate is slow; too high a one is rough, and then stuck.

# %%
recorded = {lr: history for lr, (history, _) in runs["LoRA r=8"].items() if history}


def loss_at(lr):
    shown = {f"lr {other:g}": (h.steps, plots.smooth(h.losses)) for other, h in recorded.items()
             if other in (lr, best["LoRA r=8"])}
    return plots.lines(shown, "step", "training loss (nats per character)")


interact.choose(loss_at, "learning rate", list(recorded), min(recorded), max(recorded))

# %% [markdown]
# ## What rank buys

# %%
full_model, full_history, full_loss = run(None, best["full"])
full_gain = code_before - full_loss
print(f"{'method':10}{'trainable':>10}{'loss':>8}{'of full gain':>14}")
print(f"{'full':10}{base.num_parameters():>10,}{full_loss:8.3f}{1:>14.0%}")
by_rank, adapted = {}, {}
for rank in (1, 2, 4, 8, 16, 32):
    adapted[rank], _, by_rank[rank] = run(rank, best["LoRA r=8"])
    count = adapted[rank].num_parameters(trainable_only=True)
    share = (code_before - by_rank[rank]) / full_gain
    print(f"{f'LoRA r={rank}':10}{count:>10,}{by_rank[rank]:8.3f}{share:>14.0%}")
assert by_rank[32] < by_rank[8] < by_rank[2] < code_before
ranks = list(by_rank)
plots.lines(
    {"LoRA": (ranks, [by_rank[r] for r in ranks]),
     "full fine-tuning": (ranks, [full_loss] * len(ranks)),
     "before": (ranks, [code_before] * len(ranks))},
    "rank (log scale)", "loss on held-out code (nats per character)", xscale="log",
)

# %% [markdown]
# The first parameters buy most. (One learning rate for all ranks, the best of rank 8; the high
# ranks might do a little better with one of their own.) But mind the denominator: this model is 64
# wide, so rank 32 is half of full rank, and its adapters have two thirds as many parameters as the
# model. At a width of 4,096 rank 8 is one part in 512 of full rank.
#
# Does LoRA match full fine-tuning in large models? The literature does not agree at first sight:
#
# - Hu et al. 2021 (section 5) found it as good or better on RoBERTa, DeBERTa, GPT-2 and GPT-3.
# - Biderman et al. 2024 (*LoRA learns less and forgets less*, arXiv:2405.09673) taught Llama-2-7B
#   programming and mathematics. At the usual ranks LoRA learned clearly less (section 4.1). Rank
#   256 made up for most of it with 100,000 pairs of instructions and answers, not with 20 billion
#   tokens of text.
# - Schulman et al. 2025 found no difference on small and medium-sized sets of instructions and of
#   reasoning, with LoRA on *all* matrices and at its own learning rate. Where there is more to
#   learn than the adapter can hold, it falls behind.
#
# So it is a question of how much there is to learn for how many parameters. From English to Python
# is much, and 18,432 numbers are few: here LoRA comes close and does not match. (One seed.)
#
# Loss curves on the way, for the training batches. The bumps that they share are hard batches:
# everyone gets the same ones.

# %%
histories = {"full": full_history} | {
    f"LoRA r={rank}": run(rank, best["LoRA r=8"])[1] for rank in (2, 8)
}
plots.lines({name: (h.steps, plots.smooth(h.losses)) for name, h in histories.items()},
            "step", "training loss (nats per character, mean of 15)")

# %% [markdown]
# ## Which matrices? An equal budget for attention and MLP
#
# A block has four (64, 64) matrices in attention and two (64, 256) in the MLP. Rank $r$ costs
# $512r$ parameters on the first four and $640r$ on the other two, so rank 10 there equals rank 8
# here, and either equals rank $40/9$ on all six: 4 is the nearest below.

# %%
budget = {
    "attention, r=10": (10, ("attn.*",)),
    "q and v only, r=20": (20, ("q_proj", "v_proj")),
    "MLP, r=8": (8, ("up_proj", "down_proj")),
    "all six, r=4": (4, None),
}
placed = {}
for name, (rank, targets) in budget.items():
    model, _, loss = run(rank, best["LoRA r=8"], targets=targets)
    placed[name] = (code_before - loss) / full_gain
    print(f"{name:20}{model.num_parameters(trainable_only=True):>8,} trainable, loss {loss:.3f}")
assert min(placed["MLP, r=8"], placed["all six, r=4"]) > placed["q and v only, r=20"]
plots.bars(placed, "share of full fine-tuning's gain", form="{:.0%}", baseline=1.0)

# %% [markdown]
# The paper adapted attention only, and within it recommends $q$ and $v$. Here, with the parameter
# count held equal (the last bar has a tenth less), the MLP, which holds two thirds of the weights,
# should not be left out. Schulman et al. 2025 found the same in large models. One seed and one
# learning rate for all: take the order of the middle bars with a grain of salt.
#
# ## Where the bytes go
#
# AdamW keeps two numbers for each trainable one, and each has a gradient: 12 bytes a trainable
# parameter in float32, on top of the 4 of the weight. With the base frozen those 12 are needed for
# $A$ and $B$ only. And a task on disk is $A$ and $B$.

# %%
settings = compare.Settings(base="small", steps=STEPS)
with tempfile.TemporaryDirectory() as folder:
    comparison = compare.compare(settings, folder, progress=False)
print(compare.table(comparison))
for item in comparison["runs"]:
    assert item["training_bytes"] == 12 * item["trainable"]
plots.where_the_bytes_go(comparison)

# %% [markdown]
# What comes on top is what forward keeps for backward. Let us count that as well, for one batch of
# 16:


# %%
def kept(value):
    """Yield the arrays in what modules keep, however deep in tuples."""
    if isinstance(value, tuple):
        for item in value:
            yield from kept(item)
    elif isinstance(value, np.ndarray):
        yield value


def kept_bytes(model, ids):
    model(ids)
    arrays = [a for _, module in model.named_modules() for a in kept(module._cache)]
    # Two modules may keep one array: q, k and v share their input.
    return sum({a.__array_interface__["data"][0]: a.nbytes for a in arrays}.values())


batch = data.code_held_out[0][0][:16]
for name, model in (("full", ml.load_base("small")),
                    ("LoRA r=8", ml.replace_linear_with_lora(ml.load_base("small"), 8, 16))):
    print(f"{name:9} keeps {kept_bytes(model, batch) / 1e6:.1f} MB for backward")

# %% [markdown]
# Nearly the same for both, and at this size several times all the bars above. Every layer's input
# is still needed, now for the gradients of $A$ and $B$. (LoRA also keeps $xA$, which is thin.) So
# the memory of the *process* hardly falls here. The claim is about gradients and moments, and these
# grow with the model, not with the batch.
#
# ## Is it faster?
#
# Backward of a linear layer has two products, $dx$ and $dW$, each as dear as forward. LoRA saves
# $dW$: at most a third of the work. Then it adds the thin products, two in forward and four in
# backward. For a square layer of width $d$ the ratio of FLOPs is $2/3 + 2r/d$:

# %%
widths = np.array([16, 32, 64, 128, 256, 768, 4096, 12288])
ratio = {}
for r in (2, 8, 32):
    wide = widths[widths >= r]
    flops = [linear_flops(int(w), int(w), 1, r) / linear_flops(int(w), int(w), 1) for w in wide]
    ratio[f"r = {r}"] = wide, flops
for w in (32, 64, 768):
    print(f"width {w}: r=8 needs {linear_flops(w, w, 1, 8) / linear_flops(w, w, 1):.2f} "
          "of the FLOPs of full fine-tuning")
assert round(linear_flops(768, 768, 1, 8) / linear_flops(768, 768, 1), 2) == 0.69
assert round(linear_flops(32, 32, 1, 8) / linear_flops(32, 32, 1), 2) == 1.17
ratio["no difference"] = (widths, np.ones(len(widths)))
ratio["two thirds"] = (widths, np.full(len(widths), 2 / 3))
plots.lines(ratio, "width d (log scale)", "FLOPs with LoRA / FLOPs without", xscale="log")

# %% [markdown]
# Now the clock, on one thread, the two methods taking turns; and the FLOPs of the whole step by
# this formula, attention's products included, beside it. (These models have an output matrix of
# their own, adapted as well.)

# %%
for size in ("XS", "S", "M"):
    config, batch = bench.config_and_batch(size)
    full_ms, lora_ms = bench.median_ms(
        [bench.minilora_step(size, lora=False), bench.minilora_step(size, lora=True)], 4.0
    )
    flops = training_flops(config, batch, 8) / training_flops(config, batch)
    print(f"{size:2} (d = {config.d_model:3}): LoRA r=8 takes {lora_ms / full_ms:.2f} of full "
          f"fine-tuning's time, and {flops:.2f} of its FLOPs")

# %% [markdown]
# A little faster at best, and never by the factor by which the parameters shrink: every activation
# is still computed, forward and back, and only the gradient of $W$ and its update fall away. The
# clock need not follow the formula: part of the time goes into other things than products. Nobody
# should choose LoRA for speed at this size; even for the largest models the floor is two thirds.
#
# ## Forgetting, and the way back
#
# What has happened to the documentation that the base could read?

# %%
rows = {"base": docs_before, "full": ml.evaluate(full_model, data.docs_held_out)}
for rank in (2, 8, 32):
    rows[f"LoRA r={rank}"] = ml.evaluate(adapted[rank], data.docs_held_out)
for name, loss in rows.items():
    print(f"{name:10} loss on held-out docs {loss:.3f}  ({loss - docs_before:+.3f})")
assert all(loss > docs_before for name, loss in rows.items() if name != "base")
plots.bars(rows, "loss on held-out docs (nats per character)", baseline=docs_before)

# %% [markdown]
# Both forget. It is often said that LoRA forgets less; but it has also *learned* less, and the
# fair question is how much is forgotten at an equal loss on code. So compare runs of 30, 60, 120
# and 250 steps, each method at its best learning rate and at a third of it. Every point is a run of
# its own, from the base (the star) to the end of its own schedule. A line joins runs of one method
# and rate; it is not the path of one training.


# %%
LENGTHS = (30, 60, 120, 250)


def ends(rank, learning_rate):
    points = []
    for steps in LENGTHS:
        model, _ = compare.prepare(compare.Settings(base="small"), rank, 0)
        history = compare.fine_tune(model, data, learning_rate, steps, 0,
                                    validate_every=steps)
        docs = ml.evaluate(model, data.docs_held_out)
        points.append((history.validation_losses[-1], docs))
    return tuple(zip(*points, strict=True))


trade = {
    f"{name}, lr {lr:.2g}": ends(rank, lr)
    for name, rank, lr in [("full", None, best["full"]), ("full", None, best["full"] / 3),
                           ("LoRA r=8", 8, best["LoRA r=8"]),
                           ("LoRA r=8", 8, best["LoRA r=8"] / 3)]
}
for name, rate in best.items():
    high, low = (trade[f"{name}, lr {lr:.2g}"] for lr in (rate, rate / 3))
    assert max(low[1]) < min(high[1]), "the lower rate forgets less, at any length"
for name, (_, docs) in trade.items():
    print(f"{name:20} docs {docs_before:.3f} ->"
          + "".join(f"  {loss:.3f} ({n})" for loss, n in zip(docs, LENGTHS, strict=True)))
figure = plots.lines(trade, "loss on held-out code (nats per character)",
                     "loss on held-out docs (nats per character)")
figure.axes[0].plot([code_before], [docs_before], "k*", markersize=12)
for x, y, steps in zip(*trade[f"full, lr {best['full']:.2g}"], LENGTHS, strict=True):
    figure.axes[0].annotate(steps, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
figure

# %% [markdown]
# Further left is better code, further down is less forgotten; the numbers are steps. The best rates
# alone would tell a story about the two methods. The other two spoil it: at a third of the rate
# *either* method forgets less, in every run, for a little less gained on code. The number of steps
# matters less: 30 of them at the best rate cost about as much as 250. At this size (and with one
# seed) the learning rate decides more than the method does. Biderman et al. 2024 (section 4.3) saw
# both methods on about the same curve as well, LoRA at its end of less learned and less forgotten.
#
# What LoRA *does* guarantee is the way back: the base was never touched, so taking the adapter off
# undoes everything, in memory and at once. Full fine-tuning wrote over the base. Its way back is to
# load the file again, if somebody kept it.

# %%
restored = ml.remove_lora(adapted[32])
docs_restored = ml.evaluate(restored, data.docs_held_out)
original = base.state_dict()
identical = all(np.array_equal(a, original[name]) for name, a in restored.state_dict().items())
print(f"docs: base {docs_before!r}\n  removed  {docs_restored!r}")
print("all weights identical:", identical)
assert identical and docs_restored == docs_before

# %% [markdown]
# ## Questions
#
# 1. What happens to LoRA's U if you change $\alpha$ from $2r$ to $r$? Say what you expect, then
#    try: `run` takes `alpha`.
# 2. Which parameters does full fine-tuning change that LoRA at rank 32 never does? (Notebook 2 had
#    a number for what they are worth.)
# 3. GPT-3 has a width of 12,288. How small a share of a matrix is rank 4 there, and what is
#    $2/3 + 2r/d$?
# 4. At which width does rank 8 break even in FLOPs?
# 5. You must serve 1,000 tasks. How many bytes do you store with full fine-tuning, and how many
#    with one base and 1,000 adapters of r = 8? Then the same for a model 100 times as wide, with as
#    many layers. (Count the matrices of the blocks only.)
