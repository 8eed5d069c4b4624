"""Which base an adapter was made for: the base's name, and a fingerprint of its weights."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.files.checkpoint import load_base
from minilora.files.peft_names import base_parameters
from minilora.files.settings import PLACE
from minilora.lora.surgery import base_modules
from minilora.nn.module import Module, Parameter
from minilora.nn.validate import CheckpointError

BASE, HELD_OUT_LOSS = "minilora_base", "minilora_held_out_loss"
MAX_NAME = 500  # characters
# The names under which PEFT and transformers find the bases that have one.
PUBLIC = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
SMOLLM2 = "fcde2ec965539a4a"  # its fingerprint


class WrongBase(CheckpointError):
    """An adapter does not fit a model, because it was made for another base, `base`."""

    def __init__(self, path: str | Path, base: str):
        super().__init__(f"{path} was made for {base}, and does not fit this model")
        self.path, self.base = path, base


@dataclass(frozen=True)
class Origin:
    """What an adapter's file says about how it was made.

    Attributes
    ----------
    base : str or None
        A name that `load_base` knows, a path, or a name that transformers knows.
    fingerprint : str or None
        Of the base.
    held_out_loss : float or None
        Of base and adapter, in nats per token.
    """

    base: str | None = None
    fingerprint: str | None = None
    held_out_loss: float | None = None


def fingerprint(model: Module) -> str:
    """Return 16 hexadecimal digits that tell one trained base from another.

    They come from the names and shapes of all parameters and from the weights of the norms, which
    training changes, but neither quantisation nor another dtype does. Adapters and the head do not
    count.
    """
    digest = hashlib.sha256()
    for name, p in sorted(base_parameters(base_modules(model)).items()):
        if not name.startswith("lm_head."):
            digest.update(f"{name} {p.shape}".encode())
            if _is_norm(name, p):
                digest.update(p.data.astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def _is_norm(name: str, p: Parameter) -> bool:
    return len(p.shape) == 1 and name.endswith(".weight")


@functools.cache
def shipped() -> dict[str, str]:
    """Return {fingerprint: name} of the bases that `load_base` knows by name."""
    return {fingerprint(load_base(name)): name for name in ("base", "small")} | {
        SMOLLM2: "smollm2"}


def settings_of(
    model: Module, base: str | None = None, held_out_loss: float | None = None
) -> dict[str, Any]:
    """Return the settings of an adapter's file that say how it was made.

    Parameters
    ----------
    model
        A base with the adapter.
    base
        The name or path that the base was loaded by; None: found for those that `load_base` knows.
    held_out_loss
        In nats per token.
    """
    parameters = base_parameters(base_modules(model))
    trained = any(_is_norm(name, p) and p.requires_grad for name, p in parameters.items())
    mark = None if trained else fingerprint(model)  # it would not be the base's any more
    name = base or shipped().get(mark or "")
    facts = {BASE: mark, HELD_OUT_LOSS: held_out_loss}
    return {"base_model_name_or_path": PUBLIC.get(name or "", name),
            PLACE: {key: value for key, value in facts.items() if value is not None}}


def origin(settings: dict[str, Any]) -> Origin:
    """Return what the settings of an adapter's file, which may be anybody's, say about it."""
    name, place = settings.get("base_model_name_or_path"), settings.get(PLACE)
    place = place if isinstance(place, dict) else {}
    mark, loss = place.get(BASE), place.get(HELD_OUT_LOSS)
    mark = mark if isinstance(mark, str) else None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        name = None
    ours = {public: ours for ours, public in PUBLIC.items()}
    name = shipped().get(mark or "") or ours.get(name or "", name)
    loss = loss if isinstance(loss, float) and np.isfinite(loss) else None
    return Origin(name, mark, loss)


def to_load(made: Origin, path: str | Path, default: str = "base") -> str:
    """Return what `load_model` loads the base of an adapter by; `default` if nothing is known.

    Raises ValueError if the base is known, but is neither shipped nor a path that there is.
    """
    if made.base is None or made.base in shipped().values() or os.path.exists(made.base):
        return made.base or default
    raise ValueError(f"{path} was made for {made.base}, which is not here: add --base with the "
                     "path of that model")
