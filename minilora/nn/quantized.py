"""Weights that are stored in 4 or 8 bits and decoded when they are read: the formats of GGUF.

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3: a frozen weight W is stored in few bits,
and y = x dequant(W) + scale * x A B is computed in floating point (equation 5, there without the
scale). Backward decodes W once more, for dx = dout dequant(W)ᵀ + ...; W itself has no gradient.

A matrix (in, out) is cut into blocks of rows, and each column of a block has a scale of its own. A
few blocks are decoded at a time, so that intermediate results stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np

from minilora.nn.module import M, Parameter
from minilora.nn.validate import float_dtype

PIECE = 131_072  # weights that are decoded at a time: 512 KiB
Parts = dict[str, np.ndarray]


class QuantizedParameter(Parameter):
    """A frozen weight whose `data` is decoded when it is read, and cannot be written to.

    Copies of a model share its parts. A subclass is a format: `block` is how many inputs share a
    scale, `encode` takes w (blocks, block, out), `decode` fills w (blocks, 2, block / 2, out).

    Parameters
    ----------
    parts : arrays (blocks, ..., out); "q" holds the codes
    in_features : rows of the matrix (in, out); the last block may have more
    transposed : if True, the matrix is (out, in) instead, as for a table of embeddings
    dtype : of `data`, float32 or float64
    """

    __slots__ = ("parts", "in_features", "transposed", "shape", "size", "dtype", "nbytes")
    unlock = "dequantize"
    block: int
    encode: Callable[..., Parts]
    decode: Callable[..., None]

    def __init__(
        self, parts: Parts, in_features: int, transposed: bool = False, dtype: Any = np.float32
    ):
        self.parts, self.in_features, self.transposed = parts, in_features, transposed
        shape = in_features, parts["q"].shape[-1]
        self.shape = shape[::-1] if transposed else shape  # type: ignore[misc]
        self.size = shape[0] * shape[1]  # type: ignore[misc]
        self.dtype, self.grad = float_dtype(dtype), None  # type: ignore[misc]
        self.nbytes = sum(part.nbytes for part in parts.values())

    @classmethod
    def quantize(cls, weight: np.ndarray, **options: Any) -> Self:
        """Encode a matrix (in, out). Raises ValueError for another shape, inf, nan or overflow."""
        if np.ndim(weight) != 2 or not np.size(weight):
            raise ValueError(f"only a matrix can be quantised, got shape {np.shape(weight)}")
        n, m = weight.shape
        # The last block is filled with its last row, which does not change its range.
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is inf
            padded = np.pad(weight.astype(np.float32), ((0, -n % cls.block), (0, 0)), mode="edge")
            parts = cls.encode(padded.reshape(-1, cls.block, m), **options)
        if not all(np.isfinite(part).all() for part in (padded, *parts.values())):
            raise ValueError(f"{cls.__name__} needs finite weights whose scales fit its parts")
        return cls(parts, n, dtype=weight.dtype)

    def unpacked(self) -> Parts:
        """Return the parts as `decode` takes them."""
        return self.parts

    def _columns(self, index: Any) -> np.ndarray:
        parts = {name: part[..., index] for name, part in self.unpacked().items()}
        blocks, out = len(parts["q"]), parts["q"].shape[2:]
        w = np.empty((blocks, 2, self.block // 2, *out), self.dtype)
        step = max(1, PIECE * blocks // max(1, w.size))
        for b in (slice(start, start + step) for start in range(0, blocks, step)):
            self.decode({name: part[b] for name, part in parts.items()}, w[b])
        w = w.reshape(blocks * self.block, *out)[: self.in_features]
        w.flags.writeable = False  # what is written to it would be lost
        return np.moveaxis(w, 0, -1) if self.transposed else w

    def at(self, index: Any) -> np.ndarray:
        """Return data[index]; if transposed, decode only these rows."""
        return self._columns(index) if self.transposed else self.data[index]

    @property
    def data(self) -> np.ndarray:  # type: ignore[override]
        return self._columns(slice(None))

    @data.setter
    def data(self, value: Any) -> None:
        raise TypeError(f"a weight in {type(self).__name__} cannot be changed: dequantize it first")

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise TypeError(f"a weight in {type(self).__name__} cannot be trained: dequantize it")

    def astype(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.parts, self.in_features, self.transposed, self.dtype)

    def __reduce__(self) -> tuple:
        return type(self), (self.parts, self.in_features, self.transposed, self.dtype)


def in_floats(module: M) -> M:
    """Replace quantised weights, in place, by frozen ones in floating point; return the module."""
    new: dict[int, Parameter] = {}  # by id: two layers may share a weight
    for _, part in module.named_modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, QuantizedParameter):
                if id(value) not in new:
                    new[id(value)] = Parameter(value.data, requires_grad=False)
                setattr(part, name, new[id(value)])
    return module


def pack(codes: np.ndarray) -> np.ndarray:
    """Put two 4-bit codes into a byte: (blocks, 2 n, out) -> (blocks, n, out), the first n low."""
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def divide(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return w / scale, and 0 where the scale is 0: (blocks, block, out), (blocks, out)."""
    return w * np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)[:, None]


class Int8(QuantizedParameter):
    """w = d q with q from -127 to 127, d the largest |w| of 32 over 127: GGUF's Q8_0, 8.5 bits.

    Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2: absmax quantisation.
    """

    __slots__ = ()
    block = 32

    @staticmethod
    def encode(w: np.ndarray) -> Parts:
        d = np.abs(w).max(axis=1) / 127.0
        return {"q": np.rint(divide(w, d)).astype(np.int8), "d": d.astype(np.float16)}

    def decode(self, parts: Parts, w: np.ndarray) -> None:
        w = w.reshape(parts["q"].shape)
        np.multiply(parts["q"], parts["d"].astype(w.dtype)[:, None], out=w, dtype=w.dtype)


class Q4_1(QuantizedParameter):
    """w = d q + m with q from 0 to 15, m the smallest of 32, d their range over 15: 5 bits."""

    __slots__ = ()
    block = 32

    @staticmethod
    def encode(w: np.ndarray) -> Parts:
        m = w.min(axis=1)
        d = (w.max(axis=1) - m) / 15.0
        codes = (divide(w - m[:, None], d) + 0.5).clip(0, 15).astype(np.uint8)
        return {"q": pack(codes), "d": d.astype(np.float16), "m": m.astype(np.float16)}

    def decode(self, parts: Parts, w: np.ndarray) -> None:
        w[:, 0], w[:, 1] = parts["q"] & 15, parts["q"] >> 4
        w *= parts["d"].astype(w.dtype)[:, None, None]
        w += parts["m"].astype(w.dtype)[:, None, None]
