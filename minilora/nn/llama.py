"""A Llama: the architecture of Llama 2 and 3, SmolLM2 and TinyLlama, at any size.

Touvron et al. 2023, "LLaMA", arXiv:2302.13971, section 2.2. Unlike a GPT it has no biases, but
RMSNorm, rotary positions, a gated MLP, and from Llama 2 on (arXiv:2307.09288), key and value heads
that several query heads share. Modules have transformers' names, so that PEFT's adapters fit.

Letters used for shapes: B batch, T time (positions), S positions that are looked at, C channels
(d_model), F d_ff, H query heads, K key heads, G = H / K, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.nn import large
from minilora.nn.functional import causal_mask, rows, softmax, softmax_backward
from minilora.nn.layers import Linear
from minilora.nn.module import Module, ModuleList, Parameter
from minilora.nn.rotary import RopeScaling, as_floats, rope_frequencies, rope_tables, rotate
from minilora.nn.validate import Rng, check_dout, check_flag, check_sizes, check_width, make_rng


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama. Raises ValueError or TypeError for impossible ones."""

    vocab_size: int  # V
    d_model: int  # C
    d_ff: int  # F
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # K, which must divide H
    context_length: int = 2048  # the largest T, in tokens
    head_dim: int = 0  # D, which must be even; 0: C / H
    tie_weights: bool = False  # the head uses the matrix of embed_tokens
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = "vocab_size d_model d_ff n_layers n_heads n_kv_heads context_length head_dim"
        for name in sizes.split():
            if name == "head_dim" and not self.head_dim:
                whole = self.d_model % self.n_heads == 0  # if not, the next line refuses 0
                object.__setattr__(self, name, self.d_model // self.n_heads if whole else 0)
            check_sizes("LlamaConfig", **{name: getattr(self, name)})
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError("n_kv_heads must divide n_heads, and head_dim be even, got "
                             f"{self.n_kv_heads}, {self.n_heads} and {self.head_dim}")
        check_flag(tie_weights=self.tie_weights)
        as_floats(self, rms_norm_eps=(0.0, 1.0), rope_theta=(1.0, 1e30))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise TypeError(f"rope_scaling must be a RopeScaling, got {self.rope_scaling!r}")

    @property
    def frequencies(self) -> np.ndarray:
        return rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)


# ---- RMSNorm. Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4, and eps.


class RMSNorm(Module):
    """y = xhat * weight, xhat = x r, r = 1 / sqrt(mean(x²) + eps): (..., width) -> (..., width)

    Unlike layer normalisation, it subtracts no mean. `weight` is a Parameter (width,), ones.
    """

    def __init__(self, width: int, eps: float = 1e-5, dtype: Any = np.float32):
        check_sizes("RMSNorm", width=width)
        self.weight, self.eps = Parameter(np.ones(width, dtype)), eps

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., width) -> y (..., width). Raises ValueError for other widths."""
        x = check_width(self, x, self.weight.size, self.weight.dtype)
        r = 1.0 / np.sqrt(np.vecdot(x, x)[..., None] * (1.0 / x.shape[-1]) + self.eps)
        self._save(x, r)
        return x * r * self.weight.data

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dweight = sum of dout * xhat;  with g = dout * weight, dx = r (g - xhat mean(g xhat))."""
        x, r = self._take()
        dout = check_dout(self, dout, x.shape, x.dtype)
        xhat, g = x * r, dout * self.weight.data
        if self.weight.requires_grad:
            self.weight.accumulate(rows(dout * xhat).sum(axis=0))
        return r * (g - xhat * (np.vecdot(g, xhat)[..., None] * (1.0 / x.shape[-1])))

    def extra_repr(self) -> str:
        return f"{self.weight.size}, eps={self.eps}"


# ---- Grouped-query attention. Ainslie et al. 2023, "GQA", arXiv:2305.13245, section 2.2.


def grouped_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, tuple]:
    """out = P v with P = softmax(q kᵀ / sqrt(D) + mask), and the cache for backward.

    q and out are (B, H, T, D), k and v (B, K, S, D), the mask (T, S) or (B, 1, 1, T, S). The G
    query heads that share a key head are stacked, as if they were G T positions of one head.
    P is not kept: backward computes it again, which takes less memory than storing it.
    """
    shape, stacked = q.shape, q.shape[1] // k.shape[1] * q.shape[2]
    q = q.reshape(*k.shape[:2], stacked, q.shape[-1])  # (B, K, G T, D)
    return (_grouped_weights(q, k, mask) @ v).reshape(shape), (q, k, v, mask)


def _grouped_weights(q: np.ndarray, k: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return P: q (B, K, G T, D), k (B, K, S, D) -> (B, K, G T, S). `by_head` is a view."""
    scores = q @ k.swapaxes(-1, -2) * (1.0 / math.sqrt(q.shape[-1]))
    by_head = scores.reshape(*k.shape[:2], q.shape[2] // mask.shape[-2], *mask.shape[-2:])
    by_head += mask
    return softmax(scores)


def grouped_attention_backward(
    dout: np.ndarray, cache: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (dq, dk, dv). For the formulas, see `causal_attention_backward`.

    The products over G T stacked positions add up what the heads of a group give to dk and dv.
    """
    q, k, v, mask = cache
    dheads = dout.reshape(q.shape)
    p = _grouped_weights(q, k, mask)
    dv = p.swapaxes(-1, -2) @ dheads
    ds = softmax_backward(dheads @ v.swapaxes(-1, -2), p) * (1.0 / math.sqrt(q.shape[-1]))
    return (ds @ k).reshape(dout.shape), ds.swapaxes(-1, -2) @ q, dv


class GroupedQueryAttention(Module):
    """out = o_proj(concat over heads of P v), with q and k rotated by their positions.

    q_proj is a Linear(C, H D), k_proj and v_proj (C, K D), o_proj (H D, C).
    """

    def __init__(self, config: LlamaConfig, dtype: Any = np.float32, rng: Rng = None):
        rng, c = make_rng(rng), config
        self.config = config
        self.q_proj = Linear(c.d_model, c.n_heads * c.head_dim, False, dtype, rng)
        self.k_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, False, dtype, rng)
        self.v_proj = Linear(c.d_model, c.n_kv_heads * c.head_dim, False, dtype, rng)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.d_model, False, dtype, rng)

    def split_heads(self, x: np.ndarray) -> np.ndarray:
        """View the channels as heads: (B, T, H D) -> (B, H, T, D)."""
        d = self.config.head_dim
        return x.reshape(*x.shape[:2], x.shape[2] // d, d).swapaxes(1, 2)

    def join_heads(self, x: np.ndarray) -> np.ndarray:
        """Undo `split_heads`: (B, H, T, D) -> (B, T, H D)."""
        return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> (B, T, C)."""
        q, k, v = (self.split_heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = rope_tables(np.arange(x.shape[1]), self.config.frequencies, q.dtype)
        mask = causal_mask(x.shape[1], q.dtype)
        out, cache = grouped_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        self._save(cache, cos, sin)
        return self.o_proj(self.join_heads(out))

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """Go back through o_proj, the heads, the rotations, q, k and v; dx is the sum of three."""
        cache, cos, sin = self._take()
        dheads = self.split_heads(self.o_proj.backward(dout))
        dq, dk, dv = grouped_attention_backward(dheads, cache)
        dx = self.q_proj.backward(self.join_heads(rotate(dq, cos, -sin)))
        dx += self.k_proj.backward(self.join_heads(rotate(dk, cos, -sin)))
        dx += self.v_proj.backward(self.join_heads(dv))
        return dx


# ---- The gated MLP. Shazeer 2020, "GLU Variants Improve Transformer", equation 6.


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # exp(-x) = inf correctly gives 0
        return 1.0 / (1.0 + np.exp(-x))


class SwiGLU(Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)), silu(g) = g sigmoid(g): (B, T, C) -> same

    gate_proj and up_proj are Linear(C, F), down_proj is (F, C).
    """

    def __init__(self, config: LlamaConfig, dtype: Any = np.float32, rng: Rng = None):
        rng = make_rng(rng)
        self.gate_proj = Linear(config.d_model, config.d_ff, False, dtype, rng)
        self.up_proj = Linear(config.d_model, config.d_ff, False, dtype, rng)
        self.down_proj = Linear(config.d_ff, config.d_model, False, dtype, rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> y (B, T, C)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        self._save(gate, up)
        return self.down_proj(gate * sigmoid(gate) * up)

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dup = dh silu(g), dg = dh up silu'(g), silu'(g) = s + g s (1 - s) with s = sigmoid(g)."""
        gate, up = self._take()
        dh = self.down_proj.backward(dout)
        s = sigmoid(gate)
        silu = gate * s
        dx = self.up_proj.backward(dh * silu)
        dx += self.gate_proj.backward(dh * up * (s + silu * (1.0 - s)))
        return dx


class LlamaBlock(Module):
    """x = x + self_attn(input_layernorm(x));  x = x + mlp(post_attention_layernorm(x))"""

    def __init__(self, config: LlamaConfig, dtype: Any = np.float32, rng: Rng = None):
        rng, c = make_rng(rng), config
        self.input_layernorm = RMSNorm(c.d_model, c.rms_norm_eps, dtype)
        self.self_attn = GroupedQueryAttention(c, dtype, rng)
        self.post_attention_layernorm = RMSNorm(c.d_model, c.rms_norm_eps, dtype)
        self.mlp = SwiGLU(c, dtype, rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """A sum passes its gradient to both terms: dx = dout + (the branch's gradient)."""
        dout = dout + self.post_attention_layernorm.backward(self.mlp.backward(dout))
        return dout + self.input_layernorm.backward(self.self_attn.backward(dout))


class LlamaModel(Module):
    """embed_tokens, layers and norm: what transformers has under the name `model`."""

    def __init__(self, config: LlamaConfig, dtype: Any = np.float32, rng: Rng = None):
        rng, c = make_rng(rng), config
        self.embed_tokens = large.LargeEmbedding(c.vocab_size, c.d_model, dtype, rng)
        self.layers = ModuleList(LlamaBlock(c, dtype, rng) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.d_model, c.rms_norm_eps, dtype)


class Llama(Module):
    """logits = lm_head(norm(layers(embed_tokens[ids]))): (B, T) -> (B, T, vocab_size)

    Initialised as by transformers: matrices normal with standard deviation 0.02, norms 1. lm_head
    is a Linear(C, V); with tied weights, it shares embed_tokens's matrix, and none can be adapted.

    Set `recompute = True` to keep only the input of each layer in forward; backward runs the
    layer's forward again. Less memory, more time: Chen et al. 2016, arXiv:1604.06174.
    """

    def __init__(self, config: LlamaConfig, rng: Rng = 0, dtype: Any = np.float32):
        rng, c = make_rng(rng), config
        self.config, self.recompute = config, False
        self.model = LlamaModel(c, dtype, rng)
        self.lm_head: Module = (large.BlockedHead(self.model, "embed_tokens") if c.tie_weights else
                                Linear(c.d_model, c.vocab_size, False, dtype, rng))
        vars(self.lm_head)["of_config"] = True  # a head that replaces it belongs to a task
        for p in self.parameters():
            if p.data.ndim == 2:
                rng.standard_normal(dtype=p.dtype, out=p.data)
                p.data *= 0.02

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Token ids (B, T) -> (B, T, C). Raises ValueError for a wrong shape or T, or wrong ids."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.context_length:
            raise ValueError("ids must have shape (batch, time) with time from 1 to "
                             f"{self.config.context_length}, got {ids.shape}")
        return self.model.embed_tokens(ids)

    def forward(
        self, ids: np.ndarray, where: np.ndarray | None = None, first: int = 0
    ) -> np.ndarray:
        """Token ids (B, T) -> logits (B, T, V), or with `where` only those that are needed, (n, V).

        Parameters
        ----------
        where : booleans (B, T), True at n places; the head is a small model's costliest layer
        first : if above 0, `ids` are what `states` returned for this layer
        """
        x = self.embed(ids) if first == 0 else large.check_states(ids, self.config.d_model)
        kept = []
        for layer in large.layers_from(first, self.model.layers):
            if self.recompute and self.training:
                kept.append(large.Rerun(layer, x))
            x = layer(x)
            if kept:
                large.forget(layer)
        x = self.model.norm(x)
        self._save(x.shape, where, first, kept)
        return self.lm_head(large.at_places(x, where))

    def backward(self, dout: np.ndarray) -> None:
        """Fill the gradients from dlogits, of the logits' shape. Token ids have no gradient.

        Stops at the lowest trainable layer: what lies below it costs nothing.
        """
        shape, where, first, kept = self._take()
        dx = self.lm_head.backward(dout)
        if where is not None:
            dx, picked = np.zeros(shape, dx.dtype), dx
            dx[where] = picked
        dx = self.model.norm.backward(dx)
        embedded = first == 0 and self.model.embed_tokens.is_trainable()
        layers = large.layers_from(first, self.model.layers)
        while not embedded and layers and not layers[0].is_trainable():
            layers.pop(0)
        for layer in reversed(layers):
            if kept:
                kept.pop().run()
            dx = layer.backward(dx)
        if embedded:
            self.model.embed_tokens.backward(dx)

    def states(self, ids: np.ndarray, layer: int) -> np.ndarray:
        """Return what enters a layer: ids (B, T) -> (B, T, C). It and those above are not run."""
        x, above = self.embed(ids), large.layers_from(layer, self.model.layers)
        for below in list(self.model.layers)[: self.config.n_layers - len(above)]:
            x = below(x)
            large.forget(below)
        return x
