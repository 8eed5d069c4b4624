"""Parameters, bytes and FLOPs by formula, without building a model.

Only shapes are needed, so a model as large as GPT-3 can be counted on a laptop. One multiply-add
counts as two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.lora.qlora import stored_bytes
from minilora.lora.targets import match_names
from minilora.nn.fast import query_blocks
from minilora.nn.gpt import GPT2_SIZES, GPTConfig
from minilora.nn.large import Rerun
from minilora.nn.llama import LlamaConfig
from minilora.nn.module import Module
from minilora.nn.validate import check_sizes, float_dtype


@dataclass(frozen=True)
class Architecture:
    """The shapes of a transformer, as far as counting needs them.

    Attributes
    ----------
    n_layers : int
    linears : dict
        {name: (in_features, out_features)} of one layer.
    bias : bool
        Whether the linears have biases.
    other : int
        All parameters outside the linears: embeddings, norms, head.
    source : str
        The publication that states the sizes.
    """

    n_layers: int
    linears: dict[str, tuple[int, int]]
    bias: bool
    other: int
    source: str

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the whole model."""
        per_layer = sum(m * n + n * self.bias for m, n in self.linears.values())
        return self.n_layers * per_layer + self.other

    def lora_parameters(
        self, rank: int, target_modules: str | list[str] | None = None
    ) -> int:
        """Count A and B on the targets: rank * (in + out) for each matrix in each layer.

        See Hu et al. 2021, section 4.2.

        Parameters
        ----------
        rank : int
            1 or more.
        target_modules : str or list of str, optional
            Names or globs; None: every linear of the layers, but not the head.

        Raises
        ------
        ValueError
            If the rank is below 1 or a target matches nothing.
        """
        check_sizes("LoRA", rank=rank)
        names = match_names(list(self.linears), target_modules)
        return self.n_layers * sum(rank * sum(self.linears[name]) for name in names)


def square_layer(d: int) -> dict[str, tuple[int, int]]:
    """Return the linears of a layer of width d whose MLP has one hidden layer of width 4 d."""
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (d, d))
    return attention | {"up_proj": (d, 4 * d), "down_proj": (4 * d, d)}


def gpt_architecture(config: GPTConfig, source: str = "") -> Architecture:
    """Return the shapes of `GPT(config)`."""
    d, v = config.d_model, config.vocab_size
    norm = d * (1 + config.bias)
    other = (v + config.context_length) * d + (2 * config.n_layers + 1) * norm
    other += 0 if config.tie_weights else v * d
    return Architecture(config.n_layers, square_layer(d), config.bias, other, source)


def bert_architecture(
    n_layers: int, d: int, vocab_size: int, positions: int, source: str
) -> Architecture:
    """Return the shapes of RoBERTa: embeddings (one token type), their norm, layers, pooler."""
    other = (vocab_size + positions + 1) * d + 2 * d + n_layers * 4 * d + d * d + d
    return Architecture(n_layers, square_layer(d), True, other, source)


def deberta_v2_architecture(
    n_layers: int, d: int, vocab_size: int, buckets: int, source: str
) -> Architecture:
    """Return the shapes of DeBERTa v2: BERT's layers, with positions relative to each other.

    Two tables of `buckets` relative positions replace the learned positions, and a convolution of
    width 3 runs beside the first layer. The token embedding, the tables and the convolution have
    a norm each.
    """
    other = vocab_size * d + 2 * buckets * d + (3 * d * d + d) + 3 * 2 * d + n_layers * 4 * d
    return Architecture(n_layers, square_layer(d), True, other, source)


def llama_architecture(config: LlamaConfig, source: str = "") -> Architecture:
    """Return the shapes of `Llama(config)`: gated MLP, no biases, norms with a weight only."""
    c, d, d_ff = config, config.d_model, config.d_ff
    d_q, d_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    linears = {
        "q_proj": (d, d_q), "k_proj": (d, d_kv), "v_proj": (d, d_kv), "o_proj": (d_q, d),
        "gate_proj": (d, d_ff), "up_proj": (d, d_ff), "down_proj": (d_ff, d),
    }
    other = c.vocab_size * d * (1 if c.tie_weights else 2) + (2 * c.n_layers + 1) * d
    return Architecture(c.n_layers, linears, False, other, source)


LLAMAS: dict[str, tuple[LlamaConfig, str]] = {  # and the source of the sizes
    "llama-2-7b": (LlamaConfig(32000, 4096, 11008, 32, 32, 32),
                   "Touvron et al. 2023, and the released configuration"),
    "llama-3.1-8b": (LlamaConfig(128256, 4096, 14336, 32, 32, 8),
                     "Dubey et al. 2024, table 3, released configuration"),
    "llama-3.2-1b": (LlamaConfig(128256, 2048, 8192, 16, 32, 8, tie_weights=True),
                     "config.json of meta-llama/Llama-3.2-1B"),
    "tinyllama-1.1b": (LlamaConfig(32000, 2048, 5632, 22, 32, 4),
                       "Zhang et al. 2024, and config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    "smollm2-135m": (LlamaConfig(49152, 576, 1536, 30, 9, 3, 8192, tie_weights=True),
                     "Allal et al. 2025, and the released configuration"),
}

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
} | {name: llama_architecture(config, source) for name, (config, source) in LLAMAS.items()}


def adapter_h_parameters(n_adapters: int, d: int, r: int) -> int:
    """Count the adapters of Houlsby et al. 2019: n (2 d r + r + d); Hu et al. 2021, section 5.1.

    Each has two layers, (d, r) and (r, d), with biases. Trained norms are left out, as in the
    GPT-3 rows of the LoRA paper's tables.
    """
    return n_adapters * (2 * d * r + r + d)


def prefix_parameters(d: int, tokens: int, n_layers: int = 1) -> int:
    """Count prefix tuning: d numbers for each of the `tokens`, in the embedding or in each layer.

    See Hu et al. 2021, section 5.1: d (l_p + l_i) for prefix-embedding tuning (n_layers 1), and
    L times that for prefix-layer tuning.
    """
    return n_layers * d * tokens


def linear_flops(in_features: int, out_features: int, rows: int, rank: int | None = None) -> int:
    """Count the FLOPs of a linear layer, forward and backward, on `rows` rows.

    Full fine-tuning (rank None) needs y, dx and dW: three products of 2 * in * out FLOPs per row.
    With LoRA the layer is frozen, so dW is not needed, but each of the two thin factors adds
    three products: 2 * (2 * in * out + 3 * rank * (in + out)) FLOPs per row. For a square layer
    of width d the ratio is 2/3 + 2r/d. So LoRA saves less than one third, and at d < 6r it costs
    more than full fine-tuning.
    """
    product = 2 * rows * in_features * out_features
    if rank is None:
        return 3 * product
    return 2 * product + 6 * rows * rank * (in_features + out_features)


def training_flops(config: GPTConfig, batch: int, rank: int | None = None) -> int:
    """Count the FLOPs in the matrix products of one training step of `GPT(config)`.

    Each block has q, k, v, o (d, d), up (d, 4d), down (4d, d), and attention's two (T, T)
    products, which cost twice as much again in backward. (They are counted in full, although
    `fast.causal_attention` skips most of the half that is masked.) A tied head has no LoRA, and
    its weight gradient is computed in full fine-tuning only.

    Parameters
    ----------
    config : GPTConfig
        The sizes of the model.
    batch : int
        Sequences of `config.context_length` tokens.
    rank : int, optional
        LoRA of this rank on every Linear; None: full fine-tuning.
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

    Attributes
    ----------
    weights : int
        All parameters, trained or not, as they are stored.
    gradients : int
        Gradients of the trained parameters.
    moments : int
        AdamW's two moments of each trained parameter.
    activations : int
        What the modules keep from forward to backward.
    """

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all four."""
        return self.weights + self.gradients + self.moments + self.activations


def training_memory(
    config: GPTConfig, batch: int, time: int, rank: int | None = None,
    target_modules: str | list[str] | None = None, dtype: Any = np.float32,
) -> Memory:
    """Predict the bytes of a training step of `GPT(config)` on ids (batch, time) of int64.

    Dropout is taken to be 0. The prediction equals `measured_memory` to the byte.

    Parameters
    ----------
    config : GPTConfig
        The sizes of the model.
    batch, time : int
        The shape of the ids.
    rank : int, optional
        LoRA of this rank; None: full fine-tuning.
    target_modules : str or list of str, optional
        Layers with LoRA, as in `replace_linear_with_lora`.
    dtype : dtype
        Of the parameters and activations.
    """
    check_sizes("training_memory", batch=batch, time=time)
    size, architecture = float_dtype(dtype).itemsize, gpt_architecture(config)
    linears = _linear_shapes(config)
    weights = trained = architecture.num_parameters
    if rank is not None:
        check_sizes("LoRA", rank=rank)
        linears = {name: linears[name] for name in match_names(list(linears), target_modules)}
        trained = sum(rank * (n_in + n_out) for n_in, n_out in linears.values())
        weights += trained
    ids = 8 * (batch * time + time)  # of tokens and of positions
    kept = _activations(config, batch, time, set(linears), rank)
    return Memory(size * weights, size * trained, size * 2 * trained, size * kept + ids)


def _linear_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Return {full name: (in_features, out_features)} of every Linear of `GPT(config)`."""
    linears = {
        f"h.{i}.{'mlp' if name in ('up_proj', 'down_proj') else 'attn'}.{name}": shape
        for i in range(config.n_layers) for name, shape in gpt_architecture(config).linears.items()
    }
    if not config.tie_weights:
        linears["lm_head"] = (config.d_model, config.vocab_size)
    return linears


def _activations(
    config: GPTConfig, batch: int, time: int, trained: set[str], rank: int | None
) -> int:
    """Count the numbers that a forward keeps; `trained`: names of the Linears tuned or adapted."""
    n, d = batch * time, config.d_model
    norm = n * d + n  # LayerNorm: xhat and 1 / sqrt(var + eps)
    count = norm
    for i in range(config.n_layers):
        names = {name.rpartition(".")[2] for name in trained if name.startswith(f"h.{i}.")}
        count += 2 * norm + _attention_cache(config, batch, time, names)
        count += n * 4 * d  # GELU's slope
        count += n * d * ("up_proj" in names) + n * 4 * d * ("down_proj" in names)  # inputs
    if "lm_head" in trained or (config.tie_weights and rank is None):
        count += n * d  # the input of the head
    if rank is not None:
        count += n * rank * len(trained)  # x A
    return count


def _attention_cache(config: GPTConfig, batch: int, time: int, trained: set[str]) -> int:
    """Count the numbers that attention keeps in one block, with its projections' inputs."""
    n, d, heads = batch * time, config.d_model, config.n_heads
    count = 4 * n * d  # q, k, v and the output
    weights = sum((block.stop - block.start) * block.stop for block in query_blocks(time))
    count += batch * heads * (weights + time)  # exp(scores - max) and its sums
    if trained & {"q_proj", "k_proj", "v_proj"}:
        count += n * d  # their input, which they share
    if "o_proj" in trained and heads > 1 and time > 1:
        count += n * d  # with one head, or at one position, this is the output itself
    return count


def measured_memory(model: Module, optimizer: Any) -> Memory:
    """Count the arrays that a real training step holds.

    Call it after a forward, a backward, an optimizer step and another forward: backward releases
    what the modules keep. An array that several modules keep, or keep a view of, counts once.
    """
    kept: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, (tuple, list, Rerun)):
            for item in [value.x] if isinstance(value, Rerun) else value:
                look(item)
        elif isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            kept[id(value)] = value.nbytes

    for _, module in model.named_modules():
        look(module._cache)
    parameters = list(model.parameters())
    return Memory(
        stored_bytes(model),
        sum(p.grad.nbytes for p in parameters if p.grad is not None),
        optimizer.state_bytes, sum(kept.values()),
    )
