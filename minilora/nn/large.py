"""What models need that are large for their machine: heads in blocks, forwards run again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from minilora.nn.fast import matmul
from minilora.nn.layers import Dropout, Embedding, TiedHead
from minilora.nn.module import M, Module, Parameter
from minilora.nn.quantized import QuantizedParameter
from minilora.nn.validate import check_dout, check_width, token_ids

HEAD_BLOCK = 8192  # words of the vocabulary


def rows_of(weight: Parameter, index: Any) -> np.ndarray:
    """Return weight.data[index]; of a quantised table, only these rows are decoded."""
    return weight.at(index) if isinstance(weight, QuantizedParameter) else weight.data[index]


class LargeEmbedding(Embedding):
    """An Embedding whose table may be quantised: ids (...) -> y (..., embedding_dim)."""

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Integer ids (...) -> y (..., embedding_dim). Raises ValueError for ids out of range."""
        ids = token_ids(ids, self.weight.shape[0])
        self._save(ids)
        return np.ascontiguousarray(rows_of(self.weight, ids))


class BlockedHead(TiedHead):
    """y = x Wᵀ with the W of an embedding, for `HEAD_BLOCK` words at a time while W is frozen.

    A vocabulary is large. If its embeddings are quantised, W is never decoded as a whole.
    """

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x (..., C) -> y (..., V). Raises ValueError for other widths."""
        if self.weight.requires_grad:
            return super().forward(x)
        x = check_width(self, x, self.weight.shape[1], self.weight.dtype)
        y = np.empty((*x.shape[:-1], self.weight.shape[0]), x.dtype)
        for words in self._blocks():
            y[..., words] = matmul(x, rows_of(self.weight, words).T)
        self._save(None, y.shape)
        return y

    def backward(self, dout: np.ndarray) -> np.ndarray:
        """dx = dout W."""
        if self.weight.requires_grad:
            return super().backward(dout)
        _, shape = self._take()
        dout = check_dout(self, dout, shape, self.weight.dtype)
        dx = np.zeros((*shape[:-1], self.weight.shape[1]), dout.dtype)
        for words in self._blocks():
            dx += matmul(dout[..., words], rows_of(self.weight, words))
        return dx

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, self.weight.shape[0], HEAD_BLOCK):
            yield slice(start, start + HEAD_BLOCK)


def forget(module: Module) -> None:
    """Discard what forwards have kept for backward, here and below."""
    for _, part in module.named_modules():
        vars(part)["_cache"] = None


class Rerun:
    """What a layer's forward depends on, so that it can be run again: input, modes, dropout."""

    def __init__(self, layer: Module, x: np.ndarray):
        self.layer, self.x = layer, x
        parts = [module for _, module in layer.named_modules()]
        rngs = [part.rng for part in parts if isinstance(part, Dropout) and part.p > 0.0]
        self.states = {rng.bit_generator: rng.bit_generator.state for rng in rngs}
        self.modes = [(part, part.training) for part in parts]
        self.sample = self._sample()

    def _sample(self) -> list[list[bytes]]:
        """Return numbers of the input and of the weights, by which a change is noticed."""
        return [self.layer._sample((self.x,)), *(part._sample(()) for part, _ in self.modes[1:])]

    def run(self) -> None:
        """Run the forward again, as before. Raises RuntimeError if its numbers were changed."""
        if self._sample() != self.sample:
            raise RuntimeError(f"an input or a weight of {type(self.layer).__name__} was changed "
                               "in place between forward and backward")
        later = {generator: generator.state for generator in self.states}
        modes = [(part, part.training) for part, _ in self.modes]
        self._restore(self.modes, self.states)
        self.layer(self.x)
        self._restore(modes, later)

    @staticmethod
    def _restore(modes: list[tuple[Module, bool]], states: dict[Any, Any]) -> None:
        for part, mode in modes:
            part.training = mode
        for generator, state in states.items():
            generator.state = state


# ---- A part of the layers, a part of the positions


def layers_from(first: int, layers: Iterable[M]) -> list[M]:
    """Return the layers from `first` on, none if it is their number. ValueError for others."""
    found = list(layers)
    if not 0 <= first <= len(found):
        raise ValueError(f"there are {len(found)} layers, so none can be layer {first}")
    return found[first:]


def check_states(x: np.ndarray, width: int) -> np.ndarray:
    """Return x. Raises ValueError unless it has the shape of `Llama.states`, (B, T, width)."""
    if np.ndim(x) != 3 or np.shape(x)[2] != width or not np.shape(x)[1]:
        raise ValueError(f"states must have shape (B, T, {width}), got {np.shape(x)}")
    return x


def at_places(x: np.ndarray, where: np.ndarray | None) -> np.ndarray:
    """Return x[where], (B, T, C) -> (n, C), or x for None. ValueError unless it is booleans."""
    if where is None:
        return x
    if np.asarray(where).dtype != bool or np.shape(where) != x.shape[:2]:
        raise ValueError(f"where must be booleans of shape {x.shape[:2]}, got "
                         f"{np.asarray(where).dtype} {np.shape(where)}")
    return x[where]
