"""Multi-head causal self-attention, with q, k, v and o as four separate linear layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.nn.functional import attention_weights, causal_attention, causal_attention_backward
from minilora.nn.layers import Dropout, Linear, Rng
from minilora.nn.module import Module, make_rng
from minilora.nn.validate import check_sizes


class CausalSelfAttention(Module):
    """out = o_proj(concat over heads of softmax(q kᵀ / sqrt(D) + mask) v)

    q_proj, k_proj, v_proj, o_proj   Linear(d_model, d_model)
    dropout                          on the output, as GPT-2's resid_dropout

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2; each head has the width
    D = d_model / n_heads. Raises ValueError where n_heads does not divide d_model.
    """

    def __init__(
        self, d_model: int, n_heads: int, bias: bool = True, dropout: float = 0.0,
        dtype: Any = np.float32, rng: Rng = None,
    ):
        check_sizes("CausalSelfAttention", d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model, got {n_heads} and {d_model}")
        rng = make_rng(rng)
        self.n_heads = n_heads
        self.q_proj = Linear(d_model, d_model, bias, dtype, rng)
        self.k_proj = Linear(d_model, d_model, bias, dtype, rng)
        self.v_proj = Linear(d_model, d_model, bias, dtype, rng)
        self.o_proj = Linear(d_model, d_model, bias, dtype, rng)
        self.dropout = Dropout(dropout, rng)

    def split_heads(self, x: np.ndarray) -> np.ndarray:
        """View the channels as heads: (B, T, C) -> (B, H, T, D)."""
        b, t, c = x.shape
        return x.reshape(b, t, self.n_heads, c // self.n_heads).swapaxes(1, 2)

    def join_heads(self, x: np.ndarray) -> np.ndarray:
        """Undo `split_heads`: (B, H, T, D) -> (B, T, C)."""
        b, h, t, d = x.shape
        return x.swapaxes(1, 2).reshape(b, t, h * d)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> (B, T, C)."""
        if np.ndim(x) != 3 or not np.shape(x)[1]:
            raise ValueError(
                f"attention expects input of shape (B, T, C) with T at least 1, got {np.shape(x)}"
            )
        q = self.split_heads(self.q_proj(x))
        k = self.split_heads(self.k_proj(x))
        v = self.split_heads(self.v_proj(x))
        out, cache = causal_attention(q, k, v)
        self._save(cache)
        return self.dropout(self.o_proj(self.join_heads(out)))

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Back through o_proj, the attention of each head, and q, k, v; dx is their sum."""
        (cache,) = self._take()
        projections = (self.q_proj, self.k_proj, self.v_proj)
        below = [input_grad or projection.is_trainable() for projection in projections]
        dheads = self.o_proj.backward(self.dropout.backward(dout), any(below))
        if not any(below):
            return None
        gradients = causal_attention_backward(self.split_heads(dheads), cache)
        dx = None
        for projection, gradient, needed in zip(projections, gradients, below, strict=True):
            if needed:
                part = projection.backward(self.join_heads(gradient), input_grad)
                dx = part if dx is None else dx + part
        return dx if input_grad else None

    def attention_weights(self, x: np.ndarray) -> np.ndarray:
        """Return the attention weights, to look at: x (B, T, C) -> (B, H, T, T), rows sum to 1.

        Takes the place of what q_proj and k_proj kept for a backward.
        """
        q = self.split_heads(self.q_proj(x))
        k = self.split_heads(self.k_proj(x))
        return attention_weights(q, k)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}"
