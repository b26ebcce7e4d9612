"""First-order Taylor on channels, neurons and heads (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771).

`squared` is the paper's score for a structure, (sum over its weights of w * dL/dw) squared: what the loss
changes to first order when the whole unit goes. `absolute` adds |w * dL/dw|, so that signs inside a unit
do not cancel. Gradients are of the mean loss over the calibration data. The weights of a unit are those
of the layers that make it; `members=all` adds those that read it, which count the same change again.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.scores.groups import Combine, group_scores
from secateur.shrink.cut import tensors_of
from secateur.shrink.structured import StructuredSettings, View, decide
from secateur.stats.gradients import weight_gradients
from secateur.structure.kinds import OUT_DIM
from secateur.structure.layers import layout_of


class Form(StrEnum):
    """How a unit's weights are put together."""

    SQUARED = "squared"
    ABSOLUTE = "absolute"


class Members(StrEnum):
    """Whose weights count."""

    ALL = "all"
    PRODUCERS = "producers"


class GroupTaylorSettings(StructuredSettings):
    """Settings of first-order Taylor pruning of structured units."""

    form: Form = Field(Form.SQUARED, description="(sum w g)^2 as in the paper, or sum |w g|")
    members: Members = Field(Members.PRODUCERS, description="the layers that make the unit, or all its weights")


def products(view: View, settings: GroupTaylorSettings) -> dict[str, Tensor]:
    """One Taylor score per unit."""
    modules = dict(view.model.named_modules())
    layouts = {name: layout_of(module) for name, module in modules.items()}
    places = {(p.parameter, p.dim) for site in view.sites.values() for p in site.occurrences}
    chosen = {
        (name, dim)
        for name, dim in places
        if (layout := layouts.get(name.rpartition(".")[0])) is not None
        and (settings.members is Members.ALL or name.endswith("bias") or dim == OUT_DIM[layout])
    }
    tensors = tensors_of(view.model)
    names = sorted({name for name, _ in chosen})
    gradients = weight_gradients(view.model, view.task.batches, names, view.task.progress)

    def vector(name: str, dim: int) -> Tensor | None:
        if (name, dim) not in chosen:
            return None
        product = tensors[name].detach().float() * gradients[name]
        product = product.abs() if settings.form is Form.ABSOLUTE else product
        others = [d for d in range(product.dim()) if d != dim]
        return product.sum(others) if others else product

    found = group_scores(view.sites, vector, Combine.SUM)
    return {name: score.square() for name, score in found.items()} if settings.form is Form.SQUARED else found


def plan(task: Task, settings: GroupTaylorSettings) -> Decision:
    """One backward pass over the calibration data per step, score, cut."""
    return decide(task, settings, lambda view: products(view, settings))


method = Method(
    name="group_taylor",
    paper="-",
    title="Importance estimation for neural network pruning (on channels, neurons and heads)",
    citation="Molchanov, Mallya, Tyree, Frosio, Kautz 2019, CVPR, arXiv 1906.10771",
    formula="S_i = (sum_w in unit w * dL/dw)^2, smallest units go from all coupled layers",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE, t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.NEURON, t.Granularity.HEAD}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
        physical=True,
    ),
    settings=GroupTaylorSettings,
    run=plan,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    needs_data=True,
    needs_labels=True,
    structured=True,
)
