import errno
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minilora.files import safetensors, settings
from minilora.files.safetensors import (
    check_writable,
    describe_safetensors,
    load_metadata,
    load_safetensors,
    save_safetensors,
    write_atomically,
)
from minilora.files.settings import read_json
from minilora.nn.validate import CheckpointError


def test_arrays_come_back_bit_for_bit(tmp_path, rng):
    x = rng.standard_normal((3, 4))
    tensors = {code: x.astype(code) for code in ("f2", "f4", "f8")}
    tensors |= {code: (9 * x).astype(code) for code in ("i1", "i2", "i4", "i8")}
    tensors |= {code: np.abs(9 * x).astype(code) for code in ("u1", "u2", "u4", "u8")}
    tensors |= {
        "bool": x > 0, "scalar": np.float32(3), "empty": np.zeros((0, 5)), "transposed": x.T,
        "fortran": np.asfortranarray(x), "strided": x[::2, ::-1], "big endian": x.astype(">f4"),
    }
    save_safetensors(tmp_path / "x", tensors, {"key": "väl"})
    loaded = load_safetensors(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert loaded[name].dtype == np.asarray(array).dtype.newbyteorder("=")
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].flags.writeable
    assert load_metadata(tmp_path / "x") == {"key": "väl"}


def test_the_layout_is_the_documented_one(tmp_path):
    save_safetensors(tmp_path / "x", {"w": np.array([[1, 2], [3, 4]], np.int16).T})
    raw = (tmp_path / "x").read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + n]) == {
        "w": {"dtype": "I16", "shape": [2, 2], "data_offsets": [0, 8]}
    }
    assert raw[8 + n :] == struct.pack("<4h", 1, 3, 2, 4) and n % 8 == 0


def file_of(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "hostile"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_bfloat16_is_decoded(tmp_path):
    path = file_of(tmp_path, {"x": entry("BF16", (3,), (0, 6))},
                   struct.pack("<3H", 0x3F80, 0xC000, 0x7F80))
    loaded = load_safetensors(path)["x"]
    assert loaded.dtype == np.float32 and loaded.tolist() == [1.0, -2.0, np.inf]


@pytest.mark.parametrize(
    "header, data, words",
    [
        ({"x": entry()}, b"1234567", "arrays take 8 bytes, the file has 7"),
        ({"x": entry()}, b"123456789", "arrays take 8 bytes, the file has 9"),
        ({"x": entry(), "y": entry()}, b"12345678", "begins at byte 0, expected 8"),
        ({"x": entry(offsets=(4, 12))}, b"1" * 12, "begins at byte 4, expected 0"),
        ({"x": entry(shape=(3,))}, b"12345678", "needs 12 bytes"),
        ({"x": entry(dtype="F64")}, b"12345678", "needs 16 bytes"),
        ({"x": entry(dtype="F31")}, b"12345678", "unknown dtype 'F31'"),
        ({"x": entry(dtype=["F32"])}, b"12345678", "unknown dtype"),
        ({"x": entry(shape=(-2,))}, b"12345678", "bad shape"),
        ({"x": entry(shape=(2.0,))}, b"12345678", "bad shape"),
        ({"x": entry(shape=(True, 2))}, b"12345678", "bad shape"),
        ({"x": entry(offsets=(8, 0))}, b"12345678", "offsets hold -8"),
        ({"x": entry(offsets=(0, 8, 9))}, b"12345678", "two data_offsets"),
        ({"x": entry(shape=(2**40, 2**40))}, b"12345678", "needs"),
        ({"x": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b"", "x: "),
        ({"x": entry(shape=(2**63,))}, b"12345678", "bad shape"),
        ({"x": entry(shape=[10**4000] * 3)}, b"12345678", "bad shape"),
        ({"x": entry(shape=[1] * 99 + [2])}, b"12345678", "32 axes"),
        ({"x": {"dtype": "F32"}}, b"", "needs dtype, shape and data_offsets"),
        ({"x": 3}, b"", "needs dtype"),
        ([], b"", "must be a JSON object"),
        (b"{", b"", "not JSON"),
        (b"\xff\xfe", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"x": 1, "x": 2}', b"", "appears twice"),
        ({"__metadata__": {"a": 1}}, b"", "map text to text"),
        ({"__metadata__": 3}, b"", "map text to text"),
    ],
)
def test_hostile_files(tmp_path, header, data, words):
    with pytest.raises(CheckpointError, match=words) as error:
        load_safetensors(file_of(tmp_path, header, data))
    assert "hostile" in str(error.value)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 100, 3])
def test_a_header_that_claims_to_be_longer_than_the_file(tmp_path, length):
    with pytest.raises(CheckpointError, match=f"its header claims {length} bytes, but 2 follow"):
        load_safetensors(file_of(tmp_path, b"{}", length=length))


def test_a_header_has_a_limit_however_large_the_file_is(tmp_path):
    length = 100_000_001
    path = file_of(tmp_path, b"{}", length=length)
    os.truncate(path, 8 + length)  # takes no space on the disk
    with pytest.raises(CheckpointError, match="claims 100000001 bytes"):
        load_safetensors(path)


def test_a_file_without_arrays(tmp_path):
    save_safetensors(tmp_path / "x", {})
    assert load_safetensors(tmp_path / "x") == load_metadata(tmp_path / "x") == {}


def test_random_corruption_is_noticed_or_harmless(tmp_path, rng):
    tensors = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(4, dtype=np.int8)}
    save_safetensors(tmp_path / "x", tensors, {"k": "v"})
    raw = (tmp_path / "x").read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    refused = 0
    for _ in range(10_000):
        damaged = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(0, 8 + n)] = rng.integers(0, 256)
        (tmp_path / "y").write_bytes(damaged)
        try:
            loaded = load_safetensors(tmp_path / "y")
        except CheckpointError:
            refused += 1
        else:
            assert sum(array.nbytes for array in loaded.values()) >= 4 + 48
    assert refused > 800


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x"
    save_safetensors(path, {"a": np.arange(3.0), "b": np.ones((2, 2), np.float32)})
    raw = path.read_bytes()
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        with pytest.raises(CheckpointError):
            load_safetensors(path)


@pytest.mark.parametrize("bad", [np.zeros(2, complex), np.array(["a"]), np.array([None])])
def test_arrays_the_format_cannot_hold(tmp_path, bad):
    with pytest.raises(TypeError, match="x: safetensors has no dtype"):
        save_safetensors(tmp_path / "x", {"x": bad})
    with pytest.raises(TypeError, match="metadata"):
        save_safetensors(tmp_path / "x", {}, {"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "x"
    write_atomically(path, b"old")

    def chunks():
        yield b"half of the n"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, chunks())
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["x"]


def test_whoever_reads_the_old_file_can_read_on(tmp_path):
    """The new file takes the old one's place; the bytes of the old one are never overwritten."""
    path = tmp_path / "x"
    write_atomically(path, b"old")
    os.link(path, tmp_path / "open elsewhere")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and (tmp_path / "open elsewhere").read_bytes() == b"old"


def test_only_what_a_process_left_that_is_gone_is_removed(tmp_path, monkeypatch):
    def left(pid):
        return tmp_path / f".minilora-{safetensors.HOST}-{pid}-0.tmp"

    gone, kept = left(99_999_999), [left(os.getpid()), left("x1"), left("9" * 30)]
    for path in kept:
        path.touch()
    gone.mkdir()
    (gone / "file").touch()
    left(99_999_998).touch()
    write_atomically(tmp_path / "x", b"")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "x"])
    left(1).touch()

    def refuse(pid, signal):
        assert signal == 0, "anything else could end the process"
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    write_atomically(tmp_path / "x", b"")
    monkeypatch.undo()
    monkeypatch.setattr(os, "name", "not posix")
    gone.touch()
    write_atomically(tmp_path / "x", b"")
    assert left(1).exists() and gone.exists()


def test_what_could_be_written_is_known_without_writing_it(tmp_path):
    check_writable(tmp_path / "deep" / "x")
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        check_writable(tmp_path / "file" / "x")


def test_two_threads_that_save_to_one_path_do_not_mix_their_bytes(tmp_path):
    path, rounds = tmp_path / "x", 30
    contents = [bytes([i]) * 200_000 for i in range(4)]

    def write(content):
        for _ in range(rounds):
            write_atomically(path, [content[:100_000], content[100_000:]])
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_long_names_and_the_permissions_of_an_existing_file(tmp_path):
    path = tmp_path / ("n" * 240)
    write_atomically(path, b"1")
    path.chmod(0o640)
    write_atomically(path, b"2")
    assert path.read_bytes() == b"2" and path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (load_safetensors, load_metadata, read_json):
            with pytest.raises(CheckpointError, match="is not a regular file"):
                read(path)


@pytest.mark.parametrize("tensors, metadata", [
    ({"a\ud800": np.zeros(2)}, None), ({}, {"k\udfff": "v"}), ({}, {"k": "v\udc80"}),
])
def test_lone_surrogates_are_refused_both_ways(tmp_path, tensors, metadata):
    with pytest.raises(ValueError, match="lone surrogate"):
        save_safetensors(tmp_path / "x", tensors, metadata)
    assert not list(tmp_path.iterdir())
    header = {name: entry(shape=(1,), offsets=(0, 4)) for name in tensors}
    path = file_of(tmp_path, header | ({"__metadata__": metadata} if metadata else {}),
                   b"1234" if tensors else b"")
    with pytest.raises(CheckpointError, match="lone surrogate"):
        load_safetensors(path)


def test_names_beyond_the_basic_plane_are_no_lone_surrogates(tmp_path):
    save_safetensors(tmp_path / "x", {"😀": np.ones(1)}, {"😀": "𝔸"})
    assert list(load_safetensors(tmp_path / "x")) == ["😀"]
    assert load_metadata(tmp_path / "x") == {"😀": "𝔸"}


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "x", b"old")

    def chunks():
        yield b"half"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / "x", chunks())
    assert str(error.value).endswith(f"No space left on device: '{tmp_path / 'x'}'")
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_header_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_HEADER", 100)
    monkeypatch.setattr(settings, "MAX_HEADER", 100)
    with pytest.raises(ValueError, match="header of .* bytes is too large"):
        save_safetensors(tmp_path / "x", {"n" * 100: np.zeros(1)})
    assert not list(tmp_path.iterdir())
    (tmp_path / "large.json").write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(CheckpointError, match="has more than 100 bytes"):
        read_json(tmp_path / "large.json")


def test_a_file_described(tmp_path):
    path = tmp_path / "x"
    tensors = {"w": np.zeros((1000, 3), np.float32), "b\n": np.int8(0)}
    save_safetensors(path, tensors, {"k": "vä", "a\r": "\x1b[0m"})
    assert describe_safetensors(path).splitlines() == [
        f"safetensors file: 2 arrays, 3,001 numbers, {path.stat().st_size:,} bytes",
        "k: vä", r"a\r: \x1b[0m", "  w: (1000, 3) float32", r"  b\n: () int8",
    ]
    path = file_of(tmp_path, {"x": entry("BF16", (3,), (0, 6))}, b"123456")
    assert describe_safetensors(path).endswith(" 3 numbers, 76 bytes\n  x: (3,) bfloat16")


def test_sparse_terabytes_take_no_time_and_no_memory(tmp_path):
    size = 2**42
    path = file_of(tmp_path, {"x": entry("F32", (size // 4,), (0, size))})
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert f"x: ({size // 4},) float32" in describe_safetensors(path)
    with pytest.raises(CheckpointError, match="4,398,046,511,104 bytes do not fit in memory"):
        load_safetensors(path)
    with open(tmp_path / "zeros", "wb") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match="not JSON"):
        load_safetensors(tmp_path / "zeros")
    with pytest.raises(CheckpointError, match="has more than"):
        read_json(tmp_path / "zeros")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: write_atomically(path, b"x"), check_writable):
        with pytest.raises(FileExistsError, match="pipe is not a regular file to write"):
            write(tmp_path / "pipe")
    assert os.listdir(tmp_path) == ["pipe"] and not (tmp_path / "pipe").is_file()


def test_a_link_stays_a_link(tmp_path):
    write_atomically(tmp_path / "target", b"old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"


def test_a_file_system_without_permissions_and_flushing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "x", content)
        assert (tmp_path / "x").read_bytes() == content

    def broken(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="input/output error"):
        write_atomically(tmp_path / "x", b"newest")
    assert (tmp_path / "x").read_bytes() == b"new"
