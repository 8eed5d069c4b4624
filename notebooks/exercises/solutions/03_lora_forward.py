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
# # Exercise 3. The LoRA layer: start, scale, forward
#
# *30 minutes. You need: notebook 2.*
#
# **Goal.** Write the class at the heart of LoRA: two thin matrices, started so that nothing
# changes at first and everything can be learned, and a scale.
#
# ## The mathematics
#
# The layer computes $\text{scale} \cdot x A B$, with $A$ of shape (in, rank) and $B$ of shape
# (rank, out), and scale $= \alpha / r$ (Hu et al. 2021, section 4.1).
#
# - $B$ starts at zero, so that the update is zero and the model starts as the base.
# - $A$ is uniform in $\pm 1/\sqrt{\text{in}}$. It must not be zero as well, or nothing would ever
#   be learned: $dA$ contains $B$, and $dB$ contains $A$.
#
# The frozen layer $xW + b$ is not part of it: that is added by the layer around this one.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# `rng.uniform(low, high, shape)` draws; use the `rng` that is given, so that the same seed gives
# the same layer.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The bound is $1/\sqrt{\text{in}}$, with in the number of inputs, A's *first* axis. Not the rank.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `forward` has to use `self.A` and `self.B` as they are when it is called: training changes them.
#
# </details>

# %%
import numpy as np

from minilora import check

# %% tags=["solution"]
class LoRALayer:
    """scale * x A B, with A (in_dim, rank), B (rank, out_dim), scale = alpha / rank."""

    def __init__(self, in_dim, out_dim, rank, alpha, rng):
        """Set self.A, self.B and self.scale; rng is a numpy Generator."""
        ### BEGIN SOLUTION
        bound = in_dim**-0.5
        self.A = rng.uniform(-bound, bound, (in_dim, rank))
        self.B = np.zeros((rank, out_dim))
        self.scale = alpha / rank
        ### END SOLUTION

    def forward(self, x):
        """x (..., in_dim) -> (..., out_dim)."""
        ### BEGIN SOLUTION
        return self.scale * (x @ self.A @ self.B)
        ### END SOLUTION

# %% tags=["check"]
check.lora_forward(LoRALayer)

# %% [markdown]
# ## What you should see
#
# The check says *correct*. A layer of your own, at width 768 and rank 8, has so many numbers:

# %%
print(f"{8 * (768 + 768):,} instead of {768 * 768:,}")

# %% [markdown]
# ## To think about
#
# Why is $(xA)B$ cheaper than $x(AB)$ for one row? For which $r$ and how many rows is it the other
# way round? And if $AB$ is worked out once and used for many batches?
