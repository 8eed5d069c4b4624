"""The exercises whose answer is a class, a change of a model, a choice, or a judgement.

Exercises 3, 5, 9, 11 and 12, and the table of 10. Their checks go step by step, and each step
knows the mistakes that fail it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.data.corpus import (
    CharTokenizer,
    module_source,
    plain,
    random_batches,
    sequential_batches,
    split,
)
from minilora.exercises.engine import Passed, failed, run, same
from minilora.files.checkpoint import load_base
from minilora.lab import compare
from minilora.lora.adapter import Adapter, Factors
from minilora.lora.wrap import (
    LinearWithLoRA,
    check_hyperparameters,
    find_targets,
    replace_linear_with_lora,
)
from minilora.nn.gpt import GPT, GPTConfig
from minilora.nn.layers import GELU, LayerNorm, Linear
from minilora.nn.module import Module, Parameter, Sequential
from minilora.train.loop import evaluate, fit
from minilora.train.optim import AdamW, cosine_schedule
from minilora.train.parallel import one_blas_thread

# ---- 3. The LoRA layer: init, scaling, forward


def lora_forward(cls: type) -> Passed:
    """Check a class LoRALayer(in_dim, out_dim, rank, alpha, rng) with A, B, scale, forward(x)."""
    name = "LoRALayer"
    if not isinstance(cls, type):
        raise failed(name, f"Give the class itself, not {type(cls).__name__}.")

    def make(n: int, m: int, r: int, alpha: float, seed: int = 0) -> Any:
        layer = run(name, lambda: cls(n, m, r, alpha, np.random.default_rng(seed)))
        for attribute in ("A", "B", "scale"):
            if not hasattr(layer, attribute):
                raise failed(name, f"It has no attribute {attribute}: set self.{attribute}.")
        return layer

    for n, m, r, alpha in ((6, 4, 2, 8), (3, 5, 3, 1.5), (4, 4, 1, 2), (2, 7, 2, 9)):
        layer = make(n, m, r, alpha)
        _check_factors(name, _array(layer.A), _array(layer.B), n, m, r)
        _check_scale(name, layer.scale, alpha, r)
    _check_init(name, make)
    for n, m, r, alpha in ((6, 4, 2, 8), (3, 5, 3, 1.5), (4, 4, 1, 2)):
        for shape in ((5, n), (2, 3, n), (n,)):
            _check_forward(name, make(n, m, r, alpha), np.random.default_rng(1), shape, m)
    return Passed(name, "Checked shapes, start, scale and forward.")


def _array(value: Any) -> np.ndarray:
    return value.data if isinstance(value, Parameter) else np.asarray(value)


def _check_factors(name: str, a: np.ndarray, b: np.ndarray, n: int, m: int, r: int) -> None:
    read = "y = scale * x A B, with x (.., n), A (n, r), B (r, m)."
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        raise failed(name, f"A and B are to be floating-point numbers, yours are {a.dtype} and "
                     f"{b.dtype}: steps of training are no whole numbers.", read)
    if (a.shape, b.shape) == ((n, r), (r, m)):
        return
    if (a.shape, b.shape) == ((r, m), (n, r)):
        raise failed(name, "A and B are swapped: A comes first, (in, rank), then B, (rank, out).",
                     read)
    if (a.shape, b.shape) == ((r, n), (m, r)):
        raise failed(name, f"A and B are transposed: A has shape {a.shape} where (in, rank) = "
                     f"{(n, r)} was expected. PyTorch keeps them so; here x A B needs no "
                     "transpose.", read)
    for what, array, shape in (("A", a, (n, r)), ("B", b, (r, m))):
        if array.shape != shape:
            more = ": it is transposed" if array.shape == shape[::-1] else ""
            raise failed(name, f"{what} has shape {array.shape} where {shape} was expected{more}.",
                         read)


def _check_scale(name: str, scale: Any, alpha: float, r: int) -> None:
    read = "scale = alpha / r: with it, r can be changed without a new learning rate."
    if not isinstance(scale, (int, float, np.number)):
        raise failed(name, f"scale should be a number, yours is a {type(scale).__name__}.", read)
    for value, text in (
        (alpha, "scale is alpha: divide it by the rank."),
        (1.0, "scale is 1: alpha / r is missing."),
        (r / alpha, "scale is r / alpha: it is the other way round."),
        (alpha / r**0.5, "scale is alpha / sqrt(r), that of rsLoRA; here it is alpha / r."),
        (alpha * r, "scale is alpha * r: divide."),
        (alpha // r, "scale is rounded down: use / and not //."),
    ):
        if math.isclose(scale, value) and not math.isclose(value, alpha / r):
            raise failed(name, text, read)
    if not math.isclose(scale, alpha / r):
        raise failed(name, f"For alpha {alpha} and rank {r}, scale is {scale}, not {alpha / r}.",
                     read)


def _check_init(name: str, make: Callable[..., Any]) -> None:
    read = "A is uniform in ±1/sqrt(in), B is zero: then the model starts as the base, and learns."
    n, m, r = 400, 300, 16
    layer = make(n, m, r, 16)
    a, b = _array(layer.A), _array(layer.B)
    if not a.any() and not b.any():
        raise failed(name, "A and B are both zero. Then both gradients are zero as well (dA holds "
                     "B, dB holds A), and nothing ever moves.", read)
    if not a.any():
        raise failed(name, "A is zero and B is not. The update is zero, too, but the usual choice "
                     "is the other one: B = 0.", read)
    if b.any():
        raise failed(name, "B is not zero: the model does not start as the base.", read)
    if np.linalg.matrix_rank(a) < r:
        raise failed(name, "The columns of A are not independent: draw each number of A anew.",
                     read)
    bound, largest = n**-0.5, float(np.abs(a).max())
    if len(np.unique(a)) < a.size / 10:
        raise failed(name, "A takes a few values only: draw uniformly between the bounds.", read)
    if a.min() >= 0:
        raise failed(name, "A has no negative numbers: draw from -1/sqrt(in) to 1/sqrt(in).", read)
    for value, text in ((r**-0.5, "1/sqrt(rank): take the number of inputs, A's first axis."),
                        (m**-0.5, "1/sqrt(out): take the number of inputs."), (1.0, "1: divide by "
                         "sqrt(in)."), (1 / n, "1/in: take the root, 1/sqrt(in)."),
                        ((6 / (n + r)) ** 0.5, "sqrt(6/(in + rank)): that is Xavier's bound; "
                         "LoRA takes 1/sqrt(in)."), 
                        (6**0.5 * bound, "sqrt(6/in): that is Kaiming's bound for a = 0; LoRA "
                         "takes a = sqrt(5), which gives 1/sqrt(in).")):
        if abs(largest / value - 1) < 0.01 and abs(value / bound - 1) > 0.1:
            raise failed(name, f"A is drawn up to {text}", read)
    if largest > 1.001 * bound or np.abs(a).std() < 0.2 * largest:
        kind = "normal, not uniform" if largest > 3 * a.std() else "too large"
        raise failed(name, f"A looks {kind}: |A| goes up to {largest:.4f}, where 1/sqrt({n}) = "
                     f"{bound:.4f}.", read)
    if largest < 0.98 * bound or abs(a.mean()) > 0.05 * bound:
        raise failed(name, f"A should fill -{bound:.4f} to {bound:.4f} evenly; yours goes from "
                     f"{a.min():.4f} to {a.max():.4f}.", read)
    if not np.array_equal(a, _array(make(n, m, r, 16).A)):
        raise failed(name, "Two layers with the same rng differ: draw with the rng that is given, "
                     "not with np.random.", read)
    if np.array_equal(a, _array(make(n, m, r, 16, seed=1).A)):
        raise failed(name, "Layers with different rngs have the same A: draw with the rng that is "
                     "given.", read)


def _check_forward(
    name: str, layer: Any, rng: np.random.Generator, shape: tuple[int, ...], m: int
) -> None:
    a, b = (rng.standard_normal(_array(f).shape) for f in (layer.A, layer.B))
    for attribute, value in (("A", a), ("B", b)):
        holder = getattr(layer, attribute)
        if isinstance(holder, Parameter):
            holder.data = value.copy()
        else:
            setattr(layer, attribute, value.copy())
    x = rng.standard_normal(shape)
    given, s = x.copy(), float(layer.scale)
    got = run(name, lambda: layer.forward(given))
    if got is None:
        raise failed(name, "forward returns nothing.")
    got, read = np.asarray(got), "y = scale * x A B."
    if not np.array_equal(given, x):
        raise failed(name, "forward changes its input x in place.")
    if same(got, s * (x @ a @ b)):
        again = np.asarray(run(name, lambda: layer.forward(x.copy())))
        if not same(again, got) or not (same(_array(layer.A), a) and same(_array(layer.B), b)):
            raise failed(name, "forward changes A or B: a second call gives something else.")
        return
    for value, text in (
        (x @ a @ b, "the scale is missing."), (s * s * (x @ a @ b), "the scale is in it twice."),
        (s * (x @ a), "B is missing."), (s * (x @ a @ b) + (x if shape[-1] == m else 0),
         "x is added; the sum with x W is for the layer around this one."),
        (np.zeros((*shape[:-1], m)), "forward uses a product that was made in the constructor, or "
         "a copy of B; it has to use self.A and self.B as they are now."),
        (x @ a @ b / s, "it is divided by the scale."),
        (s * a.shape[1] * (x @ a @ b), "it is multiplied by alpha instead of the scale, "
         "alpha / r."),
    ):
        if same(got, value):
            raise failed(name, f"forward: {text}", read)
    if got.shape != (*shape[:-1], m):
        raise failed(name, f"forward of x {shape} should have shape {(*shape[:-1], m)}, yours has "
                     f"{got.shape}.", read)
    raise failed(name, f"forward of x {shape} is wrong: expected\n{(s * (x @ a @ b)).round(4)}\n"
                 f"yours =\n{got.round(4)}", read)


# ---- 5. replace_linear


class _Net(Module):
    """Linears at the top, inside, and deep inside; and something that is none."""

    def __init__(self) -> None:
        self.first = Linear(4, 6, rng=0)
        self.norm = LayerNorm(6)
        self.body = Sequential(Linear(6, 6, rng=1), GELU(), Sequential(Linear(6, 5, rng=2)))
        self.last = Linear(5, 3, bias=False, rng=3)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.last(self.body(self.norm(self.first(x))))


def replace_linear(function: Callable[..., Module]) -> Passed:
    """Check a function replace_linear(model, rank, alpha) -> model."""
    name = "replace_linear"
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    ids = np.arange(6)[None]
    gpt = GPTConfig(11, 6, 8, 2, 2)
    for make, data in ((_Net, x), (lambda: GPT(gpt), ids)):
        model, untouched = make(), make()
        linears = _linears(model)
        expected = untouched(data)
        result = run(name, lambda model=model: function(model, 2, 6))
        if result is None:
            raise failed(name, "It returns nothing; return the model.")
        if result is not model:
            raise failed(name, f"It returns {type(result).__name__}, another object than the model "
                         "it was given: change that one in place, with setattr, and return it.")
        _check_replaced(name, model, linears)
        _check_frozen(name, model)
        if not np.allclose(model(data), expected, atol=1e-5):
            raise failed(name, "The model's output has changed. With B = 0 it must not.")
        tree = repr(model)
        for layer in _lora(model):
            layer.lora.B.data += 0.5  # as if it had been trained
        trained = model(data)
        run(name, lambda model=model: function(model, 2, 6))
        if _nested(model):
            raise failed(name, _NESTED)
        if not np.array_equal(model(data), trained):
            raise failed(name, "A second call throws away what A and B have learned: leave "
                         "layers that are wrapped already as they are.")
        if repr(model) != tree:
            raise failed(name, "The same call a second time changes the model; it should change "
                         "nothing.")
        _check_frozen(name, model, again=True)
        half = make()
        if isinstance(half, _Net):
            half.first = LinearWithLoRA(half.first, 2, 6)
            wanted = {path: m for path, m in _linears(half).items() if path != "first.linear"}
            run(name, lambda half=half: function(half, 2, 6))
            _check_replaced(name, half, wanted | {"first": half.first.linear})
    return Passed(name, "Checked on two models, with a second call of the same.")


_NESTED = ("A layer was replaced inside an already replaced layer: the Linear in a LinearWithLoRA "
           "is found again by the recursion. Do not go into a LinearWithLoRA.")


def _linears(model: Module) -> dict[str, Linear]:
    return {path: m for path, m in model.named_modules() if type(m) is Linear}


def _lora(model: Module) -> list[LinearWithLoRA]:
    return [m for _, m in model.named_modules() if isinstance(m, LinearWithLoRA)]


def _nested(model: Module) -> bool:
    return any(isinstance(inner, LinearWithLoRA) and inner is not outer
               for _, outer in model.named_modules() if isinstance(outer, LinearWithLoRA)
               for _, inner in outer.named_modules())


def _check_replaced(name: str, model: Module, linears: dict[str, Linear]) -> None:
    read = "for every child: replace it if it is a Linear, else go into it."
    if _nested(model):
        raise failed(name, _NESTED, read)
    modules = dict(model.named_modules())
    left = [path for path in linears if not isinstance(modules.get(path), LinearWithLoRA)]
    if len(left) == len(linears):
        raise failed(name, "No Linear was replaced. Test for the kind, isinstance(child, Linear), "
                     "and not for names. And assign to the parent, setattr(parent, name, "
                     "LinearWithLoRA(...)): a new value for the loop variable changes nothing.",
                     read)
    if left and any("." in path for path in set(linears) - set(left)) and all(
        "." in path for path in left
    ):
        raise failed(name, f"Not deep enough, or not every branch; left are {', '.join(left[:4])}. "
                     "Loops inside loops reach some depth only; a function that calls itself for "
                     "each child reaches any.", read)
    if left and all("." in path for path in left):
        raise failed(name, f"Only the top level was replaced; left are {', '.join(left[:4])}. Call "
                     "the function for the children that are no Linear (recursion).", read)
    if left:
        raise failed(name, f"These Linears were not replaced: {', '.join(left[:4])}.", read)
    for path, linear in linears.items():
        layer = modules[path]
        if layer.linear is not linear:
            raise failed(name, f"{path} has a new Linear inside: wrap the one that was there, it "
                         "has the weights.", read)
        if layer.lora.rank != 2 or layer.lora.alpha != 6:
            raise failed(name, f"{path} has rank {layer.lora.rank} and alpha {layer.lora.alpha}, "
                         "not the rank 2 and alpha 6 that were given.", read)
        if layer.lora.scale != 3.0:
            raise failed(name, f"{path} has the scale {layer.lora.scale:g}, not alpha / r = 3: "
                         "leave the scaling as it is by default.", read)
    extra = [path for path, m in modules.items() if isinstance(m, LinearWithLoRA)
             and path not in linears]
    if extra:
        raise failed(name, f"There are LoRA layers where no Linear was: {', '.join(extra)}.", read)


def _check_frozen(name: str, model: Module, again: bool = False) -> None:
    read = "Freeze the whole model first; new LoRA layers come in trainable."
    if again:
        read = "A second call changes nothing: what is LoRA's already must not be frozen."
    trainable = {path for path, p in model.named_parameters() if p.requires_grad}
    lora = {path for path, _ in model.named_parameters() if ".lora." in path}
    when = " after the second call" if again else ""
    if not trainable & lora:
        raise failed(name, f"Nothing of LoRA is trainable{when}: it was frozen together with the "
                     "rest. Freeze before replacing" + (
                         ", and leave out what is LoRA's already (its names have .lora. in them)."
                         if again else "."), read)
    if trainable - lora:
        rest = sorted(trainable - lora)
        raise failed(name, f"The base is not frozen: {', '.join(rest[:4])} can still be trained"
                     f"{when}. LinearWithLoRA freezes only the Linear that it wraps.", read)
    if lora - trainable:
        raise failed(name, f"{sorted(lora - trainable)[0]} is frozen{when}; A and B are to be "
                     "trained.", read)


# ---- 9. Merging


def merge(cls: type) -> Passed:
    """Check a class MergeableLinear(W, A, B, scale) with forward, merge, unmerge and merged."""
    name = "MergeableLinear"
    if not isinstance(cls, type):
        raise failed(name, f"Give the class itself, not {type(cls).__name__}.")
    rng = np.random.default_rng(0)
    for n, m, r in ((4, 3, 2), (3, 3, 1), (5, 6, 4)):
        w, a, b = (rng.standard_normal(s) for s in ((n, m), (n, r), (r, m)))
        _check_merging(name, cls, w, 50 * a, b, 0.3, rng.standard_normal((4, n)))
    small = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (4, 2), (2, 3))]
    layer = run(name, lambda: cls(*small, 0.5))
    run(name, layer.merge)
    if np.asarray(run(name, lambda: layer.forward(small[0].T.copy()))).dtype != np.float32:
        raise failed(name, "With float32 arrays the result is not float32: keep their dtype.")
    return Passed(name, "Checked forward, merging, both traps, and that the weight comes back.")


def _check_merging(
    name: str, cls: type, w: np.ndarray, a: np.ndarray, b: np.ndarray, s: float, x: np.ndarray
) -> None:
    read = "x W + s x A B = x (W + s A B): merging moves the sum into the weight, once."
    given = {"W": w.copy(), "A": a.copy(), "B": b.copy()}
    layer = run(name, lambda: cls(given["W"], given["A"], given["B"], s))
    twin = run(name, lambda: cls(2 * w, a.copy(), b.copy(), s))  # alive at the same time

    def forward(of: Any = layer) -> np.ndarray:
        inputs = x.copy()
        y = run(name, lambda: of.forward(inputs))
        if y is None:
            raise failed(name, "forward returns nothing.")
        if not np.array_equal(inputs, x):
            raise failed(name, "forward changes its input x in place.")
        return np.array(y)

    def merged(of: Any = layer) -> bool:
        if not hasattr(of, "merged"):
            raise failed(name, "It has no attribute merged, True or False.")
        return bool(of.merged)

    def unchanged(when: str) -> None:
        for what, array in (("W", w), ("A", a), ("B", b)):
            if not np.array_equal(given[what], array):
                raise failed(name, f"{when} changes the {what} that the caller gave in place "
                             "(such as by +=). Another layer may share it: make a new array.", read)

    full, double = x @ (w + s * a @ b), x @ (w + 2 * s * a @ b)
    for value, text in ((x @ w, "forward leaves the LoRA branch out before merging."),
                        (x @ (w + a @ b), "forward lacks the scale."),
                        (double, "forward adds the LoRA branch twice before merging.")):
        if same(forward(), value):
            raise failed(name, text, read)
    if not same(forward(), full):
        raise failed(name, "forward before merging is not x W + scale * x A B.", read)
    unchanged("Construction or forward")
    if merged():
        raise failed(name, "merged should be False at first.")
    before, other = forward(), forward(twin)
    run(name, layer.merge)
    unchanged("merge")
    _check_merged(name, forward, merged, w, a, b, s, x)
    _expect_error(name, layer, "merge", forward, full,
                  "Merging a second time must raise a RuntimeError: it would add the update twice.")
    _check_other(name, lambda: forward(twin), lambda: merged(twin), other)
    given["A"][...] = 0.0  # what is in the weight now must not need the branch any more
    if not same(forward(), full):
        raise failed(name, "merge moves nothing into the weight: forward still needs A and B "
                     "afterwards, so a merged layer costs as much as before.", read)
    given["A"][...] = a
    run(name, layer.unmerge)
    if merged():
        raise failed(name, "merged should be False after unmerge().")
    if not same(forward(), full):
        left = same(forward(), double)
        text = "unmerge leaves the update in the weight." if left else (
            "after merge and unmerge, the output is another than before.")
        raise failed(name, f"{text} (Did the second merge, which was refused, overwrite the weight "
                     "that was kept? Check first, then remember.)", read)
    if not np.array_equal(forward(), before):
        raise failed(name, "unmerge does not give the old weight back bit for bit: subtracting "
                     "leaves rounding errors. Keep the old weight and put it back.", read)
    _expect_error(name, layer, "unmerge", forward, full,
                  "unmerge must raise a RuntimeError where nothing is merged.")
    given["B"] *= 0.5  # as training would: merging takes what is there now
    trained = forward()
    run(name, layer.merge)
    if not same(forward(), trained):
        raise failed(name, "A second round of merging uses an update from before: take A and B as "
                     "they are when merge is called.", read)


def _check_merged(
    name: str, forward: Callable[[], np.ndarray], merged: Callable[[], bool], w: np.ndarray,
    a: np.ndarray, b: np.ndarray, s: float, x: np.ndarray,
) -> None:
    read = "after merging, the weight is W + s A B, and forward is one product with it."
    if not merged():
        raise failed(name, "merged should be True after merge(): forward looks at it.")
    for value, text in (
        (x @ (w + 2 * s * a @ b), "after merging, the output has the update twice: forward still "
         "adds x A B, though it is in the weight now."),
        (x @ w, "after merging, the update is gone: forward leaves it out, but it is not in the "
         "weight."),
        (x @ (w + a @ b), "the merged weight lacks the scale."),
        (x @ (w + s * s * a @ b), "the merged weight has the scale twice."),
        (x @ (w - s * a @ b), "the update is subtracted in merging."),
        (x @ (s * a @ b), "the merged weight is the update alone; add it to W."),
    ):
        if same(forward(), value):
            raise failed(name, text, read)
    if not same(forward(), x @ (w + s * a @ b)):
        raise failed(name, "after merging, the output is another than before.", read)


def _check_other(
    name: str, forward: Callable[[], np.ndarray], merged: Callable[[], bool], before: np.ndarray
) -> None:
    """See that another layer of the class has noticed nothing."""
    if merged() or not np.array_equal(forward(), before):
        raise failed(name, "Merging one layer changes another one: something is kept in the class "
                     "and not in self.")


def _expect_error(
    name: str, layer: Any, method: str, forward: Callable[[], np.ndarray], full: np.ndarray,
    text: str,
) -> None:
    try:
        getattr(layer, method)()
    except RuntimeError as error:
        if isinstance(error, NotImplementedError):
            raise failed(name, f"{method} is not implemented yet.") from None
    except Exception as error:
        raise failed(name, f"{text} Yours raised {type(error).__name__}.") from None
    else:
        more = "" if same(forward(), full) else " Yours did: the output has changed."
        raise failed(name, text + more)
    if not same(forward(), full):
        raise failed(name, f"{method} raises an error, but has changed the weight before: check "
                     "first, then change.")


# ---- 10. Errors in a published table

# Hu et al. 2021, tables 2 to 4 and appendix D.4: LoRA on `matrices` square matrices of width d in
# each layer, and what is printed.
TABLE = [
    {"name": "RoBERTa base", "d": 768, "layers": 12, "matrices": 2, "rank": 8, "printed": "0.3M"},
    {"name": "RoBERTa large", "d": 1024, "layers": 24, "matrices": 2, "rank": 8, "printed": "0.8M"},
    {"name": "GPT-2 medium", "d": 1024, "layers": 24, "matrices": 2, "rank": 4, "printed": "0.35M"},
    {"name": "GPT-2 large", "d": 1280, "layers": 36, "matrices": 2, "rank": 4, "printed": "0.77M"},
    {"name": "GPT-3, r=1", "d": 12288, "layers": 96, "matrices": 2, "rank": 1, "printed": "4.7M"},
    {"name": "GPT-3, r=8", "d": 12288, "layers": 96, "matrices": 2, "rank": 8, "printed": "37.7M"},
    {"name": "GPT-3, r=2 on four", "d": 12288, "layers": 96, "matrices": 4, "rank": 2,
     "printed": "37.7M"},
]


def _count(row: dict[str, Any]) -> int:
    return 2 * row["layers"] * row["matrices"] * row["d"] * row["rank"]


def _follows(row: dict[str, Any], count: float | None = None, digits: int | None = None) -> bool:
    """Whether the count, rounded to as many digits as are printed, is what is printed."""
    digits = len(row["printed"].rstrip("M").partition(".")[2]) if digits is None else digits
    return f"{(_count(row) if count is None else count) / 1e6:.{digits}f}M" == row["printed"]


def find_errors(function: Callable[[list[dict[str, Any]]], list[str]]) -> Passed:
    """Check a function find_errors(table) -> the names of the rows that do not follow."""
    name = "find_errors"
    read = "2 * layers * matrices * d * r, rounded to as many digits as are printed."
    rng = np.random.default_rng(0)
    made = []
    for i in range(12):  # rows that cannot be known by heart
        row = {"name": f"row {i}", "d": int(rng.integers(10, 2000)) * 8, "layers": 6 * (i + 1),
               "matrices": 1 + i % 4, "rank": 2 ** (i % 5)}
        wrong = (1.0, 1.0, 0.5, 1.08)[i % 4]
        made.append(row | {"printed": f"{wrong * _count(row) / 1e6:.2f}M"})
    tables, answers = (TABLE, made, made[:2], []), []
    for table in tables:
        given = copy.deepcopy(table)
        got = run(name, lambda given=given: function(given))
        if given != table:
            raise failed(name, "It changes the table that it was given.")
        if got is None:
            raise failed(name, "It returns nothing; return the list of names.")
        if not isinstance(got, (list, tuple, set)) or not all(isinstance(x, str) for x in got):
            raise failed(name, f"Return a list of names (text); yours is {str(got)[:80]}.")
        answers.append(sorted(got))
    _name_cause(name, tables, answers, read)
    for table, got in zip(tables, answers, strict=True):
        want = [row["name"] for row in table if not _follows(row)]
        for row in table:
            facts = f"{row['name']}: {_count(row):,} parameters, printed {row['printed']}"
            if row["name"] in got and row["name"] not in want:
                raise failed(name, f"{facts}. That is right when rounded, yet you list it.", read)
            if row["name"] in want and row["name"] not in got:
                raise failed(name, f"{facts}. That is no rounding, yet you do not list it.", read)
        if got != sorted(want):
            raise failed(name, f"Return the names of the wrong rows, {want}; yours are {got}.")
    return Passed(name, "Checked on the paper's table and on others.")


def _name_cause(
    name: str, tables: tuple[list[dict[str, Any]], ...], answers: list[list[str]], read: str
) -> None:
    """Say what kind of mistake gives these answers, if a usual one does so on every table."""

    def lists(count: Callable[[dict[str, Any]], float], digits: int | None = None) -> list[list]:
        return [sorted(r["name"] for r in t if not _follows(r, count(r), digits)) for t in tables]

    causes = (
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
        raise failed(name, "Wrong rows are listed: " + " Or: ".join(fitting), read)


# ---- 11. Training under a budget

BUDGET = 6_000  # trainable parameters
BUDGET_STEPS, BUDGET_GAIN = 40, 0.42  # steps, and nats per character to be gained


def train_with(settings: dict[str, Any]) -> dict[str, float]:
    """Train the small base with these settings; return trainable, loss before, loss, and gain.

    settings: rank, alpha, learning_rate, and target_modules (a list of names, or None for all).
    40 steps on the source of argparse; losses in nats per character on what was held out of it.
    """
    model = load_base("small")
    replace_linear_with_lora(model, settings["rank"], settings["alpha"],
                             settings.get("target_modules"), rng=0)
    tokenizer = CharTokenizer()
    code, held_out = (tokenizer.encode(t) for t in split(plain(module_source("argparse"))))
    batches = sequential_batches(held_out, 32, 64, limit=2)
    rate = settings["learning_rate"]
    before = evaluate(model, batches)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], rate)
    try:
        with one_blas_thread():  # faster for matrices as small as these
            fit(model, random_batches(code, 16, 64, rng=0), optimizer, BUDGET_STEPS,
                schedule=cosine_schedule(rate, BUDGET_STEPS, 5), clip_norm=1.0, progress=False)
            loss = evaluate(model, batches)
    except FloatingPointError:
        loss = math.inf
    return {"trainable": model.num_parameters(trainable_only=True), "before": before,
            "loss": loss, "gain": before - loss}


def train(settings: dict[str, Any]) -> Passed:
    """Check a choice of rank, alpha, learning rate and targets: within the budget, good enough."""
    name = "train"
    if settings is None or isinstance(settings, dict) and not settings:
        raise failed(name, "Not implemented yet: choose rank, alpha, learning_rate, "
                     "target_modules.")
    if not isinstance(settings, dict):
        raise failed(name, f"Give a dict of settings, not {type(settings).__name__}.")
    wanted = {"rank", "alpha", "learning_rate", "target_modules"}
    if missing := {"rank", "alpha", "learning_rate"} - set(settings):
        raise failed(name, f"Missing in the settings: {', '.join(sorted(missing))}.")
    if unknown := set(settings) - wanted:
        raise failed(name, f"Unknown settings: {', '.join(sorted(map(str, unknown)))}.")
    rate = settings["learning_rate"]
    if not isinstance(rate, (int, float, np.number)) or not 0 < rate < 10:
        raise failed(name, f"learning_rate should be between 0 and 10, not {rate!r:.80}.")
    settings = settings | {"learning_rate": float(rate)}
    try:
        check_hyperparameters(settings["rank"], settings["alpha"], "alpha/r", "fan-in")
        targets = find_targets(load_base("small"), settings.get("target_modules"))
    except (ValueError, TypeError) as error:
        raise failed(name, str(error)) from None
    if not settings["alpha"]:
        raise failed(name, "alpha is 0, so the update is zero whatever is trained.")
    trainable = sum(settings["rank"] * sum(linear.weight.shape) for linear in targets.values())
    if trainable > BUDGET:
        raise failed(name, f"Over the budget: {trainable:,} trainable parameters, {BUDGET:,} are "
                     "allowed. A lower rank, or fewer matrices?",
                     "r (n + m) for each adapted matrix.")
    result = run(name, lambda: train_with(settings))
    if result["gain"] < BUDGET_GAIN:
        scale = abs(settings["alpha"] / settings["rank"])
        if not result["gain"] > 0:
            why = "it is worse than before: the learning rate, or alpha / rank, is too high."
        elif rate <= 0.3 * compare.LORA_LEARNING_RATE:
            why = ("that learning rate is one for full fine-tuning. LoRA starts at B = 0 and wants "
                   "one several times as high.")
        elif rate >= 5 * compare.LORA_LEARNING_RATE:
            why = "the learning rate looks too high."
        elif scale < 0.5:
            why = f"alpha / rank is only {scale:g}: every step of B counts for little."
        elif trainable < BUDGET / 4:
            why = f"you use only {trainable:,} of {BUDGET:,} parameters."
        else:
            why = "try other matrices at the same number of parameters, or another learning rate."
        raise failed(name, f"A gain of {result['gain']:.3f} nats per character; {BUDGET_GAIN} are "
                     f"asked for. Look: {why}", "notebook 4: learning rates, ranks, placement.")
    return Passed(name, f"{trainable:,} parameters gain {result['gain']:.3f} nats per character.")


# ---- 12. Low-rank diagnosis


def effective_rank(f: Factors, share: float = 0.9) -> int:
    """Return how many singular values of the update hold `share` of its squared norm."""
    squares = np.linalg.svd(f.delta_weight().astype(np.float64), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(squares), share * squares.sum() * (1 - 1e-9)) + 1)


def diagnosis(function: Callable[[Adapter], tuple[str, int]]) -> Passed:
    """Check a function diagnose(adapter) -> (name of the layer changed most, effective rank)."""
    name = "diagnose"
    read = ("||scale A B|| in the Frobenius norm; singular values squared and summed up to 90% of "
            "their sum.")
    answers = []
    for seed in range(16):
        adapter = _adapter(seed)
        given = copy.deepcopy(adapter)
        got = run(name, lambda given=given: function(given))
        if list(given.layers) != list(adapter.layers) or any(
            not np.array_equal(x, y) for p in adapter.layers
            for x, y in zip(adapter.layers[p].arrays, given.layers[p].arrays, strict=True)
        ):
            raise failed(name, "It changes the adapter that it was given.")
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise failed(name, "It should return two things, the name of the layer and the rank.")
        if not isinstance(got[0], str) or got[0] not in adapter.layers:
            raise failed(name, f"The first thing should be the name of a layer, one of "
                         f"{', '.join(adapter.layers)}; yours is {got[0]!r:.80}.")
        if not isinstance(got[1], (int, np.integer)) or isinstance(got[1], bool):
            raise failed(name, f"The second thing should be a whole number; yours is {got[1]!r}.")
        answers.append((adapter, got))
    _check_layer(name, answers, read)
    _check_rank(name, answers, read)
    return Passed(name, f"Checked on {len(answers)} adapters.")


def _adapter(seed: int) -> Adapter:
    """Make an adapter whose layers differ in scale, size, and how fast their ranks fall off."""
    rng, layers = np.random.default_rng(seed), {}
    paths = ["h.0.attn.q_proj", "h.0.mlp.up_proj", "h.0.mlp.down_proj", "h.1.attn.v_proj"]
    for path in rng.permutation(paths).tolist():
        n, m = {"up": (12, 30), "do": (30, 12)}.get(path.rpartition(".")[2][:2], (12, 12))
        r = int(rng.integers(2, 9))
        a, b = rng.standard_normal((n, r)), rng.standard_normal((r, m))
        b *= np.exp(-rng.uniform(0.0, 1.2) * np.arange(r))[:, None]
        layers[path] = Factors(a, rng.uniform(0.2, 3.0) * b, float(rng.uniform(1, 40)))
    if seed % 2:  # one layer has the largest singular value, another the largest norm
        peak, flat = rng.permutation(list(layers))[:2].tolist()
        largest = max(f.norm() for f in layers.values())
        for path, values in ((peak, [2.0]), (flat, [1.2] * 4)):
            u, _ = np.linalg.qr(rng.standard_normal((len(layers[path].A), len(values))))
            v, _ = np.linalg.qr(rng.standard_normal((layers[path].B.shape[1], len(values))))
            layers[path] = Factors(u, largest * np.array(values)[:, None] * v.T, float(len(values)))
    return Adapter(layers)


def _check_layer(name: str, answers: list[tuple[Adapter, tuple]], read: str) -> None:
    def most(size: Callable[[Factors], float]) -> list[str]:
        return [max(a.layers, key=lambda p, a=a: size(a.layers[p])) for a, _ in answers]

    got = [answer[0] for _, answer in answers]
    if got == most(Factors.norm):
        return
    norm = np.linalg.norm
    for size, text in (
        (lambda f: norm(f.A @ f.B), "you leave the scale out, and layers may differ in it."),
        (lambda f: norm(f.A) * norm(f.B), "the norm of a product is not the product of the norms; "
         "and the scale is missing."),
        (lambda f: abs(f.scale) * norm(f.A) * norm(f.B),
         "the norm of a product is not the product of the norms."),
        (lambda f: norm(f.A), "you look at A alone."),
        (lambda f: norm(f.B), "you look at B alone."),
        (lambda f: norm(f.A) + norm(f.B), "you add the norms of A and B; their product counts."),
        (lambda f: norm(f.delta_weight(), 2), "that is the largest singular value; the Frobenius "
         "norm counts all of them."),
        (lambda f: np.abs(f.delta_weight()).max(), "that is the largest entry; all count."),
        (lambda f: norm(f.delta_weight(), "nuc"), "you add the singular values; the Frobenius norm "
         "adds their squares."),
        (lambda f: np.abs(f.delta_weight()).sum(), "you add the entries; the norm adds their "
         "squares."),
        (lambda f: np.abs(f.delta_weight()).mean(), "that is the mean entry: it divides by the "
         "size of the layer."),
        (lambda f: norm(f.delta_weight()) / f.delta_weight().size ** 0.5,
         "you divide by the size of the layer."),
        (lambda f: f.norm() / len(f.A) ** 0.5, "you divide by the size of the layer."),
        (lambda f: -f.norm(), "that is the layer that changed least."),
        (lambda f: f.scale, "that is the layer with the largest scale."),
        (lambda f: f.delta_weight().sum(), "a sum of entries lets positive and negative cancel."),
        (lambda f: f.rank, "that is the layer with the largest rank."),
    ):
        if got == most(size):
            raise failed(name, f"The layer is wrong: {text}", read)
    adapter, answer = next(a for a, right in zip(answers, most(Factors.norm), strict=True)
                           if a[1][0] != right)
    norms = ", ".join(f"{p} {f.norm():.2f}" for p, f in adapter.layers.items())
    raise failed(name, f"The layer is wrong: you say {answer[0]}; the norms are {norms}.", read)


def _check_rank(name: str, answers: list[tuple[Adapter, tuple]], read: str) -> None:
    def ranks(rule: Callable[[np.ndarray], int]) -> list[int]:
        found = []
        for adapter, (path, _) in answers:
            f = adapter.layers[path]
            s = np.linalg.svd(f.delta_weight(), compute_uv=False)
            found.append(int(rule(s[: f.rank])))
        return found

    def reach(s: np.ndarray, power: float, share: float) -> int:
        sums = np.cumsum(s**power)
        return int(np.searchsorted(sums, share * sums[-1]) + 1)

    got = [int(answer[1]) for _, answer in answers]
    if got == [effective_rank(adapter.layers[path]) for adapter, (path, _) in answers]:
        return
    for rule, text in (
        (lambda s: reach(s, 1, 0.9), "you add the singular values; add their squares."),
        (lambda s: reach(s, 2, 0.9) - 1, "it is off by one: the value that passes 90% counts."),
        (lambda s: reach(s, 2, 0.9) + 1, "it is off by one: what passes 90% is the last."),
        (lambda s: len(s), "that is the rank r itself, the most that it could be."),
        (lambda s: reach(s, 2, 0.99), "that is for 99%."),
        (lambda s: reach(s, 2, 0.95), "that is for 95%."),
        (lambda s: reach(s, 2, 0.5), "that is for 50%."),
        (lambda s: (s > 0.1 * s[0]).sum(), "you count values above a tenth of the largest."),
        (lambda s: reach(s, 4, 0.9), "you square the singular values twice."),
        (lambda s: 12, "np.linalg.matrix_rank, or the number of all singular values, is not it."),
    ):
        if got == ranks(rule):
            raise failed(name, f"The effective rank is wrong: {text}", read)
    adapter, (path, rank) = next(
        a for a in answers if int(a[1][1]) != effective_rank(a[0].layers[a[1][0]]))
    squares = np.linalg.svd(adapter.layers[path].delta_weight(), compute_uv=False) ** 2
    shares = np.cumsum(squares / squares.sum())[: adapter.layers[path].rank]
    held = ", ".join(f"{share:.3f}" for share in shares)
    raise failed(name, f"The effective rank of {path} is wrong: you say {rank}; the first singular "
                 f"values hold {held} of the squared norm.", read)
