"""Files that belong together are never mixed up, whenever a process is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_adapters import base, task

import minilora as ml
from minilora.files import together
from minilora.files.safetensors import write_atomically
from minilora.files.together import load_pair, results, save_pair

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Killed(BaseException):
    """Stands for a kill: no handler for ordinary errors runs."""


@pytest.fixture
def two(tmp_path, ids):
    """Return the folders of two adapters that differ in alpha, and their logits."""
    logits = {}
    for alpha in (4, 400):
        model = task(seed=alpha, alpha=alpha)
        ml.save_adapter(model, tmp_path / str(alpha))
        logits[alpha] = model(ids)
    return tmp_path, logits


@pytest.mark.parametrize("mixed", [CONFIG, WEIGHTS])
def test_the_files_of_two_saves_are_not_read_as_one_adapter(two, mixed):
    folder, _ = two
    (folder / "4" / mixed).write_bytes((folder / "400" / mixed).read_bytes())
    with pytest.raises(ml.CheckpointError, match="are from two different saves"):
        ml.load_adapter(base(), folder / "4")


@pytest.mark.parametrize("place", ["adapter_config.json", WEIGHTS])
def test_files_without_a_fingerprint_are_read(two, ids, place):
    """Other libraries write none, and drop ours when they write a file again."""
    folder, logits = two
    if place == WEIGHTS:
        path = folder / "4" / WEIGHTS
        ml.save_safetensors(path, ml.load_safetensors(path), {"format": "pt"})
    else:
        path = folder / "4" / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
    assert np.array_equal(ml.load_adapter(base(), folder / "4")(ids), logits[4])


@pytest.mark.parametrize("step", range(1, 5))
def test_a_kill_between_the_two_files_leaves_the_old_pair_or_the_new_one(
    tmp_path, ids, monkeypatch, step
):
    old, new = task(seed=1, alpha=4), task(seed=2, alpha=400)
    ml.save_adapter(old, tmp_path)
    real, calls = os.replace, []

    def replace(*names):
        calls.append(names)
        if len(calls) == step:
            raise Killed
        real(*names)

    monkeypatch.setattr(os, "replace", replace)
    killed = False
    try:
        ml.save_adapter(new, tmp_path)
    except Killed:
        killed = True
    monkeypatch.undo()
    assert killed == (step <= 3)
    loaded = ml.load_adapter(base(), tmp_path)(ids)
    assert np.array_equal(loaded, (old if step <= 2 else new)(ids))
    ml.save_adapter(old, tmp_path)
    assert np.array_equal(ml.load_adapter(base(), tmp_path)(ids), old(ids))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_a_first_save_that_is_killed_after_its_weights_can_be_read(tmp_path, ids, monkeypatch):
    real = together.write_atomically

    def write(path, content):
        if path.name == CONFIG:
            raise Killed
        real(path, content)

    monkeypatch.setattr(together, "write_atomically", write)
    model = task()
    with pytest.raises(Killed):
        ml.save_adapter(model, tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert np.array_equal(ml.load_adapter(base(), tmp_path)(ids), model(ids))


def test_gpt2_folders_are_pairs_as_well(tmp_path):
    for name, heads in (("a", 2), ("b", 4)):
        config = ml.GPTConfig(11, 6, 8, 1, heads)
        ml.to_hf_gpt2(ml.GPT(config), tmp_path / name)
    (tmp_path / "a/config.json").write_bytes((tmp_path / "b/config.json").read_bytes())
    with pytest.raises(ml.CheckpointError, match="are from two different saves"):
        ml.from_hf_gpt2(tmp_path / "a")


def test_a_reader_and_a_writer_at_the_same_time(tmp_path):
    """Every read gives the numbers of one save."""
    code = f"""
import numpy as np
from pathlib import Path
from minilora.files.together import save_pair
w, c = Path({str(tmp_path / "w")!r}), Path({str(tmp_path / "c")!r})
for i in range(10**9):
    save_pair(w, {{"x": np.full(3, i % 100, np.float32)}}, c, {{"x": i % 100}})
"""
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        try:
            while not (tmp_path / "c").exists() and writer.poll() is None:
                pass
            seen, reads = set(), 0
            while len(seen) < 10 or reads < 200:
                settings, tensors = load_pair(tmp_path / "w", tmp_path / "c")
                assert (tensors["x"] == settings["x"]).all()
                seen.add(settings["x"])
                reads += 1
                assert writer.poll() is None
        finally:
            writer.kill()


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    code = f"""
import os, signal
from minilora.files.safetensors import write_atomically
def chunks():
    yield b"x" * 100_000
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically({str(tmp_path / "x")!r}, chunks())
"""
    write_atomically(tmp_path / "x", b"old")
    with subprocess.Popen([sys.executable, "-c", code]) as killed:
        os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # still a zombie
        assert len(os.listdir(tmp_path)) == 2 and (tmp_path / "x").read_bytes() == b"old"
        write_atomically(tmp_path / "x", b"older")
        assert os.listdir(tmp_path) == ["x"]
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(os.listdir(tmp_path)) == 2
    running = tmp_path / f".minilora-00000000-{os.getpid()}-0.tmp"  # of another machine
    running.write_bytes(b"")
    write_atomically(tmp_path / "y", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted(["x", "y", running.name])


# ---- Results


def put(folder, text, **more):
    with results(folder, "record") as temporary:
        for name in ("record", "deep/a", "b", *more):
            write_atomically(temporary / name, text)


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_results_appear_together(tmp_path):
    (tmp_path / "mine").write_bytes(b"stays")
    put(tmp_path, b"old")
    with pytest.raises(Killed), results(tmp_path, "record") as temporary:
        write_atomically(temporary / "record", b"new")
        raise Killed
    everything = {"record": b"old", "deep/a": b"old", "b": b"old", "mine": b"stays"}
    assert read(tmp_path) == everything
    put(tmp_path, b"new")
    assert read(tmp_path) == dict.fromkeys(everything, b"new") | {"mine": b"stays"}


@pytest.mark.parametrize("step", range(1, 4))
def test_a_kill_while_results_move_leaves_no_record_of_a_mixture(tmp_path, monkeypatch, step):
    put(tmp_path, b"old")
    real, calls = os.replace, []

    def replace(source, target):
        if Path(source).is_relative_to(tmp_path / together.READY):
            calls.append(source)
        if len(calls) == step:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        put(tmp_path, b"new")
    monkeypatch.undo()
    assert not (tmp_path / "record").exists()
    assert sum(text == b"new" for text in read(tmp_path).values()) == 3
    with pytest.raises(Killed), results(tmp_path, "record"):
        raise Killed  # the next call begins by moving the rest
    assert read(tmp_path) == {"record": b"new", "deep/a": b"new", "b": b"new"}


def test_what_is_in_the_way_of_results_costs_neither_the_old_ones_nor_the_new(tmp_path):
    put(tmp_path, b"old")
    (tmp_path / "c").mkdir()
    for _ in range(2):
        with pytest.raises(FileExistsError, match=f"is in the way of {tmp_path / 'c'}: move it"):
            put(tmp_path, b"new", c=1)
        assert (tmp_path / "record").read_bytes() == (tmp_path / "b").read_bytes() == b"old"
    (tmp_path / "c").rmdir()
    with pytest.raises(Killed), results(tmp_path, "record"):
        raise Killed
    assert set(read(tmp_path).values()) == {b"new"} and len(read(tmp_path)) == 4


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / ".next/cache").mkdir(parents=True)
    put(tmp_path, b"new")
    assert (tmp_path / ".next/cache").is_dir()


def test_two_processes_that_save_one_pair(tmp_path):
    code = """
import sys
import numpy as np
from pathlib import Path
from minilora.files.together import save_pair
for i in range(15):
    x = np.float32(100 * int(sys.argv[2]) + i)
    save_pair(Path(sys.argv[1], "w"), {"x": x}, Path(sys.argv[1], "c"), {"x": float(x)})
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), n]) for n in "123"]
    while not (tmp_path / "c").exists():
        assert all(writer.poll() in (None, 0) for writer in writers)
    while any(writer.poll() is None for writer in writers):
        settings, tensors = load_pair(tmp_path / "w", tmp_path / "c")
        assert tensors["x"] == settings["x"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    settings, tensors = load_pair(tmp_path / "w", tmp_path / "c")
    assert tensors["x"] == settings["x"] and sorted(os.listdir(tmp_path)) == ["c", "w"]


def test_pairs_of_many_sizes_have_different_fingerprints(tmp_path):
    seen = set()
    for tensors in ({"x": np.zeros(2)}, {"x": np.zeros((2, 1))}, {"y": np.zeros(2)}, {},
                    {"x": np.zeros(2, np.float32)}, {"x": np.ones(2)}):
        for settings in ({}, {"a": 1}):
            save_pair(tmp_path / "w", tensors, tmp_path / "c", settings)
            seen.add(json.loads((tmp_path / "c").read_text())["auto_mapping"][together.FINGERPRINT])
    assert len(seen) == 12
