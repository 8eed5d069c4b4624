"""Arrays on disk: the safetensors format, read and written here, and checkpoints of a GPT.

The format is simple enough to be a lesson. A file is

    8 bytes    n, the length of the header, little-endian
    n bytes    the header, JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}},
               and perhaps "__metadata__": {text: text}
    the rest   the arrays one after another, C order, little-endian, without gaps

Nothing in it is code, so that unlike a pickle a file from a stranger can be read; but it can
lie, so every number is checked against the size of the file before memory is asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from minilora.lora.wrap import base_module, wrappers
from minilora.nn.gpt import GPT, GPTConfig
from minilora.nn.module import float_dtype

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}
MAX_HEADER = 100_000_000  # bytes; the reference implementation has the same limit


class CheckpointError(ValueError):
    """A file that is not what it should be; the message names the file and the fault."""


def write_atomically(path: str | Path, chunks: bytes | Iterable[Any]) -> None:
    """Write bytes, or pieces of them, to a temporary file beside `path`, then rename it.

    Whatever happens on the way, `path` holds either the old file or the whole new one.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, not a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def save_safetensors(
    path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write named arrays. TypeError for a dtype the format has no name for, or other metadata."""
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise TypeError("safetensors metadata must map str to str")
        header["__metadata__"] = metadata
    arrays, offset = [], 0
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"a tensor cannot be called {name!r}")
        if array.dtype.newbyteorder("<") not in NAMES:
            raise TypeError(f"{name}: safetensors has no dtype for {array.dtype}")
        # C order whatever the memory layout: A.T would else be written untransposed.
        array = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        begin, offset = offset, offset + array.nbytes
        header[name] = {
            "dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, offset]
        }
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays start at a multiple of 8
    head = struct.pack("<Q", len(text)) + text
    # One after another, so that no more than one array is in memory twice.
    write_atomically(path, itertools.chain([head], (array.tobytes() for array in arrays)))


def load_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read named arrays; BF16 becomes float32. CheckpointError where the file is not sound."""
    with open(path, "rb") as file:
        entries, _, size = _read_header(file, path)
        data = bytearray(size)
        if file.readinto(data) != size:
            raise CheckpointError(f"{path}: the file ends before its last array")
    return {
        name: _array(data, entry["dtype"], entry["shape"], entry["data_offsets"], f"{path}: {name}")
        for name, entry in entries.items()
    }


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read only the metadata, {} where there is none. CheckpointError as `load_safetensors`."""
    with open(path, "rb") as file:
        return _read_header(file, path)[1]


def _read_header(file: Any, path: str | Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return the checked entries, the metadata, and the number of bytes that follow."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    if len(head) < 8:
        raise CheckpointError(f"{path}: too short for a safetensors file ({size} bytes)")
    (length,) = struct.unpack("<Q", head)
    if length > min(MAX_HEADER, size - 8):
        raise CheckpointError(
            f"{path}: its header claims {length} bytes, the file has {size - 8} after the length"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text")
    spans = sorted(_checked_span(path, name, entry) for name, entry in header.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise CheckpointError(f"{path}: {name} begins at byte {begin} where {end} was due")
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: its arrays take {end} bytes, the file has {size - 8 - length} for them"
        )
    return header, metadata, end


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice")
    return result


def _checked_span(path: str | Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Check one entry of the header by itself; return (begin, end, name)."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {dtype!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 2**63 for n in numbers
        ):
            raise CheckpointError(f"{path}: {name} has a bad {what}: {str(numbers)[:80]}")
    if len(offsets) != 2 or len(shape) > 32:
        raise CheckpointError(f"{path}: {name} needs two data_offsets and at most 32 axes")
    needed = np.dtype(DTYPES[dtype]).itemsize
    for n in shape:
        needed *= n
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} and dtype {dtype} needs {needed} bytes, "
            f"its offsets hold {offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], name


def _array(
    data: bytearray, dtype: str, shape: list[int], offsets: list[int], where: str
) -> np.ndarray:
    begin, end = offsets
    flat = np.frombuffer(memoryview(data)[begin:end], dtype=DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    try:
        return flat.reshape(shape).astype(flat.dtype.newbyteorder("="))
    except (ValueError, OverflowError) as error:  # such as the shape (0, 2**62)
        raise CheckpointError(f"{where}: {error}") from None


# ---- A whole GPT


def save_checkpoint(model: GPT, path: str | Path, dtype: Any = None) -> None:
    """Write the weights of a GPT, and its configuration as metadata, to one safetensors file.

    dtype may be np.float16 to halve the file. Raises ValueError where a model has LoRA layers
    (they are stored by `save_adapter`) or another head than its configuration says, or where a
    number does not fit the dtype.
    """
    check_plain(model)
    tensors = model.state_dict()
    if dtype is not None:
        if np.dtype(dtype).kind != "f":
            raise TypeError(f"a checkpoint holds floating-point numbers, not {np.dtype(dtype)}")
        with np.errstate(over="ignore"):
            small = {name: array.astype(dtype) for name, array in tensors.items()}
        for name, array in tensors.items():
            if np.isfinite(array).all() and not np.isfinite(small[name]).all():
                raise ValueError(f"{name} has numbers that do not fit {np.dtype(dtype)}")
        tensors = small
    save_safetensors(path, tensors, {"config": json.dumps(asdict(model.config))})


def check_plain(model: GPT) -> None:
    """Raise ValueError unless the model has no LoRA layers and the head of its configuration."""
    if wrappers(model):
        raise ValueError("the model has LoRA layers: store them with save_adapter, or remove_lora")
    if replaced_head(model):
        raise ValueError("the head of the model was replaced; a checkpoint is of a whole GPT")
    if len(model.h) != model.config.n_layers:
        raise ValueError(
            f"the model has {len(model.h)} blocks, its config says {model.config.n_layers}"
        )


def replaced_head(model: GPT) -> bool:
    """Say whether the head, apart from LoRA on it, is another than the configuration's."""
    c, head = model.config, base_module(model.lm_head)
    if head is None or c.tie_weights:
        return (head is None) != c.tie_weights
    return head.bias is not None or head.weight.shape != (c.d_model, c.vocab_size)


def load_checkpoint(path: str | Path, dtype: Any = np.float32) -> GPT:
    """Build the GPT that `save_checkpoint` wrote. CheckpointError where the file is not one."""
    dtype = float_dtype(dtype)
    tensors = load_safetensors(path)
    metadata = load_metadata(path)
    if "config" not in metadata:
        raise CheckpointError(f"{path} is not a minilora checkpoint: it has no config")
    try:
        config = GPTConfig(**json.loads(metadata["config"]))
        check_checkpoint_sizes(config, {name: array.shape for name, array in tensors.items()})
        model = GPT(config, dtype=dtype)
        model.load_state_dict(tensors)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        fault = error.args[0] if error.args else error
        raise CheckpointError(f"{path} is not a minilora checkpoint: {fault}") from None
    return model


def describe_checkpoint(path: str | Path) -> str:
    """Say what is in a safetensors file: configuration if it has one, arrays and their sizes."""
    tensors, metadata = load_safetensors(path), load_metadata(path)
    count = sum(array.size for array in tensors.values())
    lines = [
        f"safetensors file: {len(tensors)} arrays, {count:,} numbers, "
        f"{os.stat(path).st_size:,} bytes"
    ]
    lines += [f"{key}: {value}" for key, value in metadata.items()]
    lines += [f"  {name}: {array.shape} {array.dtype}" for name, array in tensors.items()]
    return "\n".join(lines)


def check_checkpoint_sizes(config: GPTConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """See that the file really holds the sizes it claims, before a model is built from them."""
    expected = {
        "wte.weight": (config.vocab_size, config.d_model),
        "wpe.weight": (config.context_length, config.d_model),
    }
    for i in range(min(config.n_layers, len(shapes) + 1)):
        expected[f"h.{i}.mlp.up_proj.weight"] = (config.d_model, 4 * config.d_model)
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise ValueError(f"{name} should have shape {shape}, found {shapes.get(name)}")


WEIGHTS = Path(__file__).parent.parent / "weights"


def load_base(name: str = "base", dtype: Any = np.float32) -> GPT:
    """Load the shipped base model: "base" (822,016 parameters) or its sibling "small".

    Made by ``minilora pretrain``; see `minilora.pretrain`. ValueError for another name.
    """
    known = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))
    if name not in known:
        raise ValueError(f"the shipped models are {', '.join(known) or 'missing'}; got {name!r}")
    return load_checkpoint(WEIGHTS / f"{name}.safetensors", dtype)
