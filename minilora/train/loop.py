"""The one training loop, and the record it keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from minilora.files.checkpoint import write_atomically
from minilora.nn.module import Module
from minilora.nn.validate import check_sizes
from minilora.train.optim import Optimizer, clip_grad_norm
from minilora.train.parallel import DataParallel, keep_freed_memory

Batch = tuple[np.ndarray, np.ndarray]


@dataclass
class History:
    """What happened in a run. Losses are in nats per token, seconds run from its start.

    steps, losses, learning_rates, seconds   one entry for each training step
    validation_steps, validation_losses      one entry for each evaluation; step 0 is before
                                             the first update
    bytes                                    {"gradients", "optimizer"}: what training held
    interrupted                              True where Ctrl-C ended the run early
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False

    def save(self, path: str | Path) -> None:
        """Write JSON, replacing the file only once it is whole."""
        write_atomically(path, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what `save` wrote. ValueError that names the file where it is something else."""
        try:
            values = json.loads(Path(path).read_bytes())
            return cls(**values)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a saved History: {error}") from None


def evaluate(model: Module, batches: Iterable[Batch], threads: int = 1) -> float:
    """Return the mean loss over all targets of the batches, dropout off. ValueError for none."""
    with DataParallel(model, threads) as parallel:
        return parallel.mean_loss(list(batches))


def fit(
    model: Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    validation: Iterable[Batch] | None = None,
    validate_every: int = 100,
    threads: int = 1,
    progress: bool = True,
    description: str = "",
) -> History:
    """Train for `steps` batches: forward, backward, clip, update.

    batches      an iterable of (ids, targets); it may be endless, and ends the run where it ends
    schedule     step -> learning rate, set in every parameter group; None keeps their own
    clip_norm    bound on the global gradient norm; None: no clipping
    validation   batches to evaluate before the first step, every `validate_every` steps, and
                 after the last
    threads      how many share each batch; see `parallel`

    Ctrl-C ends the run early and returns what was done. Raises ValueError where steps is
    below 1, nothing is trainable, or the optimizer holds nothing that is (as one made before
    replace_linear_with_lora); FloatingPointError that names step and learning rate
    where the loss is no longer finite: the weights are then those before that step.
    """
    check_sizes("fit", steps=steps, validate_every=validate_every, threads=threads)
    if not model.is_trainable():
        raise ValueError("nothing to train: every parameter of the model is frozen")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    of_model = {id(p) for p in model.parameters()}
    if not any(p.requires_grad and id(p) in of_model for p in trained):
        raise ValueError(
            "the optimizer holds none of the model's trainable parameters: make it after "
            "replace_linear_with_lora, from the parameters that require gradients"
        )
    from tqdm import tqdm  # here, since it is a fifth of the time that importing minilora takes

    validation = None if validation is None else list(validation)
    keep_freed_memory()
    model.train()
    history, start = History(), time.perf_counter()

    def validate(step: int) -> None:
        if validation is not None:
            history.validation_steps.append(step)
            history.validation_losses.append(parallel.mean_loss(validation))

    bar = tqdm(total=steps, desc=description, disable=not progress, leave=False, unit="step")
    with bar, DataParallel(model, threads) as parallel:
        try:
            validate(0)
            for step, (ids, targets) in zip(range(steps), batches, strict=False):
                if schedule is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = schedule(step)
                learning_rate = optimizer.param_groups[0]["lr"]
                model.zero_grad()  # also what the optimizer does not hold
                loss = parallel.loss_and_gradients(ids, targets)
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss became {loss} at step {step} with learning rate "
                        f"{learning_rate:g}; try a lower one"
                    )
                if clip_norm is not None:
                    clip_grad_norm(trained, clip_norm)
                optimizer.step()
                history.steps.append(step)
                history.losses.append(loss)
                history.learning_rates.append(learning_rate)
                history.seconds.append(time.perf_counter() - start)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                if (step + 1) % validate_every == 0 and step + 1 < steps:
                    validate(step + 1)
            if history.steps:
                validate(history.steps[-1] + 1)
        except KeyboardInterrupt:
            history.interrupted = True
    history.bytes = training_bytes(model, optimizer)
    model.zero_grad()
    return history


def training_bytes(model: Module, optimizer: Optimizer) -> dict[str, int]:
    """Count the bytes of the gradients and of the optimizer's moments that exist just now."""
    return {
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": optimizer.state_bytes,
    }
