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
# # Exercise 6. One step of AdamW
#
# *30 minutes. You need: notebook 1.*
#
# **Goal.** Write the optimizer with which nearly every language model is trained.
#
# ## The mathematics
#
# For a parameter $p$ with gradient $g$, at step $t = 1, 2, \dots$ (Kingma & Ba 2015; Loshchilov &
# Hutter 2019, algorithm 2):
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,$$
# $$\hat m = \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t},$$
# $$p \leftarrow p - \text{lr} \left( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda p \right).$$
#
# $m$ and $v$ start at zero, so at first they are too small; $\hat m$ and $\hat v$ make up for that
# (*bias correction*), and are not stored: for a constant $g$, $m = (1 - \beta_1^t) g$, hence the
# division. $\lambda$ is `weight_decay`; $\lambda p$ stands outside the fraction: that is the W in
# AdamW.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# Return new arrays; do not change p, m or v in place (no `+=` on them).
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `beta1**t` is a power. The m and v that you return are the uncorrected ones.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Epsilon is added after the root, and the decay uses the old p.
#
# </details>

# %%
import numpy as np

from minilora import check

# %% tags=["solution"]
def adamw_step(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay):
    """Arrays p, g, m, v of one shape, step t >= 1 -> new p, m, v."""
    ### BEGIN SOLUTION
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    p = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
    return p, m, v
    ### END SOLUTION

# %% tags=["check"]
check.adamw(adamw_step)

# %% [markdown]
# ## What you should see
#
# The check says *correct*. At the first step, without decay, every weight moves by nearly exactly
# lr, whatever its gradient:

# %% tags=["look"]
g = np.array([1000.0, 1.0, -0.001])
p, m, v = adamw_step(np.zeros(3), g, np.zeros(3), np.zeros(3), 1, 0.01, 0.9, 0.999, 1e-8, 0.0)
print(p)

# %% [markdown]
# ## To think about
#
# Why is that so? And what does it mean for B of a LoRA layer, which starts at zero, if lr is 0.001
# or 0.01?
