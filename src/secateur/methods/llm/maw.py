"""MAW: width pruning of gated feed-forwards by weights alone (Martra 2025, arXiv 2512.22671).

A neuron is a row of gate, a row of up and a column of down. Its score is p(gate row) + p(up row) with p = max + |min|
of the row: peak to peak, not the maximum absolute weight that the name says (for a row from -0.4 to 0.5 it is 0.9, not
0.5). That is what the published code runs (its library now calls it PPM) and what `maw` is here; the prose's rule is
`max_abs`. Others: `vow`, the sum of the rows' variances (unbiased); `pon`, the product of their L1 norms; `l2`, the
sum of their L2 norms. Down has no say in any of them. All are computed in float32: in half precision variances
underflow and products overflow.

The same number goes from every layer, floor(sparsity * neurons), so that a plain config says the result; or
`expansion_rate` gives the width to keep in percent of the hidden size, as the published library takes it, with a
sparsity of 0. Kept widths are then often odd numbers (7373 of 8192), which are slower on accelerators; `multiple`
rounds them and so changes the share. No rule here is invariant to what leaves the model's function as it is:
multiplying a row of up and dividing the column of down.

Fused gate_up layers are read in their two parts, MLPs without a gate have one row a neuron. Experts are refused.
Neurons are only a part of a model's parameters: the facts carry `parameters_kept` beside `neurons_kept`. What a width
costs in single abilities is for `secateur.measure.task_report` to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from fractions import Fraction
from functools import reduce
from math import ceil

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError
from secateur.core.journal import Notes, Section
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.select import check_scores
from secateur.core.units import Site, UnitKind
from secateur.shrink.structured import Shape, StructuredSettings, Work, begin, refuse_settings
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.layers import to_matrix
from secateur.structure.producers import Producer, producers
from secateur.structure.readers import readers


class Rule(StrEnum):
    """Score of a neuron from its rows of gate and up."""

    MAW = "maw"
    MAX_ABS = "max_abs"
    VOW = "vow"
    PON = "pon"
    L2 = "l2"


class MAWSettings(StructuredSettings):
    """MAW's settings; defaults from the paper."""

    kinds: str = Field("neuron", description="kinds of unit; the paper cuts feed-forward neurons only")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    layout: Shape = Field(Shape.UNIFORM, description="uniform: every layer keeps the same width (paper)")
    rule: Rule = Field(Rule.MAW, description="maw: max + |min| (as published), max_abs (as described), vow, pon or l2")
    expansion_rate: float | None = Field(
        None, gt=0, description="width to keep in percent of the hidden size, e.g. 240; give a sparsity of 0 with it"
    )


def row_scores(rows: Tensor, rule: Rule) -> Tensor:
    """What one matrix says of every neuron, `[neurons]`, from its rows `[neurons, hidden]` in float32."""
    match rule:
        case Rule.MAW:
            return rows.amax(1) + rows.amin(1).abs()
        case Rule.MAX_ABS:
            return rows.abs().amax(1)
        case Rule.VOW:
            return rows.var(1)
        case Rule.PON:
            return rows.abs().sum(1)
        case _:
            return rows.square().sum(1).sqrt()


def pair_scores(matrices: Sequence[Tensor], rule: Rule) -> Tensor:
    """Scores of neurons from all matrices that make them: their sum; for `pon` their product."""
    parts = [row_scores(rows.float(), rule) for rows in matrices]
    return reduce(torch.mul if rule is Rule.PON else torch.add, parts)


def measure(work: Work, making: Mapping[str, list[Producer]], rule: Rule) -> Section:
    """Look at every block's weights once."""
    reading = readers(work.task.model, work.sites)

    def look(visit: BlockVisit) -> Notes:
        found = {}
        for name in (name for name, reader in reading.items() if reader.inside(visit.name)):
            rows = [part.matrix(visit.tensor(part.layer)) for part in making[name]]
            found[f"scores/{name}"] = check_scores(pair_scores(rows, rule), name).cpu()
        if len(found) > 1:
            raise ModelError(
                f"block '{visit.name}' holds {len(found)} groups of neurons (experts); this method ranks the neurons "
                "of one feed-forward in a block, exclude the others"
            )
        return Notes(found)

    return each_block(work.task, "maw", look, still=True)


def hidden_size(model: nn.Module, making: Mapping[str, list[Producer]]) -> int:
    """Inputs of the first layer that makes neurons."""
    first = next(iter(making.values()))[0]
    return to_matrix(model.get_parameter(first.layer), first.layout).shape[1]


def width_of(rate: float, hidden: int, site: Site) -> int:
    """Neurons that stay for an expansion rate in percent of the hidden size.

    Raises:
        BudgetError: the rate would widen the layer.
    """
    width = ceil(Fraction(str(rate)).limit_denominator(10**6) * hidden / 100)  # 266.666... is 8/3
    if width > site.units:
        raise BudgetError(
            f"expansion_rate={rate:g} asks for {width} neurons of '{site.name}', which has {site.units}; it can "
            f"be up to {100 * site.units / hidden:g} here"
        )
    return width


def at_rate(work: Work, rate: float, hidden: int) -> Work:
    """The same work with the budget that an expansion rate says.

    Raises:
        BudgetError: a budget was given as well.
    """
    if work.budget.quantity is not Quantity.SPARSITY or work.budget.amount:
        raise BudgetError(f"give either expansion_rate (with a sparsity of 0) or a budget, got both ({work.budget})")
    site = next(iter(work.sites.values()))
    gone = site.units - width_of(rate, hidden, site)
    # counts are rounded down, so half a neuron more keeps them whole
    share = Budget((gone + 0.5) / site.units if gone else 0.0, floor=work.task.budget.floor)
    return replace(work, task=replace(work.task, budget=share))


def plan(task: Task, settings: MAWSettings) -> Decision:
    """Score by weights, keep the highest of every layer."""
    refuse_settings(settings, "normalise", "steps")
    work = begin(task, settings)
    making = producers(task.model, work.sites)
    scores = dict(measure(work, making, settings.rule).tensors("scores"))
    work = work.scored(scores)
    hidden = hidden_size(task.model, making)
    if settings.expansion_rate is not None:
        work = at_rate(work, settings.expansion_rate, hidden)
    everything = {name: torch.ones(site.units, dtype=torch.bool) for name, site in work.sites.items()}
    held = work.refuse_unreachable(scores)
    masks = work.choose(scores, work.budget, everything)
    decision = work.conclude(masks, scores)
    decision.warnings += held
    for name, mask in masks.items():
        kept = int(mask.sum())
        decision.facts.setdefault(name, {}).update(
            neurons_kept=round(kept / len(mask), 6), expansion_rate=round(100 * kept / hidden, 4)
        )
    return decision


method = Method(
    name="maw",
    paper="30",
    title="Fragile knowledge, robust instruction-following: the width pruning dichotomy in Llama-3.2",
    citation="Martra 2025, arXiv 2512.22671",
    formula="S_m = max(g_m) + |min(g_m)| + max(u_m) + |min(u_m)| of the rows of gate and up, lowest go everywhere",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.NEURON}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_FREE,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        physical=True,
        post_training=True,
    ),
    settings=MAWSettings,
    run=plan,
    streams=True,
    units=UnitKind.NEURON,
    exact=Group.SITE,
    structured=True,
)
