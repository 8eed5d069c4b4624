"""The state of an optimizer as plain values, to be stored and put back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from minilora.nn.module import Parameter
from minilora.train.groups import parameter_groups


class Resumable:
    """What an `Optimizer` inherits: its state can be taken out and put back.

    Attributes
    ----------
    param_groups : list of dict
    state : {Parameter: its moments}
    steps : {Parameter: number of its updates}, where they are counted
    """

    param_groups: list[dict[str, Any]]
    state: dict[Parameter, list[np.ndarray]]
    steps: dict[Parameter, int]

    def state_dict(self) -> dict[str, Any]:
        """Return copies of settings, moments and counts of updates.

        Returns
        -------
        dict
            {"state": {i: {"step": int, "moments": [arrays]}}, "param_groups": [{"params": [i, ...],
            setting: value}]}, as in PyTorch. Parameters are numbered from 0, in the order of the
            groups. One that has never been updated has no entry.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = {p: i for i, p in enumerate(parameters)}
        state = {numbers[p]: {"step": self.steps.get(p, 0), "moments": [a.copy() for a in arrays]}
                 for p, arrays in self.state.items()}
        return {"state": state, "param_groups": [
            group | {"params": [numbers[p] for p in group["params"]]}
            for group in self.param_groups]}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Everything is checked before anything changes.

        Raises
        ------
        ValueError, TypeError
            If it is not the state of an optimizer with such groups, parameters and settings.
        """
        try:
            self.param_groups, self.state, self.steps = self._checked(given)
        except (KeyError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(f"this is not the state of an optimizer: {error}") from None

    def _checked(self, given: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Return groups, moments and counts from a state."""
        ours, theirs = self.state_dict()["param_groups"], given["param_groups"]
        if [_layout(group) for group in ours] != [_layout(group) for group in theirs]:
            raise ValueError("the state is of another optimizer, or of other parameters: it has "
                             f"{_shown(theirs)}, here there are {_shown(ours)}")
        held = [group["params"] for group in self.param_groups]
        groups = parameter_groups(
            [group | {"params": own} for group, own in zip(theirs, held, strict=True)],
            {key: value for key, value in ours[0].items() if key != "params"})
        parameters = dict(enumerate(itertools.chain(*held)))
        state, steps = {}, {}
        for i, entry in given["state"].items():
            p, moments = parameters[i], [np.asarray(a) for a in entry["moments"]]
            if any(a.shape != p.shape for a in moments):
                raise ValueError(f"the moments of parameter {i} have the shapes "
                                 f"{[a.shape for a in moments]}, the parameter has {p.shape}")
            state[p], steps[p] = [np.array(a, p.dtype) for a in moments], int(entry["step"])
        if len(counts := {len(moments) for moments in state.values()}) > 1:
            raise ValueError(f"some parameters have {min(counts)} moments, others {max(counts)}")
        return groups, state, steps


def _layout(group: dict[str, Any]) -> tuple[Any, Any]:
    return list(group["params"]), group.keys()


def _shown(groups: list[dict[str, Any]]) -> str:
    return ", ".join(f"{len(group['params'])} parameters ({', '.join(group.keys() - {'params'})})"
                     for group in groups)
