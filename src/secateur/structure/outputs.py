"""Shapes of the commonest operators' results, found directly: torch's own shape rules take most of a run's time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def empty(shape: Any, like: Tensor) -> Tensor:
    """A result without values."""
    return torch.empty(shape, dtype=like.dtype, device="meta")


def unary(args: tuple[Any, ...]) -> Tensor | None:
    """The same shape and dtype, for floating-point input and no other tensor."""
    x = args[0]
    if not isinstance(x, Tensor) or not x.is_floating_point() or any(isinstance(a, Tensor) for a in args[1:]):
        return None
    return empty(x.shape, x)


def binary(args: tuple[Any, ...]) -> Tensor | None:
    """Broadcast shapes of two tensors of one dtype, or a tensor and a number."""
    x, y = args[0], args[1]
    if not isinstance(x, Tensor):
        return None
    if not isinstance(y, Tensor):
        return unary(args[:1]) if isinstance(y, (int, float)) else None
    if x.dtype != y.dtype or not x.dim() or not y.dim():
        return None
    return empty(x.shape if x.shape == y.shape else _broadcast(x, y), x)


def _broadcast(x: Tensor, y: Tensor) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    return shape


def batch_norm(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The input's shape, and two tensors of statistics that nobody looks at."""
    x = args[0]
    none = empty((0,), x)
    return empty(x.shape, x), none, none


def layer_norm(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The input's shape, and mean and scale of every row."""
    x, shape = args[0], args[1]
    rows = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
    return empty(x.shape, x), empty(rows, x), empty(rows, x)


def convolution(args: tuple[Any, ...]) -> Tensor | None:
    """Plain convolutions; transposed ones are left to torch."""
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    spatial = weight.dim() - 2
    if transposed or x.dim() != weight.dim() or not len(stride) == len(padding) == len(dilation) == spatial:
        return None
    sizes = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1
        for d in range(spatial)
    ]
    return empty((x.shape[0], weight.shape[0], *sizes), x)


UNARY = ("relu", "silu", "gelu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "neg")
MORE = ("exp", "rsqrt", "sqrt", "cos", "sin", "mish", "softplus", "abs", "reciprocal", "pow", "clamp", "square")
OUTPUTS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **{f"aten::{name}": unary for name in (*UNARY, *MORE)},
    **{f"aten::{name}": binary for name in ("add", "sub", "mul", "div")},
    "aten::native_batch_norm": batch_norm,
    "aten::_native_batch_norm_legit_no_training": batch_norm,
    "aten::cudnn_batch_norm": batch_norm,
    "aten::native_layer_norm": layer_norm,
    "aten::convolution": convolution,
}
"""Operator -> the function that makes its result, or None where torch must say it."""
