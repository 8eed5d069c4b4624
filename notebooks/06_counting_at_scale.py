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
# # 6. Counting at scale
#
# How many parameters, bytes and FLOPs does LoRA save? None of that needs a GPU, or even the model:
# the shapes are enough. In this notebook you will
#
# - count parameters from our tiny GPT up to GPT-3, by a formula checked against built models,
# - recompute the tables of the LoRA paper, and find two numbers and a sentence that do not add up,
# - predict the bytes of a training step, and find exactly those in a real one,
# - see where the bytes go as models grow, and where LoRA begins to save work.
#
# You need: notebook 4. Sources of the sizes: `minilora.accounting.PUBLISHED` names one for each.

# %%
# %matplotlib inline
import numpy as np

import minilora as ml
from minilora.lab import interact, plots
from minilora.lab.counting import (
    PUBLISHED,
    adapter_h_parameters,
    gpt_architecture,
    linear_flops,
    measured_memory,
    prefix_parameters,
    training_flops,
    training_memory,
)

# %% [markdown]
# ## Parameters
#
# A linear layer from $n$ to $m$ has $nm$ weights and $m$ biases. LoRA adds $r(n + m)$. In a
# transformer of width $d$ a block has four matrices $(d, d)$ in attention and two between $d$ and
# $4d$ in the MLP: $12 d^2$ in all, and LoRA of rank $r$ on all of them $18 dr$. Check the formula
# against a model that was built:

# %%
base = ml.load_base()
by_formula = gpt_architecture(base.config)
print(f"formula {by_formula.num_parameters:,}, built {base.num_parameters():,}")
assert by_formula.num_parameters == base.num_parameters()
ml.replace_linear_with_lora(base, 8, 16)
print(f"LoRA r=8 on every matrix: formula {by_formula.lora_parameters(8):,}, "
      f"built {base.num_parameters(trainable_only=True):,}")
assert by_formula.lora_parameters(8) == base.num_parameters(trainable_only=True)

# %% [markdown]
# So we can count what nobody could build here. LoRA of rank 8 on the query and value projections,
# the paper's usual choice:

# %%
Q_V = ["q_proj", "v_proj"]
sizes = {"our base": by_formula} | PUBLISHED
print(f"{'model':20}{'parameters':>18}{'LoRA r=8 on q, v':>18}{'share':>9}")
for name, model in sizes.items():
    total, lora = model.num_parameters, model.lora_parameters(8, Q_V)
    print(f"{name:20}{total:>18,}{lora:>18,}{lora / total:>9.3%}")
shown = ["our base", "smollm2-135m", "gpt2-small", "gpt2-medium", "gpt2-xl", "llama-2-7b",
         "gpt3-175b"]
plots.named_points(
    {name: (sizes[name].linears["q_proj"][0],
            sizes[name].lora_parameters(8, Q_V) / sizes[name].num_parameters) for name in shown},
    "width of the model", "share that LoRA trains",
)

# %% [markdown]
# The share falls as models grow *wider*: their matrices grow with $d^2$, the thin ones with $d$.
#
# Which matrices are adapted makes a difference. Pick some, and the count follows. (Without
# ipywidgets there are two pictures.)

# %%
CHOICES = {
    "q, v": Q_V, "q, k, v, o": [*Q_V, "k_proj", "o_proj"], "MLP": ["up_proj", "down_proj"],
    "all": ["*_proj"],
}


def adapted(choice):
    model = PUBLISHED["gpt2-small"]
    counts = {name: 0 for name in model.linears}
    for name in counts:
        if choice == "all" or name in CHOICES[choice]:
            counts[name] = model.lora_parameters(8, [name])
    total = sum(counts.values())
    assert total == model.lora_parameters(8, CHOICES[choice])
    return plots.bars(counts, "parameters of A and B", form="{:,.0f}",
                      title=f"GPT-2 small, r=8 on {choice}: {total:,}")


interact.choose(adapted, "adapted", list(CHOICES), "q, v", "all")

# %% [markdown]
# A count that you may meet, in appendix E of Raschka's *Build a Large Language Model (From
# Scratch)*: GPT-2 small with a head for two classes, LoRA of rank 16 on every linear layer, the
# head included.

# %%
small = ml.GPTConfig.gpt2("small")
arch, d = gpt_architecture(small), small.d_model
everything = arch.num_parameters + 2 * d + 2
trained = arch.lora_parameters(16) + 16 * (d + 2)
print(f"all {everything:,}; trained {trained:,}")
assert (everything, trained) == (124_441_346, 2_666_528)

# %% [markdown]
# ## The tables of the paper, recomputed
#
# Hu et al. 2021 (arXiv:2106.09685) print how many parameters each method trains. Their formula for
# LoRA is $2 \cdot L_{LoRA} \cdot d \cdot r$, for $L_{LoRA}$ adapted matrices (section 5.1). For
# adapters, `Adapter^H`, it is $L (2dr + r + d)$. Prefix-embedding tuning trains the embeddings of
# new tokens, $d (l_p + l_i)$ numbers: $l_p$ "prefix" tokens before the prompt and $l_i$ "infix"
# tokens appended to it. What comes out, beside what is printed, in millions. (GPT-3 has 96 layers
# with two adapters each, 192. Adapters also train norms, which the rows for GPT-3 leave out.
# $l_p = 256$ and $l_i = 8$ are from appendix D.4.)

# %%
gpt3 = PUBLISHED["gpt3-175b"]
ALL_FOUR = [*Q_V, "k_proj", "o_proj"]
tables = [
    ("RoBERTa base, LoRA r=8 on q, v", PUBLISHED["roberta-base"].lora_parameters(8, Q_V), 0.3),
    ("RoBERTa large, LoRA r=8 on q, v", PUBLISHED["roberta-large"].lora_parameters(8, Q_V), 0.8),
    ("DeBERTa XXL, LoRA r=16 on q, v",
     PUBLISHED["deberta-v2-xxlarge"].lora_parameters(16, Q_V), 4.7),
    ("GPT-2 medium, LoRA r=4 on q, v", PUBLISHED["gpt2-medium"].lora_parameters(4, Q_V), 0.35),
    ("GPT-2 large, LoRA r=4 on q, v", PUBLISHED["gpt2-large"].lora_parameters(4, Q_V), 0.77),
    ("GPT-3, LoRA r=1 on q, v", gpt3.lora_parameters(1, Q_V), 4.7),
    ("GPT-3, LoRA r=8 on q, v", gpt3.lora_parameters(8, Q_V), 37.7),
    ("GPT-3, LoRA r=64 on q, v", gpt3.lora_parameters(64, Q_V), 301.9),
    ("GPT-3, Adapter-H r=1", adapter_h_parameters(192, 12288, 1), 7.1),
    ("GPT-3, Adapter-H r=8", adapter_h_parameters(192, 12288, 8), 40.1),
    ("GPT-3, prefix embedding, 256 + 8", prefix_parameters(12288, 256 + 8), 3.2),
]
wrong = []
for what, count, printed in tables:
    digits = len(str(printed).partition(".")[2])
    fits = round(count / 1e6, digits) == printed
    cut_off = int(count / 1e6 * 10**digits) / 10**digits == printed
    wrong += [] if fits or cut_off else [what]
    remark = "" if fits else "   (cut off, not rounded)" if cut_off else "   <- does not follow"
    print(f"{what:34}{count:>13,}  printed {printed:>6}M{remark}")
assert wrong == ["GPT-2 medium, LoRA r=4 on q, v", "GPT-2 large, LoRA r=4 on q, v"]

# %% [markdown]
# Two printed numbers do not follow from the paper's own formula: 0.35M where $2 \cdot 48 \cdot
# 1024 \cdot 4$ is 0.39M, and 0.77M where it is 0.74M. Nothing hangs on them, but it is worth
# knowing that a table can be checked. (A reader who checks everything will find more: DeBERTa's
# 4.7M needs $r = 16$, as in the released scripts and above; table 10 of the appendix says $r =
# 8$.) A third slip is in a sentence: appendix D.4 equates 37.7M with $r = 2$ on four matrices.

# %%
for r in (2, 4):
    print(f"GPT-3, r={r} on all four: {gpt3.lora_parameters(r, ALL_FOUR):,}")
assert gpt3.lora_parameters(4, ALL_FOUR) == gpt3.lora_parameters(8, Q_V) == 37_748_736

# %% [markdown]
# The best known claim: a checkpoint of 350 GB becomes one of 35 MB ($r = 4$ on query and value, in
# float16, section 4.2).

# %%
before, after = 2 * gpt3.num_parameters, 2 * gpt3.lora_parameters(4, Q_V)
print(f"{before / 1e9:.0f} GB -> {after / 1e6:.1f} MB: {before / after:,.0f} to 1")
print(f"= {after / 2**20:.0f} MiB, which the paper rounds to 35 MB and 10,000 to 1")
print(f"a hundred tasks: {100 * before / 1e12:.0f} TB, or {(before + 100 * after) / 1e9:.0f} GB")

# %% [markdown]
# ## Bytes of a training step
#
# Four kinds of things are in memory: all weights; a gradient for each parameter that is trained;
# two moments of AdamW for each of those; and the *activations*, what forward keeps for backward.
# `training_memory` predicts all four from the configuration, and `measured_memory` counts the
# arrays that a real step has. They agree to the byte:

# %%
def one_step(config, batch, time, rank):
    model = ml.GPT(config)
    if rank:
        ml.replace_linear_with_lora(model, rank, 2 * rank, rng=0)
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, time))
    _, dlogits = ml.cross_entropy(model(ids), ids)
    model.backward(dlogits)
    optimizer.step()
    model(ids)  # so that what forward keeps is there to be counted
    return measured_memory(model, optimizer)


for title, config, batch, time, rank in [
    ("our base, full", base.config, 16, 128, None), ("our base, LoRA r=8", base.config, 16, 128, 8),
    ("GPT-2 small, LoRA r=8", small, 2, 64, 8),
]:
    measured, predicted = one_step(config, batch, time, rank), training_memory(
        config, batch, time, rank)
    print(f"{title:22} " + ", ".join(f"{k} {v:,}" for k, v in vars(measured).items()))
    assert measured == predicted

# %% [markdown]
# That was GPT-2 small, 124 million parameters, one real training step in NumPy. Its gradients and
# moments take 16 MB here; in full fine-tuning they take 1.5 GB. For the large ones we have to
# believe the formula. All with a batch of 16 times 128 tokens:

# %%
models = {"our base": base.config} | {
    f"GPT-2 {size}": ml.GPTConfig.gpt2(size) for size in ("small", "xl")
}
parts = ["weights", "gradients", "moments", "activations"]
shares = {}
for name, config in models.items():
    for method, rank in (("full", None), ("LoRA", 8)):
        memory = training_memory(config, 16, 128, rank)
        shares[f"{name},\n{method}"] = vars(memory)
        print(f"{name:12} {method}: " + ", ".join(
            f"{part} {vars(memory)[part] / 1e6:,.1f}" for part in parts)
            + f"; in all {memory.total / 1e6:,.1f} MB")
of_full = {name: sum(shares[name.replace("LoRA", "full")].values()) for name in shares}
plots.grouped_bars(
    {part: {name: values[part] / of_full[name] for name, values in shares.items()}
     for part in parts}, "bytes, as a share of all\nthat full fine-tuning needs", form="{:.0%}",
)

# %% [markdown]
# Look at the activations. LoRA on *every* matrix does not make them smaller: the input of each
# layer is still needed, now for $dA$ and $dB$. (On query and value alone, the inputs of the other
# layers fall away.) At our size, and at any size with a large batch, activations are most of the
# memory, and LoRA saves little of the *total*. What it saves are gradients and moments, $12$ bytes
# for each parameter that is not trained: little here, but 18.6 GB, half of all, for GPT-2 XL. So
# say "LoRA saves $n$ bytes of gradients and moments", not "LoRA needs $n$ times less memory".

# %%
xl = ml.GPTConfig.gpt2("xl")
full, lora = training_memory(xl, 16, 128), training_memory(xl, 16, 128, 8)
saved = full.gradients + full.moments - lora.gradients - lora.moments
held = full.weights + full.gradients + full.moments
print(f"GPT-2 XL: {saved / 1e9:.1f} GB saved of {held / 1e9:.1f} GB without activations")
assert 18.55e9 < saved < 18.65e9
assert abs(lora.activations / full.activations - 1) < 0.1
q_v = training_memory(xl, 16, 128, 8, Q_V).activations
print(f"activations: {full.activations / 1e9:.1f} GB full, {lora.activations / 1e9:.1f} GB LoRA on "
      f"all matrices, {q_v / 1e9:.1f} GB on q and v")
assert q_v < 0.75 * full.activations

# %% [markdown]
# ## FLOPs: where LoRA begins to save work
#
# A frozen layer needs two products instead of three: $y$ and $dx$, but not $dW$. That is the "two
# thirds". But LoRA adds six thin ones. For a square layer of width $d$ and $N$ rows,
#
# $$\frac{\text{LoRA}}{\text{full}} = \frac{4 N d^2 + 12 N d r}{6 N d^2} = \frac23 + \frac{2r}{d},$$
#
# which is below 1 only where $d > 6r$.

# %%
widths = [16, 32, 48, 64, 128, 256, 768, 1600, 4096, 12288]
curves = {
    f"r = {r}": (widths, [linear_flops(d, d, 1, r) / linear_flops(d, d, 1) for d in widths])
    for r in (1, 8, 64)
}
for d in (32, 64, 768):
    print(f"d = {d:4}, r = 8: {linear_flops(d, d, 1, 8) / linear_flops(d, d, 1):.2f}")
assert linear_flops(48, 48, 1, 8) == linear_flops(48, 48, 1)
plots.lines(curves | {"full": (widths, [1.0] * len(widths))}, "width of the layer",
            "FLOPs of a step, LoRA / full", xscale="log", yscale="log")

# %% [markdown]
# In a whole model there is more: attention's own products are the same for both methods, and a tied
# head needs no $dW$ with LoRA. Per training step of our base and of GPT-2 small, at full context:

# %%
for name, config in (("our base", base.config), ("GPT-2 small", small)):
    full, lora = (training_flops(config, 1, rank) for rank in (None, 8))
    print(f"{name:12} full {full / 1e9:8.2f} GFLOP, LoRA r=8 {lora / 1e9:8.2f}: {lora / full:.2f}")

# %% [markdown]
# At best a third is saved, whatever the size. Notebook 4 has the times.

# %% [markdown]
# ## Questions
#
# 1. Why does the share of LoRA's parameters fall like $1/d$ when a model is made wider, and not at
#    all when it is made deeper?
# 2. A model card says: Llama-2-7B, LoRA on q, k, v and o, 8.4M trainable parameters. Which rank is
#    that?
# 3. GPT-2 XL with LoRA, batch 16 times 128: what would you do first to make it need less memory?
# 4. The ratio of FLOPs tends to 2/3 for wide layers. In which model of this page is LoRA of rank 64
#    more work than full fine-tuning?
