"""Random channels, neurons and heads: the control that every criterion on structured units must beat.

Every unit draws a number from a generator seeded by the seed and its site's name, so a site's choice
does not depend on what other sites there are.
"""

from __future__ import annotations

from torch import Tensor

from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.scores.weights import uniform_random
from secateur.shrink.structured import StructuredSettings, View, decide


class GroupRandomSettings(StructuredSettings):
    """Settings of random structured pruning."""


def draws(view: View) -> dict[str, Tensor]:
    """One number per unit."""
    return {
        name: uniform_random(site.shape, view.task.rng("group_random", name, str(site.units)))
        for name, site in view.sites.items()
    }


def plan(task: Task, settings: GroupRandomSettings) -> Decision:
    """Draw, rank, cut."""
    return decide(task, settings, draws)


method = Method(
    name="group_random",
    paper="-",
    title="Random channels, neurons and heads (control)",
    citation="control; layer ratios as in Liu et al. 2022, arXiv 2202.02643",
    formula="S_i ~ U(0, 1) per unit, lowest go from all coupled layers",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.BEFORE_TRAINING, t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.RANDOM}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.NEURON, t.Granularity.HEAD}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
        physical=True,
    ),
    settings=GroupRandomSettings,
    run=plan,
    streams=True,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    structured=True,
)
