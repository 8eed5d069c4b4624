"""NF4, the 4-bit format of QLoRA, whose values are quantiles of a normal distribution.

Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3 and appendix E.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from minilora.nn.quantized import Parts, QuantizedParameter, divide, pack

SCALE_BLOCK = 256  # scales that share a scale of their own


def normal_float(offset: float = 0.9677083) -> np.ndarray:
    """Return NF4's 16 values: quantiles of N(0, 1), 8 above zero and 7 below it, and zero.

    QLoRA, section 3 and appendix E. On either side of zero, the probabilities are evenly spaced, so
    that normal weights use the codes more evenly than they would use evenly spaced values. (Not
    equally: the largest weight of a block becomes 1 or -1, and the others seldom come near it;
    Yoshida 2023, arXiv:2306.06965.) The outermost probability, `offset`, is that of the authors'
    code, 1 - (1/30 + 1/32) / 2.
    """

    def quantiles(n: int) -> list[float]:
        i, first, half = np.arange(n, dtype=np.float32), np.float32(offset), np.float32(0.5)
        step = (half - first) / np.float32(n)  # float32, from both ends: as torch.linspace
        p = np.where(i < (n + 1) // 2, first + step * i, half - step * (n - i))
        return [NormalDist().inv_cdf(float(x)) for x in p]

    values = np.array(sorted([*(-x for x in quantiles(7)), 0.0, *quantiles(8)]), np.float32)
    return values / values.max()


NF4_VALUES = normal_float()


class NF4(QuantizedParameter):
    """w = s NF4_VALUES[q], s the largest |w| of 64: QLoRA's 4-bit NormalFloat, 4.127 bits.

    With double quantisation (section 3) the scales less their mean are in 8 bits too; QLoRA's are
    floats, these integers with a scale for every 256, so that a column which is thousands of times
    smaller than those beside it is lost. Without it, a weight takes 4.5 bits.
    """

    __slots__ = ()
    block = 64

    @staticmethod
    def encode(w: np.ndarray, double: bool = True) -> Parts:
        s = np.abs(w).max(axis=1)
        edges = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
        q = pack(np.searchsorted(edges, divide(w, s)).astype(np.uint8))
        if not double:
            return {"q": q, "s": s}
        mean = s.mean(keepdims=True)
        rows = np.pad((s - mean).reshape(-1), (0, -s.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
        d = np.abs(rows).max(axis=1) / 127.0
        codes = np.rint(divide(rows, d)).astype(np.int8)
        return {"q": q, "codes": codes.reshape(-1)[: s.size].reshape(s.shape), "d": d, "mean": mean}

    def unpacked(self) -> Parts:
        if (codes := self.parts.get("codes")) is None:
            return self.parts
        s = codes.reshape(-1) * np.repeat(self.parts["d"], SCALE_BLOCK)[: codes.size]
        return {"q": self.parts["q"], "s": s.reshape(codes.shape) + self.parts["mean"]}

    def decode(self, parts: Parts, w: np.ndarray) -> None:
        table = NF4_VALUES.astype(w.dtype)
        np.take(table, parts["q"] & 15, out=w[:, 0], mode="clip")  # this mode needs no copy
        np.take(table, parts["q"] >> 4, out=w[:, 1], mode="clip")
        w *= parts["s"].astype(w.dtype)[:, None, None]
