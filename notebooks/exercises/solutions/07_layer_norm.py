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
# # Exercise 7. LayerNorm, backward
#
# *60 minutes. You need: exercise 1; patience with indices.*
#
# **Goal.** Derive and write a gradient in which every input of a row reaches every output of that
# row, by way of its mean and variance.
#
# ## The mathematics
#
# For each row $x$ of width $C$: $\hat x = (x - \mu)\,\rho$ with $\rho = 1 / \sqrt{\text{var} +
# \epsilon}$, and $y = \hat x \odot w + b$. The variance divides by $C$.
#
# $w$ and $b$ are used in every row, so $dw = \sum_{rows} dout \odot \hat x$ and $db = \sum_{rows}
# dout$.
#
# For $dx$, let $g = dout \odot w$, the gradient of $\hat x$. There are three ways from $x_i$ to
# the loss: directly, through $\mu$, and through the variance. ($\mu$ is in the variance as well,
# but $\sum_j (x_j - \mu) = 0$, so that way vanishes.) With $\partial \mu / \partial x_i = 1/C$ and
# $\partial \text{var} / \partial x_i = 2 (x_i - \mu) / C$ they add up to
#
# $$dx = \rho \left( g - \text{mean}(g) - \hat x \, \text{mean}(g \odot \hat x) \right),$$
#
# with means over the row. Derive it before you program it: it is the most instructive half hour on
# this page.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# `x.mean(axis=-1, keepdims=True)` and `x.var(axis=-1, keepdims=True)` are (N, 1), and broadcast.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The derivation: $\partial \rho / \partial \text{var} = -\rho^3 / 2$. So the third way gives
# $-\rho^3 (x_i - \mu) \frac1C \sum_j g_j (x_j - \mu)$. Put $\hat x = (x - \mu) \rho$ in.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Weight and bias: sums over the rows are `axis=0`. The means in dx are over the row, `axis=-1`.
#
# </details>

# %%
import numpy as np

from minilora import check

# %% tags=["solution"]
def layer_norm_backward(dout, x, weight, bias, eps):
    """dout, x (N, C), weight, bias (C,) -> dx (N, C), dweight (C,), dbias (C,)."""
    ### BEGIN SOLUTION
    rstd = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    xhat = (x - x.mean(axis=-1, keepdims=True)) * rstd
    g = dout * weight
    dx = rstd * (
        g - g.mean(axis=-1, keepdims=True) - xhat * (g * xhat).mean(axis=-1, keepdims=True)
    )
    return dx, (dout * xhat).sum(axis=0), dout.sum(axis=0)
    ### END SOLUTION

# %% tags=["check"]
check.layer_norm_backward(layer_norm_backward)

# %% [markdown]
# ## What you should see
#
# The check says *correct*, for rows of 2 to 8 numbers and for small and large epsilon.
#
# ## To think about
#
# Every row of $dx$ sums to zero, and is nearly (but for epsilon) at right angles to $\hat x$. Both
# can be seen without any calculation: what happens to $y$ if all of $x$ is moved by the same
# amount, or stretched?
