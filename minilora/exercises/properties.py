"""Check what right values alone do not show: slopes, dtypes, and that nothing is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.comparison import Case, same, show_difference
from minilora.exercises.outcome import failed, run
from minilora.exercises.task import Task, as_outputs, as_tuple, outputs_of
from minilora.nn.gradcheck import numerical_gradient


def check_properties(task: Task, function: Callable[..., Any], results: list[Any]) -> None:
    """Check an answer whose values are right.

    Parameters
    ----------
    task
        The task that the function answers.
    function
        The learner's function.
    results
        Its outputs for each case of the task.

    Raises
    ------
    CheckFailed
        If something else is wrong with it.
    """
    _check_central_differences(task, results)
    for case in task.cases[:4]:
        _check_two_in_turn(task, function, case)
    _check_precision(task, function, results)
    if task.more is not None:
        task.more(function)


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
        wants = as_tuple(task.reference(**case))
        gots = outputs_of(task, function, small)
        for name, got, want in zip(task.outputs, gots, wants, strict=True):
            if want.ndim and got.dtype != np.float32:
                raise failed(task.name, f"{name} is right in value, but {got.dtype} for float32 "
                             "inputs: something in your code is float64. np.zeros, np.ones, np.eye "
                             "and np.full take a dtype (such as x.dtype); and use d ** 0.5 instead "
                             "of np.sqrt of a number.")
            if not same(got, want, 1e-4):
                raise failed(task.name, f"{name} is not exact enough in float32.\n"
                             + show_difference(name, got, want.astype(np.float32)))


# ---- Repeated calls

_KEEPS = ("It keeps something from one call to the next: in a global, a default argument or a "
          "cache by shape. Compute everything from what is given.")


def check_same_again(task: Task, function: Callable[..., Any], results: list[Any]) -> None:
    """Check that the first case gives the same a second time, whether right or wrong."""
    if results[0] is None:
        return
    again = outputs_of(task, function, task.cases[0])
    for name, got, before in zip(task.outputs, again, results[0], strict=True):
        if not same(got, before):
            raise failed(task.name, f"{name} is another one when your function is called again "
                         f"with the same inputs. {_KEEPS}")


def _check_two_in_turn(task: Task, function: Callable[..., Any], case: Case) -> None:
    """Check calls with two inputs of the same shapes in turn, and that outputs are new arrays."""
    given = copy.deepcopy(case)
    first = as_outputs(task, run(task.name, lambda: function(*given.values())), given)
    for name, got in zip(task.outputs, first, strict=True):
        for argument, value in given.items():
            if isinstance(value, np.ndarray) and got.ndim and np.shares_memory(got, value):
                raise failed(task.name, f"{name} is a view of the input {argument}: changing "
                             "one changes the other. Return a new array.")
    kept = [got.copy() for got in first]
    other = {k: 1.5 * v if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v
             for k, v in case.items()}
    second = outputs_of(task, function, other)
    for name, got, before in zip(task.outputs, first, kept, strict=True):
        if not np.array_equal(got, before, True):
            raise failed(task.name, f"A second call changed the {name} that the first one "
                         "returned: your code reuses the buffer that it returns. Make a new "
                         "array each time.")
    third = outputs_of(task, function, case)
    for inputs, gots in ((other, second), (case, third)):
        for name, got, want in zip(task.outputs, gots, as_tuple(task.reference(**inputs)),
                                   strict=True):
            if not same(got, want):
                raise failed(task.name, f"{name} is right in a first call, but not in the next, "
                             f"with other numbers of the same shapes. {_KEEPS}")
