"""Kill something that writes, again and again, and see what is on the disk after each kill.

    python kill_runs.py NAME FOLDER COUNT

prints {"old": 3, "new": 2, ...} as JSON; `test_kills` runs this in a process of its own, which can
be forked without harm. There are two results, which take turns, so each kill meets an old one.

    old, new    the result is one of the two, whole
    mixed       it can be read, but is neither of the two
    refused     it cannot be read
    unfinished  how many of the new results are whole only once the next command has begun
    temporary   temporary files that the kills left
    left        those that are there even after one more write, which was not disturbed
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from conftest import THOROUGH, tiny_config
from helpers_adapters import task

import minilora as ml
from minilora import cli
from minilora.files.together import results
from minilora.lab import compare, plots, pretrain

IDS = np.arange(12).reshape(2, 6) % 11
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.truncate"}


# ---- What is killed: `write` one of two results, `found` tells which one is there


class Files:
    """Files that are read to compute logits."""

    def __init__(self, folder):
        self.folder, self.out, self.unfinished = folder, folder / "out", 0
        self.expected = []
        for i in (1, 0):
            self.write(i)
            self.expected.insert(0, self.load()(IDS))

    def found(self):
        got = self.load()(IDS)
        return next((i for i in (0, 1) if np.array_equal(got, self.expected[i])), "mixed")


class SaveAdapter(Files):
    models = [task(seed=i, alpha=4 * i) for i in (1, 2)]
    save = staticmethod(ml.save_adapter)

    def write(self, i):
        self.save(self.models[i], self.out)

    def load(self):
        return ml.load_adapter(ml.GPT(tiny_config()), self.out)


class SavePeft(SaveAdapter):
    save = staticmethod(ml.save_peft)


class SaveCheckpoint(Files):
    models = [ml.GPT(tiny_config(n_heads=n, layer_norm_eps=10.0**-n), rng=n) for n in (1, 2)]
    save = staticmethod(ml.save_checkpoint)

    write = SaveAdapter.write

    def load(self):
        return ml.load_checkpoint(self.out)


class SaveTransformers(SaveCheckpoint):
    save = staticmethod(ml.to_hf_gpt2)

    def load(self):
        return ml.from_hf_gpt2(self.out)


class Command(Files):
    def write(self, i):
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            assert cli.main(self.arguments(i)) == 0

    def load(self):
        return ml.load_checkpoint(self.out)


class Pretrain(Command):
    def __init__(self, folder):
        tokens = [part[:5_000] for part in pretrain.load_tokens("docs")]
        pretrain.load_tokens = lambda name: tokens
        super().__init__(folder)

    def arguments(self, i):
        return ["pretrain", "--model", "small", "--steps", "1", "--seed", str(i), "--out",
                str(self.out), "--no-progress", "--threads", "1"]


class Merge(Command):
    def __init__(self, folder):
        for i in (0, 1):
            adapter = ml.replace_linear_with_lora(ml.load_base("small"), 1, 2, "q_proj", rng=i)
            adapter.h[0].attn.q_proj.lora.B.data += i + 1.0
            ml.save_adapter(adapter, folder / f"adapter{i}")
        super().__init__(folder)

    def arguments(self, i):
        return ["merge", "small", str(self.folder / f"adapter{i}"), str(self.out)]


class Compare(Command):
    """The result is whole if compare.json has the losses of the adapters that are there."""

    def __init__(self, folder):
        self.folder, self.out, self.unfinished = folder, folder / "out", 0
        compare.EVALUATION_BATCHES, compare.EVALUATION_BATCH_SIZE = 1, 2
        plots.COMPARISON.clear()  # pictures take longer than all the rest
        compare.Data.for_context = functools.cache(compare.Data.for_context)
        context_length = ml.load_base("small").config.context_length
        self.held_out = compare.Data.for_context(context_length).code_held_out
        self.write(0)

    def arguments(self, i):
        return ["compare", "--quick", "--steps", "2", "--ranks", ["2", "1,2"][i], "--lr",
                ["0.01", "0.03"][i], "--out", str(self.out), "--no-progress", "--threads", "1"]

    def found(self):
        if not (self.out / compare.RESULT).exists():
            self.unfinished += 1
            with contextlib.suppress(KeyboardInterrupt), results(self.out, compare.RESULT):
                raise KeyboardInterrupt
        result = json.loads((self.out / compare.RESULT).read_text())
        runs = {f"r{run['rank']}-seed{run['seed']}": run for run in result["runs"] if run["rank"]}
        for name, run in runs.items():
            model = ml.load_adapter(ml.load_base("small"), self.out / "adapters" / name)
            if ml.evaluate(model, self.held_out, 1) != run["code_after"]:
                return "mixed"
        return [1, 2].index(len(runs))


WRITERS = {
    "save_adapter": SaveAdapter, "save_peft": SavePeft, "save_checkpoint": SaveCheckpoint,
    "to_hf_gpt2": SaveTransformers, "pretrain": Pretrain, "merge": Merge, "compare": Compare,
}


# ---- Killing

FAILED = 255


def fork(work):
    """Start a process whose exit status is what work() returns."""
    child = os.fork()
    if child:
        return child
    status = FAILED
    try:
        status = work()
    finally:
        os._exit(status)


def write_until(writer, i, last):
    """Write result i, and kill just before the disk is changed for the `last`th time.

    Returns -9, or the number of changes if there are fewer.
    """
    count = 0

    def hook(event, arguments):
        nonlocal count
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(str(writer.folder)):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def work():
        sys.addaudithook(hook)
        writer.write(i)
        return count

    _, status = os.waitpid(fork(work), 0)
    return os.waitstatus_to_exitcode(status)


def write_for(writer, i, seconds):
    """Write result i, then the other one, and so on, until killed. Returns -9."""
    parent = os.getpid()

    def work():
        while os.getppid() == parent:  # nor longer than the tests run
            for turn in (i, 1 - i):
                writer.write(turn)
        return FAILED

    child = fork(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run(name, folder, kills):
    """Kill half of the times before a change of the disk, and half at random moments."""
    writer, seen = WRITERS[name](folder), Counter()
    rng = np.random.default_rng(None if THOROUGH else 0)
    began = time.perf_counter()
    old, changes = 1, write_until(writer, 1, None)
    most = 2.0 * (time.perf_counter() - began)
    moments = [1 + i % changes for i in rng.permutation(changes * kills)]
    for turn in range(kills):
        if turn % 2:
            status = write_for(writer, 1 - old, most * rng.random())
        else:
            status = write_until(writer, 1 - old, moments[turn])
        assert status != FAILED, "the writer failed, see above"
        try:
            found = writer.found()
        except (ValueError, OSError) as error:
            found = f"refused: {error}"
        seen[{old: "old", 1 - old: "new"}.get(found, found)] += 1
        if found in (0, 1):
            old = found
        else:
            writer.write(old)
    temporary = temporary_files(folder)
    writer.write(old)
    return dict(seen) | {"unfinished": writer.unfinished, "temporary": temporary,
                         "left": temporary_files(folder)}


def temporary_files(folder):
    return sum(1 for _ in folder.rglob("*.tmp"))


if __name__ == "__main__":
    name, folder, count = sys.argv[1:]
    print(json.dumps(run(name, Path(folder), int(count))))
