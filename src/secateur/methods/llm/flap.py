"""FLAP (An, Zhao, Yu, Tang, Wang 2023, AAAI 2024, arXiv 2312.11983): remove what hardly fluctuates, keep its mean.

One pass over the dense model gives the mean mu_j and the sample variance F_j over all tokens of every input j of the
layers that read heads and neurons (o_proj, down_proj). Metrics: `wifv` F_j * sum_o W_oj^2, `ifv` F_j, `wifn` mean_o
|W_oj| * sqrt(r_j), r_j the sum over tokens of x_j^2 per sequence. For heads the metric is squared before anything
else. Structures: `al_am` standardises the metric in each layer (unbiased deviation), takes the mean over the inputs
of a head, and ranks all heads and neurons of all layers together; a unit weighs as many parameters as go with it (a
Llama head is worth 4 d_head / 3 neurons) and `sparsity` is the share of that weight. `al_mm` ranks heads and neurons
of all layers apart, `heads` of the former go; `ul_mm` does so inside every layer, `ul_um` removes the same share of
the heads and of the neurons of every layer; both rank heads by the sum over their inputs. What was removed gives
its mean to the reader's bias: b = sum over removed j of mu_j W_oj.

`metric=wanda_sp` (wifn) and `mag_sp` (||W_j||_2) are the paper's baselines: the same share of every layer, block by
block on the blocks as pruned, heads by their sum, no bias.

The published code updates the mean in place before it uses "the old mean", which leaves the first sequence out of F
and makes it slightly small, and rounds the weight of a head down to whole neurons; `reference` does the same. A
layer never loses its last head or neuron here; the published code may empty it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from math import floor

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.structured import Counts
from secateur.allocate.weighted import evenly_gone, lowest_gone, weighted_counts
from secateur.core import tags as t
from secateur.core.budget import Budget
from secateur.core.distributed import several
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.journal import Notes, Section, overlaid
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.select import keep_top
from secateur.core.units import Site, UnitKind
from secateur.recover.bias import FACT
from secateur.recover.means import mean_biases
from secateur.shrink.structured import Shape, StructuredSettings, Work, begin, refuse_settings
from secateur.stats.listeners import TokenMoments
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.readers import Reader, readers

HEADS = (UnitKind.HEAD, UnitKind.KV_GROUP)


class Metric(StrEnum):
    """What an input of a reading layer is worth."""

    WIFV = "wifv"
    IFV = "ifv"
    WIFN = "wifn"
    WANDA_SP = "wanda_sp"
    MAG_SP = "mag_sp"


class Rank(StrEnum):
    """Which units compete."""

    AL_AM = "al_am"  # all layers, all modules
    AL_MM = "al_mm"  # all layers, heads and neurons apart
    UL_MM = "ul_mm"  # layer by layer, heads and neurons apart
    UL_UM = "ul_um"  # the same share of everything


BASELINES = (Metric.WANDA_SP, Metric.MAG_SP)
ALL_LAYERS = (Rank.AL_AM, Rank.AL_MM)
OWN_HEADS = (Rank.AL_MM, Rank.UL_MM)


class FLAPSettings(StructuredSettings):
    """FLAP's settings; defaults from the paper."""

    metric: Metric = Field(Metric.WIFV, description="wifv, ifv, wifn; or the baselines wanda_sp, mag_sp")
    structure: Rank | None = Field(
        None, description="al_am, al_mm, ul_mm or ul_um; default: al_am, for the baselines ul_um"
    )
    heads: int | None = Field(None, ge=0, description="heads to remove from the whole model, for al_mm and ul_mm")
    bias: bool | None = Field(
        None, description="put the mean of what is removed into the biases; default: yes, for the baselines no"
    )
    reference: bool = Field(False, description="fluctuation and weight of a head as in the published code")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    largest_cut: float = Field(1.0, gt=0, le=1, description="largest share of a site's units that may go")

    @property
    def rank(self) -> Rank:
        """Which units compete."""
        return self.structure or (Rank.UL_UM if self.metric in BASELINES else Rank.AL_AM)

    @property
    def compensates(self) -> bool:
        """Whether biases are written."""
        return self.metric not in BASELINES if self.bias is None else self.bias


class Released(TokenMoments):
    """The published recursion, one sequence at a time: F <- F (n-1)/n + sum (x - mu_new)^2 / (n+1), from the second."""

    def __init__(self, features: int):
        super().__init__(features)
        self.fluctuation, self.running = torch.zeros(features), torch.zeros(features)

    def update(self, inputs: Tensor, samples: int) -> None:
        """Take in a batch, sequence by sequence."""
        for sequence in inputs.float().view(samples, -1, inputs.shape[1]):
            n = self.samples
            self.running = self.running.to(sequence.device) * (n / (n + 1)) + sequence.mean(0) / (n + 1)
            if n:
                new = (sequence - self.running).square().sum(0) / (n + 1)
                self.fluctuation = self.fluctuation.to(sequence.device) * ((n - 1) / n) + new
            super().update(sequence, 1)

    @property
    def variance(self) -> Tensor:
        """What stands for the variance, `[I]`."""
        return self.fluctuation

    def reduce(self) -> None:
        """The order of the sequences matters: it cannot be split.

        Raises:
            SettingsError: there are several processes.
        """
        if several():
            raise SettingsError("flap: reference=True depends on the order of the sequences; run it in one process")


def metric_of(weight: Tensor, stat: TokenMoments, columns: Tensor, metric: Metric) -> Tensor:
    """One number per input of the reading layer, `[n]` float64.

    Args:
        weight: `[O, n]`, the columns that read the units.
        stat: of all inputs of the layer.
        columns: which of them, `[n]`.
        metric: which number.
    """
    W = weight.double()
    if metric is Metric.MAG_SP:
        return W.square().sum(0).sqrt()
    if metric in (Metric.WIFN, Metric.WANDA_SP):
        squares = (stat.deviations + stat.tokens * stat.mean.square())[columns] / max(1, stat.samples)
        return W.abs().mean(0) * squares.sqrt()
    fluctuation = stat.variance[columns].double()
    return fluctuation if metric is Metric.IFV else fluctuation * W.square().sum(0)


def unit_scores(vector: Tensor, site: Site, settings: FLAPSettings) -> Tensor:
    """From one number per input, `[units * width]`, to one per unit."""
    if site.kind in HEADS and settings.metric not in BASELINES:
        vector = vector.square()
    if settings.rank not in ALL_LAYERS:
        return vector.view(site.units, -1).sum(1)
    deviation = vector.std() if len(vector) > 1 else vector.new_zeros(())
    centred = vector - vector.mean()
    standard: Tensor = centred / deviation if deviation > 0 else centred * 0
    return standard.view(site.units, -1).mean(1)


def measure(work: Work, reading: Mapping[str, Reader], settings: FLAPSettings) -> Section:
    """One walk: scores of all units, means of all inputs; the baselines cut every block before the next is seen."""
    counts = work.meet(lambda share: uniform(work, share)) if settings.metric in BASELINES else None

    def look(visit: BlockVisit) -> Notes:
        notes = Notes()
        own = {name: reader for name, reader in reading.items() if reader.inside(visit.name)}
        stats = visit.observe(Released if settings.reference else TokenMoments, only={r.layer for r in own.values()})
        for name, reader in own.items():
            stat, columns = stats[reader.layer], reader.columns.flatten()
            vector = metric_of(reader.matrix(visit.tensor(reader.layer)), stat, columns, settings.metric)
            scores = unit_scores(vector, reader.site, settings).float().cpu()
            notes.tensors |= {f"scores/{name}": scores, f"mean/{name}": stat.mean.cpu()[columns].float()}
            if counts is not None:
                silence(visit, reader, keep_top(scores, counts[name]))
        return notes

    task = replace(work.task, include=("*",), exclude=())  # readers belong to the sites that were asked for
    return each_block(task, "flap", look, dense=counts is None)


def silence(visit: BlockVisit, reader: Reader, keep: Tensor) -> None:
    """Let the rest of the walk go on without the removed units."""
    layer = visit.layers[reader.layer]
    matrix = layer.matrix.clone()
    matrix[:, reader.columns[~keep].flatten().to(matrix.device)] = 0
    visit.replace(layer, matrix)


def uniform(work: Work, share: float) -> Counts:
    """The same share of every site, or the shares that were asked for single kinds."""
    asked = work.task.budget
    budgets = {name: Budget(share) if work.cost else asked.of(site.kind) for name, site in work.sites.items()}
    return rounded(work, {name: budget.keep(work.sites[name].units) for name, budget in budgets.items()})


def rounded(work: Work, counts: Counts) -> Counts:
    """Counts that the settings allow; given ones win."""
    fixed = work.widths.fixed
    return {
        name: fixed[name] if name in fixed else work.widths.rounded(site, counts[name])
        for name, site in work.sites.items()
    }


def counts_at(work: Work, scores: Mapping[str, Tensor], settings: FLAPSettings, share: float) -> Counts:
    """Kept units of every site when `share` of the weight of all units goes."""
    if settings.rank is Rank.UL_UM:
        return uniform(work, share)
    free = {name: score for name, score in scores.items() if name in work.sites and name not in work.widths.fixed}
    safe = {name: work.widths.rounded(work.sites[name], 1) for name in free}
    costs = {name: work.sites[name].parameters / work.sites[name].units for name in free}
    if settings.rank is Rank.AL_AM:
        weights = {name: cost // min(costs.values()) for name, cost in costs.items()} if settings.reference else costs
        return rounded(work, weighted_counts(free, weights, 1 - share, safe))
    remove = lowest_gone if settings.rank is Rank.AL_MM else evenly_gone
    heads = {name: score for name, score in free.items() if work.sites[name].kind in HEADS}
    rest = {name: score for name, score in free.items() if name not in heads}
    found = remove(heads, settings.heads or 0, safe)
    gone = sum((len(score) - found[name]) * costs[name] for name, score in heads.items())
    everything = sum(costs[name] * len(score) for name, score in free.items())
    size = sum(costs[name] * len(score) for name, score in rest.items()) / max(1, sum(map(len, rest.values())))
    neurons = floor((share * everything - gone) / size + 1e-9) if rest else 0
    return rounded(work, found | remove(rest, neurons, safe))


def check(work: Work, settings: FLAPSettings) -> None:
    """Refuse what does not go together.

    Raises:
        SettingsError: a setting that the structure has no use for, or lacks.
        BudgetError: own amounts for kinds of unit where the structure weighs them against each other.
    """
    rank = settings.rank
    if settings.metric in BASELINES and rank is not Rank.UL_UM:
        raise SettingsError(f"flap: {settings.metric} prunes layer by layer; leave out structure or give ul_um")
    if (rank in OWN_HEADS) != (settings.heads is not None):
        raise SettingsError("flap: give heads=N with structure=al_mm or ul_mm, and only with these")
    if rank in ALL_LAYERS and settings.layout is Shape.UNIFORM:
        raise SettingsError(f"flap: {rank} gives layers different widths; layout=uniform goes with ul_um and ul_mm")
    if work.task.budget.per_kind and rank is not Rank.UL_UM:
        raise BudgetError(f"flap: {rank} weighs heads against neurons; own amounts for a kind go with structure=ul_um")
    units = sum(site.units for site in work.sites.values() if site.kind in HEADS)
    if settings.heads is not None and settings.heads >= max(1, units):
        raise BudgetError(f"flap: heads={settings.heads} of {units} cannot go; every layer keeps at least one")


def plan(task: Task, settings: FLAPSettings) -> Decision:
    """Measure on the dense model, rank, cut, and make up for the mean."""
    refuse_settings(settings, "scope", "normalise", "steps")
    work = begin(task, settings)
    check(work, settings)
    reading = readers(task.model, work.sites)
    section = measure(work, reading, settings)
    scores = dict(section.tensors("scores"))
    work = work.scored(scores)
    kept = work.meet(lambda share: counts_at(work, scores, settings, share))
    decision = work.conclude({name: keep_top(scores[name], kept[name]) for name in work.sites}, scores)
    gone = sum((site.units - kept[name]) * site.parameters / site.units for name, site in work.sites.items())
    facts = decision.facts.setdefault(next(iter(work.sites)), {})
    facts["weight_removed"] = round(gone / sum(site.parameters for site in work.sites.values()), 6)
    if settings.compensates:
        found = mean_biases(task, "flap-bias", reading, decision.masks, section.tensors("mean"))
        decision.weights = overlaid(found.tensors("weight"))
        facts[FACT] = float(len(decision.weights))
    return decision


method = Method(
    name="flap",
    paper="B3",
    title="Fluctuation-based adaptive structured pruning for large language models",
    citation="An, Zhao, Yu, Tang, Wang 2023, AAAI 2024, arXiv 2312.11983",
    formula="S_j = var(x_j) * sum_o W_oj^2, standardised per layer; lowest of all layers go, mean to bias",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.ACTIVATION, t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.HEAD, t.Granularity.NEURON}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        physical=True,
        post_training=True,
    ),
    settings=FLAPSettings,
    run=plan,
    streams=True,
    units=UnitKind.HEAD,
    exact=Group.COST,
    needs_data=True,
    structured=True,
)
