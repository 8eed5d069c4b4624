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
# # 7. A classifier
#
# Appendix E of Raschka's *Build a Large Language Model (From Scratch)*, where many people meet
# LoRA, fine-tunes a GPT to sort texts into two classes: take the head off, put one of two outputs
# on, read it at the last token, and give every linear layer a LoRA. Here the task is to tell
# whether a line comes from Python's documentation or from its source code. In this notebook you
# will
#
# - replace the head of a GPT and read the last token,
# - train a head alone, LoRA, and everything, and choose learning rates on lines of their own,
# - compare the three on the same held-out lines, with the error of the difference,
# - look at the lines that are still wrong,
# - store the classifier, and see what happens to one whose head was lost.
#
# You need: notebooks 3 and 4.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import numpy as np

import minilora as ml
from minilora.files.peft_config import WEIGHTS_FILE
from minilora.lab import plots
from minilora.lab.classify import LABELS, accuracy, predict, prose_or_code, shuffled_batches
from minilora.nn.functional import IGNORE_INDEX

STEPS, LENGTH = 200, 64
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The task
#
# Single lines of the two corpora, without their indentation, each once; lines of fewer than 20
# characters are left out, and longer ones are cut at 64. Both classes are about equally many.
# Otherwise a classifier could look good by always giving the more frequent answer.
#
# There are three sets. Classifiers learn from *training*. *Choosing* is for settings: here, the
# learning rate. *Held out* is for the numbers that are reported, and no choice is made by it. The
# best of several tries is partly lucky with the lines that it was chosen on, so its accuracy on
# those lines is too good. (The held-out lines are from other sections of the texts.)

# %%
training, held_out = prose_or_code(LENGTH)
choosing = tuple(part[-800:] for part in training)  # the lines are in random order
training = tuple(part[:-800] for part in training)
tokenizer = ml.CharTokenizer()


def text(data, i):
    ids, targets = data
    last = int(np.flatnonzero(targets[i] != IGNORE_INDEX)[0])
    return tokenizer.decode(ids[i, : last + 1]), LABELS[targets[i, last]]


for part, data in (("training", training), ("choosing", choosing), ("held out", held_out)):
    labels = data[1][data[1] != IGNORE_INDEX]
    print(f"{part}: {len(labels):,} lines, {labels.mean():.0%} code")
    assert abs(labels.mean() - 0.5) < 0.03
for i in range(6):
    line, label = text(training, i)
    print(f"  {label:6} {line}")

# %% [markdown]
# Not every line is easy. The documentation has examples of code in it, and source code is full of
# English: comments and docstrings. "prose" and "code" are where a line comes from.
#
# ## A new head
#
# The base gives 96 logits for the next character at every position. We want two, for the text as a
# whole. Attention looks back only, so the one position that has seen everything is the last:

# %%
base = ml.load_base("small")
ids = training[0][:1]
print("before:", base(ids).shape)
base.lm_head = ml.Linear(base.config.d_model, 2, rng=0)
print("after: ", base(ids).shape)
print(f"accuracy with a random head: {accuracy(base, choosing):.1%}")

# %% [markdown]
# The targets are made so that nothing else counts: they are `IGNORE_INDEX` everywhere but at the
# last character of a line, where they are the class. The loss leaves out what is ignored, and `fit`
# works as it is.

# %%
line, label = text(training, 0)
print(line, "->", label)
print(training[1][0])

# %% [markdown]
# ## Three ways to train
#
# - the *head* alone, on the features that the base has already (a "linear probe"),
# - *LoRA* of rank 8 on every matrix, and the head,
# - *everything*.
#
# With LoRA the head is named in `modules_to_save`: it is random, so it has to be trained whole,
# and it belongs to the task. LoRA and full fine-tuning have two learning rates to choose from, the
# best two of a wider search on the lines for choosing; one is enough for the head, which is far
# behind with any. Everything has two seeds, with another random head, another $A$, and another
# order of the lines. The rate is kept whose two classifiers are better on average on the lines for
# choosing.


# %%
def start(method, seed):
    model = ml.load_base("small")
    model.lm_head = ml.Linear(model.config.d_model, 2, rng=seed)
    if method == "head alone":
        model.freeze().lm_head.unfreeze()
    if method == "LoRA r=8":
        ml.replace_linear_with_lora(model, 8, 16, modules_to_save="lm_head", rng=seed)
    return model


def train(method, learning_rate, seed):
    model = start(method, seed)
    curve = {0: accuracy(model, choosing)}
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    schedule = ml.cosine_schedule(learning_rate, STEPS, 20)
    batches = shuffled_batches(training, 32, rng=seed)
    for begin in range(0, STEPS, 100):
        ml.fit(model, batches, optimizer, 100, schedule=lambda step, k=begin: schedule(k + step),
               clip_norm=1.0, progress=False)
        curve[begin + 100] = accuracy(model, choosing)
    return model, curve


RATES = {"head alone": (3e-2,), "LoRA r=8": (3e-3, 1e-2), "full": (1e-3, 3e-3)}
models, curves = {}, {}
for method, rates in RATES.items():
    tried = {rate: [train(method, rate, seed) for seed in (0, 1)] for rate in rates}
    ends = {rate: [curve[STEPS] for _, curve in runs] for rate, runs in tried.items()}
    chosen = max(ends, key=lambda rate: sum(ends[rate]))
    models[method] = [model for model, _ in tried[chosen]]
    for seed, (_, curve) in enumerate(tried[chosen]):
        curves[f"{method}, seed {seed}"] = list(curve), list(curve.values())
    print(f"{method:11}" + "".join(f" lr {rate:g}: {first:.1%}, {second:.1%};"
                                   for rate, (first, second) in ends.items())
          + f" chosen {chosen:g}")
plots.lines(curves, "training step", "accuracy on the lines for choosing")

# %% [markdown]
# Now the held-out lines, for the chosen rates:

# %%
labels = held_out[1][held_out[1] != IGNORE_INDEX]
right = {method: [predict(model, held_out) == labels for model in pair]
         for method, pair in models.items()}
for method, pair in right.items():
    trained = models[method][0].num_parameters(trainable_only=True)
    print(f"{method:11}{trained:>8,} trained, right on "
          + " and ".join(f"{hits.mean():.1%} (standard error {hits.std() / len(hits)**0.5:.1%})"
                         for hits in pair))

# %% [markdown]
# These errors are those of each accuracy, not of a difference. The classifiers read the *same*
# lines, and a line that both get right, or both wrong, says nothing about which of them is better.
# So take the difference line by line ($1$, $0$ or $-1$), and the error of its mean:


# %%
def paired(title, one, other):
    difference = one.astype(float) - other
    mean, error = difference.mean(), difference.std() / len(difference) ** 0.5
    print(f"{title:28} {mean:+6.1%}, standard error {error:.1%}; only the first is right on "
          f"{(difference > 0).sum()} lines, only the second on {(difference < 0).sum()}")
    return mean, error


(lora, lora_again), (full, full_again) = right["LoRA r=8"], right["full"]
to_head = paired("LoRA - head alone, seed 0", lora, right["head alone"][0])
to_full = paired("LoRA - full, seed 0", lora, full)
to_full_again = paired("LoRA - full, seed 1", lora_again, full_again)
of_lora = paired("LoRA, seed 0 - seed 1", lora, lora_again)
of_full = paired("full, seed 0 - seed 1", full, full_again)
unpaired = np.hypot(lora.std(), full.std()) / len(labels) ** 0.5
print(f"on different lines, the error of LoRA - full would be {unpaired:.1%}")
assert to_head[0] > 0.05 and to_head[0] > 4 * to_head[1]
assert to_full[1] < 0.75 * unpaired
assert max(abs(pair[0]) for pair in (to_full, to_full_again, of_lora, of_full)) < 0.06

# %% [markdown]
# LoRA is clearly better than a head on the base's own features, though those are not bad either.
#
# Between LoRA and full fine-tuning only the lines on which they differ count, as in McNemar's test
# (1947), so the error is not much more than half of what it would be on different lines. In the run
# that is stored here, seed 0 says that LoRA is worse, by two errors. But it is the error of the
# *lines* alone. With seed 1 hardly anything is left of the difference, and the two seeds of LoRA
# are further apart than LoRA and full fine-tuning. (Your machine may round differently, and shift
# all of these by a per cent or two.) So two seeds are too few to say which of the two is better,
# and one would have misled us.
#
# What is still wrong?

# %%
model = models["LoRA r=8"][0]
wrong = np.flatnonzero(~lora)
for i in wrong[:8]:
    line, label = text(held_out, i)
    print(f"  is {label:6} {line}")

# %% [markdown]
# Some of these are English out of docstrings, which would be hard for you as well. Others are
# plainly code.
#
# ## Storing it, head included
#
# The task is $A$, $B$, and the new head. `save_adapter` stores all three, and they load onto a base
# that has never heard of two classes:

# %%
ml.save_adapter(model, folder)
tensors = ml.load_safetensors(folder / WEIGHTS_FILE)
heads = {name: array.shape for name, array in tensors.items() if "lm_head" in name}
print(heads)
again = ml.load_adapter(ml.load_base("small"), folder)
print(f"loaded onto a fresh base: {accuracy(again, held_out):.1%}")
assert accuracy(again, held_out) == lora.mean()
print("and taken off, its head is", ml.remove_lora(again).lm_head, "again: tied to the embedding")

# %% [markdown]
# What people lose most often is just that. Somebody keeps "only the LoRA weights", and puts them
# on a base with a *new random* head:

# %%
lost = ml.Adapter(ml.get_adapter(model).layers)  # without what was saved whole
accuracies = {"trained": lora.mean()}
for seed in (1, 2, 3):
    other = ml.load_base("small")
    other.lm_head = ml.Linear(other.config.d_model, 2, rng=seed)
    accuracies[f"head lost,\nrandom head {seed}"] = accuracy(ml.attach(other, lost), held_out)
plots.bars(accuracies, "accuracy on held-out lines", form="{:.0%}", baseline=0.5)

# %% [markdown]
# Anything may come out. A random direction catches some of what separates the classes, and which
# side it calls "code" is a matter of luck. An accuracy far *below* one half is the sign of that.

# %% [markdown]
# ## Questions
#
# 1. A random head on the untouched base came out near 50%. Could it be 40%, or 60%? Try other
#    seeds.
# 2. The targets could also stand at *every* position, so that the model guesses the class all
#    along. What would that change for the loss, and what for the last position?
# 3. With `target_modules=None` and no `modules_to_save`, the random head is frozen and gets a LoRA
#    like every other layer; the tutorial does that. Why does it work nevertheless? What has to be
#    stored then?
# 4. How many held-out lines would you need to tell 90% from 91%?
