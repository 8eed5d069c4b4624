"""The files of llama.cpp: read the GGUF format, with the weights left on disk until they are used.

A file is, with all numbers little-endian and every text as its length (u64) and its UTF-8 bytes,

    header     "GGUF", version (u32), number of tensors (u64), number of metadata values (u64)
    metadata   for each value: key (text), type (u32), the value
    entries    for each tensor: name (text), number of sizes (u32), sizes (u64, columns first),
               type (u32), offset (u64, from the start of the data)
    data       the tensors in this order; it and they start at multiples of general.alignment (32)

Each row of a tensor is a run of blocks: one of Q4_1 has 32 weights in 20 bytes. All sizes are
checked before memory is allocated. Source: docs/gguf.md of github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.files.safetensors import MAX_HEADER, open_regular, printable
from minilora.nn.validate import CheckpointError

MAGIC = b"GGUF"
# Types of metadata: the letters mean the same to `struct` and to NumPy.
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, TEXT, ARRAY, MAX_DEPTH = 7, 8, 9, 4  # at most so many arrays in one another
# Types of tensors, by number; and of those that are read, the weights and the bytes of a block.
KINDS = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS "
    "IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 "
    "Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4 Q1_0").split()
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_1": (32, 20), "Q8_0": (32, 34)}


class GGUFTensor(NamedTuple):
    """A tensor as it is stored; `blocks` is a read-only view of the file."""

    shape: tuple[int, ...]  # rows first, as in NumPy
    kind: str  # such as "Q4_1"
    blocks: np.ndarray  # uint8 (rows, blocks in a row, bytes of a block); rows = 1 for a vector


def read_gguf(
    path: str | Path, any_kind: bool = False
) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Read the metadata and the tensors of a GGUF file of version 2 or 3.

    Returns {key: bool, int, float, str or list} and {name: tensor}, in the file's order. The file
    is mapped into memory, so it must not be shortened while its tensors are in use. Raises
    CheckpointError if the file is damaged, which includes a text (even a token) that is not UTF-8,
    or if the type of a tensor is not in BLOCKS; with any_kind, such a tensor is there, but empty.
    """
    with open_regular(path) as file:
        if (magic := file.read(len(MAGIC))) != MAGIC:  # an empty file could not be mapped
            raise CheckpointError(f"{path} is no GGUF file: it begins with {magic!r}")
        data = np.memmap(file, np.uint8, mode="r").view(np.ndarray)
    try:
        return _parse(data, any_kind)
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def is_gguf(path: str | Path) -> bool:
    """Whether a file, by its name or its first bytes, should be read as GGUF."""
    with open_regular(path) as file:
        return Path(path).suffix.lower() == ".gguf" or file.read(len(MAGIC)) == MAGIC


def describe_gguf(path: str | Path) -> str:
    """Return a text that lists the metadata, and the name, shape and type of each tensor."""
    metadata, tensors = read_gguf(path, any_kind=True)
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    lines = [f"GGUF file: {len(tensors)} tensors, {count:,} numbers, "
             f"{Path(path).stat().st_size:,} bytes"]
    lines += [f"{printable(key)}: {_short(value)}" for key, value in metadata.items()]
    lines += [f"  {printable(name)}: {t.shape} {t.kind}" for name, t in tensors.items()]
    return "\n".join(lines)


def _short(value: Any) -> str:
    """Return a value as printable text: of a long list the length, of a long text the beginning."""
    if isinstance(value, list) and (len(value) > 8 or any(isinstance(v, list) for v in value)):
        return f"{len(value):,} {'texts' if isinstance(value[0], str) else 'values'}"
    text = f"{value:.7g}" if isinstance(value, float) else str(value)  # float32 has 7 digits
    return printable(text if len(text) <= 100 else text[:97] + "...")


def _parse(data: np.ndarray, any_kind: bool) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Return the metadata and the tensors in the bytes of a file."""
    header = _Header(data[:MAX_HEADER].data)
    version, n_tensors, n_values = header.unpack("IQQ")
    if version not in (2, 3):
        big = ", big-endian" if version in (2 << 24, 3 << 24) else ""
        raise CheckpointError(f"GGUF version {version}{big}, expected 2 or 3, little-endian")
    metadata = {header.text(): header.values(0, *header.unpack("I"))[0] for _ in range(n_values)}
    entries = {header.text(): header.entry() for _ in range(n_tensors)}
    if len(metadata) < n_values or len(entries) < n_tensors:
        raise CheckpointError("a key, or the name of a tensor, appears twice")
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align < 8 or align & (align - 1):
        raise CheckpointError(f"general.alignment is {_short(align)}, expected 8, 16, 32, ...")
    start, end, tensors = -(-header.at // align) * align, 0, {}
    for name, (*sizes, number, offset) in entries.items():
        shape, count = tuple(sizes[::-1]), math.prod(sizes)
        kind = KINDS[number] if number < len(KINDS) else f"type {number}"
        if kind not in BLOCKS and not any_kind:
            raise CheckpointError(f"{name} is stored as {kind}, expected {', '.join(BLOCKS)}")
        weights, size = BLOCKS.get(kind, (1, 0))
        if not 0 < count < 2**63 or shape[-1] % weights:
            raise CheckpointError(f"{name} cannot have the shape {shape} as {kind}")
        if offset % align or offset < end:
            raise CheckpointError(f"{name} is at {offset}, no multiple of {align} from {end} on")
        end = offset + count // weights * size
        if start + end > data.size:
            raise CheckpointError(f"{name} ends at byte {start + end}, the file at {data.size}")
        blocks = data[start + offset : start + end].reshape(count // shape[-1], -1, size or 1)
        tensors[name] = GGUFTensor(shape, kind, blocks)
    return metadata, tensors


class _Header:
    """The bytes before the data; each method reads on from byte `at`."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, len(MAGIC)

    def take(self, count: int) -> memoryview:
        if count > (left := len(self.data) - self.at):
            raise CheckpointError(f"{count} bytes must follow byte {self.at}, but {left} do")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, codes: str) -> tuple[int, ...]:
        return struct.unpack("<" + codes, self.take(struct.calcsize("<" + codes)))

    def text(self) -> str:
        return str(self.take(*self.unpack("Q")), "utf-8")

    def entry(self) -> tuple[int, ...]:
        (n_sizes,) = self.unpack("I")
        if not 1 <= n_sizes <= 4:
            raise CheckpointError(f"a tensor has {n_sizes} sizes, expected 1 to 4")
        return self.unpack(f"{n_sizes}QIQ")

    def values(self, depth: int, kind: int, count: int = 1) -> list[Any]:
        """Return `count` values of one type, which are inside `depth` arrays."""
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        if kind == ARRAY and depth < MAX_DEPTH:
            return [self.values(depth + 1, *self.unpack("IQ")) for _ in range(count)]
        if kind not in CODES:
            raise CheckpointError(f"a value has the unknown type {kind}, or is nested too deeply")
        raw = self.take(count * struct.calcsize("<" + CODES[kind]))
        if kind == BOOL and max(raw, default=0) > 1:
            raise CheckpointError(f"a bool must be 0 or 1, got {max(raw)}")
        return np.frombuffer(raw, "<" + CODES[kind]).tolist()
