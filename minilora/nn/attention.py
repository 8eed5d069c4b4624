"""Multi-head causal self-attention, with q, k, v and o as four separate linear layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.nn.fast import causal_attention, causal_attention_backward
from minilora.nn.functional import attention_weights
from minilora.nn.layers import Dropout, Linear
from minilora.nn.module import Module
from minilora.nn.validate import Rng, check_sizes, make_rng


class CausalSelfAttention(Module):
    """out = o_proj(concat over heads of softmax(q kᵀ / sqrt(D) + mask) v)

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2. x and out are (B, T, d_model),
    and each head has width D = d_model / n_heads. Raises ValueError unless that is whole.

    Attributes
    ----------
    q_proj, k_proj, v_proj, o_proj : Linear(d_model, d_model)
    dropout : Dropout on the output, as resid_dropout in GPT-2
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
        """x (B, T, C) -> (B, T, C). Raises ValueError for other shapes, or if T is 0."""
        if np.ndim(x) != 3 or not np.shape(x)[1]:
            raise ValueError("attention expects input of shape (B, T, C) with T at least 1, got "
                             f"{np.shape(x)}")
        q, k, v = (self.split_heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        out, cache = causal_attention(q, k, v)
        self._save(cache)
        return self.dropout(self.o_proj(self.join_heads(out)))

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """Go back through o_proj, the heads, and q, k and v; dx is the sum over the last three."""
        (cache,) = self._take()
        dout = self.o_proj.backward(self.dropout.backward(dout))
        dq, dk, dv = causal_attention_backward(self.split_heads(dout), cache)
        dx = self.q_proj.backward(self.join_heads(dq))
        dx += self.k_proj.backward(self.join_heads(dk))
        dx += self.v_proj.backward(self.join_heads(dv))
        return dx

    def attention_weights(self, x: np.ndarray) -> np.ndarray:
        """Return the attention weights for inspection: x (B, T, C) -> (B, H, T, T), rows sum to 1.

        This overwrites what q_proj and k_proj kept for backward.
        """
        return attention_weights(self.split_heads(self.q_proj(x)), self.split_heads(self.k_proj(x)))

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}"
