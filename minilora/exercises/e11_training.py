"""Exercise 11: choose hyperparameters for a training run on a budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora.data.batches import random_batches, sequential_batches
from minilora.data.corpus import module_source, split
from minilora.data.tokenizer import CharTokenizer, plain
from minilora.exercises.outcome import Passed, failed, run
from minilora.files.checkpoint import load_base
from minilora.lab.compare import LORA_LEARNING_RATE
from minilora.lora.scaling import lora_scale
from minilora.lora.targets import find_targets
from minilora.lora.wrap import replace_linear_with_lora
from minilora.train.loop import evaluate, fit
from minilora.train.optim import AdamW
from minilora.train.schedule import cosine_schedule

NUMBER = 11
# Name of the check: the name that a submission must define.
DEFINED = {"train": "settings"}

BUDGET = 6_000  # trainable parameters
BUDGET_STEPS = 40
BUDGET_GAIN = 0.42  # nats per character
_NAME = "train"


def train_with(settings: dict[str, Any]) -> dict[str, float]:
    """Train the small base on the source of argparse for 40 steps.

    Parameters
    ----------
    settings
        rank, alpha, learning_rate, and target_modules (a list of names, or None for all).

    Returns
    -------
    dict
        "trainable", the number of trainable parameters, and in nats per character on a
        held-out part of the text: "before" and "loss", the loss before and after training,
        and "gain", their difference.
    """
    model = load_base("small")
    replace_linear_with_lora(model, settings["rank"], settings["alpha"],
                             settings.get("target_modules"), rng=0)
    tokenizer = CharTokenizer()
    code, held_out = (tokenizer.encode(t) for t in split(plain(module_source("argparse"))))
    batches = sequential_batches(held_out, 32, 64, limit=2)
    rate = settings["learning_rate"]
    before = evaluate(model, batches, threads=1)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], rate)
    try:
        fit(model, random_batches(code, 16, 64, rng=0), optimizer, BUDGET_STEPS, threads=1,
            schedule=cosine_schedule(rate, BUDGET_STEPS, 5), clip_norm=1.0, progress=False)
        loss = evaluate(model, batches, threads=1)
    except FloatingPointError:
        loss = math.inf
    return {"trainable": model.num_parameters(trainable_only=True), "before": before,
            "loss": loss, "gain": before - loss}


def train(settings: dict[str, Any]) -> Passed:
    """Check exercise 11: settings that stay within the budget and reach the gain asked for.

    Parameters
    ----------
    settings
        rank, alpha, learning_rate, and target_modules (a list of names, or None for all).

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    settings = _checked_settings(settings)
    trainable = _checked_size(settings)
    result = run(_NAME, lambda: train_with(settings))
    if result["gain"] < BUDGET_GAIN:
        why = _advice(settings, trainable, result["gain"])
        raise failed(_NAME, f"A gain of {result['gain']:.3f} nats per character; {BUDGET_GAIN} are "
                     f"asked for. Look: {why}", "notebook 4: learning rates, ranks, placement.")
    return Passed(_NAME, f"{trainable:,} parameters gain {result['gain']:.3f} nats per character.")


def _checked_settings(settings: Any) -> dict[str, Any]:
    """Return the settings with learning_rate as a float, after checking names and types."""
    if settings is None or isinstance(settings, dict) and not settings:
        raise failed(_NAME, "Not implemented yet: choose rank, alpha, learning_rate, "
                     "target_modules.")
    if not isinstance(settings, dict):
        raise failed(_NAME, f"Give a dict of settings, not {type(settings).__name__}.")
    wanted = {"rank", "alpha", "learning_rate", "target_modules"}
    if missing := {"rank", "alpha", "learning_rate"} - set(settings):
        raise failed(_NAME, f"Missing in the settings: {', '.join(sorted(missing))}.")
    if unknown := set(settings) - wanted:
        raise failed(_NAME, f"Unknown settings: {', '.join(sorted(map(str, unknown)))}.")
    rate = settings["learning_rate"]
    if not isinstance(rate, (int, float, np.number)) or not 0 < rate < 10:
        raise failed(_NAME, f"learning_rate should be between 0 and 10, not {rate!r:.80}.")
    return settings | {"learning_rate": float(rate)}


def _checked_size(settings: dict[str, Any]) -> int:
    """Return the number of trainable parameters, after checking that it is within the budget."""
    try:
        lora_scale(settings["rank"], settings["alpha"])
        targets = find_targets(load_base("small"), settings.get("target_modules"))
    except (ValueError, TypeError) as error:
        raise failed(_NAME, str(error)) from None
    if not settings["alpha"]:
        raise failed(_NAME, "alpha is 0, so the update is zero whatever is trained.")
    trainable = sum(settings["rank"] * sum(linear.weight.shape) for linear in targets.values())
    if trainable > BUDGET:
        raise failed(_NAME, f"Over the budget: {trainable:,} trainable parameters, {BUDGET:,} are "
                     "allowed. A lower rank, or fewer matrices?",
                     "r (n + m) for each adapted matrix.")
    return trainable


def _advice(settings: dict[str, Any], trainable: int, gain: float) -> str:
    """Return the most likely reason for a gain that is too small."""
    rate, scale = settings["learning_rate"], abs(settings["alpha"] / settings["rank"])
    if not gain > 0:
        return "it is worse than before: the learning rate, or alpha / rank, is too high."
    if rate <= 0.3 * LORA_LEARNING_RATE:
        return ("that learning rate is one for full fine-tuning. LoRA starts at B = 0 and wants "
                "one several times as high.")
    if rate >= 5 * LORA_LEARNING_RATE:
        return "the learning rate looks too high."
    if scale < 0.5:
        return f"alpha / rank is only {scale:g}: every step of B counts for little."
    if trainable < BUDGET / 4:
        return f"you use only {trainable:,} of {BUDGET:,} parameters."
    return "try other matrices at the same number of parameters, or another learning rate."
