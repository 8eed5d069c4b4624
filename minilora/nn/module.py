"""Parameters, and the tree of modules that holds them.

A `Parameter` is an array with its gradient. A `Module` has a `forward` and a hand-written
`backward`. A tree of modules gives every parameter a name, such as ``h.0.attn.q_proj.weight``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

import numpy as np

from minilora.nn.validate import FLOAT_TYPES, closest, float_dtype, hides, last_numbers


class Parameter:
    """An array that can be trained, and its gradient. Raises TypeError if it is not real.

    Attributes
    ----------
    data : ndarray, a copy of the argument; float64 stays float64, all else becomes float32
    grad : None, or an ndarray of the same shape and dtype
    requires_grad : False for a frozen parameter, which gets no gradient
    """

    __slots__ = ("data", "grad", "requires_grad")  # so that a typo such as `.gard` raises
    unlock = "unmerge_lora"  # what makes read-only data writable

    def __init__(self, data: Any, requires_grad: bool = True):
        data = np.asarray(data)
        if data.dtype.kind not in "fiub":
            raise TypeError(f"a Parameter holds real numbers, got dtype {data.dtype}")
        dtype = data.dtype if data.dtype in FLOAT_TYPES else np.float32
        self.data: np.ndarray = np.array(data, dtype=dtype, order="C")
        self.grad: np.ndarray | None = None
        self.requires_grad = requires_grad

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def astype(self, dtype: np.dtype) -> None:
        self.data, self.grad = self.data.astype(dtype), None

    def accumulate(self, grad: np.ndarray) -> None:
        """Add to `.grad`, over all uses of a value. Raises ValueError for another shape."""
        if np.shape(grad) != self.shape:
            raise ValueError(f"a gradient of shape {np.shape(grad)} is not one of {self!r}")
        if self.grad is None:
            self.grad = np.zeros_like(self.data)
        self.grad += grad

    def __repr__(self) -> str:
        frozen = "" if self.requires_grad else ", frozen"
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}{frozen})"


class Keys(NamedTuple):
    """The names that differ between a model and a state dict."""

    missing: list[str]
    unexpected: list[str]


class Module:
    """A differentiable function with parameters and child modules, if any.

    A subclass defines `forward` and, right below it, `backward`. They follow three rules:

    - `forward` stores what backward needs with `self._save(...)`, and does not change it later;
    - `backward` takes it back with `self._take()`, so it works once for each forward;
    - it adds to the `.grad` of trainable parameters, returns that of the input, and keeps `dout`.

    Setting an attribute that the constructor did not set raises AttributeError, to catch typos.
    """

    training: bool = True
    _cache: tuple | None = None
    _seal: tuple = ()  # how it was at the forward that made the cache
    _sealed: bool = False

    def __init__(self) -> None:
        pass

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dout: np.ndarray) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def __call__(self, *inputs: Any) -> np.ndarray:
        return self.forward(*inputs)

    def _save(self, *values: Any) -> None:
        vars(self)["_seal"] = self.training, get_ident(), self._sample(values)
        vars(self)["_cache"] = values  # bypasses __setattr__, which takes a microsecond

    def _take(self) -> tuple:
        values, vars(self)["_cache"] = self._cache, None
        if values is None:
            raise RuntimeError(f"{self.title()}: backward needs a forward just before it, "
                               "and works once for each forward")
        training, thread, sample = self._seal
        if self.training and not training:
            raise RuntimeError(f"{self.title()}: its last forward was in evaluation mode, and this "
                               "backward is in training mode")
        if thread != get_ident():
            raise RuntimeError(f"{self.title()}: its last forward was in another thread, but two "
                               "threads cannot share a model")
        if sample != self._sample(values):
            raise RuntimeError(f"an input or a weight of {self.title()} was changed in place "
                               "between forward and backward")
        return values

    def _sample(self, values: tuple) -> list[bytes]:
        """Return numbers of what backward uses: of an array all, or the last if it is large."""
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        arrays += [p.data for p in list(vars(self).values()) if type(p) is Parameter]
        return [last_numbers(array).tobytes() for array in arrays]

    # ---- The tree
    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for those directly below. TypeError if a list, say, hides some."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Module):
                yield name, value
            elif name[0] != "_" and hides(value, (Module, Parameter), vars(self).values()):
                raise TypeError(f"{type(self).__name__}.{name} hides modules or parameters in a "
                                f"{type(value).__name__}, where they are not found: use a "
                                "ModuleList")

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) for this module (name "") and all below it."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (dotted name, Parameter), each parameter once."""
        seen = set()
        for path, module in self.named_modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def parameters(self) -> Iterator[Parameter]:
        """Yield every Parameter once."""
        return (parameter for _, parameter in self.named_parameters())

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Count the numbers in all parameters, or only in the trainable ones."""
        return sum(p.size for p in self.parameters() if p.requires_grad or not trainable_only)

    def is_trainable(self) -> bool:
        """Return whether any parameter of this module or below it is trainable."""
        return any(p.requires_grad for p in self.parameters())

    # ---- Changes to the whole tree
    def zero_grad(self) -> None:
        """Clear every gradient (`.grad = None`)."""
        for parameter in self.parameters():
            parameter.grad = None

    def freeze(self) -> Self:
        """Make every parameter untrainable, drop its gradient, and return the module."""
        for parameter in self.parameters():
            parameter.requires_grad, parameter.grad = False, None
        return self

    def unfreeze(self) -> Self:
        """Make every parameter trainable, and return the module."""
        for parameter in sorted(self.parameters(), key=lambda p: type(p) is Parameter):
            parameter.requires_grad = True  # first of those that refuse it
        return self

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on (or, with False, off) everywhere, and return the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch dropout off everywhere, and return the module."""
        return self.train(False)

    def astype(self, dtype: Any) -> Self:
        """Convert every parameter to float32 or float64, clear gradients, and return the module."""
        dtype = float_dtype(dtype)
        for parameter in self.parameters():
            parameter.astype(dtype)
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return {dotted name: a copy of the array}; further training does not change it."""
        return {name: parameter.data.copy() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, np.ndarray], strict: bool = True) -> Keys:
        """Copy arrays into the parameters of the same names, or change nothing if one does not fit.

        Returns the missing and unexpected names, which `strict=False` allows. One error lists all
        faults: KeyError for names, ValueError for shapes. TypeError unless numbers are real.
        """
        if not isinstance(state, dict):
            raise TypeError(f"a state dict must be a dict, got {type(state).__name__}")
        parameters = dict(self.named_parameters())
        keys = Keys([name for name in parameters if name not in state],
                    [name for name in state if name not in parameters])
        arrays = {name: np.asarray(state[name]) for name in parameters if name in state}
        faults = [f"{name}: expected shape {parameters[name].shape}, got {array.shape}"
                  for name, array in arrays.items() if array.shape != parameters[name].shape]
        faults += [f"{name} is read-only: {parameters[name].unlock} first"
                   for name in arrays if not parameters[name].data.flags.writeable]
        if strict:
            faults = [f"missing: {name}" for name in keys.missing] + faults
            faults += [f"unexpected: {k}{closest(k, keys.missing)}" for k in keys.unexpected]
        if faults:
            error = KeyError if strict and any(keys) else ValueError
            raise error("the state dict does not fit the model: " + "; ".join(faults))
        for name, array in arrays.items():
            if array.dtype.kind not in "fiu":
                raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
        for name, array in arrays.items():
            parameters[name].data[...] = array
        return keys

    # ---- Printing
    def extra_repr(self) -> str:
        """Return the text that `title` puts in parentheses."""
        return ""

    def title(self) -> str:
        """Return one line for messages: ``Linear(in_features=3, out_features=2)``."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def __repr__(self) -> str:
        lines = [f"({name}): {child!r}" for name, child in self.named_children()]
        if not lines:
            return self.title()
        if self.extra_repr():
            lines.insert(0, self.extra_repr())
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {body}\n)"

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in the format of PEFT's method of this name."""
        part, total = self.num_parameters(trainable_only=True), self.num_parameters()
        print(f"trainable params: {part:,} || all params: {total:,} || "
              f"trainable%: {100 * part / max(1, total):.4f}")

    def summary(self) -> None:
        """Print a table of all parameters: name, shape, size, and whether each is trained."""
        rows = [(name, str(p.shape), f"{p.size:,}", "" if p.requires_grad else "frozen")
                for name, p in self.named_parameters()]
        trainable = f"{self.num_parameters(trainable_only=True):,} trainable"
        total = "total", "", f"{self.num_parameters():,}", trainable
        rows = [("parameter", "shape", "numbers", ""), *rows, total]
        name, shape, size = (max(map(len, column)) for column in list(zip(*rows, strict=True))[:3])
        for row in rows:
            print(f"{row[0]:{name}}  {row[1]:{shape}}  {row[2]:>{size}}  {row[3]}".rstrip())

    # ---- Protection against typos (skip on first reading)
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _sealing(cls.__init__)

    if TYPE_CHECKING:  # children may be replaced, so a type checker cannot know them all
        def __getattr__(self, name: str) -> Any: ...
    else:
        def __setattr__(self, name: str, value: Any) -> None:
            old = getattr(self, name, _MISSING)
            if old is _MISSING and self._sealed:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r} to set"
                                     f"{closest(name, vars(self))}")
            for kind in (Parameter, Module):
                if isinstance(old, kind) and not (value is None or isinstance(value, kind)):
                    advice = f"; to change its values, assign to {name}.data[...]"
                    raise TypeError(
                        f"{type(self).__name__}.{name} must be a {kind.__name__}, got "
                        f"{type(value).__name__}{advice if kind is Parameter else ''}")
            object.__setattr__(self, name, value)


_MISSING = object()


def _sealing(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)  # so that help() and editors show the constructor's own signature
    def constructor(self: Module, *args: Any, **kwargs: Any) -> None:
        outermost = "_building" not in vars(self)  # and not called by that of a subclass
        vars(self)["_building"] = True
        init(self, *args, **kwargs)
        if outermost:
            del vars(self)["_building"]
            list(self.named_children())  # for its error
            self._sealed = True

    return constructor


Module.__init__ = _sealing(Module.__init__)
M = TypeVar("M", bound=Module)


class ModuleList(Module, Generic[M]):
    """A list of modules named by position: ``h.0``, ``h.1``, ... Raises TypeError for others."""

    def __init__(self, modules: Iterable[M] = ()):
        for i, module in enumerate(modules):
            if not isinstance(module, Module):
                raise TypeError(f"module {i} must be a Module, got {type(module).__name__}")
            setattr(self, str(i), module)

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __iter__(self) -> Iterator[M]:
        return (child for _, child in self.named_children())  # type: ignore[misc]

    def __getitem__(self, index: int) -> M:
        return list(self)[index]


class Sequential(ModuleList[Module]):
    """Modules applied in order: y = fn(... f2(f1(x)))."""

    def __init__(self, *modules: Module):
        super().__init__(modules)

    def forward(self, x: np.ndarray) -> np.ndarray:
        for module in self:
            x = module(x)
        return x

    def backward(self, dout: np.ndarray) -> np.ndarray:
        for module in reversed(list(self)):
            dout = module.backward(dout)
        return dout
