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
# # Exercise 2. Soft-max and cross-entropy
#
# *30 minutes. You need: exercise 1; notebook 3 says what logits are: one number for
# each possible next token, the larger the likelier.*
#
# **Goal.** Write the loss of a language model and its gradient, so that neither large logits nor
# tiny probabilities hurt.
#
# ## The mathematics
#
# A row of logits $z$ becomes probabilities $p_j = e^{z_j} / \sum_i e^{z_i}$. The loss of a row with
# target $t$ is $-\log p_t$, and of a batch the mean over its $N$ rows.
#
# *Numbers.* $e^{1000}$ is infinite in floating point. Subtracting the same number from all logits
# of a row changes nothing, so subtract the largest: $p_j = e^{z_j - \max z} / \sum_i e^{z_i - \max
# z}$. And a $p_t$ that is too small becomes 0, whose logarithm is $-\infty$, so work with
#
# $$\log p_t = z_t - \max z - \log \sum_i e^{z_i - \max z}.$$
#
# *The gradient.* The maximum cancels: $-\log p_t = -z_t + \log \sum_i e^{z_i}$. The first term has
# the derivative $-1$ if $j = t$ and else 0; the second $e^{z_j} / \sum_i e^{z_i} = p_j$. So
# $\partial(-\log p_t) / \partial z_j$ is $p_j - 1$ at the target and $p_j$ elsewhere: the
# probabilities, with 1 subtracted at the target. And the mean gives a factor $1/N$.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# `logits.max(axis=-1, keepdims=True)` keeps an axis of length 1, so that it can be subtracted from
# every row.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `z[np.arange(N), targets]` picks one entry of each row: the one of its target.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# The gradient: start with a *new* array of probabilities, then `p[np.arange(N), targets] -= 1`,
# then divide by N.
#
# </details>

# %%
import numpy as np

from minilora import check

# %% tags=["solution"]
def cross_entropy(logits, targets):
    """logits (N, V), int targets (N,) -> loss (a number), dlogits (N, V)."""
    ### BEGIN SOLUTION
    rows = np.arange(len(targets))
    z = logits - logits.max(axis=-1, keepdims=True)
    p = np.exp(z)
    sums = p.sum(axis=-1, keepdims=True)
    p /= sums
    loss = -(z[rows, targets] - np.log(sums[:, 0])).mean()
    p[rows, targets] -= 1
    return loss, p / len(targets)
    ### END SOLUTION

# %% tags=["check"]
check.cross_entropy(cross_entropy)

# %% [markdown]
# ## What you should see
#
# The check says *correct*, also for logits around 1000, and for rows where the target's probability
# is far below the smallest number that floating point has.

# %% tags=["look"]
loss, _ = cross_entropy(np.zeros((1, 96)), np.array([0]))
print(f"loss of a model that knows nothing about 96 characters: {loss:.3f} = {np.log(96):.3f} nats")

# %% [markdown]
# ## To think about
#
# Every row of `dlogits` sums to zero. Why must it? What would happen to all logits of a row in
# training if it did not?
