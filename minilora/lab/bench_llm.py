"""`minilora bench --llm`: LoRA on a language model, its time and memory, compared with PyTorch's.

A row of a batch has 64 tokens, of which the last 16 are the answer: the head and the loss are
computed there only, on both sides. The steps that are compared take turns, as in `bench`, and a
ratio is the median of the ratios of each turn. Memory is that of a process which does nothing else.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from minilora.data.answers import answer_loss
from minilora.files.checkpoint import load_base
from minilora.files.gguf_llama import find_smollm2
from minilora.lab import markdown
from minilora.lab.bench import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    Step,
    need_peers,
    seconds_in_turn,
    use_torch_threads,
)
from minilora.lora.wrap import replace_linear_with_lora
from minilora.nn.functional import IGNORE_INDEX
from minilora.nn.llama import Llama
from minilora.train.optim import AdamW
from minilora.train.parallel import DataParallel, keep_freed_memory, usable_cores

ROW, ANSWER = 64, 16  # tokens
TOKENS = 128, 256, 512  # of a batch
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FOUR_BIT, RECOMPUTE, FLOAT32, PYTORCH = "4-bit", "4-bit, recompute", "float32", "PyTorch float32"
STEPS_ALONE = 3
ALONE = "import sys; from minilora.lab.bench_llm import print_alone; print_alone(*sys.argv[1:])"


def random_rows(vocab_size: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ids and targets, (tokens / ROW, ROW); targets are only at the last ANSWER places."""
    rng, shape = np.random.default_rng(0), (tokens // ROW, ROW)
    ids, targets = rng.integers(0, vocab_size, shape), rng.integers(0, vocab_size, shape)
    targets[:, :-ANSWER] = IGNORE_INDEX
    return ids, targets


def load(kind: str, base: str) -> Any:
    """Return a model with LoRA; PyTorch's has the sizes of the base, but random weights."""
    model = load_base(base, quantized=kind != FLOAT32)
    if not isinstance(model, Llama):
        raise ValueError(f"{base!r} is no Llama, but a {type(model).__name__}")
    if kind == PYTORCH:
        from minilora.lab import torch_peer

        peer = torch_peer.random_llama(model.config)
        return torch_peer.add_peft_lora(peer, RANK, ALPHA, PROJECTIONS)
    model.recompute = kind == RECOMPUTE
    return replace_linear_with_lora(model, RANK, ALPHA, PROJECTIONS, rng=0)


def step_of(
    model: Any, rows: tuple[np.ndarray, np.ndarray], threads: int, resources: ExitStack
) -> Step:
    """Return a function that does one whole training step: forward, backward, AdamW."""
    if not isinstance(model, Llama):
        from minilora.lab import torch_peer

        use_torch_threads(threads)
        return torch_peer.answer_step(model, *rows, LEARNING_RATE)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    parallel = resources.enter_context(DataParallel(model, threads, answer_loss))

    def step() -> float:
        loss = parallel.loss_and_gradients(*rows)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def report(
    peers: bool = False, seconds: float = 6.0, base: str = "smollm2",
    tokens: tuple[int, ...] = TOKENS,
) -> str:
    """Measure LoRA r=8 on the seven projections of each layer, and return two Markdown tables.

    Parameters
    ----------
    peers : bool
        Whether to measure PyTorch with PEFT as well, and show ratios; below 1, minilora is better.
    seconds : float
        Time for each row; each step is done at least five times.
    base : str
        "smollm2", or the path of a GGUF file.
    tokens : tuple of int
        The tokens of a batch, multiples of ROW.

    Raises
    ------
    FileNotFoundError, ImportError
        If the model, or with `peers` torch or peft, is not installed.
    OSError
        If a process whose memory is measured fails.
    """
    if base == "smollm2":
        find_smollm2()  # for its error
    if peers:
        need_peers()
    # First: on Linux, a process begins with the peak of the one that starts it.
    memory = _memory_table(peers, base, max(tokens))
    kinds = [FOUR_BIT, FLOAT32, *([PYTORCH] if peers else [])]
    keep_freed_memory()  # as `fit` does
    models = {kind: load(kind, base) for kind in kinds}
    compared = list(itertools.combinations(kinds, 2))
    head = ["threads", "tokens", *(f"{kind}, ms" for kind in kinds),
            *(f"{a} / {b}" for a, b in compared)]
    lines = [markdown.line(head), "|---:" * len(head) + "|"]
    for threads in (1, 2)[: usable_cores()]:
        for count in tokens:
            times = _times(models, count, threads, seconds)
            cells = [f"{1e3 * statistics.median(times[kind]):.0f}" for kind in kinds]
            cells += [f"{_ratio(times[a], times[b]):.2f}" for a, b in compared]
            lines.append(markdown.line([str(threads), str(count), *cells]))
    return "\n".join([*lines, "", *memory, "", (
        f"A step of LoRA r={RANK} on all projections, in rows of {ROW} tokens with the loss on the "
        f"last {ANSWER}. Times are medians of steps that take turns, ratios medians of each turn's "
        f"ratio. Memory: the peak of a process that does {STEPS_ALONE} steps; MB = 10^6 bytes.")])


def _times(
    models: dict[str, Any], tokens: int, threads: int, seconds: float
) -> dict[str, list[float]]:
    """Time the models in turn, and return the seconds that each of their steps took."""
    with ExitStack() as resources:
        steps = []
        for model in models.values():
            vocab_size = model.config.vocab_size
            steps.append(step_of(model, random_rows(vocab_size, tokens), threads, resources))
        return dict(zip(models, seconds_in_turn(steps, seconds, warm_up=1), strict=True))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of each turn: what slows the machine slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# ---- Memory, and the time to load


def _memory_table(peers: bool, base: str, tokens: int) -> list[str]:
    """Return the lines of the table of memory, none where Python has no `resource` (Windows)."""
    if importlib.util.find_spec("resource") is None:
        return []
    kinds = [FOUR_BIT, RECOMPUTE, FLOAT32, *([PYTORCH] if peers else [])]
    found = {kind: measure_alone(kind, base, tokens) for kind in kinds}
    head = [f"alone, one thread, {tokens} tokens", "to load, s", "peak, MB"]
    head += [f"peak / {PYTORCH}"] if peers else []
    lines = [markdown.line(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for kind, (seconds, peak) in found.items():
        loading = "–" if kind == PYTORCH else f"{seconds:.2f}"  # it has no file to load
        ratio = [f"{peak / found[PYTORCH][1]:.2f}"] if peers else []
        lines.append(markdown.line([kind, loading, f"{peak / 1e6:.0f}", *ratio]))
    return lines


def measure_alone(kind: str, base: str, tokens: int) -> tuple[float, int]:
    """Return the seconds that loading takes and the peak of memory in bytes, of a new process."""
    command = [sys.executable, "-c", ALONE, kind, base, str(tokens)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise OSError(f"the process that should measure {kind} failed: {reason}")
    seconds, peak = json.loads(run.stdout.splitlines()[-1])
    return seconds, peak


def print_alone(kind: str, base: str, tokens: str) -> None:
    """Load a model, do a few steps, and print what `measure_alone` returns."""
    import resource

    if kind != PYTORCH:
        keep_freed_memory()
    start = time.perf_counter()
    model = load(kind, base)
    seconds = time.perf_counter() - start
    with ExitStack() as resources:
        step = step_of(model, random_rows(model.config.vocab_size, int(tokens)), 1, resources)
        for _ in range(STEPS_ALONE):
            step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, peak if sys.platform == "darwin" else 1024 * peak]))
