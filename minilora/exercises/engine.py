"""Check a learner's function, and find the mistake in it.

The function is run on small inputs of many shapes. If an output is wrong on any of them, a
catalogue of known mistakes is tried: each is a short function that makes the same error on
purpose. A mistake is named only if it reproduces the learner's output *on every input*.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.comparison import Case, same, show_case, show_difference
from minilora.exercises.outcome import CheckFailed, NoResult, Passed, either, failed
from minilora.exercises.properties import check_properties, check_same_again
from minilora.exercises.task import Task, as_tuple, outputs_of


@np.errstate(all="ignore")  # regardless of the learner's setting
def check(task: Task, function: Callable[..., Any]) -> Passed:
    """Check a learner's function.

    Parameters
    ----------
    task
        The task that the function answers.
    function
        The learner's function.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message names the mistake if possible.
    """
    if not callable(function):
        raise failed(task.name, f"Give the function itself, not {type(function).__name__}.")
    results, error = [], None
    for case in task.cases:
        try:
            results.append(outputs_of(task, function, case))
        except NoResult as failure:
            error = error or failure
            results.append(None)
    check_same_again(task, function, results)
    expected = [as_tuple(task.reference(**case)) for case in task.cases]
    _check_order(task, results, expected)
    for name in task.order or task.outputs:
        i = task.outputs.index(name)
        pairs = [(case, r and r[i], e[i])
                 for case, r, e in zip(task.cases, results, expected, strict=True)]
        if any(got is not None and not same(got, want) for _, got, want in pairs):
            _explain(task, name, pairs, error)
    if error:
        raise error
    check_properties(task, function, results)
    kinds = "in float32 and float64" if task.float32 else "all counts exact"
    return Passed(task.name, f"Checked on {len(task.cases)} different inputs, {kinds}.")


def _check_order(task: Task, results: list[Any], expected: list[tuple]) -> None:
    """Raise CheckFailed if all outputs are correct but in the wrong order."""
    runs = [(r, e) for r, e in zip(results, expected, strict=True) if r is not None]
    places = range(len(task.outputs))
    for order in itertools.permutations(places):
        if runs and all(same(r[at], e[i]) for r, e in runs for i, at in enumerate(order)):
            if order != tuple(places):
                raise failed(task.name, "The results are right, but in the wrong order: return "
                             f"{', '.join(task.outputs)}.")
            return


def _explain(
    task: Task, name: str, pairs: list[tuple[Case, Any, np.ndarray]], error: CheckFailed | None
) -> None:
    """Raise CheckFailed, naming the mistake in this output or showing where it differs."""
    runs = [(case, got, want) for case, got, want in pairs if got is not None]
    read = task.read.get(name, "")
    for candidates in (_known(task, name), _general(task), _of_inputs(task), _constant(runs)):
        if fitting := either(says for says, make in candidates if _matches(make, runs)):
            raise failed(task.name, f"{name} is wrong: {fitting}", read)
    if words := task.describe([(case, got) for case, got, _ in runs]):
        raise failed(task.name, f"{name} is wrong: {words}", read)
    case, got, want = next(run for run in runs if not same(run[1], run[2]))
    if all(same(got, want, 1e-4) for _, got, want in runs):
        raise failed(task.name, f"{name} is right to about 4 digits only, as if it were rounded, "
                     "or computed in float32, or a small number were added.\n"
                     f"{show_case(case)}\n{show_difference(name, got, want)}", read)
    if got.shape != want.shape:
        text = f"its shape is {got.shape} and should be {want.shape}.\n{show_case(case)}"
    elif error:  # the likelier cause, and easier to find than by numbers
        text = ("on other shapes your code fails.\n" + str(error).partition("\n")[2]
                + f"\n{show_case(case)} it runs, but gives wrong numbers.")
    else:
        text = f"{_where(runs)}\n{show_case(case)}\n{show_difference(name, got, want)}"
    failure = failed(task.name, f"{name} is wrong: {text}\n(These inputs are in "
                     "sys.last_value.inputs.)", read)
    failure.inputs = case
    raise failure


def _where(runs: list[tuple[Case, Any, np.ndarray]]) -> str:
    """Return in how many of the cases an output is wrong."""
    wrong = sum(not same(got, want) for _, got, want in runs)
    return f"in {wrong} of {len(runs)} cases, the first of which is this."


def _matches(make: Callable[..., Any], runs: list[tuple[Case, Any, np.ndarray]]) -> bool:
    """Return whether the mistake reproduces the learner's output on every input."""
    distinct = False  # whether the mistake makes a difference on some input
    for case, got, want in runs:
        try:
            with np.errstate(all="ignore"):
                wrong = np.asarray(make(case, want))
        except (ValueError, IndexError, TypeError, ZeroDivisionError, np.linalg.LinAlgError):
            return False
        if not same(got, wrong, 1e-6):
            return False
        distinct = distinct or not same(wrong, want)
    return distinct


Candidate = tuple[str, Callable[[Case, np.ndarray], Any]]


def _known(task: Task, name: str) -> list[Candidate]:
    """Return the mistakes in the catalogue."""
    return [(m.says, lambda case, _, m=m: m.makes(**case)) for m in task.mistakes.get(name, [])]


def _general(task: Task) -> list[Candidate]:
    """Return the mistakes that any output may have.

    A factor may stand in the reference itself, so that the outputs do not tell which of two
    mistakes it is: then both are said.
    """

    def factor(words: str, power: int) -> Callable[[Case, np.ndarray], Any]:
        return lambda case, want: want * task.factors(**case)[words] ** power

    found: list[Candidate] = []
    for w in task.factors(**task.cases[0]):
        found += [
            (f"it lacks the factor {w}, or is divided by it once too often.", factor(w, -1)),
            (f"it has the factor {w} once too often, or is not divided by it.", factor(w, 1)),
            (f"it is the right one divided by {w} twice.", factor(w, -2)),
            (f"it is the right one times {w} twice.", factor(w, 2)),
        ]
    return [
        *found,
        ("it has the wrong sign.", lambda _, want: -want),
        ("it is transposed.", lambda _, want: want.T if want.ndim == 2 else want),
        ("it is all zeros.", lambda _, want: np.zeros_like(want)),
        ("it is all ones.", lambda _, want: np.ones_like(want)),
        ("it is twice what it should be: something is added twice.", lambda _, want: 2 * want),
        ("it is half of what it should be.", lambda _, want: want / 2),
        ("it is 1 too high.", lambda _, want: want + 1),
        ("it is 1 too low.", lambda _, want: want - 1),
        ("the negative numbers are cut off at 0.", lambda _, want: np.maximum(want, 0)),
        ("it is the absolute value.", lambda _, want: np.abs(want)),
        ("it is summed over the rows.", lambda _, want: want.sum(axis=0)),
        ("it is summed up to one number.", lambda _, want: want.sum()),
        ("only its first row is there.", lambda _, want: want[0]),
        ("it has one axis too many: take keepdims out, or an index that is a list.",
         lambda _, want: want[None]),
        ("it has one axis too many: take keepdims out, or an index that is a list.",
         lambda _, want: want[..., None]),
        ("it is squared.", lambda _, want: want**2),
        ("its rows are in reverse order.", lambda _, want: want[::-1]),
        ("it is sorted.", lambda _, want: np.sort(want)),
        ("every row but the first is missing, zero.", lambda _, want: _kept(want, slice(0, 1))),
        ("every row but the last is missing, zero.", lambda _, want: _kept(want, slice(-1, None))),
        ("its last row is missing, zero.", lambda _, want: _kept(want, slice(0, -1))),
        ("its first row is missing, zero.", lambda _, want: _kept(want, slice(1, None))),
        ("there are sums over the rows so far (cumsum).", lambda _, want: np.cumsum(want, axis=0)),
        *((f"it is rounded to {digits} digits: leave the numbers as they are.",
           lambda _, want, digits=digits: np.round(want, digits)) for digits in range(7)),
    ]


def _kept(want: np.ndarray, rows: slice) -> np.ndarray:
    """Return `want` with zeros in all other rows."""
    kept = np.zeros_like(want)
    kept[rows] = want[rows]
    return kept


def _of_inputs(task: Task) -> list[Candidate]:
    """Return the mistakes of taking an input for the result, or adding one to it."""
    found: list[Candidate] = []
    for name, value in task.cases[0].items():
        if isinstance(value, np.ndarray):
            found += [
                (f"it is the input {name}, unchanged.", lambda case, _, n=name: case[n]),
                (f"it is the input {name}, transposed.", lambda case, _, n=name: case[n].T),
                (f"the input {name} is added to it.", lambda case, want, n=name: want + case[n]),
                (f"the input {name} is subtracted from it.",
                 lambda case, want, n=name: want - case[n]),
                (f"it is multiplied by the input {name}, entry by entry.",
                 lambda case, want, n=name: want * case[n]),
            ]
    return found


def _constant(runs: list[tuple[Case, np.ndarray, np.ndarray]]) -> list[Candidate]:
    """Return the mistake of one factor in all cases, which the first case shows."""
    _, got, want = runs[0]
    if got.shape != want.shape or not want.size:
        return []
    at = np.unravel_index(np.abs(want).argmax(), want.shape)
    ratio = float(got[at] / want[at])
    if not np.isfinite(ratio) or ratio == 0:
        return []
    return [(f"it is {ratio:.4g} times what it should be, in every case.",
             lambda _, want: ratio * want)]
