"""Keys and values that are kept while a text is written, so that each token is read only once.

Shazeer 2019, "Fast Transformer Decoding", arXiv:1911.02150, section 2.4. No position looks at later
ones, so its keys and values stay the same when tokens are added. A new token then costs one
position, which looks at the keys of all before it, instead of the whole text again.

The models' own forwards know nothing of this: `Cache` calls the same modules in the same order, but
for the attention, to which it gives the keys and values that it has kept.

Letters used for shapes: B texts, T new positions, S positions that are looked at, C channels,
H query heads, K key heads (in a GPT, K = H), D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.lora.dora import DoRALinear
from minilora.lora.layer import LinearWithLoRA, LoRALayer
from minilora.lora.saved import ModuleToSave
from minilora.lora.surgery import lora_layers
from minilora.nn.attention import CausalSelfAttention
from minilora.nn.gpt import GPT, MLP, Block
from minilora.nn.large import BlockedHead, LargeEmbedding
from minilora.nn.layers import GELU, Dropout, Embedding, LayerNorm, Linear, TiedHead
from minilora.nn.llama import (
    GroupedQueryAttention,
    Llama,
    LlamaBlock,
    LlamaModel,
    RMSNorm,
    SwiGLU,
    grouped_attention,
)
from minilora.nn.module import Module, ModuleList, Parameter
from minilora.nn.quantized import QuantizedParameter
from minilora.nn.rotary import rope_tables, rotate

CHUNK = 256  # positions of a prompt that are read together: bounds the memory for their scores

# Modules that compute each position by itself, which `Cache` calls as they are.
BY_POSITION = (
    Linear, LinearWithLoRA, DoRALinear, LoRALayer, ModuleToSave, Embedding, LargeEmbedding,
    TiedHead, BlockedHead, LayerNorm, RMSNorm, GELU, Dropout, MLP, SwiGLU,
)
# Modules whose forward `Cache` does in its own way.
WALKED = (
    GPT, Block, CausalSelfAttention, Llama, LlamaModel, LlamaBlock, GroupedQueryAttention,
    ModuleList,
)
FORWARDS: dict[type, Callable] = {cls: cls.forward for cls in (*BY_POSITION, *WALKED)}


def can_cache(model: Module) -> bool:
    """Return whether `Cache` computes what the model's forward does.

    It knows GPT and Llama, with any adapters. It does not know subclasses, other modules in the
    place of a block or of its attention, and forwards that somebody has replaced.
    """
    walked: dict[int, Module] = {}
    for module, expected in _skeleton(model):
        if type(module) is not expected:  # what is below it may be anything
            return False
        walked[id(module)] = module
    return bool(walked) and all(
        (id(module) in walked or type(module) in BY_POSITION)
        and getattr(module.forward, "__func__", None) is FORWARDS[type(module)]
        for _, module in model.named_modules())


def _skeleton(model: Module) -> Iterator[tuple[Module, type]]:
    """Yield the modules from the model down to its attentions, with the class that each must be.

    Each is yielded before those below it are looked for.
    """
    if isinstance(model, GPT):
        yield model, GPT
        yield model.h, ModuleList
        for block in model.h:
            yield block, Block
            yield block.attn, CausalSelfAttention
    elif isinstance(model, Llama):
        yield model, Llama
        yield model.model, LlamaModel
        yield model.model.layers, ModuleList
        for layer in model.model.layers:
            yield layer, LlamaBlock
            yield layer.self_attn, GroupedQueryAttention


class Cache:
    """The keys and values of all that has been read of several texts.

    Texts of different lengths are padded on the right, where no position looks, and each has
    positions of its own. So each is computed as it would be alone.

    Parameters
    ----------
    model
        One that `can_cache`, in evaluation mode. It must not change as long as the cache is used.
    texts
        B, the number of texts.
    room
        The number of positions to reserve for each, as many as will be read at most.

    Attributes
    ----------
    seen
        How many tokens of each text have been read, (B,).
    layers
        The keys and values of each layer, both (B, K, room, D).
    """

    def __init__(self, model: GPT | Llama, texts: int, room: int):
        self.model, self.room = model, room
        self.seen = np.zeros(texts, np.int64)
        self.layers: list[tuple[np.ndarray, np.ndarray]] = []

    def next_logits(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Read what is new of each text, at least one token, and return the logits that follow.

        Parameters
        ----------
        texts
            B arrays of ids, each (its length,): those of the last call, with tokens added.

        Returns
        -------
        ndarray
            (B, V): only the last position of each text is given to the head.
        """
        new = [text[seen:] for text, seen in zip(texts, self.seen, strict=True)]
        counts = np.array([len(ids) for ids in new])
        ids = np.stack([np.pad(ids, (0, counts.max() - len(ids)), mode="edge") for ids in new])
        at = self.seen[:, None] + np.arange(ids.shape[1])
        chunks = [slice(start, start + CHUNK) for start in range(0, ids.shape[1], CHUNK)]
        x = np.concatenate([self._read(ids[:, chunk], at[:, chunk]) for chunk in chunks], axis=1)
        self.seen = self.seen + counts
        last = x[np.arange(len(x)), counts - 1]
        norm = self.model.ln_f if isinstance(self.model, GPT) else self.model.model.norm
        return self.model.lm_head(norm(last))

    def keep(self, which: np.ndarray) -> None:
        """Forget all texts but those that booleans (B,) select."""
        if not which.all():
            self.seen = self.seen[which]
            self.layers = [(keys[which], values[which]) for keys, values in self.layers]

    def _read(self, ids: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Token ids (B, T) and their positions (B, T) -> what the last layer returns, (B, T, C)."""
        model, tables = self.model, ()
        if isinstance(model, GPT):
            x = model.drop(model.wte(ids) + model.wpe(at))
            parts = [(b.ln_1, b.attn, b.ln_2, b.mlp) for b in model.h]
        else:
            x = model.model.embed_tokens(ids)
            tables = rope_tables(at[:, None], model.config.frequencies, x.dtype)
            parts = [(b.input_layernorm, b.self_attn, b.post_attention_layernorm, b.mlp)
                     for b in model.model.layers]
        seen = np.arange(at.max() + 1) <= at[:, None, None, :, None]  # (B, 1, 1, T, S)
        mask = np.where(seen, 0.0, -np.inf).astype(x.dtype)
        for i, (norm, attention, second_norm, mlp) in enumerate(parts):
            x = x + self._attend(i, attention, norm(x), at, mask, tables)
            x = x + mlp(second_norm(x))
        return x

    def _attend(
        self, layer: int, attention: Any, x: np.ndarray, at: np.ndarray, mask: np.ndarray,
        tables: tuple,
    ) -> np.ndarray:
        """Do the attention's forward, x (B, T, C) -> (B, T, C), over the keys that are kept."""
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (attention.split_heads(projection(x)) for projection in projections)
        if tables:  # a Llama's positions; a GPT's are in x
            q, k = rotate(q, *tables), rotate(k, *tables)
        if layer == len(self.layers):  # zeros, because even what has no weight must not be nan
            shape = (*k.shape[:2], self.room, k.shape[3])
            self.layers.append((np.zeros(shape, k.dtype), np.zeros(shape, v.dtype)))
        keys, values = self.layers[layer]
        texts = np.arange(len(x))[:, None]
        keys[texts, :, at], values[texts, :, at] = k.swapaxes(1, 2), v.swapaxes(1, 2)
        until = mask.shape[-1]
        heads, _ = grouped_attention(q, keys[:, :, :until], values[:, :, :until], mask)
        out = attention.o_proj(attention.join_heads(heads))
        return out if tables else attention.dropout(out)


def whole_logits(model: Any, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Return what `Cache.next_logits` does, (B, V), by the forward of any model.

    It reads the last `context_length` tokens of each text, all of them. Only texts of equal length
    are read together, because nothing is known of what the model would do with padding.
    """
    texts = [text[-model.config.context_length :] for text in texts]
    lengths = np.array([len(text) for text in texts])
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    logits = [model(np.stack([texts[i] for i in group]))[:, -1] for group in groups]
    return np.concatenate(logits)[np.argsort(np.concatenate(groups))]


# ---- Quantised weights


class Unpacked:
    """A context in which a model's quantised weights are floating-point numbers.

    A quantised weight is decoded each time that it is used. That takes several times as long as
    its product with one token, so to generate it is better to decode all of them once. This takes
    4 bytes for each weight, 538 MB for SmolLM2. Nothing else of the model changes, and at the end
    of the `with` statement its weights are the same objects as before. The context can be entered
    again: the copy is made once, and lives as long as this object.

    Parameters
    ----------
    model
        Any model. One without quantised weights is left as it is.
    """

    def __init__(self, model: Module):
        copies: dict[int, Parameter] = {}  # by id: two modules may share a weight
        self._places: list[tuple[Module, str, Parameter, Parameter]] = []
        for module, name, weight in _quantized(model):
            if id(weight) not in copies:
                copies[id(weight)] = Parameter(0.0, requires_grad=False)
                copies[id(weight)].data = weight.data  # not by the constructor, which copies it
            self._places.append((module, name, weight, copies[id(weight)]))

    def __enter__(self) -> None:
        self._swap({id(weight): copy for _, _, weight, copy in self._places})

    def __exit__(self, *error: object) -> None:
        self._swap({id(copy): weight for _, _, weight, copy in self._places})

    def _swap(self, new: dict[int, Parameter]) -> None:
        for module, name, _, _ in self._places:  # what was replaced meanwhile stays
            vars(module)[name] = new.get(id(vars(module)[name]), vars(module)[name])


def _quantized(model: Module) -> Iterator[tuple[Module, str, QuantizedParameter]]:
    """Yield (module, name of the attribute, weight) for the quantised weights that are used."""
    unused = {id(layer.linear) for _, layer in lora_layers(model) if layer.merged}
    for _, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, QuantizedParameter) and id(module) not in unused:
                yield module, name, value


def worth_unpacking(model: Module) -> bool:
    """Return whether there are quantised weights, and memory for twice their floats."""
    sizes = {id(p): p.size * p.dtype.itemsize for _, _, p in _quantized(model)}
    return 0 < 2 * sum(sizes.values()) <= _available_memory()


def _available_memory() -> int:
    """Return the bytes that are free or can be freed; where this is unknown, 4 GB is assumed."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return 1024 * int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        return 4_000_000_000
