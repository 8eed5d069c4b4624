"""Tell whether an answer was written in the submission, by where its code comes from."""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilora.nn import module

PACKAGE = str(Path(__file__).parents[1]) + os.sep
BASE = str(module.__file__)  # Module, of which learners' layers may be made
METHODS = ("__init__", "__call__", "forward", "merge", "unmerge")  # that a check may call
WRAPPERS = (types.MethodType, staticmethod, classmethod)


def foreign(answer: Any, names: set[str]) -> str:
    """Return "" if an answer is the submission's own, or else a phrase that says whose it is.

    Parameters
    ----------
    answer
        A function, a class, another callable, or data, which has no author.
    names
        The file names of the submission's code.
    """
    if not callable(answer):
        return ""
    codes = list(_codes(answer, set()))
    for code in codes:
        if code.co_filename.startswith(PACKAGE) and code.co_filename != BASE:
            path = Path(code.co_filename).relative_to(Path(PACKAGE).parent).with_suffix("")
            return f"it is minilora's own, {'.'.join(path.parts)}.{code.co_qualname}"
    own = any(code.co_filename in names for code in codes)
    return "" if own else "it comes from another module"


def _codes(thing: Any, seen: set[int]) -> Iterator[types.CodeType]:
    """Yield the code that runs when a thing is called, however it is wrapped."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    kind = type(thing)  # and not thing.__class__, which may be made up
    inner: list[Any] = []
    if issubclass(kind, types.FunctionType):
        yield thing.__code__
    elif issubclass(kind, functools.partial):
        inner = [thing.func]
    elif issubclass(kind, WRAPPERS):
        inner = [thing.__func__]
    elif issubclass(kind, type):
        inner = [inspect.getattr_static(thing, name, None) for name in METHODS]
    elif callable(thing):
        inner = [kind]
        if kind.__module__ != "submission":  # such as np.vectorize, which keeps a function
            inner += getattr(thing, "__dict__", {}).values()
    if hasattr(thing, "__wrapped__"):  # by functools.wraps or functools.cache
        inner.append(thing.__wrapped__)
    for part in inner:
        yield from _codes(part, seen)

