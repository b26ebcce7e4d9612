"""COMP (Xu, Xu, Xu, Liao, Yao, Xie 2025): whole blocks first, then neurons by a condition number, then their masks.

There is no public code, and only the order of the steps, a label-free score from a matrix condition number and mask
tuning in place of fine-tuning are confirmed. The formulas here are a reconstruction; the switches name what is open.

1. Coarse: BI_l = 1 - mean cos(h_l, h_l+1); the lowest goes and the rest is measured again on the shortened model
   (`iterative`), until n_L = round(depth_share * p * L) blocks are gone; never the first or the last (`protect`).
2. Fine budget: every block that stays loses the same share c of the parameters of its heads and neurons, so that of
   all parameters of the model the fraction p is gone. Heads are rounded, neurons make up for what that misses.
3. `condition`: mask kappa_j = ||X_j|| ||W_j|| / ||Y||_F, or spectral kappa_2(W) ||X_j|| / ||X||_F, at the layers that
   read the units, on the shortened model; a head's is the root of the sum of squares over its inputs. Lowest of every
   site go, or of all sites of a kind (`scope=global`).
4. Mask tuning, block by block: inputs from the blocks as pruned and tuned, `targets` what the layer gives on the chain
   of the shortened model without further cuts (`dense`) or, with all its columns, on the pruned chain (`pruned`). One
   factor per unit (`recover.tuning`), taken only where it holds on held-out sequences, goes into the weight's columns.

`sparsity` is p, a fraction of all parameters of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from math import isnan

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.coarse_fine import Part, cut_share, even_counts, whole_blocks
from secateur.allocate.structured import Counts, Scope, target_of
from secateur.allocate.weighted import lowest_gone
from secateur.core import tags as t
from secateur.core.budget import Quantity
from secateur.core.distributed import total
from secateur.core.errors import BudgetError, NumericsError, SettingsError
from secateur.core.journal import Notes, Section, overlaid
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.select import all_finite, keep_top
from secateur.core.units import Site, UnitKind
from secateur.data.batches import token_mask
from secateur.recover.tuning import MaskTuning, Tuned
from secateur.scores.blocks import Influence
from secateur.scores.condition import Condition, conditions, of_units
from secateur.shrink.structured import Shape, StructuredSettings, Work, begin, refuse_settings
from secateur.stats.bypass import bypassed
from secateur.stats.influence import passage
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.readers import Reader, readers
from secateur.structure.stacks import Stack, main_stack

HEADS = (UnitKind.HEAD, UnitKind.KV_GROUP)


class Targets(StrEnum):
    """What a layer that lost units is fitted to."""

    DENSE = "dense"
    PRUNED = "pruned"


class COMPSettings(StructuredSettings):
    """COMP's settings; all defaults are reconstructed."""

    depth_share: float = Field(0.5, ge=0, le=1, description="part of what goes that whole blocks make up")
    iterative: bool = Field(True, description="measure the blocks again on the shortened model after each removal")
    protect: bool = Field(True, description="never remove the first and the last block")
    condition: Condition = Field(
        Condition.MASK, description="mask (per unit) or spectral (bound for a perturbed input)"
    )
    tuning: bool = Field(True, description="tune one factor for every unit that stays")
    targets: Targets = Field(
        Targets.DENSE, description="targets from the chain before this step, or from the pruned one"
    )
    damping: float = Field(
        1e-3, ge=0, description="pull of the factors towards 1, as a fraction of the mean of A's diagonal"
    )
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    largest_cut: float = Field(1.0, gt=0, le=1, description="largest share of a site's units that may go")


# --- budget ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What is to go from the whole model.

    Attributes:
        removed: p, fraction of all parameters.
        total: all parameters.
        blocks: parameters of every block of the stack.
    """

    removed: float
    total: int
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, task: Task, stack: Stack) -> Goal:
        """What the budget asks for.

        Raises:
            BudgetError: it is not about parameters.
        """
        budget, everything = task.budget, sum(p.numel() for p in task.model.parameters())
        if budget.per_kind or budget.quantity not in (Quantity.SPARSITY, Quantity.DENSITY, Quantity.PARAMETERS):
            raise BudgetError("comp removes a fraction of all parameters: give a sparsity, a density or parameters")
        if budget.quantity is Quantity.PARAMETERS:
            removed = 1 - target_of(budget, everything) / everything
        else:
            removed = budget.sparsity
        if removed < 0:
            raise BudgetError(f"{budget} is more than the {everything} parameters that the model has")
        sizes = tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks)
        return cls(removed, everything, sizes)

    def after(self, gone: Sequence[int]) -> float:
        """Parameters that are still to go once these blocks are gone."""
        return self.removed * self.total - sum(self.blocks[index] for index in gone)


# --- coarse: whole blocks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shortened:
    """The blocks that go, in the order of their removal, and what every block's influence was before each."""

    gone: tuple[int, ...]
    influence: tuple[Mapping[int, float], ...]

    def facts(self) -> dict[str, float]:
        """For the report: round and block of every influence and removal."""
        found = {f"influence_{step}_{i}": value for step, of in enumerate(self.influence) for i, value in of.items()}
        return found | {f"removed_{order}": float(block) for order, block in enumerate(self.gone)}


def shorten(task: Task, settings: COMPSettings, stack: Stack, count: int) -> Shortened:
    """Choose the blocks to remove.

    Raises:
        BudgetError: fewer blocks may go than should.
    """
    ends = (0, len(stack.blocks) - 1) if settings.protect else ()
    free = [i for i, name in enumerate(stack.names) if i not in ends and task.wants(name)]
    if count > len(free):
        raise BudgetError(
            f"{count} whole blocks should go and {len(free)} may: lower the sparsity or depth_share, exclude fewer "
            "blocks, or allow the first and last one (protect=False)"
        )
    gone: list[int] = []
    rounds: list[Mapping[int, float]] = []
    while len(gone) < count:
        rounds.append(influences(task, stack, gone))
        ranked = sorted((i for i in free if i not in gone), key=rounds[-1].__getitem__)
        gone += ranked[: 1 if settings.iterative else count]
    return Shortened(tuple(gone), tuple(rounds))


def influences(task: Task, stack: Stack, gone: Sequence[int]) -> dict[int, float]:
    """Index -> block influence of every block that is left, on the model without the blocks in `gone`."""

    def look(visit: BlockVisit) -> Notes:
        if visit.stack.name != stack.name or visit.index in gone:
            return Notes()
        found = passage(visit, (), task.batches, Influence.COSINE)
        value = float(found.distance) / max(1, found.tokens)
        if isnan(value):
            raise NumericsError(f"block '{visit.name}' gets or returns NaN or infinity on the calibration data")
        return Notes(facts={visit.name: {"influence": round(value, 9)}})

    with bypassed(stack.blocks[index] for index in gone):
        facts = each_block(everywhere(task), f"comp-blocks-{len(gone)}", look).facts()
    return {i: facts[name]["influence"] for i, name in enumerate(stack.names) if name in facts}


def everywhere(task: Task) -> Task:
    """The task for a walk: patterns choose what is pruned, not what is looked at."""
    return replace(task, include=("*",), exclude=())


# --- fine: heads and neurons -------------------------------------------------------------------------


@dataclass(frozen=True)
class Fine:
    """The fine step on the blocks that stay.

    Attributes:
        work: sites of these blocks.
        settings: condition, scope, targets.
        stack: all blocks.
    """

    work: Work
    settings: COMPSettings
    stack: Stack

    @cached_property
    def reading(self) -> dict[str, Reader]:
        """Site -> the layer that reads its units."""
        return readers(self.work.task.model, self.work.sites)

    def own(self, visit: BlockVisit) -> dict[str, Reader]:
        """The readers inside a block, in the order of its layers."""
        order = list(visit.layers)
        found = {name: reader for name, reader in self.reading.items() if reader.inside(visit.name)}
        return dict(sorted(found.items(), key=lambda item: order.index(item[1].layer)))

    def blocks(self) -> list[dict[str, Part]]:
        """The sites of every block as parts of the budget."""
        found = []
        for block in self.stack.names:
            names = [name for name, reader in self.reading.items() if reader.inside(block)]
            sites = {name: self.work.sites[name] for name in names}
            found.append({n: Part(s.units, s.parameters / s.units, s.kind in HEADS) for n, s in sites.items()})
        return found

    def scores(self) -> Section:
        """A walk over the shortened model: condition numbers of all units."""

        def look(visit: BlockVisit) -> Notes:
            notes, own = Notes(), self.own(visit)
            if not own:
                return notes
            sums = {name: (torch.zeros(()), torch.zeros(())) for name in own}
            for rows in self.rows(visit, own):
                for name, (x, y) in rows.items():
                    squares, energy = sums[name]
                    x_now, y_now = x.double().square().sum(0), y.double().square().sum()
                    sums[name] = (squares.to(x_now) + x_now, energy.to(y_now) + y_now)
            for name, reader in own.items():
                squares, energy = map(total, sums[name])
                weight = reader.matrix(visit.tensor(reader.layer))
                found = of_units(conditions(weight, squares, energy, self.settings.condition), reader.width)
                if not all_finite(found):
                    raise NumericsError(f"what enters '{reader.module}' holds NaN or infinity; check the data")
                notes.tensors[f"scores/{name}"] = found.cpu()
            return notes

        return each_block(everywhere(self.work.task), "comp-scores", look)

    def rows(
        self, visit: BlockVisit, own: Mapping[str, Reader], *, dense: bool = False
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Per batch, site -> what its units send `[T, units * width]` and what the reader makes of it `[T, O]`.

        Padding is left out; weights are the ones that the block has while it is run.
        """
        captured = visit.capture([reader.module for reader in own.values()], dense=dense)
        for seen, batch in zip(captured, self.work.task.batches, strict=True):
            real = token_mask(batch)
            found = {}
            for name, reader in own.items():
                x = seen.inputs[reader.module].flatten(0, -2)
                x = x if real is None else x[real.flatten().to(x.device)]
                x = x[:, reader.columns.flatten().to(x.device)].float()
                found[name] = (x, x @ reader.matrix(visit.tensor(reader.layer)).to(x.device).t())
            yield found

    def counts(self, goal: float) -> Counts:
        """Kept units of every site for so many parameters."""
        blocks = self.blocks()
        kept = even_counts(cut_share(goal, blocks), blocks)
        return {name: self.work.widths.rounded(site, kept[name]) for name, site in self.work.sites.items()}

    def masks(self, scores: Mapping[str, Tensor], kept: Counts) -> dict[str, Tensor]:
        """The highest of every site stay, or of all sites of a kind."""
        if self.settings.scope is Scope.GLOBAL:
            kinds = {site.kind for site in self.work.sites.values()}
            for names in ([n for n, s in self.work.sites.items() if s.kind is kind] for kind in sorted(kinds)):
                gone = sum(self.work.sites[name].units - kept[name] for name in names)
                least = {name: self.work.widths.rounded(self.work.sites[name], 1) for name in names}
                kept = kept | lowest_gone({name: scores[name] for name in names}, gone, least)
        return {name: keep_top(scores[name], kept[name]) for name in self.work.sites}

    def tuned(self, masks: Mapping[str, Tensor]) -> Section:
        """A walk in which every reader loses its columns, and those that stay are fitted to its target."""
        sequences = sum(batch.samples for batch in self.work.task.batches)

        def work(visit: BlockVisit) -> Notes:
            notes = Notes()
            own = {name: reader for name, reader in self.own(visit).items() if not bool(masks[name].all())}
            targets = self.targets(visit, own)
            for name, reader in own.items():
                keep = reader.expanded(masks[name])
                weight = reader.matrix(visit.tensor(reader.layer))
                fit = MaskTuning(weight[:, keep.to(weight.device)], int(masks[name].sum()), sequences)
                for index, rows in enumerate(self.rows(visit, {name: reader})):
                    x, y = rows[name]
                    y = targets[name][index].to(y) if targets else y
                    fit.update(x[:, keep.to(x.device)], y, self.work.task.batches[index].samples)
                found = fit.solve(self.settings.damping)
                self.replace(visit, reader, masks[name], found, notes)
                notes.facts[name] = found.facts()
            for name in targets:
                self.kept_targets.drop_state(name)
            return notes

        twin = self.settings.targets is Targets.DENSE
        return each_block(everywhere(self.work.task), "comp-tuning", work, twin=twin)

    @property
    def kept_targets(self) -> Section:
        """Where targets wait until the pruned chain comes by."""
        return self.work.task.journal.section("comp-targets")

    def targets(self, visit: BlockVisit, own: Mapping[str, Reader]) -> dict[str, Sequence[Tensor]]:
        """Site -> for every batch what its reader gives on the dense chain, taken before anything is replaced."""
        if self.settings.targets is Targets.PRUNED or not own:
            return {}
        found: dict[str, list[Tensor]] = {name: [] for name in own}
        for rows in self.rows(visit, own, dense=True):
            for name, (_, y) in rows.items():
                found[name].append(y)
        return {name: self.kept_targets.keep_state(name, ys) for name, ys in found.items()}

    def replace(self, visit: BlockVisit, reader: Reader, keep: Tensor, found: Tuned, notes: Notes) -> None:
        """Go on with the reader's kept columns times their factors."""
        layer = visit.layers[reader.layer]
        factors = torch.zeros(len(keep), dtype=torch.float64).masked_scatter_(keep, found.factors)
        matrix = layer.matrix.clone()
        columns = reader.columns.flatten().to(matrix.device)
        matrix[:, columns] = (matrix[:, columns].double() * reader.expanded(factors).to(matrix.device)).to(matrix.dtype)
        visit.replace(layer, matrix)
        if found.accepted:
            notes.tensors[f"weight/{layer.name}"] = layer.to_site(matrix)


def plan(task: Task, settings: COMPSettings) -> Decision:
    """Blocks, then units, then factors."""
    refuse_settings(settings, "normalise", "steps", "shares")
    if settings.scope is Scope.GLOBAL and settings.layout is Shape.UNIFORM:
        raise SettingsError(
            "comp: scope=global gives blocks different widths; leave scope at local with layout=uniform"
        )
    stack = main_stack(task.model)
    goal = Goal.of(task, stack)
    count = whole_blocks(goal.removed, settings.depth_share, goal.blocks, goal.total)
    short = shorten(task, settings, stack, count)
    inside = [f"{name}." for index, name in enumerate(stack.names) if index not in short.gone]

    def stays(site: Site) -> bool:
        return any(all(place.parameter.startswith(block) for place in site.occurrences) for block in inside)

    fine = Fine(begin(task, settings, stays), settings, stack)
    kept = fine.counts(goal.after(short.gone))
    with bypassed(stack.blocks[index] for index in short.gone):
        scores = dict(fine.scores().tensors("scores"))
        masks = fine.masks(scores, kept)
        tuned = fine.tuned(masks) if settings.tuning else Section(None)
    decision = fine.work.conclude(masks, {})
    decision.weights = overlaid(tuned.tensors("weight"))
    for name, facts in tuned.facts().items():
        decision.facts.setdefault(name, {}).update(facts)
    for name, mask in masks.items():
        decision.facts.setdefault(name, {})["condition_kept"] = round(float(scores[name][mask].sum()), 6)
    if short.gone:
        add_blocks(decision, fine.work, stack, goal, short)
    return decision


def add_blocks(decision: Decision, work: Work, stack: Stack, goal: Goal, short: Shortened) -> None:
    """Put the blocks that go beside the units, and correct what the units alone would leave."""
    units = work.structure.parameters({name: int(mask.sum()) for name, mask in decision.masks.items()})
    first = decision.facts[next(iter(decision.sites))]
    first["parameters_kept"] = round((units - goal.removed * goal.total + goal.after(short.gone)) / goal.total, 6)
    first.pop("flops_kept")
    keep = torch.tensor([index not in short.gone for index in range(len(stack.blocks))])
    decision.sites[stack.name] = Site(stack.name, UnitKind.BLOCK, (len(keep),), cost=goal.blocks)
    decision.masks[stack.name] = keep
    decision.facts[stack.name] = short.facts()


method = Method(
    name="comp",
    paper="25",
    title="Lightweight and post-training structured pruning for on-device large language models",
    citation="Xu, Xu, Xu, Liao, Yao, Xie 2025, IEEE Transactions on Mobile Computing",
    formula="lowest BI_l go; then lowest ||X_j|| ||W_j|| / ||Y||; then one least-squares factor per kept unit",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.SIMILARITY, t.Criterion.ACTIVATION, t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.BLOCK, t.Granularity.HEAD, t.Granularity.NEURON}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        physical=True,
        post_training=True,
    ),
    settings=COMPSettings,
    run=plan,
    streams=True,
    units=UnitKind.HEAD,
    exact=Group.COST,
    needs_data=True,
    changes_weights=True,
    structured=True,
)
