"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from minilora.nn.module import Module
from minilora.nn.validate import check_sizes
from minilora.train.history import History, training_bytes
from minilora.train.mode import check_trainable, training
from minilora.train.optim import Optimizer
from minilora.train.parallel import Batch, DataParallel, Loss, keep_freed_memory
from minilora.train.progress import Bar
from minilora.train.schedule import clip_grad_norm


def evaluate(
    model: Module, batches: Iterable[Batch], threads: int | None = None, loss: Loss | None = None
) -> float:
    """Return the mean loss in nats over all targets of the batches, with dropout off.

    Batches are pairs (ids, targets), both (B, T). Raises ValueError if there are none.
    """
    with DataParallel(model, threads, loss) as parallel:
        return parallel.mean_loss(list(batches))


def training_steps(
    parallel: DataParallel, batches: Iterable[Batch], optimizer: Optimizer, steps: range,
    schedule: Callable[[int], float] | None, clip_norm: float | None,
) -> Iterator[tuple[int, float, int]]:
    """Train: yield (step, loss, tokens of its batch) after each update."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step, (ids, targets) in zip(steps, batches, strict=False):
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
        parallel.models[0].zero_grad()  # even those that the optimizer lacks
        loss = parallel.loss_and_gradients(ids, targets)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {step} with learning rate "
                                     f"{optimizer.param_groups[0]['lr']:g}; try a lower one")
        if clip_norm is not None:
            clip_grad_norm(trained, clip_norm)
        optimizer.step()
        yield step, loss, np.size(targets)


def fit(
    model: Module, batches: Iterable[Batch], optimizer: Optimizer, steps: int,
    schedule: Callable[[int], float] | None = None, clip_norm: float | None = None,
    validation: Iterable[Batch] | None = None, validate_every: int = 100,
    threads: int | None = None, progress: bool = True, description: str = "",
    loss: Loss | None = None, history: History | None = None,
    after_step: Callable[[History], None] | None = None,
) -> History:
    """Train for `steps` batches and return the record. Ctrl-C ends the run early.

    Parameters
    ----------
    batches : iterable of (ids, targets), both (B, T); the run ends early if it has too few
    schedule : step -> learning rate, set in every parameter group; None keeps their own
    clip_norm : bound on the global gradient norm; None for no clipping
    validation : batches to evaluate before training, every `validate_every` steps, and at the end
    threads : number that share each batch; None for as many as pay off, see `parallel`
    loss : (model, ids, targets) -> loss, dlogits; None for the cross-entropy of the next token
    history : the record of a run to go on with; its steps are among `steps`, its batches are not
    after_step : called with the record after each step; KeyboardInterrupt from it ends the run

    Raises
    ------
    ValueError : if nothing is trainable, or the optimizer holds no trainable parameter
    RuntimeError : if the model is being trained already
    FloatingPointError : if the loss is not finite; the weights are those before that step
    """
    check_trainable(model, optimizer)
    check_sizes("fit", steps=steps, validate_every=validate_every)
    history, held_out = history or History(), None if validation is None else list(validation)
    history.interrupted, start = False, len(history.steps)
    keep_freed_memory()
    with (training(model), Bar(start, steps, description, progress) as bar,
          DataParallel(model, threads, loss) as parallel):
        try:
            history.validate(0, parallel, None if start else held_out)
            for step, value, tokens in training_steps(parallel, batches, optimizer,
                                                      range(start, steps), schedule, clip_norm):
                history.add(step, value, optimizer.param_groups[0]["lr"])
                bar.update(value, tokens)
                if (step + 1) % validate_every == 0 and step + 1 < steps:
                    history.validate(step + 1, parallel, held_out)
                if after_step is not None:
                    after_step(history)
            history.validate(len(history.steps), parallel, held_out)
        except KeyboardInterrupt:
            history.interrupted = True
    history.bytes = training_bytes(model, optimizer)
    model.zero_grad()
    return history
