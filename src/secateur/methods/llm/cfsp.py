"""CFSP: few neurons where a block turns the hidden state little (Wang et al. 2024, COLING 2025, arXiv 2409.13199).

Coarse: the importance of a block is the sum over all calibration tokens of the angular distance between its input and
its output. x_i = (I_i - mean) / 1e4, s_i = sigmoid(slope * x_i), and block i keeps the share s_i / mean(s) * (1 -
sparsity) of its neurons; where that reaches 1 somewhere, all s_i are drawn towards their mean. Fine: inside a block a
neuron is scored by the relative weights of gate, up and down times a_j, the norm of what enters down's column j.
Everything is measured on the dense model in one pass; MLPs without a gate are scored by their two matrices.

Where the published code differs, and what is done here:
- Its "relative" weights are divided by the sum over each neuron's own column, so they average to the same number for
  all neurons and the score is 3/d * a_j: the activation norm alone. `local=reference` (default) keeps that,
  `local=relative` divides by the sum over the neurons instead, so that weights matter.
- 1e4 is meant for 131072 tokens; with few tokens all s_i are 0.5 and every block keeps the same. The sums are
  therefore taken as if `tokens` had been seen; `tokens=0` leaves them as they are.
- Counts are exact over all neurons, where it keeps one more in each block. A `multiple` of 128 is its `cuda_friendly`;
  the drift is said. A block that would round to 0 keeps one multiple (there: all its neurons, by an index of -1).
- `mag_base` works (there it fails at the mean over an axis that is gone). Padding counts nowhere.
Recovery (IG-LoRA): every site's facts carry `lora_rank`, in proportion to the importance, `rank` on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import ceil

from pydantic import Field
from torch import Tensor

from secateur.allocate.importance import multiples, proportional, ranks, sigmoid, whole
from secateur.allocate.structured import Counts
from secateur.core import tags as t
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError
from secateur.core.journal import Notes, Section
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.select import check_scores, keep_top
from secateur.core.units import UnitKind
from secateur.scores.blocks import Influence
from secateur.shrink.structured import StructuredSettings, Work, begin, refuse_settings
from secateur.stats.influence import passage
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.producers import producers
from secateur.structure.readers import readers


class Fine(StrEnum):
    """Score of a neuron inside its block; D, U, G: relative weights of down, up, gate; a: activation norm."""

    THREE_W_ONE_WA = "three_w_one_wa"  # (D a^b + U + G) a^c
    THREE_W_ONE_A = "three_w_one_a"  # (D + U + G) a^c
    ONE_WA = "one_wa"  # (D a^b) a^c
    ONE_A = "one_a"  # D a^0.5
    WANDA_BASE = "wanda_base"  # mean of |W_down| a
    MAG_BASE = "mag_base"  # L2 norm of down's column


class Local(StrEnum):
    """What a weight is relative to."""

    REFERENCE = "reference"
    RELATIVE = "relative"


class CFSPSettings(StructuredSettings):
    """CFSP's settings; defaults from the paper and its code."""

    kinds: str = Field("neuron", description="kinds of unit; the paper cuts feed-forward neurons only")
    multiple: int = Field(1, ge=1, description="round kept neurons to the nearest multiple; 128: `cuda_friendly`")
    largest_cut: float = Field(1.0, gt=0, le=1, description="largest share of a block's neurons that may go")
    coarse: Influence = Field(Influence.ANGULAR, description="importance of blocks: angular, cosine, mse, mae, uniform")
    slope: float = Field(1.0, ge=0, description="slope of the sigmoid (the paper's a)")
    tokens: int = Field(131072, ge=0, description="scale importance sums to so many tokens; 0: leave them as they are")
    fine: Fine = Field(Fine.THREE_W_ONE_WA, description="score of neurons inside a block")
    local: Local = Field(
        Local.REFERENCE, description="weights relative to their own neuron (published: they cancel) or to all neurons"
    )
    inner_power: float = Field(1.0, ge=0, description="exponent of the activation norm beside |W_down| (b)")
    power: float = Field(1.0, ge=0, description="exponent of the activation norm beside the sum (c)")
    rank: int = Field(8, ge=1, description="mean rank of the adapters that the facts propose for recovery")


def relative(weight: Tensor, local: Local) -> Tensor:
    """|W| over the sum of each neuron (reference) or over all neurons (relative), `[outputs, neurons]`; 0 / 0 is 0."""
    sizes = weight.abs()
    return sizes / sizes.sum(0 if local is Local.REFERENCE else 1, keepdim=True).clamp_min(1e-30)


def fine_scores(down: Tensor, makers: Sequence[Tensor], norms: Tensor, settings: CFSPSettings) -> Tensor:
    """One score per neuron, `[neurons]`.

    Args:
        down: `[hidden, neurons]`, the matrix that reads the neurons.
        makers: gate and up as `[neurons, hidden]`; one matrix where there is no gate.
        norms: `[neurons]`: a_j, root of the sum over tokens of the squared activation, per sequence.
        settings: which score.
    """
    fine = settings.fine
    if fine is Fine.MAG_BASE:
        return down.square().sum(0).sqrt()
    if fine is Fine.WANDA_BASE:
        return (down.abs() * norms).mean(0)
    weighted = fine in (Fine.THREE_W_ONE_WA, Fine.ONE_WA)
    sums = relative(down * norms.pow(settings.inner_power) if weighted else down, settings.local).mean(0)
    if fine in (Fine.THREE_W_ONE_WA, Fine.THREE_W_ONE_A):
        for maker in makers:
            sums = sums + relative(maker.t(), settings.local).mean(0)
    return sums * norms.pow(0.5 if fine is Fine.ONE_A else settings.power)


def measure(work: Work, settings: CFSPSettings) -> Section:
    """One walk over the dense blocks: the importance of each and the scores of its neurons."""
    reading, making = readers(work.task.model, work.sites), producers(work.task.model, work.sites)

    def look(visit: BlockVisit) -> Notes:
        notes = Notes()
        own = {name: reader for name, reader in reading.items() if reader.inside(visit.name)}
        if not own:
            return notes
        found = passage(visit, [reader.module for reader in own.values()], work.task.batches, settings.coarse)
        scale = settings.tokens / found.tokens if settings.tokens else 1.0
        for name, reader in own.items():
            down = reader.matrix(visit.tensor(reader.layer))
            norms = found.norm(reader.module)[reader.columns[:, 0]].to(down.device)
            makers = [part.matrix(visit.tensor(part.layer)) for part in making[name]]
            notes.tensors[f"scores/{name}"] = check_scores(fine_scores(down, makers, norms, settings), name).cpu()
            notes.tensors[f"importance/{name}"] = found.distance * scale
        return notes

    return each_block(work.task, "cfsp", look)


def counts(work: Work, importance: Mapping[str, float], settings: CFSPSettings, share: float) -> Counts:
    """Kept neurons of every site when `share` of all goes."""
    fixed = dict(work.widths.fixed)
    sizes = {name: site.units for name, site in work.sites.items() if name not in fixed}
    if not sizes:
        return fixed
    weights = sigmoid({name: importance[name] for name in sizes}, settings.slope)
    densities = proportional(weights, sizes, 1 - share)
    if settings.multiple > 1:
        return fixed | multiples(densities, sizes, settings.multiple)
    least = max(work.widths.minimum, ceil(work.widths.smallest_share * max(sizes.values()) - 1e-9))
    total = Budget(share).keep(sum(sizes.values()))
    if work.cost is not None:  # shares up to 1 are tried on the way to the budget
        total = max(total, sum(min(least, size) for size in sizes.values()))
    return fixed | whole(densities, sizes, total, least)


def check_multiple(work: Work, multiple: int) -> None:
    """Refuse a multiple that is wider than what a block may keep on average.

    Raises:
        BudgetError: names the widest multiple that would do.
    """
    if work.cost is not None:
        return
    for name, site in work.sites.items():
        kept = site.units * (1 - work.budget.sparsity)
        if multiple > max(1, kept):
            raise BudgetError(
                f"multiple={multiple} is more than the {kept:g} neurons that '{name}' keeps on average; "
                f"give a multiple of up to {int(kept)}"
            )


def plan(task: Task, settings: CFSPSettings) -> Decision:
    """Measure, spread the budget over the blocks, keep the highest scores in each."""
    refuse_settings(settings, "scope", "normalise", "layout", "steps")
    work = begin(task, settings)
    section = measure(work, settings)
    scores = dict(section.tensors("scores"))
    work = work.scored(scores)
    importance = {name: float(section.tensors("importance")[name]) for name in work.sites}
    check_multiple(work, settings.multiple)
    kept = work.meet(lambda share: counts(work, importance, settings, share))
    decision = work.conclude({name: keep_top(scores[name], kept[name]) for name in work.sites}, scores)
    report(decision, work, kept, importance, settings)
    return decision


def report(
    decision: Decision, work: Work, kept: Counts, importance: Mapping[str, float], settings: CFSPSettings
) -> None:
    """Importance, density and proposed adapter rank of every site; how far rounding missed the budget."""
    proposed = ranks(importance, settings.rank)
    for name, site in work.sites.items():
        decision.facts.setdefault(name, {}).update(
            importance=round(importance[name], 6),
            density=round(kept[name] / site.units, 6),
            lora_rank=float(proposed[name]),
        )
    everything = sum(site.units for site in work.sites.values())
    found = 1 - sum(kept[name] for name in work.sites) / everything
    if settings.multiple > 1 and work.cost is None and abs(found - work.budget.sparsity) * everything >= 1:
        decision.warnings.append(
            f"multiples of {settings.multiple} remove {found:.2%} of the neurons where {work.budget.sparsity:.2%} was "
            "asked for"
        )


method = Method(
    name="cfsp",
    paper="41",
    title="CFSP: an efficient structured pruning framework for LLMs with coarse-to-fine activation information",
    citation="Wang, Ma, Wang, Chen, Fan, Shan, Yang, Xu, Liu, Qin 2024, COLING 2025, arXiv 2409.13199",
    formula="keep_i ~ sigmoid(angular distance of block i); inside it S_j = mean_o(D_oj + U_oj + G_oj) * ||z_j||",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.ACTIVATION, t.Criterion.MAGNITUDE, t.Criterion.SIMILARITY}),
        granularity=frozenset({t.Granularity.NEURON}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        fusion=frozenset({t.Fusion.LORA}),
        physical=True,
        post_training=True,
    ),
    settings=CFSPSettings,
    run=plan,
    streams=True,
    units=UnitKind.NEURON,
    exact=Group.TOTAL,
    needs_data=True,
    structured=True,
)
