"""Counting: FLOPs of a training step, by formula. One multiply-add counts as two FLOPs."""

from __future__ import annotations

from minilora.gpt import GPTConfig


def linear_flops(in_features: int, out_features: int, rows: int, rank: int | None = None) -> int:
    """FLOPs of a linear layer, forward and backward, on `rows` rows.

    Full (rank None): y, dx and dW are three products of 2 * in * out FLOPs a row. With LoRA
    the layer is frozen, so dW falls away, and the two thin factors come on top, three products
    each: a row costs 2 * (2 * in * out + 3 * rank * (in + out)). For a square layer of width d
    the ratio is 2/3 + 2r/d: below one third saved, and at d < 6r more than full fine-tuning.
    That is the plain form; where `LinearWithLoRA` folds A B into W first, it does fewer.
    """
    product = 2 * rows * in_features * out_features
    if rank is None:
        return 3 * product
    return 2 * product + 6 * rows * rank * (in_features + out_features)


def training_flops(config: GPTConfig, batch: int, rank: int | None = None) -> int:
    """FLOPs in the matrix products of one training step of a GPT; LoRA on every Linear.

    Per block: q, k, v, o (d, d), up (d, 4d), down (4d, d), and attention's two (T, T)
    products, which cost twice as much again in backward. A tied head has no LoRA, and its
    weight gradient is computed in full fine-tuning only.
    """
    d, t, v = config.d_model, config.context_length, config.vocab_size
    rows = batch * t
    attention = 3 * 2 * (2 * rows * t * d)
    block = (
        4 * linear_flops(d, d, rows, rank) + linear_flops(d, 4 * d, rows, rank)
        + linear_flops(4 * d, d, rows, rank) + attention
    )
    if config.tie_weights:
        head = 2 * rows * d * v * (3 if rank is None else 2)
    else:
        head = linear_flops(d, v, rows, rank)
    return config.n_layers * block + head
