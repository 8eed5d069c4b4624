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
# # Exercise 4. The gradients of LoRA
#
# *30 minutes. You need: exercises 1 and 3.*
#
# **Goal.** Derive and write the backward pass of $y = s\,xAB$, without ever forming a matrix as
# large as $W$.
#
# ## The mathematics
#
# Let $G$ = `dout`. If $\Delta W = s\,AB$ were one matrix, its gradient would be $dW = x^\top G$
# (exercise 1). The chain rule through the product $AB$ gives
#
# $$dA = s\,dW\,B^\top, \qquad dB = s\,A^\top dW.$$
#
# Insert $dW = x^\top G$, and set the brackets so that every intermediate result is thin, with $r$
# columns or rows. $dx$ is $s\,G B^\top A^\top$: back through the scale, $B$, and $A$, in reverse
# order.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# $dA = s\,x^\top G B^\top$. Which product first? $x^\top G$ is (n, m), as large as W; $G B^\top$
# is (N, r).
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $dB = s\,A^\top x^\top G = s\,(xA)^\top G$.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Compute `dxA = scale * dout @ B.T` once: both dA and dx start from it.
#
# </details>

# %%
import numpy as np

from minilora import check

# %% tags=["solution"]
def lora_backward(dout, x, A, B, scale):
    """dout (N, m), x (N, n), A (n, r), B (r, m) -> dx (N, n), dA (n, r), dB (r, m)."""
    ### BEGIN SOLUTION
    dxA = scale * (dout @ B.T)
    dA = x.T @ dxA
    dB = scale * ((x @ A).T @ dout)
    dx = dxA @ A.T
    return dx, dA, dB
    ### END SOLUTION

# %% tags=["check"]
check.lora_backward(lora_backward)

# %% [markdown]
# ## What you should see
#
# The check says *correct*, and central differences agree.
#
# ## To think about
#
# At the first step $B = 0$. Which of the three gradients are zero then? After one step, which are?
