"""Calibration batches made anew: of another size, drawn afresh, or of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import drawn, split_batch


def regrouped(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same samples in the same order in batches of up to `size`, without targets.

    Batches are joined where all their inputs are tensors with one row per sample and of equal shape.
    """
    groups: list[list[Batch]] = []
    for batch in batches:
        for part in split_batch(Batch(batch.args, batch.kwargs), size):
            fits = groups and _samples(groups[-1]) + part.samples <= size
            if fits and _form(part) and _form(part) == _form(groups[-1][0]):
                groups[-1].append(part)
            else:
                groups.append([part])
    return [_joined(group) for group in groups]


def fresh(batches: Sequence[Batch], samples: int, length: int, size: int, rng: torch.Generator) -> list[Batch]:
    """Samples drawn without repetition in batches of `size`; token windows cut to `length` at random offsets.

    What is not plain token ids `[samples, tokens]`, and windows that are no longer than `length`, stay whole.
    """
    batch = drawn(batches, samples, rng)
    tokens = window_length(batch)
    if tokens is not None and tokens > length:
        windows = batch.tensors[0]
        starts = torch.randint(tokens - length + 1, (len(windows), 1), generator=rng)
        places = (starts + torch.arange(length)).to(windows.device)
        cut = windows.gather(1, places)  # [samples, length]
        batch = Batch(tuple(cut for _ in batch.args), dict.fromkeys(batch.kwargs, cut), batch.target, batch.targets)
    return split_batch(batch, size)


def window_length(batch: Batch) -> int | None:
    """Tokens of each sample where the inputs are one tensor of token ids `[samples, tokens]`; None otherwise."""
    inputs = (*batch.args, *batch.kwargs.values())
    alone = len(inputs) == 1 and isinstance(inputs[0], Tensor)
    return inputs[0].shape[1] if alone and inputs[0].dtype == torch.int64 and inputs[0].dim() == 2 else None


def normal_like(batch: Batch, rng: torch.Generator) -> Batch:
    """Standard normal inputs of the batch's shapes, in place of all its tensors.

    Raises:
        DataError: the model takes integers, of which there is no noise.
    """
    if any(not tensor.is_floating_point() for tensor in batch.tensors):
        raise DataError("noise can stand in for real-valued inputs only, but the data are integers; use the data")

    def drawn(item: Any) -> Any:
        return torch.randn(item.shape, generator=rng).to(item) if isinstance(item, Tensor) else item

    return Batch(tuple(map(drawn, batch.args)), {key: drawn(value) for key, value in batch.kwargs.items()})


def _samples(group: Sequence[Batch]) -> int:
    return sum(batch.samples for batch in group)


def _form(batch: Batch) -> tuple[object, ...]:
    """Equal for batches that can be joined; empty for one that cannot."""
    inputs: dict[str, Any] = {**{str(i): item for i, item in enumerate(batch.args)}, **batch.kwargs}
    if not all(isinstance(x, Tensor) and x.dim() and x.shape[0] == batch.samples for x in inputs.values()):
        return ()
    return tuple((name, x.shape[1:], x.dtype) for name, x in inputs.items())


def _joined(group: Sequence[Batch]) -> Batch:
    first = group[0]
    if len(group) == 1:
        return first
    args = tuple(torch.cat([batch.args[i] for batch in group]) for i in range(len(first.args)))
    return Batch(args, {key: torch.cat([batch.kwargs[key] for batch in group]) for key in first.kwargs})
