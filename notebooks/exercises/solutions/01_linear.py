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
# # Exercise 1. A linear layer, there and back
#
# *20 minutes. You need: notebook 1.*
#
# **Goal.** Write the forward pass of a linear layer and its three gradients. Everything later is
# built on these four lines.
#
# ## The mathematics
#
# The layer is $y = xW + b$ for a batch of $N$ rows: $x$ is $(N, n)$, $W$ is $(n, m)$, $b$ is
# $(m,)$, and $y$ is $(N, m)$. In entries,
#
# $$y_{ij} = \sum_k x_{ik} W_{kj} + b_j.$$
#
# Backward is given `dout`, the gradient of the loss with respect to $y$, of the shape of $y$. Each
# gradient has the shape of what it belongs to: $dx$ is $(N, n)$, $dW$ is $(n, m)$, $db$ is $(m,)$.
# By the chain rule, for example, $dW_{kj} = \sum_{i} \frac{\partial y_{ij}}{\partial W_{kj}}
# dout_{ij} = \sum_i x_{ik}\, dout_{ij}$. Write the other two down like that first; then find the
# products of matrices that they are.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# Each sum over an index that two arrays share is a product of matrices. The shared index has to
# stand last in the left one and first in the right one; a transpose puts it there.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $dx_{ik} = \sum_j dout_{ij} W_{kj}$: the sum is over $j$, which is last in both. $db_j = \sum_i
# dout_{ij}$, since $b_j$ is added in every row.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# The shapes leave only one choice: $(N, n) = (N, m)(m, n)$, and $(n, m) = (n, N)(N, m)$.
#
# </details>

# %% [markdown]
# Return the three gradients in the order `dx, dW, db`. In all exercises, results have the dtype of
# the inputs: float32 in, float32 out. NumPy makes float64 of a float32 array where a float64 one
# comes in, such as `np.ones(n)` without a `dtype`.

# %%
import numpy as np

from minilora import check

# %% tags=["solution"]
def linear_forward(x, W, b):
    """x (N, n), W (n, m), b (m,) -> y (N, m)."""
    ### BEGIN SOLUTION
    return x @ W + b
    ### END SOLUTION

# %% tags=["check"]
check.linear_forward(linear_forward)

# %% tags=["solution"]
def linear_backward(dout, x, W):
    """dout (N, m), x (N, n), W (n, m) -> dx (N, n), dW (n, m), db (m,)."""
    ### BEGIN SOLUTION
    dx = dout @ W.T
    dW = x.T @ dout
    db = dout.sum(axis=0)
    return dx, dW, db
    ### END SOLUTION

# %% tags=["check"]
check.linear_backward(linear_backward)

# %% [markdown]
# ## What you should see
#
# Both checks say *correct*. They ran your functions on batches of one row, on layers of one input
# or output, in float32 and float64, and compared the gradients with central differences.
#
# ## To think about
#
# `linear_backward` gets no `b`. Why does it not need it? And which of its three results would a
# *frozen* layer still have to work out?
