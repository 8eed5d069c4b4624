"""A GPT: the architecture of GPT-2, at any size.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3:
pre-layer-norm blocks, learned positions, tanh-GELU, an MLP four times as wide as the model.
Given its weights it computes what GPT-2 does. Dropout, off by default, is on the embeddings and
on the output of each sub-layer, and not on the attention weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.nn.attention import CausalSelfAttention
from minilora.nn.functional import matmul, token_ids, weight_grad
from minilora.nn.layers import (
    GELU,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Rng,
)
from minilora.nn.module import (
    Module,
    ModuleList,
    backward_through,
    float_dtype,
    make_rng,
)
from minilora.nn.validate import check_dout, check_dropout, check_sizes

GPT2_SIZES = {  # n_layers, d_model, n_heads: Radford et al. 2019, table 2
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT. Raises ValueError or TypeError for what cannot be."""

    vocab_size: int
    context_length: int
    d_model: int
    n_layers: int
    n_heads: int
    bias: bool = True
    tie_weights: bool = False
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads"):
            check_sizes("GPTConfig", **{name: getattr(self, name)})
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model, got n_heads {self.n_heads}, d_model {self.d_model}"
            )
        check_dropout(self.dropout)
        object.__setattr__(self, "dropout", float(self.dropout))
        for name in ("bias", "tie_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.layer_norm_eps, float) or not 0.0 < self.layer_norm_eps < 1.0:
            raise ValueError(f"layer_norm_eps must be in 0..1, got {self.layer_norm_eps!r}")

    @classmethod
    def gpt2(cls, size: str = "small", **changes: Any) -> GPTConfig:
        """Return the configuration of the published GPT-2: small, medium, large or xl."""
        if size not in GPT2_SIZES:
            raise ValueError(f"size must be one of {', '.join(GPT2_SIZES)}, got {size!r}")
        n_layers, d_model, n_heads = GPT2_SIZES[size]
        sizes = dict(
            vocab_size=50257, context_length=1024, d_model=d_model, n_layers=n_layers,
            n_heads=n_heads, tie_weights=True,
        )
        return cls(**(sizes | changes))


class MLP(Module):
    """y = down_proj(gelu(up_proj(x))), four times as wide in the middle."""

    def __init__(self, config: GPTConfig, dtype: Any = np.float32, rng: Rng = None):
        rng = make_rng(rng)
        self.up_proj = Linear(config.d_model, 4 * config.d_model, config.bias, dtype, rng)
        self.gelu = GELU()
        self.down_proj = Linear(4 * config.d_model, config.d_model, config.bias, dtype, rng)
        self.dropout = Dropout(config.dropout, rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> (B, T, C)."""
        return self.dropout(self.down_proj(self.gelu(self.up_proj(x))))

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        chain = [self.up_proj, self.gelu, self.down_proj, self.dropout]
        return backward_through(chain, dout, input_grad)


class Block(Module):
    """x = x + attn(ln_1(x));  x = x + mlp(ln_2(x))"""

    def __init__(self, config: GPTConfig, dtype: Any = np.float32, rng: Rng = None):
        rng = make_rng(rng)
        c = config
        self.ln_1 = LayerNorm(c.d_model, c.bias, c.layer_norm_eps, dtype)
        self.attn = CausalSelfAttention(c.d_model, c.n_heads, c.bias, c.dropout, dtype, rng)
        self.ln_2 = LayerNorm(c.d_model, c.bias, c.layer_norm_eps, dtype)
        self.mlp = MLP(c, dtype, rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """A sum passes its gradient to both terms: dx = dout + (the branch's gradient)."""
        below = input_grad or self.ln_1.is_trainable() or self.attn.is_trainable()
        branch = backward_through([self.ln_2, self.mlp], dout, below)
        if not below:
            return None
        dx = dout + branch
        branch = backward_through([self.ln_1, self.attn], dx, input_grad)
        return dx + branch if input_grad else None


class GPT(Module):
    """logits = lm_head(ln_f(blocks(wte[ids] + wpe[positions])))

    wte       Embedding(vocab_size, d_model)
    wpe       Embedding(context_length, d_model)
    h         n_layers Blocks
    ln_f      LayerNorm(d_model)
    lm_head   Linear(d_model, vocab_size, bias=False), or None with tied weights: then the
              logits are x wteᵀ, and there is no head matrix to adapt

    To classify, replace the head: ``model.lm_head = Linear(d_model, num_classes)``, and read
    the logits at the last token.

    Initialised as GPT-2: normal with standard deviation 0.02, biases zero, and the two
    projections that end in the residual stream divided by sqrt(2 n_layers).
    """

    def __init__(self, config: GPTConfig, rng: Rng = 0, dtype: Any = np.float32):
        rng, dtype, c = make_rng(rng), float_dtype(dtype), config
        self.config = config
        self.wte = Embedding(c.vocab_size, c.d_model, dtype, rng)
        self.wpe = Embedding(c.context_length, c.d_model, dtype, rng)
        self.drop = Dropout(c.dropout, rng)
        self.h = ModuleList(Block(c, dtype, rng) for _ in range(c.n_layers))
        self.ln_f = LayerNorm(c.d_model, c.bias, c.layer_norm_eps, dtype)
        self.lm_head = None
        if not c.tie_weights:
            self.lm_head = Linear(c.d_model, c.vocab_size, bias=False, dtype=dtype, rng=rng)
        self._initialise(rng)

    def _initialise(self, rng: np.random.Generator) -> None:
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.data[...] = 0.0
            elif p.data.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 * ((2 * self.config.n_layers) ** -0.5 if residual else 1.0)
                rng.standard_normal(dtype=p.data.dtype, out=p.data)
                p.data *= std

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Token ids (B, T) -> logits (B, T, vocab_size).

        Raises ValueError unless 1 <= T <= context_length and every id is in the vocabulary.
        """
        ids = token_ids(ids, self.wte.weight.shape[0])
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.context_length:
            raise ValueError(
                "ids must have shape (batch, time) with time from 1 to "
                f"{self.config.context_length}, got {ids.shape}"
            )
        x = self.drop(self.wte(ids) + self.wpe(np.arange(ids.shape[1])))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if self.lm_head is not None:
            self._save(None, None)
            return self.lm_head(x)
        logits = matmul(x, self.wte.weight.data.T)
        self._save(x if self.wte.weight.requires_grad else None, logits.shape)
        return logits

    def backward(self, dout: np.ndarray, input_grad: bool = False) -> None:
        """Fill the gradients from dlogits (B, T, vocab_size). Token ids have no gradient.

        Stops below the lowest trainable parameter: what lies under it costs nothing.
        """
        x, shape = self._take()
        trunk = [self.drop, *self.h, self.ln_f]
        embeddings = self.wte.is_trainable() or self.wpe.is_trainable()
        if self.lm_head is not None:
            dx = backward_through([*trunk, self.lm_head], dout, embeddings)
        else:
            dout = check_dout(self, dout, shape, self.wte.weight.data.dtype)
            if x is None and self.wte.weight.requires_grad:
                raise RuntimeError("wte was frozen in forward and is not in backward")
            if x is not None:
                self.wte.weight.accumulate(weight_grad(dout, x))
            below = embeddings or any(module.is_trainable() for module in trunk)
            dx = matmul(dout, self.wte.weight.data) if below else None
            dx = backward_through(trunk, dx, embeddings)
        if embeddings:
            self.wpe.backward(dx.sum(axis=0))
            self.wte.backward(dx)

    def extra_repr(self) -> str:
        tied = ", tie_weights=True" if self.lm_head is None else ""
        return f"context_length={self.config.context_length}{tied}"


def generate(
    model: GPT,
    ids: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    rng: Rng = None,
) -> np.ndarray:
    """Continue token ids (B, T), or (T,), by `max_new_tokens` sampled one at a time.

    Each token is drawn from softmax(logits / temperature) among the `top_k` likeliest (more
    where logits are equal); temperature 0 always takes the likeliest. Only the last
    `context_length` tokens are read. Raises ValueError for a temperature that is negative or
    not finite, top_k below 1, or an empty prompt; FloatingPointError for logits that are nan.
    """
    ids = token_ids(ids, model.wte.weight.shape[0])
    chunks = [ids, *sample_tokens(model, ids, max_new_tokens, temperature, top_k, rng)]
    return np.concatenate(chunks, axis=-1)


def sample_tokens(
    model: GPT,
    ids: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    rng: Rng = None,
) -> Iterator[np.ndarray]:
    """Yield the tokens of `generate` as they come, each (B, 1), or (1,) for ids (T,)."""
    ids = token_ids(ids, model.wte.weight.shape[0]).astype(np.int64)
    if ids.ndim not in (1, 2) or not ids.shape[-1]:
        raise ValueError(f"ids must be (T,) or (B, T) with T at least 1, got {ids.shape}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
    for name, value, least in (("top_k", top_k, 1), ("max_new_tokens", max_new_tokens, 0)):
        if value is not None and not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    rng, training, context = make_rng(rng), model.training, np.atleast_2d(ids)
    model.eval()
    try:
        for _ in range(max_new_tokens):
            context = context[:, -model.config.context_length :]
            logits = model(context)[:, -1].astype(np.float64)
            if logits.shape[-1] != model.config.vocab_size:
                raise ValueError(f"the model's head has {logits.shape[-1]} outputs, not one for "
                                 f"each of {model.config.vocab_size} tokens: it cannot write")
            if np.isnan(logits).any():
                raise FloatingPointError("the model's logits are nan")
            token = _sample(logits, temperature, top_k, rng)
            context = np.concatenate([context, token], axis=1)
            yield token[0] if ids.ndim == 1 else token
    finally:
        model.train(training)


def _sample(
    logits: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator
) -> np.ndarray:
    """Draw a token for each row from softmax(logits / temperature): (B, V) -> (B, 1).

    Adding Gumbel noise to the logits and taking the largest draws exactly from the soft-max.
    """
    logits = logits - logits.max(axis=-1, keepdims=True)  # so that dividing cannot overflow
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < smallest, -np.inf, logits)
    if temperature > 0.0:
        with np.errstate(over="ignore"):  # -inf is right: never drawn
            logits = logits / temperature + rng.gumbel(size=logits.shape)
    return logits.argmax(axis=-1, keepdims=True)
