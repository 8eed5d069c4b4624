"""Look by moving a slider, or, where that cannot be, at a few pictures one below the other.

The slider needs ipywidgets and somebody at a running notebook; everything else, such as a page
that only shows stored outputs, gets the static form.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

STATIC = "MINILORA_STATIC"  # an environment variable: set it for pictures in any case


def choose(draw: Callable[[Any], Any], name: str, values: Sequence[Any], *static: Any) -> None:
    """Show draw(value), a Figure, for the value that the reader picks with a slider.

    name     what stands beside the slider
    values   what can be picked, in order
    static   the values to show where there is no slider; by default the first and the last

    Raises ValueError where there is nothing to pick, or a static value is not among the values.
    """
    values = list(values)
    if not values:
        raise ValueError("choose needs at least one value to pick")
    if unknown := [value for value in static if value not in values]:
        raise ValueError(f"{unknown[0]!r} is not among the values {values}")
    if has_widgets():
        import ipywidgets

        slider = ipywidgets.SelectionSlider(
            options=values, value=(static or values)[0], description=name,
            continuous_update=False, style={"description_width": "initial"},
        )
        ipywidgets.interact(lambda picked: _display(draw(picked)), picked=slider)
        return
    for value in static or dict.fromkeys([values[0], values[-1]]):
        _display(draw(value), f"{name}: {value}")


def has_widgets() -> bool:
    """Say whether a slider can be shown: ipywidgets is there, and static pictures not asked for."""
    return not os.environ.get(STATIC) and all(
        importlib.util.find_spec(module) for module in ("ipywidgets", "IPython")
    )


def _display(figure: Any, title: str = "") -> None:
    """Show a figure in a notebook; elsewhere, as in a script, say what it would be."""
    if importlib.util.find_spec("IPython"):
        from IPython.display import display

        if title:
            print(title)
        display(figure)
    else:
        print(title or figure)
