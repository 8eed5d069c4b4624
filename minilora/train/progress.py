"""The progress bar of a training run."""

from __future__ import annotations

import sys
import time
from typing import Any, Self


class Bar:
    """A bar with steps, time left, loss and tokens a second; use it in a `with` statement.

    It is shown on a terminal and in a notebook, but not in a file.

    Parameters
    ----------
    start, steps : how many steps are done, and how many there are in all
    description : what stands before it
    shown : False for no bar
    """

    def __init__(self, start: int, steps: int, description: str, shown: bool):
        from tqdm import tqdm  # here, because it takes a fifth of minilora's import time

        watched = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self._bar: Any = tqdm(total=steps, initial=start, desc=description, leave=False,
                              unit="step", disable=not (shown and watched))
        self._tokens, self._start = 0, time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, loss: float, tokens: int) -> None:
        """Show that a step is done."""
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update()
