"""Every figure: each function returns a matplotlib `Figure` and touches no global state.

Colours are Okabe and Ito's, which people with any kind of colour vision can tell apart; line
styles and markers differ as well.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from minilora.files.checkpoint import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)), (0, (1, 3)))
MARKERS = "osD^vP*"
GREY = "#666666"


def new_figure(
    n_axes: int = 1, width: float = 7.2, height: float = 4.0, **options: Any
) -> tuple[Figure, Any]:
    """Return a Figure and its axes side by side, laid out for the width of a README."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.subplots(1, n_axes, **options)
    for ax in np.atleast_1d(axes).ravel():
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG by way of a temporary file, so that a good one is never half replaced."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def smooth(values: list[float], window: int = 15) -> np.ndarray:
    """Running mean over the last `window` values (fewer at the start), (n,) -> (n,)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    i = np.arange(1, len(values) + 1)
    start = np.maximum(0, i - window)
    return (sums[i] - sums[start]) / (i - start)


def by_method(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the runs of a comparison by method, in the order they were run."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault(run["method"], []).append(run)
    return groups


def loss_curves(result: dict[str, Any]) -> Figure:
    """Training and validation loss against steps, one colour a method; all seeds are drawn."""
    figure, (left, right) = new_figure(2, width=9.0, sharey=True)
    for i, (name, runs) in enumerate(by_method(result).items()):
        look = dict(color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i % len(STYLES)])
        label = f"{name}, lr {runs[0]['learning_rate']:g}"
        for k, run in enumerate(runs):
            history = run["history"]
            left.plot(history["steps"], smooth(history["losses"]), **look,
                      label=label if k == 0 else None)
            right.plot(history["validation_steps"], history["validation_losses"], **look,
                       marker=MARKERS[i % len(MARKERS)], markersize=5,
                       label=label if k == 0 else None)
    left.set(title="training (mean of 15 steps)", xlabel="step",
             ylabel="loss on Python code (nats per character)")
    right.set(title="validation (held-out code)", xlabel="step")
    right.legend(frameon=False)
    return figure


def parameters_against_loss(result: dict[str, Any]) -> Figure:
    """Loss on held-out code against the number of trainable parameters, one point a run."""
    figure, ax = new_figure()
    groups = by_method(result)
    before = result["runs"][0]["code_before"]
    ax.axhline(before, color=GREY, linestyle=":", linewidth=1.2)
    ax.text(0.01, before, "base, before fine-tuning", color=GREY, fontsize=9,
            va="bottom", transform=ax.get_yaxis_transform())
    for i, (name, runs) in enumerate(groups.items()):
        x, y = [r["trainable"] for r in runs], [r["code_after"] for r in runs]
        ax.plot(x, y, MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], markersize=9)
        share = runs[0]["trainable"] / runs[0]["total"]
        ax.annotate(f"{name}\n{runs[0]['trainable']:,} ({share:.1%})", (x[0], float(np.mean(y))),
                    xytext=(0, 12), textcoords="offset points", ha="center", fontsize=9)
    ax.set_xscale("log")
    ax.margins(x=0.2, y=0.15)
    ax.set(xlabel="trainable parameters (log scale)",
           ylabel="loss on held-out code\n(nats per character)")
    return figure


def where_the_bytes_go(result: dict[str, Any]) -> Figure:
    """Memory for weights, gradients and moments, and the file of one task, for each method."""
    figure, (memory, disk) = new_figure(2, width=9.0, height=3.2, sharey=True)
    groups = by_method(result)
    names = list(groups)
    first = [groups[name][0] for name in names]
    base = np.array([4 * r["total"] / 1e6 for r in first])
    added = np.array([0 if r["rank"] is None else 4 * r["trainable"] / 1e6 for r in first])
    held = [r["history"]["bytes"] for r in first]
    parts = {
        "base weights": base,
        "A and B": added,
        "gradients": np.array([h["gradients"] / 1e6 for h in held]),
        "AdamW moments": np.array([h["optimizer"] / 1e6 for h in held]),
    }
    left = np.zeros(len(names))
    hatches = ("", "////", "....", "xxxx")
    for (label, part), colour, hatch in zip(parts.items(), COLOURS, hatches, strict=False):
        memory.barh(names, part, left=left, label=label, color=colour, hatch=hatch,
                    edgecolor="white", linewidth=0.5)
        left += part
    for y, total in enumerate(left):
        memory.text(total, y, f" {total:.1f}", va="center", fontsize=9)
    files = [r["file_bytes"] / 1e6 for r in first]
    disk.barh(names, files, color=COLOURS[4])
    for y, size in enumerate(files):
        disk.text(size, y, f" {size:.2f}", va="center", fontsize=9)
    memory.invert_yaxis()
    memory.set(title="in memory while training, without activations", xlabel="MB")
    memory.legend(frameon=False, fontsize=8, loc="lower right")
    disk.set(title="on disk, for one task", xlabel="MB")
    for ax in (memory, disk):
        ax.margins(x=0.15)
        ax.grid(False, axis="y")
    return figure


COMPARISON = {
    "loss_curves.png": loss_curves,
    "parameters_against_loss.png": parameters_against_loss,
    "where_the_bytes_go.png": where_the_bytes_go,
}


def learning_rate_curves(
    curves: dict[str, dict[float, float]], before: float, ylabel: str
) -> Figure:
    """Final loss against learning rate, a U for each method; the best point is marked.

    A run that ended far above `before`, or diverged (nan), is a cross at the top with its loss.
    """
    figure, ax = new_figure()
    lowest = min(np.nanmin(list(curve.values())) for curve in curves.values())
    ceiling = before + 0.3 * (before - lowest)
    ax.axhline(before, color=GREY, linestyle=":", linewidth=1.2)
    ax.text(0.01, before, "before fine-tuning", color=GREY, fontsize=9, va="bottom",
            transform=ax.get_yaxis_transform())
    for i, (name, curve) in enumerate(curves.items()):
        rates, losses = np.array(list(curve)), np.array(list(curve.values()))
        colour = COLOURS[i % len(COLOURS)]
        top = ax.get_xaxis_transform()
        for rate, loss in zip(rates, losses, strict=True):
            if not loss < ceiling:
                ax.plot([rate], [0.97], "x", color=colour, transform=top)
                ax.annotate(f"{loss:.2f}", (rate, 0.97), xycoords=top, xytext=(0, -14),
                            textcoords="offset points", ha="center", color=colour, fontsize=9)
        losses = np.where(losses < ceiling, losses, np.nan)
        ax.plot(rates, losses, linestyle=STYLES[i % len(STYLES)],
                marker=MARKERS[i % len(MARKERS)], color=colour, label=name)
        if np.isfinite(losses).any():
            best = int(np.nanargmin(losses))
            ax.annotate(f"{rates[best]:g}", (rates[best], losses[best]), xytext=(0, -16),
                        textcoords="offset points", ha="center", color=colour, fontsize=9)
    ax.set_xscale("log")
    ax.set_ylim(lowest - 0.2 * (before - lowest), ceiling)
    ax.set(xlabel="peak learning rate (log scale)", ylabel=ylabel)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.8))
    return figure


def lines(
    curves: dict[str, tuple[Any, Any]], xlabel: str, ylabel: str, title: str = "",
    xscale: str = "linear", yscale: str = "linear",
) -> Figure:
    """Named curves {name: (x, y)} in one plot, told apart by colour, style and marker."""
    figure, ax = new_figure()
    for i, (name, (x, y)) in enumerate(curves.items()):
        few = len(x) <= 12
        ax.plot(x, y, linestyle=STYLES[i % len(STYLES)], color=COLOURS[i % len(COLOURS)],
                label=name, marker=MARKERS[i % len(MARKERS)] if few else None, markersize=5)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale=xscale, yscale=yscale)
    points = next(iter(curves.values()))[0]
    for axis, scale in ((ax.xaxis, xscale), (ax.yaxis, yscale)):
        low, high = axis.get_view_interval()
        if scale == "log" and high / low < 2000:  # plain numbers instead of powers of ten
            marked = axis is ax.xaxis and len(points) <= 8
            axis.set_major_locator(
                FixedLocator(list(points)) if marked else LogLocator(subs=(1.0, 2.0, 5.0))
            )
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(NullLocator())
    if len(curves) > 1:
        ax.legend(frameon=False)
    return figure


def matrices(arrays: dict[str, np.ndarray], shared_scale: bool = True) -> Figure:
    """Named matrices as images side by side, blue for negative and red for positive."""
    figure = Figure(figsize=(2.4 * len(arrays) + 0.6, 2.8), layout="constrained", dpi=120)
    axes = np.atleast_1d(figure.subplots(1, len(arrays)))
    limit = max(np.abs(a).max() for a in arrays.values())
    for ax, (name, array) in zip(axes, arrays.items(), strict=True):
        own = limit if shared_scale else np.abs(array).max()
        image = ax.imshow(array, cmap="RdBu_r", vmin=-own, vmax=own, interpolation="nearest",
                          aspect="auto" if array.shape[0] != array.shape[1] else "equal")
        ax.set(title=name, xticks=[], yticks=[])
        if not shared_scale:
            figure.colorbar(image, ax=ax, shrink=0.8)
    if shared_scale:
        figure.colorbar(image, ax=list(axes), shrink=0.8)
    return figure


def attention_pattern(weights: np.ndarray, text: str, title: str = "") -> Figure:
    """Attention weights (H, T, T) of every head; row: the character that looks, column: at what.

    The colours follow the square root of the weight, so that small ones can be seen.
    """
    n_rows = -(-len(weights) // 2)
    figure = Figure(figsize=(9.0, 4.0 * n_rows), layout="constrained", dpi=100)
    axes = figure.subplots(n_rows, min(2, len(weights)), squeeze=False).ravel()
    labels = [repr(c)[1:-1] if c != " " else "\u2423" for c in text]
    for i, (ax, head) in enumerate(zip(axes, weights, strict=True)):
        image = ax.imshow(head, cmap="cividis", norm=PowerNorm(0.5, 0.0, 1.0))
        ax.set_title(f"head {i}")
        ax.set_xticks(range(len(text)), labels, fontsize=7)
        ax.set_yticks(range(len(text)), labels, fontsize=7)
        ax.set(xlabel="looks at", ylabel="looks from")
    figure.colorbar(image, ax=list(axes), shrink=0.8, label="weight")
    figure.suptitle(title)
    return figure


def bars(
    values: dict[str, float], ylabel: str, title: str = "", form: str = "{:.3f}",
    baseline: float | None = None,
) -> Figure:
    """Named values as bars with their numbers; `baseline` draws a dotted line."""
    figure, ax = new_figure()
    ax.bar(list(values), list(values.values()), color=COLOURS[0], width=0.6)
    annotate_bars(ax, list(values.values()), form)
    if baseline is not None:
        ax.axhline(baseline, color=GREY, linestyle=":")
    if "%" in form:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(False, axis="x")
    ax.set(ylabel=ylabel, title=title)
    ax.margins(y=0.15)
    return figure


def annotate_bars(ax: Axes, values: list[float], form: str) -> None:
    """Write each bar's value above it."""
    for x, value in enumerate(values):
        ax.text(x, value, form.format(value), ha="center", va="bottom", fontsize=9)


def grouped_bars(
    series: dict[str, dict[str, float]], ylabel: str, title: str = "", form: str = "{:.2f}",
) -> Figure:
    """Bars {series: {group: value}}: one colour and hatch for each series, side by side."""
    figure, ax = new_figure(width=9.0)
    groups = list(next(iter(series.values())))
    width = 0.8 / len(series)
    hatches = ("", "////", "....", "xxxx", "\\\\\\\\", "++", "oo")
    for i, (name, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        heights = [values[group] for group in groups]
        ax.bar(x, heights, width, label=name, color=COLOURS[i % len(COLOURS)],
               hatch=hatches[i % len(hatches)], edgecolor="white", linewidth=0.5)
        for at, height in zip(x, heights, strict=True):
            ax.text(at, height, form.format(height), ha="center", va="bottom", fontsize=8)
    if "%" in form:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(False, axis="x")
    ax.margins(y=0.12)
    ax.set(ylabel=ylabel, title=title)
    ax.legend(frameon=False, ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0),
              fontsize=9)
    return figure


def named_points(points: dict[str, tuple[float, float]], xlabel: str, ylabel: str) -> Figure:
    """Named points {name: (x, y)} on two logarithmic axes, each with its name beside it."""
    figure, ax = new_figure(width=9.0)
    for i, (name, (x, y)) in enumerate(points.items()):
        ax.plot([x], [y], MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], markersize=7)
        side = -1 if i % 2 else 1
        ax.annotate(name, (x, y), xytext=(7 * side, 3 * side), textcoords="offset points",
                    fontsize=8, ha="right" if i % 2 else "left", va="top" if i % 2 else "bottom")
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.margins(x=0.15, y=0.1)
    return figure
