"""Looking up by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.structure.dims import Dim, size
from secateur.structure.observe import Observer
from secateur.structure.rules.elementwise import broadcast
from secateur.structure.table import Call, operator

LOOKED_UP = "units are looked up by index"


@operator("embedding")
def embedding(run: Observer, call: Call) -> None:
    """Rows of a table by ids."""
    rows, width = run.dims(call.args[0])
    run.fix(rows, LOOKED_UP)
    run.set(call.out, [*run.dims(call.args[1]), width])


@operator("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def embedding_bag(run: Observer, call: Call) -> None:
    """Rows of a table by ids, pooled per bag."""
    rows, width = run.dims(call.args[0])
    run.fix(rows, LOOKED_UP)
    out = call.out[0] if isinstance(call.out, (list, tuple)) else call.out
    run.set(out, [out.shape[0], width])


@operator("index", "_unsafe_index")
def index(run: Observer, call: Call) -> None:
    """Advanced indexing: the indexed dimensions are replaced by those of the indices."""
    x, indices = call.args[0], call.args[1]
    run.set(call.out, indexed(run, x, indices, tuple(call.out.shape)))
    points = run.points(x)
    if points is not None:
        run.point(call.out, points)


def indexed(run: Observer, x: Tensor, indices: list[Any], shape: tuple[int, ...]) -> list[Dim]:
    """The dimensions of `x[indices]`."""
    dims = run.dims(x)
    given: dict[int, Tensor] = {}  # dimension -> what it is indexed with
    tensors: list[Tensor] = []
    d = 0
    for item in indices:
        width = item.dim() if item is not None and item.dtype in (torch.bool, torch.uint8) else 1
        if item is not None:
            given |= dict.fromkeys(range(d, d + width), item)
            tensors += [item]
        d += width
    for e, item in given.items():
        run.looked_up(dims[e], item, LOOKED_UP)
        if hasattr(x, "_parameter") and len(dims) > 1 and run.points(item) is not None:
            run.role("experts", dims[e])
    first = min(given, default=0)
    masks = any(item.dtype in (torch.bool, torch.uint8) for item in tensors)
    rest = [dim for e, dim in enumerate(dims) if e not in given]
    new: list[Dim] = list(broadcast(run, tensors)) if not masks else []
    if masks:
        new = list(shape[first : first + len(shape) - len(rest)])
    together = list(given) == list(range(first, first + len(given)))
    at = first if together else 0
    before = [dim for e, dim in enumerate(dims[:at]) if e not in given]
    return [*before, *new, *rest[len(before) :]]


@operator("index_select")
def index_select(run: Observer, call: Call) -> None:
    """Some units of one dimension."""
    x, d = call.args[0], call.args[1] % max(1, call.args[0].dim())
    dims = list(run.dims(x))
    run.fix(dims[d], LOOKED_UP)
    dims[d] = call.out.shape[d]
    run.set(call.out, dims)


@operator("gather", "take_along_dim")
def gather(run: Observer, call: Call) -> None:
    """One unit per position of the index."""
    x, d, where = call.args[0], call.args[1] % max(1, call.args[0].dim()), call.args[2]
    dims = list(run.dims(x))
    run.looked_up(dims[d], where, LOOKED_UP)
    out: list[Dim] = []
    for e, (a, b) in enumerate(zip(dims, run.dims(where), strict=True)):
        if e == d:
            out.append(b)
        elif size(a) == size(b):
            out.append(run.same(a, b))
        else:
            run.fix(a, LOOKED_UP)
            out.append(b)
    run.set(call.out, out)


@operator("scatter", "scatter_add", "scatter_reduce")
def scatter(run: Observer, call: Call) -> None:
    """Written by index along one dimension."""
    x, d = call.args[0], call.args[1] % max(1, call.args[0].dim())
    dims = list(run.dims(x))
    run.looked_up(dims[d], call.args[2], LOOKED_UP)
    for tensor in call.tensors[1:]:
        for e, dim in enumerate(run.dims(tensor)):
            if e == d:
                run.fix(dim, LOOKED_UP)
            elif size(dim) != size(dims[e]):
                run.fix(dim, LOOKED_UP)
                run.fix(dims[e], LOOKED_UP)
            else:
                run.same(dims[e], dim)
    run.set(call.out, dims)


@operator("index_add", "index_copy", "index_fill", "index_reduce")
def index_add(run: Observer, call: Call) -> None:
    """Slices written by index along one dimension; a slice goes with its index."""
    x, d = call.args[0], call.args[1] % call.args[0].dim()
    dims = list(run.dims(x))
    run.fix(dims[d], LOOKED_UP)
    for tensor in call.tensors[2:]:
        if tensor.dim() == len(dims):
            for e, dim in enumerate(run.dims(tensor)):
                run.same(run.dims(call.args[2])[0] if e == d else dims[e], dim, LOOKED_UP)
    run.set(call.out, dims)


@operator("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(run: Observer, call: Call) -> None:
    """Values written at indices."""
    x, indices, values = call.args[0], call.args[1], call.args[2]
    dims = run.dims(x)
    shape = _indexed_shape(x, indices)
    target = indexed(run, x, indices, shape) if shape is not None else None
    if target is None:
        run.unknown(call)
    else:
        for position, dim in enumerate(reversed(run.dims(values)), 1):
            if size(dim) > 1:
                run.same(target[-position], dim)
    run.set(call.out, dims)


def _indexed_shape(x: Tensor, indices: list[Any]) -> tuple[int, ...] | None:
    """The shape of `x[indices]`; None where a mask has no values."""
    if any(item is not None and item.is_meta and item.dtype in (torch.bool, torch.uint8) for item in indices):
        return None
    stand_in = torch.empty(x.shape, device="meta")
    if any(item is not None and item.dtype in (torch.bool, torch.uint8) for item in indices):
        stand_in = torch.empty(1).expand(x.shape)
    given = tuple(slice(None) if item is None else item for item in indices)
    return tuple(stand_in[given].shape)


@operator("masked_scatter")
def masked_scatter(run: Observer, call: Call) -> None:
    """Rows of the source put where a mask says (image tokens among text)."""
    x, mask, source = call.tensors
    dims = list(broadcast(run, [x, mask]))
    last = run.dims(source)[-1] if source.dim() else 1
    if size(last) == size(dims[-1]):
        dims[-1] = run.same(dims[-1], last)
    else:
        run.fix(dims[-1], LOOKED_UP)
        run.fix(last, LOOKED_UP)
    run.set(call.out, dims)


@operator("one_hot", "bucketize", "searchsorted", "isin", "unique_consecutive", "_unique2", "bincount", "masked_select")
def positions_only(run: Observer, call: Call) -> None:
    """Values decide about positions: nothing can go."""
    for tensor in call.tensors:
        for dim in run.dims(tensor):
            run.fix(dim, "values decide about positions")
