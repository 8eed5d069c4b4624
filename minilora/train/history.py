"""The record of a training run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from minilora.nn.module import Module
from minilora.train.optim import Optimizer
from minilora.train.parallel import Batch, DataParallel


@dataclass
class History:
    """The record of a run. Losses are in nats per token, seconds since its start.

    Attributes
    ----------
    steps, losses, learning_rates, seconds : one entry for each training step
    validation_steps, validation_losses : one entry for each evaluation; step 0 is before the
        first update
    bytes : {"gradients": int, "optimizer": int}, what training held
    interrupted : True if Ctrl-C ended the run early
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self._start = time.perf_counter() - (self.seconds[-1] if self.seconds else 0.0)

    def add(self, step: int, loss: float, learning_rate: float) -> None:
        """Record a training step."""
        self.steps.append(step)
        self.losses.append(loss)
        self.learning_rates.append(learning_rate)
        self.seconds.append(time.perf_counter() - self._start)

    def validate(self, step: int, parallel: DataParallel, batches: list[Batch] | None) -> None:
        """Evaluate and record the loss, unless `batches` is None or this step has one."""
        if batches is not None and step not in self.validation_steps:
            loss = parallel.mean_loss(batches)
            self.validation_steps.append(step)
            self.validation_losses.append(loss)


def training_bytes(model: Module, optimizer: Optimizer) -> dict[str, int]:
    """Count the bytes of the gradients and of the optimizer's moments that exist now."""
    return {
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": optimizer.state_bytes,
    }
