"""Operators that multiply with a matrix: linear layers, convolutions, products of activations."""

from __future__ import annotations

from math import prod

import torch
from torch.nn import functional as F

from secateur.structure.dims import Dim, factor, product, size
from secateur.structure.observe import Observer
from secateur.structure.table import Call, function, operator


@function(F.linear)
def linear(run: Observer, call: Call) -> None:
    """X [..., in] with a weight [out, in]."""
    x, weight, bias = call.args[0], call.get(1, "weight"), call.get(2, "bias")
    *rows, inner = run.dims(x)
    out, columns = run.dims(weight) if weight.dim() == 2 else (1, run.dims(weight)[0])
    columns = run.same(columns, inner)
    if bias is not None:
        out = run.same(out, run.dims(bias)[-1])
    if call.out is None:
        call.out = run.make([*x.shape[:-1], *weight.shape[:-1]], x)
    run.set(call.out, [*rows, out] if weight.dim() == 2 else rows)
    run.multiply(1, *rows, out, columns)


@operator("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")
def matrix_product(run: Observer, call: Call) -> None:
    """[*, n, k] times [*, k, m], with an added tensor in the `add` forms."""
    adds = call.name.startswith(("aten::add", "aten::badd"))
    a, b = call.args[1:3] if adds else call.args[:2]
    out = product_dims(run, a, b)
    if adds:
        added = run.dims(call.args[0])
        for position in range(-len(added), 0):
            if size(added[position]) > 1:
                out[position] = run.same(out[position], added[position])
    run.set(call.out, out)


def product_dims(run: Observer, a: torch.Tensor, b: torch.Tensor) -> list[Dim]:
    """The dimensions of `a @ b`, batch dimensions broadcast, and its FLOPs."""
    left, right = list(run.dims(a)), list(run.dims(b))
    vector_left, vector_right = len(left) == 1, len(right) == 1
    left = [1, *left] if vector_left else left
    right = [*right, 1] if vector_right else right
    inner = run.same(left[-1], right[-2])
    batch: list[Dim] = []
    for position in range(-max(len(left), len(right)), -2):
        x = left[position] if len(left) >= -position else 1
        y = right[position] if len(right) >= -position else 1
        batch.append(x if size(y) == 1 else y if size(x) == 1 else run.same(x, y))
    if batch and a.dim() > 2 and b.dim() > 2 and not any(hasattr(t, "_parameter") for t in (a, b)):
        run.role("heads", batch[-1])
        run.role("head_dim", inner)
        run.role("head_dim", right[-1])
    run.multiply(1, *batch, left[-2], inner, right[-1])
    return [*batch, *([] if vector_left else [left[-2]]), *([] if vector_right else [right[-1]])]


@function(
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.mm, torch.Tensor.mm
)
def matmul(run: Observer, call: Call) -> None:
    """Products of activations, or with a parameter written by hand."""
    a, b = call.args[0], call.get(1, "other")
    dims = product_dims(run, a, b)
    if call.out is None:
        call.out = run.make([size(dim) for dim in dims], a)
    run.set(call.out, dims)


@function(torch.Tensor.__rmatmul__)
def right_matmul(run: Observer, call: Call) -> None:
    """The product with the arguments the other way round."""
    matmul(run, Call(call.name, (call.args[1], call.args[0]), {}, call.out))


@function(torch.einsum, torch.functional.einsum)
def einsum(run: Observer, call: Call) -> None:
    """Equal letters are one dimension."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not isinstance(equation, str) or len(terms) != len(operands):
        raise AssertionError("einsum with sublists")
    letters: dict[str, Dim] = {}
    wide = ""
    for term, tensor in zip(terms, operands, strict=True):
        names, wide_here = _letters(term, tensor.dim())
        wide = wide_here if len(wide_here) > len(wide) else wide
        for letter, dim in zip(names, run.dims(tensor), strict=True):
            known = letters.get(letter, 1)
            letters[letter] = dim if size(known) == 1 else known if size(dim) == 1 else run.same(known, dim)
    if not arrow:
        output = "".join(sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1))
        output = ("..." if "..." in inputs else "") + output
    names = _replaced(output, wide)
    dims = [letters[letter] for letter in names]
    if call.out is None:
        call.out = run.make([size(dim) for dim in dims], operands[0])
    run.set(call.out, dims)
    if len(operands) > 1:
        run.multiply(1, *letters.values())
        shared = set(names).intersection(*(set(_replaced(term, wide)) for term in terms))
        for letter in shared if not any(hasattr(t, "_parameter") for t in operands) else ():
            run.role("heads", letters[letter])


DOTS = "\u0391\u0392\u0393\u0394\u0395\u0396"  # names for the dimensions under an ellipsis, right-aligned


def _letters(term: str, dims: int) -> tuple[str, str]:
    wide = DOTS[len(DOTS) - (dims - len(term.replace("...", ""))) :] if "..." in term else ""
    return _replaced(term, wide), wide


def _replaced(term: str, wide: str) -> str:
    return term.replace("...", wide)


@operator("_grouped_mm")
def grouped_product(run: Observer, call: Call) -> None:
    """Rows [tokens, k] sorted by expert times [experts, k, m]: all experts lose the same units."""
    a, b = run.dims(call.args[0]), run.dims(call.args[1])
    offsets = run.dims(call.get(2, "offs"))[0]
    if isinstance(offsets, int):
        run.fix(b[0], "tokens are sorted by expert")
    else:
        run.role("experts", run.same(b[0], offsets))
    inner = run.same(a[-1], b[-2])
    for dim in (inner, b[-1]):
        run.aligned(dim, 16 // call.args[0].element_size())  # rows must start at multiples of 16 bytes
    run.set(call.out, [a[0], b[-1]])
    run.multiply(1, a[0], inner, b[-1])


@operator("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(run: Observer, call: Call) -> None:
    """Plain, grouped, depthwise and transposed convolutions in 1 to 3 dimensions."""
    x, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = call.args[6], call.args[8]
    dims, kernel = run.dims(x), run.dims(weight)
    spatial = len(kernel) - 2
    batch, channels = dims[: -spatial - 1], dims[-spatial - 1]
    run.settings(kernel[2:])
    for dim in dims[-spatial:]:
        run.fix(dim, "it is convolved over")
    rows, columns = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
    if groups == 1:
        columns = run.same(columns, channels)
        out = rows
    elif transposed:
        out = _grouped_transposed(run, channels, kernel, groups)
    else:
        out = _grouped(run, channels, rows, columns, groups)
    if groups > 1:
        outer, _ = factor(channels, size(channels) // groups, run.reason("groups of channels"))
        run.require(call.sizes[0] if call.sizes else groups, outer)
    if bias is not None:
        out = run.same(out, run.dims(bias)[0])
    run.set(call.out, [*batch, out, *call.out.shape[-spatial:]])
    fixed = prod(call.out.shape[-spatial:] if not transposed else x.shape[-spatial:]) * prod(weight.shape[2:])
    fixed *= prod(map(size, batch))
    if transposed:
        run.multiply(fixed, channels, kernel[1])
    else:
        run.multiply(fixed, out, columns if groups == 1 else kernel[1])


def _grouped(run: Observer, channels: Dim, rows: Dim, columns: Dim, groups: int) -> Dim:
    """(groups, in) channels and (groups, out) results; the groups are one axis."""
    why = run.reason("groups of channels")
    outer, inner = factor(channels, size(channels) // groups, why)
    run.grouped(outer, inner)
    run.same(inner, columns)
    rows_outer, rows_inner = factor(rows, size(rows) // groups, why)
    run.grouped(outer, rows_inner)
    run.same(outer, rows_outer)
    return rows


def _grouped_transposed(run: Observer, channels: Dim, kernel: tuple[Dim, ...], groups: int) -> Dim:
    run.same(channels, kernel[0])
    outer, _ = factor(channels, size(channels) // groups, run.reason("groups of channels"))
    return product(outer, kernel[1])


@function(F.bilinear)
def bilinear(run: Observer, call: Call) -> None:
    """x1 W x2 with a weight [out, in1, in2]."""
    a, b, weight = call.args[0], call.args[1], call.get(2, "weight")
    bias = call.get(3, "bias")
    out, first, second = run.dims(weight)
    run.same(first, run.dims(a)[-1])
    run.same(second, run.dims(b)[-1])
    if bias is not None:
        run.same(out, run.dims(bias)[0])
    if call.out is None:
        call.out = run.make([*a.shape[:-1], weight.shape[0]], a)
    run.set(call.out, [*run.dims(a)[:-1], out])
    run.multiply(prod(a.shape[:-1]), out, first, second)
