"""Figures behind a slider, or stacked if there are no widgets.

The slider needs ipywidgets and a running notebook. Everything else, such as a page that shows
stored outputs, has the static form.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

STATIC = "MINILORA_STATIC"  # environment variable; if set, there are no sliders


def choose(draw: Callable[[Any], Any], name: str, values: Sequence[Any], *static: Any) -> None:
    """Show `draw(value)` for the value that the reader picks with a slider.

    All figures are drawn now. A slider that drew later would read the globals of the notebook as
    other cells have left them by then.

    Parameters
    ----------
    draw : callable
        Takes a value and returns a Figure.
    name : str
        Label of the slider.
    values : sequence
        What can be picked, in order.
    *static
        The values to show if there is no slider; by default the first and the last.

    Raises
    ------
    ValueError
        If there are no values, or a static value is not among them.
    """
    values = list(values)
    if not values:
        raise ValueError("choose needs at least one value to pick")
    if unknown := [value for value in static if value not in values]:
        raise ValueError(f"{unknown[0]!r} is not among the values {values}")
    if has_widgets():
        import ipywidgets

        figures = {value: draw(value) for value in values}
        slider = ipywidgets.SelectionSlider(
            options=values, value=(static or values)[0], description=name,
            continuous_update=False, style={"description_width": "initial"},
        )
        ipywidgets.interact(lambda picked: _display(figures[picked]), picked=slider)
        return
    for value in static or dict.fromkeys([values[0], values[-1]]):
        _display(draw(value), f"{name}: {value}")


def has_widgets() -> bool:
    """Return whether a slider can be shown: ipywidgets is installed and STATIC is not set."""
    return not os.environ.get(STATIC) and all(
        importlib.util.find_spec(module) for module in ("ipywidgets", "IPython")
    )


def _display(figure: Any, title: str = "") -> None:
    """Show a figure in a notebook; in a plain script, print its title."""
    if importlib.util.find_spec("IPython"):
        from IPython.display import display

        if title:
            print(title)
        display(figure)
    else:
        print(title or figure)
