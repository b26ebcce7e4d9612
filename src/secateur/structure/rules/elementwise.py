"""Operators that work entry by entry, copy, or reduce."""

from __future__ import annotations

from torch import Tensor

from secateur.structure.dims import Dim, size
from secateur.structure.observe import Observer
from secateur.structure.table import OPERATORS, Call, operator


def broadcast(run: Observer, tensors: list[Tensor]) -> list[Dim]:
    """The dimensions of tensors broadcast together; those of one size are one from now on."""
    rows = [run.dims(tensor) for tensor in tensors]
    width = max((len(row) for row in rows), default=0)
    out: list[Dim] = []
    for position in range(-width, 0):
        found: Dim = 1
        for row in rows:
            if len(row) >= -position and size(row[position]) != 1:
                found = row[position] if size(found) == 1 else run.same(found, row[position])
        out.append(found)
    return out


def elementwise(run: Observer, call: Call) -> None:
    """Any pointwise operator, in place or not."""
    tensors = call.tensors
    dims = broadcast(run, tensors)
    outs = call.out if isinstance(call.out, (list, tuple)) else (call.out,)
    for out in outs:
        if isinstance(out, Tensor):
            run.set(out, dims[len(dims) - out.dim() :])
    if call.name == "aten::add" or len(tensors) == 1:
        remember_sums(call, tensors)


def remember_sums(call: Call, tensors: list[Tensor]) -> None:
    """A sum holds what was added, and so does what a function of one tensor makes of it."""
    if not isinstance(call.out, Tensor):
        return
    inputs = tuple(name for tensor in tensors for name in getattr(tensor, "_inputs", ()))
    sums = tuple(name for tensor in tensors for name in getattr(tensor, "_sums", ()))
    if len(tensors) > 1:
        inputs, sums = (), inputs + sums
    if (inputs or sums) and call.out is not tensors[0]:
        call.out._inputs = inputs  # type: ignore[attr-defined]
    if sums:
        call.out._sums = tuple(dict.fromkeys(sums))  # type: ignore[attr-defined]


OPERATORS["elementwise"] = elementwise
operator(
    "copy",
    "masked_fill",
    "lerp",
    "where",
    "addcmul",
    "addcdiv",
    "clamp",
    "dropout",
    "native_dropout",
    "fill",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "relu6",
    "leaky_relu",
    "elu",
    "mish",
    "softplus",
    "threshold",
    "log_sigmoid_forward",
    "rrelu_with_noise",
)(elementwise)


@operator(
    "clone",
    "contiguous",
    "_to_copy",
    "detach",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "zero",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "_conj",
    "resolve_conj",
    "view_of",
    "_softmax_backward_data",
    "positive",
    "prelu",
    "_prelu_kernel",
)
def same_shape(run: Observer, call: Call) -> None:
    """The result has the first argument's dimensions; a second tensor (PReLU's slope) goes with the channels."""
    x, *others = call.tensors
    dims = list(run.dims(x))
    for other in others:
        if other.dim() == 1 and other.shape[0] > 1 and len(dims) > 1:
            dims[1] = run.same(dims[1], run.dims(other)[0])
        elif other.dim() == len(dims):
            dims = broadcast(run, [x, other])
    run.set(call.out, dims)
    remember_sums(call, [x])


@operator("rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "exponential", "normal", "uniform")
def random_values(run: Observer, call: Call) -> None:
    """Noise has the shape of its argument."""
    x = call.tensors[0]
    if x.shape == call.out.shape:
        run.set(call.out, run.dims(x))


@operator("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "empty.memory_format")
def creation(run: Observer, call: Call) -> None:
    """A tensor of one value: its sizes follow the expressions that the code gave."""
    if call.sizes is None or len(call.sizes) != call.out.dim():
        return
    dims: list[Dim] = []
    for n, expression in zip(call.out.shape, call.sizes, strict=True):
        dims.append(run.created(n, expression))
    run.set(call.out, dims)


# --- reductions -----------------------------------------------------------------------------------

NEUTRAL = {"aten::sum", "aten::linalg_vector_norm", "aten::norm", "aten::nansum", "aten::count_nonzero"}


@operator(
    "sum",
    "mean",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "amax",
    "amin",
    "aminmax",
    "prod",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "any",
    "all",
    "max",
    "min",
    "median",
    "argmax",
    "argmin",
    "nansum",
    "count_nonzero",
)
def reduction(run: Observer, call: Call) -> None:
    """The reduced dimensions vanish or become 1; all but sums count the units they see."""
    x = call.tensors[0]
    if call.name in ("aten::max", "aten::min") and len(call.tensors) > 1:
        elementwise(run, call)
        return
    gone = _reduced(call, x)
    dims = run.dims(x)
    if call.name in ("aten::argmax", "aten::argmin", "aten::median", "aten::aminmax"):
        for d in gone:
            run.fix(dims[d], "a position is computed")
    elif call.name not in NEUTRAL or hasattr(x, "_parameter"):
        run.statistic([dims[d] for d in gone], [x])
    outs = call.out if isinstance(call.out, (list, tuple)) else (call.out,)
    for out in outs:
        keeps = out.dim() == x.dim()
        kept = [1 if d in gone else dim for d, dim in enumerate(dims) if keeps or d not in gone]
        run.set(out, kept if len(kept) == out.dim() else list(out.shape))


def _reduced(call: Call, x: Tensor) -> set[int]:
    position = 2 if call.name in ("aten::linalg_vector_norm", "aten::norm") else 1
    given = call.get(position, "dim")
    if given is None or isinstance(given, bool) or (isinstance(given, (list, tuple)) and not given):
        return set(range(x.dim()))
    if isinstance(given, (list, tuple)):
        return {d % x.dim() for d in given}
    return {given % max(1, x.dim())} if isinstance(given, int) else set(range(x.dim()))


@operator("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(run: Observer, call: Call) -> None:
    """Entries compete with each other along one dimension."""
    x = call.tensors[0]
    dims = run.dims(x)
    run.statistic([dims[call.get(1, "dim")]], [x])
    run.set(call.out, dims)


@operator("cumprod", "logcumsumexp", "cummax", "argsort", "kthvalue", "flip", "roll", "rot90")
def ordered(run: Observer, call: Call) -> None:
    """Order matters along the named dimensions: nothing can go there."""
    x = call.tensors[0]
    dims = list(run.dims(x))
    named = call.get(2 if call.name in ("aten::roll", "aten::kthvalue") else 1, "dims", -1)
    named = call.kwargs.get("dim", named)
    which = named if isinstance(named, (list, tuple)) else [-1 if isinstance(named, bool) or named is None else named]
    for d in which or range(x.dim()):
        run.fix(dims[d], "the order of units matters")
    for out in call.out if isinstance(call.out, (list, tuple)) else (call.out,):
        shape = out.shape
        run.set(out, [n if n != size(dim) else dim for dim, n in zip(dims, shape, strict=True)])
