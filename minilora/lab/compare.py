"""Compare full fine-tuning with LoRA, from English docs to Python code.

The shipped base was trained on English only. Each method fine-tunes it on Python sources with its
own learning rate, and the promises of LoRA are measured on the way.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.batches import random_batches, sequential_batches
from minilora.data.corpus import load_tokens
from minilora.files.checkpoint import load_base, save_checkpoint
from minilora.files.peft_write import save_adapter
from minilora.files.safetensors import check_writable, write_atomically
from minilora.files.together import results
from minilora.lab import markdown, plots
from minilora.lora.wrap import remove_lora, replace_linear_with_lora
from minilora.nn.gpt import GPT
from minilora.train.history import History
from minilora.train.loop import evaluate, fit
from minilora.train.optim import AdamW
from minilora.train.parallel import Batch
from minilora.train.schedule import cosine_schedule

# A good learning rate for each method, from the sweep in notebook 04.
FULL_LEARNING_RATE, LORA_LEARNING_RATE = 2e-3, 1e-2
BATCH_SIZE, WARMUP = 16, 20
EVALUATION_BATCHES, EVALUATION_BATCH_SIZE = 8, 32
RESULT, ADAPTER = "compare.json", "adapters/r{rank}-seed{seed}"


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    Attributes
    ----------
    base : str
        Name of a shipped model.
    ranks : tuple of int
        LoRA ranks, one method for each besides full fine-tuning.
    steps : int
        Training steps of each run, 2 or more.
    lr : float or None
        One learning rate for all methods; None: each method's own.
    alpha : float or None
        LoRA alpha; None: twice the rank.
    target_modules : tuple of str or None
        Names or globs of the layers to adapt; None: every Linear.
    seeds : int
        Runs of each method.
    threads : int or None
        Threads that share each batch; None: as many as pay off.
    """

    base: str = "base"
    ranks: tuple[int, ...] = (2, 8)
    steps: int = 300
    lr: float | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    seeds: int = 1
    threads: int | None = None

    @property
    def plan(self) -> list[tuple[int, int | None]]:
        """The seed and the rank of every run, in order; rank None is full fine-tuning."""
        return [(seed, rank) for seed in range(self.seeds) for rank in (None, *self.ranks)]


QUICK = Settings(base="small", steps=250)


@dataclass
class Run:
    """What was measured in one fine-tuning run.

    Losses are in nats per character on held-out text.

    Attributes
    ----------
    total : int
        Parameters of the base.
    training_bytes : int
        Bytes of the gradients and of the optimizer's moments.
    file_bytes : int
        Bytes on disk for this task: a whole model, or an adapter.
    docs_removed : float or None
        Loss on docs with the adapter removed; None for full fine-tuning.
    """

    method: str
    rank: int | None
    seed: int
    learning_rate: float
    trainable: int
    total: int
    training_bytes: int
    file_bytes: int
    ms_per_step: float
    code_before: float
    code_after: float
    docs_after: float
    docs_removed: float | None
    history: History


@dataclass
class Data:
    """The training tokens of the code corpus, (T,), and evaluation batches of both corpora."""

    code: np.ndarray
    code_held_out: list[Batch]
    docs_held_out: list[Batch]

    @classmethod
    def for_context(cls, context_length: int) -> Data:
        """Read both corpora and cut the held-out parts into evaluation batches."""
        code, code_held_out = load_tokens("code")
        _, docs_held_out = load_tokens("docs")
        sizes = EVALUATION_BATCH_SIZE, context_length, EVALUATION_BATCHES
        return cls(
            code, sequential_batches(code_held_out, *sizes),
            sequential_batches(docs_held_out, *sizes),
        )


def method_name(rank: int | None) -> str:
    """Return "full" or "LoRA r=8"."""
    return "full" if rank is None else f"LoRA r={rank}"


def prepare(settings: Settings, rank: int | None, seed: int) -> tuple[GPT, float]:
    """Load the base, add LoRA unless rank is None, and return it with its learning rate."""
    model = load_base(settings.base)
    if rank is None:
        return model, settings.lr or FULL_LEARNING_RATE
    alpha = 2 * rank if settings.alpha is None else settings.alpha
    targets = list(settings.target_modules) if settings.target_modules else None
    replace_linear_with_lora(model, rank, alpha, targets, rng=seed)
    return model, settings.lr or LORA_LEARNING_RATE


def fine_tune(
    model: GPT, data: Data, learning_rate: float, steps: int, seed: int = 0,
    threads: int | None = None, progress: bool = False, description: str = "",
    validate_every: int = 50,
) -> History:
    """Train the trainable parameters on Python code: AdamW, warm-up, cosine decay to a tenth.

    Parameters
    ----------
    data : Data
        Cut for the model's context length.
    learning_rate : float
        The peak, reached after the warm-up.
    seed : int
        Seed of the batches.
    threads, progress, description, validate_every
        As for `fit`; the evaluations are on held-out code.
    """
    length = model.config.context_length
    return fit(
        model,
        random_batches(data.code, BATCH_SIZE, length, rng=seed),
        AdamW([p for p in model.parameters() if p.requires_grad], learning_rate),
        steps,
        schedule=cosine_schedule(learning_rate, steps, min(WARMUP, steps - 1)),
        clip_norm=1.0,
        validation=data.code_held_out,
        validate_every=validate_every,
        threads=threads,
        progress=progress,
        description=description,
    )


def run_method(
    settings: Settings, data: Data, rank: int | None, seed: int, folder: Path, progress: bool
) -> Run:
    """Fine-tune once and measure; a LoRA run writes its adapter to `folder`/adapters.

    Raises
    ------
    KeyboardInterrupt
        If Ctrl-C ended the training early.
    """
    model, learning_rate = prepare(settings, rank, seed)
    trainable = model.num_parameters(trainable_only=True)
    total = model.num_parameters() - (0 if rank is None else trainable)
    history = fine_tune(
        model, data, learning_rate, settings.steps, seed, settings.threads, progress,
        method_name(rank), validate_every=max(1, settings.steps // 6),
    )
    if history.interrupted:  # half a run is not a result and must not replace an adapter
        raise KeyboardInterrupt
    docs_after = evaluate(model, data.docs_held_out, settings.threads)
    code_after = history.validation_losses[-1]
    stored, docs_removed = _store(model, rank, seed, folder, code_after), None
    if rank is not None:
        docs_removed = evaluate(remove_lora(model), data.docs_held_out, settings.threads)
    return Run(
        method=method_name(rank), rank=rank, seed=seed, learning_rate=learning_rate,
        trainable=trainable, total=total,
        training_bytes=sum(history.bytes.values()), file_bytes=stored,
        ms_per_step=1e3 * statistics.median(np.diff([0.0, *history.seconds]).tolist()),
        code_before=history.validation_losses[0], code_after=code_after,
        docs_after=docs_after, docs_removed=docs_removed, history=history,
    )


def _store(model: GPT, rank: int | None, seed: int, folder: Path, loss: float) -> int:
    """Write the adapter, or a whole model for its size only, and return the bytes."""
    if rank is None:
        with tempfile.TemporaryDirectory() as temporary:
            save_checkpoint(model, Path(temporary) / "model.safetensors")
            return file_bytes(Path(temporary))
    adapter = folder / ADAPTER.format(rank=rank, seed=seed)
    save_adapter(model, adapter, held_out_loss=loss)
    return file_bytes(adapter)


def file_bytes(folder: Path) -> int:
    """Return the total bytes of the files in a folder, without hidden ones."""
    return sum(path.stat().st_size for path in folder.glob("[!.]*"))


def compare(settings: Settings, out: str | Path, progress: bool = True) -> dict[str, Any]:
    """Run every method with every seed; write numbers, adapters and figures to `out`.

    They appear there together, at the end. Ctrl-C ends it early; complete runs are kept.

    Returns
    -------
    dict
        "settings", "docs_base" (the base's loss on docs, in nats per character) and "runs", a
        list of `Run` as dicts.

    Raises
    ------
    ValueError
        If the settings are wrong; this is checked before any training.
    """
    if not settings.ranks or settings.seeds < 1:
        raise ValueError("compare needs at least one rank and one seed")
    if settings.steps < 2:
        raise ValueError(f"steps must be 2 or more, got {settings.steps}")
    for rank in settings.ranks:  # find every mistake before the first long run
        prepare(settings, rank, seed=0)
    inside = [f"adapters/{RESULT}"] if (Path(out) / "adapters").exists() else []
    for name in (RESULT, *plots.COMPARISON, *inside):
        check_writable(Path(out) / name)
    base = load_base(settings.base)
    data = Data.for_context(base.config.context_length)
    docs_base = evaluate(base, data.docs_held_out, settings.threads)
    runs: list[Run] = []
    with results(Path(out), RESULT) as folder:
        for seed, rank in settings.plan:
            try:
                runs.append(run_method(settings, data, rank, seed, folder, progress))
            except KeyboardInterrupt:
                if not runs:  # an earlier result is worth more than none
                    raise
                shutil.rmtree(folder / ADAPTER.format(rank=rank, seed=seed), ignore_errors=True)
                break
        result = {"settings": asdict(settings), "docs_base": docs_base,
                  "runs": [asdict(run) for run in runs]}
        for name, figure in plots.COMPARISON.items():
            plots.save(figure(result), folder / name)
        write_atomically(folder / RESULT, json.dumps(result).encode())
    return result


# ---- The tables

COSTS = ["method", "trainable", "share", "grad+opt", "file", "ms/step"]
GAINS = ["method", "code", "of full's gain", "docs", "docs, adapter removed"]


def costs(result: dict[str, Any]) -> list[list[str]]:
    """Return the cells of what each method costs: one row per method, below the headings."""
    return [COSTS] + [[
        name, f"{group[0]['trainable']:,}", f"{group[0]['trainable'] / group[0]['total']:.1%}",
        megabytes(group[0]["training_bytes"]), megabytes(group[0]["file_bytes"]),
        f"{statistics.median(run['ms_per_step'] for run in group):.0f}",
    ] for name, group in plots.by_method(result).items()]


def gains(result: dict[str, Any]) -> list[list[str]]:
    """Return the cells of what each method gives: the losses before, and after each method.

    They are mean ± standard deviation over seeds.
    """
    full_gain = {run["seed"]: _gain(run) or math.nan
                 for run in result["runs"] if run["rank"] is None}
    before, docs = result["runs"][0]["code_before"], result["docs_base"]
    return [GAINS, ["before", f"{before:.3f}", "0%", f"{docs:.3f}", ""]] + [[
        name, _spread([run["code_after"] for run in group]),
        _spread([_gain(run) / full_gain[run["seed"]] for run in group], "{:.0%}"),
        _spread([run["docs_after"] for run in group]), _after_removal(group, docs),
    ] for name, group in plots.by_method(result).items()]


def _gain(run: dict[str, Any]) -> float:
    """Return by how much a run lowered the loss on code."""
    return run["code_before"] - run["code_after"]


def _after_removal(group: list[dict[str, Any]], docs_base: float) -> str:
    """Return the loss on docs without the adapter, and whether it is the base's."""
    removed = [run["docs_removed"] for run in group]
    if group[0]["rank"] is None:
        return "load the base again"
    if all(loss == docs_base for loss in removed):
        return f"{removed[0]:.3f} = base, exactly"
    return f"{_spread(removed)} DIFFERS from base"


def _spread(values: list[float], form: str = "{:.3f}") -> str:
    """Format the mean, with the standard deviation if there are several values."""
    mean = form.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"


def megabytes(count: int) -> str:
    """Return bytes as MB (10^6 bytes) with two decimals."""
    return f"{count / 1e6:.2f} MB"


def table(result: dict[str, Any]) -> str:
    """Return the comparison as two Markdown tables: what each method costs, and what it gives."""
    return (f"What each method costs (MB = 10^6 bytes):\n\n{markdown.table(costs(result))}\n\n"
            "What it gives (losses in nats per character, on text kept out of all training):\n\n"
            + markdown.table(gains(result), left=(0, len(GAINS) - 1)))
