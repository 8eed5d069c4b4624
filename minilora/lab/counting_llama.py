"""Bytes and FLOPs of fine-tuning a Llama, by formula; and the bytes of a base in few bits.

As in `counting`, only shapes are needed, and dropout is taken to be 0. The tests compare the
numbers with those of a real step. In the code, n = B T is the number of positions of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.lab.counting import Architecture, Memory, llama_architecture
from minilora.lora.qlora import FORMATS
from minilora.lora.targets import match_names
from minilora.nn.llama import LlamaConfig
from minilora.nn.normal_float import NF4, SCALE_BLOCK
from minilora.nn.quantized import Q4_1, Int8
from minilora.nn.validate import check_sizes, closest, float_dtype

BLOCK_BYTES = {Int8: 32 + 2, Q4_1: 16 + 2 + 2, NF4: 32 + 4}  # of the codes, and of the scales
Shapes = dict[str, tuple[int, int]]  # {name: (in_features, out_features)}


def quantized_bytes(in_features: int, out_features: int, kind: str, double: bool = True) -> int:
    """Count the bytes of a matrix that `quantize` has stored, with its scales.

    Each column is cut into blocks, and the last one takes as much as a full one. Arguments as in
    `quantize`; double quantisation has 1 byte for a scale, and 4 for every 256, and for their mean.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}, got {kind!r}"
                         f"{closest(str(kind), FORMATS)}")
    blocks = -(-in_features // FORMATS[kind].block) * out_features
    if FORMATS[kind] is NF4 and double:
        return (32 + 1) * blocks + 4 * -(-blocks // SCALE_BLOCK) + 4
    return BLOCK_BYTES[FORMATS[kind]] * blocks


def base_bytes(
    architecture: Architecture, kind: str | None = None, double: bool = True,
    dtype: Any = np.float32,
) -> int:
    """Count the bytes of a model without LoRA. It equals `stored_bytes`.

    Parameters
    ----------
    architecture : Architecture
        The shapes of the model.
    kind : str, optional
        A format of `quantize`, for the linears of the layers. None: everything is in `dtype`, as
        embeddings, biases, norms and the head are in any case.
    double : bool
        Whether NF4 has double quantisation.
    dtype : dtype
        np.float32 or np.float64.
    """
    size, layer = float_dtype(dtype).itemsize, 0
    for n, m in architecture.linears.values():
        layer += size * n * m if kind is None else quantized_bytes(n, m, kind, double)
        layer += size * m * architecture.bias
    return architecture.n_layers * layer + size * architecture.other


def llama_linears(config: LlamaConfig) -> Shapes:
    """Return {dotted name: (in_features, out_features)} of every Linear of `Llama(config)`."""
    layer = llama_architecture(config).linears
    linears = {
        f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": shape
        for i in range(config.n_layers) for name, shape in layer.items()
    }
    if not config.tie_weights:
        linears["lm_head"] = (config.d_model, config.vocab_size)
    return linears


def _trained(
    config: LlamaConfig, rank: int | None, target_modules: str | list[str] | None
) -> Shapes:
    """Return the Linears with LoRA, or if the rank is None, all: they are trained themselves."""
    linears = llama_linears(config)
    if rank is None:
        return linears
    check_sizes("LoRA", rank=rank)
    return {name: linears[name] for name in match_names(list(linears), target_modules)}


def _in_layer(i: int, linears: Shapes) -> Shapes:
    """Return those of layer i, by their last names."""
    return {name.rpartition(".")[2]: shape for name, shape in linears.items()
            if name.startswith(f"model.layers.{i}.")}


def _check_batch(owner: str, batch: int, time: int, answers: int | None) -> None:
    check_sizes(owner, batch=batch, time=time, answers=1 if answers is None else answers)
    if answers is not None and answers > batch * time:
        raise ValueError(f"{owner}: {answers} answers are more than {batch * time} tokens")


# ---- Bytes


def llama_memory(
    config: LlamaConfig, batch: int, time: int, rank: int | None = None,
    target_modules: str | list[str] | None = None, *, kind: str | None = None,
    double: bool = True, answers: int | None = None, recompute: bool = False,
    dtype: Any = np.float32,
) -> Memory:
    """Predict the bytes of a training step of `Llama(config)` on ids (batch, time) of int64.

    The prediction equals `measured_memory` to the byte. With `recompute`, backward holds what one
    layer keeps in addition.

    Parameters
    ----------
    config, batch, time : LlamaConfig, int, int
        The sizes of the model; the shape of the ids.
    rank, target_modules : int, optional; str or list of str, optional
        LoRA as in `replace_linear_with_lora`; without a rank, full fine-tuning.
    kind, double : str, optional; bool
        How the base is stored, see `base_bytes`.
    answers : int, optional
        The number of places where logits are computed, as for `answer_loss`; None: everywhere.
    recompute : bool
        Whether only the input of each layer is kept.
    dtype : dtype
        Of everything that is not quantised.

    Raises
    ------
    ValueError
        If a size is below 1, there are more answers than tokens, a target matches nothing, or a
        base in few bits is to be trained.
    """
    _check_batch("llama_memory", batch, time, answers)
    if kind is not None and rank is None:
        raise ValueError(f"a base in {kind} cannot be trained: give the rank of LoRA")
    size, architecture = float_dtype(dtype).itemsize, llama_architecture(config)
    trained = _trained(config, rank, target_modules)
    count = architecture.num_parameters if rank is None else sum(
        rank * (n + m) for n, m in trained.values())
    weights = base_bytes(architecture, kind, double, dtype) + (size * count if rank else 0)
    n, c = batch * time, config.d_model
    kept = n * c + n  # by the last norm: its input, and r
    for i in range(config.n_layers):
        kept += n * c if recompute else _kept_by_layer(
            config, batch, time, set(_in_layer(i, trained)), rank or 0)
    if "lm_head" in trained or rank is None:
        kept += (n if answers is None else answers) * (c + (rank or 0))  # x, and x A
    ids = 8 * n + (n if answers is not None else 0)  # and booleans that say where answers are
    return Memory(weights, size * count, size * 2 * count, size * kept + ids)


def _kept_by_layer(
    config: LlamaConfig, batch: int, time: int, trained: set[str], rank: int
) -> int:
    """Count the numbers that a layer keeps; `trained`: names of the Linears tuned or adapted."""
    n, c, d_q = batch * time, config.d_model, config.n_heads * config.head_dim
    count = 2 * (n * c + n)  # the norms
    count += n * (d_q + 2 * config.n_kv_heads * config.head_dim)  # q, k and v
    count += time * time + time * config.head_dim  # mask; cosines and sines of half the width
    count += 2 * n * config.d_ff  # gate and up
    # The inputs of the Linears, some of which share one. Frozen ones keep none.
    count += n * c * bool(trained & {"q_proj", "k_proj", "v_proj"})
    count += n * d_q * ("o_proj" in trained)
    count += n * c * bool(trained & {"gate_proj", "up_proj"})
    count += n * config.d_ff * ("down_proj" in trained)
    return count + n * rank * len(trained)  # x A


# ---- FLOPs


@dataclass(frozen=True)
class StepFLOPs:
    """FLOPs in the matrix products of one training step.

    Attributes
    ----------
    forward : int
        From the first layer that is run to the logits.
    backward : int
        From the logits to the lowest layer that is trained, where it stops.
    skipped : int
        What backward would cost in the layers below that.
    """

    forward: int
    backward: int
    skipped: int

    @property
    def total(self) -> int:
        """Those of forward and backward."""
        return self.forward + self.backward


def llama_flops(
    config: LlamaConfig, batch: int, time: int, rank: int | None = None,
    target_modules: str | list[str] | None = None, *, answers: int | None = None,
    first: int = 0, recompute: bool = False,
) -> StepFLOPs:
    """Count the FLOPs in the matrix products of one training step of `Llama(config)`.

    It does not depend on how the base is stored: to compute a weight from its codes takes no
    product of matrices.

    Parameters
    ----------
    config, batch, time, rank, target_modules, answers, recompute
        As in `llama_memory`.
    first : int
        The first layer to run, as in `Llama.forward`.

    Raises
    ------
    ValueError
        As `llama_memory`, or if there is no such layer.
    """
    _check_batch("llama_flops", batch, time, answers)
    if not 0 <= first <= config.n_layers:
        raise ValueError(f"there are {config.n_layers} layers, so none can be layer {first}")
    n, trained = batch * time, _trained(config, rank, target_modules)
    full, r = rank is None, rank or 0
    forward, backward = _linear_flops(
        (config.d_model, config.vocab_size), n if answers is None else answers,
        r if "lm_head" in trained else 0, full)
    skipped, reached = 0, full
    for i in range(first, config.n_layers):
        adapted = _in_layer(i, trained)
        reached = reached or bool(adapted)
        product = 2 * n * time * config.n_heads * config.head_dim  # q kᵀ, or P v
        ahead, back = 2 * product, 5 * product  # backward computes q kᵀ again
        for name, shape in llama_architecture(config).linears.items():
            more = _linear_flops(shape, n, r if name in adapted else 0, full)
            ahead, back = ahead + more[0], back + more[1]
        back += ahead if recompute else 0
        forward += ahead
        backward += back if reached else 0
        skipped += 0 if reached else back
    return StepFLOPs(forward, backward, skipped)


def _linear_flops(shape: tuple[int, int], rows: int, rank: int, full: bool) -> tuple[int, int]:
    """Count those of a Linear's forward and backward, without LoRA if the rank is 0.

    Their sum is what `counting.linear_flops` explains, unless a Linear is frozen and not adapted.
    """
    product, thin = 2 * rows * shape[0] * shape[1], 2 * rows * rank * sum(shape)
    return product + thin, (2 if full else 1) * product + 2 * thin
