"""Normalisations."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from secateur.structure.dims import factor, size
from secateur.structure.observe import Observer
from secateur.structure.rules.elementwise import broadcast
from secateur.structure.table import Call, function, operator


@operator(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
)
def batch_norm(run: Observer, call: Call) -> None:
    """Every channel by itself; with statistics of its own batch the other dimensions are averaged."""
    x, *others = call.tensors
    dims = list(run.dims(x))
    for other in others:
        dims[1] = run.same(dims[1], run.dims(other)[0])
    if any(item is True for item in call.args) or call.args[3:5] == (None, None):
        run.statistic([dims[0], *dims[2:]], [x])
    out = call.out[0] if isinstance(call.out, (list, tuple)) else call.out
    run.set(out, dims)


@function(F.instance_norm, torch.instance_norm)
def instance_norm(run: Observer, call: Call) -> None:
    """Every channel of every sample by itself."""
    x, *others = call.tensors
    dims = list(run.dims(x))
    for other in others:
        dims[1] = run.same(dims[1], run.dims(other)[0])
    for dim in dims[2:]:
        run.fix(dim, "positions are averaged")
    if call.out is None:
        call.out = run.make(x.shape, x)
    run.set(call.out, dims)


@operator("native_layer_norm", "layer_norm")
def layer_norm(run: Observer, call: Call) -> None:
    """The last dimensions are normalised together."""
    x, shape = call.args[0], call.args[1]
    dims = list(run.dims(x))
    first = len(dims) - len(shape)
    for other in call.tensors[1:]:
        dims[first:] = [run.same(a, b) for a, b in zip(dims[first:], run.dims(other), strict=True)]
    for dim, expression in zip(dims[first:], call.sizes or shape, strict=True):
        run.require(expression, dim)
    run.statistic(list(dims[first:]), [x])
    out = call.out[0] if isinstance(call.out, (list, tuple)) else call.out
    run.set(out, dims)


@function(torch.rms_norm, F.rms_norm)
def rms_norm(run: Observer, call: Call) -> None:
    """The last dimensions are normalised together, without mean."""
    from secateur.structure.traced import how

    x, shape = call.args[0], call.get(1, "normalized_shape")
    weight = call.get(2, "weight")
    dims = list(run.dims(x))
    first = len(dims) - len(shape)
    if weight is not None:
        dims[first:] = [run.same(a, b) for a, b in zip(dims[first:], run.dims(weight), strict=True)]
    for dim, expression in zip(dims[first:], shape, strict=True):
        run.require(how(expression), dim)
    run.statistic(list(dims[first:]), [x])
    if call.out is None:
        call.out = run.make(x.shape, x)
    run.set(call.out, dims)


@operator("native_group_norm", "group_norm")
def group_norm(run: Observer, call: Call) -> None:
    """Whole groups go without a trace; channels within go from all groups alike."""
    x = call.args[0]
    groups = call.args[6] if call.name == "aten::native_group_norm" else call.args[1]
    dims = list(run.dims(x))
    for other in call.tensors[1:]:
        dims[1] = run.same(dims[1], run.dims(other)[0])
    outer, inner = factor(dims[1], size(dims[1]) // groups, run.reason("groups of channels are normalised together"))
    run.require(call.sizes[0] if call.sizes else groups, outer)
    run.grouped(outer, inner)
    for dim in dims[2:]:
        run.fix(dim, "positions are averaged")
    run.statistic([inner], [x])
    out = call.out[0] if isinstance(call.out, (list, tuple)) else call.out
    run.set(out, run.dims(x))


@function(torch._weight_norm)
def weight_norm(run: Observer, call: Call) -> None:
    """G * v / |v|: a parametrised weight has the dimensions of v."""
    v, g = call.args[0], call.args[1]
    dims = broadcast(run, [v, g])
    run.statistic(list(dims), [v, g])
    if call.out is None:
        call.out = run.make(v.shape, v)
    run.set(call.out, dims)


@operator("_weight_norm_interface")
def weight_norm_interface(run: Observer, call: Call) -> None:
    """The same as an operator."""
    run.set(call.out[0], broadcast(run, list(call.args[:2])))
    run.set(call.out[1], run.dims(call.args[1]))
