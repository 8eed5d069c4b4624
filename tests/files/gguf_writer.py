"""Write GGUF files for tests; the library only reads them.

    write_gguf(path, {"general.architecture": "llama"}, {"output.weight": ("Q4_1", weight)})
"""

import struct
from typing import Any, NamedTuple

import numpy as np

TYPES = {"F32": (0, 1), "F16": (1, 1), "Q4_1": (3, 32), "Q8_0": (8, 32), "Q6_K": (14, 256),
         "BF16": (30, 1)}  # the number in ggml, the weights in a block
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, UINT32, FLOAT32, TEXT, ARRAY = 7, 4, 6, 8, 9


class Typed(NamedTuple):
    """A metadata value, or an item of a list, whose type is not the one of its Python type."""

    kind: int
    value: Any


def write_gguf(path, metadata, tensors, version=3):
    """Write metadata {key: value} and tensors {name: (kind, array)} to a GGUF file.

    A value is a str, a bool, an int (written as uint32), a float (float32), a list of one of these,
    or Typed. An array is float, of any shape, and stored as F32, F16, BF16, Q4_1 or Q8_0; or it is
    uint8 (..., blocks in a row, bytes of a block), and stored as it is. "general.alignment" in the
    metadata is followed.
    """
    align = metadata.get("general.alignment", 32)
    entries, data = [], b""
    for name, (kind, array) in tensors.items():
        number, weights = TYPES[kind]
        array = np.asarray(array)
        blocks = array if array.dtype == np.uint8 else quantise(kind, array)
        shape = (*blocks.shape[:-2], blocks.shape[-2] * weights)
        data += b"\0" * (-len(data) % align)
        entries.append(entry(name, shape, number, len(data)))
        data += blocks.tobytes()
    path.write_bytes(assemble(map(pair, metadata.items()), entries, data, version, align))


def assemble(pairs, entries, data=b"", version=3, align=32):
    """Return the bytes of a file from those of its parts, which may be damaged."""
    pairs, entries = list(pairs), list(entries)
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(pairs))
    head += b"".join(pairs + entries)
    return head + b"\0" * (-len(head) % align) + data


def pair(item):
    key, value = item
    kind, value = typed(value)
    return text(key) + struct.pack("<I", kind) + packed(kind, value)


def entry(name, shape, number, offset):
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + sizes + struct.pack("<IQ", number, offset)


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def typed(value):
    """Return (type, value), the type taken from the Python type unless the value is Typed."""
    if isinstance(value, Typed):
        return value
    kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: TEXT, bytes: TEXT, list: ARRAY}
    return kinds[type(value)], value


def packed(kind, value):
    if kind == TEXT:
        return text(value)
    if kind != ARRAY:
        return struct.pack("<" + CODES[kind], value)
    items = [typed(item) for item in value]
    inner = items[0][0] if items else UINT32
    return struct.pack("<IQ", inner, len(items)) + b"".join(packed(inner, v) for _, v in items)


def quantise(kind, array):
    """Return float weights (..., n) as uint8 (..., blocks, bytes), rounded as ggml does it."""
    x = np.asarray(array, np.float32)
    x = x.reshape(*x.shape[:-1], x.shape[-1] // TYPES[kind][1], TYPES[kind][1])
    if kind in ("F32", "F16"):
        return np.ascontiguousarray(x, "<f4" if kind == "F32" else "<f2").view(np.uint8)
    if kind == "BF16":  # the upper half, rounded to the nearest even one
        bits = np.ascontiguousarray(x, "<f4").view("<u4")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)
    if kind == "Q8_0":  # d, then q with w = d q
        d = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        q = x * inverse(d)
        q = np.trunc(q + np.copysign(np.float32(0.5), q)).astype(np.int8)  # halves away from 0
        return np.concatenate([half(d), q.view(np.uint8)], -1)
    assert kind == "Q4_1", kind  # d, m, then q with w = d q + m: first the 16 low halves of bytes
    low = x.min(-1, keepdims=True)
    d = (x.max(-1, keepdims=True) - low) / np.float32(15)
    q = np.minimum(15, (x - low) * inverse(d) + np.float32(0.5)).astype(np.uint8)
    return np.concatenate([half(d), half(low), q[..., :16] | q[..., 16:] << 4], -1)


def inverse(d):
    return np.divide(1, d, out=np.zeros_like(d), where=d != 0)


def half(x):
    return x.astype("<f2").view(np.uint8)
