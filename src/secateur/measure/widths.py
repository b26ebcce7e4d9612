"""Which widths this machine likes: of how many channels a layer should be a multiple."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

import torch
from torch import nn

from secateur.core.errors import SettingsError
from secateur.core.method import Batch
from secateur.measure.timings import LAYER_SECONDS, Timer, Work, undisturbed

MULTIPLES = (1, 2, 4, 8, 16, 32)
BLOCK = MULTIPLES[-1]
STARTS = (64, 160)  # widths from here to one block further are timed
OTHER = 128  # width of the side that stays
POSITIONS, TOKENS = 8, 16
GAIN = 0.03  # time per channel has to fall by this for a wider multiple to be worth it


class LayerKind(StrEnum):
    """What is timed: 3x3 convolutions at 8x8 positions, linear layers on 16 tokens a sample."""

    CONV = "conv"
    LINEAR = "linear"


@dataclass(frozen=True)
class Preference:
    """What multiples of channels bring on this machine.

    Attributes:
        kind, batch: what was timed.
        multiple: from here on, wider multiples bring less than 3 %.
        cost: multiple -> time per channel at widths that are no wider multiple, relative to multiples of 32.
    """

    kind: LayerKind
    batch: int
    multiple: int
    cost: Mapping[int, float]

    @property
    def sentence(self) -> str:
        """The finding in words."""
        worst = max(self.cost.values()) - 1
        if self.multiple == 1:
            return f"{self.kind} layers at batch {self.batch}: any number of channels is as good as its neighbours"
        return (
            f"{self.kind} layers at batch {self.batch}: keep multiples of {self.multiple} channels; "
            f"others cost up to {worst:.0%} more per channel"
        )


def preferred_multiple(
    kind: LayerKind | str, batch: int = 1, *, timer: Timer = undisturbed, device: torch.device | str = "cpu"
) -> Preference:
    """Time layers around 64 to 192 channels on either side and find the multiple that is enough.

    A width's time is compared to the straight line between the multiples of 32 around it, so that
    what any layer costs, however narrow, does not count. Takes 2 to 4 seconds on a CPU.

    Raises:
        SettingsError: an unknown kind, or a batch below 1.
    """
    try:
        kind = LayerKind(kind)
    except ValueError:
        raise SettingsError(f"kind must be {' or '.join(LayerKind)}, got '{kind}'") from None
    if batch < 1:
        raise SettingsError(f"batch must be 1 or more, got {batch}")
    points = [(side, start + offset) for side in (0, 1) for start in STARTS for offset in (0, BLOCK, *_offsets())]
    names = {f"{side} {width}": _work(kind, batch, side, width, torch.device(device)) for side, width in points}
    times = timer(names, LAYER_SECONDS)
    cost = {multiple: fmean(_costs(multiple, times)) for multiple in MULTIPLES}
    enough = (m for m in MULTIPLES if cost[m] <= (1 + GAIN) * min(cost[n] for n in MULTIPLES if n >= m))
    return Preference(kind, batch, next(enough), cost)


def _offsets() -> list[int]:
    return [offset for multiple in MULTIPLES[:-1] for offset in _of(multiple)]


def _of(multiple: int) -> tuple[int, ...]:
    """Two distances from a multiple of 32 that are multiples of this and of nothing wider."""
    return tuple(sorted({multiple, BLOCK // 2 + multiple})) if multiple < BLOCK // 2 else (BLOCK // 2,)


def _costs(multiple: int, times: Mapping[str, float]) -> Iterator[float]:
    if multiple == BLOCK:
        yield 1.0
        return
    for side in (0, 1):
        for start in STARTS:
            below, above = times[f"{side} {start}"], times[f"{side} {start + BLOCK}"]
            for offset in _of(multiple):
                yield times[f"{side} {start + offset}"] / (below + (above - below) * offset / BLOCK)


def _work(kind: LayerKind, batch: int, side: int, width: int, device: torch.device) -> Work:
    inputs, outputs = (width, OTHER) if side == 0 else (OTHER, width)
    layer: nn.Module
    if kind is LayerKind.CONV:
        layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, device=device)
        shape: tuple[int, ...] = (batch, inputs, POSITIONS, POSITIONS)
    else:
        layer = nn.Linear(inputs, outputs, device=device)
        shape = (batch, TOKENS, inputs)
    return layer.eval(), Batch((torch.ones(shape, device=device),))
