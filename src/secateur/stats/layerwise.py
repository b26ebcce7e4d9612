"""Deciding a model layer by layer: the plan of most methods that look at one layer and its inputs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from secateur.core.journal import Notes, overlaid
from secateur.core.method import Decision, Task
from secateur.stats.listeners import Statistic
from secateur.stats.walker import BlockVisit, BlockWalk
from secateur.structure.fused import FusedPart
from secateur.structure.layers import WeightLayer

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Choice:
    """What was decided about one layer.

    Attributes:
        keep: bool `[O, I]`.
        weight: `[O, I]`, new values where the method changes what stays.
        scores: `[O, I]`, for `Task.keep_scores`.
        facts: figures for the report.
        warnings: sentences for the user.
    """

    keep: Tensor
    weight: Tensor | None = None
    scores: Tensor | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def layerwise(
    task: Task,
    factory: Callable[[int], S],
    decide: Callable[[WeightLayer, S], Choice],
    *,
    name: str = "layers",
    one_pass: bool = False,
    dense: bool = False,
) -> Decision:
    """Walk the model and decide every layer of every block once; the plan of most layer-wise methods.

    Args:
        task: model, data, patterns.
        factory: makes a layer's statistic from its number of inputs.
        decide: chooses a layer's weights; the walk goes on with them.
        name: of the journal's section.
        one_pass: `BlockVisit.sweep` instead of `BlockVisit.observe`.
        dense: feed blocks from dense ones.

    Returns:
        The decision, with a warning for every weight in the blocks that no layer of the walk uses.
    """
    section = task.journal.section(name)
    with BlockWalk(task, dense=dense, section=section) as walk:
        sites = {layer.name: layer.site for layer in walk.found.layers.values()} | walk.fused
        skipped = [
            f"'{name}' was not pruned: it {why}" for name, why in walk.found.skipped.items() if name not in walk.fused
        ]
        for visit in walk:
            _decide_layers(task, visit, factory, decide, one_pass)
    masks = section.tensors("mask")
    return Decision(
        sites={name: site for name, site in sites.items() if name in masks},
        masks=overlaid(masks),
        weights=overlaid(section.tensors("weight")),
        scores=overlaid(section.tensors("scores")),
        facts=section.facts(),
        warnings=section.warnings() + skipped,
    )


def _decide_layers(
    task: Task,
    visit: BlockVisit,
    factory: Callable[[int], S],
    decide: Callable[[WeightLayer, S], Choice],
    one_pass: bool,
) -> None:
    heard: set[str] = set()  # tensors of experts of which at least one expert was seen at work

    def note(layer: WeightLayer, stat: S) -> Choice:
        if isinstance(layer, FusedPart) and stat.samples:
            heard.add(layer.parameter)
        choice = decide(layer, stat)
        _note(task, visit.notes, layer, choice)
        return choice

    def settle(layer: WeightLayer, stat: S) -> None:
        _replace(visit, layer, note(layer, stat))

    if one_pass:
        for part in visit.sweep(factory, settle, experts=True):
            if part.parameter in heard:
                settle(part, factory(part.site.shape[1]))
    else:
        _observe_then_replace(visit, factory, note, heard)
    _join_parts(visit, heard)


def _observe_then_replace(
    visit: BlockVisit, factory: Callable[[int], S], note: Callable[[WeightLayer, S], Choice], heard: Set[str]
) -> None:
    """All statistics come from the block as it stands; experts are looked at a few at a time."""
    known: dict[str, WeightLayer] = {**visit.layers, **visit.parts}
    later: list[tuple[WeightLayer, Choice]] = []
    for names in [list(visit.layers), *_few_at_once(list(visit.parts.values()), factory)]:
        stats = visit.observe(factory, only=names) if names else {}
        later += [(known[name], note(known[name], stats.pop(name))) for name in names]
    for layer, choice in later:
        if not isinstance(layer, FusedPart) or layer.parameter in heard:
            _replace(visit, layer, choice)


def _replace(visit: BlockVisit, layer: WeightLayer, choice: Choice) -> None:
    visit.replace(layer, layer.matrix * choice.keep if choice.weight is None else choice.weight)


def _note(task: Task, notes: Notes, layer: WeightLayer, choice: Choice) -> None:
    notes.tensors[f"mask/{layer.name}"] = layer.to_site(choice.keep)
    if choice.weight is not None:
        notes.tensors[f"weight/{layer.name}"] = layer.to_site(choice.weight)
    if choice.scores is not None and task.keep_scores:
        notes.tensors[f"scores/{layer.name}"] = layer.to_site(choice.scores)
    if choice.facts:
        notes.facts[layer.name] = dict(choice.facts)
    notes.warnings += choice.warnings


AT_ONCE = 1 << 30  # bytes of experts' statistics gathered in one pass


def _few_at_once(parts: list[FusedPart], factory: Callable[[int], S]) -> Iterator[list[str]]:
    """Names of experts' matrices in groups whose statistics fit into memory together."""
    group: list[str] = []
    held = 0
    for part in parts:
        size = _bytes_of(factory, part.site.shape[1])
        if group and held + size > AT_ONCE:
            yield group
            group, held = [], 0
        group.append(part.name)
        held += size
    if group:
        yield group


def _bytes_of(factory: Callable[[int], S], features: int) -> int:
    with torch.device("meta"):
        return sum(value.nbytes for value in vars(factory(features)).values() if isinstance(value, Tensor))


def _join_parts(visit: BlockVisit, heard: Set[str]) -> None:
    """Notes about every expert of a tensor become notes about the tensor."""
    notes = visit.notes
    for name in dict.fromkeys(part.parameter for part in visit.parts.values()):
        own = [part for part in visit.parts.values() if part.parameter == name]
        if name not in heard:
            _forget(notes, own)
            notes.warnings.append(f"'{name}' was not pruned: its code does not multiply with one matrix per expert")
            continue
        for kind in ("mask", "weight", "scores"):
            found = [notes.tensors.pop(f"{kind}/{part.name}", None) for part in own]
            if found[0] is not None:
                notes.tensors[f"{kind}/{name}"] = torch.stack([one for one in found if one is not None])
        for part in own:
            for fact, value in notes.facts.pop(part.name, {}).items():
                notes.facts.setdefault(name, {})[f"{fact}_{part.index}"] = value


def _forget(notes: Notes, parts: Sequence[FusedPart]) -> None:
    """Drop what was noted about experts that were never seen at work."""
    for part in parts:
        for kind in ("mask", "weight", "scores"):
            notes.tensors.pop(f"{kind}/{part.name}", None)
        notes.facts.pop(part.name, None)
    names = tuple(f"layer '{part.name}'" for part in parts)
    notes.warnings[:] = [sentence for sentence in notes.warnings if not sentence.startswith(names)]
