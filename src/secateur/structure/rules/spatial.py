"""Pooling, interpolation and other work over positions."""

from __future__ import annotations

from torch.nn import functional as F

from secateur.structure.dims import factor, product
from secateur.structure.observe import Observer
from secateur.structure.table import Call, function, operator


@operator(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "grid_sampler_2d",
    "grid_sampler_3d",
    "grid_sampler",
)
def positions(run: Observer, call: Call) -> None:
    """Samples and channels stay, positions are mixed."""
    x = call.tensors[0]
    count = int("".join(c for c in call.name if c.isdigit())[:1] or 2)
    dims = run.dims(x)
    for dim in dims[-count:]:
        run.fix(dim, "positions are mixed")
    for out in call.out if isinstance(call.out, (list, tuple)) else (call.out,):
        run.set(out, [*dims[:-count], *out.shape[-count:]])


@function(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def adaptive_average(run: Observer, call: Call) -> None:
    """Averages over regions; as one function, since torch takes a shortcut for a single region."""
    x, target = call.args[0], call.get(1, "output_size")
    names = {"adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 2, "adaptive_avg_pool3d": 3}
    count = names[call.name]
    wanted = [target] * count if isinstance(target, int) else list(target)
    dims = run.dims(x)
    for dim in dims[-count:]:
        run.fix(dim, "positions are mixed")
    shape = [n if n is not None else m for n, m in zip(wanted, x.shape[-count:], strict=True)]
    if call.out is None:
        call.out = run.make([*x.shape[:-count], *shape], x)
    run.set(call.out, [*dims[:-count], *shape])


@operator("pixel_shuffle")
def pixel_shuffle(run: Observer, call: Call) -> None:
    """Channels (c, r, r) become positions."""
    dims = run.dims(call.args[0])
    r = call.args[1]
    channels, inner = factor(dims[-3], r * r, run.reason("channels become positions"))
    run.fix(inner, "channels become positions")
    run.set(call.out, [*dims[:-3], channels, *call.out.shape[-2:]])


@operator("pixel_unshuffle")
def pixel_unshuffle(run: Observer, call: Call) -> None:
    """Positions become channels (c, r, r)."""
    dims = run.dims(call.args[0])
    r = call.args[1]
    run.set(call.out, [*dims[:-3], product(dims[-3], r * r), *call.out.shape[-2:]])


@operator("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(run: Observer, call: Call) -> None:
    """(groups, channels) -> (channels, groups)."""
    dims = list(run.dims(call.args[0]))
    groups = call.args[1]
    outer, inner = factor(dims[1], call.args[0].shape[1] // groups, run.reason("channels are shuffled"))
    run.fix(outer, "channels are shuffled")
    dims[1] = product(inner, outer)
    run.set(call.out, dims)


@operator("im2col")
def im2col(run: Observer, call: Call) -> None:
    """Patches: (channels, kernel) by positions."""
    dims = run.dims(call.args[0])
    kernel = call.out.shape[-2] // call.args[0].shape[-3]
    run.set(call.out, [*dims[:-3], product(dims[-3], kernel), call.out.shape[-1]])


@operator("col2im")
def col2im(run: Observer, call: Call) -> None:
    """The inverse of `im2col`."""
    dims = run.dims(call.args[0])
    kernel = call.args[0].shape[-2] // call.out.shape[-3]
    channels, inner = factor(dims[-2], kernel, run.reason("patches are put together"))
    run.fix(inner, "patches are put together")
    run.set(call.out, [*dims[:-2], channels, *call.out.shape[-2:]])
