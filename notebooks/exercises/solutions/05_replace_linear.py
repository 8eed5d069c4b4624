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
# # Exercise 5. Put LoRA into a whole model
#
# *45 minutes. You need: exercise 3; the tree of modules in notebook 3.*
#
# **Goal.** Replace every `Linear` in a model, however deep, by a `LinearWithLoRA`, and see to it
# that only A and B are trained.
#
# ## The idea
#
# A model is a tree. `model.named_children()` yields `(name, module)` for what is directly below;
# `setattr(model, name, new)` puts something else in its place. So, for each child: if it is a
# `Linear`, replace it; otherwise do the same with *its* children, which is what recursion is for.
#
# Three things are easy to get wrong, and people do:
#
# - *Freezing.* `LinearWithLoRA` freezes the Linear that it wraps, and nothing else. Embeddings and
#   norms have parameters, too. A parameter is frozen by `parameter.requires_grad = False`;
#   `model.named_parameters()` yields `(name, parameter)` for all, and those of LoRA have `.lora.`
#   in their names.
# - *A second call* must change nothing: inside a `LinearWithLoRA` there is a `Linear` that must
#   not be wrapped again, and A and B stay as they are, and trainable.
# - *Return the model*, the same one, changed in place.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# Write two functions: one that freezes and then calls the other, which is recursive and only
# replaces.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `list(model.named_children())` first, since you change the children while you go through them.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# In the recursion: `if isinstance(child, Linear): setattr(...)`, `elif not isinstance(child,
# LinearWithLoRA): recurse into child`.
#
# </details>
#
# <details><summary>Hint 4</summary>
#
# For the second call: freezing all would freeze the A and B of the first call. Freeze only
# parameters whose name does not contain `.lora.` (see `named_parameters()`).
#
# </details>

# %%
import numpy as np

import minilora as ml
from minilora import check
from minilora import Linear, LinearWithLoRA

# %% tags=["solution"]
def replace_linear(model, rank, alpha):
    """Wrap every Linear below `model` in LinearWithLoRA(linear, rank, alpha); return the model."""
    ### BEGIN SOLUTION
    for name, parameter in model.named_parameters():
        if ".lora." not in name:
            parameter.requires_grad = False

    def replace(parent):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, LinearWithLoRA(child, rank, alpha))
            elif not isinstance(child, LinearWithLoRA):
                replace(child)

    replace(model)
    return model
    ### END SOLUTION

# %% tags=["check"]
check.replace_linear(replace_linear)

# %% [markdown]
# ## What you should see
#
# The check says *correct*. On the model that this library ships:

# %% tags=["look"]
model = replace_linear(ml.load_base("small"), rank=8, alpha=16)
model.print_trainable_parameters()

# %% [markdown]
# ## To think about
#
# Your function freezes first and replaces then. What would happen in the other order, and how
# would you notice?
