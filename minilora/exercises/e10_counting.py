"""Exercise 10: count parameters, and find errors in a published table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.engine import check
from minilora.exercises.outcome import Passed, failed, run
from minilora.exercises.task import Mistake, Task

NUMBER = 10
# Name of the check: the name that a submission must define.
DEFINED = {"lora_parameters": "lora_parameters", "gpt_parameters": "gpt_parameters",
           "find_errors": "find_errors"}

# ---- The parameters of LoRA


LORA_PARAMETERS = Task(
    name="lora_parameters",
    outputs=("count",),
    reference=lambda shapes, rank: sum(rank * (n + m) for n, m in shapes),
    cases=[{"shapes": shapes, "rank": rank} for shapes, rank in [
        ([(3, 5)], 2), ([(4, 4)], 1), ([(3, 5), (5, 3), (7, 2)], 4), ([(768, 768)] * 24, 8),
        ([(768, 3072), (3072, 768)] * 12, 16), ([], 3)]],
    mistakes={"count": [
        Mistake("only A is counted; B has r * m numbers.",
                lambda shapes, rank: sum(rank * n for n, _ in shapes)),
        Mistake("only B is counted; A has n * r numbers.",
                lambda shapes, rank: sum(rank * m for _, m in shapes)),
        Mistake("this counts the whole matrices, n * m.",
                lambda shapes, rank: sum(n * m for n, m in shapes)),
        Mistake("n and m are multiplied: A and B are beside each other, n * r + r * m.",
                lambda shapes, rank: sum(rank * n * m for n, m in shapes)),
        Mistake("it takes every matrix for square: 2 * n * r is right only where n = m.",
                lambda shapes, rank: sum(2 * rank * n for n, _ in shapes)),
        Mistake("it takes every matrix for square: 2 * m * r is right only where n = m.",
                lambda shapes, rank: sum(2 * rank * m for _, m in shapes)),
        Mistake("only the first matrix is counted.",
                lambda shapes, rank: sum(rank * (n + m) for n, m in shapes[:1])),
        Mistake("only the last matrix is counted.",
                lambda shapes, rank: sum(rank * (n + m) for n, m in shapes[-1:])),
        Mistake("the rank is missing.", lambda shapes, rank: sum(n + m for n, m in shapes)),
        Mistake("biases are counted; LoRA has none.",
                lambda shapes, rank: sum(rank * (n + m) + m for n, m in shapes)),
    ]},
    read={"count": "A is (n, r) and B is (r, m): r (n + m) numbers for each matrix."},
    float32=False,
)


def lora_parameters(function: Callable[..., Any]) -> Passed:
    """Check exercise 10: count = lora_parameters(shapes, rank).

    Parameters
    ----------
    function
        Takes the shapes (n, m) of the adapted matrices and the rank; returns a number.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(LORA_PARAMETERS, function)


# ---- The parameters of a GPT


def _gpt_count(vocab_size: int, context_length: int, d_model: int, n_layers: int) -> int:
    """Return the parameters of a GPT-2 whose head is tied to the token embedding."""
    d = d_model
    block = (4 * d * d + 4 * d) + (8 * d * d + 5 * d) + 2 * 2 * d
    return vocab_size * d + context_length * d + n_layers * block + 2 * d


def _gpt_with(**changes: int) -> Callable[..., int]:
    """Return a function that adds these multiples of V d, T d, d, L d or L d d to the count."""

    def wrong(vocab_size: int, context_length: int, d_model: int, n_layers: int) -> int:
        count = _gpt_count(vocab_size, context_length, d_model, n_layers)
        of = {"V d": vocab_size * d_model, "T d": context_length * d_model, "d": d_model,
              "L d": n_layers * d_model, "L d d": n_layers * d_model**2}
        return count + sum(times * of[name.replace("_", " ")] for name, times in changes.items())

    return wrong


GPT_PARAMETERS = Task(
    name="gpt_parameters",
    outputs=("count",),
    reference=_gpt_count,
    cases=[dict(zip(("vocab_size", "context_length", "d_model", "n_layers"), c, strict=True))
           for c in [(5, 3, 2, 1), (96, 64, 64, 2), (96, 128, 128, 4), (50257, 1024, 768, 12),
                     (50257, 1024, 1600, 48), (7, 11, 13, 5)]],
    mistakes={"count": [
        Mistake("the head is counted; it is tied to the token embedding, one matrix for both.",
                _gpt_with(V_d=1)),
        Mistake("the position embedding is missing: one row for each position.", _gpt_with(T_d=-1)),
        Mistake("the token embedding is missing.", _gpt_with(V_d=-1)),
        Mistake("the last LayerNorm, ln_f, is missing.", _gpt_with(d=-2)),
        Mistake("4 d are missing in each block: the biases of attention, or the weights and biases "
                "of the two LayerNorms.", _gpt_with(L_d=-4)),
        Mistake("all LayerNorms are missing: two in each block, and one at the end.",
                _gpt_with(L_d=-4, d=-2)),
        Mistake("LayerNorms have a weight and a bias, 2 d each.", _gpt_with(L_d=-2, d=-1)),
        Mistake("each block has two LayerNorms.", _gpt_with(L_d=-2)),
        Mistake("all biases of the linear layers are missing: 4 d in attention, 5 d in the MLP.",
                _gpt_with(L_d=-9)),
        Mistake("the biases of the MLP are missing: 4 d and d.", _gpt_with(L_d=-5)),
        Mistake("the MLP is four times as wide: it has two matrices of 4 d².", _gpt_with(L_d_d=-4)),
        Mistake("the output projection of attention is missing.", _gpt_with(L_d_d=-1)),
        Mistake("the output projection of attention is missing.", _gpt_with(L_d_d=-1, L_d=-1)),
        Mistake("biases and LayerNorms are missing.", _gpt_with(L_d=-13, d=-2)),
        Mistake("3 d are missing in each block: the biases of q, k and v, or the MLP's first bias, "
                "which has 4 d numbers and not d.", _gpt_with(L_d=-3)),
    ]},
    read={"count": "Embeddings (V + T) d; a block 12 d² + 9 d (biases) + 4 d (norms); ln_f 2 d."},
    float32=False,
)


def gpt_parameters(function: Callable[..., Any]) -> Passed:
    """Check exercise 10: gpt_parameters(vocab_size, context_length, d_model, n_layers).

    Parameters
    ----------
    function
        Takes the four sizes of a GPT; returns the number of its parameters.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    return check(GPT_PARAMETERS, function)


# ---- Errors in a published table

# Hu et al. 2021, tables 2 to 4 and appendix D.4: LoRA on `matrices` square matrices of width d in
# each layer, and the number of parameters as printed.
TABLE: list[dict[str, Any]] = [
    {"name": "RoBERTa base", "d": 768, "layers": 12, "matrices": 2, "rank": 8, "printed": "0.3M"},
    {"name": "RoBERTa large", "d": 1024, "layers": 24, "matrices": 2, "rank": 8, "printed": "0.8M"},
    {"name": "GPT-2 medium", "d": 1024, "layers": 24, "matrices": 2, "rank": 4, "printed": "0.35M"},
    {"name": "GPT-2 large", "d": 1280, "layers": 36, "matrices": 2, "rank": 4, "printed": "0.77M"},
    {"name": "GPT-3, r=1", "d": 12288, "layers": 96, "matrices": 2, "rank": 1, "printed": "4.7M"},
    {"name": "GPT-3, r=8", "d": 12288, "layers": 96, "matrices": 2, "rank": 8, "printed": "37.7M"},
    {"name": "GPT-3, r=2 on four", "d": 12288, "layers": 96, "matrices": 4, "rank": 2,
     "printed": "37.7M"},
]
_NAME = "find_errors"
_READ = "2 * layers * matrices * d * r, rounded to as many digits as are printed."


def find_errors(function: Callable[[list[dict[str, Any]]], list[str]]) -> Passed:
    """Check exercise 10: names = find_errors(table).

    Parameters
    ----------
    function
        Takes a table such as `TABLE`; returns the names of the rows whose printed number does
        not follow from the other columns.

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    made = _made_table()
    tables = (TABLE, made, made[:2], [])
    answers = [_answer(function, table) for table in tables]
    _name_cause(tables, answers)
    for table, got in zip(tables, answers, strict=True):
        want = [row["name"] for row in table if not _follows(row)]
        for row in table:
            facts = f"{row['name']}: {_count(row):,} parameters, printed {row['printed']}"
            if row["name"] in got and row["name"] not in want:
                raise failed(_NAME, f"{facts}. That is right when rounded, yet you list it.", _READ)
            if row["name"] in want and row["name"] not in got:
                raise failed(_NAME, f"{facts}. That is no rounding, yet you do not list it.", _READ)
        if got != sorted(want):
            raise failed(_NAME, f"Return the names of the wrong rows, {want}; yours are {got}.")
    return Passed(_NAME, "Checked on the paper's table and on others.")


def _count(row: dict[str, Any]) -> int:
    """Return the number of LoRA parameters that a row describes."""
    return 2 * row["layers"] * row["matrices"] * row["d"] * row["rank"]


def _follows(row: dict[str, Any], count: float | None = None, digits: int | None = None) -> bool:
    """Return whether the count, rounded to as many digits as are printed, is the printed one."""
    digits = len(row["printed"].rstrip("M").partition(".")[2]) if digits is None else digits
    return f"{(_count(row) if count is None else count) / 1e6:.{digits}f}M" == row["printed"]


def _made_table() -> list[dict[str, Any]]:
    """Return random rows, some of them wrong, which nobody can know by heart."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(12):
        row = {"name": f"row {i}", "d": int(rng.integers(10, 2000)) * 8, "layers": 6 * (i + 1),
               "matrices": 1 + i % 4, "rank": 2 ** (i % 5)}
        wrong = (1.0, 1.0, 0.5, 1.08)[i % 4]
        made.append(row | {"printed": f"{wrong * _count(row) / 1e6:.2f}M"})
    return made


def _answer(function: Callable[..., Any], table: list[dict[str, Any]]) -> list[str]:
    """Return the sorted names that the learner's function gives for a table."""
    given = copy.deepcopy(table)
    got = run(_NAME, lambda: function(given))
    if given != table:
        raise failed(_NAME, "It changes the table that it was given.")
    if got is None:
        raise failed(_NAME, "It returns nothing; return the list of names.")
    if not isinstance(got, (list, tuple, set)) or not all(isinstance(x, str) for x in got):
        raise failed(_NAME, f"Return a list of names (text); yours is {str(got)[:80]}.")
    return sorted(map(str.__str__, got))  # plain ones, which compare as text


def _name_cause(tables: tuple[list[dict[str, Any]], ...], answers: list[list[str]]) -> None:
    """Raise CheckFailed if a common mistake explains the answers for every table."""

    def lists(count: Callable[[dict[str, Any]], float], digits: int | None = None) -> list[list]:
        return [sorted(r["name"] for r in t if not _follows(r, count(r), digits)) for t in tables]

    causes = (
        ([sorted(r["name"] for r in t if _follows(r)) for t in tables],
         "you list the rows that are right."),
        (lists(lambda r: _count(r) / 2), "the factor 2 is missing: A and B, d * r each."),
        (lists(lambda r: _count(r) / r["matrices"]), "the matrices are not counted."),
        (lists(lambda r: _count(r) / r["layers"]), "the layers are not counted."),
        (lists(lambda r: _count(r) / r["rank"]), "the rank is missing."),
        (lists(lambda r: _count(r) * r["d"]), "this counts d * d for a matrix."),
        (lists(_count, 1), "you round to one digit; some rows are printed with two."),
        (lists(_count, 2), "you round to two digits; some rows are printed with one."),
        (lists(lambda r: _count(r) * 1e6 / 2**20), "a million is 1e6, not 2**20."),
    )
    fitting = [text for listed, text in causes if listed == answers != lists(_count)]
    if fitting:
        raise failed(_NAME, "Wrong rows are listed: " + " Or: ".join(fitting), _READ)
