"""Exercise 9: merge a LoRA update into the weight, and take it out again."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.exercises.comparison import same
from minilora.exercises.outcome import Passed, failed, run

NUMBER = 9
# Name of the check: the name that a submission must define.
DEFINED = {"merge": "MergeableLinear"}

_NAME = "MergeableLinear"
_READ = "x W + s x A B = x (W + s A B): merging moves the sum into the weight, once."


def merge(cls: type) -> Passed:
    """Check exercise 9: a class MergeableLinear(W, A, B, scale).

    Parameters
    ----------
    cls
        Its instances have merged (True or False), merge(), unmerge(), and forward(x) with
        x (N, n), for W (n, m), A (n, r) and B (r, m).

    Raises
    ------
    CheckFailed
        If the answer is wrong; the message says what is wrong with it.
    """
    if not isinstance(cls, type):
        raise failed(_NAME, f"Give the class itself, not {type(cls).__name__}.")
    rng = np.random.default_rng(0)
    for n, m, r in ((4, 3, 2), (3, 3, 1), (5, 6, 4)):
        w, a, b = (rng.standard_normal(s) for s in ((n, m), (n, r), (r, m)))
        trial = _Trial(cls, w, 50 * a, b, 0.3, rng.standard_normal((4, n)))
        trial.check_before_merging()
        trial.check_merging()
        trial.check_unmerging()
        trial.check_second_round()
    small = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (4, 2), (2, 3))]
    layer = run(_NAME, lambda: cls(*small, 0.5))
    run(_NAME, layer.merge)
    if np.asarray(run(_NAME, lambda: layer.forward(small[0].T.copy()))).dtype != np.float32:
        raise failed(_NAME, "With float32 arrays the result is not float32: keep their dtype.")
    return Passed(_NAME, "Checked forward, merging, both traps, and that the weight comes back.")


class _Trial:
    """A layer of the learner's class, its inputs, and the steps that check it.

    The checks follow one another and must be called in order.
    """

    def __init__(
        self, cls: type, w: np.ndarray, a: np.ndarray, b: np.ndarray, s: float, x: np.ndarray
    ) -> None:
        self.w, self.a, self.b, self.s, self.x = w, a, b, s, x
        self.given = {"W": w.copy(), "A": a.copy(), "B": b.copy()}
        self.layer = run(_NAME, lambda: cls(*self.given.values(), s))
        self.twin = run(_NAME, lambda: cls(2 * w, a.copy(), b.copy(), s))  # shares nothing
        self.full, self.double = x @ (w + s * a @ b), x @ (w + 2 * s * a @ b)

    # The layer's state

    def forward(self, layer: Any = None) -> np.ndarray:
        """Return the output of the layer, or of another one."""
        layer = self.layer if layer is None else layer
        inputs = self.x.copy()
        y = run(_NAME, lambda: layer.forward(inputs))
        if y is None:
            raise failed(_NAME, "forward returns nothing.")
        if not np.array_equal(inputs, self.x):
            raise failed(_NAME, "forward changes its input x in place.")
        return np.array(y)

    def merged(self, layer: Any = None) -> bool:
        """Return whether the layer, or another one, says that it is merged."""
        layer = self.layer if layer is None else layer
        if not hasattr(layer, "merged"):
            raise failed(_NAME, "It has no attribute merged, True or False.")
        return bool(layer.merged)

    def gives(self, expected: np.ndarray) -> bool:
        """Return whether the output of the layer is `expected`."""
        return same(self.forward(), expected)

    def check_arrays(self, when: str) -> None:
        """Check that W, A and B have not been changed in place."""
        for what, array in (("W", self.w), ("A", self.a), ("B", self.b)):
            if not np.array_equal(self.given[what], array):
                raise failed(_NAME, f"{when} changes the {what} that the caller gave in place "
                             "(such as by +=). Another layer may share it: make a new array.",
                             _READ)

    # The steps

    def check_before_merging(self) -> None:
        """Check forward and merged of a new layer."""
        for value, text in (
            (self.x @ self.w, "forward leaves the LoRA branch out before merging."),
            (self.x @ (self.w + self.a @ self.b), "forward lacks the scale."),
            (self.double, "forward adds the LoRA branch twice before merging."),
        ):
            if self.gives(value):
                raise failed(_NAME, text, _READ)
        if not self.gives(self.full):
            raise failed(_NAME, "forward before merging is not x W + scale * x A B.", _READ)
        self.check_arrays("Construction or forward")
        if self.merged():
            raise failed(_NAME, "merged should be False at first.")

    def check_merging(self) -> None:
        """Check merge, and that a second merge is refused."""
        self.before, other = self.forward(), self.forward(self.twin)
        run(_NAME, self.layer.merge)
        self.check_arrays("merge")
        self.check_merged()
        self.check_error("merge", "Merging a second time must raise a RuntimeError: it would add "
                         "the update twice.")
        if self.merged(self.twin) or not np.array_equal(self.forward(self.twin), other):
            raise failed(_NAME, "Merging one layer changes another one: something is kept in the "
                         "class and not in self.")
        self.given["A"][...] = 0.0  # the merged weight must not depend on the branch any more
        if not self.gives(self.full):
            raise failed(_NAME, "merge moves nothing into the weight: forward still needs A and B "
                         "afterwards, so a merged layer costs as much as before.", _READ)
        self.given["A"][...] = self.a

    def check_merged(self) -> None:
        """Check forward and merged of a merged layer."""
        w, a, b, s, x = self.w, self.a, self.b, self.s, self.x
        read = "after merging, the weight is W + s A B, and forward is one product with it."
        if not self.merged():
            raise failed(_NAME, "merged should be True after merge(): forward looks at it.")
        for value, text in (
            (self.double, "after merging, the output has the update twice: forward still adds "
             "x A B, though it is in the weight now."),
            (x @ w, "after merging, the update is gone: forward leaves it out, but it is not in "
             "the weight."),
            (x @ (w + a @ b), "the merged weight lacks the scale."),
            (x @ (w + s * s * a @ b), "the merged weight has the scale twice."),
            (x @ (w - s * a @ b), "the update is subtracted in merging."),
            (x @ (s * a @ b), "the merged weight is the update alone; add it to W."),
        ):
            if self.gives(value):
                raise failed(_NAME, text, read)
        if not self.gives(self.full):
            raise failed(_NAME, "after merging, the output is another than before.", read)

    def check_unmerging(self) -> None:
        """Check unmerge, and that a second unmerge is refused."""
        run(_NAME, self.layer.unmerge)
        if self.merged():
            raise failed(_NAME, "merged should be False after unmerge().")
        if not self.gives(self.full):
            left = self.gives(self.double)
            text = "unmerge leaves the update in the weight." if left else (
                "after merge and unmerge, the output is another than before.")
            raise failed(_NAME, f"{text} (Did the second merge, which was refused, overwrite the "
                         "weight that was kept? Check first, then remember.)", _READ)
        if not np.array_equal(self.forward(), self.before):
            raise failed(_NAME, "unmerge does not give the old weight back bit for bit: "
                         "subtracting leaves rounding errors. Keep the old weight and put it back.",
                         _READ)
        self.check_error("unmerge", "unmerge must raise a RuntimeError where nothing is merged.")

    def check_second_round(self) -> None:
        """Check that merge uses B as it is now, after B has changed as if by training."""
        self.given["B"] *= 0.5
        trained = self.forward()
        run(_NAME, self.layer.merge)
        if not self.gives(trained):
            raise failed(_NAME, "A second round of merging uses an update from before: take A and "
                         "B as they are when merge is called.", _READ)

    def check_error(self, method: str, text: str) -> None:
        """Check that a method raises RuntimeError and changes nothing."""
        try:
            getattr(self.layer, method)()
        except RuntimeError as error:
            if isinstance(error, NotImplementedError):
                raise failed(_NAME, f"{method} is not implemented yet.") from None
        except Exception as error:
            raise failed(_NAME, f"{text} Yours raised {type(error).__name__}.") from None
        else:
            more = "" if self.gives(self.full) else " Yours did: the output has changed."
            raise failed(_NAME, text + more)
        if not self.gives(self.full):
            raise failed(_NAME, f"{method} raises an error, but has changed the weight before: "
                         "check first, then change.")
