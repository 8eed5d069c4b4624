"""Check a learner's function, and find the mistake in it.

The function is run on small inputs of many shapes. If an output is wrong on any of them, a
catalogue of known mistakes is tried: each is a short function that makes the same error on
purpose. A mistake is named only if it reproduces the learner's output *on every input*.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.exercises.comparison import Case, same, show_case, show_difference
from minilora.exercises.outcome import CheckFailed, NoResult, Passed, failed, run
from minilora.nn.gradcheck import numerical_gradient


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
    more: Callable[[Callable[..., Any]], None] | None = None


# ---- Running the function on a case


def _outputs_of(task: Task, function: Callable[..., Any], case: Case) -> list[np.ndarray]:
    """Return the outputs for a copy of a case, after checking that no input was changed."""
    given = copy.deepcopy(case)
    result = run(task.name, lambda: function(*given.values()))
    for name, before in case.items():
        kept = np.array_equal(before, given[name], True) if isinstance(
            before, np.ndarray) else before == given[name]
        if not kept:
            raise failed(task.name, f"Your code changes its input {name} in place. The caller "
                         f"still needs it: work on a new array ({name} = {name} + ..., not +=).")
    return _as_outputs(task, result, given)


def _as_outputs(task: Task, result: Any, given: Case) -> list[np.ndarray]:
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
    arrays = []
    for name, value in zip(task.outputs, values, strict=True):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError):
            array = np.asarray(None)
        if array.dtype.kind not in "fiub":
            raise failed(task.name, f"{name} should be numbers, yours is {value!r:.80}.")
        arrays.append(array)
    return arrays


# ---- Finding the mistake


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
            results.append(_outputs_of(task, function, case))
        except NoResult as failure:
            error = error or failure
            results.append(None)
    expected = [_tuple(task.reference(**case)) for case in task.cases]
    _check_order(task, results, expected)
    for name in task.order or task.outputs:
        i = task.outputs.index(name)
        pairs = [(case, r and r[i], e[i])
                 for case, r, e in zip(task.cases, results, expected, strict=True)]
        if any(got is not None and not same(got, want) for _, got, want in pairs):
            _explain(task, name, pairs, error)
    if error:
        raise error
    _check_central_differences(task, results)
    _check_precision(task, function, results)
    _check_buffers(task, function)
    if task.more is not None:
        task.more(function)
    kinds = "in float32 and float64" if task.float32 else "all counts exact"
    return Passed(task.name, f"Checked on {len(task.cases)} different inputs, {kinds}.")


def _tuple(value: Any) -> tuple[np.ndarray, ...]:
    """Return one output or several as a tuple of arrays."""
    return tuple(np.asarray(v) for v in value) if isinstance(value, tuple) else (np.asarray(value),)


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
    for says, make in _candidates(task, name):
        if _matches(make, runs):
            raise failed(task.name, f"{name} is wrong: {says}", read)
    case, got, want = next(run for run in runs if not same(run[1], run[2]))
    if all(same(got, want, 1e-4) for _, got, want in runs):
        raise failed(task.name, f"{name} is right to about 7 digits only: something in your "
                     "code is float32, though the inputs are float64. Keep the dtype of the input.",
                     read)
    text = f"{name} is wrong.\n{show_case(case)}"
    if got.shape != want.shape:
        text += f"\nit should have shape {want.shape}, yours has {got.shape}."
    else:
        text += "\n" + show_difference(name, got, want)
    if error:
        text += "\nOn other shapes it fails as well: " + str(error).split("\n")[1]
    failure = failed(task.name, text + "\n(These inputs are in sys.last_value.inputs.)", read)
    failure.inputs = case
    raise failure


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


def _candidates(task: Task, name: str) -> list[tuple[str, Callable[[Case, np.ndarray], Any]]]:
    """Return the mistakes in the catalogue, then those that any output may have."""
    found = [(m.says, lambda case, _, m=m: m.makes(**case)) for m in task.mistakes.get(name, [])]

    def factor(words: str, power: int) -> Callable[[Case, np.ndarray], Any]:
        return lambda case, want: want * task.factors(**case)[words] ** power

    words = task.factors(**task.cases[0])
    found += [(f"it lacks the factor {w}, or is divided by it.", factor(w, -1)) for w in words]
    found += [(f"it has the factor {w} once too often.", factor(w, 1)) for w in words]
    found += [(f"it is divided by {w} twice, or divided where it should be multiplied by it.",
               factor(w, -2)) for w in words]
    return [
        *found,
        ("it has the wrong sign.", lambda _, want: -want),
        ("it is transposed.", lambda _, want: want.T if want.ndim == 2 else want),
        ("it is all zeros.", lambda _, want: np.zeros_like(want)),
        ("it is twice what it should be: something is added twice.", lambda _, want: 2 * want),
        ("it is half of what it should be.", lambda _, want: want / 2),
        ("it has one axis too many: take keepdims out, or an index that is a list.",
         lambda _, want: want[None]),
        ("it has one axis too many: take keepdims out, or an index that is a list.",
         lambda _, want: want[..., None]),
    ]


# ---- Further checks of correct values


def _check_central_differences(task: Task, results: list[list[np.ndarray]]) -> None:
    """Compare gradients with (f(x + h) - f(x - h)) / 2h, which needs no reference."""
    forward = task.forward
    if forward is None:
        return
    case, result = copy.deepcopy(task.cases[0]), results[0]
    dout = case.pop("dout")
    for name, got in zip(task.outputs, result, strict=True):
        array = case.get(name.removeprefix("d"))
        if array is None:
            continue
        slopes = numerical_gradient(
            lambda: float((forward(**case) * dout).sum()), array, list(np.ndindex(array.shape))
        )
        if not same(got, slopes.reshape(array.shape), 1e-5):
            raise failed(task.name, f"{name} differs from central differences.")


def _check_precision(task: Task, function: Callable[..., Any], results: list[Any]) -> None:
    """Check the dtypes: float32 inputs must give float32 outputs, exact to float32."""
    if not task.float32:
        return
    for name, got in zip(task.outputs, results[0], strict=True):
        if got.ndim and got.dtype != np.float64:
            raise failed(task.name, f"{name} is {got.dtype} for float64 inputs; keep the dtype of "
                         "the input.")
    for case in task.cases[:4]:
        small = {
            k: v.astype(np.float32) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v
            for k, v in case.items()
        }
        wants = _tuple(task.reference(**case))
        gots = _outputs_of(task, function, small)
        for name, got, want in zip(task.outputs, gots, wants, strict=True):
            if want.ndim and got.dtype != np.float32:
                raise failed(task.name, f"{name} is right in value, but {got.dtype} for float32 "
                             "inputs: something in your code is float64. np.zeros, np.ones, np.eye "
                             "and np.full take a dtype (such as x.dtype); and use d ** 0.5 instead "
                             "of np.sqrt of a number.")
            if not same(got, want, 1e-4):
                raise failed(task.name, f"{name} is not exact enough in float32.\n"
                             + show_difference(name, got, want.astype(np.float32)))


def _check_buffers(task: Task, function: Callable[..., Any]) -> None:
    """Check that outputs are new arrays: not views of an input, nor reused by a second call."""
    case = copy.deepcopy(task.cases[1])
    first = _as_outputs(task, run(task.name, lambda: function(*case.values())), case)
    for name, got in zip(task.outputs, first, strict=True):
        for argument, value in case.items():
            if isinstance(value, np.ndarray) and got.ndim and np.shares_memory(got, value):
                raise failed(task.name, f"{name} is a view of the input {argument}: changing "
                             "one changes the other. Return a new array.")
    kept = [got.copy() for got in first]
    other = {k: v + 1 if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v
             for k, v in case.items()}
    run(task.name, lambda: function(*other.values()))
    for name, got, before in zip(task.outputs, first, kept, strict=True):
        if not np.array_equal(got, before, True):
            raise failed(task.name, f"A second call changed the {name} that the first one "
                         "returned: your code reuses the buffer that it returns. Make a new "
                         "array each time.")
