"""Exercise 9: merge a LoRA update into the weight, and take it out again."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.exercises.comparison import same, show_difference
from minilora.exercises.outcome import Passed, array_of, either, failed, run

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
    for dtype in (np.float64, np.float32):
        for n, m, r in ((4, 3, 2), (3, 3, 1), (5, 6, 4)):
            w, a, b, x = (rng.standard_normal(shape).astype(dtype)
                          for shape in ((n, m), (n, r), (r, m), (7, n)))
            trial = _Trial(cls, w, 50 * a, b, 0.3, x)
            trial.check_before_merging()
            trial.check_merging()
            trial.check_unmerging()
            trial.check_second_round()
            _check_in_turn(cls, w, a, b, x)
    return Passed(_NAME, "Checked forward, merging, both traps, that the weight comes back, and "
                  "two layers in turn.")


def _check_in_turn(
    cls: type, w: np.ndarray, a: np.ndarray, b: np.ndarray, x: np.ndarray
) -> None:
    """Check two layers of the same shapes that are merged and unmerged in turn."""
    inputs = ((w, a, b, 0.3), (2 - w, 1 - a, 1 - b, 0.7))
    layers = [run(_NAME, lambda given=given: cls(*given)) for given in inputs]
    before = [np.array(run(_NAME, lambda layer=layer: layer.forward(x.copy())))
              for layer in layers]
    for method in ("merge", "unmerge"):
        for layer in layers:
            run(_NAME, getattr(layer, method))
        for layer, (weight, p, q, s), old in zip(layers, inputs, before, strict=True):
            got = np.array(run(_NAME, lambda layer=layer: layer.forward(x.copy())))
            if not same(got, x @ (weight + s * p @ q), _tolerance(x)) or (
                    method == "unmerge" and not np.array_equal(got, old)):
                raise failed(_NAME, f"With two layers in turn, {method} is wrong, though it is "
                             "right with one: something, such as the old weight, is kept in the "
                             "class or a global, and not in self.")


def _tolerance(array: np.ndarray) -> float:
    """Return how far results in the dtype of `array` may be off."""
    return 1e-11 if array.dtype == np.float64 else 1e-4


class _Trial:
    """A layer of the learner's class, its inputs, and the steps that check it.

    The checks follow one another and must be called in order.
    """

    stage = ""  # when, for messages

    def __init__(
        self, cls: type, w: np.ndarray, a: np.ndarray, b: np.ndarray, s: float, x: np.ndarray
    ) -> None:
        self.w, self.a, self.b, self.s, self.x = w, a, b, s, x
        self.given = {"W": w.copy(), "A": a.copy(), "B": b.copy()}
        self.layer = run(_NAME, lambda: cls(*self.given.values(), s))
        self.full, self.double = x @ (w + s * a @ b), x @ (w + 2 * s * a @ b)
        alone = self.forward() if not self.merged() else None
        self.twin = run(_NAME, lambda: cls(2 - w, 1 - a, 1 - b, s + 1))  # shares nothing
        if alone is not None and not np.array_equal(self.forward(), alone):
            raise failed(_NAME, "Making a second layer changes what the first one computes: "
                         "something is kept in the class or a global, and not in self.")

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
        y = np.array(array_of(_NAME, "forward", y))
        if y.shape != self.full.shape:
            raise failed(_NAME, f"forward of x {self.x.shape} should have shape {self.full.shape}, "
                         f"yours has {y.shape}.", _READ)
        if y.dtype != self.x.dtype:
            raise failed(_NAME, f"forward is {y.dtype}{self.stage} where all arrays are "
                         f"{self.x.dtype}: keep their dtype.")
        return y

    def merged(self, layer: Any = None) -> bool:
        """Return whether the layer, or another one, says that it is merged."""
        layer = self.layer if layer is None else layer
        if not hasattr(layer, "merged"):
            raise failed(_NAME, "It has no attribute merged, True or False.")
        return bool(layer.merged)

    def gives(self, expected: np.ndarray) -> bool:
        """Return whether the output of the layer is `expected`."""
        return same(self.forward(), expected, _tolerance(self.x))

    def cause(self, *pairs: tuple[np.ndarray, str]) -> str:
        """Return the texts of those wrong values which forward gives; "" if none."""
        got = self.forward()
        if same(got, self.full, 1e-5):
            return (f"forward{self.stage} is right to a few digits only, as if something were "
                    f"float32 or rounded. Keep the dtype of the arrays, {self.x.dtype}.")
        return either(text for value, text in pairs if same(got, value, _tolerance(self.x)))

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
        if self.merged():
            raise failed(_NAME, "merged should be False at first.")
        self.check_arrays("Construction or forward")
        w, a, b, s, x = self.w, self.a, self.b, self.s, self.x
        if not self.gives(self.full):
            raise failed(_NAME, self.cause(
                (x @ w, "forward leaves the LoRA branch out before merging."),
                (x @ (w + a @ b), "forward lacks the scale."),
                (x @ (w + s * s * a @ b), "forward has the scale twice."),
                (x @ (w - s * a @ b), "forward subtracts the LoRA branch."),
                (x @ (s * a @ b), "forward leaves x W out before merging."),
                (s * x @ (w + a @ b), "forward multiplies x W by the scale, too."),
                (self.double, "forward adds the LoRA branch twice before merging."),
            ) or "forward before merging is not x W + scale * x A B.", _READ)

    def check_merging(self) -> None:
        """Check merge, and that a second merge is refused."""
        self.before, other = self.forward(), self.forward(self.twin)
        self.stage = " after merging"
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
        if self.gives(self.full):
            return
        raise failed(_NAME, self.cause(
            (self.double, "after merging, the output has the update twice: forward still adds "
             "x A B, though it is in the weight now, or merge adds it twice."),
            (x @ w, "after merging, the update is gone: forward leaves it out, but it is not in "
             "the weight."),
            (x @ (w + a @ b), "the merged weight lacks the scale."),
            (x @ (w + s * s * a @ b), "the merged weight has the scale twice."),
            (x @ (w - s * a @ b), "the update is subtracted in merging."),
            (x @ (s * a @ b), "the merged weight is the update alone; add it to W."),
            (x @ (w + s * s * a @ b + s * a @ b), "the update is added in merge and, with the "
             "scale once more, in forward."),
        ) or "after merging, the output is another than before.\n"
            + show_difference("x (W + s A B)", self.forward(), self.full), read)

    def check_unmerging(self) -> None:
        """Check unmerge, and that a second unmerge is refused."""
        self.stage = " after merge and unmerge"
        run(_NAME, self.layer.unmerge)
        if self.merged():
            raise failed(_NAME, "merged should be False after unmerge().")
        w, a, b, s, x = self.w, self.a, self.b, self.s, self.x
        if not self.gives(self.full):
            raise failed(_NAME, self.cause(
                (self.double, "unmerge leaves the update in the weight. (Did the second merge, "
                 "which was refused, overwrite the weight that was kept? Or is that the same "
                 "array, which += changes, too? Check first, then keep a copy.)"),
                (x @ w, "after unmerge the LoRA branch is gone: A, B and the scale must be as they "
                 "were, and forward must add the branch again."),
                (x @ (w - s * a @ b), "unmerge takes the update off the weight more than once."),
            ) or "after merge and unmerge, the output is another than before.\n"
                + show_difference("x (W + s A B)", self.forward(), self.full), _READ)
        if not np.array_equal(self.forward(), self.before):
            raise failed(_NAME, "unmerge does not give the old weight back bit for bit: "
                         "subtracting leaves rounding errors. Keep the old weight and put it back.",
                         _READ)
        self.check_error("unmerge", "unmerge must raise a RuntimeError where nothing is merged.")

    def check_second_round(self) -> None:
        """Check that merge uses B as it is now, after B has changed as if by training."""
        self.given["B"] *= 0.5
        trained = self.forward()
        held = any(value is self.given["B"] for value in getattr(
            self.layer, "__dict__", {}).values())
        if held and same(trained, self.full, _tolerance(self.x)):  # no copy of its own, and yet
            raise failed(_NAME, "forward uses an update from before: take A and B as they are when "
                         "it is called.", _READ)
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
