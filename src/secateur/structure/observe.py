"""One run of a model without its weights, watched operator by operator.

Parameters become meta tensors with one fresh axis per dimension. What does not depend on them
(token ids, masks, rotary angles) is computed for real, so that code which looks at values works;
what does is never computed, only its shape. Two modes watch: functions as Python calls them, for the
sizes that code passes (see `traced`), and the operators below them, for the axes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.core.errors import ModelError, SecateurError
from secateur.core.method import Batch
from secateur.data.batches import run as run_model
from secateur.data.running import device_of, evaluating
from secateur.structure import traced
from secateur.structure.dims import Axis, Dim, axes, freeze, resolve, size, unify
from secateur.structure.outputs import OUTPUTS
from secateur.structure.sizes import SIZED, sizes_of
from secateur.structure.table import FUNCTIONS, OPERATORS, Call
from secateur.structure.traced import Expression, Extent, Number, Operation, Slot

REPEATS = ("num_key_value_groups", "n_rep", "num_queries_per_kv")
"""Attributes that say how many queries share a key; not every way through a module reads them."""

SMALL = 2**22  # buffers up to this many elements are computed with for real


@dataclass(frozen=True, eq=False)
class Requirement:
    """The code computes `expression`, and the tensor there will have the size of `dim`."""

    expression: Expression
    dim: Dim
    reason: str


@dataclass(frozen=True)
class Product:
    """Multiply-adds of one operator: `factor` times the sizes of `dims`."""

    module: str
    operator: str
    factor: float
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Statistic:
    """A function that counts units of an axis, so that a removed unit is not the same as a zero."""

    call: int
    function: str
    inputs: tuple[tuple[Dim, ...], ...]
    dims: tuple[Dim, ...]
    reason: str


@dataclass
class Observation:
    """What one run showed.

    Attributes:
        tensors: parameter or buffer name -> its dimensions.
        parameters: which of them are parameters.
        aliases: name -> the first name of the same tensor.
        requirements: sizes that the code computes or reads.
        products: where the FLOPs are.
        statistics: call number -> functions that count units.
        results: call number -> dimensions of the float tensors it returned.
        unknown: (module, operator) without a rule.
        used: parameters that took part.
        roles: what operators make of dimensions (heads, ...).
        multiples: dimensions that a kernel takes in multiples only.
        branches: modules whose code read a value, by which it may have taken a way.
        grouped: (groups, channels in each) of grouped convolutions and norms.
        residual: modules that add their input to what they compute, in order of their end.
        minimums: axis -> the smallest count at which comparisons in the code come out as they did.
        chosen: (dimension, k) where the k best units are chosen for every row: k must stay.
    """

    tensors: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    requirements: list[Requirement] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    statistics: dict[int, list[Statistic]] = field(default_factory=dict)
    results: dict[int, tuple[tuple[Dim, ...] | None, ...]] = field(default_factory=dict)
    unknown: dict[tuple[str, str], str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    roles: list[tuple[str, Dim]] = field(default_factory=list)
    multiples: list[tuple[Dim, int]] = field(default_factory=list)
    residual: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    grouped: list[tuple[Dim, Dim]] = field(default_factory=list)
    minimums: dict[Axis, int] = field(default_factory=dict)
    chosen: list[tuple[Dim, int]] = field(default_factory=list)


class Observer:
    """The state of an observed run; what rules talk to."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.found = Observation()
        self.device = device_of(model) if device_of(model).type != "meta" else torch.device("cpu")
        self.stack: list[str] = [""]
        self.sums: list[tuple[str, Tensor, Tensor]] = []
        self.call = 0
        self.name = ""
        self.function = ""
        self.bypass = False
        self.sizes: list[Expression | None] | None = None
        self.slices: list[tuple[Any, Any, Any]] = []

    # --- what rules use -----------------------------------------------------------------------

    @property
    def module(self) -> str:
        """Qualified name of the module that is running."""
        return self.stack[-1]

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module starts; its first input is marked, to see whether it comes back in a sum."""
        name = self.names.get(id(module), "")
        self.stack.append(name)
        if name and args and isinstance(args[0], Tensor):
            args[0]._inputs = (*getattr(args[0], "_inputs", ()), name)  # type: ignore[attr-defined]

    def leave(self, args: tuple[Any, ...], out: Any) -> None:
        """The running module has ended."""
        name = self.stack.pop()
        first = out[0] if isinstance(out, (list, tuple)) and out else out
        before = args[0] if args else None
        if isinstance(before, Tensor) and isinstance(first, Tensor) and name in getattr(first, "_sums", ()):
            self.sums.append((name, before, first))  # compared when the modes are off

    def reason(self, text: str) -> str:
        """A sentence's end that says where."""
        return f"{text} in '{self.place}' ({self.name.removeprefix('aten::')})"

    @property
    def place(self) -> str:
        """The running module for a message; the class where it is the model itself."""
        return self.module or type(self.model).__name__

    def dims(self, tensor: Tensor) -> tuple[Dim, ...]:
        """The dimensions of a tensor, resolved."""
        found = getattr(tensor, "_axes", None)
        if found is None:
            return tuple(tensor.shape)
        name = getattr(tensor, "_parameter", None)
        if name is not None:
            self.found.used.add(name)
        return tuple(resolve(dim) for dim in found)

    def set(self, tensor: Tensor, dims: tuple[Dim, ...] | list[Dim]) -> None:
        """Say what the dimensions of a result are."""
        if tuple(map(size, dims)) != tuple(tensor.shape):
            raise AssertionError(f"rule of {self.name}: {dims} for a tensor {list(tensor.shape)}")
        if any(not isinstance(dim, int) for dim in dims) or hasattr(tensor, "_axes"):
            tensor._axes = tuple(dims)  # type: ignore[attr-defined]

    def same(self, a: Dim, b: Dim, why: str = "must match a fixed size") -> Dim:
        """The two dimensions are one from now on.

        Raises:
            ModelError: they have different sizes; the model does not take these inputs.
        """
        if size(a) != size(b):
            operator = self.name.removeprefix("aten::")
            raise ModelError(
                f"{type(self.model).__name__} cannot be observed: it stopped in '{self.place}' ({operator}): sizes "
                f"{size(a)} and {size(b)} do not fit; give inputs of the shape that the model takes"
            )
        unify(a, b, self.reason(why))
        return resolve(a)

    def settings(self, dims: Iterable[Dim]) -> None:
        """These dimensions of a parameter, such as a kernel's, hold no units at all."""
        for dim in dims:
            for axis in axes(dim):
                axis.link = axis.size

    def fix(self, dim: Dim, why: str) -> None:
        """No unit of this dimension can go."""
        if not isinstance(dim, int):
            freeze(dim, self.reason(why))

    def require(self, expression: Expression | None, dim: Dim) -> None:
        """The code's own idea of a size; None where the code leaves it open."""
        if expression is None or (isinstance(expression, int) and isinstance(resolve(dim), int)):
            return
        self.found.requirements.append(Requirement(expression, dim, self.reason("the code fixes a size")))

    def created(self, n: int, expression: Expression | None) -> Dim:
        """A dimension that the code makes: an axis that can follow where the size is computed, else a constant."""
        if n <= 1 or expression is None or isinstance(expression, int):
            return n
        axis = Axis(n)
        self.require(expression, axis)
        return axis

    def attribute(self, name: str) -> Expression | None:
        """An integer attribute of the running module that is no traced one; None if it has no such."""
        owner = self.model.get_submodule(self.module)
        value = getattr(owner, name, None)
        if isinstance(value, Number):
            return value.how
        return Slot(owner, name, None, value, self.module) if type(value) is int else None

    def multiply(self, factor: float, *dims: Dim) -> None:
        """Count multiply-adds as two FLOPs each."""
        self.found.products.append(Product(self.module, self.name, 2.0 * factor, tuple(map(resolve, dims))))

    def statistic(self, dims: list[Dim], tensors: list[Tensor]) -> None:
        """This call counts the units of `dims`."""
        live = tuple(dim for dim in map(resolve, dims) if not isinstance(dim, int))
        if live:
            inputs = tuple(self.dims(tensor) for tensor in tensors)
            entry = Statistic(self.call, self.function, inputs, live, self.reason("counted"))
            self.found.statistics.setdefault(self.call, []).append(entry)

    def role(self, kind: str, dim: Dim) -> None:
        """Remember what an operator makes of a dimension, e.g. attention heads."""
        if not isinstance(dim, int):
            self.found.roles.append((kind, dim))

    def choose(self, dim: Dim, count: int, numbers: Tensor) -> None:
        """`numbers` holds which of the dimension's units are the `count` best."""
        self.found.chosen.append((dim, count))
        self.point(numbers, dim)

    def point(self, numbers: Tensor, dim: Dim) -> None:
        """The values of `numbers` are numbers of the dimension's units."""
        if not hasattr(numbers, "_axes"):
            numbers._axes = tuple(numbers.shape)  # type: ignore[attr-defined]
        numbers._points = dim  # type: ignore[attr-defined]

    def points(self, tensor: Any) -> Dim | None:
        """The dimension whose units a tensor's values name; None for any other tensor."""
        found = getattr(tensor, "_points", None)
        return None if found is None else resolve(found)

    def looked_up(self, dim: Dim, numbers: Any, why: str) -> None:
        """Units are looked up by number: what was numbered and what is looked up are one, or nothing can go."""
        points = self.points(numbers)
        if points is None or size(points) != size(dim):
            self.fix(dim, why)
            self.fix(1 if points is None else points, why)
        else:
            self.same(dim, points)

    def _follow(self, call: Call) -> None:
        """Whoever is given numbers of units passes them on or looks up by them; all else must not see them change."""
        for tensor in call.tensors:
            points = self.points(tensor)
            if points is None or call.name in LOOKS_UP:
                continue
            if call.name not in PASSES_ON:
                self.fix(points, COMPUTED)
                continue
            for out in call.out if isinstance(call.out, (list, tuple)) else (call.out,):
                self.point(out, points)

    def make(self, shape: tuple[int, ...] | list[int], like: Tensor) -> Tensor:
        """An empty result of a function rule."""
        self.bypass = True
        try:
            return torch.empty(tuple(shape), dtype=like.dtype, device="meta")
        finally:
            self.bypass = False

    def unknown(self, call: Call, why: str = "no rule for this operator") -> None:
        """Freeze everything that the call touches and list it."""
        self.found.unknown.setdefault((self.module, self.name), f"{why}; it was left whole")
        for tensor in call.tensors:
            for dim in (*self.dims(tensor), self.points(tensor) or 1):
                self.fix(dim, why)

    # --- functions ----------------------------------------------------------------------------

    def on_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One function as Python called it."""
        if func is SHAPE or func is SIZE:
            return self._extent(func, args, kwargs)
        if func is NUMEL:
            return prod(self._extent(SHAPE, args, {}))
        if func == DEVICE:
            return self.device if args[0].is_meta else func(*args)
        if func in LISTED and self.points(args[0]) is not None:
            self.fix(args[0]._points, COMPUTED)
        self.call += 1
        self.function = getattr(func, "__name__", "function")
        rule = FUNCTIONS.get(func)
        if rule is not None:
            return self._remember(self._by_function_rule(rule, func, args, kwargs))
        if _has_number((*args, *kwargs.values())):
            known = sizes_of(func, args, kwargs)
            if known is None:
                self._constants(func, args, kwargs)
            else:
                self.sizes, self.slices = known
        elif func in SIZED:
            known = sizes_of(func, args, kwargs)
            if known is not None:
                self.sizes, self.slices = known
        try:
            return self._remember(func(*args, **kwargs))
        finally:
            self.sizes, self.slices = None, []

    def _remember(self, out: Any) -> Any:
        """Only calls that return tensors are numbered: others depend on the device and on caches."""
        tensors = out if isinstance(out, (list, tuple)) else (out,)
        if not any(isinstance(item, Tensor) for item in tensors):
            self.call -= 1
            return out
        dims = tuple(getattr(item, "_axes", None) if isinstance(item, Tensor) else None for item in tensors)
        if any(one is not None for one in dims):
            self.found.results[self.call] = dims
        return out

    def _by_function_rule(
        self, rule: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = Call(getattr(func, "__name__", "function"), args, kwargs)
        self.name = call.name
        if not any(tensor.is_meta for tensor in call.tensors):
            self.bypass = True
            try:
                call.out = func(*args, **kwargs)
            finally:
                self.bypass = False
            if not any(hasattr(tensor, "_axes") for tensor in call.tensors):
                return call.out
        if not self._ruled(rule, call):
            return func(*args, **kwargs)  # the operators below it may have rules
        return call.out

    def _ruled(self, rule: Any, call: Call) -> bool:
        """Apply a rule; what it was not written for is frozen and listed."""
        try:
            rule(self, call)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
            self.unknown(call, f"its rule does not cover this call ({type(error).__name__})")
            return False
        return True

    def _extent(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        dims = getattr(args[0], "_axes", None)
        if dims is None:
            return found
        if isinstance(found, int):
            which = args[1] if len(args) > 1 else kwargs["dim"]
            return _numbered(found, dims[which])
        return torch.Size([_numbered(value, dim) for value, dim in zip(found, dims, strict=True)])

    def _constants(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Numbers in a function that takes no sizes are quantities: they must stay what they are."""
        self.name = getattr(func, "__name__", "function")
        for item in _flat((*args, *kwargs.values())):
            if isinstance(item, Number):
                self.constant(item.how, traced.plain(item))

    def constant(self, expression: Expression, value: int) -> None:
        """The code computes or compares with a size: the result must stay what it is.

        How many queries share a key is compared with 1 to save a copy; both ways give the same.
        """
        shares = any(slot.name in REPEATS for slot in traced.slots_in(expression))
        if shares and isinstance(expression, Operation) and 1 in (expression.left, expression.right):
            return
        self.found.requirements.append(Requirement(expression, value, self.reason("the size itself is computed with")))

    def grouped(self, outer: Dim, inner: Dim) -> None:
        """Channels come in groups."""
        if not isinstance(outer, int) and not isinstance(inner, int):
            self.found.grouped.append((outer, inner))

    def aligned(self, dim: Dim, multiple: int) -> None:
        """A kernel takes this dimension in multiples only."""
        if not isinstance(dim, int):
            self.found.multiples.append((dim, multiple))

    # --- operators ----------------------------------------------------------------------------

    def on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One ATen operator."""
        if self.bypass:
            return func(*args, **kwargs)
        name, rule, in_place = _lookup(func)
        call = Call(name, args, kwargs)
        tensors = call.tensors
        symbolic = any(tensor.is_meta for tensor in tensors)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("meta") if symbolic else self.device}
        if name in READS:
            return self._read(func, name, args)
        if not symbolic:
            call.out = func(*args, **kwargs)
            if not (self.sizes or any(hasattr(tensor, "_axes") for tensor in tensors)):
                return call.out
        else:
            call.out = args[0] if in_place and args[0].is_meta else self._without_values(func, name, args, kwargs)
        self.name = name
        call.sizes = self.sizes
        if rule is None:
            self.unknown(call)
        else:
            self._ruled(rule, call)
        self._follow(call)
        return call.out

    def _read(self, func: Any, name: str, args: tuple[Any, ...]) -> Any:
        """Python asks for a value: a branch may depend on it."""
        x = args[0]
        if self.points(x) is not None:
            self.name = name
            self.fix(x._points, COMPUTED)
        if x.dtype == torch.bool or x.is_floating_point() or name != "aten::_local_scalar_dense":
            self.found.branches.append(self.module)
        if not any(item.is_meta for item in args if isinstance(item, Tensor)):
            return func(*args)
        if x.dtype == torch.bool or name != "aten::_local_scalar_dense":
            return False  # checks such as isnan(x).any(): the usual branch
        self.name = name
        self.found.unknown.setdefault((self.module, name), "a computed number is read; the run goes on with 1")
        self.found.branches.append(self.module)
        return 1.0 if x.is_floating_point() else 1

    def _without_values(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = OUTPUTS[name](args) if name in OUTPUTS and not kwargs else None
        if made is not None:
            return made
        if name in INVENTED:
            return INVENTED[name](self, func, args, kwargs)
        try:
            return func(*_to_meta(args), **{key: _to_meta((value,))[0] for key, value in kwargs.items()})
        except (RuntimeError, NotImplementedError, TypeError) as error:
            self.name = name
            return self._on_stand_ins(func, Call(name, args, kwargs), error)

    def _on_stand_ins(self, func: Any, call: Call, error: Exception) -> Any:
        """An operator that values decide about: what it touches is frozen, and it is run on made-up values.

        Raises:
            ModelError: it does not run on these either; gives the operator's first complaint.
        """
        self.unknown(call, "values decide about its result, or it has no shape rule")
        try:
            out = func(*_made_up(call.args), **dict(zip(call.kwargs, _made_up(call.kwargs.values()), strict=True)))
        except (RuntimeError, NotImplementedError, TypeError):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{type(self.model).__name__} cannot be observed without computing values: {self.reason('stopped')}: "
                f"{first}; its structure depends on data or on an operator without shape rules"
            ) from error
        return _without_floats(out)


def _numbered(value: int, dim: Dim) -> int:
    return value if isinstance(resolve(dim), int) else Number.made(value, Extent(dim))


def _flat(items: Any) -> Iterator[Any]:
    for item in items:
        if isinstance(item, (list, tuple)):
            yield from _flat(item)
        elif isinstance(item, slice):
            yield from (item.start, item.stop, item.step)
        else:
            yield item


def _has_number(items: Any) -> bool:
    for item in items:
        kind = type(item)
        if kind is Number:
            return True
        if kind in (tuple, list, torch.Size, slice) and any(type(one) is Number for one in _flat((item,))):
            return True
    return False


def _meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _made_up(args: Any) -> list[Any]:
    """Ones in place of tensors without values."""
    made: list[Any] = []
    for item in args:
        if isinstance(item, Tensor) and item.is_meta:
            made.append(torch.ones(item.shape, dtype=item.dtype))
        elif isinstance(item, (list, tuple)) and any(isinstance(inner, Tensor) for inner in item):
            made.append(_made_up(item))
        else:
            made.append(torch.device("cpu") if isinstance(item, torch.device) else item)
    return made


def _without_floats(out: Any) -> Any:
    """Results with made-up numbers lose them; indices and sizes stay, so that the run can go on."""
    if isinstance(out, (list, tuple)):
        return type(out)([_without_floats(item) for item in out])
    return _meta(out) if isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()) else out


def _to_meta(args: Any) -> list[Any]:
    moved: list[Any] = []
    for item in args:
        if isinstance(item, Tensor):
            moved.append(_meta(item))
        elif isinstance(item, (list, tuple)) and any(isinstance(inner, Tensor) for inner in item):
            moved.append(_to_meta(item))
        elif isinstance(item, torch.device):
            moved.append(torch.device("meta"))
        else:
            moved.append(item)
    return moved


_KNOWN: dict[Any, tuple[str, Any, bool]] = {}


def _lookup(func: Any) -> tuple[str, Any, bool]:
    """(name, rule, whether it changes and returns its first argument) of an operator."""
    known = _KNOWN.get(func)
    if known is None:
        name = func._schema.name
        mutates = func._schema.is_mutable and name.endswith("_") and not name.endswith("__")
        plain = name.removesuffix("_") if mutates else name
        rule = OPERATORS.get(name) or OPERATORS.get(plain)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = OPERATORS["elementwise"]
        known = (plain, rule, mutates)
        if rule is not None:
            _KNOWN[func] = known
    return known


# --- results that are made up because values decide them ------------------------------------------


def _ranks(n: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices in which every value occurs in turn: no branch that depends on a ranking is missed."""
    return (torch.arange(max(1, torch.Size(shape).numel()), device=device) % n)[: torch.Size(shape).numel()].view(shape)


def _invent_ranking(run: Observer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """topk, sort, max with a dimension: values without numbers, indices made up."""
    out = func(*_to_meta(args), **kwargs)
    x = args[0]
    position = {"aten::topk": 2}.get(func._schema.name, 1)
    dim = next((item for item in (kwargs.get("dim"), *args[position : position + 1]) if item is not None), -1)
    n = x.shape[dim] if x.dim() else 1
    return out[0], _ranks(n, tuple(out[1].shape), run.device)


def _invent_index(run: Observer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*_to_meta(args), **kwargs)
    dim = args[1] if len(args) > 1 and args[1] is not None else None
    n = args[0].numel() if dim is None else args[0].shape[dim]
    return _ranks(n, tuple(out.shape), run.device)


def _invent_nonzero(run: Observer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(torch.ones(args[0].shape, dtype=torch.bool, device=run.device))


def _invent_grouped(run: Observer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Torch's grouped product has shape rules for bfloat16 only."""
    return run.make([args[0].shape[0], args[1].shape[-1]], args[0])


PASSES_ON = {
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "unsqueeze", "squeeze"),
        *("clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "expand", "select", "slice", "split"),
        *("unbind", "chunk", "narrow"),
    )
}
"""Operators that give numbers of units on as they are."""

LOOKS_UP = {"aten::index", "aten::gather", "aten::scatter", "aten::sort", "aten::_grouped_mm"}
"""Operators whose rules know what to do with numbers of units."""

COMPUTED = "the numbers of units are computed with"

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
INVENTED: dict[str, Callable[..., Any]] = {
    "aten::topk": _invent_ranking,
    "aten::sort": _invent_ranking,
    "aten::argmax": _invent_index,
    "aten::argmin": _invent_index,
    "aten::argsort": _invent_index,
    "aten::_grouped_mm": _invent_grouped,
    "aten::nonzero": _invent_nonzero,
}


# --- the two modes --------------------------------------------------------------------------------

SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
SIZE = torch.Tensor.size
NUMEL = torch.Tensor.numel
DEVICE = torch.Tensor.device.__get__
LISTED = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)


class _Functions(TorchFunctionMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == SHAPE:
            func = SHAPE
        return self.observer.on_function(func, args, kwargs or {})


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, observer: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.observer.on_operator(func, args, kwargs or {})


# --- the model during the run ---------------------------------------------------------------------

TORCH_SIZES = {
    "groups",
    "num_groups",
    "normalized_shape",
    "num_features",
    "hidden_size",
    "input_size",
    "proj_size",
    "unflattened_size",
    "upscale_factor",
}
"""Attributes of torch's own modules that say how many units there are; all others are settings."""


@contextlib.contextmanager
def _stand_ins(observer: Observer) -> Iterator[None]:
    """Meta parameters, traced buffers and traced integers inside the block; everything as before afterwards."""
    model = observer.model
    saved = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    others: dict[int, tuple[Any, dict[str, Any]]] = {}
    made: dict[int, Tensor] = {}
    try:
        for name, module in model.named_modules():
            _replace_tensors(observer, name, module, made)
            _replace_integers(observer, name, module, others)
        yield
    finally:
        for module, attributes, contents in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for container, items in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(items)
        for other, attributes in others.values():
            vars(other).update(attributes)


PLAIN = (dict, list, set, OrderedDict, defaultdict)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Containers of a module (parameters, hooks, a run's own caches) with what is in them now, inner ones too."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting = list(vars(module).values())
    while waiting:
        value = waiting.pop()
        if id(value) in found or isinstance(value, (nn.Module, Tensor)):
            continue
        if type(value) in PLAIN:
            found[id(value)] = value, value.copy()
            waiting += value.values() if isinstance(value, dict) else value
        elif _is_helper(value):
            found[id(value)] = vars(value), dict(vars(value))
            waiting += vars(value).values()
    return list(found.values())


def _is_helper(value: Any) -> bool:
    """A plain object that a model keeps its state in; configs are looked after elsewhere."""
    home = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and not callable(value) and home not in ("torch", "builtins", "weakref")


def _replace_tensors(observer: Observer, prefix: str, module: nn.Module, made: dict[int, Tensor]) -> None:
    for group in (module._parameters, module._buffers):
        for name, tensor in list(group.items()):
            if tensor is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if id(tensor) not in made:
                made[id(tensor)] = _stand_in(observer, full, tensor, group is module._parameters)
            observer.found.aliases[full] = made[id(tensor)]._parameter  # type: ignore[attr-defined]
            group[name] = made[id(tensor)]  # type: ignore[assignment]
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor):
            vars(module)[name] = value.detach().clone()  # no parameter and no buffer: a run may write into it
    if isinstance(module, nn.RNNBase):
        flat = [getattr(module, name, None) for name in module._flat_weights_names]
        vars(module)["_flat_weights"] = flat
        vars(module)["_flat_weight_refs"] = [weakref.ref(tensor) for tensor in flat if tensor is not None]


def _stand_in(observer: Observer, name: str, tensor: Tensor, is_parameter: bool) -> Tensor:
    if is_parameter or tensor.numel() > SMALL or tensor.is_meta:
        made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        if is_parameter:
            made = nn.Parameter(made, requires_grad=False)
    else:
        made = tensor.detach().clone()
    dims = tuple(Axis(n) if n > 1 else n for n in tensor.shape)
    made._axes = dims  # type: ignore[attr-defined]
    made._parameter = name  # type: ignore[attr-defined]
    observer.found.tensors[name] = dims
    if is_parameter:
        observer.found.parameters.add(name)
    return made


def _replace_integers(
    observer: Observer, prefix: str, module: nn.Module, others: dict[int, tuple[Any, dict[str, Any]]]
) -> None:
    own = type(module).__module__.startswith("torch.nn.")
    for name, value in list(vars(module).items()):
        if name.startswith("_") or (own and name not in TORCH_SIZES):
            continue
        new = _numbers(value, module, name, prefix or type(module).__name__)
        if new is not None:
            vars(module)[name] = new
        elif hasattr(value, "to_dict") and not isinstance(value, nn.Module) and id(value) not in others:
            _replace_in_config(value, f"{prefix}.{name}" if prefix else name, others)


def _replace_in_config(config: Any, where: str, others: dict[int, tuple[Any, dict[str, Any]]]) -> None:
    before = dict(vars(config))
    others[id(config)] = (config, before)
    for name, value in before.items():
        new = _numbers(value, config, name, where)
        if new is not None and not name.startswith("_"):
            vars(config)[name] = new


def _numbers(value: Any, owner: Any, name: str, where: str) -> Any:
    """Traced integers in place of plain ones; None for anything else."""
    if type(value) is int:
        return Number.made(value, Slot(owner, name, None, value, where)) if value > 1 else None
    if type(value) in (tuple, list, torch.Size) and value and all(type(item) is int for item in value):
        items = [Number.made(item, Slot(owner, name, i, item, where)) for i, item in enumerate(value)]
        return items if type(value) is list else tuple(items)
    return None


def observe(model: nn.Module, batch: Batch) -> Observation:
    """Run the model once without its weights and see what belongs together.

    Args:
        model: any module; its weights may be on the meta device. It is left exactly as it was.
        batch: example inputs; two samples are enough.

    Raises:
        ModelError: the run fails or depends on values; names the module and operator.
    """
    import secateur.structure.rules  # noqa: F401  (fills the table)

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"'{name or type(model).__name__}' is a TorchScript module; give the module it was made from"
            )
    observer = Observer(model)
    pre = register_module_forward_pre_hook(observer.enter)
    post = register_module_forward_hook(lambda _, args, out: observer.leave(args, out), always_call=True)
    traced.observers.append(observer.constant)
    try:
        moved = batch.to(observer.device)
        with evaluating(model), _stand_ins(observer), _Operators(observer), _Functions(observer):
            output = run_model(model, moved)
        _protect_outputs(observer, output)
        observer.found.residual = [name for name, before, after in observer.sums if before.shape == after.shape]
    except SecateurError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ModelError(
            f"{type(model).__name__} cannot be observed: it stopped in '{observer.place}' ({observer.name}): {reason}"
        ) from error
    finally:
        traced.observers.remove(observer.constant)
        pre.remove()
        post.remove()
    return observer.found


def _protect_outputs(observer: Observer, output: Any) -> None:
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            for dim in (*getattr(item, "_axes", ()), getattr(item, "_points", 1)):
                freeze(dim, "it is an output of the model")
        elif isinstance(item, dict):
            for value in item.values():
                visit(value)
        elif isinstance(item, (list, tuple)):
            for value in item:
                visit(value)
        elif hasattr(item, "__dict__") and id(item) not in seen:
            seen.add(id(item))
            visit(vars(item))

    visit(output)


def live(dim: Dim) -> bool:
    """Whether the dimension holds an axis that may lose units."""
    return any(axis.frozen is None for axis in axes(dim))
