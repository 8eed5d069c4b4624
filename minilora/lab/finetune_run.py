"""A run of `minilora finetune`: its folder, and how it goes on after it was ended early.

While it runs, the folder has a sub-folder with the whole state, from which a later call goes on in
the same bits. The result is written at the end, and then the sub-folder is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minilora.data.datasets import TRAINING, VALIDATION, Dataset, beside_training, load_data
from minilora.data.encoded import Text
from minilora.data.tokenizer import save_model, tokenizer_of
from minilora.files.bases import load_model
from minilora.files.origin import fingerprint
from minilora.files.peft_config import CONFIG_FILE, WEIGHTS_FILE
from minilora.files.peft_write import save_adapter
from minilora.files.safetensors import check_writable, write_atomically
from minilora.files.training_state import load_state, read_about, save_state
from minilora.lab import plots
from minilora.lab.finetune import KINDS, Job, Settings, prepare
from minilora.lora.qlora import dequantize
from minilora.nn.llama import Llama
from minilora.nn.validate import CheckpointError
from minilora.train.history import History

CHECKPOINT, STATE = "checkpoint", "state.safetensors"
RESULT, CURVE, SETTINGS = "finetune.json", "loss.png", "settings.json"
SERIES = ("steps", "losses", "learning_rates", "seconds", "validation_steps", "validation_losses")
MODEL = "model"  # a whole one, of full fine-tuning
SAVE_EVERY = 50


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes
    ----------
    data, val : str
        Paths of the training and the validation data; no `val`: a part of the data.
    base : str or None
        What `load_model` loads; None: smollm2 for conversations, base for texts.
    save_every : int
        Steps between two saves of the whole state; 0: only if Ctrl-C ends the run.
    settings : Settings
    """

    data: str
    val: str | None = None
    base: str | None = None
    save_every: int = SAVE_EVERY
    settings: Settings = Settings()

    def flat(self) -> dict[str, Any]:
        """Return everything as one dict of plain values, as `from_flat` takes it."""
        values = asdict(self)
        return values | values.pop("settings") | {
            "target_modules": self.settings.target_modules and [*self.settings.target_modules]}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Plan:
        """Make a plan of options by name."""
        own = {name: value for name, value in values.items() if name in ("data", "val", "base",
                                                                         "save_every")}
        return cls(**own, settings=Settings(**{
            name: value for name, value in values.items() if name not in own}))


@dataclass
class Outcome:
    """What a run has come to.

    Attributes
    ----------
    saved : bool
        Whether an interrupted run can go on from its last step.
    before, after : list of (prompt, text)
        What `Job.samples` returned.
    files : list of str
        The result, in the folder; empty if the run was interrupted.
    """

    job: Job
    plan: Plan
    history: History
    before: list[tuple[str, str]]
    after: list[tuple[str, str]]
    files: list[str]
    saved: bool


def checkpoint_of(folder: Path) -> Path:
    """Return the file with the state of the run in a folder. Raises ValueError if there is none."""
    state = folder / CHECKPOINT / STATE
    if not state.exists():
        why = "its run is complete" if (folder / RESULT).exists() else f"it has no {CHECKPOINT}"
        raise ValueError(f"there is nothing to resume in {folder}: {why}")
    return state


def planned(folder: Path) -> Plan:
    """Return the plan of the run in a folder, to be resumed."""
    state = checkpoint_of(folder)
    about = read_about(state)
    try:
        if about.keys() >= {"data", "base", "before"}:
            return Plan.from_flat(about["plan"])
    except (KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{state} was written by another version of minilora, or is damaged")


def check_new(folder: Path, overwrite: bool, data: Path) -> None:
    """Raise an error unless a new run on some data may be written to a folder."""
    everything = data.is_dir() and not beside_training(data, TRAINING)
    if everything and folder.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"{folder} is inside {data}: what is written there would be among the "
                         "data, so choose another --out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder to write")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        on = (f", or --resume {shlex.quote(str(folder))} to go on"
              if (folder / CHECKPOINT / STATE).exists() else "")
        raise ValueError(f"{folder} has something in it already: add --overwrite to replace "
                         f"it{on}")


def usual_base(data: Dataset) -> str:
    """Return the base for a kind of data, if none is given."""
    return "base" if isinstance(data[0], str) else "smollm2"


def build(plan: Plan) -> tuple[Job, Plan]:
    """Load data and base, and return the job, and the plan with nothing left open."""
    data, val = load_data(plan.data), plan.val
    if val is None and (found := beside_training(plan.data, VALIDATION)):
        val = str(found)
    base = plan.base or usual_base(data)
    model = load_model(base)
    if plan.settings.full:
        dequantize(model)
    validation = None if val is None else load_data(val)
    job = prepare(model, data, validation, tokenizer_of(model, base), plan.settings)
    return job, replace(plan, base=base, val=val, settings=job.settings)


def run(plan: Plan, folder: Path, resume: bool = False, progress: bool = True) -> Outcome:
    """Fine-tune by a plan, or go on with it, and write the result to a folder.

    Ctrl-C ends it after the step that is being done, and saves its state; a second one ends it at
    once, and the state is that of the last save.
    """
    job, plan = build(plan)
    state, optimizer = folder / CHECKPOINT / STATE, job.optimizer()
    about = {"plan": plan.flat(), "data": digest(job), "base": fingerprint(job.model)}
    history, saved = History(), True
    for name in (*_written(job), RESULT, CURVE, SETTINGS):  # what cannot be written is found now
        check_writable(folder / name)
    if resume:
        old = read_about(state)
        for part, path in (("data", plan.data), ("base", plan.base)):
            if old.get(part) != about[part]:
                raise ValueError(f"{path} has changed since the run began, so it cannot go on")
        history, about = load_state(state, job.model, optimizer), old
    else:
        about["before"] = job.samples()

    def save(record: History) -> None:
        save_state(state, job.model, optimizer, record, about)
        if not plan.settings.full:
            save_adapter(job.model, state.parent, plan.base)

    def after_step(record: History) -> None:
        nonlocal saved
        done, stop = len(record.steps), interrupted()
        saved = stop or done == job.settings.steps or bool(
            plan.save_every) and done % plan.save_every == 0
        if saved:
            save(record)
        if stop:
            raise KeyboardInterrupt

    with deferred_interrupt() as interrupted:
        if not resume:
            save(history)
        history = job.train(progress, optimizer, history, after_step)
    before = [(prompt, text) for prompt, text in about["before"]]
    if history.interrupted:
        return Outcome(job, plan, history, before, [], [], saved)
    try:
        after = job.samples()
        files = _write(folder, job, plan, history, before, after)
    except KeyboardInterrupt:  # the state is still there
        return Outcome(job, plan, history, before, [], [], True)
    return Outcome(job, plan, history, before, after, files, True)


def digest(job: Job) -> str:
    """Return a text that differs for any other data."""
    found = hashlib.sha256()
    for part in filter(None, (job.training, job.held_out)):
        arrays = [part.ids] if isinstance(part, Text) else [a for row in part.rows for a in row]
        for array in arrays:
            found.update(array.tobytes())
    return found.hexdigest()


def _write(
    folder: Path, job: Job, plan: Plan, history: History, before: Any, after: Any
) -> list[str]:
    """Write the result, remove the state, and return the names of the files."""
    losses, written = history.validation_losses, _written(job)
    for name in {CONFIG_FILE, WEIGHTS_FILE, f"{MODEL}.safetensors"} - {*written}:
        (folder / name).unlink(missing_ok=True)  # of an earlier run, which would be taken for ours
    if plan.settings.full:
        path = folder / written[0]
        save_model(job.model, str(plan.base), path.parent if isinstance(job.model, Llama) else path)
    else:
        save_adapter(job.model, folder, plan.base, losses[-1] if losses else None)
    plots.save(plots.loss_curve(history, KINDS[job.kind].unit), folder / CURVE)
    write_atomically(folder / SETTINGS, json.dumps(plan.flat(), indent=1).encode())
    samples = [{"prompt": prompt, "before": old, "after": new}
               for (prompt, old), (_, new) in zip(before, after, strict=True)]
    record = {"history": {name: getattr(history, name) for name in SERIES}, "samples": samples}
    write_atomically(folder / RESULT, json.dumps(record, indent=1).encode())
    (folder / CHECKPOINT / STATE).unlink(missing_ok=True)  # first: the rest cannot be resumed
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return [*written, CURVE, SETTINGS, RESULT]


def _written(job: Job) -> list[str]:
    """Return the names of the files that will hold what is trained."""
    if not job.settings.full:
        return [CONFIG_FILE, WEIGHTS_FILE]
    return [f"{MODEL}/{MODEL}.safetensors" if isinstance(job.model, Llama) else
            f"{MODEL}.safetensors"]


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed. The second time, it interrupts.

    A step that is interrupted in the middle leaves some parameters updated and some not, from
    which no run could go on in the same bits.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        with contextlib.suppress(OSError):  # print is not for signal handlers
            os.write(2, b"\nstopping after this step; Ctrl-C again to stop at once\n")

    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda: False
        return
    old = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, old)
