"""A GPT: the architecture of GPT-2, at any size.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3:
pre-layer-norm blocks, learned positions, tanh-GELU, an MLP four times as wide as the model.
With GPT-2's weights it computes what GPT-2 computes. Dropout is off by default; it acts on the
embeddings and on the output of each sub-layer, not on the attention weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.nn.attention import CausalSelfAttention
from minilora.nn.layers import GELU, Dropout, Embedding, LayerNorm, Linear, TiedHead
from minilora.nn.module import Module, ModuleList
from minilora.nn.validate import Rng, check_dropout, check_flag, check_sizes, float_dtype, make_rng

GPT2_SIZES = {  # n_layers, d_model (Radford et al. 2019, table 2), n_heads (as released)
    "small": (12, 768, 12), "medium": (24, 1024, 16),
    "large": (36, 1280, 20), "xl": (48, 1600, 25),
}


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT. Raises ValueError or TypeError for impossible ones."""

    vocab_size: int  # V
    context_length: int  # the largest T, in tokens
    d_model: int  # C
    n_layers: int
    n_heads: int  # H, which must divide d_model
    bias: bool = True  # in Linears and LayerNorms; the head has none
    tie_weights: bool = False  # the head uses wte's matrix
    dropout: float = 0.0  # probability
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads"):
            check_sizes("GPTConfig", **{name: getattr(self, name)})
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.d_model % self.n_heads:
            raise ValueError("n_heads must divide d_model, got n_heads "
                             f"{self.n_heads}, d_model {self.d_model}")
        check_dropout(self.dropout)
        object.__setattr__(self, "dropout", float(self.dropout))
        check_flag(bias=self.bias, tie_weights=self.tie_weights)
        eps = self.layer_norm_eps
        if not isinstance(eps, (float, np.floating)) or not 0.0 < eps < 1.0:
            raise ValueError(f"layer_norm_eps must be a float between 0 and 1, got {eps!r}")
        object.__setattr__(self, "layer_norm_eps", float(eps))

    @classmethod
    def gpt2(cls, size: str = "small", **changes: Any) -> GPTConfig:
        """Return a published GPT-2 (small, medium, large or xl) with `changes` to its fields."""
        if size not in GPT2_SIZES:
            raise ValueError(f"size must be one of {', '.join(GPT2_SIZES)}, got {size!r}")
        n_layers, d_model, n_heads = GPT2_SIZES[size]
        sizes: dict[str, Any] = {"vocab_size": 50257, "context_length": 1024, "d_model": d_model,
                                 "n_layers": n_layers, "n_heads": n_heads, "tie_weights": True}
        return cls(**(sizes | changes))


class MLP(Module):
    """y = down_proj(gelu(up_proj(x))): x (B, T, C) -> y (B, T, C), 4 C wide in the middle."""

    def __init__(self, config: GPTConfig, dtype: Any = np.float32, rng: Rng = None):
        rng = make_rng(rng)
        self.up_proj = Linear(config.d_model, 4 * config.d_model, config.bias, dtype, rng)
        self.gelu = GELU()
        self.down_proj = Linear(4 * config.d_model, config.d_model, config.bias, dtype, rng)
        self.dropout = Dropout(config.dropout, rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.down_proj(self.gelu(self.up_proj(x))))

    def backward(self, dout: np.ndarray) -> np.ndarray:
        dout = self.down_proj.backward(self.dropout.backward(dout))
        return self.up_proj.backward(self.gelu.backward(dout))


class Block(Module):
    """x = x + attn(ln_1(x));  x = x + mlp(ln_2(x)): (B, T, C) -> (B, T, C), pre-norm."""

    def __init__(self, config: GPTConfig, dtype: Any = np.float32, rng: Rng = None):
        rng, c = make_rng(rng), config
        self.ln_1 = LayerNorm(c.d_model, c.bias, c.layer_norm_eps, dtype)
        self.attn = CausalSelfAttention(c.d_model, c.n_heads, c.bias, c.dropout, dtype, rng)
        self.ln_2 = LayerNorm(c.d_model, c.bias, c.layer_norm_eps, dtype)
        self.mlp = MLP(c, dtype, rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """A sum passes its gradient to both terms: dx = dout + (the branch's gradient)."""
        dout = dout + self.ln_2.backward(self.mlp.backward(dout))
        return dout + self.ln_1.backward(self.attn.backward(dout))


class GPT(Module):
    """logits = lm_head(ln_f(blocks(wte[ids] + wpe[positions]))): (B, T) -> (B, T, vocab_size)

    To classify, replace the head, ``model.lm_head = Linear(d_model, num_classes)``, and read
    the logits at the last token.

    Initialised like GPT-2: normal with standard deviation 0.02, divided by sqrt(2 n_layers) in
    the two projections of a block that feed the residual stream; biases are zero.

    Attributes
    ----------
    wte : Embedding(vocab_size, d_model)
    wpe : Embedding(context_length, d_model)
    h : ModuleList of n_layers Blocks
    ln_f : LayerNorm(d_model)
    lm_head : Linear(d_model, vocab_size, bias=False); with tied weights, a TiedHead that shares
        wte's Parameter, so there is no head matrix to adapt
    """

    def __init__(self, config: GPTConfig, rng: Rng = 0, dtype: Any = np.float32):
        rng, dtype, c = make_rng(rng), float_dtype(dtype), config
        self.config = config
        self.wte = Embedding(c.vocab_size, c.d_model, dtype, rng)
        self.wpe = Embedding(c.context_length, c.d_model, dtype, rng)
        self.drop = Dropout(c.dropout, rng)
        self.h = ModuleList(Block(c, dtype, rng) for _ in range(c.n_layers))
        self.ln_f = LayerNorm(c.d_model, c.bias, c.layer_norm_eps, dtype)
        self.lm_head: Module = TiedHead(self) if c.tie_weights else Linear(
            c.d_model, c.vocab_size, bias=False, dtype=dtype, rng=rng)
        vars(self.lm_head)["of_config"] = True  # a head that replaces it belongs to a task
        self._initialise(rng)

    def _initialise(self, rng: np.random.Generator) -> None:
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.data[...] = 0.0
            elif p.data.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 * ((2 * self.config.n_layers) ** -0.5 if residual else 1.0)
                rng.standard_normal(dtype=p.dtype, out=p.data)
                p.data *= std

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Token ids (B, T) -> logits (B, T, vocab_size).

        Raises ValueError if T is 0 or above context_length, or for ids outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.context_length:
            raise ValueError("ids must have shape (batch, time) with time from 1 to "
                             f"{self.config.context_length}, got {ids.shape}")
        x = self.drop(self.wte(ids) + self.wpe(np.arange(ids.shape[1])))
        for block in self.h:
            x = block(x)
        self._save()  # nothing, but backward must follow a forward
        return self.lm_head(self.ln_f(x))

    def backward(self, dout: np.ndarray) -> None:
        """Fill the gradients from dlogits (B, T, vocab_size). Token ids have no gradient.

        Stops at the lowest trainable module: what lies below it costs nothing.
        """
        self._take()
        trunk = [self.drop, *self.h, self.ln_f, self.lm_head]
        embedded = self.wte.is_trainable() or self.wpe.is_trainable()
        while not embedded and trunk and not trunk[0].is_trainable():
            trunk.pop(0)
        dx = dout
        for module in reversed(trunk):
            dx = module.backward(dx)
        if embedded:
            self.wpe.backward(dx.sum(axis=0))  # every row of the batch has the same positions
            self.wte.backward(dx)

    def extra_repr(self) -> str:
        return f"context_length={self.config.context_length}"
