"""Fine-tuning on one's own text, or on prompts with answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from minilora.data.answers import answer_loss
from minilora.data.datasets import Dataset, as_dataset, load_data
from minilora.data.encoded import Examples, Text, Tokenizer
from minilora.data.generate import answer_prompts, generate
from minilora.data.tokenizer import CharTokenizer
from minilora.lora.surgery import wrappers
from minilora.lora.wrap import replace_linear_with_lora
from minilora.nn.gpt import GPT
from minilora.nn.llama import Llama
from minilora.nn.quantized import QuantizedParameter
from minilora.nn.validate import check_flag, check_sizes
from minilora.train.history import History
from minilora.train.loop import fit
from minilora.train.optim import AdamW
from minilora.train.parallel import Loss, threads_that_pay
from minilora.train.schedule import cosine_schedule

WARMUP = 20  # steps
EVALUATIONS = 6  # of a run, the last at its end, besides the one before it
SHOWN = 3  # prompts that are answered before and after
ANSWER = 48  # tokens that such an answer may have


@dataclass(frozen=True)
class Usual:
    """The settings that suit one kind of data.

    Attributes
    ----------
    lr, full_lr : float
        Learning rates with LoRA and for full fine-tuning.
    steps, batch_size : int
    context_length : int
        Tokens in a window of text, or the most in a conversation; the model's own, if it has less.
    held_out : int
        The most held-out windows or conversations that a run evaluates at a time.
    unit : str
        Unit of the losses.
    """

    lr: float
    full_lr: float
    steps: int
    batch_size: int
    context_length: int
    held_out: int
    unit: str


KINDS = {
    "characters": Usual(1e-2, 2e-3, 300, 16, 1 << 20, 256, "nats per character"),
    "text": Usual(1e-3, 5e-5, 60, 4, 128, 16, "nats per token"),
    "conversations": Usual(1e-3, 5e-5, 60, 8, 512, 64, "nats per token of the answers"),
}


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned; None means what is usual for the kind of data.

    Attributes
    ----------
    rank, alpha : int, float
        Of LoRA; alpha is twice the rank by default.
    target_modules : sequence of str
        Names or globs of the layers to adapt; by default every Linear.
    full : bool
        Whether to train all weights instead.
    lr : float
        The peak of the learning rate, after a warm-up and before a cosine decay to a tenth.
    steps, batch_size, context_length : int
    val_fraction : float
        The share of the data that is held out, if no other data are given for that; 0 for none.
    seed : int
        Of A, of the order of the data, and of which conversations are held out.
    threads : int
        That share each batch; by default as many as pay off.
    """

    rank: int = 8
    alpha: Any = None  # these are Any, since they are numbers once they are filled in
    target_modules: Sequence[str] | None = None
    full: bool = False
    lr: Any = None
    steps: Any = None
    batch_size: Any = None
    context_length: Any = None
    val_fraction: float = 0.1
    seed: int = 0
    threads: int | None = None


def finetune(
    model: GPT | Llama, data: Any, validation: Any = None, tokenizer: Tokenizer | None = None,
    progress: bool = True, **settings: Any,
) -> History:
    """Fine-tune a model on your own data. Afterwards it has a trained adapter, unless `full`.

    Parameters
    ----------
    model : GPT or Llama
        A base. If it has LoRA layers already, these are trained, whatever `rank`, `alpha` and
        `target_modules` are.
    data : str, sequence or Path
        A text or several; pairs (prompt, answer) or conversations, for a Llama; see `as_dataset`.
        Or the path of such data; see `load_data`.
    validation : like `data`, optional
        What losses are evaluated on. By default a tenth of the data is held out.
    tokenizer : CharTokenizer or BPETokenizer, optional
        Of the model; not needed for models of characters.
    progress : bool
        Whether to show a progress bar.
    **settings
        The attributes of `Settings`, such as `rank`, `steps` and `lr`.

    Returns
    -------
    History
        Its first and last validation losses are from before and after the training; there are
        none if nothing is held out.

    Raises
    ------
    ValueError, TypeError
        If the data or a setting do not suit the model, which is unchanged then.
    FloatingPointError
        If the loss is not finite.
    """
    return prepare(model, data, validation, tokenizer, Settings(**settings)).train(progress)


@dataclass
class Job:
    """A model that is ready to be trained, and its data.

    Attributes
    ----------
    kind : str
        A key of `KINDS`.
    settings : Settings
        Nothing is None, except for `target_modules`.
    held_out : Text, Examples or None
    """

    model: GPT | Llama
    tokenizer: Tokenizer
    kind: str
    settings: Settings
    training: Text | Examples
    held_out: Text | Examples | None

    def optimizer(self) -> AdamW:
        """Return a new optimizer, as for the beginning of a run."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return AdamW(trained, self.settings.lr, weight_decay=0.0)

    def train(
        self, progress: bool = True, optimizer: AdamW | None = None,
        history: History | None = None, after_step: Callable[[History], None] | None = None,
    ) -> History:
        """Train, or go on with the run that an optimizer and a history are of."""
        s, usual, done = self.settings, KINDS[self.kind], len(history.steps) if history else 0
        held_out = self.held_out.evaluation(s.batch_size, usual.held_out) if self.held_out else None
        return fit(
            self.model, itertools.islice(self.training.batches(s.batch_size, s.seed), done, None),
            optimizer or self.optimizer(), s.steps,
            cosine_schedule(s.lr, s.steps, min(WARMUP, s.steps // 10)), clip_norm=1.0,
            validation=held_out, validate_every=-(-s.steps // EVALUATIONS), threads=s.threads,
            progress=progress, description="finetune", loss=loss_of(self.model), history=history,
            after_step=after_step)

    def samples(self) -> list[tuple[str, str]]:
        """Return prompts, held out if any data are, and how the model continues them now.

        The draws are the same each time.
        """
        data = self.held_out or self.training
        if isinstance(data, Examples):
            new = answer_prompts(self.model, self.tokenizer, data.prompts[:SHOWN], ANSWER)
            return list(zip(data.questions, new, strict=False))
        length, temperature = (200, 0.8) if self.kind == "characters" else (40, 0.0)
        ids = generate(self.model, data.prompt, length, temperature, top_k=20, rng=0)
        return [(self.tokenizer.decode(data.prompt), self.tokenizer.decode(ids[len(data.prompt):]))]


def exact_answers(model: GPT | Llama, tokenizer: Any, data: Examples) -> int:
    """Count the last answers that a model gives exactly, but for white space."""
    longest = max(len(tokenizer.answer(text)) for text in data.answers)
    most = longest + 8  # a model may spell the same text in more tokens
    given = answer_prompts(model, tokenizer, data.prompts, most)
    return sum(a.split() == right.split() for a, right in zip(given, data.answers, strict=True))


# ---- Preparation


def prepare(
    model: GPT | Llama, data: Any, validation: Any, tokenizer: Tokenizer | None, settings: Settings
) -> Job:
    """Return a job; see `finetune` for arguments and errors. The model is changed at the end."""
    if not isinstance(model, (GPT, Llama)):
        raise TypeError(f"finetune is for a GPT or a Llama, got {type(model).__name__}")
    _check(settings)
    tokenizer = tokenizer or default_tokenizer(model)
    data = dataset(data, "the data")
    kind = kind_of(model, data)
    s = with_usual(settings, model, kind)
    training, held_out = encode(data, tokenizer, s.context_length), None
    if validation is not None:
        validation = dataset(validation, "the validation data")
        if kind_of(model, validation) != kind:
            raise ValueError("the validation data are of another kind than the data")
        held_out = encode(validation, tokenizer, s.context_length)
    elif s.val_fraction:
        training, held_out = training.split(s.val_fraction, s.seed)
    first = next(training.batches(s.batch_size, s.seed))
    _make_trainable(model, s)
    s = replace(s, threads=s.threads or threads_that_pay(model, [first]))
    return Job(model, tokenizer, kind, s, training, held_out)


def _check(s: Settings) -> None:
    """Raise ValueError or TypeError if a number is out of range."""
    whole = ("rank", "steps", "batch_size", "context_length", "threads")
    check_sizes("finetune", **{name: value for name in whole
                               if (value := getattr(s, name)) is not None})
    check_flag(full=s.full)
    if isinstance(s.target_modules, str):
        raise TypeError(f"target_modules must be a list of names, got {s.target_modules!r}")
    for name, value in (("val_fraction", s.val_fraction), ("lr", 1.0 if s.lr is None else s.lr)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= s.val_fraction < 1.0:
        raise ValueError(f"val_fraction must be 0 or more and less than 1, got {s.val_fraction}")
    if s.lr is not None and not 0.0 < s.lr < float("inf"):
        raise ValueError(f"lr must be above 0 and finite, got {s.lr}")


def dataset(data: Any, name: str) -> Dataset:
    """Return data, or what is at a path, as a dataset; `name` is for errors."""
    return load_data(data) if isinstance(data, Path) else as_dataset(data, name)


def default_tokenizer(model: GPT | Llama) -> CharTokenizer:
    """Return the tokenizer of characters. Raises ValueError if the model has another."""
    if isinstance(model, Llama) or model.config.vocab_size != CharTokenizer.vocab_size:
        raise ValueError('this model needs its tokenizer, such as ml.load_tokenizer("smollm2")')
    return CharTokenizer()


def kind_of(model: GPT | Llama, data: Dataset) -> str:
    """Return the key in `KINDS`. Raises ValueError if the model cannot be trained on such data."""
    if isinstance(data[0], str):
        known = isinstance(model, GPT) and model.config.vocab_size == CharTokenizer.vocab_size
        return "characters" if known else "text"
    if not isinstance(model, Llama):
        raise ValueError("prompts with answers need a language model, such as smollm2")
    return "conversations"


def loss_of(model: GPT | Llama) -> Loss | None:
    """Return the loss for `fit` and `evaluate`; None is the cross-entropy of every next token."""
    return answer_loss if isinstance(model, Llama) else None


def with_usual(settings: Settings, model: GPT | Llama, kind: str) -> Settings:
    """Return the settings with what is usual in place of None."""
    usual, most = KINDS[kind], model.config.context_length
    if (settings.context_length or 0) > most:
        raise ValueError(f"the model has a context of {most} tokens, not of "
                         f"{settings.context_length}")
    values = {
        "alpha": 2.0 * settings.rank, "lr": usual.full_lr if settings.full else usual.lr,
        "steps": usual.steps, "batch_size": usual.batch_size,
        "context_length": min(usual.context_length, most)}
    return replace(settings, **{name: value for name, value in values.items()
                                if getattr(settings, name) is None})


def encode(data: Dataset, tokenizer: Any, context_length: int) -> Text | Examples:
    """Return a dataset as token ids."""
    encoded: Any = Text if isinstance(data[0], str) else Examples
    return encoded.encode(data, tokenizer, context_length)


def _make_trainable(model: GPT | Llama, s: Settings) -> None:
    if not s.full:
        if not wrappers(model):
            targets = None if s.target_modules is None else list(s.target_modules)
            replace_linear_with_lora(model, s.rank, s.alpha, targets, rng=s.seed)
        return
    if wrappers(model):
        raise ValueError("the model has an adapter: remove or merge it for full fine-tuning")
    if any(isinstance(p, QuantizedParameter) for p in model.parameters()):
        raise ValueError("weights in 4 or 8 bits cannot be trained: dequantize the model for full "
                         "fine-tuning")
    model.unfreeze()
