"""Colours, line styles and marks that the figures of plots.py share.

Colours are Okabe and Ito's, which people with any kind of colour vision can tell apart; line
styles and markers differ as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (1, 3)))
MARKERS = "osD^vP*"
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++", "oo")
GREY = "#666666"


def colour(i: int) -> str:
    """Return the colour of the i-th curve; after seven they repeat, as do markers and hatches."""
    return COLOURS[i % len(COLOURS)]


def marker(i: int) -> str:
    """Return the marker of the i-th curve."""
    return MARKERS[i % len(MARKERS)]


def line(i: int) -> dict[str, Any]:
    """Return the colour and the line style of the i-th curve, as keywords of `Axes.plot`."""
    return {"color": colour(i), "linestyle": STYLES[i % len(STYLES)]}


def bar(i: int) -> dict[str, Any]:
    """Return colour, hatch and edges of the i-th kind of bar, as keywords of `Axes.bar`."""
    return {"color": colour(i), "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white",
            "linewidth": 0.5}


def mark_loss(ax: Axes, loss: float, text: str) -> None:
    """Draw a dotted horizontal line at `loss`, with a text above its left end."""
    ax.axhline(loss, color=GREY, linestyle=":", linewidth=1.2)
    ax.text(0.01, loss, text, color=GREY, fontsize=9, va="bottom",
            transform=ax.get_yaxis_transform())


def mark_top(ax: Axes, points: dict[float, float], color: str) -> None:
    """Mark each x of {x: y} with a cross at the top of the axes, and write y below it."""
    top = ax.get_xaxis_transform()
    for x, y in points.items():
        ax.plot([x], [0.97], "x", color=color, transform=top)
        ax.annotate(f"{y:.2f}", (x, 0.97), xycoords=top, xytext=(0, -14),
                    textcoords="offset points", ha="center", color=color, fontsize=9)


def annotate_bars(ax: Axes, values: list[float], form: str) -> None:
    """Write each bar's value above it."""
    for x, value in enumerate(values):
        ax.text(x, value, form.format(value), ha="center", va="bottom", fontsize=9)


def percent(ax: Axes) -> None:
    """Label the y axis in percent."""
    from matplotlib.ticker import PercentFormatter

    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def plain_numbers(axis: Axis, points: list[float] | None = None) -> None:
    """Label a short logarithmic axis with plain numbers instead of powers of ten.

    Parameters
    ----------
    axis : Axis
        Left unchanged if it spans a factor of 2000 or more.
    points : list of float, optional
        Places of the labels; None: 1, 2 and 5 in each decade.
    """
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    if high / low < 2000:
        axis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0)) if points is None else FixedLocator(points)
        )
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
