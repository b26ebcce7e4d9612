"""Scores of structured units: numbers per index of every parameter an axis stands in, added up per unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import torch
from torch import Tensor

from secateur.core.units import Occurrence, Site

Vector = Callable[[str, int], "Tensor | None"]
"""(parameter, dimension) -> one number per index along it; None where it has no say."""


class Combine(StrEnum):
    """How a unit's numbers from several parameters become one."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    PRODUCT = "prod"
    FIRST = "first"


def per_unit(place: Occurrence, units: int, vector: Tensor) -> Tensor:
    """The numbers of one occurrence added up per unit, `[units]`."""
    if place.times == 1 and place.stride == place.repeat:
        run = vector[place.offset : place.offset + units * place.repeat]
        return run if place.repeat == 1 else run.view(units, place.repeat).sum(1)
    return vector[place.indices(units).to(vector.device)].sum(1)


def combined(parts: list[Tensor], how: Combine) -> Tensor:
    """One number per unit from several."""
    if len(parts) == 1 or how is Combine.FIRST:
        return parts[0]
    stacked = torch.stack(parts)
    match how:
        case Combine.SUM:
            return stacked.sum(0)
        case Combine.MEAN:
            return stacked.mean(0)
        case Combine.MAX:
            return stacked.amax(0)
        case _:
            return stacked.prod(0)


def group_scores(sites: Mapping[str, Site], vector: Vector, how: Combine = Combine.SUM) -> dict[str, Tensor]:
    """Site -> one score per unit; sites in which no parameter has a say are left out.

    Args:
        sites: structured sites with their occurrences.
        vector: numbers per index of a parameter's dimension; asked once for each pair.
        how: how the occurrences of a unit are combined.
    """
    known: dict[tuple[str, int], Tensor | None] = {}

    def ask(place: Occurrence) -> Tensor | None:
        key = (place.parameter, place.dim)
        if key not in known:
            known[key] = vector(*key)
        return known[key]

    found: dict[str, Tensor] = {}
    for name, site in sites.items():
        vectors = ((place, ask(place)) for place in site.occurrences)
        parts = [per_unit(place, site.units, values) for place, values in vectors if values is not None]
        if parts:
            found[name] = combined(parts, how)
    return found


def over_others(tensor: Tensor, dim: int, power: float = 1.0) -> Tensor:
    """|entries| ** power summed over all dimensions but one, in float32."""
    values = tensor.detach().float().abs()
    if power != 1:
        values = values.square_() if power == 2 else values.pow_(power)
    others = [d for d in range(tensor.dim()) if d != dim]
    return values.sum(others) if others else values
