"""Whatever happens while something is written, the old result is there, or the new one is whole.

It is killed, the disk is full, or the folder cannot be written to.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import many
from kill_runs import WRITERS, Command, Compare, Pretrain, temporary_files

import minilora as ml
from minilora import cli
from minilora.files import safetensors

resource = pytest.importorskip("resource", reason="processes cannot be limited or killed here")
SAVERS = [name for name, writer in WRITERS.items() if not issubclass(writer, Command)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_leaves_the_old_result_or_the_new_one(tmp_path, name):
    kills = many(16 if name in SAVERS else 6, 200)
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, script, name, tmp_path, str(kills)], text=True,
                          capture_output=True, check=False)
    assert not done.returncode, done.stderr
    print(name, done.stdout)
    seen = json.loads(done.stdout)
    unfinished, left, _ = (seen.pop(key) for key in ("unfinished", "left", "temporary"))
    assert set(seen) <= {"old", "new"} and sum(seen.values()) == kills
    assert not left and (not unfinished or name == "compare")


@pytest.fixture(params=SAVERS)
def writer(request, tmp_path):
    """Something that can write result 0, which is there, and result 1."""
    return WRITERS[request.param](tmp_path)


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("second", [1, 2, 3])
def test_two_writes_in_a_row_that_end_early(writer, monkeypatch, first, second):
    """What one has left must not be lost with the next; they end at a file that would be moved."""
    for i, last in ((1, first), (0, second)):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", Failing(os.replace, last, KeyboardInterrupt()))
            writer.write(i)
        assert writer.found() in (0, 1)


class Failing:
    """A function, but one of its calls raises an error."""

    def __init__(self, function, last, error):
        self.function, self.last, self.error, self.calls = function, last, error, 0

    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == self.last:
            raise self.error
        return self.function(*args, **options)


# ---- A full disk


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_failure(writer, number, limits):
    """Check that writing result 1 fails with this error, and that nothing is different then."""
    before = contents(writer.folder)
    with limits, pytest.raises(OSError) as error:
        writer.write(1)
    assert error.value.errno == number and not error.value.filename.endswith(".tmp")
    assert contents(writer.folder) == before and writer.found() == 0


@contextlib.contextmanager
def largest_file(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_file_that_may_not_grow_any_further(writer):
    most = max(len(content) for content in contents(writer.folder).values())
    for size in (0, 1, 100, most // 2, most - 1):
        check_failure(writer, errno.EFBIG, largest_file(size))
    writer.write(1)
    assert writer.found() == 1 and not temporary_files(writer.folder)


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
def test_a_disk_that_is_full_at_any_call(writer, monkeypatch, call):
    """The first of its calls fails, or the second, and so on, until the result is written."""
    place, function = (safetensors, open) if call == "open" else (os, getattr(os, call))
    for number in range(1, 20):
        failing = Failing(function, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with monkeypatch.context() as patch:
            patch.setattr(place, call, failing, raising=False)
            try:
                writer.write(1)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        assert writer.found() in (0, 1) and not temporary_files(writer.folder)
        if failing.calls < number:
            assert writer.found() == 1
            return
        writer.write(0)
    raise AssertionError(f"more than 20 calls of {call}")


# ---- A folder that cannot be written to


@contextlib.contextmanager
def no_writing():
    def refuse(path, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "open", refuse, raising=False)
        for call in ("mkdir", "rename", "replace", "unlink"):
            patch.setattr(os, call, refuse)
        yield


def test_a_disk_that_can_only_be_read(writer):
    check_failure(writer, errno.EROFS, no_writing())


def test_a_path_below_a_file(writer):
    (writer.folder / "file").write_text("")
    writer.out = writer.folder / "file" / "out"
    with pytest.raises(OSError, match="file") as error:
        writer.write(1)
    assert error.value.errno in (errno.ENOTDIR, errno.EEXIST)


@pytest.mark.skipif(os.name != "posix" or not os.geteuid(), reason="root may write everywhere")
def test_a_folder_without_permission(writer):
    check_failure(writer, errno.EACCES, no_permission(writer.folder))


@contextlib.contextmanager
def no_permission(folder):
    inside = {path if path.is_dir() else path.parent for path in folder.rglob("*")}
    for path in inside:
        path.chmod(0o500)
    try:
        yield
    finally:
        for path in inside:
            path.chmod(0o700)


@pytest.mark.parametrize("command", [Compare, Pretrain])
def test_commands_find_out_before_they_train(tmp_path, capsys, monkeypatch, command):
    (tmp_path / "file").write_text("")
    self = object.__new__(command)
    self.out = tmp_path / "file" / "out"
    monkeypatch.setattr(ml.Module, "backward", None)
    monkeypatch.setattr(ml.GPT, "forward", None)  # so that any training would raise TypeError
    assert cli.main(self.arguments(1)) == 2
    assert "file" in capsys.readouterr().err
