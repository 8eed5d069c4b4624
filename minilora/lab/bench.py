"""`minilora bench`: milliseconds per training step, compared with PyTorch's.

Other programs may share the machine, so the steps that are compared take turns, and the ratios are
ratios of medians. Everything runs on one thread; importing minilora limits BLAS to one.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.lab import markdown
from minilora.lab.counting import training_flops
from minilora.lora.wrap import replace_linear_with_lora
from minilora.nn.functional import cross_entropy
from minilora.nn.gpt import GPT, GPTConfig
from minilora.train.optim import AdamW
from minilora.train.parallel import keep_freed_memory

VOCAB_SIZE, RANK, ALPHA, LEARNING_RATE = 96, 8, 16, 1e-3
SIZES = {  # d_model, n_layers, n_heads, context_length, batch
    "XS": (32, 2, 2, 32, 16),
    "S": (64, 2, 2, 64, 32),
    "M": (128, 4, 4, 128, 16),
    "L": (256, 6, 8, 128, 8),
}
Step = Callable[[], Any]


def config_and_batch(size: str) -> tuple[GPTConfig, int]:
    """Return the configuration and the batch size of "XS", "S", "M" or "L"."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    d_model, n_layers, n_heads, context_length, batch = SIZES[size]
    return GPTConfig(VOCAB_SIZE, context_length, d_model, n_layers, n_heads), batch


def random_batch(config: GPTConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw ids and targets, (batch, context_length); their values do not affect the times."""
    shape = batch, config.context_length + 1
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    return tokens[:, :-1], tokens[:, 1:]


def minilora_step(size: str, lora: bool) -> Step:
    """Return a function that does one whole training step: forward, backward, AdamW."""
    config, batch = config_and_batch(size)
    model = GPT(config)
    if lora:
        replace_linear_with_lora(model, RANK, ALPHA, rng=0)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    ids, targets = random_batch(config, batch)

    def step() -> None:
        _, dlogits = cross_entropy(model(ids), targets)
        model.backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_step(size: str, lora: bool) -> Step:
    """Return the same step in eager PyTorch: SDPA attention, fused AdamW, PEFT for LoRA."""
    import torch  # pyright: ignore[reportMissingImports]

    from minilora.lab import torch_peer

    config, batch = config_and_batch(size)
    model = torch_peer.TorchGPT(config)
    if lora:
        model = torch_peer.add_peft_lora(model, RANK, ALPHA)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    ids, targets = (torch.from_numpy(a.copy()) for a in random_batch(config, batch))

    def step() -> None:
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_in_turn(
    steps: list[Step], seconds: float = 4.0, warm_up: int = 3
) -> list[list[float]]:
    """Run the steps in turn for about `seconds`, and at least five times, after a warm-up.

    Returns
    -------
    list of list of float
        The times of each step, in seconds.
    """
    for step in steps:
        for _ in range(warm_up):
            step()
    times: list[list[float]] = [[] for _ in steps]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 5:
        for step, record in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            record.append(time.perf_counter() - start)
    return times


def median_ms(steps: list[Step], seconds: float = 4.0) -> list[float]:
    """Return the median time of each step, in milliseconds; see `seconds_in_turn`."""
    return [1e3 * statistics.median(record) for record in seconds_in_turn(steps, seconds)]


def sgemm_gflops() -> float:
    """Return the best rate of a float32 product of 1024 x 1024 matrices, in 1e9 FLOP/s."""
    a = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        np.matmul(a, a)
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times) / 1e9


def report(sizes: tuple[str, ...], peers: bool = False, seconds: float = 6.0) -> str:
    """Time full and LoRA r=8 steps on one thread, and return a Markdown table.

    Parameters
    ----------
    sizes : tuple of str
        Keys of `SIZES`.
    peers : bool
        Whether to time PyTorch's steps in turn with minilora's, and show the ratio of the times;
        below 1, minilora is faster.
    seconds : float
        Time for each row.

    Raises
    ------
    ValueError
        If a size is unknown.
    ImportError
        If `peers` is set and torch or peft is not installed.
    """
    for size in sizes:
        config_and_batch(size)
    if peers:
        need_peers()
        use_torch_threads(1)
    keep_freed_memory()  # as `fit` does
    peak = sgemm_gflops()
    head = ["size", "method", "ms/step", "of sgemm peak"]
    head += ["PyTorch ms/step", "ratio"] if peers else []
    lines = [markdown.line(head), "|---|---" + "|---:" * (len(head) - 2) + "|"]
    for size in sizes:
        for lora in (False, True):
            lines.append(markdown.line(_cells(size, lora, peers, seconds, peak)))
    lines.append(f"\nOne thread; sgemm peak here: {peak:.0f} GFLOP/s (a 1024 x 1024 product).")
    return "\n".join(lines)


def _cells(size: str, lora: bool, peers: bool, seconds: float, peak: float) -> list[str]:
    """Time one row of the table and return its cells; `peak` is in 1e9 FLOP/s."""
    steps = [minilora_step(size, lora)] + ([torch_step(size, lora)] if peers else [])
    medians = median_ms(steps, seconds)
    config, batch = config_and_batch(size)
    flops = training_flops(config, batch, RANK if lora else None)
    cells = [size, f"LoRA r={RANK}" if lora else "full", f"{medians[0]:.2f}",
             f"{flops / (medians[0] * 1e6) / peak:.0%}"]
    if peers:
        cells += [f"{medians[1]:.2f}", f"{medians[0] / medians[1]:.2f}"]
    return cells


def need_peers() -> None:
    """Raise an ImportError that says what to install if a peer is missing."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"--peers needs torch and peft (no {', no '.join(missing)} here): "
                          "pip install torch==2.13.0 peft")


def use_torch_threads(threads: int) -> None:
    """Limit PyTorch to so many threads."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
