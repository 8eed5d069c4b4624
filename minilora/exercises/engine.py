"""How a learner's function is checked, and how the mistake in it is found.

The function is run on small inputs of many shapes. Where an output is wrong on any of them, a
catalogue of known mistakes is tried: each is a short function that makes the same error on
purpose. A mistake is named only if it gives what the learner's code gave *on every input*.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.nn.gradcheck import numerical_gradient

HERE = str(Path(__file__).parent)
Case = dict[str, Any]  # the arguments of the function, by name, in its order


class CheckFailed(AssertionError):
    """A wrong answer. In a notebook its message is shown without a stack trace.

    inputs   the arguments on which the function was wrong, by name, where that is known
    """

    inputs: Case | None = None

    def _render_traceback_(self, *_: Any) -> list[str]:  # IPython asks for this
        return str(self).split("\n")


class NoResult(CheckFailed):
    """The code gave nothing to compare on one input; on others it may, and show why."""


@dataclass(frozen=True)
class Passed:
    """What a check returns for a right answer."""

    name: str
    what: str
    passed: bool = True

    def __repr__(self) -> str:
        return f"{self.name}: correct. {self.what}"


def failed(
    name: str, text: str, read: str = "", kind: type[CheckFailed] = CheckFailed
) -> CheckFailed:
    """Return the error for a wrong answer: what is wrong, and where to read again."""
    return kind(f"{name}: not yet.\n{text}" + (f"\nRead again: {read}" if read else ""))


@dataclass(frozen=True)
class Mistake:
    """A known mistake in one output: the sentence for it, and a function that makes it."""

    says: str
    makes: Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """A function that learners write.

    name        of the function
    outputs     names of what it returns, in order
    reference   the right function, with the same arguments
    cases       inputs of many shapes, small ones first, in float64
    mistakes    {output: known mistakes}
    factors     {words: value} for a case: what an output may be too large or too small by
    read        what to read again, for each output
    forward     for a gradient: the function whose gradient it is, of the same arguments
                without `dout`; then d{argument} is compared with central differences
    halves      whether to ask for float32 results of float32 inputs
    order       in which outputs are looked at, where one is made of others; else as returned
    more        a last check of the function, for what inputs and outputs do not show
    """

    name: str
    outputs: tuple[str, ...]
    reference: Callable[..., Any]
    cases: list[Case]
    mistakes: dict[str, list[Mistake]]
    read: dict[str, str]
    factors: Callable[..., dict[str, float]] = lambda **_: {}
    forward: Callable[..., Any] | None = None
    halves: bool = True
    order: tuple[str, ...] = ()
    more: Callable[[Callable[..., Any]], None] | None = None


# ---- Running the learner's code


def run(name: str, call: Callable[[], Any]) -> Any:
    """Call the learner's code. What it raises becomes a CheckFailed that shows their line."""
    try:
        with np.errstate(all="ignore"):
            return call()
    except CheckFailed:
        raise
    except NotImplementedError:
        raise CheckFailed(f"{name}: not implemented yet. Fill in the gap and run it again."
                          ) from None
    except RecursionError:
        raise failed(name, "Your code calls itself without an end.") from None
    except Exception as error:
        raise failed(name, describe_exception(error), kind=NoResult) from None


def describe_exception(error: BaseException) -> str:
    """Say what was raised and show the learner's own line."""
    text = f"Your code raised {type(error).__name__}: {str(error)[:500]}"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(HERE) and "site-packages" not in frame.filename
    ]
    if isinstance(error, SyntaxError) or not frames:
        return text
    own = [f for f in frames if str(Path(HERE).parent) not in f.filename] or frames
    line = (own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno or 0)).strip()
    return f"{text}\nin line {own[-1].lineno}, in {own[-1].name}:\n    {line}"


def outputs_of(task: Task, function: Callable[..., Any], case: Case) -> list[np.ndarray]:
    """Run the learner's function on a copy of a case; check number, kind and untouched inputs."""
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
    """Check that what was returned are the outputs that were asked for."""
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


# ---- Comparing


def same(got: Any, expected: Any, tolerance: float = 1e-7) -> bool:
    """Whether two arrays are equal up to rounding, relative to the largest entry."""
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        return False
    if any(not np.array_equal(test(got), test(expected)) for test in (np.isnan, np.isposinf)):
        return False
    where = np.isfinite(expected)
    if not np.array_equal(where, np.isfinite(got)) or not where.any():
        return not where.any() and not np.isfinite(got).any()
    size = float(np.abs(expected[where]).max())
    return bool(np.abs(got[where] - expected[where]).max() <= tolerance * max(size, 1e-3))


@np.errstate(all="ignore")  # whatever the learner has set
def check(task: Task, function: Callable[..., Any]) -> Passed:
    """Check a learner's function; raise CheckFailed that says what is wrong."""
    if not callable(function):
        raise failed(task.name, f"Give the function itself, not {type(function).__name__}.")
    results, error = [], None
    for case in task.cases:
        try:
            results.append(outputs_of(task, function, case))
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
    kinds = "in float32 and float64" if task.halves else "all counts exact"
    return Passed(task.name, f"Checked on {len(task.cases)} different inputs, {kinds}.")


def _tuple(value: Any) -> tuple:
    return tuple(np.asarray(v) for v in value) if isinstance(value, tuple) else (np.asarray(value),)


def _check_order(task: Task, results: list[Any], expected: list[tuple]) -> None:
    """Say so where all outputs are right and stand in the wrong places."""
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
    """Raise CheckFailed that names the mistake in this output, or shows where it is wrong."""
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
    """Whether the mistake gives what the learner's code gave, on every input where it can run."""
    told = False
    for case, got, want in runs:
        try:
            with np.errstate(all="ignore"):
                wrong = np.asarray(make(case, want))
        except (ValueError, IndexError, TypeError, ZeroDivisionError, np.linalg.LinAlgError):
            return False
        if not same(got, wrong, 1e-6):
            return False
        told = told or not same(wrong, want)
    return told


def _candidates(task: Task, name: str) -> list[tuple[str, Callable[[Case, np.ndarray], Any]]]:
    """Return the mistakes of the catalogue, then those that any array may have."""
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


def show_case(case: Case) -> str:
    """Say what an input was: shapes of arrays, values of numbers."""
    parts = [
        f"{name} {value.shape}" if isinstance(value, np.ndarray) else f"{name} = {value}"
        for name, value in case.items()
    ]
    return "For " + ", ".join(parts) + ":"


def show_difference(name: str, got: np.ndarray, want: np.ndarray) -> str:
    """Print expected and actual values, and which entries differ."""
    with np.printoptions(precision=4, suppress=True, threshold=24, linewidth=88):
        text = f"expected {name} =\n{want}\nyours =\n{got}"
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - want)
    text += f"\nlargest difference {np.nanmax(difference, initial=0.0):.2g}"
    if want.ndim and want.size > 1:
        wrong = ~(difference <= 1e-7 * np.abs(want[np.isfinite(want)]).max(initial=1e-3))
        count = int(wrong.sum())
        if count == want.size:
            text += "\nAll entries differ."
        else:
            at = [tuple(map(int, i)) for i in np.argwhere(wrong)[:4]]
            text += f"\n{count} of {want.size} entries differ: {', '.join(map(str, at))}" + (
                ", ..." if count > 4 else ".")
    if not np.isfinite(got).all():
        text += "\nYours has nan or inf in it."
    return text


# ---- What comes after the values are right


def _check_central_differences(task: Task, results: list[list[np.ndarray]]) -> None:
    """A second opinion on gradients, which needs no reference: (f(x + h) - f(x - h)) / 2h."""
    if task.forward is None:
        return
    case, result = copy.deepcopy(task.cases[0]), results[0]
    dout = case.pop("dout")
    for name, got in zip(task.outputs, result, strict=True):
        array = case.get(name.removeprefix("d"))
        if array is None:
            continue
        slopes = numerical_gradient(
            lambda: float((task.forward(**case) * dout).sum()), array, list(np.ndindex(array.shape))
        )
        if not same(got, slopes.reshape(array.shape), 1e-5):
            raise failed(task.name, f"{name} differs from central differences.")


def _check_precision(task: Task, function: Callable[..., Any], results: list[Any]) -> None:
    """float32 in, float32 out: a NumPy float64 scalar somewhere would double all memory."""
    if not task.halves:
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


def _check_buffers(task: Task, function: Callable[..., Any]) -> None:
    """Outputs must be the caller's own: no view of an input, no array that is used again."""
    case = copy.deepcopy(task.cases[1])
    first = as_outputs(task, run(task.name, lambda: function(*case.values())), case)
    for name, got in zip(task.outputs, first, strict=True):
        for argument, value in case.items():
            if isinstance(value, np.ndarray) and got.ndim and np.shares_memory(got, value):
                raise failed(task.name, f"{name} is a view of the input {argument}: whoever "
                             "changes one changes the other. Return a new array.")
    kept = [got.copy() for got in first]
    other = {k: v + 1 if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v
             for k, v in case.items()}
    run(task.name, lambda: function(*other.values()))
    for name, got, before in zip(task.outputs, first, kept, strict=True):
        if not np.array_equal(got, before, True):
            raise failed(task.name, f"A second call changed the {name} that the first one "
                         "returned: your code returns a buffer that it uses again. Make a new "
                         "array each time.")
