"""Tasks for a language model, made of nothing but code: pairs of a prompt and an answer.

`commands` is a clean task: what people say to a house, and a line of JSON. `docstrings` is not: a
signature from the standard library, and the first line of its docstring, which nobody could know
for certain. Both have held-out parts.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """Prompts with their answers.

    Attributes
    ----------
    training : list of Pair
    held_out : dict
        {name: list of Pair}, for each kind of held-out pair.
    instruction : str
        What one would tell a model that has not been trained for the task.
    exact : bool
        Whether each prompt has only one right answer.
    """

    training: list[Pair]
    held_out: dict[str, list[Pair]]
    instruction: str
    exact: bool = field(default=True)


# ---- Spoken commands -> JSON

ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "hallway", "office", "attic", "nursery",
         "cellar", "porch")
OTHER_ROOMS = ("library", "garden", "sauna", "workshop")  # for held-out commands only
POLITE = ("{}.", "{}.", "Please {}.", "Could you {}?", "Hey, {}.")
SWITCH = {"state": ("on", "off")}
FORMS: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("light", ("turn {state} the lights in the {room}", "switch the {room} lights {state}",
               "turn the light in the {room} {state}"), SWITCH),
    ("dim", ("dim the {room} lights to {percent} percent",
             "set the light in the {room} to {percent}%"), {"percent": range(5, 100, 5)}),
    ("heat", ("heat the {room} to {degrees} degrees", "make it {degrees} degrees in the {room}",
              "set the thermostat in the {room} to {degrees}"), {"degrees": range(12, 27)}),
    ("timer", ("set a timer for {minutes} minutes", "wake me in {minutes} minutes",
               "remind me in {minutes} minutes"), {"minutes": range(2, 90)}),
    ("play", ("play {what} in the {room}", "let me hear {what} in the {room}"),
     {"what": ("jazz", "Bach", "rock", "the news", "piano music", "the Beatles", "folk songs")}),
    ("blinds", ("{state} the blinds in the {room}", "{state} the {room} blinds"),
     {"state": ("open", "close")}),
)


def command(rng: random.Random, rooms: tuple[str, ...]) -> Pair:
    """Return a random command and its JSON, such as {"do": "timer", "minutes": 85}."""
    name, phrases, slots = rng.choice(FORMS)
    phrase = rng.choice(phrases)
    values = {"room": rng.choice(rooms)} if "{room}" in phrase else {}
    values |= {slot: rng.choice(choices) for slot, choices in slots.items()}
    text = rng.choice(POLITE).format(phrase.format(**values))
    return text[0].upper() + text[1:], json.dumps({"do": name, **values})


def commands(training: int = 150, known: int = 33, unknown: int = 15, seed: int = 0) -> Task:
    """Make the task of turning commands to a house into JSON.

    Parameters
    ----------
    training : int
        Pairs to train on.
    known, unknown : int
        Held-out pairs with rooms that occur in training, and with rooms that do not.
    seed : int
        Of the random choices. No prompt occurs twice.
    """
    rng, seen = random.Random(seed), set()

    def draw(count: int, rooms: tuple[str, ...], needs_room: bool = False) -> list[Pair]:
        pairs: list[Pair] = []
        while len(pairs) < count:
            pair = command(rng, rooms)
            if pair[0] not in seen and ("room" in pair[1] or not needs_room):
                seen.add(pair[0])
                pairs.append(pair)
        return pairs

    pairs = draw(training, ROOMS)
    return Task(pairs, {"known rooms": draw(known, ROOMS),
                        "other rooms": draw(unknown, OTHER_ROOMS, needs_room=True)},
                "Turn the command into one line of JSON.")


# ---- Signatures -> docstrings

MODULES = (
    "argparse ast bisect calendar cmd collections configparser contextlib copy csv "
    "dataclasses datetime decimal difflib doctest email.utils fileinput fnmatch fractions "
    "functools getopt gettext glob gzip heapq html http.client imaplib inspect ipaddress json "
    "locale logging mailbox mimetypes netrc numbers operator os pathlib pickletools plistlib "
    "poplib pprint profile pstats queue quopri random re reprlib sched secrets selectors "
    "shelve shlex shutil smtplib socket socketserver sqlite3 ssl stat statistics string "
    "subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback types "
    "typing unittest urllib.parse urllib.request uuid warnings wave weakref xml.dom.minidom "
    "xml.etree.ElementTree zipfile zipimport "
).split()


def docstrings(training: int = 400, held_out: int = 48, seed: int = 0) -> Task:
    """Make the task of writing the first line of a function's docstring from its signature.

    Parameters
    ----------
    training, held_out : int
        Pairs to train on, and others.
    seed : int
        Of the order of the functions, all from the standard library.
    """
    pairs = sorted(dict(_documented()).items())
    random.Random(seed).shuffle(pairs)
    lines = {line for _, line in pairs[:training]}
    others = [pair for pair in pairs[training:] if pair[1] not in lines]
    return Task(pairs[:training], {"other functions": others[:held_out]},
                "Write the first line of this function's docstring.", exact=False)


def _documented() -> Iterator[Pair]:
    """Yield (signature, first line) of short, documented functions and methods."""
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # some systems lack a few
            continue
        classes = [value for _, value in inspect.getmembers(module, inspect.isclass)]
        for owner in [module, *classes]:
            for title, function in sorted(vars(owner).items()):
                if inspect.isfunction(function) and function.__doc__ and title[0] != "_":
                    signature = f"def {title}{inspect.signature(function)}"
                    line = function.__doc__.strip().partition("\n")[0].strip()
                    if (15 < len(line) < 75 and line.endswith(".") and line.isascii()
                            and len(signature) < 75 and " at 0x" not in signature):
                        yield signature, line


TASKS = {"commands": commands, "docstrings": docstrings}
