"""A supernet: every layer that reads units, pruned locally at several levels, and models put together from them.

All levels are made from the dense weights, block by block along the walk, so that a level of one block can be
combined with any level of another. What enters a block carries the error of the blocks before it as `Accumulation`
says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.journal import Notes, Section
from secateur.core.method import Task
from secateur.core.units import UnitKind
from secateur.recover.group_obs import GroupOBS, Pace, Pruned, Saliency
from secateur.search.levels import LevelBank, Variant, bank_bytes, in_words
from secateur.search.moves import Levels
from secateur.stats.listeners import Hessian
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.layers import WeightLayer
from secateur.structure.readers import Reader
from secateur.structure.sites import weight_layers
from secateur.structure.stacks import find_stacks


class Accumulation(StrEnum):
    """What the blocks after a pruned one are fed with."""

    EXPECTATION = "expectation"  # the mean of its levels, weighted by what they keep
    LEVEL0 = "level0"  # its middle level
    NONE = "none"  # the dense block


@dataclass(frozen=True, eq=False)
class Place:
    """A site in a supernet.

    Attributes:
        reader: the layer that reads its units.
        layer: the same as something with a weight.
        block: which of the model's blocks it is in.
        kind: only places of one kind cost the same per unit.
    """

    reader: Reader
    layer: WeightLayer
    block: int
    kind: str

    @property
    def name(self) -> str:
        """The site's."""
        return self.reader.site.name

    @property
    def units(self) -> int:
        """Of the dense model."""
        return self.reader.site.units


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """All blocks of the model's stacks by name, in module order."""
    return {name: block for stack in find_stacks(model) for name, block in zip(stack.names, stack.blocks, strict=True)}


def places_of(model: nn.Module, readers: Mapping[str, Reader]) -> list[Place]:
    """The sites block after block.

    Raises:
        ModelError: a site's units are read outside of the blocks, or by a convolution or a shared weight.
    """
    blocks = list(blocks_of(model))
    layers = weight_layers(model, lambda name: True, within=blocks or [""]).layers
    found = []
    for name, reader in readers.items():
        block = next((index for index, block in enumerate(blocks) if reader.inside(block)), None)
        layer = layers.get(reader.layer)
        if block is None or layer is None or layer.site.matrix_shape[1] != reader.columns.numel():
            raise ModelError(
                f"'{name}' is read by '{reader.layer}', which is no linear layer with a weight of its own inside a "
                f"block of the model; exclude it (--exclude '{name.partition(':')[0]}')"
            )
        site = reader.site
        found.append(Place(reader, layer, block, f"{site.kind}/{site.cost}/{reader.width}"))
    return sorted(found, key=lambda place: place.block)


@dataclass(frozen=True)
class Local:
    """How one matrix is pruned.

    Attributes:
        saliency: who goes.
        heads, neurons: how many at once.
        damping: as for `GroupOBS`.
    """

    saliency: Saliency = Saliency.PAPER
    heads: Pace = field(default_factory=lambda: Pace(step=1))
    neurons: Pace = field(default_factory=lambda: Pace(step=16))
    damping: float = 0.01

    def pace(self, kind: UnitKind) -> Pace:
        """Of one kind of unit."""
        return self.heads if kind in (UnitKind.HEAD, UnitKind.KV_GROUP) else self.neurons


@dataclass(frozen=True, eq=False)
class Supernet:
    """The levels of all places, in a bank.

    Attributes:
        places: block after block.
        kept: units at every level, `{level: kept}` for each place.
        bank: holds the matrices.
        local: how they are pruned.
        accumulation: what later blocks are fed with.
    """

    places: Sequence[Place]
    kept: Sequence[Mapping[int, int]]
    bank: LevelBank
    local: Local
    accumulation: Accumulation

    @property
    def lows(self) -> Levels:
        """The lowest level of every place."""
        return tuple(map(min, self.kept))

    @property
    def highs(self) -> Levels:
        """The highest."""
        return tuple(map(max, self.kept))

    @property
    def bytes(self) -> int:
        """What the bank will take."""
        return bank_bytes(
            Variant(place.layer.site.matrix_shape[0], kept * place.reader.width, place.layer.weight.itemsize)
            for place, levels in zip(self.places, self.kept, strict=True)
            for kept in levels.values()
        )

    def build(self, task: Task, name: str) -> Section:
        """Walk the model and fill the bank; blocks that have their notes in the journal's section are there already.

        The notes hold `keep/SITE/LEVEL` masks and, for `SITE/LEVEL`, the loss and the relative squared error.

        Raises:
            OutputError: the disk is too small.
        """
        self.bank.require(self.bytes)
        task.progress.start(f"{name}, {in_words(self.bytes)}", None)
        task.progress.finish()
        everything = replace(task, include=("*",), exclude=())  # which sites is decided already
        return each_block(everything, name, self._block, dense=self.accumulation is Accumulation.NONE)

    def _block(self, visit: BlockVisit) -> Notes:
        notes = Notes()
        own = [index for index, place in enumerate(self.places) if place.reader.inside(visit.name)]
        stats = visit.observe(Hessian, only=[self.places[index].layer.name for index in own]) if own else {}
        for index in own:
            place, kept = self.places[index], self.kept[index]
            pruned = self._pruned(place, kept, stats[place.layer.name])
            for level, one in pruned.items():
                columns = place.reader.columns[one.keep.cpu()].flatten()
                self.bank.write(place.name, level, one.weight.to(place.layer.weight.dtype), columns)
                notes.tensors[f"keep/{place.name}/{level}"] = one.keep.cpu()
                notes.facts[f"{place.name}/{level}"] = {"loss": one.loss, "error": one.error}
            if self.accumulation is not Accumulation.NONE:
                visit.replace(visit.layers[place.layer.name], self._passed_on(place, kept, pruned))
        return notes

    def _pruned(self, place: Place, kept: Mapping[int, int], stat: Hessian) -> dict[int, Pruned]:
        """Every level; H is the sum over all tokens."""
        local = self.local
        hessian = stat.value * (stat.samples / 2)
        solver = GroupOBS(
            place.layer.matrix.float(), hessian, place.reader.columns, damping=local.damping, saliency=local.saliency
        )
        found = solver.levels(list(kept.values()), local.pace(place.reader.site.kind))
        return dict(zip(kept, found, strict=True))

    def _passed_on(self, place: Place, kept: Mapping[int, int], pruned: Mapping[int, Pruned]) -> Tensor:
        if self.accumulation is Accumulation.LEVEL0:
            return pruned[0].weight
        shares = {level: count / place.units for level, count in kept.items()}
        mean = sum((shares[level] * one.weight for level, one in pruned.items()), torch.zeros(()))
        return mean / max(sum(shares.values()), 1e-12)

    def weight(self, index: int, level: int) -> Tensor:
        """The weight of a place at a level, in the parameter's own shape and dtype, on its device."""
        layer = self.places[index].layer
        matrix = self.bank.read(self.places[index].name, level, layer.site.matrix_shape[1])
        return layer.to_site(matrix).to(layer.weight.device)

    @contextlib.contextmanager
    def assembled(self) -> Iterator[Assembly]:
        """Something that makes the model any candidate inside the block; its own weights are put back afterwards."""
        assembly = Assembly(self)
        try:
            yield assembly
        finally:
            assembly.restore()


class Assembly:
    """The model with the weights of a candidate."""

    def __init__(self, supernet: Supernet):
        self.supernet = supernet
        self.current: list[int | None] = [None] * len(supernet.places)
        self._dense: dict[int, Tensor] = {}

    def __call__(self, levels: Levels) -> int:
        """Change what differs; returns the first block that this changes, or a number past all blocks."""
        changed = [index for index, level in enumerate(levels) if level != self.current[index]]
        for index in changed:
            parameter = self._parameter(index)
            self._dense.setdefault(index, parameter.data)
            parameter.data = self.supernet.weight(index, levels[index])
            self.current[index] = levels[index]
        return min((self.supernet.places[index].block for index in changed), default=1 << 30)

    def _parameter(self, index: int) -> Tensor:
        parameter = self.supernet.places[index].layer.module.weight
        assert isinstance(parameter, Tensor)
        return parameter

    def restore(self) -> None:
        """The dense weights."""
        for index, data in self._dense.items():
            self._parameter(index).data = data
        self._dense.clear()
        self.current = [None] * len(self.current)
