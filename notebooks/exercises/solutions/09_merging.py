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
# # Exercise 9. Merge, unmerge, and not twice
#
# *30 minutes. You need: exercise 3.*
#
# **Goal.** Write a layer that can take its update into the weight and out again, and that refuses
# to do it twice.
#
# ## The idea
#
# $xW + s\,xAB = x(W + s\,AB)$, so for use without training the update can be added into the
# weight. Three traps:
#
# - *Merged twice*, the update counts twice. Raise a `RuntimeError` instead. Likewise for `unmerge`
#   where nothing is merged.
# - *Merged, and still added*: after merging, `forward` must not add $s\,xAB$ any more.
# - *Unmerging by subtraction* does not give the old weight back: $(W + U) - U \ne W$ in floating
#   point. Keep the old one. And do not change the array that you were given in place: another
#   layer may use it.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# Keep `self.merged`, and look at it in all three methods. Check first, then change.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `self.W = self.W + self.scale * self.A @ self.B` makes a new array; `+=` would change the old one.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Before that, remember the old one: `self.old = self.W`.
#
# </details>

# %%
import numpy as np

from minilora import check

# %% [markdown]
# The check reads the attribute `merged`, calls the three methods in several orders, and looks at
# more than one layer at a time.

# %% tags=["solution"]
class MergeableLinear:
    """y = x W + scale * x A B, with W (n, m), A (n, r), B (r, m)."""

    def __init__(self, W, A, B, scale):
        self.W, self.A, self.B, self.scale = W, A, B, scale
        self.merged = False

    def forward(self, x):
        """x (N, n) -> y (N, m)."""
        ### BEGIN SOLUTION
        y = x @ self.W
        return y if self.merged else y + self.scale * (x @ self.A @ self.B)
        ### END SOLUTION

    def merge(self):
        """Add the update into the weight. RuntimeError where that was done already."""
        ### BEGIN SOLUTION
        if self.merged:
            raise RuntimeError("merged already")
        self.old = self.W
        self.W = self.W + self.scale * (self.A @ self.B)
        self.merged = True
        ### END SOLUTION

    def unmerge(self):
        """Put the old weight back. RuntimeError where nothing is merged."""
        ### BEGIN SOLUTION
        if not self.merged:
            raise RuntimeError("not merged")
        self.W = self.old
        self.merged = False
        ### END SOLUTION

# %% tags=["check"]
check.merge(MergeableLinear)

# %% [markdown]
# ## What you should see
#
# The check says *correct*. How large is the error of subtracting, in float16?

# %%
W = np.linspace(0.01, 0.2, 5).astype(np.float16)
U = np.float16(0.1)
print(W, (W + U) - U - W)

# %% [markdown]
# ## To think about
#
# A merged layer costs one product instead of three. Why would a server that has many tasks for one
# base leave them unmerged all the same?
