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
# # 5. Adapters are files
#
# LoRA's practical promise is that a task is a small file beside one base. In this notebook you will
#
# - save a task, open its file byte by byte, and put it back,
# - train three tasks on one base and compare three small files with three whole models,
# - swap tasks, take them off, and run a batch in which every row has its own,
# - merge, and see what float16 does to an update that is merged into it,
# - add tasks up: exactly, and in the way that looks right and is not,
# - shrink an adapter by SVD, and get one out of two checkpoints.
#
# You need: notebooks 2 and 4.

# %%
# %matplotlib inline
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.data.batches import random_batches, sequential_batches
from minilora.data.corpus import module_source, split
from minilora.data.tokenizer import plain
from minilora.lab import compare, plots
from minilora.lab.counting import PUBLISHED
from minilora.lora.surgery import lora_layers

STEPS, LENGTH = 150, 64
folder = Path(tempfile.mkdtemp())
tokenizer = ml.CharTokenizer()

# %% [markdown]
# ## Three tasks
#
# Three modules of the standard library, each in a style of its own: decimal arithmetic, mock
# objects for tests, and tar archives. Sections chosen by a checksum of their text are held out, a
# tenth on average; in a single module it may be more or less.

# %%
MODULES = {"decimal": "_pydecimal", "mock": "unittest.mock", "tar": "tarfile"}
training, held_out = {}, {}
for name, module in MODULES.items():
    parts = [tokenizer.encode(part) for part in split(plain(module_source(module)))]
    training[name] = parts[0]
    held_out[name] = sequential_batches(parts[1], 32, LENGTH)
    print(f"{name:8} {len(parts[0]):>7,} characters to train on, {len(parts[1]):>6,} held out")


def train(model, task, learning_rate, steps=STEPS):
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    return ml.fit(
        model, random_batches(training[task], 16, LENGTH, rng=0), optimizer, steps,
        schedule=ml.cosine_schedule(learning_rate, steps, 20), clip_norm=1.0,
        progress=False,
    )


def losses(model):
    return {name: ml.evaluate(model, batches) for name, batches in held_out.items()}


# %% [markdown]
# An `AdapterSet` holds one base and any number of named tasks. One of them is active at a time, or
# none. We train a task of rank 8 on each module; for comparison the whole model, too.

# %%
tasks = ml.AdapterSet(ml.load_base("small"))
base_state = tasks.model.state_dict()
table = {"base": losses(tasks.model)}
full = {}
for seed, name in enumerate(MODULES):
    tasks.add(name, rank=8, alpha=16, rng=seed)
    tasks.set_active(name)
    train(tasks.model, name, compare.LORA_LEARNING_RATE)
    table[f"LoRA {name}"] = losses(tasks.model)
    full[name] = ml.load_base("small")
    train(full[name], name, compare.FULL_LEARNING_RATE)
    table[f"full {name}"] = losses(full[name])
tasks.set_active(None)


def show(table):
    print(f"{'':22}" + "".join(f"{name:>10}" for name in held_out))
    for row, values in table.items():
        print(f"{row:22}" + "".join(f"{value:10.3f}" for value in values.values()))


print("loss on held-out text (nats per character)")
show(table)
tasks.set_active("tar")
whole, thin = full["tar"].num_parameters(), tasks.model.num_parameters(trainable_only=True)
tasks.set_active(None)
print(f"trained: {thin:,} numbers with LoRA, {whole:,} without, {whole / thin:.1f} times as many")
assert round(whole / thin) == 6
for name in MODULES:  # each is best on its own module
    assert table[f"LoRA {name}"][name] == min(table[f"LoRA {other}"][name] for other in MODULES)
    assert all(table[f"LoRA {other}"][name] < table["base"][name] for other in MODULES)

# %%
plots.grouped_bars(
    {row: table[row] for row in ["base", *(f"LoRA {name}" for name in MODULES)]},
    "loss on held-out text\n(nats per character)",
)

# %% [markdown]
# Every adapter is best on its own module, and every one is better than the base on the other two
# as well: they are all Python. Full fine-tuning is better still on its own module, with six times
# as many numbers.
#
# ## What is in the file
#
# `save` writes a folder of two files, in the layout of PEFT. The numbers are in the safetensors
# format, which is simple enough to read by hand: eight bytes that say how long the header is, the
# header in JSON, and then nothing but the numbers.

# %%
tasks.save("tar", folder / "tar")
raw = (folder / "tar" / "adapter_model.safetensors").read_bytes()
length = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8 : 8 + length])
print(f"{len(raw):,} bytes: 8 + {length:,} of header + {len(raw) - 8 - length:,} of numbers")
for name, entry in list(header.items())[1:3]:
    print(name, entry)
begin, end = header[name]["data_offsets"]
by_hand = np.frombuffer(raw[8 + length + begin : 8 + length + end], "<f4").reshape(entry["shape"])
tasks.set_active("tar")
assert np.array_equal(by_hand, tasks.model.h[0].attn.q_proj.lora.B.data.T)

# %% [markdown]
# The names are those of our modules behind `base_model.model.`, and the shapes are turned round:
# PyTorch keeps its weights as (out, in), so PEFT stores $A$ as $(r, n)$ and $B$ as $(m, r)$. The
# settings are in a small JSON file beside it:

# %%
config = json.loads((folder / "tar" / "adapter_config.json").read_text())
print({key: config[key] for key in ("peft_type", "r", "lora_alpha", "use_rslora", "bias")})

# %% [markdown]
# Three tasks on disk, and three fine-tuned models:

# %%
sizes = {}
for name in MODULES:
    tasks.save(name, folder / name)
    ml.save_checkpoint(full[name], folder / f"full-{name}" / "model.safetensors")
    for kind, path in (("LoRA", folder / name), ("full", folder / f"full-{name}")):
        sizes[f"{kind} {name}"] = compare.file_bytes(path) / 1e6
print({name: f"{size:.3f} MB" for name, size in sizes.items()})
one_base = sum(array.nbytes for array in base_state.values()) / 1e6
three_lora = sum(size for name, size in sizes.items() if name.startswith("LoRA"))
three_full = sum(size for name, size in sizes.items() if name.startswith("full"))
plots.bars({"base and 3 adapters": one_base + three_lora, "3 whole models": three_full},
           "on disk (MB)", form="{:.2f}")

# %%
gpt3 = PUBLISHED["gpt3-175b"]
everywhere, q_and_v = gpt3.lora_parameters(8), gpt3.lora_parameters(4, ["q_proj", "v_proj"])
print(f"our base weighs as much as {one_base / (three_lora / 3):.1f} adapters; "
      f"GPT-3 as {gpt3.num_parameters / everywhere:,.0f} of rank 8 on every matrix, "
      f"or {gpt3.num_parameters / q_and_v:,.0f} of rank 4 on query and value")
assert round(gpt3.num_parameters / everywhere) == 1028
assert 9_200 < gpt3.num_parameters / q_and_v < 9_300

# %% [markdown]
# At this size, the base weighs as much as six adapters of rank 8 on every matrix. At the size of
# GPT-3 it would be a thousand, and with rank 4 on query and value alone, more than nine thousand
# (notebook 6).
#
# ## Swapping, and the base untouched
#
# Switching puts other layers in the place of the base's; no number moves. With none active the
# model is the base, to the last bit:

# %%
for name in ("mock", "tar", "decimal", None):
    tasks.set_active(name)
    print(f"{name!s:8}", f"{ml.evaluate(tasks.model, held_out['tar']):.4f}")
assert all(np.array_equal(a, base_state[n]) for n, a in tasks.model.state_dict().items())

# %% [markdown]
# A server has requests for different tasks at the same time. The product with $W$ is the same for
# all of them, so it is done once for the whole batch; only the thin products are done row by row:
# $y_i = x_i W + s\,x_i A_{t(i)} B_{t(i)}$ for a row $i$ of task $t(i)$.

# %%
rows = np.concatenate([batches[0][0][:2] for batches in held_out.values()])
names = ["decimal", None, "mock", "tar", "tar", "decimal"]
mixed = tasks(rows, names)
alone = []
for row, name in zip(rows, names, strict=True):
    tasks.set_active(name)
    alone.append(tasks.model(row[None])[0])
tasks.set_active(None)
print(f"largest difference from running every row alone: {np.abs(mixed - alone).max():.1e}")
assert np.allclose(mixed, alone, atol=1e-4)

# %% [markdown]
# ## Merging
#
# $xW + s\,xAB = x(W + s\,AB)$, so an adapter can be added into the weight, and the layer costs no
# more than a plain one. Does that change the output? Only by rounding:

# %%
tasks.set_active("tar")
ids = held_out["tar"][0][0][:1, :32]
apart = tasks.model(ids)
ml.merge_lora(tasks.model)
merged = tasks.model(ids)
ml.unmerge_lora(tasks.model)
print(f"float32, merged against apart: {np.abs(merged - apart).max():.1e} "
      f"(logits up to {np.abs(apart).max():.0f})")
assert np.allclose(merged, apart, atol=1e-4)

# %% [markdown]
# `merge` keeps $W'$ beside $W$, and `unmerge` forgets it. Adding the update to $W$ itself and
# subtracting it again would be enough in exact arithmetic, but not in floating point, and the error
# would stay in the base for good:

# %%
layer = tasks.model.h[0].attn.q_proj
for dtype in ("float32", "float16"):
    weight, update = layer.linear.weight.data.astype(dtype), layer.delta_weight().astype(dtype)
    back = (weight + update) - update
    print(f"{dtype}: {np.mean(back != weight):.0%} of the numbers differ after adding and "
          f"subtracting, by up to {np.abs(back - weight).max():.1e}")
    assert not np.array_equal(back, weight)

# %% [markdown]
# **Half precision.** Models are often stored in float16, which has 11 significant bits. A number
# near 0.1 then has neighbours at a distance of 0.00006. An update smaller than half of that is
# simply gone. (Our base was stored in float16, so its own weights fit exactly.) We merge a
# hundredth, a tenth, ... of the update and ask which part of it is lost: $\|\mathrm{round}(W +
# c\,\Delta W) - W - c\,\Delta W\| / \|c\,\Delta W\|$.

# %%
scales = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
w, delta = layer.linear.weight.data.astype(np.float64), layer.delta_weight().astype(np.float64)
lost = {}
for dtype in ("float16", "float32"):
    lost[dtype] = [
        np.linalg.norm((w + c * delta).astype(dtype).astype(np.float64) - w - c * delta)
        / np.linalg.norm(c * delta) for c in scales
    ]
    print(dtype, [f"{share:.1e}" for share in lost[dtype]])
assert lost["float16"][0] > 0.3 > 0.01 > lost["float16"][-1]
plots.lines({name: (scales, share) for name, share in lost.items()},
            "size of the update, as a share of the trained one", "share of the update that is lost",
            xscale="log", yscale="log")

# %% [markdown]
# Our whole update survives float16 well, since it is large:

# %%
print(f"norm of the update / norm of the weight: {np.linalg.norm(delta) / np.linalg.norm(w):.2f}")
assert 0.02 < lost["float16"][2] < 0.2

# %% [markdown]
# A gentler fine-tuning would lose more. But norm lost is not learning lost: rounding errors
# scatter, and many of them cancel in the output. So measure what counts. $L$ is the loss on
# held-out tar text of a whole model with $c$ times the update; the share $(L_{base} - L_{merged}) /
# (L_{base} - L_{apart})$ of the gain is kept. And is it a remedy to add in float32, and to convert
# the sum once, at the end?

# %%
updates = {path: layer.delta_weight() for path, layer in lora_layers(tasks.model)}
tasks.set_active(None)


def merge_with(add, c):
    """Return the loss on tar, and the share of the update's norm that is lost."""
    model, missing, wanted = ml.load_base("small"), 0.0, 0.0
    for path, module in model.named_modules():
        if path in updates:
            w, delta = module.weight.data.copy(), np.float32(c) * updates[path]
            module.weight.data[...] = add(w, delta)
            missing += ((module.weight.data - (w.astype(np.float64) + delta)) ** 2).sum()
            wanted += (delta.astype(np.float64) ** 2).sum()
    return ml.evaluate(model, held_out["tar"]), np.sqrt(missing / wanted)


kept = {}
for c in (1e-2, 1e-3, 1e-4):
    apart, _ = merge_with(lambda w, delta: w + delta, c)  # float32: next to nothing is lost
    half, lost_norm = merge_with(lambda w, delta: w.astype("f2") + delta.astype("f2"), c)
    once, _ = merge_with(lambda w, delta: (w + delta).astype("f2"), c)
    kept[c] = lost_norm, (table["base"]["tar"] - half) / (table["base"]["tar"] - apart)
    print(f"c = {c:6g}: loss apart {apart:.6f}, added in float16 {half:.6f}, converted once "
          f"{once:.6f}; of the norm {kept[c][0]:.0%} lost, of the gain {kept[c][1]:.0%} kept")
    assert abs(half - once) < 1e-5
for c, norm, gain in ((1e-2, 0.05, 1.0), (1e-3, 0.43, 0.91), (1e-4, 0.90, 0.18)):
    assert abs(kept[c][0] - norm) < 0.05 and abs(kept[c][1] - gain) < 0.2

# %% [markdown]
# An update a hundred times smaller loses 5% of its norm in float16 and nothing of its gain. One a
# thousand times smaller loses 43% of the norm, but only 9% of the gain; of one ten thousand times
# smaller, a fifth of the gain is left. Where the sum is formed hardly matters: rounding the
# result, $W + \Delta W$, loses it, and a sum that is converted once is rounded as well. The remedy
# is to keep $A$ and $B$ *apart*, in a file of their own, where they keep all their digits.

# %% [markdown]
# ## Adding tasks up
#
# Updates are matrices, so they can be added with weights: $\Delta W = w_1 s_1 A_1 B_1 + w_2 s_2 A_2
# B_2 + \dots$ As a LoRA that is written *exactly* with the factors side by side:
#
# $$\begin{pmatrix} A_1 & A_2 \end{pmatrix} \begin{pmatrix} w_1 s_1 B_1 \\ w_2 s_2 B_2
# \end{pmatrix}$$
#
# The rank is then the sum of the ranks. It is tempting to keep the rank and add the factors,
# $(c_1 A_1 + c_2 A_2)(c_1 B_1 + c_2 B_2)$ with $c_i = \sqrt{w_i s_i}$. Multiplied out, it has what
# we wanted, and two *cross terms* $c_1 c_2 (A_1 B_2 + A_2 B_1)$ that nobody asked for: $A_1$ picks
# directions of the input for task 1, and $B_2$ answers for task 2. How large are they?

# %%
adapters = [tasks.get(name) for name in MODULES]
exact = ml.weighted_sum(adapters, [1 / 3] * 3, "cat")
factors = ml.weighted_sum(adapters, [1 / 3] * 3, "linear")
wanted = {name: f.delta_weight() for name, f in exact.layers.items()}
cross = {name: np.linalg.norm(factors.layers[name].delta_weight() - wanted[name])
         / np.linalg.norm(wanted[name]) for name in wanted}
print(f"rank {exact.layers['h.0.attn.q_proj'].rank} exact, "
      f"{factors.layers['h.0.attn.q_proj'].rank} factor-wise")
print(f"cross terms / wanted update: {min(cross.values()):.2f} to {max(cross.values()):.2f}")
assert min(cross.values()) > 0.3

# %% [markdown]
# Larger than the thing itself. With three tasks there are six cross terms for three wanted ones,
# and if all nine were equally large and had nothing to do with each other, the ratio would be
# $\sqrt{6/3} = 1.41$. The other way to a lower rank is the SVD (notebook 2), whose error is known
# beforehand. All of them on the three texts:

# %%
small, errors = ml.compress(exact, 8)
print(f"rank 24 -> 8: error {min(errors.values()):.2f} to {max(errors.values()):.2f} of the update")
sums = {"base": table["base"]}
plain_model = ml.load_base("small")
for name, adapter in (("mean, exact (r=24)", exact), ("mean, SVD to r=8", small),
                      ("mean, factors (r=8)", factors)):
    sums[name] = losses(ml.attach(plain_model, adapter))
    ml.remove_lora(plain_model)
sums["the task's own"] = {name: table[f"LoRA {name}"][name] for name in MODULES}
show(sums)
for name in MODULES:
    assert sums["mean, exact (r=24)"][name] < sums["base"][name]
    assert sums["mean, exact (r=24)"][name] < sums["mean, factors (r=8)"][name]
plots.grouped_bars(sums, "loss on held-out text\n(nats per character)")

# %% [markdown]
# The exact mean is better than the base on all three, if not as good as each task's own. The
# factor-wise one is worse than the exact one everywhere, and the SVD to the same rank 8 is a better
# way to save space: it drops what is smallest instead of adding what is wrong.
#
# ## An adapter out of two checkpoints
#
# Somebody has fine-tuned a whole model, and there are only the two checkpoints. The best LoRA of
# rank $r$ for that is the truncated SVD of $W_{tuned} - W_{base}$, matrix by matrix.

# %%
base = ml.load_base("small")
curve, reference = {}, {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for r in (1, 2, 4, 8, 16, 32, 64):
        adapter, _ = ml.extract_lora(base, full["tar"], r)
        curve[r] = ml.evaluate(ml.attach(base, adapter), held_out["tar"])
        ml.remove_lora(base)
print(caught[0].message)
ranks = list(curve)
plots.lines(
    {"extracted from full fine-tuning": (ranks, list(curve.values())),
     "base": (ranks, [table["base"]["tar"]] * len(ranks)),
     "LoRA trained at r=8": (ranks, [table["LoRA tar"]["tar"]] * len(ranks)),
     "full fine-tuning": (ranks, [table["full tar"]["tar"]] * len(ranks))},
    "rank kept", "loss on held-out tar\n(nats per character)", xscale="log",
)

# %%
assert curve[64] < curve[1] and table["full tar"]["tar"] < curve[64]
print({r: round(loss, 3) for r, loss in curve.items()})

# %% [markdown]
# Even at rank 64, which is full rank here, it does not reach the fine-tuned model: the warning
# says why. Fine-tuning also moved embeddings, biases and norms, and those are not in the adapter.
# And at rank 8, *training* a LoRA of that rank is better than cutting one out of a full
# fine-tuning, which never tried to fit into rank 8.

# %%
assert table["LoRA tar"]["tar"] < curve[8]

# %% [markdown]
# ## Questions
#
# 1. Two adapters of ranks 4 and 8 are added exactly, layer by layer. What is the rank of the sum,
#    at most? Can it be smaller? Give an example.
# 2. `tasks(rows, names)` does one product with $W$ for all rows. With 100 tasks of rank 8, a batch
#    of 100 rows at width 768, how do the multiply-adds of the thin products compare with those of
#    $W$?
# 3. Why is there no cross term in the exact sum? Multiply the block matrices out.
# 4. An adapter was trained on a base in float32; the base is served in float16, and the adapter
#    is kept apart. Which error is there, and which is not?
