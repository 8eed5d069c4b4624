"""Tables in Markdown that can be read as they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def line(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return "| " + " | ".join(cells) + " |"


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return rows, of which the first is the head, as a table with aligned columns.

    Parameters
    ----------
    rows : sequence of sequence of str
        The cells.
    left : collection of int
        The columns that are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [line([cell.ljust(width) if i in left else cell.rjust(width)
                   for i, (cell, width) in enumerate(zip(row, widths, strict=True))])
             for row in rows]
    lines.insert(1, "|" + "|".join(
        "-" * (width + 2) if i in left else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)) + "|")
    return "\n".join(lines)
