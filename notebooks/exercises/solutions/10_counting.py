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
# # Exercise 10. Count, and check a published table
#
# *45 minutes. You need: notebook 6, at least its beginning.*
#
# **Goal.** Count the parameters of LoRA and of a GPT-2 for a model card, then find what is wrong
# in a table that was printed.
#
# ## The mathematics
#
# LoRA on a matrix $(n, m)$ has $r\,(n + m)$ numbers. A GPT-2 of width $d$ has
#
# - a token embedding $(V, d)$, a position embedding $(T, d)$; its head is *tied* to the former,
# - in each block: q, k, v and o, each $(d, d)$ with a bias; an MLP of $(d, 4d)$ and $(4d, d)$,
#   each with a bias; two LayerNorms with weight and bias,
# - a last LayerNorm.

# %% [markdown]
# ## Hints
#
# Open one at a time, and try again before you open the next.
#
# <details><summary>Hint 1</summary>
#
# Each Linear has $nm$ weights and $m$ biases; each LayerNorm has $2d$ numbers.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A block has $12 d^2$ weights; its biases are $4d$ in attention and $4d + d$ in the MLP.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# For the table: `f"{count / 1e6:.1f}M"` rounds to one digit. Use as many digits as are printed:
# `len(row["printed"].rstrip("M").split(".")[1])`.
#
# </details>

# %%
from minilora import check

# %% tags=["solution"]
def lora_parameters(shapes, rank):
    """shapes: a list of (n, m), one for each adapted matrix -> how many numbers A and B have."""
    ### BEGIN SOLUTION
    return sum(rank * (n + m) for n, m in shapes)
    ### END SOLUTION

# %% tags=["check"]
check.lora_parameters(lora_parameters)

# %% tags=["solution"]
def gpt_parameters(vocab_size, context_length, d_model, n_layers):
    """All parameters of a GPT-2 whose head is tied to its token embedding."""
    ### BEGIN SOLUTION
    d = d_model
    attention = 4 * (d * d + d)
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    norms = 2 * 2 * d
    return (vocab_size + context_length) * d + n_layers * (attention + mlp + norms) + 2 * d
    ### END SOLUTION

# %% tags=["check"]
check.gpt_parameters(gpt_parameters)

# %% [markdown]
# ## The table
#
# From Hu et al. 2021: LoRA of a rank on some square matrices $(d, d)$ in each layer, and the
# number of trained parameters as it is printed. Two of the counts in the tables, and one in the
# text, do not follow from their own formula, $2 \cdot L \cdot d \cdot r$ for $L$ adapted matrices
# in all.

# %%
for row in check.TABLE:
    print(row)

# %% tags=["solution"]
def find_errors(table):
    """table: a list of rows as above -> a list of names, of the rows whose printed value is not
    the count, rounded to as many digits as are printed."""
    ### BEGIN SOLUTION
    wrong = []
    for row in table:
        count = 2 * row["layers"] * row["matrices"] * row["d"] * row["rank"]
        digits = len(row["printed"].rstrip("M").split(".")[1])
        if f"{count / 1e6:.{digits}f}M" != row["printed"]:
            wrong.append(row["name"])
    return wrong
    ### END SOLUTION

# %% tags=["check"]
check.find_errors(find_errors)

# %% [markdown]
# ## What you should see
#
# All three checks say *correct*. GPT-2 small has 124,439,808 parameters:

# %% tags=["look"]
print(f"{gpt_parameters(50257, 1024, 768, 12):,}", find_errors(check.TABLE))

# %% [markdown]
# ## To think about
#
# A model card says: GPT-2 small, LoRA on `c_attn`, rank 8, 294,912 trained parameters. PEFT treats
# `c_attn` as one matrix $(d, 3d)$. Is that number right for it?
