"""Adapted models drawn at random: a `Recipe` says how one is made, `build` makes it."""

import fnmatch
import warnings
from dataclasses import dataclass

import numpy as np
from conftest import randomise, tiny_config
from hypothesis import reject
from hypothesis import strategies as st

import minilora as ml
from minilora.lora.surgery import base_modules, lora_layers, task_parameters
from minilora.nn.quantized import QuantizedParameter

# ---- Recipes


@dataclass(frozen=True)
class Call:
    """The arguments of one call of replace_linear_with_lora; no targets are all Linears."""

    rank: int = 2
    alpha: float = 4
    scaling: str = "alpha/r"
    targets: tuple[str, ...] = ()
    use_dora: bool = False
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How an adapted model is made; patterns are globs of dotted names of the base."""

    config: ml.GPTConfig | ml.LlamaConfig | str  # or the name of another model, see OTHERS
    dtype: type = np.float32
    quantized: str = ""  # the kind in which Linears are stored
    recompute: bool = False  # of a Llama
    changed: str = ""  # how the base differs from its configuration, see `change`
    head: str = ""  # what replaces the head, see HEADS
    head_first: bool = True  # before LoRA rather than after
    calls: tuple[Call, ...] = ()
    trained: tuple[str, ...] = ()  # patterns of the base's parameters to unfreeze and change
    frozen: tuple[str, ...] = ()  # ends of names to freeze in the task, such as "A"
    odd_number: tuple[float, int] | None = None  # (value, which parameter of the task gets it)
    merged: str = ""  # or "merged", "unloaded"


class Named(ml.Module):
    """Modules under names of one's choice, applied in order."""

    def __init__(self, **modules):
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        for _, module in self.named_children():
            x = module(x)
        return x


class Gained(ml.Module):
    """A model with a Parameter of its own."""

    def __init__(self, body, dtype):
        self.gain = ml.Parameter(np.ones(8, dtype))
        self.body = body

    def forward(self, x):
        return self.body(x) * self.gain.data


NAMES = [
    "0", "1", "score", "lm_head", "c_attn", "q_proj", "wte", "h", "transformer", "base_model",
    "model", "base_layer", "original_module", "modules_to_save", "default", "lora_A", "linear",
    "module", "original", "weight", "bias", "a b", "x+y", "*", "é", "all-linear", "n" * 300,
]


def _sequential(linear, dtype):
    inner = ml.Sequential(linear(), ml.LayerNorm(8, dtype=dtype), linear(bias=False))
    return ml.Sequential(linear(), ml.GELU(), inner, linear())


def _twice(linear, dtype):
    shared = linear()
    return ml.Sequential(shared, ml.GELU(), shared, linear())


def _deep(linear, dtype):  # many names that end alike
    return ml.Sequential(*(Named(**{"l" * 20: Named(**{"0": linear()})}) for _ in range(30)))


OTHERS = {
    "sequential": _sequential, "twice": _twice, "deep": _deep,
    "gained": lambda linear, dtype: Gained(_sequential(linear, dtype), dtype),
}
HEADS = ["same", "same, bias", "narrow", "narrow, bias"]  # the shape, and whether with a bias


# ---- Models


def base_of(recipe):
    """Return the base: the same numbers at every call."""
    rng = np.random.default_rng(0)
    if isinstance(recipe.config, ml.GPTConfig):
        model = ml.GPT(recipe.config, rng, recipe.dtype)
        change(model, recipe.changed, recipe.dtype)
    elif isinstance(recipe.config, ml.LlamaConfig):
        model = ml.Llama(recipe.config, rng, recipe.dtype)
        model.recompute = recipe.recompute
    else:
        def linear(bias=True):
            return ml.Linear(8, 8, bias, recipe.dtype, rng)

        kind, _, names = recipe.config.partition(": ")
        if kind == "named":
            first, second = names.split(", ")
            inner = Named(**{second: linear(), first: linear()})
            model = Named(**{first: linear(), second: inner})
        else:
            model = OTHERS[kind](linear, recipe.dtype)
    randomise(model)
    return (ml.quantize(model, recipe.quantized) if recipe.quantized else model).eval()


def change(model, what, dtype):
    """Make a GPT that its configuration does not describe."""
    first, last = model.h[0], model.h[len(model.h) - 1]
    match what:
        case "one q_proj":
            last.attn.k_proj = first.attn.q_proj
        case "one weight":
            last.attn.k_proj.weight = first.attn.q_proj.weight
        case "one norm":
            last.ln_2 = first.ln_1
        case "one block":
            model.h = ml.ModuleList([*model.h, first])
        case "bias":
            has = last.attn.q_proj.bias is not None
            last.attn.q_proj = ml.Linear(8, 8, not has, dtype, rng=0)
        case "norm without bias":
            model.ln_f.bias = None
        case "no norm":
            last.ln_2 = ml.Sequential()
        case "narrow MLP":
            last.mlp.up_proj = ml.Linear(8, 9, dtype=dtype, rng=0)
            last.mlp.down_proj = ml.Linear(9, 8, dtype=dtype, rng=0)
        case "no GELU":
            last.mlp.gelu = ml.Sequential()
        case "eps":
            last.ln_1.eps = 0.1
        case "heads":
            last.attn.n_heads = 4
        case "more words":
            model.wte = ml.Embedding(13, 8, dtype, rng=0)
        case "longer":
            model.wpe = ml.Embedding(9, 8, dtype, rng=0)


CHANGES = [
    "one q_proj", "one weight", "one norm", "one block", "bias", "norm without bias", "no norm",
    "narrow MLP", "no GELU", "eps", "heads", "more words", "longer",
]


def build(recipe, base=None):
    """Return the adapted model, each of whose trained parameters has moved."""
    model = base_of(recipe) if base is None else base
    if recipe.head_first:
        _new_head(model, recipe)
    for i, call in enumerate(recipe.calls):
        replace(model, call, rng=i)
    if not recipe.head_first:
        _new_head(model, recipe)
    _train(model, recipe)
    _merge(model, recipe.merged)
    return model.eval()


def replace(model, call, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of high ranks
        try:
            ml.replace_linear_with_lora(
                model, call.rank, call.alpha, list(call.targets) or None, call.scaling,
                call.dropout, rng, list(call.modules_to_save) or None, call.use_dora)
        except ValueError:  # no such names, since an earlier call has taken the modules
            reject()


def _new_head(model, recipe):
    if recipe.head == "tied":
        model.lm_head = ml.TiedHead(model)
    elif recipe.head:
        c, (shape, _, bias) = model.config, recipe.head.partition(", ")
        width = c.vocab_size if shape == "same" else 5
        model.lm_head = ml.Linear(c.d_model, width, bool(bias), recipe.dtype, rng=5)
    if recipe.head == "two layers":
        inner = ml.Linear(c.d_model, c.d_model, dtype=recipe.dtype, rng=6)
        model.lm_head = ml.Sequential(inner, model.lm_head)


def _train(model, recipe):
    of_base = used_parameters(model)
    dora = {id(layer.linear.weight) for _, layer in lora_layers(model)
            if isinstance(layer, ml.DoRALinear)}  # which cannot be trained
    for name, parameter in of_base.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.trained):
            fixed = id(parameter) in dora or isinstance(parameter, QuantizedParameter)
            parameter.requires_grad = not fixed
    task = task_parameters(model)
    moved = {id(p): p for p in [*task.values(), *of_base.values()]
             if p.requires_grad or any(p is q for q in task.values())}
    rng = np.random.default_rng(2)
    for parameter in moved.values():
        parameter.data += 0.3 * rng.standard_normal(parameter.shape)
    for name, parameter in task.items():
        if name.rpartition(".")[2] in recipe.frozen:
            parameter.requires_grad = False
    if recipe.odd_number and moved:
        value, which = recipe.odd_number
        with np.errstate(over="ignore"):
            list(moved.values())[which % len(moved)].data.flat[0] = value


def _merge(model, how):
    if how and list(lora_layers(model)):
        with np.errstate(all="ignore"):
            ml.merge_lora(model, unload=how == "unloaded")


def used_parameters(model, path=""):
    """Return {name in the base: Parameter} of what forward uses, without those of LoRA."""
    model = model.module if isinstance(model, ml.ModuleToSave) else model
    model = model.linear if isinstance(model, ml.LinearWithLoRA) else model
    found = {f"{path}{name}": value for name, value in vars(model).items()
             if isinstance(value, ml.Parameter)}
    for name, child in model.named_children():
        found |= used_parameters(child, f"{path}{name}.")
    return found


def inputs(recipe):
    rng = np.random.default_rng(3)
    if not isinstance(recipe.config, str):
        return rng.integers(0, recipe.config.vocab_size, (3, recipe.config.context_length))
    return rng.standard_normal((3, 8)).astype(recipe.dtype)


def logits(model, recipe):
    with np.errstate(all="ignore"):
        return model(inputs(recipe))


# ---- Strategies

SCALINGS = ["alpha/r", "alpha/sqrt(r)", "alpha"]
ODD_ALPHAS = [0, -1e-30, 5e-324, 1e-40, 1e29, 1e30, -1e38, 1e39, 1e300, float(2**63)]
ODD_NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e-45, 1e20, 1e30, 3e38, 1e200]
GLOBS = ["*.ln_1.bias", "*.q_proj.bias", "*.bias", "*.ln_*.weight", "w?e.weight", "lm_head.*", "*"]


def rarely(strategy, otherwise):
    """Draw from a strategy in one of six cases, and else from the other, or that value."""
    if not isinstance(otherwise, st.SearchStrategy):
        otherwise = st.just(otherwise)
    return st.integers(0, 5).flatmap(lambda n: strategy if n == 5 else otherwise)


def some(names, most=3):
    return st.lists(st.sampled_from(names), max_size=most, unique=True).map(tuple)


def configs(**fixed):
    choices = dict(n_layers=st.integers(1, 2), n_heads=st.integers(1, 2), bias=st.booleans(),
                   tie_weights=st.booleans(), dropout=st.sampled_from([0.0, 0.2]),
                   layer_norm_eps=st.sampled_from([1e-5, 1e-3]))
    return st.builds(tiny_config, **choices | {key: st.just(v) for key, v in fixed.items()})


@st.composite
def calls(draw, base, odd=True):
    """Draw one call for a base; `odd` allows alphas that are no good for training."""
    modules = base_modules(base)
    linears = [name for name, module in modules.items() if isinstance(module, ml.Linear)]
    ends = sorted({name.rpartition(".")[2] for name in linears})
    whole = [name for name, module in modules.items()
             if type(module).forward is not ml.Module.forward and name
             and list(module.parameters())]
    alphas = st.sampled_from([1, 4, 8.0, 0.1, 0, -3])
    alphas = rarely(st.sampled_from(ODD_ALPHAS), alphas) if odd else alphas
    return Call(
        rank=draw(st.integers(1, 4)),
        alpha=draw(alphas),
        scaling=draw(st.sampled_from(SCALINGS)),
        targets=draw(some(linears + ends)), use_dora=draw(rarely(st.just(True), False)),
        dropout=draw(st.sampled_from([0.0, 0.25])),
        modules_to_save=draw(st.one_of(st.just(()), some(whole, 2))),
    )


@st.composite
def recipes(draw, kinds="all", odd=True):
    """Draw a recipe for any adapted model, or for a GPT only."""
    named = st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True)
    named = named.map(lambda names: f"named: {', '.join(names)}")
    others = st.one_of(st.sampled_from([*OTHERS]), named)
    is_gpt = kinds == "GPT" or draw(st.integers(0, 2)) > 0
    recipe = {"config": draw(configs() if is_gpt else others),
              "dtype": draw(st.sampled_from([np.float32, np.float64]))}
    if is_gpt:
        heads = st.sampled_from(["", *HEADS, "tied", "two layers"])
        recipe |= {"head": draw(st.one_of(st.just(""), heads)), "head_first": draw(st.booleans()),
                   "changed": draw(rarely(st.sampled_from(CHANGES), ""))}
    base = base_of(Recipe(**recipe))
    if is_gpt and recipe["head_first"]:
        _new_head(base, Recipe(**recipe))
    names = list(base.state_dict())
    recipe["calls"] = tuple(draw(st.lists(calls(base, odd), min_size=1, max_size=3)))
    if draw(st.booleans()):  # the same kind everywhere, as files can have it
        first = recipe["calls"][0]
        recipe["calls"] = tuple(
            Call(**vars(c) | {"use_dora": first.use_dora, "scaling": first.scaling})
            for c in recipe["calls"])
    return Recipe(
        **recipe, trained=draw(st.one_of(st.just(()), some(GLOBS + names))),
        frozen=draw(st.one_of(st.just(()), some(["A", "B", "magnitude", "weight", "bias"]))),
        odd_number=draw(rarely(st.tuples(st.sampled_from(ODD_NUMBERS), st.integers(0, 20)), None))
        if odd else None,
        merged=draw(rarely(st.just("merged"), "")),
    )
