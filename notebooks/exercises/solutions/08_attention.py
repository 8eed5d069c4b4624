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
# # Exercise 8. Causal attention, backward
#
# *90 minutes. You need: exercises 1 and 2, notebook 3.*
#
# **Goal.** Derive and write the gradients of one attention head.
#
# ## The mathematics
#
# For one head, $q$, $k$ and $v$ are $(T, D)$, and
#
# $$S = \frac{q k^\top}{\sqrt D} + \text{mask}, \quad P = \text{softmax}(S) \text{ by rows},
# \quad out = P v.$$
#
# The mask is $-\infty$ above the diagonal, so that a position looks at itself and the past only.
# Go back step by step:
#
# 1. $out = Pv$ is a product: $dv = P^\top dout$ and $dP = dout\, v^\top$.
# 2. The soft-max of a row has $\partial P_i / \partial S_j = P_i (\delta_{ij} - P_j)$, where
#    $\delta_{ij}$ is 1 if $i = j$ and else 0; hence $dS_j = P_j (dP_j - \sum_i dP_i P_i)$.
# 3. $S$ is a product with a factor: $dq = dS\, k / \sqrt D$ and $dk = dS^\top q / \sqrt D$.
#
# Remember: float32 in, float32 out; and subtract each row's maximum before `exp`. Where the mask
# was, $P = 0$, so $dS = 0$ there by itself.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# You have to work P out again: scores, mask, soft-max with the row's maximum subtracted.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `np.triu(np.full((T, T), -np.inf), k=1)` is the mask, but in float64: give `np.full` the dtype of
# q. And use `D ** -0.5` (a Python number) instead of `np.sqrt(D)`, which is float64.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `(dP * P).sum(axis=-1, keepdims=True)` is the sum in step 2.
#
# </details>

# %%
import numpy as np

from minilora import check

# %% tags=["solution"]
def attention_backward(dout, q, k, v):
    """dout, q, k, v (T, D) -> dq, dk, dv (T, D), with a causal mask."""
    ### BEGIN SOLUTION
    t, d = q.shape
    scale = d**-0.5
    s = q @ k.T * scale + np.triu(np.full((t, t), -np.inf, q.dtype), k=1)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dv = p.T @ dout
    dp = dout @ v.T
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, dv
    ### END SOLUTION

# %% tags=["check"]
check.attention_backward(attention_backward)

# %% [markdown]
# ## What you should see
#
# The check says *correct*, for a single position (where $P = 1$ and $dq = dk = 0$) as well as for
# more positions than channels and the other way round.
#
# ## To think about
#
# The last row of $dv$ comes from one position only. Which, and why? Which rows of `dout` reach the
# first row of $dv$?
