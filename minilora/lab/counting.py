"""Counting by formula, without building anything: parameters, bytes and FLOPs.

A model as large as GPT-3 can be counted on a laptop, since nothing but its shapes is needed.
One multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.lora.wrap import folding_pays, match_names
from minilora.nn.gpt import GPT2_SIZES, GPTConfig
from minilora.nn.module import Module, float_dtype
from minilora.nn.validate import check_sizes


@dataclass(frozen=True)
class Architecture:
    """The shapes of a transformer, as far as counting needs them.

    n_layers   how many layers there are
    linears    {name: (in_features, out_features)} of one layer
    bias       whether these have biases
    other      all parameters outside them: embeddings, norms, head
    source     where the sizes were published
    """

    n_layers: int
    linears: dict[str, tuple[int, int]]
    bias: bool
    other: int
    source: str

    @property
    def num_parameters(self) -> int:
        """Count every parameter of the model."""
        per_layer = sum(m * n + n * self.bias for m, n in self.linears.values())
        return self.n_layers * per_layer + self.other

    def lora_parameters(
        self, rank: int, target_modules: str | list[str] | None = None
    ) -> int:
        """Count A and B on the targets: rank * (in + out) for each matrix in each layer.

        Hu et al. 2021, section 4.2. Targets are names or globs, None is every linear of the
        layers (not the head). ValueError for a rank below 1 or a target that fits none.
        """
        check_sizes("LoRA", rank=rank)
        names = match_names(list(self.linears), target_modules)
        return self.n_layers * sum(rank * sum(self.linears[name]) for name in names)


def attention_and_mlp(d: int, d_kv: int, **mlp: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return the linears of a layer: q, k, v, o with keys and values of width d_kv, and an MLP."""
    return {"q_proj": (d, d), "k_proj": (d, d_kv), "v_proj": (d, d_kv), "o_proj": (d, d)} | mlp


def gpt_architecture(config: GPTConfig, source: str = "") -> Architecture:
    """Return the shapes of a GPT as `GPT(config)` would have them."""
    d, v = config.d_model, config.vocab_size
    norm = d * (1 + config.bias)
    other = (v + config.context_length) * d + (2 * config.n_layers + 1) * norm
    other += 0 if config.tie_weights else v * d
    linears = attention_and_mlp(d, d, up_proj=(d, 4 * d), down_proj=(4 * d, d))
    return Architecture(config.n_layers, linears, config.bias, other, source)


def bert_architecture(
    n_layers: int, d: int, vocab_size: int, positions: int, source: str
) -> Architecture:
    """Return the shapes of RoBERTa: embeddings (one token type) and their norm, layers, pooler."""
    other = (vocab_size + positions + 1) * d + 2 * d + n_layers * 4 * d + d * d + d
    linears = attention_and_mlp(d, d, up_proj=(d, 4 * d), down_proj=(4 * d, d))
    return Architecture(n_layers, linears, True, other, source)


def deberta_v2_architecture(
    n_layers: int, d: int, vocab_size: int, buckets: int, source: str
) -> Architecture:
    """Return the shapes of DeBERTa v2: BERT's layers, with positions relative to each other.

    Instead of learned positions there are two tables of `buckets` relative ones, and beside the
    first layer a convolution of width 3; each of these, and the token embedding, has a norm.
    """
    other = vocab_size * d + 2 * buckets * d + (3 * d * d + d) + 3 * 2 * d + n_layers * 4 * d
    linears = attention_and_mlp(d, d, up_proj=(d, 4 * d), down_proj=(4 * d, d))
    return Architecture(n_layers, linears, True, other, source)


def llama_architecture(
    n_layers: int, d: int, d_kv: int, hidden: int, vocab_size: int, tied: bool, source: str
) -> Architecture:
    """Return the shapes of a Llama: gated MLP, no biases, norms with a weight only."""
    other = vocab_size * d * (1 if tied else 2) + (2 * n_layers + 1) * d
    mlp = {"gate_proj": (d, hidden), "up_proj": (d, hidden), "down_proj": (hidden, d)}
    return Architecture(n_layers, attention_and_mlp(d, d_kv, **mlp), False, other, source)


PUBLISHED: dict[str, Architecture] = {
    f"gpt2-{size}": gpt_architecture(
        GPTConfig.gpt2(size), "Radford et al. 2019, table 2 and the released weights"
    )
    for size in GPT2_SIZES
} | {
    "gpt3-175b": gpt_architecture(
        GPTConfig(50257, 2048, 12288, 96, 96, tie_weights=True), "Brown et al. 2020, table 2.1"
    ),
    "roberta-base": bert_architecture(12, 768, 50265, 514, "Liu et al. 2019, appendix, table 9"),
    "roberta-large": bert_architecture(24, 1024, 50265, 514, "Liu et al. 2019, appendix, table 9"),
    "deberta-v2-xxlarge": deberta_v2_architecture(
        48, 1536, 128100, 256, "He et al. 2021, and the released configuration"
    ),
    "llama-2-7b": llama_architecture(
        32, 4096, 4096, 11008, 32000, False, "Touvron et al. 2023, and the released configuration"
    ),
    "llama-3.1-8b": llama_architecture(
        32, 4096, 1024, 14336, 128256, False, "Dubey et al. 2024, table 3, released configuration"
    ),
    "smollm2-135m": llama_architecture(
        30, 576, 192, 1536, 49152, True, "Allal et al. 2025, and the released configuration"
    ),
}


def adapter_h_parameters(n_adapters: int, d: int, r: int) -> int:
    """Count the adapters of Houlsby et al. 2019: n (2 d r + r + d), Hu et al. 2021, section 5.1.

    Two layers, (d, r) and (r, d), with their biases. (Norms that are trained as well are left
    out, as in the GPT-3 rows of the LoRA paper's tables.)
    """
    return n_adapters * (2 * d * r + r + d)


def prefix_parameters(d: int, tokens: int, n_layers: int = 1) -> int:
    """Count prefix tuning: d numbers for each of the `tokens`, in the embedding or in each layer.

    Hu et al. 2021, section 5.1: d (l_p + l_i) for prefix-embedding tuning (n_layers 1), and L
    times that for prefix-layer tuning.
    """
    return n_layers * d * tokens


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
    linears = gpt_architecture(config).linears.values()
    block = sum(linear_flops(m, n, rows, rank) for m, n in linears) + attention
    if config.tie_weights:
        head = 2 * rows * d * v * (3 if rank is None else 2)
    else:
        head = linear_flops(d, v, rows, rank)
    return config.n_layers * block + head


# ---- Bytes of a training step


@dataclass(frozen=True)
class Memory:
    """Bytes that one training step holds.

    weights       all parameters, trained or not
    gradients     of the parameters that are trained
    moments       AdamW's two for each of them
    activations   what the modules keep from forward to backward
    """

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations


def training_memory(
    config: GPTConfig, batch: int, time: int, rank: int | None = None,
    target_modules: str | list[str] | None = None, dtype: Any = np.float32,
) -> Memory:
    """Predict the bytes of a training step of `GPT(config)` on ids (batch, time), int64.

    rank None is full fine-tuning; else LoRA, on the targets as in `replace_linear_with_lora`.
    Dropout is taken to be 0. The same, to the byte, as `measured_memory` finds.
    """
    check_sizes("training_memory", batch=batch, time=time)
    size, architecture = float_dtype(dtype).itemsize, gpt_architecture(config)
    linears = {
        f"h.{i}.{'mlp' if name in ('up_proj', 'down_proj') else 'attn'}.{name}": shape
        for i in range(config.n_layers) for name, shape in architecture.linears.items()
    }
    if not config.tie_weights:
        linears["lm_head"] = (config.d_model, config.vocab_size)
    weights = trained = architecture.num_parameters
    adapted = None
    if rank is not None:
        check_sizes("LoRA", rank=rank)
        adapted = {name: linears[name] for name in match_names(list(linears), target_modules)}
        trained = sum(rank * (n_in + n_out) for n_in, n_out in adapted.values())
        weights += trained
    ids = 8 * (batch * time + time)  # of tokens and of positions
    kept = _activations(config, batch, time, linears, adapted, rank or 0)
    return Memory(size * weights, size * trained, size * 2 * trained, size * kept + ids)


def _activations(
    config: GPTConfig, batch: int, time: int, linears: dict[str, tuple[int, int]],
    adapted: dict[str, tuple[int, int]] | None, rank: int,
) -> int:
    """Count the numbers that a forward keeps: nothing in it depends on their values."""
    n, d, heads = batch * time, config.d_model, config.n_heads
    trained = linears if adapted is None else adapted
    norm = n * d + n  # LayerNorm: xhat and 1 / sqrt(var + eps)
    # q, k, v and the output, exp(scores - max), and its row sums
    attention = 4 * n * d + batch * heads * time * time + batch * heads * time
    count = norm + config.n_layers * (2 * norm + attention + n * 4 * d)  # 4d: GELU's slope
    for i in range(config.n_layers):
        block = f"h.{i}."
        if any(f"{block}attn.{part}_proj" in trained for part in "qkv"):
            count += n * d  # their input, which they share
        if f"{block}attn.o_proj" in trained and heads > 1 and time > 1:
            count += n * d  # with one head, or at one position, it is attention's output itself
        count += n * d * (f"{block}mlp.up_proj" in trained)
        count += n * 4 * d * (f"{block}mlp.down_proj" in trained)
    if "lm_head" in trained or (config.tie_weights and adapted is None):
        count += n * d
    for n_in, n_out in (adapted or {}).values():  # W + scale * A B where it is formed, or x A
        count += n_in * n_out if folding_pays(n_in, n_out, n) else n * rank
    return count


def measured_memory(model: Module, optimizer: Any) -> Memory:
    """Count the arrays that a real step holds: call it after forward and backward and a step.

    What modules keep from forward to backward is gone by then, so do another forward first.
    An array that several modules keep, or keep a view of, counts once.
    """
    kept: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                look(item)
        elif isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            kept[id(value)] = value.nbytes

    for _, module in model.named_modules():
        look(module._cache)
    parameters = list(model.parameters())
    return Memory(
        sum(p.data.nbytes for p in parameters),
        sum(p.grad.nbytes for p in parameters if p.grad is not None),
        optimizer.state_bytes, sum(kept.values()),
    )
