"""Operators that only rearrange: views, permutations, repetitions."""

from __future__ import annotations

import torch

from secateur.structure.dims import Axis, Dim, factor, product, size
from secateur.structure.observe import Observer
from secateur.structure.table import Call, function, operator
from secateur.structure.traced import how, plain


@operator("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy")
def view(run: Observer, call: Call) -> None:
    """Factors are split or joined in row-major order."""
    if isinstance(call.get(1), torch.dtype):
        run.unknown(call)
        return
    dims = regroup(run, list(run.dims(call.args[0])), tuple(call.out.shape))
    for dim, expression in zip(dims, call.sizes or (), strict=False):
        run.require(expression, dim)
    run.set(call.out, dims)


def regroup(run: Observer, dims: list[Dim], shape: tuple[int, ...]) -> list[Dim]:
    """The dimensions of `shape` made from `dims`: the shortest runs with equal products belong together."""
    why = run.reason("a view does not follow the parts that it is made of")
    out: list[Dim] = []
    i = j = 0
    while j < len(shape):
        taken: list[Dim] = []
        sizes = [shape[j]]
        have, want = 1, shape[j]
        j += 1
        if want == 1:
            out.append(1)
            continue
        while have != want or not taken:
            if have < want or not taken:
                taken.append(dims[i])
                have *= size(dims[i])
                i += 1
            else:
                sizes.append(shape[j])
                want *= shape[j]
                j += 1
        rest = product(*taken)
        pieces: list[Dim] = []
        for n in reversed(sizes[1:]):
            rest, piece = factor(rest, n, why)
            pieces.insert(0, piece)
        out += [rest, *pieces]
    return out


@operator("permute")
def permute(run: Observer, call: Call) -> None:
    """Dimensions in another order."""
    dims = run.dims(call.args[0])
    run.set(call.out, [dims[d] for d in call.args[1]])


@operator("transpose", "t", "swapaxes", "numpy_T", "adjoint")
def transpose(run: Observer, call: Call) -> None:
    """Two dimensions change places."""
    dims = list(run.dims(call.args[0]))
    if len(dims) > 1:
        a, b = (0, 1) if call.name == "aten::t" else call.args[1:3]
        dims[a], dims[b] = dims[b], dims[a]
    run.set(call.out, dims)


@operator("unsqueeze")
def unsqueeze(run: Observer, call: Call) -> None:
    """A dimension of size 1 more."""
    dims = list(run.dims(call.args[0]))
    dims.insert(call.args[1] % (len(dims) + 1), 1)
    run.set(call.out, dims)


@operator("squeeze")
def squeeze(run: Observer, call: Call) -> None:
    """Dimensions of size 1 less."""
    x = call.args[0]
    given = call.get(1, "dim")
    which = range(x.dim()) if given is None else given if isinstance(given, (list, tuple)) else [given]
    gone = {d % x.dim() for d in which if x.dim() and x.shape[d] == 1}
    run.set(call.out, [dim for d, dim in enumerate(run.dims(x)) if d not in gone])


@operator("expand", "expand_copy", "broadcast_to")
def expand(run: Observer, call: Call) -> None:
    """Dimensions of size 1 repeated; the repetition is an axis of its own where the code can follow it."""
    dims = run.dims(call.args[0])
    new = call.out.dim() - len(dims)
    out: list[Dim] = []
    for d, n in enumerate(call.out.shape):
        written = call.sizes is not None and len(call.sizes) == call.out.dim()
        expression = call.sizes[d] if written and call.sizes else None
        old = dims[d - new] if d >= new else 1
        if size(old) == n:
            run.require(expression, old)
            out.append(old)
        elif written:
            out.append(run.created(n, n if expression is None else expression))
        else:
            out.append(Axis(n) if n > 1 else n)  # expand_as and the like follow another tensor
    run.set(call.out, out)


@operator("repeat")
def repeat(run: Observer, call: Call) -> None:
    """Whole copies one after the other: index r * n + i."""
    dims = list(run.dims(call.args[0]))
    times = call.args[1]
    dims = [1] * (len(times) - len(dims)) + dims
    sizes = call.sizes if call.sizes and len(call.sizes) == len(times) else list(times)
    run.set(
        call.out,
        [product(run.created(r, how_), dim) for r, dim, how_ in zip(times, dims, sizes, strict=True)],
    )


@function(torch.repeat_interleave, torch.Tensor.repeat_interleave)
def repeat_interleave(run: Observer, call: Call) -> None:
    """Every unit several times in a row: index i * r + k."""
    x, times = call.args[0], call.get(1, "repeats")
    dim = call.get(2, "dim")
    dims = list(run.dims(x))
    if not isinstance(times, int) or dim is None:
        shape = [times * x.numel()] if isinstance(times, int) else None
        run.unknown(call)
        if call.out is None:
            if shape is None:
                call.out = torch.repeat_interleave(x, times, dim)
                return
            call.out = run.make(shape, x)
        return
    shape = list(x.shape)
    shape[dim] *= plain(times)
    dims[dim] = product(dims[dim], run.created(plain(times), how(times)))
    if call.out is None:
        call.out = run.make(shape, x)
    run.set(call.out, dims)


@operator("unfold")
def windows(run: Observer, call: Call) -> None:
    """Sliding windows along positions."""
    x, d = call.args[0], call.args[1]
    dims = list(run.dims(x))
    run.fix(dims[d], "windows slide over it")
    dims[d] = call.out.shape[d % x.dim()]
    run.set(call.out, [*dims, call.out.shape[-1]])


@operator("view_as_complex")
def view_as_complex(run: Observer, call: Call) -> None:
    """The last dimension holds real and imaginary part."""
    *dims, last = run.dims(call.args[0])
    run.fix(last, "it holds real and imaginary part")
    run.set(call.out, dims)


@operator("view_as_real", "_view_as_real")
def view_as_real(run: Observer, call: Call) -> None:
    """Real and imaginary part as a last dimension."""
    run.set(call.out, [*run.dims(call.args[0]), 2])


@operator("diagonal", "diag_embed", "tril", "triu")
def triangular(run: Observer, call: Call) -> None:
    """Matrices whose rows and columns are positions."""
    x = call.args[0]
    dims = list(run.dims(x))
    for dim in dims[-2:]:
        run.fix(dim, "rows and columns are compared")
    if call.out.shape == x.shape:
        run.set(call.out, dims)
