"""A function that learners write, its known mistakes, and how it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.exercises.comparison import Case, show_case
from minilora.exercises.outcome import NoResult, array_of, failed, run


@dataclass(frozen=True)
class Mistake:
    """A known mistake in one output.

    Parameters
    ----------
    says
        The sentence that names the mistake.
    makes
        Takes the arguments of the reference; returns the wrong output.
    """

    says: str
    makes: Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """A function that learners write.

    Parameters
    ----------
    name
        Name of the function.
    outputs
        Names of the values that it returns, in order.
    reference
        A correct function with the same arguments.
    cases
        Inputs of many shapes in float64, small ones first.
    mistakes
        Known mistakes of each output, by its name.
    read
        What to read again, for each output.
    factors
        Takes a case; returns {words: value}, the factors by which an output may be off.
    forward
        For a gradient, the function whose gradient it is: the arguments are the same without
        `dout`. The outputs named d{argument} are then compared with central differences.
    float32
        Whether float32 inputs must give float32 outputs.
    order
        The order in which to examine the outputs, if one depends on another.
    describe
        Takes inputs and outputs in which no known mistake was found; says what they have in
        common, or "".
    more
        A last check, of properties of the function that its outputs do not show.
    """

    name: str
    outputs: tuple[str, ...]
    reference: Callable[..., Any]
    cases: list[Case]
    mistakes: dict[str, list[Mistake]]
    read: dict[str, str]
    factors: Callable[..., dict[str, float]] = lambda **_: {}
    forward: Callable[..., Any] | None = None
    float32: bool = True
    order: tuple[str, ...] = ()
    describe: Callable[[list[tuple[Case, np.ndarray]]], str] = lambda _: ""
    more: Callable[[Callable[..., Any]], None] | None = None


# ---- Running the function on a case


def outputs_of(task: Task, function: Callable[..., Any], case: Case) -> list[np.ndarray]:
    """Return the outputs for a copy of a case, after checking that no input was changed."""
    given = copy.deepcopy(case)
    result = run(task.name, lambda: function(*given.values()))
    for name, before in case.items():
        kept = np.array_equal(before, given[name], True) if isinstance(
            before, np.ndarray) else before == given[name]
        if not kept:
            raise failed(task.name, f"Your code changes its input {name} in place. The caller "
                         f"still needs it: work on a new array ({name} = {name} + ..., not +=).")
    return as_outputs(task, result, given)


def as_outputs(task: Task, result: Any, given: Case) -> list[np.ndarray]:
    """Return the outputs as arrays, after checking their number and kind."""
    names = ", ".join(task.outputs)
    if result is None:
        raise failed(task.name, f"Your function returns nothing; it should return {names}.\n"
                     + show_case(given), kind=NoResult)
    if len(task.outputs) == 1:
        values = [result[0] if isinstance(result, tuple) and len(result) == 1 else result]
    elif isinstance(result, (tuple, list)) and len(result) == len(task.outputs) or (
        isinstance(result, np.ndarray) and result.ndim and len(result) == len(task.outputs)
    ):
        values = list(result)
    else:
        got = f"{len(result)} things" if isinstance(result, (tuple, list)) else \
            f"one {type(result).__name__}"
        raise failed(task.name, f"It should return {len(task.outputs)} things, {names}; "
                     f"yours returns {got}.")
    return [array_of(task.name, name, value)
            for name, value in zip(task.outputs, values, strict=True)]


def as_tuple(value: Any) -> tuple[np.ndarray, ...]:
    """Return one output or several as a tuple of arrays."""
    return tuple(np.asarray(v) for v in value) if isinstance(value, tuple) else (np.asarray(value),)
