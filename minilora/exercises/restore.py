"""Put back what a submission has replaced in the modules that the checks use."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Collection
from operator import attrgetter, is_

# The modules whose functions take part in a verdict.
USED = {"builtins", "copy", "hashlib", "itertools", "json", "linecache", "math", "minilora",
        "numpy", "operator", "os", "re", "traceback"}


def snapshot() -> Callable[[], None]:
    """Return a function that puts the modules of `USED` back into their present state.

    Their names, the attributes of their classes and the code of their functions are put back, and
    the settings of the interpreter. Names that are new in a module stay.
    """
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in USED]
    spaces = [(vars(module), dict(vars(module))) for module in modules]
    things = [thing for _, names in spaces for thing in names.values()]
    classes = [(cls, dict(vars(cls))) for cls in dict.fromkeys(
        thing for thing in things
        if isinstance(thing, type) and thing.__module__.partition(".")[0] in USED)]
    things += [thing for _, names in classes for thing in names.values()]
    # NumPy's functions are wrapped.
    functions = [f for f in (getattr(thing, "_implementation", thing) for thing in things)
                 if isinstance(f, types.FunctionType)]
    parts = [(name, attrgetter(name), list(map(attrgetter(name), functions)))
             for name in ("__code__", "__defaults__", "__kwdefaults__")]
    loaded, was_loaded = sys.modules, dict(sys.modules)
    path, finders, limit = list(sys.path), list(sys.meta_path), sys.getrecursionlimit()

    def restore() -> None:
        for space, names in spaces:  # first, and by a method, since builtins may be replaced
            space.update(names)
        for cls, names in classes:
            if not _same(vars(cls).values(), names.values()):
                _restore_class(cls, names)
        for name, get, before in parts:
            if not _same(list(map(get, functions)), before):
                for function, part in zip(functions, before, strict=True):
                    setattr(function, name, part)
        sys.modules = loaded
        loaded.update(was_loaded)
        sys.path, sys.meta_path = path[:], finders[:]
        sys.setrecursionlimit(limit)
        sys.settrace(None)
        sys.setprofile(None)

    return restore


def _same(now: Collection[object], before: Collection[object]) -> bool:
    """Return whether these are the same objects; fast, since there are many and few change."""
    return len(now) == len(before) and all(map(is_, now, before))


def _restore_class(cls: type, names: dict[str, object]) -> None:
    """Put the attributes of a class back, where they have changed."""
    now = dict(vars(cls))
    for name in now.keys() - names.keys():
        with contextlib.suppress(AttributeError, TypeError):  # one that Python has added
            delattr(cls, name)
    for name, value in names.items():
        if now.get(name) is not value:
            setattr(cls, name, value)
