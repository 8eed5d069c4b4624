"""The demonstration: a language model with its weights in 4 bits learns a task in minutes.

If only the upper layers are adapted, what enters the lowest of them never changes. It is computed
once for each example, and training starts from there.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.answers import (
    answer_loss,
    example,
    pad,
    padded_batches,
    shuffled_batches,
)
from minilora.data.bpe import BPETokenizer
from minilora.data.generate import TOGETHER, answer_prompts
from minilora.files.peft_write import save_adapter
from minilora.files.safetensors import check_writable, write_atomically
from minilora.files.together import results
from minilora.lab import markdown, plots
from minilora.lab.tasks import TASKS, Pair, Task
from minilora.lora.qlora import stored_bytes
from minilora.lora.wrap import remove_lora, replace_linear_with_lora
from minilora.nn.llama import Llama
from minilora.train.history import History
from minilora.train.loop import fit
from minilora.train.mode import evaluating
from minilora.train.optim import AdamW
from minilora.train.parallel import threads_that_pay
from minilora.train.schedule import cosine_schedule

Example = tuple[np.ndarray, np.ndarray]
ANSWER = 48  # tokens that an answer may have
RESULT, CURVE = "teach.json", "loss.png"
UNIT = "nats per token of the answers"
SHOWN = 3  # held-out prompts of each kind that the command prints


@dataclass(frozen=True)
class Lesson:
    """How a task is taught.

    Attributes
    ----------
    rank : int
    alpha : float
    projections : tuple of str
        Names or globs of the layers to adapt, within each block.
    upper : int
        Adapt only this many of the uppermost blocks; 0 for all.
    steps, batch_size, seed : int
    learning_rate : float
    """

    rank: int = 8
    alpha: float = 16.0
    projections: tuple[str, ...] = ("*_proj",)
    upper: int = 10
    steps: int = 70
    learning_rate: float = 2e-3
    batch_size: int = 8
    seed: int = 0


WHOLE = Lesson(upper=0, steps=50, learning_rate=1e-3)  # all blocks, with fewer steps
STUDY = {
    "as usual": Lesson(), "seed 1": Lesson(seed=1), "seed 2": Lesson(seed=2),
    "rank 1": Lesson(rank=1, alpha=2.0), "rank 32": Lesson(rank=32, alpha=64.0),
    "q and v only": Lesson(projections=("q_proj", "v_proj")),
    "MLP only": Lesson(projections=("gate_proj", "up_proj", "down_proj")),
    "5 blocks": Lesson(upper=5), "20 steps": Lesson(steps=20), "140 steps": Lesson(steps=140),
    "all 30 blocks": WHOLE,
}


@dataclass
class Outcome:
    """The result of a lesson.

    Attributes
    ----------
    history : History
        Its validation losses are on the held-out pairs, in nats per token of the answers.
    answers : dict of list of str
        {kind of held-out pair: what the model answers}.
    trained : int
        Numbers in A and B.
    seconds : float
        From adding LoRA to the last answer, with the states that are computed once.
    """

    history: History
    answers: dict[str, list[str]]
    trained: int
    seconds: float


def adapt(model: Llama, lesson: Lesson) -> int:
    """Add LoRA to a model as a lesson says, and return the first layer that has it."""
    layers = model.config.n_layers
    if not 0 <= lesson.upper <= layers:
        raise ValueError(f"the model has {layers} blocks: it has no upper {lesson.upper}")
    first = layers - lesson.upper if lesson.upper else 0
    targets = [f"model.layers.{i}.*.{name}" for i in range(first, layers)
               for name in lesson.projections]
    replace_linear_with_lora(model, lesson.rank, lesson.alpha, targets, rng=lesson.seed)
    return first


def examples(tokenizer: BPETokenizer, pairs: Sequence[Pair]) -> list[Example]:
    """Return (ids, targets) for each pair: the prompt as a chat, and its answer."""
    return [example(tokenizer.chat(prompt, system=None), tokenizer.answer(answer))
            for prompt, answer in pairs]


def states(model: Llama, given: Sequence[Example], first: int, threads: int) -> list[Example]:
    """Replace the ids of examples by what enters layer `first`; unchanged for layer 0."""
    if first == 0:
        return list(given)
    parts = [given[i : i + TOGETHER] for i in range(0, len(given), TOGETHER)]

    def run(part: Sequence[Example]) -> list[Example]:
        x = model.states(pad(part)[0], first)
        return [(row[: len(targets)].copy(), targets)
                for row, (_, targets) in zip(x, part, strict=True)]

    with evaluating(model), ThreadPoolExecutor(threads) as pool:
        return [row for rows in pool.map(run, parts) for row in rows]


def teach(
    model: Llama, tokenizer: BPETokenizer, task: Task, lesson: Lesson,
    threads: int | None = None, progress: bool = True, validate_every: int = 10,
) -> Outcome:
    """Adapt a model to a task, and return the record and the answers to held-out prompts.

    Parameters
    ----------
    model : Llama
        A base without LoRA layers. It has the adapter afterwards.
    tokenizer : BPETokenizer
    task : Task
    lesson : Lesson
    threads : int, optional
        Threads that share the work; None for as many as pay off.
    progress : bool
        Whether to show a progress bar.
    validate_every : int
        Steps between two evaluations on the held-out pairs.

    Raises
    ------
    TypeError
        If the model is not a Llama.
    KeyboardInterrupt
        If Ctrl-C ended the training.
    """
    if not isinstance(model, Llama):
        raise TypeError(f"a lesson needs a language model, such as smollm2, not a "
                        f"{type(model).__name__}")
    start, first = time.perf_counter(), adapt(model, lesson)
    training, held_out = examples(tokenizer, task.training), [
        row for pairs in task.held_out.values() for row in examples(tokenizer, pairs)]
    threads = threads or threads_that_pay(model, [pad(training[: lesson.batch_size])])
    training, held_out = (states(model, rows, first, threads) for rows in (training, held_out))
    trained = [p for p in model.parameters() if p.requires_grad]
    lr, steps = lesson.learning_rate, lesson.steps
    schedule = cosine_schedule(lr, steps, warmup=min(steps - 1, max(1, steps // 20)))
    history = fit(
        model, shuffled_batches(training, lesson.batch_size, lesson.seed),
        AdamW(trained, lr, weight_decay=0.0), steps, schedule, clip_norm=1.0,
        validation=padded_batches(held_out, TOGETHER), validate_every=validate_every,
        threads=threads, progress=progress, loss=functools.partial(answer_loss, first=first),
    )
    if history.interrupted:
        raise KeyboardInterrupt
    given = {name: answers(model, tokenizer, [prompt for prompt, _ in pairs])
             for name, pairs in task.held_out.items()}
    return Outcome(history, given, sum(p.size for p in trained), time.perf_counter() - start)


def answers(
    model: Llama, tokenizer: BPETokenizer, prompts: Sequence[str], instruction: str | None = None,
    shots: Sequence[Pair] = (), max_new_tokens: int = ANSWER,
) -> list[str]:
    """Return what the model answers, taking the likeliest token each time.

    Parameters
    ----------
    model : Llama
    tokenizer : BPETokenizer
    prompts : sequence of str
    instruction : str, optional
        The system message.
    shots : sequence of Pair
        Examples that come before each prompt, as if they had been said earlier.
    max_new_tokens : int
    """
    earlier = [{"role": role, "content": text} for pair in shots
               for role, text in zip(("user", "assistant"), pair, strict=True)]
    ids = [tokenizer.chat([*earlier, {"role": "user", "content": prompt}], system=instruction)
           for prompt in prompts]
    return answer_prompts(model, tokenizer, ids, max_new_tokens)


def exact(given: Sequence[str], pairs: Sequence[Pair]) -> int:
    """Count the answers that are exactly right, up to spaces."""
    return sum(re.sub(r"\s+", " ", answer) == right
               for answer, (_, right) in zip(given, pairs, strict=True))


def row(name: str, lesson: Lesson, outcome: Outcome, task: Task) -> dict[str, Any]:
    """Return the result of a lesson as numbers and texts, for a file."""
    history = outcome.history
    return {
        "name": name, "lesson": asdict(lesson), "trained": outcome.trained,
        "losses": history.losses, "validation_steps": history.validation_steps,
        "validation_losses": history.validation_losses, "seconds": outcome.seconds,
        "answers": [[kind, prompt, right, given]
                    for kind, pairs in task.held_out.items()
                    for (prompt, right), given in zip(pairs, outcome.answers[kind], strict=True)],
        "exact": {kind: [exact(outcome.answers[kind], pairs), len(pairs)]
                  for kind, pairs in task.held_out.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table with a line for each lesson, in Markdown."""
    kinds = list(rows[0]["exact"])
    lines = [["lesson", "trained", "adapter", "held-out loss", *kinds, "seconds"]]
    for given in rows:
        before, after = given["validation_losses"][0], given["validation_losses"][-1]
        right = ["{} of {}".format(*given["exact"][kind]) for kind in kinds]
        lines.append([given["name"], f"{given['trained']:,}", f"{4e-6 * given['trained']:.1f} MB",
                      f"{before:.2f} to {after:.3f}", *right, f"{given['seconds']:.0f}"])
    return markdown.table(lines)


# ---- The command


def demonstrate(
    model: Llama, tokenizer: Any, name: str, lesson: Lesson, out: str,
    threads: int | None = None, progress: bool = True,
) -> None:
    """Teach a task and print what the model answers before, with the adapter, and without it.

    Writes the adapter, the loss curve and all answers to the folder `out`.
    """
    adapt(model, lesson)  # find every mistake before the training, and before making a folder
    remove_lora(model)
    for file in (RESULT, CURVE):
        check_writable(Path(out) / file)
    task = TASKS[name]()
    prompts = [prompt for pairs in task.held_out.values() for prompt, _ in pairs[:SHOWN]]
    before = answers(model, tokenizer, prompts)
    outcome = teach(model, tokenizer, task, lesson, threads, progress)
    record = row(name, lesson, outcome, task)
    with results(Path(out), RESULT) as folder:
        save_adapter(model, folder / "adapter", held_out_loss=outcome.history.validation_losses[-1])
        size = sum(path.stat().st_size for path in (folder / "adapter").iterdir())
        plots.save(plots.loss_curve(outcome.history, UNIT), folder / CURVE)
        write_atomically(folder / RESULT, json.dumps({"rows": [record]}, indent=1).encode())
    after = [given for kind in outcome.answers.values() for given in kind[:SHOWN]]
    remove_lora(model)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n    before: {old[:100]!r}\n    after:  {new!r}")
    print(f"\n{table([record])}\n")
    wrong = [(prompt, right, given) for _, prompt, right, given in record["answers"]
             if task.exact and right != given]
    for prompt, right, given in wrong:
        print(f"{prompt}\n    wanted: {right}\n    got:    {given}")
    print(f"the adapter takes {size:,} bytes, the model {stored_bytes(model):,}")
    same = answers(model, tokenizer, prompts) == before
    print(f"without the adapter, the answers are {'' if same else 'NOT '}those from before")
    print(f"Written to {out}: adapter/, {CURVE}, {RESULT}")


def study(
    model: Llama, tokenizer: Any, name: str, out: str,
    threads: int | None = None, progress: bool = True,
) -> None:
    """Teach the lessons of STUDY one after another; write their results to the folder `out`.

    If Ctrl-C or an error ends it early, those of the lessons that are complete are written.
    """
    check_writable(Path(out) / RESULT)
    task, rows = TASKS[name](), []
    try:
        for title, lesson in STUDY.items():
            outcome = teach(model, tokenizer, task, lesson, threads, progress)
            rows.append(row(title, lesson, outcome, task))
            remove_lora(model)
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        if rows:
            print(f"\n{table(rows)}")
            write_atomically(Path(out) / RESULT, json.dumps({"rows": rows}, indent=1).encode())
