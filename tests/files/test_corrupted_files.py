"""Damaged and hostile files of every format are refused in one way, or read as some model.

The bytes, the JSON and the arrays of good files are changed at random. (`test_safetensors` does the
same to single files of arrays.)
"""

import contextlib
import copy
import json
import shutil
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import THOROUGH, many, randomise, tiny_config
from helpers_adapters import task

import minilora as ml
from minilora.lora.surgery import wrappers

IDS = np.arange(12).reshape(2, 6) % 11
SECONDS, BYTES = 2.0, 2**30  # the most that one file may take


def tiny(**changes):
    return randomise(ml.GPT(tiny_config(n_layers=1, **changes)))


# ---- The formats: each writes good files to a folder, and reads them to compute logits


class AdapterFolder:
    """Read onto one and the same model, which must be the base again after each attempt."""

    def __init__(self, save, **options):
        self.save, self.options, self.model = save, options, tiny()
        self.expected = self.model(IDS)

    def write(self, folder):
        self.save(task(model=tiny(), **self.options), folder)

    def read(self, folder):
        try:
            ml.load_adapter(self.model, folder)(IDS)
        finally:
            if wrappers(self.model):
                ml.remove_lora(self.model)
            assert np.array_equal(self.model(IDS), self.expected)


class Checkpoint:
    def write(self, folder):
        ml.save_checkpoint(tiny(), folder / "model")

    def read(self, folder):
        ml.load_checkpoint(folder / "model")(IDS)


class TransformersFolder:
    def write(self, folder):
        ml.to_hf_gpt2(tiny(tie_weights=True), folder)

    def read(self, folder):
        ml.from_hf_gpt2(folder)(IDS)


class ShardedFolder(TransformersFolder):
    def write(self, folder):
        super().write(folder)
        whole = folder / "model.safetensors"
        tensors = list(ml.load_safetensors(whole).items())
        whole.unlink()
        shards = {"1.safetensors": dict(tensors[:5]), "2.safetensors": dict(tensors[5:])}
        for name, part in shards.items():
            ml.save_safetensors(folder / name, part)
        index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FORMATS = {
    "adapter": lambda: AdapterFolder(ml.save_adapter, modules_to_save=["lm_head", "ln_f"]),
    "DoRA adapter": lambda: AdapterFolder(ml.save_adapter, use_dora=True, scaling="alpha/sqrt(r)"),
    "adapter of PEFT": lambda: AdapterFolder(ml.save_peft, targets=["q_proj", "v_proj", "up_proj"]),
    "checkpoint": Checkpoint,
    "folder of transformers": TransformersFolder,
    "sharded folder": ShardedFolder,
}


# ---- Damage: functions of (generator, bytes of a file) that return the new bytes

STRANGE = [
    None, True, False, 0, -1, 1, 2, 3, 8, 1.5, -0.0, 1e308, 10**30, 10**400, 2**31, 2**63, 2**64,
    float("nan"), float("inf"), -float("inf"), "", "x", "x" * 10_000, "é\0", [], {}, [[]], {"a": 1},
    ["q_proj"], "(a+)+$", "(.*)*", "[", "all-linear", "F16", "BF16", "I32", "BOOL", "F64",
    "DEEP", "LONG",
]
PLACEHOLDERS = {'"DEEP"': "[" * 100_000 + "]" * 100_000, '"LONG"': "1" * 5_000}


def changed_bytes(rng, raw):
    """Overwrite, insert or remove bytes, more often at the front, where the header is."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at = int(len(raw) * rng.random() ** rng.choice([1, 4]))
        match rng.integers(4):
            case 0:
                raw = raw[:at]
            case 1:
                raw[at:at] = rng.bytes(rng.integers(1, 9))
            case 2:
                del raw[at : at + rng.integers(1, 9)]
            case _:
                raw[at : at + 1] = rng.bytes(1)
    return bytes(raw)


def changed_json(rng, raw):
    """Replace, remove or copy one value of a JSON text."""
    value = json.loads(raw)
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in list(items):
            places.append((node, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    walk(value)
    node, key = places[rng.integers(len(places))]
    match rng.integers(8):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[f"{key}{rng.integers(9)}"] = node.pop(key)
        case 2:
            other, place = places[rng.integers(len(places))]
            node[key] = copy.deepcopy(other[place])
        case _:
            node[key] = STRANGE[rng.integers(len(STRANGE))]
    text = json.dumps(value)
    for word, meaning in PLACEHOLDERS.items():
        text = text.replace(word, meaning)
    return text.encode()


def changed_header(rng, raw):
    """Change the JSON of a safetensors file, or the configuration in it."""
    text, data = split(raw)
    header = json.loads(text)
    if "config" in header.get("__metadata__", {}) and rng.random() < 0.7:
        config = changed_json(rng, header["__metadata__"]["config"])
        header["__metadata__"]["config"] = config.decode()
        return joined(json.dumps(header).encode(), data)
    return joined(changed_json(rng, text), data)


def changed_arrays(rng, raw):
    """Swap, drop, rename or change arrays, in a file that is well formed."""
    text, data = split(raw)
    header = json.loads(text)
    metadata = header.pop("__metadata__", {})
    names = {"<f4": "F32", "<f8": "F64", "<f2": "F16", "<i4": "I32", "|u1": "U8", "|b1": "BOOL"}
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
    one, two = rng.choice(list(arrays), 2)
    array = arrays[one]
    match rng.integers(8):
        case 0:
            arrays[one], arrays[two] = arrays[two], array
        case 1:
            del arrays[one]
        case 2:
            arrays[str(rng.choice(["", "x", f"{one}x", two.replace("0", "7")]))] = arrays.pop(one)
        case 3:
            with np.errstate(all="ignore"):
                arrays[one] = array.astype(str(rng.choice(list(names))))
        case 4:
            views = array.T, array.reshape(-1), array[None], array[:0], array[..., :-1], array[:1]
            arrays[one] = views[rng.integers(len(views))]
        case 5:
            arrays[one] = np.full_like(array, rng.choice([np.nan, np.inf, 3e38, 1e-45, 0.0]))
        case 6:
            arrays[one] = np.full(array.shape, 1e300)
        case _:
            arrays[f"{one}{rng.integers(9)}"] = array
    header, parts, end = {"__metadata__": metadata}, [], 0
    for name, array in arrays.items():
        parts.append(array.tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": names[array.dtype.str], "shape": array.shape,
                        "data_offsets": [begin, end]}
    return joined(json.dumps(header).encode(), b"".join(parts))


def split(raw):
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


def joined(text, data):
    return struct.pack("<Q", len(text)) + text + data


def damage(rng, path, raw):
    """Damage a file on disk."""
    if rng.random() < 0.02:
        path.unlink()
        if rng.random() < 0.5:
            path.mkdir()
        return
    kinds = [changed_json] if path.suffix == ".json" else [changed_header, changed_arrays]
    kind = rng.choice([changed_bytes, *kinds, *kinds])
    path.write_bytes(kind(rng, raw))


# ---- The test


@contextlib.contextmanager
def little_memory():
    """Let an allocation of more than BYTES fail, where the system can do that."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.filterwarnings("ignore:.* was made for")  # if the damage is in the name of its base
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_or_read(name, tmp_path):
    kind, good, bad = FORMATS[name](), tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    kind.write(good)
    kind.read(good)
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    rng = np.random.default_rng(None if THOROUGH else 0)
    seen, others, slowest = Counter(), [], 0.0
    for _ in range(many(300, 10_000)):
        shutil.copytree(good, bad)
        for which in rng.permutation(sorted(files))[: rng.choice([1, 1, 2])]:
            damage(rng, bad / which, files[which])
        seconds = time.perf_counter()
        with little_memory(), np.errstate(all="ignore"):
            try:
                kind.read(bad)
                seen["read"] += 1
            except (ml.CheckpointError, FileNotFoundError, IsADirectoryError):
                seen["refused"] += 1
            except Exception as error:
                seen["other"] += 1
                shutil.copytree(bad, tmp_path / f"other{seen['other']}")
                others.append(f"{type(error).__name__}: {str(error)[:200]}")
        slowest = max(slowest, time.perf_counter() - seconds)
        shutil.rmtree(bad)
    print(f"{name}: {dict(seen)}, slowest {slowest:.2f} s")
    assert not others
    assert seen["refused"] > 100 and seen["read"] > 0 and slowest < SECONDS
