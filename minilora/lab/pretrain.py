"""Training the base models that the package ships: `minilora pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.data.corpus import CharTokenizer, load_tokens, random_batches, sequential_batches
from minilora.files.checkpoint import save_checkpoint
from minilora.nn.gpt import GPT, GPTConfig
from minilora.train.loop import History, fit
from minilora.train.optim import AdamW, cosine_schedule


@dataclass(frozen=True)
class Recipe:
    """How a base model is made: its sizes and the run that trains it on the docs corpus."""

    config: GPTConfig
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0


def _config(context_length: int, d_model: int, n_layers: int, n_heads: int) -> GPTConfig:
    vocab_size = CharTokenizer.vocab_size
    return GPTConfig(vocab_size, context_length, d_model, n_layers, n_heads, tie_weights=True)


RECIPES = {
    "base": Recipe(_config(128, 128, 4, 4), steps=3000, batch_size=16, learning_rate=3e-3),
    "small": Recipe(_config(64, 64, 2, 4), steps=3000, batch_size=32, learning_rate=5e-3),
}


def pretrain(
    name: str, out: str | Path, steps: int | None = None, seed: int = 0, threads: int = 1,
    progress: bool = True,
) -> History:
    """Train the base model `name` on the docs corpus and write it to `out` in float16.

    Ctrl-C writes what there is so far to `out` + ".interrupted", so that it never takes the place
    of a whole model. ValueError for a name that has no recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"there is a recipe for {', '.join(RECIPES)}; got {name!r}")
    if Path(out).is_dir():  # better now than after the training
        raise IsADirectoryError(f"{out} is a directory, not a file to write")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[name]
    steps = recipe.steps if steps is None else steps
    model = GPT(recipe.config, rng=seed)
    training, held_out = load_tokens("docs")
    length = recipe.config.context_length
    # As usual, decay the matrices and leave biases and layer norms alone.
    matrices = [p for p in model.parameters() if p.data.ndim == 2]
    vectors = [p for p in model.parameters() if p.data.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)
    history = fit(
        model,
        random_batches(training, recipe.batch_size, length, rng=seed),
        optimizer,
        steps,
        schedule=cosine_schedule(recipe.learning_rate, steps, min(recipe.warmup, steps - 1), 0.05),
        clip_norm=recipe.clip_norm,
        validation=sequential_batches(held_out, 32, length),
        validate_every=500,
        threads=threads,
        progress=progress,
        description=f"pretrain {name}",
    )
    if history.steps:
        path = f"{out}.interrupted" if history.interrupted else out
        save_checkpoint(model, path, np.float16)
    return history
