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
# You need: notebook 1. The words, in short:
#
# - An *embedding* is a table with one row of numbers for each token; *logits* are the scores a
#   model gives to every possible next token, and soft-max turns them into probabilities.
# - *Attention* lets a position collect something from earlier ones. Each position asks with a
#   *query*, answers with a *key*, and hands over a *value*: what it gets is a mean of the values,
#   weighted by how well the keys fit its query. Several *heads* do so side by side.
# - An *MLP* is two linear layers with a nonlinear function (GELU) between them.
# - A *layer norm* shifts and scales the numbers of each position to mean 0 and variance 1.
# - *Residual*: the result of a part is added to its input, instead of taking its place.

# %%
# %matplotlib inline
import numpy as np

import minilora as ml
from minilora.data.batches import sequential_batches
from minilora.data.corpus import load_tokens
from minilora.lab import plots
from minilora.nn.functional import softmax

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
# Letters: $B$ batch, $T$ time (positions), $C$ channels, $H$ heads, $D = C/H$ the width of a head,
# $V$ vocabulary.
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
plots.attention_pattern(pattern, text, f"block {layer}")

# %% [markdown]
# Here is how far back the heads look on average, over some real text. (Only positions from 64 on
# are counted; spread evenly over all they may see, it would be 48 characters.)

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
# The heads of the first block stay within a few characters, enough to spell; those above look
# further.
#
# ## The gradient of all of it
#
# Every backward in this library is written by hand. The check of notebook 1, on a whole (smaller)
# GPT in float64: of each array some entries, drawn at random.

# %%
config = ml.GPTConfig(vocab_size=11, context_length=6, d_model=8, n_layers=1, n_heads=2,
                      tie_weights=True)
tiny = ml.GPT(config, dtype=np.float64, rng=0)
tiny_ids = np.random.default_rng(0).integers(0, 11, (2, 6))
report = ml.gradcheck(tiny, tiny_ids, max_entries=30)
print(report)
assert report.passed

# %% [markdown]
# One of these gradients is a curiosity:

# %%
_, dlogits = ml.cross_entropy(tiny(tiny_ids), tiny_ids)
tiny.backward(dlogits)
for name in ("q_proj", "k_proj", "v_proj"):
    gradient = getattr(tiny.h[0].attn, name).bias.grad
    print(f"largest gradient of {name}.bias: {np.abs(gradient).max():.1e}")
assert np.abs(tiny.h[0].attn.k_proj.bias.grad).max() < 1e-15

# %% [markdown]
# That of `k_proj.bias` is zero whatever happens, but for round-off. A bias on the keys adds the
# same number to all scores of a row, and soft-max does not see a common shift.
#
# ## How good is it?
#
# The loss is the mean of $-\ln p(\text{next character})$, in nats. Knowing nothing costs $\ln 96$;
# knowing only how often each character occurs in the training text costs less.

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
for name in ("base, on docs", "base, on code"):
    print(f"{name}: a loss of {losses[name]:.3f} is like guessing among {np.exp(losses[name]):.1f}")
assert abs(np.exp(losses["base, on docs"]) - 3.4) < 0.1
assert abs(np.exp(losses["base, on code"]) - 8.7) < 0.1
plots.bars(losses, "nats per character", form="{:.2f}")

# %% [markdown]
# A loss of $L$ is like guessing among $e^L$ equally likely characters: between three and four on
# documentation, nearly nine on Python code, of which it has seen nothing but the examples in the
# docs. That gap is what fine-tuning will close in notebook 4.
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
# 1. Which of the shapes above change if the text is twice as long? Which parameters change if
#    `context_length` is doubled?
# 2. Why is the score divided by $\sqrt{D}$? (Hint: what is the variance of a sum of $D$ products of
#    independent numbers of variance 1? What does soft-max make of very different scores?)
# 3. The two thirds in the MLP: derive that share from the shapes of the six matrices of a block.
# 4. With the weights tied, `wte` gets a gradient from two places. Which, and how do they combine?
# 5. At temperature 0 the text repeats itself. Can a deterministic model with a context of 128
#    characters ever *not* end in a cycle?
