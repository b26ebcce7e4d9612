"""Where gates can hang in a network: residual blocks that can be taken out, channels between layers inside of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from torch import nn

from secateur.core.units import Site, UnitKind
from secateur.structure.analysis import Structure
from secateur.structure.dims import axes, size
from secateur.structure.kinds import OUT_DIM
from secateur.structure.layers import layout_of
from secateur.structure.removable import residual_blocks


class Costs(StrEnum):
    """What an open gate costs."""

    EQUAL = "equal"
    PARAMETERS = "parameters"
    FLOPS = "flops"


@dataclass(frozen=True)
class Gated:
    """What one gate decides on.

    Attributes:
        name: the block's, or the site's of the channels.
        block: whose input the gate looks at.
        units: gates per sample; 1 for a block.
        readers: the layers that read the gated channels; none for a block.
        cost: of one unit, in what the settings count.
    """

    name: str
    block: str
    units: int = 1
    readers: tuple[str, ...] = ()
    cost: float = 1.0


def gateable(model: nn.Module, structure: Structure) -> list[str]:
    """Blocks of convolutions that add what they compute to their unchanged input, in the model's order."""
    return [name for name in residual_blocks(model, structure) if block_channels(model.get_submodule(name))]


def block_channels(block: nn.Module) -> int:
    """Of a block's input; 0 where the block is no network of convolutions."""
    return next((m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d)), 0)


def inner_channels(model: nn.Module, structure: Structure, block: str) -> dict[str, tuple[str, ...]]:
    """Sites of channels that live between layers of one block -> the layers that read them.

    Left out are parts of fused or grouped layers and channels that a norm counts: closing those is not removing them.
    """
    found = structure.observation.statistics.values()
    counted = {axis for calls in found for one in calls for dim in one.dims for axis in axes(dim)}
    sites = {}
    for name, site in structure.sites.items():
        plain = all((p.offset, p.stride, p.repeat, p.times) == (0, 1, 1, 1) for p in site.occurrences)
        inside = all(place.parameter.startswith(f"{block}.") for place in site.occurrences)
        readers = _readers(model, site) if plain and inside and site.kind is UnitKind.CHANNEL else ()
        if readers and structure.axes[name] not in counted and name not in structure.within:
            sites[name] = readers
    return sites


def _readers(model: nn.Module, site: Site) -> tuple[str, ...]:
    weights = [place for place in site.occurrences if out_dim(model, place.parameter) == 1 - place.dim]
    return tuple(dict.fromkeys(place.parameter.rpartition(".")[0] for place in weights))


def out_dim(model: nn.Module, parameter: str) -> int | None:
    """The dimension of a layer's weight along which its outputs lie."""
    layout = layout_of(model.get_submodule(parameter.rpartition(".")[0]))
    return None if layout is None else OUT_DIM[layout]


def cost_of_block(model: nn.Module, structure: Structure, name: str, costs: Costs) -> float:
    """What a whole block costs: 1, its parameters, or its multiply-adds on the example."""
    if costs is Costs.PARAMETERS:
        return float(sum(p.numel() for p in model.get_submodule(name).parameters()))
    if costs is Costs.FLOPS:
        own = (one for one in structure.observation.products if f"{one.module}.".startswith(f"{name}."))
        return float(sum(one.factor * prod(map(size, one.dims)) for one in own))
    return 1.0


def cost_of_channel(structure: Structure, name: str, costs: Costs) -> float:
    """What one channel of a site costs: 1, or the parameters or multiply-adds that go with it."""
    site = structure.sites[name]
    if costs is Costs.PARAMETERS:
        return site.parameters / site.units
    return structure.flops({}) - structure.flops({name: site.units - 1}) if costs is Costs.FLOPS else 1.0
