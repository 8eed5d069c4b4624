"""Exercise 10: count parameters, and find errors in a published table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.exercises.engine import check
from minilora.exercises.gpt_count import counted_blocks, counted_with, describe_count, gpt_count
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
        *(Mistake(says, lambda shapes, rank, more=more: sum(
            rank * (n + m) + more(n, m, rank) for n, m in shapes)) for says, more in (
            ("biases are counted; LoRA has none.", lambda n, m, r: m),
            ("biases are counted; LoRA has none.", lambda n, m, r: n),
            ("biases are counted, and twice; LoRA has none.", lambda n, m, r: 2 * m),
            ("biases are counted; LoRA has none.", lambda n, m, r: n + m),
            ("biases are counted; LoRA has none.", lambda n, m, r: r),
            ("biases are counted; LoRA has none.", lambda n, m, r: r + m),
            ("1 is added for each matrix: the scale is no parameter.", lambda n, m, r: 1),
            ("r² is added for each matrix; A and B is all there is.", lambda n, m, r: r * r),
            ("the frozen matrix is counted as well; only A and B are LoRA's.",
             lambda n, m, r: n * m))),
        *(Mistake(says, lambda shapes, rank, count=count: sum(
            count(n, m, rank) for n, m in shapes)) for says, count in (
            ("r, n and m are added up; A has n times r numbers, B has r times m.",
             lambda n, m, r: r + n + m),
            ("r is multiplied by m only: brackets are missing, r * (n + m).",
             lambda n, m, r: n + m * r),
            ("r is multiplied by n only: brackets are missing, r * (n + m).",
             lambda n, m, r: n * r + m),
            ("this is how many numbers are saved, n m - r (n + m).",
             lambda n, m, r: n * m - r * (n + m)),
            ("A is counted twice.", lambda n, m, r: 2 * n * r + r * m),
            ("B is counted twice.", lambda n, m, r: n * r + 2 * r * m),
            ("sums are multiplied: A has n times r numbers, B has r times m.",
             lambda n, m, r: (n + r) * (r + m)),
            ("r, n, r and m are added up; A has n times r numbers, B has r times m.",
             lambda n, m, r: n + r + r + m),
            ("it is divided by the rank; multiply.", lambda n, m, r: (n + m) / r),
            ("only the smaller of n and m is counted.", lambda n, m, r: r * min(n, m)),
            ("only the larger of n and m is counted.", lambda n, m, r: r * max(n, m)),
            ("it takes every matrix for square, as wide as the larger of n and m.",
             lambda n, m, r: 2 * r * max(n, m)),
            ("it takes every matrix for square, as wide as the smaller of n and m.",
             lambda n, m, r: 2 * r * min(n, m)))),
        Mistake("the rank is in it twice.",
                lambda shapes, rank: sum(rank**2 * (n + m) for n, m in shapes)),
        Mistake("the sum is multiplied by the number of matrices.",
                lambda shapes, rank: len(shapes) * sum(rank * (n + m) for n, m in shapes)),
        Mistake("this is the mean over the matrices; add them up.", lambda shapes, rank: sum(
            rank * (n + m) for n, m in shapes) / max(len(shapes), 1)),
        Mistake("matrices of one shape are counted once only; each has its own A and B.",
                lambda shapes, rank: sum(rank * (n + m) for n, m in set(shapes))),
        Mistake("this is in millions; return the number itself.",
                lambda shapes, rank: sum(rank * (n + m) for n, m in shapes) / 1e6),
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


GPT_PARAMETERS = Task(
    name="gpt_parameters",
    outputs=("count",),
    reference=gpt_count,
    cases=[dict(zip(("vocab_size", "context_length", "d_model", "n_layers"), c, strict=True))
           for c in [(5, 3, 2, 1), (96, 64, 64, 2), (96, 128, 128, 4), (50257, 1024, 768, 12),
                     (50257, 1024, 1600, 48), (7, 11, 13, 5), (19, 3, 5, 7)]],
    mistakes={"count": [
        Mistake("the head is counted; it is tied to the token embedding, one matrix for both.",
                counted_with(V_d=1)),
        Mistake("the position embedding is missing: one row for each position.",
                counted_with(T_d=-1)),
        Mistake("the token embedding is missing.", counted_with(V_d=-1)),
        Mistake("the last LayerNorm, ln_f, is missing.", counted_with(d=-2)),
        Mistake("4 d are missing in each block: the biases of attention, the MLP's first bias, or "
                "the weights and biases of the two LayerNorms.", counted_with(L_d=-4)),
        Mistake("all LayerNorms are missing: two in each block, and one at the end.",
                counted_with(L_d=-4, d=-2)),
        Mistake("LayerNorms have a weight and a bias, 2 d each.", counted_with(L_d=-2, d=-1)),
        Mistake("2 d are missing in each block: it has two LayerNorms, each with a weight and a "
                "bias.", counted_with(L_d=-2)),
        Mistake("all biases of the linear layers are missing: 4 d in attention, 5 d in the MLP.",
                counted_with(L_d=-9)),
        Mistake("the biases of the MLP are missing: 4 d and d.", counted_with(L_d=-5)),
        Mistake("the MLP is four times as wide: it has two matrices of 4 d².",
                counted_with(L_d_d=-4)),
        Mistake("one d² is missing in each block, as of the output projection of attention.",
                counted_with(L_d_d=-1)),
        Mistake("one d² + d is missing in each block, as of the output projection of attention.",
                counted_with(L_d_d=-1, L_d=-1)),
        Mistake("biases and LayerNorms are missing.", counted_with(L_d=-13, d=-2)),
        Mistake("3 d are missing in each block: the biases of q, k and v, or the MLP's first bias, "
                "which has 4 d numbers and not d.", counted_with(L_d=-3)),
        Mistake("one block is counted too few.", counted_blocks(lambda n: n - 1)),
        Mistake("one block is counted too many.", counted_blocks(lambda n: n + 1)),
        Mistake("only one block is counted; there are n_layers.", counted_blocks(lambda n: 1)),
        Mistake("the blocks are missing.", counted_blocks(lambda n: 0)),
        Mistake("ln_f is counted for every block; it comes once, at the end.",
                lambda vocab_size, context_length, d_model, n_layers: gpt_count(
                    vocab_size, context_length, d_model, n_layers) + 2 * d_model * (n_layers - 1)),
        Mistake("the embeddings are counted for every block; they come once.",
                lambda vocab_size, context_length, d_model, n_layers: gpt_count(
                    vocab_size, context_length, d_model, n_layers)
                + (vocab_size + context_length) * d_model * (n_layers - 1)),
        Mistake("the position embedding is counted for every block; it comes once.",
                lambda vocab_size, context_length, d_model, n_layers: gpt_count(
                    vocab_size, context_length, d_model, n_layers)
                + context_length * d_model * (n_layers - 1)),
        Mistake("the mask is counted; it is no parameter.",
                lambda vocab_size, context_length, d_model, n_layers: gpt_count(
                    vocab_size, context_length, d_model, n_layers) + context_length**2),
        Mistake("the position embedding has d numbers for each position.",
                lambda vocab_size, context_length, d_model, n_layers: gpt_count(
                    vocab_size, context_length, d_model, n_layers)
                - context_length * (d_model - 1)),
    ]},
    read={"count": "Embeddings (V + T) d; a block 12 d² + 9 d (biases) + 4 d (norms); ln_f 2 d."},
    float32=False,
    describe=describe_count,
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


def _digits(row: dict[str, Any]) -> int:
    """Return how many digits are printed after the point."""
    return len(row["printed"].rstrip("M").partition(".")[2])


def _follows(row: dict[str, Any], count: float | None = None, digits: int | None = None) -> bool:
    """Return whether the count, rounded to as many digits as are printed, is the printed one."""
    digits = _digits(row) if digits is None else digits
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
    exact = {"name": "exact", "d": 12_500, "layers": 10, "matrices": 2, "rank": 2}
    return [*made, exact | {"printed": "1.0M"}, exact | {"name": "also exact", "printed": "1.00M"},
            exact | {"name": "cut off", "d": 15_750, "printed": "1.2M"},  # 1,260,000
            exact | {"name": "rounded up", "d": 15_500, "printed": "1.3M"}]  # 1,240,000


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

    def differ(wrong: Callable[[float, float, int], bool]) -> list[list]:
        """List the rows whose count in millions, printed number and digits are `wrong`."""
        return [sorted(r["name"] for r in t if wrong(
            _count(r) / 1e6, float(r["printed"][:-1]), _digits(r))) for t in tables]

    if answers == [sorted(r["name"] for r in t) for t in tables]:
        raise failed(_NAME, "Every row is listed, also those that are right to the last digit, "
                     "such as 2 * 10 layers * 2 matrices * 12,500 * rank 2 = 1,000,000, printed "
                     "1.0M. Does the count have all its factors, and is like compared with like: "
                     "numbers, or texts with the M and as many digits as are printed?", _READ)
    causes = (
        (differ(lambda x, p, _: abs(x - p) > 1e-9 * p), "you do not round: a printed 0.3M is right "
         "for anything from 0.25M to 0.35M."),
        (differ(lambda x, p, k: int(x * 10**k + 1e-6) != round(p * 10**k)),
         "you cut the digits off, or round down; 0.29M is 0.3M."),
        (differ(lambda x, p, k: int(x * 10**k + 1 - 1e-6) != round(p * 10**k)),
         "you round up; round to the nearest."),
        *((differ(lambda x, p, _, share=share: abs(x / p - 1) > share),
           f"you allow a difference of {share:.0%}; what is allowed depends on the digits that "
           "are printed.") for share in (0.01, 0.02, 0.05, 0.1, 0.2)),
        *((differ(lambda x, p, _, share=share: abs(x - p) > share),
           f"you allow a difference of {share:g}M; what is allowed depends on the digits that "
           "are printed.") for share in (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)),
        ([[] for _ in tables], "no row is listed."),
        (lists(lambda r: 2 * _count(r)), "there is a factor 2 too much."),
        (lists(lambda r: _count(r) * r["rank"]), "the rank is in it twice."),
        (lists(lambda r: _count(r) / r["matrices"] * 2), "you count two matrices in every row."),
        (lists(lambda r: 2 * r["layers"] * r["d"]), "matrices and rank are missing."),
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
