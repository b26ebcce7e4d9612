"""Operators that put tensors side by side or take them apart."""

from __future__ import annotations

from secateur.structure.dims import Dim, concat, cut, factor, size
from secateur.structure.observe import Observer
from secateur.structure.table import Call, operator
from secateur.structure.traced import Number, Operation, how, plain


@operator("cat")
def cat(run: Observer, call: Call) -> None:
    """One after the other along a dimension; all others are the same."""
    tensors = [t for t in call.args[0] if not (t.dim() == 1 and t.shape[0] == 0 and call.out.dim() > 1)]
    d = call.get(1, "dim", 0) % call.out.dim()
    rows = [run.dims(tensor) for tensor in tensors]
    out: list[Dim] = list(rows[0])
    for row in rows[1:]:
        out = [a if e == d else run.same(a, b) for e, (a, b) in enumerate(zip(out, row, strict=True))]
    out[d] = concat(*(row[d] for row in rows))
    run.set(call.out, out)


@operator("stack")
def stack(run: Observer, call: Call) -> None:
    """A new dimension of slots."""
    tensors = call.args[0]
    d = call.get(1, "dim", 0) % call.out.dim()
    out: list[Dim] = list(run.dims(tensors[0]))
    for tensor in tensors[1:]:
        out = [run.same(a, b) for a, b in zip(out, run.dims(tensor), strict=True)]
    out.insert(d, len(tensors))
    run.set(call.out, out)


@operator(
    "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"
)
def split(run: Observer, call: Call) -> None:
    """Pieces along a dimension. Without sizes from the code the pieces are equal, and stay so."""
    x = call.args[0]
    d = call.get(2, "dim", 0) % x.dim()
    dims = list(run.dims(x))
    why = run.reason("a split does not follow the parts that it is made of")
    pieces: list[Dim] = []
    rest = dims[d]
    for piece in call.out[:-1]:
        head, rest = cut(rest, piece.shape[d], why)
        pieces.append(head)
    pieces.append(rest)
    one_by_one = call.sizes is not None and len(call.sizes) == len(pieces) and len(pieces) > 1
    if not one_by_one:
        equal = [piece for piece in pieces if size(piece) == size(pieces[0])]
        if len(equal) < len(pieces):
            for piece in pieces:
                run.fix(piece, "it is split into unequal chunks")
        for piece in equal[1:]:
            run.same(pieces[0], piece)
        if call.sizes and not isinstance(call.args[1], (list, tuple)):
            run.require(call.sizes[0], pieces[0])
    else:
        assert call.sizes is not None
        for piece, expression in zip(pieces, call.sizes, strict=True):
            run.require(expression, piece)
    for out, piece in zip(call.out, pieces, strict=True):
        run.set(out, [*dims[:d], piece, *dims[d + 1 :]])


@operator("glu")
def glu(run: Observer, call: Call) -> None:
    """The first half times the gates in the second: both lose the same units."""
    x = call.args[0]
    d = call.get(1, "dim", -1) % x.dim()
    dims = list(run.dims(x))
    half = x.shape[d] // 2
    first, second = cut(dims[d], half, run.reason("a gate does not follow the parts that it is made of"))
    dims[d] = run.same(first, second)
    run.set(call.out, dims)


@operator("unbind")
def unbind(run: Observer, call: Call) -> None:
    """Every index of a dimension is used by itself."""
    x = call.args[0]
    d = call.get(1, "dim", 0) % x.dim()
    dims = run.dims(x)
    run.fix(dims[d], "every index is used by itself")
    for out in call.out:
        run.set(out, [*dims[:d], *dims[d + 1 :]])


@operator("select")
def select(run: Observer, call: Call) -> None:
    """One index of a dimension."""
    x, d = call.args[0], call.args[1] % call.args[0].dim()
    dims = run.dims(x)
    run.fix(dims[d], "a fixed index is taken")
    run.set(call.out, [*dims[:d], *dims[d + 1 :]])


@operator("slice", "narrow")
def slice_(run: Observer, call: Call) -> None:
    """A range of a dimension; what the code says about its ends must follow a cut."""
    x = call.args[0]
    d = call.get(1, "dim", 0) % x.dim()
    dims = list(run.dims(x))
    n = x.shape[d]
    start, stop, step = _bounds(call, n)
    if isinstance(dims[d], int):
        dims[d] = call.out.shape[d]
    elif step > 1:
        dims[d] = _strided(run, dims[d], start, step, call.out.shape[d])
    else:
        dims[d] = _range(run, call, dims[d], start, stop)
    run.set(call.out, dims)


def _bounds(call: Call, n: int) -> tuple[int, int, int]:
    if call.name == "aten::narrow":
        start = call.args[2]
        return start, start + call.args[3], 1
    start, stop = call.get(2, "start"), call.get(3, "end")
    return *slice(start, stop).indices(n)[:2], call.get(4, "step", 1)


def _range(run: Observer, call: Call, dim: Dim, start: int, stop: int) -> Dim:
    n = size(dim)
    why = run.reason("a slice does not follow the parts that it is made of")
    head, rest = cut(dim, start, why)
    middle, tail = cut(rest, stop - start, why)
    first, last, length = _written(run, call, n, start, stop)
    if length is not None:
        run.require(how(length), middle)
    if start > 0:
        _bound(run, first, head, concat(middle, tail))
    if stop < n and length is None:
        _bound(run, last, concat(head, middle), tail)
    return middle


def _bound(run: Observer, written: int, before: Dim, after: Dim) -> None:
    """An end of a slice: counted from the start, or from the end where it is negative."""
    if plain(written) < 0:
        run.require(Operation("-", 0, how(written)) if isinstance(written, Number) else -written, after)
    else:
        run.require(how(written), before)


def _written(run: Observer, call: Call, n: int, start: int, stop: int) -> tuple[int, int, int | None]:
    """What the code wrote for start, stop and length: from Python where it was seen, the values otherwise."""
    for position, (a, b, length) in enumerate(run.slices):
        if slice(a, b).indices(n)[:2] == (start, stop):
            run.slices.pop(position)
            return 0 if a is None else a, n if b is None else b, length
    if call.name == "aten::narrow":
        return start, stop, call.args[3]
    begin, end = call.get(2, "start"), call.get(3, "end")
    return begin or 0, n if end is None else end, None


def _strided(run: Observer, dim: Dim, start: int, step: int, length: int) -> Dim:
    """Every step-th unit: the units between go or stay together with it."""
    if size(dim) % step or start >= step or length != size(dim) // step:
        run.fix(dim, "a slice with steps")
        return length
    major, minor = factor(dim, step, run.reason("a slice with steps does not follow the parts"))
    run.fix(minor, "units are taken in turns")
    return major


@operator("constant_pad_nd", "pad")
def constant_pad(run: Observer, call: Call) -> None:
    """Zeros before and after, each an axis of its own where the code can follow it."""
    x, pads = call.args[0], call.args[1]
    dims = list(run.dims(x))
    sizes = call.sizes if call.sizes and len(call.sizes) == len(pads) else list(pads)
    for k in range(len(pads) // 2):
        d = len(dims) - 1 - k
        before, after = pads[2 * k], pads[2 * k + 1]
        if before < 0 or after < 0:
            run.fix(dims[d], "it is cropped")
            dims[d] = call.out.shape[d]
        elif before or after:
            dims[d] = concat(
                run.created(before, sizes[2 * k]),
                dims[d],
                run.created(after, sizes[2 * k + 1]),
            )
    run.set(call.out, dims)
