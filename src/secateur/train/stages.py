"""Pruning and training that take turns: how much data and which size belong to each of P stages (Pan et al. 2025)."""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise
from math import cos, pi

from secateur.core.errors import SettingsError


class Slices(StrEnum):
    """How the training is dealt out to the stages."""

    LINEAR = "linear"  # stage p gets 2p / (P (P + 1))
    CONSTANT = "constant"  # 1 / P
    COSINE = "cosine"  # the differences of 1 - cos(p pi / (2P))


def stage_bounds(steps: int, stages: int, slices: Slices) -> list[int]:
    """Optimiser steps that are done before stage 1, after stage 1, ..., after stage P: 0 to `steps`.

    Raises:
        SettingsError: a stage would get no step.
    """

    def until(stage: int) -> int:
        match slices:
            case Slices.LINEAR:
                return steps * stage * (stage + 1) // (stages * (stages + 1))
            case Slices.CONSTANT:
                return steps * stage // stages
            case _:
                return round(steps * (1 - cos(stage * pi / (2 * stages))))

    bounds = [until(stage) for stage in range(stages + 1)]
    for stage, (start, stop) in enumerate(pairwise(bounds), 1):
        if start == stop:
            raise SettingsError(
                f"stage {stage} of {stages} would get none of the {steps} steps ({slices} slices); train longer or "
                "take fewer stages"
            )
    return bounds


def stage_targets(dense: int, target: int, stages: int) -> list[int]:
    """What may be left after stage 1, ..., P: equal parts of the way from `dense` to `target`, in integers."""
    return [dense - (dense - target) * stage // stages for stage in range(1, stages + 1)]
