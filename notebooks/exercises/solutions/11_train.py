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
# # Exercise 11. Train on a budget
#
# *An hour, or an afternoon. You need: notebook 4.*
#
# **Goal.** Choose rank, alpha, learning rate and targets so that a LoRA of at most a given number
# of parameters learns enough in 40 steps.
#
# ## The task
#
# The small base of this library has read English documentation. It gets 40 steps on Python code,
# of 16 times 64 characters. `check.train_with(settings)` trains with your settings and returns
# what came out; `check.train` asks for a gain of `check.BUDGET_GAIN` (0.42) nats per character on
# held-out code, with no more than `check.BUDGET` (6,000) trainable parameters. The first choice of
# most people is not good enough.
#
# The base has 2 blocks of width 64: `q_proj`, `k_proj`, `v_proj`, `o_proj` are (64, 64), `up_proj`
# is (64, 256), `down_proj` (256, 64).

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# Count first: which rank can you afford on all matrices, which on some of them?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# LoRA starts at B = 0 and AdamW moves each number by about lr a step. With so few steps, what does
# that say about the learning rate? Notebook 4 has the curves.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Notebook 4 also asks which matrices to adapt, at an equal number of parameters.
#
# </details>

# %%
from minilora import check

print(f"at most {check.BUDGET:,} parameters, at least {check.BUDGET_GAIN} nats per character")

# %%
first = dict(rank=4, alpha=4, learning_rate=1e-3, target_modules=["q_proj", "v_proj"])
print(check.train_with(first))

# %% tags=["solution"]
settings = {}  # rank, alpha, learning_rate, target_modules (a list of names, or None for all)
### BEGIN SOLUTION
settings = dict(rank=2, alpha=4, learning_rate=2e-2, target_modules=None)
### END SOLUTION

# %% tags=["check"]
check.train(settings)

# %% [markdown]
# ## What you should see
#
# The check says *correct*, with the parameters that you used and the gain.
#
# ## To think about
#
# Plot the gain against the learning rate for your choice of targets, from 1e-3 to 1e-1. How would
# you have to change the learning rate if you halved alpha? Try it; is it exactly so, and why not?
