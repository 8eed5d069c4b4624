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
# # 9. What goes wrong
#
# A laboratory of failures. They are common ones; here each is made to happen, looked at, explained
# in a few sentences, and repaired. In this notebook you will
#
# - start LoRA in two wrong ways,
# - change the rank and forget the scale; train more than is stored; aim at layers that do not
#   exist,
# - use the learning rate of one method for the other; copy a weight decay in another unit,
# - merge twice, merge in half precision, add adapters up the wrong way, and lose a head.
#
# You need: notebooks 2, 4 and 5. Before you read on after a plot, say yourself what went wrong.
#
# Every run has one seed. The LoRA that is right is trained from two random $A$'s, to show what a
# seed does; with other batches as well it is some thousandths of a nat (notebook 8). What goes
# wrong below is well above that.

# %%
# %matplotlib inline
import numpy as np

import minilora as ml
from minilora.data.batches import random_batches
from minilora.lab import compare, plots
from minilora.lab.classify import accuracy, prose_or_code, shuffled_batches
from minilora.lora.surgery import lora_layers

STEPS, RATE = 80, compare.LORA_LEARNING_RATE
data = compare.Data.for_context(64)
before = ml.evaluate(ml.load_base("small"), data.code_held_out)


def lora(rank=8, alpha=16, rng=0, **options):
    return ml.replace_linear_with_lora(ml.load_base("small"), rank, alpha, rng=rng, **options)


def train(model, learning_rate=RATE, weight_decay=0.0, clip_norm=1.0):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ml.AdamW(parameters, learning_rate, weight_decay=weight_decay)
    history = ml.fit(
        model, random_batches(data.code, 16, 64, rng=0), optimizer, STEPS,
        schedule=ml.cosine_schedule(learning_rate, STEPS, 5), clip_norm=clip_norm,
        progress=False,
    )
    return history.steps, plots.smooth(history.losses, 9)


def held_out(model):
    return ml.evaluate(model, data.code_held_out)


def curves(named):
    return plots.lines(named, "step", "training loss (nats per character)")


def mean_size(model):  # of the updates
    return np.mean([np.linalg.norm(layer.delta_weight()) for _, layer in lora_layers(model)])


good, other = lora(), lora(rng=1)
right, _ = train(good), train(other)
print(f"on held-out code: the base {before:.3f}, a LoRA that is right {held_out(good):.3f}, "
      f"from another random A {held_out(other):.3f}")
assert abs(held_out(good) - held_out(other)) < 0.01

# %% [markdown]
# ## 1. Both factors zero
#
# "It does not learn anything."

# %%
stuck = lora()
for _, layer in lora_layers(stuck):
    layer.lora.A.data[...] = 0.0
result = train(stuck)
print(f"held out: before {before!r}, after {held_out(stuck)!r}")
assert all(not layer.delta_weight().any() for _, layer in lora_layers(stuck))
assert held_out(stuck) == before
curves({"A random, B = 0": right, "A = 0, B = 0": result})

# %% [markdown]
# $dA = s\,x^\top (G B^\top)$ holds $B$, and $dB = s\,(xA)^\top G$ holds $A$. With both at zero,
# both gradients are zero, at this step and at every later one. The weights never change, and the
# held-out loss is the base's to the last digit. The line in the plot moves nevertheless, since each
# step has another batch: look at a held-out loss. **Repair**: leave $A$ random; only $B$ is zero.
#
# ## 2. Both factors random
#
# "It starts out much worse than the base."

# %%
perturbed = lora()
rng = np.random.default_rng(0)
for _, layer in lora_layers(perturbed):
    r, m = layer.lora.B.shape
    layer.lora.B.data[...] = rng.uniform(-(r**-0.5), r**-0.5, (r, m))
start = held_out(perturbed)
result = train(perturbed)
print(f"at the start: base {before:.3f}, both random {start:.3f}")
assert start > before + 0.3
curves({"B = 0": right, "both random": result})

# %% [markdown]
# The update is not zero at first, so it is not the base that is being fine-tuned but a base with
# noise added to every weight. Training has to undo that first, and in few steps it does not quite.
# **Repair**: $B = 0$. It costs nothing, since $A$ is random already and $dB \ne 0$.
#
# ## 3. The rank was changed, and the scale forgotten
#
# "Rank 8 trained well; rank 32 is much worse." The scale here is alpha itself, as in the first
# tutorials, and alpha is left as it was.

# %%
ranks = (2, 8, 32)
alphas = {"alpha": 8, "alpha/r": 64, "alpha/sqrt(r)": 8 * 8**0.5}  # the same scale, 8, at rank 8
results, sizes = {}, {}
for scaling, alpha in alphas.items():
    results[scaling], sizes[scaling] = [], []
    for r in ranks:
        model = lora(r, alpha, scaling=scaling)
        train(model, clip_norm=None)
        results[scaling].append(held_out(model))
        sizes[scaling].append(mean_size(model))
        print(f"scale = {scaling:13} alpha {alpha:4.1f}, rank {r:2}: loss "
              f"{results[scaling][-1]:.3f}, mean norm of an update {sizes[scaling][-1]:.1f}")
grown = {scaling: norms[2] / norms[0] for scaling, norms in sizes.items()}
print("update at rank 32, of that at rank 2: "
      + ", ".join(f"{scaling} {times:.1f}" for scaling, times in grown.items()))
assert results["alpha"][2] > results["alpha"][1] + 0.1
assert max(results["alpha/r"][2], results["alpha/sqrt(r)"][2]) < results["alpha"][2] - 0.1
assert grown["alpha"] > 3 and 0.6 < grown["alpha/r"] < 1 < grown["alpha/sqrt(r)"] < 2
plots.lines({f"scale = {name}": (ranks, losses) for name, losses in results.items()}, "rank",
            "loss on held-out code\n(nats per character)", xscale="log")

# %% [markdown]
# AdamW's steps in $B$ do not depend on the size of the gradient, so they are no smaller at a high
# rank, and $AB$ is a sum of $r$ products: with more of them, the same steps change the weights
# more. A scale that falls as the rank rises takes that back. Here alpha / r takes back a little too
# much, and alpha / sqrt(r) not quite enough; in notebook 2, at a smaller scale and after fewer
# steps, alpha / sqrt(r) keeps the size of the update the flattest of the three. Neither is exact,
# and both are far better than none. **Repair**: one of the two; where the scale is alpha itself,
# lower alpha as the rank rises.
#
# ## 4. More is trained than A and B
#
# "It learns well. But the adapter's file does not give the same model again."

# %%
leaky = lora()
for name, parameter in leaky.named_parameters():
    if name.startswith(("wte", "wpe")) or ".ln_" in name:
        parameter.requires_grad = True
train(leaky)
only_factors = ml.attach(ml.load_base("small"), ml.Adapter(ml.get_adapter(leaky).layers))
moved = [n for n, p in ml.load_base("small").named_parameters()
         if n in leaky.state_dict() and not np.array_equal(p.data, leaky.state_dict()[n])]
print(f"trained {leaky.num_parameters(True):,} parameters, not {good.num_parameters(True):,}; "
      f"moved besides A and B: {', '.join(moved[:4])}, ...")
assert held_out(only_factors) > held_out(leaky) + 0.02
plots.bars(
    {"as trained": held_out(leaky), "A and B on the base": held_out(only_factors),
     "trained with a frozen base": held_out(good)},
    "loss on held-out code\n(nats per character)", form="{:.3f}", baseline=before,
)

# %% [markdown]
# The matrices were frozen, but embeddings and norms were trained along, so $A$ and $B$ belong to a
# base that exists nowhere any more. Nothing complains while training. **Repair**: look at the
# number of trainable parameters before you start, every time. (`replace_linear_with_lora` freezes
# all, and `save_adapter` stores whatever else is trainable, so that it is not lost; here we left
# it out by hand.)
#
# ## 5. Targets that match nothing
#
# "LoRA has no effect." A name with a typo, or a list from another architecture, and nothing is
# wrapped.

# %%
for target in ("q_porj", "c_attn", "query"):
    try:
        lora(target_modules=[target])
    except ValueError as error:
        print("-", error)


silent = ml.load_base("small").freeze()
for path, module in list(silent.named_modules()):  # what a tool does that does not check
    if isinstance(module, ml.Linear) and path.endswith(("q_porj", "c_attn")):
        parent = dict(silent.named_modules())[path.rpartition(".")[0]]
        setattr(parent, path.rpartition(".")[2], ml.LinearWithLoRA(module, 8, 16))
counts = {"targets that exist": good.num_parameters(True),
          "targets that do not": silent.num_parameters(True)}
plots.bars(counts, "trainable parameters", form="{:,.0f}")

# %% [markdown]
# With other tools the run goes through, the loss stays at the base's, and it is put down to "LoRA
# does not work here". **Repair**: an error, as above, that lists what there is and guesses what
# was meant; and again the number of trainable parameters.
#
# ## 6. The learning rate of the other method
#
# "LoRA learns far too slowly", and: "full fine-tuning makes things worse before it makes
# them better".

# %%
full_rate = compare.FULL_LEARNING_RATE
slow, wild, full = lora(), ml.load_base("small"), ml.load_base("small")
results = {
    f"LoRA at {RATE:g}": right, f"LoRA at {full_rate:g}": train(slow, full_rate),
    f"full at {full_rate:g}": train(full, full_rate),
    f"full at {RATE:g}": train(wild, RATE),
}
print(f"held out: LoRA {held_out(good):.3f} and {held_out(slow):.3f}, "
      f"full {held_out(full):.3f} and {held_out(wild):.3f}")
print(f"LoRA's rate is {RATE / full_rate:.0f} times as high as that of full fine-tuning")
assert held_out(slow) > held_out(good) + 0.02 and held_out(wild) > held_out(full) + 0.02
assert np.isclose(RATE / full_rate, 5)
curves(results)

# %% [markdown]
# $B$ starts at zero and is multiplied by small numbers: it takes many small steps before the
# product amounts to anything. In full fine-tuning every weight is moved directly, and a step that
# is right for $B$ is far too large for $W$. **Repair**: each method its own sweep.
#
# How much higher LoRA's rate should be depends on the model, on $\alpha$, on how $A$ is drawn, and
# on the number of steps. Here the sweep of notebook 4 says 5 times. The LoRA paper has 40 times for
# GPT-3, with both tuned (table 12: 2e-4 against 5e-6). Biderman et al. 2024 (arXiv:2405.09673,
# section 4.7) recommend an order of magnitude for instruction tuning, and Schulman et al. 2025
# ("LoRA Without Regret") find 10 times in sweeps over 14 models. So begin LoRA's sweep about ten
# times higher than the other, and make it wide.
#
# ## 7. Weight decay in another unit
#
# "The effect of the fine-tuning fades." A weight decay of 0.1 was copied from another program.

# %%
results = {"no decay": right}
print(f"no decay: loss {held_out(good):.3f}, mean norm of an update {mean_size(good):.2f}")
decayed = {}
for name, decay in (("0.1 times the rate", 0.1), ("0.1 at each step", 0.1 / RATE)):
    decayed[name] = lora()
    results[name] = train(decayed[name], weight_decay=decay)
    print(f"{name}: weight_decay {decay:g}, loss {held_out(decayed[name]):.3f}, mean norm of an "
          f"update {mean_size(decayed[name]):.2f}")
small, large = decayed.values()
lost = (held_out(large) - held_out(good)) / (before - held_out(good))
print(f"lost of the gain: {lost:.0%}")
assert abs(held_out(small) - held_out(good)) < 0.01
assert lost > 0.15 and mean_size(large) < 0.4 * mean_size(good)
curves(results)

# %% [markdown]
# `weight_decay` is multiplied by the learning rate here, as in PyTorch: 0.1 takes 0.1% off every
# number in a step, which is not felt in so few. In the AdamW paper (Loshchilov and Hutter 2019,
# algorithm 2, line 12) it is multiplied by the schedule alone, and so it is in programs that follow
# the paper to the letter, such as Composer's `DecoupledAdamW`. There 0.1 takes off 10%, for which
# we have to write 10. Each step at the peak rate then loses a tenth of what was learned before. For
# the weights of a whole model, decay is a preference for small numbers; for $A$ and $B$ it is a
# pull towards $AB = 0$, *the base*: it works against the fine-tuning itself. **Repair**: find out
# the unit; and little or no decay on $A$ and $B$, unless staying close to the base is what you
# want.
#
# ## 8. Merged twice
#
# "After merging, half of what it learned is lost." A script merged, saved, and merged again when
# it was loaded.

# %%
weights = {path: layer.delta_weight() for path, layer in lora_layers(good)}
outcome = {"base": before}
for times in (1, 2, 3):
    model = ml.load_base("small")
    for path, module in model.named_modules():
        if path in weights:
            module.weight.data += times * weights[path]
    outcome[f"merged {times} x"] = held_out(model)
assert outcome["merged 2 x"] > outcome["merged 1 x"] + 0.05
ml.merge_lora(good)
try:
    ml.merge_lora(good)
except RuntimeError as error:
    print(error)
ml.unmerge_lora(good)
plots.bars(outcome, "loss on held-out code\n(nats per character)", form="{:.3f}", baseline=before)

# %% [markdown]
# Once is right, twice overshoots by the whole update. Nothing in a merged weight by itself,
# without the base, tells that something was added to it. **Repair**: a layer that knows whether it
# is merged and refuses, as above; and `merge` with `unload=True` before saving, so that there is
# no adapter left that could be merged again.
#
# ## 9. Merged in half precision
#
# "The base is not the base any more." Merging was done in float16, again and again, for swapping
# tasks.

# %%
drift, swaps = {"float16": [], "float32": []}, (1, 10, 30, 100)
for dtype in drift:
    w = {path: layer.linear.weight.data.astype(dtype) for path, layer in lora_layers(good)}
    update = {path: delta.astype(dtype) for path, delta in weights.items()}
    for i in range(1, max(swaps) + 1):
        for path in w:  # a different task each time: the update in another place and size
            shift = np.roll(update[path], i, axis=0) * np.asarray(1 + 0.01 * i, dtype)
            w[path] = (w[path] + shift) - shift
        if i in swaps:
            drift[dtype].append(np.mean([
                np.linalg.norm(w[path].astype(np.float64) - layer.linear.weight.data)
                / np.linalg.norm(layer.linear.weight.data) for path, layer in lora_layers(good)]))
print({dtype: [f"{x:.1e}" for x in xs] for dtype, xs in drift.items()})
assert drift["float16"][-1] > 100 * drift["float32"][-1]
plots.lines({name: (swaps, values) for name, values in drift.items()}, "tasks merged and taken out",
            "distance from the base, relative", xscale="log", yscale="log")

# %% [markdown]
# Each addition rounds to the nearest number that the precision has, and subtracting does not undo
# that; the errors stay and add up. The loss would hardly notice this much; but "the base again,
# exactly" is gone, and nobody knows how far it has drifted. **Repair**: keep the base, and merge
# into a copy, or do not merge at all: `AdapterSet` swaps layers and moves no numbers.
#
# ## 10. Adapters added factor by factor
#
# "The mean of two good adapters is worse than either."

# %%
one = ml.get_adapter(good)
two = ml.get_adapter(other)
sums = {"adapter 1": held_out(good), "adapter 2": held_out(other)}
for kind in ("cat", "linear"):
    mean = ml.weighted_sum([one, two], [0.5, 0.5], kind)
    name = {"cat": "mean, exact", "linear": "mean of the factors"}[kind]
    sums[name] = held_out(ml.attach(ml.load_base("small"), mean))
assert sums["mean of the factors"] > sums["mean, exact"] + 0.05
plots.bars(sums, "loss on held-out code\n(nats per character)", form="{:.3f}", baseline=before)

# %% [markdown]
# Both adapters learned the same task from different random $A$'s. $(A_1 + A_2)(B_1 + B_2)$ has the
# cross terms $A_1 B_2$ and $A_2 B_1$, which combine the directions of one with the answers of the
# other: noise. **Repair**: put the factors side by side (`"cat"`), and compress by SVD if the rank
# is too high.
#
# ## 11. The head is lost
#
# "My classifier was good; loaded again, it is useless." (Notebook 7 has the whole story.)

# %%
training, held = prose_or_code(64, limit=2000)
model = ml.load_base("small")
model.lm_head = ml.Linear(64, 2, rng=0)
ml.replace_linear_with_lora(model, 8, 16, modules_to_save="lm_head", rng=0)
optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
ml.fit(model, shuffled_batches(training, 32), optimizer, 120, progress=False)
whole = ml.get_adapter(model)
fresh, lost = ml.load_base("small"), ml.load_base("small")
lost.lm_head = ml.Linear(64, 2, rng=1)
outcome = {
    "trained": accuracy(model, held),
    "loaded with its head": accuracy(ml.attach(fresh, whole), held),
    "loaded without": accuracy(ml.attach(lost, ml.Adapter(whole.layers)), held),
}
assert outcome["loaded with its head"] == outcome["trained"] > outcome["loaded without"] + 0.1
plots.bars(outcome, "accuracy on held-out lines", form="{:.0%}", baseline=0.5)

# %% [markdown]
# The new head was random when training began, was trained, and is in no base. A file with $A$ and
# $B$ alone does not have it. (Another random head may give anything around 50%, depending on its
# seed; this one happens to point the other way.) **Repair**: `modules_to_save`, so that the head
# is stored with the task. Then test the file, not the model in memory: load it onto a fresh base
# before you delete anything.

# %% [markdown]
# ## Questions
#
# 1. Which of these eleven would the number of trainable parameters have told you before the first
#    step? Which only a reload from disk?
# 2. In 1, what would happen with $A = 0$ and $B$ random? Try it. Is there any reason to prefer one?
# 3. In 10, both adapters learned the *same* task. Would you expect the exact mean to be better or
#    worse than each of them? Look at the bars, and explain.
# 4. Write the check that would have caught 8 in a script that only sees weight files.
