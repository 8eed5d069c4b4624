"""All figures: each function returns a matplotlib `Figure` and changes no global state.

matplotlib is slow to import, so each function imports what it needs.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.files.safetensors import write_atomically
from minilora.lab import style
from minilora.train.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(
    n_axes: int = 1, width: float = 7.2, height: float = 4.0, **options: Any
) -> tuple[Figure, Any]:
    """Return a Figure and its axes.

    Parameters
    ----------
    n_axes : int
        Number of axes, side by side.
    width, height : float
        Size in inches; the default width suits a README.
    **options
        Passed to `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.subplots(1, n_axes, **options)
    for ax in np.atleast_1d(axes).ravel():
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG through a temporary file, so that an existing one is never half replaced."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def smooth(values: list[float], window: int = 15) -> np.ndarray:
    """Return the running mean of the last `window` values (fewer at the start), (n,) -> (n,)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    i = np.arange(1, len(values) + 1)
    start = np.maximum(0, i - window)
    return (sums[i] - sums[start]) / (i - start)


def by_method(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the runs of a comparison by method, in the order of the runs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault(run["method"], []).append(run)
    return groups


def loss_curves(result: dict[str, Any]) -> Figure:
    """Training and validation loss against steps: one colour per method, one line per seed.

    Parameters
    ----------
    result : dict
        What `compare.compare` returned; the same for the next two figures.
    """
    figure, (left, right) = new_figure(2, width=9.0, sharey=True)
    for i, runs in enumerate(by_method(result).values()):
        label = f"{runs[0]['method']}, lr {runs[0]['learning_rate']:g}"
        for k, run in enumerate(runs):
            look = style.line(i) | {"label": label if k == 0 else None}
            history = run["history"]
            left.plot(history["steps"], smooth(history["losses"]), **look)
            right.plot(history["validation_steps"], history["validation_losses"], **look,
                       marker=style.marker(i), markersize=5)
    left.set(title="training (mean of 15 steps)", xlabel="step",
             ylabel="loss on Python code (nats per character)")
    right.set(title="validation (held-out code)", xlabel="step")
    right.legend(frameon=False)
    return figure


def parameters_against_loss(result: dict[str, Any]) -> Figure:
    """Loss on held-out code against the number of trainable parameters, one point per run."""
    figure, ax = new_figure()
    style.mark_loss(ax, result["runs"][0]["code_before"], "base, before fine-tuning")
    for i, (name, runs) in enumerate(by_method(result).items()):
        x, y = [r["trainable"] for r in runs], [r["code_after"] for r in runs]
        ax.plot(x, y, style.marker(i), color=style.colour(i), markersize=9)
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
    first = [runs[0] for runs in by_method(result).values()]
    names = [run["method"] for run in first]
    left = np.zeros(len(names))
    for i, (label, part) in enumerate(_megabytes_held(first).items()):
        memory.barh(names, part, left=left, label=label, **style.bar(i))
        left += part
    for y, total in enumerate(left):
        memory.text(total, y, f" {total:.1f}", va="center", fontsize=9)
    files = [run["file_bytes"] / 1e6 for run in first]
    disk.barh(names, files, color=style.colour(4))
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


def _megabytes_held(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return what training holds in memory, {part: MB for each run}."""
    held = [run["history"]["bytes"] for run in runs]
    added = [0 if run["rank"] is None else 4 * run["trainable"] / 1e6 for run in runs]
    return {
        "base weights": np.array([4 * run["total"] / 1e6 for run in runs]),
        "A and B": np.array(added),
        "gradients": np.array([h["gradients"] / 1e6 for h in held]),
        "AdamW moments": np.array([h["optimizer"] / 1e6 for h in held]),
    }


COMPARISON = {
    "loss_curves.png": loss_curves,
    "parameters_against_loss.png": parameters_against_loss,
    "where_the_bytes_go.png": where_the_bytes_go,
}


def learning_rate_curves(
    curves: dict[str, dict[float, float]], before: float, ylabel: str
) -> Figure:
    """Final loss against learning rate, with the best rate of each method marked.

    Parameters
    ----------
    curves : dict
        {method: {learning rate: final loss}}. A loss far above `before`, or nan after
        divergence, is drawn as a cross at the top with its value.
    before : float
        Loss before fine-tuning.
    ylabel : str
        Name and unit of the loss.
    """
    figure, ax = new_figure()
    lowest = min(np.nanmin(list(curve.values())) for curve in curves.values())
    ceiling = before + 0.3 * (before - lowest)
    style.mark_loss(ax, before, "before fine-tuning")
    for i, (name, curve) in enumerate(curves.items()):
        rates, losses = np.array(list(curve)), np.array(list(curve.values()))
        style.mark_top(ax, {x: y for x, y in curve.items() if not y < ceiling}, style.colour(i))
        losses = np.where(losses < ceiling, losses, np.nan)
        ax.plot(rates, losses, **style.line(i), marker=style.marker(i), label=name)
        if np.isfinite(losses).any():
            best = int(np.nanargmin(losses))
            ax.annotate(f"{rates[best]:g}", (rates[best], losses[best]), xytext=(0, -16),
                        textcoords="offset points", ha="center", color=style.colour(i), fontsize=9)
    ax.set_xscale("log")
    ax.set_ylim(lowest - 0.2 * (before - lowest), ceiling)
    ax.set(xlabel="peak learning rate (log scale)", ylabel=ylabel)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.8))
    return figure


def lines(
    curves: dict[str, tuple[Any, Any]], xlabel: str, ylabel: str, title: str = "",
    xscale: str = "linear", yscale: str = "linear",
) -> Figure:
    """Named curves, {name: (x, y)}, in one plot; those of up to 12 points have markers."""
    figure, ax = new_figure()
    for i, (name, (x, y)) in enumerate(curves.items()):
        ax.plot(x, y, **style.line(i), label=name, marker=style.marker(i) if len(x) <= 12 else None,
                markersize=5)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale=xscale, yscale=yscale)
    points = list(next(iter(curves.values()))[0])
    if xscale == "log":
        style.plain_numbers(ax.xaxis, points if len(points) <= 8 else None)
    if yscale == "log":
        style.plain_numbers(ax.yaxis)
    if len(curves) > 1:
        ax.legend(frameon=False)
    return figure


def loss_curve(history: History, unit: str) -> Figure:
    """The losses of a run in training and on held-out data, in `unit`."""
    curves = {"training": (history.steps, history.losses)}
    if history.validation_steps:
        curves["held out"] = (history.validation_steps, history.validation_losses)
    return lines(curves, "step", f"loss ({unit})")


def matrices(arrays: dict[str, np.ndarray], shared_scale: bool = True) -> Figure:
    """Named matrices as images side by side, blue for negative and red for positive.

    Parameters
    ----------
    arrays : dict
        {name: array of shape (m, n)}.
    shared_scale : bool
        Whether all share one colour scale; otherwise each has its own.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(arrays) + 0.6, 2.8), layout="constrained", dpi=120)
    axes = np.atleast_1d(figure.subplots(1, len(arrays)))
    limit = max(np.abs(a).max() for a in arrays.values())
    images = []
    for ax, (name, array) in zip(axes, arrays.items(), strict=True):
        own = limit if shared_scale else np.abs(array).max()
        images.append(
            ax.imshow(array, cmap="RdBu_r", vmin=-own, vmax=own, interpolation="nearest",
                      aspect="auto" if array.shape[0] != array.shape[1] else "equal")
        )
        ax.set(title=name, xticks=[], yticks=[])
        if not shared_scale:
            figure.colorbar(images[-1], ax=ax, shrink=0.8)
    if shared_scale:
        figure.colorbar(images[-1], ax=list(axes), shrink=0.8)
    return figure


def attention_pattern(weights: np.ndarray, text: str, title: str = "") -> Figure:
    """Attention weights of every head, one image each.

    The colours follow the square root of the weight, so that small weights are visible.

    Parameters
    ----------
    weights : ndarray, (H, T, T)
        Row: the character that looks; column: the character it looks at.
    text : str
        The T characters.
    title : str
        Title of the whole figure.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    n_rows = -(-len(weights) // 2)
    figure = Figure(figsize=(9.0, 4.0 * n_rows), layout="constrained", dpi=100)
    axes = figure.subplots(n_rows, min(2, len(weights)), squeeze=False).ravel()
    labels = [repr(c)[1:-1] if c != " " else "\u2423" for c in text]
    images = []
    for i, (ax, head) in enumerate(zip(axes, weights, strict=True)):
        images.append(ax.imshow(head, cmap="cividis", norm=PowerNorm(0.5, 0.0, 1.0)))
        ax.set_title(f"head {i}")
        ax.set_xticks(range(len(text)), labels, fontsize=7)
        ax.set_yticks(range(len(text)), labels, fontsize=7)
        ax.set(xlabel="looks at", ylabel="looks from")
    figure.colorbar(images[-1], ax=list(axes), shrink=0.8, label="weight")
    figure.suptitle(title)
    return figure


def bars(
    values: dict[str, float], ylabel: str, title: str = "", form: str = "{:.3f}",
    baseline: float | None = None,
) -> Figure:
    """Named values as bars with their numbers.

    Parameters
    ----------
    values : dict
        {name: height}.
    ylabel, title : str
        Texts of the y axis and of the figure.
    form : str
        Format of the numbers; with a "%" in it, the axis shows percent as well.
    baseline : float, optional
        Height of a dotted line.
    """
    figure, ax = new_figure()
    ax.bar(list(values), list(values.values()), color=style.colour(0), width=0.6)
    style.annotate_bars(ax, list(values.values()), form)
    if baseline is not None:
        ax.axhline(baseline, color=style.GREY, linestyle=":")
    if "%" in form:
        style.percent(ax)
    ax.grid(False, axis="x")
    ax.set(ylabel=ylabel, title=title)
    ax.margins(y=0.15)
    return figure


def grouped_bars(
    series: dict[str, dict[str, float]], ylabel: str, title: str = "", form: str = "{:.2f}",
) -> Figure:
    """Bars of {series: {group: value}}, side by side in each group; `form` as in `bars`."""
    figure, ax = new_figure(width=9.0)
    groups = list(next(iter(series.values())))
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        heights = [values[group] for group in groups]
        ax.bar(x, heights, width, label=name, **style.bar(i))
        for at, height in zip(x, heights, strict=True):
            ax.text(at, height, form.format(height), ha="center", va="bottom", fontsize=8)
    if "%" in form:
        style.percent(ax)
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(False, axis="x")
    ax.margins(y=0.12)
    ax.set(ylabel=ylabel, title=title)
    ax.legend(frameon=False, ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0),
              fontsize=9)
    return figure


def named_points(points: dict[str, tuple[float, float]], xlabel: str, ylabel: str) -> Figure:
    """Named points, {name: (x, y)}, on two logarithmic axes; y is a share, shown in percent."""
    figure, ax = new_figure(width=9.0)
    for i, (name, (x, y)) in enumerate(points.items()):
        ax.plot([x], [y], style.marker(i), color=style.colour(i), markersize=7)
        side = -1 if i % 2 else 1
        ax.annotate(name, (x, y), xytext=(7 * side, 3 * side), textcoords="offset points",
                    fontsize=8, ha="right" if i % 2 else "left", va="top" if i % 2 else "bottom")
    ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    style.percent(ax)
    ax.margins(x=0.15, y=0.1)
    return figure
