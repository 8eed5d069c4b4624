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
# # Exercise 12. What did this adapter do?
#
# *45 minutes. You need: notebooks 2 and 5.*
#
# **Goal.** From an adapter file alone, without the model or the data, find the layer that was
# changed most, and the rank that its update really has.
#
# ## The mathematics
#
# The update of a layer is $\Delta W = s\,AB$. Its size is the Frobenius norm $\|\Delta W\|$, the
# root of the sum of its squared entries, which is also the root of the sum of its squared singular
# values $\sigma_i$. The rank of $\Delta W$ is $r$ at most, but it may make little use of it. The
# *effective rank* here is the smallest number $k$ for which the first $k$ singular values hold 90%
# of the squared norm:
#
# $$\sum_{i \le k} \sigma_i^2 \ge 0.9 \sum_i \sigma_i^2.$$

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# `np.linalg.norm(matrix)` is the Frobenius norm. Do not forget the scale: layers may differ in it.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `np.linalg.svd(matrix, compute_uv=False)` gives the singular values, the largest first.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `np.cumsum(s**2) >= 0.9 * (s**2).sum()` is True from the one on that passes 90%; `argmax` finds
# the first True, counted from 0.
#
# </details>

# %%
import tempfile

import numpy as np

import minilora as ml
from minilora import check
from minilora.lab import compare
from minilora.files.peft_read import read_adapter

# %% [markdown]
# An adapter as an object: `adapter.layers` is a dict of names, and for each name there are `A` (n,
# r), `B` (r, m) and `scale`.

# %% tags=["solution"]
def diagnose(adapter):
    """Return a tuple: name of the layer with the largest update, its effective rank (an int)."""
    ### BEGIN SOLUTION
    updates = {name: f.scale * f.A @ f.B for name, f in adapter.layers.items()}
    most = max(updates, key=lambda name: np.linalg.norm(updates[name]))
    squares = np.linalg.svd(updates[most], compute_uv=False) ** 2
    return most, int((np.cumsum(squares) >= 0.9 * squares.sum()).argmax()) + 1
    ### END SOLUTION

# %% tags=["check"]
check.diagnosis(diagnose)

# %% [markdown]
# ## What you should see
#
# The check says *correct*. Now a real one: train an adapter of rank 8 for 60 steps, save it, and
# look at the file alone.

# %% tags=["look"]
model = ml.replace_linear_with_lora(ml.load_base("small"), rank=8, alpha=16, rng=0)
data = compare.Data.for_context(64)
compare.fine_tune(model, data, compare.LORA_LEARNING_RATE, 60)
with tempfile.TemporaryDirectory() as folder:
    ml.save_adapter(model, folder)
    _, adapter = read_adapter(folder)
print(diagnose(adapter))

# %% [markdown]
# ## To think about
#
# Is the layer with the largest norm the one that matters most for the output? What else would you
# have to know?
