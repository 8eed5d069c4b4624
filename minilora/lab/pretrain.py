"""Train the base models that the package ships: `minilora pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.data.batches import random_batches, sequential_batches
from minilora.data.corpus import load_tokens
from minilora.data.tokenizer import CharTokenizer
from minilora.files.checkpoint import save_checkpoint
from minilora.files.safetensors import check_writable
from minilora.nn.gpt import GPT, GPTConfig
from minilora.train.history import History
from minilora.train.loop import fit
from minilora.train.optim import AdamW
from minilora.train.schedule import cosine_schedule


@dataclass(frozen=True)
class Recipe:
    """How a base model is made: its sizes, and the run that trains it on the docs corpus.

    Attributes
    ----------
    learning_rate : float
        The peak, reached after `warmup` steps; cosine decay to a twentieth follows.
    weight_decay : float
        Applied to matrices, not to biases and norms.
    clip_norm : float
        Bound on the global gradient norm.
    """

    config: GPTConfig
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0


def _config(context_length: int, d_model: int, n_layers: int, n_heads: int) -> GPTConfig:
    """Return the configuration of a model for characters, with tied weights."""
    vocab_size = CharTokenizer.vocab_size
    return GPTConfig(vocab_size, context_length, d_model, n_layers, n_heads, tie_weights=True)


RECIPES = {
    "base": Recipe(_config(128, 128, 4, 4), steps=3000, batch_size=16, learning_rate=3e-3),
    "small": Recipe(_config(64, 64, 2, 4), steps=3000, batch_size=32, learning_rate=5e-3),
}


def pretrain(
    name: str, out: str | Path, steps: int | None = None, seed: int = 0,
    threads: int | None = None, progress: bool = True,
) -> History:
    """Train the base model `name` on the docs corpus and write it to `out` in float16.

    Ctrl-C ends the training early. The model is then written to `out` + ".interrupted", so that
    it never replaces a complete one.

    Parameters
    ----------
    name : str
        A key of `RECIPES`.
    out : str or Path
        The checkpoint to write.
    steps : int, optional
        Training steps; None: the recipe's.
    seed : int
        Seed of weights and batches.
    threads : int, optional
        Threads that share each batch; None: as many as pay off.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If there is no recipe for `name`.
    IsADirectoryError
        If `out` is a directory.
    """
    if name not in RECIPES:
        raise ValueError(f"there is a recipe for {', '.join(RECIPES)}; got {name!r}")
    check_writable(out)  # found now rather than after training
    recipe = RECIPES[name]
    model = GPT(recipe.config, rng=seed)
    steps = recipe.steps if steps is None else steps
    history = _train(model, recipe, steps, seed, threads, progress, f"pretrain {name}")
    if history.steps:
        path = f"{out}.interrupted" if history.interrupted else out
        save_checkpoint(model, path, np.float16)
    return history


def _train(
    model: GPT, recipe: Recipe, steps: int, seed: int, threads: int | None, progress: bool,
    description: str,
) -> History:
    """Train a new model by its recipe."""
    training, held_out = load_tokens("docs")
    length = recipe.config.context_length
    return fit(
        model,
        random_batches(training, recipe.batch_size, length, rng=seed),
        _optimizer(model, recipe),
        steps,
        schedule=cosine_schedule(recipe.learning_rate, steps, min(recipe.warmup, steps - 1), 0.05),
        clip_norm=recipe.clip_norm,
        validation=sequential_batches(held_out, 32, length),
        validate_every=500,
        threads=threads,
        progress=progress,
        description=description,
    )


def _optimizer(model: GPT, recipe: Recipe) -> AdamW:
    """Return AdamW that decays the matrices and, as usual, leaves biases and norms alone."""
    matrices = [p for p in model.parameters() if p.data.ndim == 2]
    vectors = [p for p in model.parameters() if p.data.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)
