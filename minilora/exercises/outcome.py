"""The outcome of a check, and the call of a learner's code."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = str(Path(__file__).parent)


def after_call() -> None:
    """Run after each call of the learner's code; the grader puts back what the code replaced."""


class CheckFailed(AssertionError):
    """A wrong answer. A notebook shows its message without a stack trace.

    Attributes
    ----------
    inputs
        The arguments on which the function was wrong, by name, if they are known.
    """

    inputs: dict[str, Any] | None = None

    def _render_traceback_(self, *_: Any) -> list[str]:
        """Return the lines that IPython shows instead of a stack trace."""
        return str(self).split("\n")


class NoResult(CheckFailed):
    """The code returned nothing to compare on one input; other inputs may still explain why."""


@dataclass(frozen=True)
class Passed:
    """The result of a check if the answer is correct.

    Parameters
    ----------
    name
        Name of the function or class that was checked.
    what
        A sentence saying what was checked.
    """

    name: str
    what: str
    passed: bool = True

    def __repr__(self) -> str:
        return f"{self.name}: correct. {self.what}"


def failed(
    name: str, text: str, read: str = "", kind: type[CheckFailed] = CheckFailed
) -> CheckFailed:
    """Return the error for a wrong answer.

    Parameters
    ----------
    name
        Name of the function or class that was checked.
    text
        What is wrong.
    read
        What to read again; "" leaves that line out.
    kind
        Class of the error.
    """
    return kind(f"{name}: not yet.\n{text}" + (f"\nRead again: {read}" if read else ""))


def either(causes: Iterable[str]) -> str:
    """Return the causes that explain a mistake equally well as one text; "" if there are none."""
    return " Or: ".join(dict.fromkeys(causes))


def array_of(name: str, what: str, value: Any) -> np.ndarray:
    """Return what the learner's code returned as an array of numbers.

    Parameters
    ----------
    name
        Name of the function or class that is checked.
    what
        Name of the value.
    value
        What was returned.

    Raises
    ------
    CheckFailed
        If these are no numbers.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        array = np.asarray(None)
    if array.dtype.kind not in "fiub":
        raise failed(name, f"{what} should be numbers, yours is {value!r:.80}.")
    return array


def run(name: str, call: Callable[[], Any]) -> Any:
    """Call the learner's code and return its result.

    Parameters
    ----------
    name
        Name of the function or class that is checked.
    call
        Runs the learner's code.

    Raises
    ------
    CheckFailed
        If the code raises an error; the message shows the learner's line.
    """
    done = after_call  # now, before the code can replace it
    try:
        with np.errstate(all="ignore"):
            return call()
    except CheckFailed:
        raise
    except NotImplementedError:
        raise CheckFailed(f"{name}: not implemented yet. Fill in the gap and run it again."
                          ) from None
    except RecursionError:
        raise failed(name, "Your code calls itself endlessly.") from None
    except Exception as error:
        raise failed(name, describe_exception(error), kind=NoResult) from None
    finally:
        done()


def describe_exception(error: BaseException) -> str:
    """Return what was raised, and the learner's line that raised it."""
    try:
        words = str(error)[:500]
    except Exception:  # from a __str__ of the learner's
        words = "(its text cannot be shown)"
    text = f"Your code raised {type(error).__name__}: {words}{_why_shapes_differ(words)}"
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(HERE) and "site-packages" not in frame.filename
    ]
    if isinstance(error, SyntaxError) or not frames:
        return text
    own = [f for f in frames if str(Path(HERE).parent) not in f.filename] or frames
    line = (own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno or 0)).strip()
    return f"{text}\nin line {own[-1].lineno}, in {own[-1].name}:\n    {line}"


def _why_shapes_differ(words: str) -> str:
    """Return what NumPy's message about shapes means, on a new line; "" for other messages."""
    if sizes := re.search(r"^matmul: .*\(size (\d+) is different from (\d+)\)", words):
        return (f"\nIn a product (@) the left array has {sizes[2]} columns and the right one "
                f"{sizes[1]} rows: these must be equal. Is a transpose (.T) missing or too much, "
                "or are they the wrong way round?")
    if shapes := re.search(r"broadcast together with shapes \(([\d,]+)\) \(([\d,]+)\)", words):
        left, right = ([n for n in shape.split(",") if n] for shape in shapes.groups())
        if right in (left[:-1], left[1:]) or left in (right[:-1], right[1:]):
            return ("\nOne of them has an axis less. If it is a max, mean or sum over that axis, "
                    "keepdims=True keeps it, with length 1.")
    return ""
