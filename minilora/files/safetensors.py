"""Named arrays on disk: read and write the safetensors format with NumPy alone.

A file is

    8 bytes    n, the length of the header, little-endian
    n bytes    the header, JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}},
               and optionally "__metadata__": {text: text}
    the rest   the arrays one after another, C order, little-endian, without gaps

Unlike a pickle, it contains no code, so a file from a stranger is safe to read. Its numbers may
still be wrong, so each is checked against the size of the file before memory is allocated.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import platform
import shutil
import stat
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minilora.nn.validate import CheckpointError

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}
MAX_HEADER = 100_000_000  # bytes; the reference implementation has the same limit
MAX_AXES = 32
# In names of temporary files: the machine, or the container, in which a process has its number.
SPACE = "/proc/self/ns/pid"
PLACE = platform.node() + (os.readlink(SPACE) if os.path.islink(SPACE) else "")
HOST = f"{zlib.crc32(PLACE.encode()):08x}"


# ---- Writing


def write_atomically(path: str | Path, chunks: bytes | Iterable[bytes]) -> None:
    """Write bytes to a temporary file beside `path`, then rename it.

    If writing fails or is interrupted, the old file is left as it was. The temporary file of a
    process that was killed is removed by the next one that writes to the folder. Missing folders
    are created. Raises OSError, which names `path`, if it cannot be written.
    """
    path, temporary = _destination(path)
    try:
        with errors_name(path), open(temporary, "xb") as file:
            for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
                file.write(chunk)
            file.flush()
            with _if_supported():
                os.fsync(file.fileno())
        with errors_name(path):
            with contextlib.suppress(FileNotFoundError), _if_supported():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))  # as those of the old file
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Let an OSError name this file: it names a temporary one, or none if the disk is full."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


@contextlib.contextmanager
def _if_supported() -> Iterator[None]:
    """Ignore an error that says that a file system does not have this operation."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM):
            raise


def check_writable(path: str | Path) -> None:
    """Raise OSError if `write_atomically` could not write this file. Creates missing folders."""
    path, temporary = _destination(path)
    with errors_name(path):
        temporary.touch()
        temporary.unlink()


def _destination(path: str | Path) -> tuple[Path, Path]:
    """Return the path of a file to write, and of the temporary file beside it."""
    given, path = path, Path(os.path.realpath(path))  # what a link points to, as with `open`
    if path.is_dir():
        raise IsADirectoryError(f"{given} is a directory, not a file to write")
    if path.exists() and not path.is_file():  # a device or pipe would be replaced
        raise FileExistsError(f"{given} is not a regular file to write")
    if path.exists() and os.path.islink(given) and not os.access(path, os.W_OK):
        raise PermissionError(f"{given} points to {path}, which may not be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, temporary_in(path.parent)


def temporary_in(folder: Path) -> Path:
    """Return a new name for something temporary in a folder, after removing what was left there."""
    for left in folder.glob(f".minilora-{HOST}-*.tmp"):
        if not _is_running(left.name.split("-")[2]):
            with contextlib.suppress(OSError):  # somebody else may own or remove it
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    # A name of its own for each writer: two threads may save to one path, and names may be long.
    return folder / f".minilora-{HOST}-{os.getpid()}-{uuid.uuid4().hex}.tmp"


def _is_running(pid: str) -> bool:
    """Whether there may be a process of this number on this machine."""
    if os.name != "posix" or not pid.isdecimal():
        return True  # elsewhere, os.kill would end it
    with contextlib.suppress(OSError, IndexError):  # only Linux has this file
        if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
            return False  # it has ended, but its parent has not asked how
    try:
        os.kill(int(pid), 0)
    except (PermissionError, OverflowError):
        return True
    except ProcessLookupError:
        return False
    return True


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading. Raises CheckpointError for a pipe or device, which may not end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder, `open` says that it is one
        raise CheckpointError(f"{path} is not a regular file")
    return open(path, "rb")


def save_safetensors(
    path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write named arrays of any shape to a safetensors file, and {text: text} to its header.

    An old file is replaced only once the new one is complete.

    Raises
    ------
    TypeError
        If the format has no name for a dtype, a name is not text, or the metadata do not map
        text to text.
    ValueError
        If a text cannot be encoded (a lone surrogate), or the header is too large to be read.
    """
    header: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise TypeError("safetensors metadata must map str to str")
        header["__metadata__"] = metadata
    if bad := _not_unicode(tensors, metadata or {}):
        raise ValueError(f"{bad!r} has a lone surrogate, which no file could hold")
    arrays, offset = [], 0
    for name, tensor in tensors.items():
        array = _storable(name, tensor)
        begin, offset = offset, offset + array.nbytes
        header[name] = {
            "dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, offset]
        }
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays start at a multiple of 8
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path}: the header of {len(text)} bytes is too large")
    head = struct.pack("<Q", len(text)) + text
    # The generator copies one array at a time.
    write_atomically(path, itertools.chain([head], (array.tobytes() for array in arrays)))


def _storable(name: str, tensor: np.ndarray) -> np.ndarray:
    """Return a tensor in C order and little-endian, after checking its name and dtype."""
    array = np.asarray(tensor)
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"a tensor cannot have the name {name!r}")
    little = array.dtype.newbyteorder("<")
    if little not in NAMES:
        raise TypeError(f"{name}: safetensors has no dtype for {array.dtype}")
    return array.astype(little, order="C", copy=False)


# ---- Reading


def load_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read the named arrays of a safetensors file.

    Returns {name: writable array} in the file's order and dtypes; BF16 becomes float32. Raises
    CheckpointError if the file is damaged.
    """
    return load_with_metadata(path)[0]


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read only the metadata; {} if there are none. Raises CheckpointError for a damaged header."""
    with open_regular(path) as file:
        return _read_header(file, path)[1]


def load_with_metadata(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the arrays, as `load_safetensors` does, and the metadata of the same file."""
    with open_regular(path) as file:
        entries, metadata, size = _read_header(file, path)
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names and (  # not on Windows
                size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            raise CheckpointError(f"{path}: {size:,} bytes do not fit in memory")
        data = bytearray(size)
        if file.readinto(data) != size:
            raise CheckpointError(f"{path}: the file ends before its last array")
    arrays = {name: _array(data, entry, f"{path}: {name}") for name, entry in entries.items()}
    return arrays, metadata


def describe_safetensors(path: str | Path) -> str:
    """Return a text that lists the metadata, names, shapes and dtypes of a safetensors file."""
    with open_regular(path) as file:
        entries, metadata, size = _read_header(file, path)
    count = sum(math.prod(entry["shape"]) for entry in entries.values())
    lines = [f"safetensors file: {len(entries)} arrays, {count:,} numbers, "
             f"{os.stat(path).st_size:,} bytes"]
    lines += [f"{printable(key)}: {printable(value)}" for key, value in metadata.items()]
    for name, entry in entries.items():
        code = entry["dtype"]
        dtype = "bfloat16" if code == "BF16" else np.dtype(DTYPES[code]).name
        lines.append(f"  {printable(name)}: {tuple(entry['shape'])} {dtype}")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return the text with escapes for the characters that would act on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _read_header(
    file: BinaryIO, path: str | Path
) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Return the checked entries, the metadata, and the number of bytes that follow."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    if len(head) < 8:
        raise CheckpointError(f"{path}: too short for a safetensors file ({size} bytes)")
    (length,) = struct.unpack("<Q", head)
    if length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: its header claims "
                              f"{length} bytes, but {size - 8} follow the length")
    header = _parse_header(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text")
    room = size - 8 - length
    _check_layout([_checked_span(path, *item) for item in header.items()], room, path)
    return header, metadata, room


def _parse_header(text: bytes, path: str | Path) -> dict[str, Any]:
    """Return the header as a dict."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object")
    metadata = header.get("__metadata__")
    if bad := _not_unicode(header, metadata if isinstance(metadata, dict) else {}):
        raise CheckpointError(f"{path}: {bad!r} has a lone surrogate, which no text may have")
    return header


def _not_unicode(names: Iterable[Any], metadata: dict[Any, Any]) -> str:
    """Return a name, or a text of the metadata, that UTF-8 cannot encode; "" if there is none."""
    texts = [text for text in (*names, *metadata, *metadata.values()) if isinstance(text, str)]
    return next((t for t in texts if any("\ud800" <= c <= "\udfff" for c in t)), "")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of the pairs; ValueError if a key appears twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result


def _check_layout(spans: list[tuple[int, int, str]], room: int, path: str | Path) -> None:
    """Check that the arrays (begin, end, name) fill `room` bytes without gaps or overlaps."""
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise CheckpointError(f"{path}: {name} begins at byte {begin}, expected {end}")
        end = stop
    if end != room:
        raise CheckpointError(f"{path}: its arrays take {end} bytes, the file has {room} for them")


def _checked_span(path: str | Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Check one entry of the header on its own; return (begin, end, name)."""
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
    if len(offsets) != 2 or len(shape) > MAX_AXES:
        raise CheckpointError(
            f"{path}: {name} needs two data_offsets and at most {MAX_AXES} axes"
        )
    needed = np.dtype(DTYPES[dtype]).itemsize
    for n in shape:
        needed *= n
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} and dtype {dtype} needs {needed} bytes, "
            f"its offsets hold {offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], name


def _array(data: bytearray, entry: dict[str, Any], what: str) -> np.ndarray:
    """Return a copy of the array that a checked entry describes, in the native byte order."""
    begin, end = entry["data_offsets"]
    flat = np.frombuffer(memoryview(data)[begin:end], dtype=DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    try:
        return flat.reshape(entry["shape"]).astype(flat.dtype.newbyteorder("="))
    except (ValueError, OverflowError) as error:  # such as the shape (0, 2**62)
        raise CheckpointError(f"{what}: {error}") from None
