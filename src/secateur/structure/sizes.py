"""Which arguments of which functions are sizes, and of what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from secateur.structure.traced import Expression, how, plain

Sizes = list[Expression | None]
Slices = list[tuple[Any, Any, Any]]
"""(start, stop, length) of every slice as the code gave them; None where it did not."""

Finder = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Sizes | None, Slices] | None]


def _open(value: Any) -> Expression | None:
    """The expression of a size; None for -1, which torch fills in."""
    if isinstance(value, torch.Tensor) or (isinstance(value, int) and plain(value) == -1):
        return None
    return how(value)


def _listed(position: int, *names: str) -> Finder:
    """Sizes as separate arguments or as one sequence, from `position` on."""

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sizes | None, Slices] | None:
        given: Any = args[position:]
        if not given:
            given = next((kwargs[name] for name in names if name in kwargs), ())
        if len(given) == 1 and isinstance(given[0], (list, tuple)):
            given = given[0]
        if isinstance(given, int):
            given = (given,)
        if not all(isinstance(item, (int, torch.Tensor)) for item in given):
            return None
        return [_open(item) for item in given], []

    return find


def _single(position: int, name: str) -> Finder:
    """One size, or a list of them, in one argument."""

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sizes | None, Slices] | None:
        value = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(value, (list, tuple)):
            return [_open(item) for item in value], []
        return ([_open(value)], []) if isinstance(value, int) else None

    return find


def _unflatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sizes | None, Slices] | None:
    names = dict(zip(("input", "dim", "sizes"), args, strict=False)) | kwargs
    x, dim, sizes = args[0], names["dim"], names["sizes"]
    if not isinstance(dim, int):
        return None
    before = dim % x.dim()
    free: Sizes = [None]
    return free * before + [_open(item) for item in sizes] + free * (x.dim() - before - 1), []


def _indexed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sizes | None, Slices] | None:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return None, [(item.start, item.stop, None) for item in index if isinstance(item, slice)]


def _narrow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sizes | None, Slices] | None:
    names = dict(zip(("input", "dim", "start", "length"), args, strict=False)) | kwargs
    start, length = names["start"], names["length"]
    return (None, [(start, start + length, length)]) if isinstance(start, int) else None


T = torch.Tensor
SIZED: dict[Callable[..., Any], Finder] = {
    T.view: _listed(1, "size", "shape"),
    T.reshape: _listed(1, "shape"),
    torch.reshape: _listed(1, "shape"),
    T.expand: _listed(1, "size"),
    T.broadcast_to: _listed(1, "size"),
    torch.broadcast_to: _listed(1, "size"),
    T.repeat: _listed(1, "repeats"),
    torch.tile: _listed(1, "dims"),
    T.tile: _listed(1, "dims"),
    T.unflatten: _unflatten,
    torch.unflatten: _unflatten,
    torch.split: _single(1, "split_size_or_sections"),
    T.split: _single(1, "split_size"),
    T.split_with_sizes: _single(1, "split_sizes"),
    torch.split_with_sizes: _single(1, "split_sizes"),
    T.__getitem__: _indexed,
    T.__setitem__: _indexed,
    T.narrow: _narrow,
    torch.narrow: _narrow,
    torch.zeros: _listed(0, "size"),
    torch.ones: _listed(0, "size"),
    torch.empty: _listed(0, "size"),
    torch.full: _single(0, "size"),
    T.new_zeros: _listed(1, "size"),
    T.new_ones: _listed(1, "size"),
    T.new_empty: _listed(1, "size"),
    T.new_full: _single(1, "size"),
    F.layer_norm: _single(1, "normalized_shape"),
    torch.layer_norm: _single(1, "normalized_shape"),
    F.group_norm: _single(1, "num_groups"),
    torch.group_norm: _single(1, "num_groups"),
    F.conv1d: _single(6, "groups"),
    F.conv2d: _single(6, "groups"),
    F.conv3d: _single(6, "groups"),
    F.conv_transpose1d: _single(6, "groups"),
    F.conv_transpose2d: _single(6, "groups"),
    F.conv_transpose3d: _single(6, "groups"),
    F.pad: _single(1, "pad"),
    torch._C._nn.pad: _single(1, "pad"),
}
"""Functions that take sizes -> how to read them from a call."""


def sizes_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Sizes | None, Slices] | None:
    """Expressions of the sizes and slice bounds in a call; None for a function that takes none."""
    finder = SIZED.get(func)
    return None if finder is None else finder(args, kwargs)
