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
# # 3. A tiny transformer, opened up
#
# The model that we fine-tune is GPT-2 in miniature: the same parts in the same order, with
# 822,016 parameters instead of 124 million, reading characters instead of word pieces. In this
# notebook you will
#
# - walk one sentence through it and see every shape on the way,
# - draw what its attention heads look at,
# - check the gradient of the whole thing,
# - let it write, and see what temperature does.
#
# You need: notebook 1, and a rough idea of what a transformer is.

# %%
# %matplotlib inline
import numpy as np

import minilora as ml
from minilora import plots
from minilora.functional import softmax
from minilora.text import load_tokens, sequential_batches

model = ml.load_base("base").eval()
tokenizer = ml.CharTokenizer()
print(model.config)
print(f"{model.num_parameters():,} parameters")

# %% [markdown]
# ## Text in, text out
#
# The vocabulary is fixed: newline and the 95 printable ASCII characters. A token is a character,
# an id is its place in that list.

# %%
text = "The statement returns a value."
ids = tokenizer.encode(text)[None]  # (B, T) with a batch of one
print(ids)
assert tokenizer.decode(ids[0]) == text

# %% [markdown]
# ## The tree
#
# Printing the model shows the modules by name. One of the four blocks:

# %%
print(model.h[0])

# %% [markdown]
# Where do the parameters sit? Almost all of them in matrices of the blocks, and of those two
# thirds in the MLP. The output matrix is the embedding used a second time (tied weights), so it
# costs nothing.

# %%
parts = {"embeddings": ("wte", "wpe"), "attention": ("attn",), "MLP": ("mlp",),
         "layer norms": ("ln_1", "ln_2", "ln_f")}
counts = {part: 0 for part in parts}
for name, parameter in model.named_parameters():
    part = next(p for p, keys in parts.items() if set(keys) & set(name.split(".")))
    counts[part] += parameter.size
for part, count in counts.items():
    print(f"{part:12} {count:>8,}  {count / model.num_parameters():.1%}")
assert sum(counts.values()) == model.num_parameters()

# %% [markdown]
# ## One sentence, step by step
#
# Letters: $B$ batch, $T$ time (positions), $C$ channels, $H$ heads, $D = C/H$, $V$ vocabulary.
# These are the lines of `GPT.forward`, `Block.forward` and `CausalSelfAttention.forward`, written
# out for the first block.


# %%
def show(name, array, letters):
    print(f"{name:30} {str(array.shape):18} {letters}")


block, attn = model.h[0], model.h[0].attn
T = ids.shape[1]
show("ids", ids, "(B, T)")
x = model.wte(ids) + model.wpe(np.arange(T))
show("x = wte[ids] + wpe[0..T-1]", x, "(B, T, C)")
normed = block.ln_1(x)
show("ln_1(x)", normed, "(B, T, C)")
q = attn.split_heads(attn.q_proj(normed))
k = attn.split_heads(attn.k_proj(normed))
v = attn.split_heads(attn.v_proj(normed))
show("q, k, v", q, "(B, H, T, D)")
scores = q @ k.swapaxes(-1, -2) / np.float32(q.shape[-1]) ** 0.5
scores = scores + np.triu(np.full((T, T), -np.inf, dtype=np.float32), k=1)
weights = softmax(scores)
show("softmax(q kᵀ / sqrt(D) + mask)", weights, "(B, H, T, T)")
heads = attn.join_heads(weights @ v)
show("heads, side by side", heads, "(B, T, C)")
x = x + attn.o_proj(heads)
show("x + o_proj(heads)", x, "(B, T, C)")
up = block.mlp.up_proj(block.ln_2(x))
show("up_proj(ln_2(x))", up, "(B, T, 4C)")
x = x + block.mlp.down_proj(block.mlp.gelu(up))
show("x + down_proj(gelu(up))", x, "(B, T, C)")
for other in list(model.h)[1:]:
    x = other(x)
logits = model.ln_f(x) @ model.wte.weight.data.T
show("logits = ln_f(x) wteᵀ", logits, "(B, T, V)")
assert np.allclose(logits, model(ids), atol=1e-4)
print("\nthe same logits as model(ids)")

# %% [markdown]
# $x$ keeps one shape from bottom to top: the *residual stream*, to which every sub-layer adds. A
# sum hands its gradient to both of its terms unchanged, so in backward the stream is a straight
# road down, and each sub-layer a side road that comes back to it.
#
# ## What the heads look at
#
# Row: the position that looks. Column: what it looks at. The upper triangle is empty, since no
# position may see the future: that is the mask.

# %%
layer = 2
stream = model.wte(ids) + model.wpe(np.arange(T))
for other in list(model.h)[:layer]:
    stream = other(stream)
pattern = model.h[layer].attn.attention_weights(model.h[layer].ln_1(stream))[0]
assert np.allclose(pattern.sum(-1), 1, atol=1e-5) and not np.triu(pattern, k=1).any()
plots.attention_pattern(pattern, text)

# %% [markdown]
# Each head has a habit of its own. Say how far back they look on average over some real text:

# %%
_, held_out = load_tokens("docs")
batch, targets = sequential_batches(held_out, 8, 128, limit=1)[0]
positions = np.arange(128)
distance = positions[:, None] - positions[None, :]
stream = model.wte(batch) + model.wpe(positions)
for i, block in enumerate(model.h):
    w = block.attn.attention_weights(block.ln_1(stream))
    far = (w * distance).sum(-1)[:, :, 64:].mean(axis=(0, 2))
    print(f"block {i}: mean distance in characters, by head: "
          + "  ".join(f"{d:5.1f}" for d in far))
    stream = block(stream)

# %% [markdown]
# ## The gradient of all of it
#
# Every backward in this library is written by hand. The check of notebook 1, on a whole (smaller)
# GPT in float64: of each array some entries, drawn at random.

# %%
tiny = ml.GPT(ml.GPTConfig(vocab_size=11, context_length=6, d_model=8, n_layers=1, n_heads=2),
              dtype=np.float64, rng=0)
report = ml.gradcheck(tiny, np.random.default_rng(0).integers(0, 11, (2, 6)), max_entries=30)
print(report)
assert report.passed

# %% [markdown]
# `k_proj.bias` is a curiosity: its gradient is zero whatever happens. A bias on the keys adds the
# same number to all scores of a row, and soft-max does not see a common shift.
#
# ## How good is it?
#
# The loss is the mean of $-\log p(\text{next character})$, in nats. Knowing nothing costs $\ln 96$;
# a model that only knows how often each character occurs pays the entropy of that distribution.

# %%
code = sequential_batches(load_tokens("code")[1], 32, 128, limit=8)
docs = sequential_batches(held_out, 32, 128)
frequency = np.bincount(load_tokens("docs")[0], minlength=96) + 1
log_p = np.log(frequency / frequency.sum())
losses = {
    "nothing, ln 96": np.log(96),
    "frequencies,\non docs": -log_p[held_out].mean(),
    "untrained GPT,\non docs": ml.evaluate(ml.GPT(model.config), docs),
    "base, on docs": ml.evaluate(model, docs),
    "base, on code": ml.evaluate(model, code),
}
assert losses["base, on docs"] < 1.4 < losses["base, on code"]
plots.bars(losses, "nats per character", form="{:.2f}")

# %% [markdown]
# It reads English documentation well and Python code badly: it has never seen any beyond the
# examples in the docs. That gap is what fine-tuning will close in notebook 4.
#
# ## Letting it write
#
# `generate` asks for the logits of the last position, draws a character from
# softmax(logits / temperature), appends it, and starts over.

# %%
prompt = tokenizer.encode("The statement ")
for temperature in (0.0, 0.7, 1.5):
    out = ml.generate(model, prompt, 200, temperature=temperature, rng=0)
    print(f"--- temperature {temperature}\n{tokenizer.decode(out)}\n")

# %% [markdown]
# Zero takes the likeliest character each time and soon runs in circles; a high temperature
# spells badly. And here is what it makes of the start of a Python function:

# %%
print(tokenizer.decode(ml.generate(model, tokenizer.encode("def "), 300, 0.7, rng=1)))

# %% [markdown]
# ## Questions
#
# 1. Double the context length: which of the shapes above change, and which parameters?
# 2. Why is the score divided by $\sqrt{D}$? What would soft-max do without it, for large $D$?
# 3. The two thirds in the MLP: derive that share from the shapes of the six matrices of a block.
# 4. With the weights tied, `wte` gets a gradient from two places. Which, and how do they combine?
# 5. At temperature 0 the text repeats itself. Can a deterministic model with a context of 128
#    characters ever *not* end in a cycle?
