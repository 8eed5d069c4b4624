r"""Regular expressions from files of strangers, matched in bounded time.

Python's `re` tries one way through a pattern after another, so that ten characters, such as
(.|..)+X, can keep it busy for ever. Here every part of a pattern is asked at most once for each
position in the text where it could end. The ends come in the order in which `re` would try them,
so the first is the one that `re` would find. What is still too much work is refused.

Supported are groups, alternatives, quantifiers, sets, anchors, and looking ahead and behind.
Anything else, such as flags, atomic groups and references to groups, is refused.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator

from minilora.nn.validate import CheckpointError

MAX_STEPS = 5_000_000  # for one match, or for all of them inside `bounded`; a few seconds
MAX_LENGTH, MAX_DEPTH = 20_000, 50  # of a pattern: characters, and groups inside each other
ESCAPE = re.compile(r"\\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|[^0-9])", re.DOTALL)
SET = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
COUNT = re.compile(r"\{(?!\})(\d*)(,?)(\d*)\}")
GROUP = re.compile(r"\((?:\?(?:P<\w+>|:|(<?[=!])))?")

_allowance: contextvars.ContextVar[Run | None] = contextvars.ContextVar("allowance", default=None)


class PatternError(CheckpointError):
    """A pattern is no regular expression, is not supported, or takes too much work."""


class Run:
    """The work that is allowed, and the ends that are known of a text."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.text = ""
        self.known: dict[tuple[int, int], list[int]] = {}

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise PatternError("matching the patterns takes too much work")


# The ends of a part of a pattern, from a position in the text on, in the order of `re`.
Part = Callable[[Run, int], list[int]]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let all matches inside share one bound."""
    token = _allowance.set(Run())
    try:
        yield
    finally:
        _allowance.reset(token)


def ends(pattern: str, text: str, start: int = 0) -> list[int]:
    """Return where matches of a pattern that begin at `start` can end, the first of `re` first.

    Raises PatternError.
    """
    run = _allowance.get() or Run()
    run.text, run.known = text, {}
    run.spend(1)
    return compiled(pattern)(run, start)


@functools.lru_cache(1024)
def compiled(pattern: str) -> Part:
    """Return the whole pattern as a part. Raises PatternError."""
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"a pattern has more than {MAX_LENGTH} characters")
    try:
        re.compile(pattern)  # so that what follows only meets patterns that are right
        return _Reader(pattern).alternatives(0)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{pattern[:80]!r} is no regular expression: {error}") from None


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str):
        self.pattern, self.at = pattern, 0

    def alternatives(self, depth: int) -> Part:
        """Read up to the end of the group or pattern."""
        if depth > MAX_DEPTH:
            raise PatternError(f"a pattern has more than {MAX_DEPTH} groups inside each other")
        options = [self.sequence(depth)]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            options.append(self.sequence(depth))
        return options[0] if len(options) == 1 else _remembered(
            lambda run, start: _merged(run, (option(run, start) for option in options)))

    def sequence(self, depth: int) -> Part:
        parts: list[Part] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            parts.append(self.quantified(self.atom(depth)))

        def match(run: Run, start: int) -> list[int]:
            found = [start]
            for part in parts:
                found = part(run, found[0]) if len(found) == 1 else _merged(
                    run, [part(run, at) for at in found])
                if not found:
                    break
            return found

        return match

    def atom(self, depth: int) -> Part:
        """Read a group, or one character or anchor."""
        group = GROUP.match(self.pattern, self.at)
        if group is None:
            return self.single()
        self.at = group.end()
        if self.pattern.startswith("?", self.at):
            raise PatternError(f"{self.pattern[:80]!r} has a group of a kind that is not supported")
        inner = self.alternatives(depth + 1)
        self.at += 1  # the parenthesis
        return _around(inner, group[1]) if group[1] else inner

    def single(self) -> Part:
        escape = ESCAPE.match(self.pattern, self.at) or SET.match(self.pattern, self.at)
        source = escape[0] if escape else self.pattern[self.at]
        if source == "\\":
            raise PatternError(f"{self.pattern[:80]!r} refers to a group, which is not supported")
        self.at += len(source)
        test = re.compile(source if escape or source in ".^$" else re.escape(source))

        def match(run: Run, start: int) -> list[int]:
            found = test.match(run.text, start)
            return [found.end()] if found else []

        return match

    def quantified(self, part: Part) -> Part:
        """Read what says how often the part comes, if anything does."""
        count = COUNT.match(self.pattern, self.at)
        sign = self.pattern[self.at : self.at + 1]
        if count:
            low, high = count[1] or "0", count[3] if count[2] else count[1]
            self.at = count.end()
        elif sign and sign in "*+?":
            low, high = "1" if sign == "+" else "0", "1" if sign == "?" else ""
            self.at += 1
        else:
            return part
        suffix = self.pattern[self.at : self.at + 1]
        if suffix == "+":
            raise PatternError(f"{self.pattern[:80]!r} has a possessive quantifier, which is not "
                               "supported")
        self.at += suffix == "?"
        return _repeated(part, int(low), int(high) if high else None, suffix == "?")


def _merged(run: Run, lists: Iterator[list[int]] | list[list[int]]) -> list[int]:
    """Return the ends in order, each once."""
    found: dict[int, None] = {}
    for some in lists:
        run.spend(1 + len(some))
        found.update(dict.fromkeys(some))
    return list(found)


def _remembered(part: Part) -> Part:
    def match(run: Run, start: int) -> list[int]:
        key = id(match), start
        if key not in run.known:
            run.known[key] = part(run, start)
        return run.known[key]

    return match


def _around(part: Part, kind: str) -> Part:
    """Look ahead (= or !) or behind (<= or <!) of a position."""

    def match(run: Run, start: int) -> list[int]:
        starts = range(start + 1) if kind[0] == "<" else [start]
        found = any(start in part(run, at) if kind[0] == "<" else part(run, at) for at in starts)
        run.spend(len(starts))
        return [start] if bool(found) == kind.endswith("=") else []

    return _remembered(match)


def _repeated(part: Part, low: int, high: int | None, lazy: bool) -> Part:
    """The part `low` to `high` times. A state is how often it came, up to what matters, and where.

    After `low` times, a repetition that does not get on in the text is the last one, as in `re`;
    so there are at most len(text) more. States lead to later ones, and are worked out from the last
    one back.
    """

    def match(run: Run, start: int) -> list[int]:
        n = len(run.text) + 1
        least = min(low, n)
        endless = high is None or high - low >= n
        most = least if high is None or endless else least + high - low
        last = most + 1  # the count of a state after which there is no other
        steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
        waiting = [(start, 0)]
        while waiting:
            at, count = state = waiting.pop()
            if state in steps:
                continue
            more = count < most or endless and count != last
            steps[state] = [(end, min(count + 1, most) if end > at or count < least else last)
                            for end in (part(run, at) if more else [])]
            run.spend(1 + len(steps[state]))
            waiting += steps[state]
        found: dict[tuple[int, int], list[int]] = {}
        for state in sorted(steps, reverse=True):
            here = [[state[0]]] if state[1] >= least else []
            later = [found[step] for step in steps[state]]
            found[state] = _merged(run, here + later if lazy else later + here)
        return found[start, 0]

    return _remembered(match)
