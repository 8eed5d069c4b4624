"""The main job: full fine-tuning against LoRA, from English docs to Python code.

The shipped base has only read English. Each method fine-tunes it on Python sources with a
learning rate of its own, and everything that LoRA promises is measured on the way.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.corpus import load_tokens, random_batches, sequential_batches
from minilora.files.checkpoint import load_base, save_checkpoint, write_atomically
from minilora.files.peft_read import save_adapter
from minilora.lora.wrap import remove_lora, replace_linear_with_lora
from minilora.nn.gpt import GPT
from minilora.train.loop import Batch, History, evaluate, fit
from minilora.train.optim import AdamW, cosine_schedule

# Each method's own good learning rate, from the sweep in notebook 04.
FULL_LEARNING_RATE, LORA_LEARNING_RATE = 2e-3, 1e-2
BATCH_SIZE, WARMUP = 16, 20
EVALUATION_BATCHES, EVALUATION_BATCH_SIZE = 8, 32


@dataclass(frozen=True)
class Settings:
    """What is compared. alpha None means 2 * rank; lr None each method's own."""

    base: str = "base"
    ranks: tuple[int, ...] = (2, 8)
    steps: int = 300
    lr: float | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    seeds: int = 1
    threads: int = 1


QUICK = Settings(base="small", steps=250)


@dataclass
class Run:
    """One fine-tuning run. Losses in nats per character on held-out text."""

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
    """Token streams and evaluation batches of the two corpora."""

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
    """Load the base, wrap it unless rank is None, and return it with its learning rate."""
    model = load_base(settings.base)
    if rank is None:
        return model, settings.lr or FULL_LEARNING_RATE
    alpha = 2 * rank if settings.alpha is None else settings.alpha
    targets = list(settings.target_modules) if settings.target_modules else None
    replace_linear_with_lora(model, rank, alpha, targets, rng=seed)
    return model, settings.lr or LORA_LEARNING_RATE


def fine_tune(
    model: GPT, data: Data, learning_rate: float, steps: int, seed: int = 0, threads: int = 1,
    progress: bool = False, description: str = "", validate_every: int = 50,
) -> History:
    """Train what is trainable in the model on Python code: AdamW, warm-up, cosine to a tenth."""
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
    """Fine-tune once and measure; a LoRA run leaves its adapter in `folder`."""
    model, learning_rate = prepare(settings, rank, seed)
    trainable = model.num_parameters(trainable_only=True)
    total = model.num_parameters() - (0 if rank is None else trainable)  # of the base
    history = fine_tune(
        model, data, learning_rate, settings.steps, seed, settings.threads, progress,
        method_name(rank), validate_every=max(1, settings.steps // 6),
    )
    if history.interrupted:  # half a run is no result, and must not replace a whole adapter
        raise KeyboardInterrupt
    run = Run(
        method=method_name(rank), rank=rank, seed=seed, learning_rate=learning_rate,
        trainable=trainable, total=total,
        training_bytes=sum(history.bytes.values()), file_bytes=0,
        ms_per_step=1e3 * statistics.median(np.diff([0.0, *history.seconds]).tolist()),
        code_before=history.validation_losses[0], code_after=history.validation_losses[-1],
        docs_after=evaluate(model, data.docs_held_out, settings.threads), docs_removed=None,
        history=history,
    )
    if rank is None:
        with tempfile.TemporaryDirectory() as temporary:
            save_checkpoint(model, Path(temporary) / "model.safetensors")
            run.file_bytes = file_bytes(Path(temporary))
    else:
        adapter = folder / "adapters" / f"r{rank}-seed{seed}"
        save_adapter(model, adapter)
        run.file_bytes = file_bytes(adapter)
        run.docs_removed = evaluate(remove_lora(model), data.docs_held_out, settings.threads)
    return run


def file_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def compare(settings: Settings, out: str | Path, progress: bool = True) -> dict[str, Any]:
    """Run every method with every seed; return the numbers, and write them to out/compare.json.

    Ctrl-C ends the comparison after the runs that are whole. ValueError for bad settings.
    """
    if not settings.ranks or settings.seeds < 1:
        raise ValueError("compare needs at least one rank and one seed")
    if settings.steps < 2:
        raise ValueError(f"steps must be 2 or more, got {settings.steps}")
    for rank in settings.ranks:  # every mistake should show before the first long run
        prepare(settings, rank, seed=0)
    Path(out).mkdir(parents=True, exist_ok=True)
    base = load_base(settings.base)
    data = Data.for_context(base.config.context_length)
    docs_base = evaluate(base, data.docs_held_out, settings.threads)
    runs: list[Run] = []
    with contextlib.suppress(KeyboardInterrupt):
        for seed in range(settings.seeds):
            for rank in (None, *settings.ranks):
                runs.append(run_method(settings, data, rank, seed, Path(out), progress))
    result = {
        "settings": asdict(settings), "docs_base": docs_base, "runs": [asdict(run) for run in runs]
    }
    write_atomically(Path(out) / "compare.json", json.dumps(result).encode())
    return result


# ---- The table

COLUMNS = (
    "method", "trainable", "", "grad+opt", "file", "ms/step", "code before", "code after",
    "of full's gain", "docs after", "docs, adapter removed",
)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the table's cells: one row a method, mean ± standard deviation over seeds."""
    runs, table = result["runs"], []
    full_gain = {
        r["seed"]: r["code_before"] - r["code_after"] or math.nan for r in runs if r["rank"] is None
    }
    for name in dict.fromkeys(run["method"] for run in runs):
        group = [run for run in runs if run["method"] == name]
        first = group[0]
        share = [(r["code_before"] - r["code_after"]) / full_gain[r["seed"]] for r in group]
        removed = [r["docs_removed"] for r in group]
        if first["rank"] is None:
            undone = "cannot be undone"
        elif all(value == result["docs_base"] for value in removed):
            undone = f"{removed[0]:.3f} = base, exactly"
        else:
            undone = f"{_spread(removed)} DIFFERS from the base"
        table.append([
            name, f"{first['trainable']:,}", f"{first['trainable'] / first['total']:.1%}",
            megabytes(first["training_bytes"]), megabytes(first["file_bytes"]),
            f"{statistics.median(r['ms_per_step'] for r in group):.0f}",
            f"{first['code_before']:.3f}", _spread([r["code_after"] for r in group]),
            _spread(share, "{:.0%}"), _spread([r["docs_after"] for r in group]), undone,
        ])
    return table


def _spread(values: list[float], form: str = "{:.3f}") -> str:
    mean = form.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"


def megabytes(count: int) -> str:
    """Return bytes as MB (10^6 bytes) with two decimals."""
    return f"{count / 1e6:.2f} MB"


def table(result: dict[str, Any]) -> str:
    """Return the comparison as a table in Markdown, with the units below."""
    cells = [list(COLUMNS), *rows(result)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(c.ljust(w) if i in (0, 10) else c.rjust(w)
                          for i, (c, w) in enumerate(zip(row, widths, strict=True))) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join(
        "-" * (w + 2) if i in (0, 10) else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    ) + "|")
    return "\n".join(lines)
