"""Parameters, and the tree of modules that holds them.

A `Parameter` is an array with a gradient beside it. A `Module` is anything with a
`forward` and a hand-written `backward`; modules that hold other modules form a tree, and
the tree gives every parameter its name, such as ``h.0.attn.q_proj.weight``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

FLOAT_TYPES = (np.float32, np.float64)


def float_dtype(dtype: Any) -> np.dtype:
    """Return `dtype` as a numpy dtype; TypeError unless it is float32 or float64."""
    dtype = np.dtype(dtype)
    if dtype not in FLOAT_TYPES:
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    return dtype


def make_rng(rng: np.random.Generator | int | None) -> np.random.Generator:
    """Return a Generator: `rng` itself, or one seeded with the int, or a fresh one for None."""
    if rng is None or isinstance(rng, (int, np.integer, np.random.Generator)):
        if isinstance(rng, (int, np.integer)) and rng < 0:
            raise ValueError(f"a seed must be 0 or more, got {rng}")
        return np.random.default_rng(rng)
    raise TypeError(f"rng must be a numpy Generator, an int or None, got {type(rng).__name__}")


def closest(name: str, known: Any) -> str:
    """Return ``; did you mean 'x'?`` for the known name nearest to `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


class Parameter:
    """An array that can be trained, and its gradient.

    data            ndarray, float32 or float64 (anything else real becomes float32), copied
    grad            None, or an ndarray of the same shape and dtype
    requires_grad   False: frozen; no gradient is ever computed or allocated for it

    Raises TypeError where `data` is not an array of real numbers.
    """

    __slots__ = ("data", "grad", "requires_grad")  # so that a typo such as `.gard` raises

    def __init__(self, data: Any, requires_grad: bool = True):
        data = np.asarray(data)
        if data.dtype.kind not in "fiub":
            raise TypeError(f"a Parameter holds real numbers, got dtype {data.dtype}")
        dtype = data.dtype if data.dtype in FLOAT_TYPES else np.float32
        self.data = np.array(data, dtype=dtype, order="C")
        self.grad: np.ndarray | None = None
        self.requires_grad = requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def size(self) -> int:
        return self.data.size

    def accumulate(self, grad: np.ndarray) -> None:
        """Add `grad` to `.grad`, as the chain rule asks for a value that is used twice.

        `grad` must be an array that nobody else keeps: the first one becomes `.grad` itself.
        """
        if self.grad is None:
            self.grad = np.asarray(grad)
        else:
            self.grad += grad

    def __repr__(self) -> str:
        frozen = "" if self.requires_grad else ", frozen"
        return f"Parameter(shape={self.shape}, dtype={self.data.dtype}{frozen})"


class Keys(NamedTuple):
    """What `load_state_dict(strict=False)` did not use: names missing and unexpected."""

    missing: list[str]
    unexpected: list[str]


class _Sealed(type):
    """Close a module to new attributes once its constructor has run. (Skip on first reading.)"""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        module = super().__call__(*args, **kwargs)
        module.__dict__["_sealed"] = True
        for name, value in vars(module).items():
            items = value.values() if isinstance(value, dict) else value
            if isinstance(value, (list, tuple, dict)) and any(
                isinstance(item, (Module, Parameter)) for item in items
            ):
                raise TypeError(
                    f"{cls.__name__}.{name} hides modules or parameters in a "
                    f"{type(value).__name__}, where they are not found: use a ModuleList"
                )
        return module


class Module(metaclass=_Sealed):
    """A differentiable function with parameters and, perhaps, child modules.

    A subclass writes `forward` and, beside it, `backward`. The pair has three rules:

    - `forward` stores what backward needs with `self._save(...)`, one tuple;
    - `backward` takes it away with `self._take()`, so it works once for each forward;
    - `backward` adds to the `.grad` of the trainable parameters, returns the gradient of
      the input, and never changes `dout`.

    `backward(dout, input_grad=False)` says that nobody needs the gradient of the input:
    the work for it is skipped and None is returned.

    Attributes are fixed once the constructor is done: assigning to a name that does not
    exist raises AttributeError, so that a typo cannot go unseen.
    """

    training = True
    _sealed = False
    _cache: tuple | None = None

    def forward(self, *inputs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, *inputs: Any) -> Any:
        return self.forward(*inputs)

    # The cache between forward and backward. It goes through __dict__ because __setattr__
    # below would cost a microsecond for every layer and step.
    def _save(self, *values: Any) -> None:
        self.__dict__["_cache"] = values

    def _take(self) -> tuple:
        values = self._cache
        if values is None:
            raise RuntimeError(
                f"{self._title()}: backward needs a forward just before it, "
                "and works once for each forward"
            )
        self.__dict__["_cache"] = None
        return values

    # The tree.
    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for the modules directly below this one."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) for this module (name "") and all below it."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (dotted name, Parameter), each parameter once."""
        seen = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def parameters(self) -> Iterator[Parameter]:
        """Yield every Parameter once."""
        for _, parameter in self.named_parameters():
            yield parameter

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Count the numbers in all parameters, or only in the trainable ones."""
        return sum(p.size for p in self.parameters() if p.requires_grad or not trainable_only)

    def is_trainable(self) -> bool:
        """Say whether any parameter of this module or below it is trainable."""
        for value in vars(self).values():
            if isinstance(value, Parameter):
                if value.requires_grad:
                    return True
            elif isinstance(value, Module) and value.is_trainable():
                return True
        return False

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in the words of PEFT's method of this name."""
        trainable, total = self.num_parameters(trainable_only=True), self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || "
              f"trainable%: {100 * trainable / max(1, total):.4f}")

    def summary(self) -> None:
        """Print a table: every parameter with its shape, size, and whether it is trained."""
        rows = [
            (name, str(p.shape), f"{p.size:,}", "" if p.requires_grad else "frozen")
            for name, p in self.named_parameters()
        ]
        trainable = self.num_parameters(trainable_only=True)
        rows.append(("total", "", f"{self.num_parameters():,}", f"{trainable:,} trainable"))
        rows.insert(0, ("parameter", "shape", "numbers", ""))
        name, shape, size = (max(len(row[i]) for row in rows) for i in range(3))
        for row in rows:
            print(f"{row[0]:{name}}  {row[1]:{shape}}  {row[2]:>{size}}  {row[3]}".rstrip())

    # What is done to the whole tree.
    def zero_grad(self) -> None:
        """Forget every gradient (`.grad = None`)."""
        for parameter in self.parameters():
            parameter.grad = None

    def freeze(self) -> Module:
        """Make every parameter untrainable, drop its gradient, and return the module."""
        for parameter in self.parameters():
            parameter.requires_grad, parameter.grad = False, None
        return self

    def unfreeze(self) -> Module:
        """Make every parameter trainable, and return the module."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self

    def train(self, mode: bool = True) -> Module:
        """Switch dropout on (or, with False, off) everywhere, and return the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch dropout off everywhere, and return the module."""
        return self.train(False)

    def astype(self, dtype: Any) -> Module:
        """Convert every parameter to float32 or float64, forget gradients, return the module."""
        dtype = float_dtype(dtype)
        self._check_own_weights()
        for parameter in self.parameters():
            parameter.data, parameter.grad = parameter.data.astype(dtype), None
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return {dotted name: a copy of the array}; training on does not change it."""
        self._check_own_weights()
        return {name: parameter.data.copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, np.ndarray], strict: bool = True) -> Keys:
        """Copy arrays into the parameters of the same names.

        Everything is checked before anything is changed, and one error lists all that is
        wrong: KeyError for names missing or unexpected (unless `strict` is False, when they
        are returned instead), ValueError for shapes, TypeError for what is not real numbers.
        """
        if not isinstance(state, dict):
            raise TypeError(f"a state dict must be a dict, got {type(state).__name__}")
        self._check_own_weights()
        parameters = dict(self.named_parameters())
        keys = Keys(
            [name for name in parameters if name not in state],
            [name for name in state if name not in parameters],
        )
        arrays = {name: np.asarray(state[name]) for name in parameters if name in state}
        faults = [
            f"{name}: expected shape {parameters[name].shape}, got {array.shape}"
            for name, array in arrays.items()
            if array.shape != parameters[name].shape
        ]
        if strict and (keys.missing or keys.unexpected):
            faults = [f"missing: {name}" for name in keys.missing] + faults
            faults += [f"unexpected: {k}{closest(k, keys.missing)}" for k in keys.unexpected]
            raise KeyError("the state dict does not fit the model: " + "; ".join(faults))
        if faults:
            raise ValueError("the state dict does not fit the model: " + "; ".join(faults))
        for name, array in arrays.items():
            if array.dtype.kind not in "fiu":
                raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
        for name, array in arrays.items():
            parameters[name].data[...] = array
        return keys

    def _check_own_weights(self) -> None:
        """Raise RuntimeError where weights stand in for others, as in a merged LoRA layer."""
        for _, module in self.named_modules():
            if getattr(module, "merged", False):
                raise RuntimeError(
                    "the model is merged, its weights are not the base's: unmerge_lora it first, "
                    "or merge it for good with merge_lora(model, unload=True)"
                )

    # Assigning to attributes. (Skip on first reading.)
    def __setattr__(self, name: str, value: Any) -> None:
        old = getattr(self, name, None)
        if self._sealed and old is None and not hasattr(self, name):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r} to set"
                f"{closest(name, vars(self))}"
            )
        for kind, advice in ((Parameter, f"; to change its values, assign to {name}.data[...]"),
                             (Module, "")):
            if isinstance(old, kind) and not (isinstance(value, kind) or value is None):
                raise TypeError(
                    f"{type(self).__name__}.{name} must be a {kind.__name__}, "
                    f"got {type(value).__name__}{advice}"
                )
        object.__setattr__(self, name, value)

    # Printing.
    def extra_repr(self) -> str:
        """Return what stands between the parentheses of this module's title."""
        return ""

    def _title(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def __repr__(self) -> str:
        lines = [f"({name}): {child!r}" for name, child in self.named_children()]
        if not lines:
            return self._title()
        if self.extra_repr():
            lines.insert(0, self.extra_repr())
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {body}\n)"


class ModuleList(Module):
    """A list of modules whose names are their positions: ``h.0``, ``h.1``, ..."""

    def __init__(self, modules: Any = ()):
        for i, module in enumerate(modules):
            if not isinstance(module, Module):
                raise TypeError(f"module {i} of the list is no Module but {type(module).__name__}")
            setattr(self, str(i), module)

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __iter__(self) -> Iterator[Module]:
        return (child for _, child in self.named_children())

    def __getitem__(self, index: int) -> Module:
        return list(self)[index]


class Sequential(ModuleList):
    """Modules one after another: y = fn(... f2(f1(x)))."""

    def __init__(self, *modules: Module):
        super().__init__(modules)

    def forward(self, x: np.ndarray) -> np.ndarray:
        for module in self:
            x = module(x)
        return x

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        return backward_through(list(self), dout, input_grad)


def backward_through(
    modules: list[Module], dout: np.ndarray, input_grad: bool = True
) -> np.ndarray | None:
    """Go back through modules that ran one after another, the last one first.

    Stops as soon as nothing further down is trainable and nobody asked for the gradient of
    the input; None is returned then. This is what makes freezing the lower layers cheap.
    """
    for i in reversed(range(len(modules))):
        needed = input_grad or any(below.is_trainable() for below in modules[:i])
        if not needed and not modules[i].is_trainable():
            return None
        dout = modules[i].backward(dout, needed)
    return dout if input_grad else None
