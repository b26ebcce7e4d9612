"""AMP: heads and neurons that add least to the residual stream (Mugnaini et al. 2025, IJCNN, arXiv 2504.21174).

A head's score is the L1 norm of what it adds, h_n W_n with W_n its columns of the output projection, per token: sum
over the model's features, mean over a prompt's tokens, mean over prompts. A neuron's is the mean over tokens of the
absolute gated activation |z_m|, the same way. Everything in float32 on the dense model; every prompt weighs the same
whatever its length, and padding counts nowhere. The same share of heads and of neurons goes from every layer, so that
a plain config says the result.

A sparsity is the share c of the parameters of attention and feed-forward; a budget in parameters counts the whole
model, embeddings included. From every layer go round(c * heads) heads and round(c * neurons + what rounding the heads
left over) neurons. The published code (`rounding=reference`) adds the left-over heads, a fraction of one, to the number
of neurons; here what is left over is converted by parameters (a Llama's head weighs 4 d_head / 3 neurons), so that
the share is met. `rounding=none` rounds both down for themselves.

Where queries share keys, heads are scored and whole key/value groups go by the sum over their heads; the published
code knows no such models, and only Llama. The neuron's score changes when its up row is multiplied and its down column
divided by the same number, which leaves the model's function as it is: `neurons=projected`, |z_m| * ||W_down[:, m]||_1,
does not, and is the same quantity as the head's. Recovery by LoRA is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.structured import Counts, target_of
from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.distributed import total, total_count
from secateur.core.errors import BudgetError
from secateur.core.journal import Notes, Section
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.select import check_scores, keep_top
from secateur.core.units import Site, UnitKind
from secateur.data.batches import token_weights
from secateur.scores.weights import uniform_random
from secateur.shrink.structured import Shape, StructuredSettings, Work, begin, refuse_settings
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.readers import Reader, readers

HEADS = (UnitKind.HEAD, UnitKind.KV_GROUP)


class Order(StrEnum):
    """Which end of the ranking goes; the other two are controls of the criterion."""

    STANDARD = "standard"
    REVERSED = "reversed"
    RANDOM = "random"


class Neurons(StrEnum):
    """Score of a neuron."""

    ACTIVATION = "activation"
    PROJECTED = "projected"


class Rounding(StrEnum):
    """What becomes of the part of a head that rounding adds or leaves."""

    PARAMETERS = "parameters"
    REFERENCE = "reference"
    NONE = "none"


class AMPSettings(StructuredSettings):
    """AMP's settings; defaults from the paper."""

    kinds: str = Field("auto", description="kinds of unit: auto (heads and neurons), neuron, head or kv_group")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    layout: Shape = Field(Shape.UNIFORM, description="every layer loses the same counts")
    order: Order = Field(Order.STANDARD, description="the lowest scores go (standard), the highest, or random units")
    neurons: Neurons = Field(
        Neurons.ACTIVATION, description="mean absolute activation (paper), or times the L1 norm of the down column"
    )
    rounding: Rounding = Field(
        Rounding.PARAMETERS,
        description="what rounding the heads misses is made up in neurons by parameters (exact), as the published code "
        "does it (reference), or not at all, both rounded down (none)",
    )


def head_scores(entering: Tensor, weights: Tensor, per_token: Tensor) -> Tensor:
    """Sum over samples of the mean over tokens of ||h_n W_n||_1 for every head, `[heads]`.

    Args:
        entering: `[samples, tokens, heads, head_dim]`, what enters the output projection.
        weights: `[heads, head_dim, features]`, each head's slice of it.
        per_token: `[samples, tokens]`: what every token counts.
    """
    found = [(entering[:, :, n].float() @ weights[n]).abs().sum(-1) for n in range(len(weights))]
    return torch.stack([(one * per_token).sum() for one in found])


def head_width(site: Site) -> int:
    """Features of one head: a key/value group has as many heads as its queries have rows more than its keys."""
    return min(place.repeat for place in site.occurrences)


class Sums:
    """Scores of one site, added up batch by batch."""

    def __init__(self, reader: Reader, visit: BlockVisit, settings: AMPSettings) -> None:
        self.reader = reader
        self.matrix = reader.matrix(visit.tensor(reader.layer))  # [features, units * width]
        self.heads = reader.site.kind in HEADS
        self.projected = settings.neurons is Neurons.PROJECTED
        self.value = torch.zeros(reader.site.units, dtype=torch.float64)

    def add(self, entering: Tensor, per_token: Tensor) -> None:
        """Take in what entered the reading layer in one batch."""
        columns = self.reader.columns.flatten().to(entering.device)
        units = entering.reshape(*per_token.shape, -1)[..., columns].float()  # [samples, tokens, units * width]
        if self.heads:
            width = head_width(self.reader.site)
            weights = self.matrix.t().reshape(-1, width, len(self.matrix))
            scores = head_scores(units.view(*per_token.shape, -1, width), weights, per_token)
        else:
            scores = (units.abs() * per_token[..., None]).sum((0, 1))
        self.value += scores.view(len(self.value), -1).sum(1).double().cpu()

    def mean(self, samples: int) -> Tensor:
        """The score, `[units]` float32, over the samples of all processes."""
        scores = total(self.value) / samples
        if not self.heads and self.projected:
            scores = scores * self.matrix.abs().sum(0).double().cpu()
        return scores.float()


def measure(work: Work, settings: AMPSettings) -> Section:
    """One walk over the dense blocks: a score per head and neuron."""
    reading = readers(work.task.model, work.sites)

    def look(visit: BlockVisit) -> Notes:
        own = {name: Sums(reader, visit, settings) for name, reader in reading.items() if reader.inside(visit.name)}
        if not own:
            return Notes()
        modules = sorted({sums.reader.module for sums in own.values()})
        for seen, batch in zip(visit.capture(modules), work.task.batches, strict=True):
            for sums in own.values():
                entering = seen.inputs[sums.reader.module]
                sums.add(entering, token_weights(batch, entering))
        samples = total_count(sum(batch.samples for batch in work.task.batches))
        return Notes({f"scores/{name}": check_scores(sums.mean(samples), name) for name, sums in own.items()})

    return each_block(work.task, "amp", look)


def removed(sites: Sequence[Site], shares: Mapping[UnitKind, float], rounding: Rounding) -> dict[str, int]:
    """Units that go from the sites of one layer.

    Args:
        sites: its heads (or key/value groups) and neurons.
        shares: share that goes, by kind.
        rounding: of heads, and how neurons make up for it.
    """
    if rounding is Rounding.NONE:
        return {site.name: site.units - Budget(shares[site.kind]).keep(site.units) for site in sites}
    found, owed = {}, 0.0
    for site in (site for site in sites if site.kind in HEADS):
        wanted = shares[site.kind] * site.units
        found[site.name] = min(round(wanted), site.units - 1)
        weight = site.parameters / site.units if rounding is Rounding.PARAMETERS else 1.0
        owed += (wanted - found[site.name]) * weight
    rest = [site for site in sites if site.kind not in HEADS]
    for site in rest:
        price = sum(one.parameters / one.units for one in rest) if rounding is Rounding.PARAMETERS else 1.0
        wanted = shares[site.kind] * site.units + owed / price
        found[site.name] = min(max(round(wanted), 0), site.units - 1)
    return found


def by_layer(section: Section, sites: Mapping[str, Site]) -> list[list[Site]]:
    """The sites of each block."""
    groups = [[name.removeprefix("scores/") for name in section.names_of(block)] for block in section]
    return [[sites[name] for name in names] for names in groups if names]


def kept(work: Work, layers: Iterable[Sequence[Site]], settings: AMPSettings) -> Counts:
    """Kept units of every site that meet the budget."""
    layers, widths, budget = list(layers), work.widths, work.task.budget

    def counts_at(share: float) -> Counts:
        kinds = {site.kind for site in work.sites.values()}
        shares = {kind: budget.of(kind).sparsity if budget.per_kind else share for kind in kinds}
        found = dict(widths.fixed)
        for sites in layers:
            gone = removed(sites, shares, settings.rounding)
            found |= {
                site.name: widths.rounded(site, site.units - gone[site.name])
                for site in sites
                if site.name not in widths.fixed
            }
        return found

    if settings.rounding is Rounding.REFERENCE and work.budget.quantity is Quantity.PARAMETERS:
        return counts_at(rescaled(work))
    return work.meet(counts_at)


def rescaled(work: Work) -> float:
    """The share of heads and neurons for a budget in parameters, as published: embeddings, head and norms stay.

    Raises:
        BudgetError: more would have to go than there is in heads and neurons.
    """
    dense = work.structure.parameters({})
    share = (dense - target_of(work.budget, dense)) / sum(site.parameters for site in work.sites.values())
    if not 0 <= share < 1:
        raise BudgetError(f"{work.budget} is out of reach: it takes {share:.4g} of all heads and neurons")
    return share


def ranking(work: Work, scores: Mapping[str, Tensor], order: Order) -> dict[str, Tensor]:
    """What the units are kept by; higher = keep."""
    if order is Order.STANDARD:
        return dict(scores)
    if order is Order.REVERSED:
        return {name: -score for name, score in scores.items()}
    return {name: uniform_random(site.shape, work.task.rng("amp", name)) for name, site in work.sites.items()}


def plan(task: Task, settings: AMPSettings) -> Decision:
    """Measure, remove the same share of heads and neurons from every layer."""
    refuse_settings(settings, "scope", "normalise", "layout", "steps")
    work = begin(task, settings)
    section = measure(work, settings)
    found = dict(section.tensors("scores"))
    work = work.scored(found)
    counts = kept(work, by_layer(section, work.sites), settings)
    scores = ranking(work, found, settings.order)
    return work.conclude({name: keep_top(scores[name], counts[name]) for name in work.sites}, scores)


method = Method(
    name="amp",
    paper="33",
    title="Efficient LLMs with AMP: attention heads and MLP pruning",
    citation="Mugnaini, Yamamoto, de Alcantara, Zacarias, Bollis, Pellicer, Costa, Jordao 2025, arXiv 2504.21174",
    formula="heads: mean ||h_n W_n||_1; neurons: mean |z_m|; the same share of the lowest goes from every layer",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.ACTIVATION}),
        granularity=frozenset({t.Granularity.HEAD, t.Granularity.NEURON}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        physical=True,
        post_training=True,
    ),
    settings=AMPSettings,
    run=plan,
    streams=True,
    units=UnitKind.NEURON,
    exact=Group.SITE,
    needs_data=True,
    structured=True,
)
