"""What all methods on structured units share: find the sites, score, choose under the budget, repeat."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.allocate.structured import (
    Cost,
    Counts,
    Normalise,
    Ranking,
    Scope,
    Widths,
    choose_units,
    meet_cost,
    normalised,
    overshot,
    reachable,
    target_of,
)
from secateur.core.budget import COSTS, Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, NumericsError, SettingsError, UnknownNameError
from secateur.core.method import Batch, Decision, Settings, Task
from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.data.example import example_for
from secateur.measure.latency import latency
from secateur.measure.table import LatencyTable
from secateur.shrink.bypass import MergedBypass
from secateur.shrink.cut import STRUCTURED, cut_out
from secateur.structure.analysis import Structure, analyse
from secateur.structure.kinds import OUT_DIM
from secateur.structure.layers import layout_of

HEADER_ENTRY = 64  # bytes for dtype, shape and offsets of one tensor in a safetensors file, about
AIMS, LATENCY_TOLERANCE = 5, 0.05
DEFAULT_KINDS = (UnitKind.CHANNEL, UnitKind.NEURON, UnitKind.HEAD, UnitKind.KV_GROUP)


class Shape(StrEnum):
    """Whether sites of the same form must keep the same number of units."""

    FREE = "free"
    UNIFORM = "uniform"  # what a transformers config can say: loads with plain from_pretrained


class StructuredSettings(Settings):
    """Settings of every method that removes channels, neurons, heads or widths."""

    kinds: str = Field(
        "auto",
        description="kinds of unit, comma-separated: channel, neuron, head, kv_group, head_dim, embedding, expert; "
        "auto: channels, neurons and heads (whole key/value groups where queries share them)",
    )
    scope: Scope = Field(Scope.LOCAL, description="which units compete: within a site, all, or those of equal sites")
    normalise: Normalise = Field(Normalise.MEAN, description="scale of a site's scores in a common ranking")
    multiple: int = Field(8, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    layout: Shape = Field(Shape.FREE, description="uniform: equal sites keep equal numbers, as plain configs ask")
    within_groups: bool = Field(
        False, description="also thin out the groups of grouped convolutions and norms, not only remove whole ones"
    )
    largest_cut: float = Field(0.9, gt=0, le=1, description="largest share of a site's units that may go")
    steps: int = Field(1, ge=1, description="prune in this many steps, scoring the smaller model again after each")
    shares: str = Field(
        "", description="own removed share for single sites: 'layer1.*=0.2,layer2.0.conv1=0'; the last match counts"
    )

    def chosen_kinds(self) -> frozenset[UnitKind] | None:
        """The kinds that were named; None for auto.

        Raises:
            UnknownNameError: no such kind.
        """
        if self.kinds == "auto":
            return None
        known = {kind.value: kind for kind in STRUCTURED}
        for word in self.kinds.split(","):
            if word.strip() not in known:
                raise UnknownNameError("kind of unit", word.strip(), known)
        return frozenset(known[word.strip()] for word in self.kinds.split(","))

    def own_shares(self) -> list[tuple[str, float]]:
        """(pattern, removed share) of single sites.

        Raises:
            SettingsError: not of the form pattern=share.
        """
        found = []
        for item in filter(None, (part.strip() for part in self.shares.split(","))):
            pattern, equals, share = item.partition("=")
            try:
                found.append((pattern, float(share)))
            except ValueError:
                equals = ""
            if not equals or not 0 <= found[-1][1] < 1:
                raise SettingsError(f"shares: '{item}' is not of the form pattern=share with a share in [0, 1)")
        return found


@dataclass(frozen=True)
class View:
    """What a criterion sees: a model, smaller than the user's after the first step, and its sites."""

    model: nn.Module
    structure: Structure
    sites: Mapping[str, Site]
    task: Task


Criterion = Callable[[View], dict[str, Tensor]]
Filter = Callable[[Site], bool]


class Members(StrEnum):
    """Whose weights count for a unit."""

    ALL = "all"
    PRODUCERS = "producers"  # of the layers that make it


def weight_places(view: View, members: Members = Members.ALL, biases: bool = False) -> set[tuple[str, int]]:
    """The (parameter, dimension) pairs of linear and convolution layers in which a view's units stand."""
    layouts = {name: layout_of(module) for name, module in view.model.named_modules()}
    found = set()
    for site in view.sites.values():
        for place in site.occurrences:
            layout, bias = layouts.get(place.parameter.rpartition(".")[0]), place.parameter.endswith("bias")
            made = bias or members is Members.ALL or (layout is not None and place.dim == OUT_DIM[layout])
            if layout is not None and made and (biases or not bias):
                found.add((place.parameter, place.dim))
    return found


def norm_places(view: View) -> set[tuple[str, int]]:
    """The (parameter, dimension) pairs of the scales of batch norms in which a view's units stand."""
    modules = dict(view.model.named_modules())
    found = set()
    for site in view.sites.values():
        for place in site.occurrences:
            owner, _, leaf = place.parameter.rpartition(".")
            if leaf == "weight" and "BatchNorm" in type(modules.get(owner)).__name__:
                found.add((place.parameter, place.dim))
    return found


def wanted_sites(
    structure: Structure, task: Task, settings: StructuredSettings, only: Filter | None
) -> dict[str, Site]:
    """The sites that may be cut: of the asked kinds, with no excluded layer among their occurrences.

    Raises:
        ModelError: none is left; says what there is.
    """
    kinds = settings.chosen_kinds()
    found = {}
    for name, site in structure.sites.items():
        own_kind = site.kind in (kinds or DEFAULT_KINDS)
        grouped = (
            kinds is None and site.kind is UnitKind.HEAD and f"{name.rpartition(':')[0]}:kv_group" in structure.sites
        )
        grouped |= not settings.within_groups and name in structure.within
        if own_kind and not grouped and _allowed(site, task) and (only is None or only(site)):
            found[name] = site
    if not found:
        there = ", ".join(sorted({site.kind.value for site in structure.sites.values()})) or "none"
        merged = any(isinstance(module, MergedBypass) for module in task.model.modules())
        raise ModelError(
            f"nothing is left to cut in {type(task.model).__name__}: kinds of unit found: {there}; "
            + ("by-passes that are merged into filters (merge=true) fix their channels; " if merged else "")
            + "see `secateur inspect` for what is frozen and why"
        )
    return found


def _allowed(site: Site, task: Task) -> bool:
    names = [site.name.partition(":")[0], *(place.parameter for place in site.occurrences)]
    included = replace(task, exclude=())
    excluded = replace(task, include=("*",))
    return any(map(included.wants, names)) and all(map(excluded.wants, names))


def refuse_settings(settings: StructuredSettings, *names: str) -> None:
    """For methods with an allocation of their own: settings that would have no effect must be as they are.

    Raises:
        SettingsError: one has another value than its default; names it.
    """
    for name in names:
        default = type(settings).model_fields[name].default
        if getattr(settings, name) != default:
            raise SettingsError(
                f"the setting '{name}' has no effect on this method's allocation; leave it at {default}"
            )


def begin(task: Task, settings: StructuredSettings, only: Filter | None = None) -> Work:
    """Find the model's sites that may be cut.

    Args:
        task: the model and patterns.
        settings: kinds, widths.
        only: a method's own filter over sites.

    Raises:
        ModelError: nothing can be cut, or the weights are not there.
    """
    if task.residency is None and any(parameter.is_meta for parameter in task.model.parameters()):
        raise ModelError("the model's weights are on the meta device, and scores need their values; load the weights")
    example = example_for(task.model, task.example)
    structure = analyse(task.model, example)
    return Work(replace(task, example=example), settings, structure, wanted_sites(structure, task, settings, only))


def decide(task: Task, settings: StructuredSettings, criterion: Criterion, only: Filter | None = None) -> Decision:
    """Analyse, score and choose; in several steps the smaller model is scored again.

    Args:
        task: the model, budget and patterns.
        settings: scope, widths, steps.
        criterion: one score per unit of every site of a view; higher = keep.
        only: a method's own filter over sites.

    Raises:
        BudgetError: the budget is out of reach; gives the reachable range.
        ModelError: nothing can be cut, or the weights are not there.
        NumericsError: NaN scores; names the site.
    """
    return begin(task, settings, only).decided(criterion)


def _facts(structure: Structure, sites: Mapping[str, Site], masks: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """What the cut brings, at the first site: shares of the dense model's parameters and FLOPs that stay."""
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    dense_flops = structure.flops({})
    shares = {
        "parameters_kept": structure.parameters(counts) / max(1, structure.parameters({})),
        "flops_kept": structure.flops(counts) / dense_flops if dense_flops else 1.0,
    }
    return {next(iter(sites)): {name: round(value, 6) for name, value in shares.items()}}


def _of(counts: Mapping[str, int], sites: Mapping[str, Site]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name in sites}


@dataclass(frozen=True)
class Work:
    """One decision in the making.

    Attributes:
        task: with an example in any case.
        settings: kinds, widths, scope.
        structure: of the dense model.
        sites: what may be cut.
    """

    task: Task
    settings: StructuredSettings
    structure: Structure
    sites: Mapping[str, Site]

    @property
    def example(self) -> Batch:
        """Inputs that the model can be run on."""
        assert self.task.example is not None  # `begin` sees to it
        return self.task.example

    @property
    def budget(self) -> Budget:
        """The budget for the kind of units at hand."""
        budget = self.task.budget
        return budget if budget.quantity in COSTS else budget.of(next(iter(self.sites.values())).kind)

    @cached_property
    def cost(self) -> Cost | None:
        """What the budget counts, as a function of kept units."""
        match self.budget.quantity:
            case Quantity.PARAMETERS:
                return self.structure.parameters
            case Quantity.FLOPS:
                samples = self.example.samples
                return lambda counts: self.structure.flops(counts) / samples  # budgets are of one
            case Quantity.BYTES:
                return self._file_cost()
            case Quantity.MILLISECONDS:
                progress = self.task.progress
                return LatencyTable.build(self.task.model, self.structure, self.example, progress=progress).milliseconds
            case Quantity.UNITS:
                raise BudgetError(
                    "structured methods take a sparsity, or a budget in parameters, flops, bytes or milliseconds"
                )
            case _:
                return None

    @cached_property
    def dense(self) -> float:
        """The cost of the whole model; asked for only where the budget counts one."""
        assert self.cost is not None
        return self.cost({name: site.units for name, site in self.sites.items()})

    def _file_cost(self) -> Cost:
        """Bytes of the safetensors file: everything in the state dict once, and the header."""
        known = self.structure.observation.tensors
        stored = self.task.model.state_dict()
        sizes = {name: tensor.element_size() for name, tensor in stored.items() if name in known}
        header = 8 + sum(len(name) + HEADER_ENTRY for name in sizes)
        return lambda counts: float(header + self.structure.bytes(counts, sizes))

    @cached_property
    def widths(self) -> Widths:
        """What the settings say about kept widths."""
        settings, structure = self.settings, self.structure
        fixed: dict[str, int] = {}
        for pattern, share in settings.own_shares():
            named = [
                name for name in self.sites if any(fnmatchcase(n, pattern) for n in (name, name.partition(":")[0]))
            ]
            if not named:
                raise SettingsError(
                    f"shares: no site matches '{pattern}'; sites are named like '{next(iter(self.sites))}'"
                )
            fixed |= {name: max(1, Budget(share).keep(self.sites[name].units)) for name in named}
        return Widths(
            scope=settings.scope,
            multiple=settings.multiple,
            minimum=max(1, self.budget.floor),
            smallest_share=1 - settings.largest_cut,
            uniform=settings.layout is Shape.UNIFORM,
            hard={name: multiple for name, multiple in structure.multiples.items() if name in self.sites},
            least={name: least for name, least in structure.minimums.items() if name in self.sites},
            fixed=fixed,
        )

    def decided(self, criterion: Criterion, *, near: bool = True) -> Decision:
        """Score and choose, on the weights as they are now; see `decide`.

        Args:
            criterion: one score per unit of every site.
            near: whether a cost that is not met within 1 % is refused; a warning otherwise.
        """
        if self.task.residency is not None and (
            self.settings.steps > 1 or self.budget.quantity is Quantity.MILLISECONDS
        ):
            raise SettingsError(
                "several steps and budgets in milliseconds need the whole model in memory; use steps=1 and another "
                "budget"
            )
        masks, scores, held = self.whole(), dict[str, Tensor](), list[str]()
        for step in range(1, self.settings.steps + 1):
            scores = self.scores(criterion, masks)
            if step == 1:
                held = self._reaches(scores)
            part, timed = step / self.settings.steps, self.budget.quantity is Quantity.MILLISECONDS
            chosen = self.choose(scores, self.partial(part), masks, near=near and part == 1 and not timed)
            if part == 1 or not self._beyond(chosen):
                masks = chosen
        if self.budget.quantity is Quantity.MILLISECONDS:
            masks = self.as_measured(scores, masks)
        decision = self.conclude(masks, scores)
        decision.warnings += held
        return decision

    def _beyond(self, masks: Mapping[str, Tensor]) -> bool:
        """Whether wide steps of widths have gone past the whole way, so that a later step would bring units back."""
        if self.cost is None:
            return False
        return self.cost({name: int(mask.sum()) for name, mask in masks.items()}) < target_of(self.budget, self.dense)

    def whole(self) -> dict[str, Tensor]:
        """Masks that keep everything."""
        return {name: torch.ones(site.units, dtype=torch.bool) for name, site in self.sites.items()}

    def refuse_unreachable(self, scored: Collection[str]) -> list[str]:
        """Say before a long training that the cut at its end could not meet the budget.

        Budgets in milliseconds are met by measuring, so only then.

        Args:
            scored: sites that will have scores; the others stay whole.

        Returns:
            Warnings: a sparsity that single sites cannot have.

        Raises:
            BudgetError: out of reach whatever the scores are; gives the reachable range.
        """
        return [] if self.budget.quantity is Quantity.MILLISECONDS else self._reaches(scored)

    def _reaches(self, scored: Collection[str]) -> list[str]:
        """As `refuse_unreachable`, for every quantity."""
        silent = {name: site.units for name, site in self.sites.items() if name not in scored}
        widths = replace(self.widths, fixed={**silent, **self.widths.fixed})
        equal = {name: torch.zeros(site.units) for name, site in self.sites.items()}
        if self.cost is not None:
            reachable(Ranking(self.sites, equal, widths), self.budget, self.cost)
            return []
        held = dict[str, Budget]()
        for asked, own in self._sharing():
            ranking = Ranking(own, equal, replace(widths, fixed=_of(widths.fixed, own)))
            held |= dict.fromkeys(ranking.short(asked), asked)
        return [
            f"{len(held)} of {len(self.sites)} sites cannot lose what {asked} asks, '{name}' first: every site keeps "
            f"{widths.floors}"
            for name, asked in [*held.items()][:1]
        ]

    def _sharing(self) -> Iterator[tuple[Budget, dict[str, Site]]]:
        """The sites with one amount of a sparsity: all of them, or kind by kind where the budget names kinds."""
        kinds = dict.fromkeys(site.kind for site in self.sites.values())
        if not self.task.budget.per_kind:
            yield self.budget, dict(self.sites)
            return
        for kind in kinds:
            own = {name: site for name, site in self.sites.items() if site.kind is kind}
            yield self.task.budget.of(kind), own

    def choose(
        self, scores: Mapping[str, Tensor], budget: Budget, masks: Mapping[str, Tensor], *, near: bool = True
    ) -> dict[str, Tensor]:
        """Keep-masks for a budget. Sites without a score keep what they have in `masks`.

        Raises:
            BudgetError: a cost out of reach, or not met within 1 % where it must be `near`.
        """
        silent = {name: int(masks[name].sum()) for name in self.sites if name not in scores}
        widths = replace(self.widths, fixed={**silent, **self.widths.fixed})
        ranked = {name: scores.get(name, masks[name].float()) for name in self.sites}
        if self.cost is not None or not self.task.budget.per_kind:
            return choose_units(self.sites, ranked, budget, widths, self.cost, near=near)
        share = budget.sparsity / self.budget.sparsity if self.budget.sparsity else 1.0  # of the whole way, in steps
        found: dict[str, Tensor] = {}
        for asked, own in self._sharing():
            wanted = Budget(asked.sparsity * share, floor=budget.floor)
            found |= choose_units(own, ranked, wanted, replace(widths, fixed=_of(widths.fixed, own)))
        return {name: found[name] for name in self.sites}

    def partial(self, part: float) -> Budget:
        """The budget of an earlier step: the same share of what is to go."""
        if part == 1:
            return self.budget
        if self.cost is None:
            return Budget(self.budget.sparsity * part, floor=self.budget.floor)
        return replace(self.budget, amount=1 - (1 - target_of(self.budget, self.dense) / self.dense) * part)

    def meet(self, counts_at: Callable[[float], Counts]) -> Counts:
        """Kept units per site, by a method's own allocation, that meet the budget.

        Args:
            counts_at: share of the units that goes, in [0, 1), -> kept units of every site, never more for a
                larger share.

        Raises:
            BudgetError: the budget is out of reach; gives the reachable range.
        """
        if self.cost is None:
            return counts_at(self.budget.sparsity)
        return meet_cost(counts_at, self.sites, self.budget, self.cost, 1 - 1e-6)

    def scored(self, scores: Mapping[str, Tensor]) -> Work:
        """The same work on the sites that have a score: those inside the blocks that were walked.

        Raises:
            ModelError: none of the sites has one.
        """
        if not scores:
            raise ModelError(
                f"no block of {type(self.task.model).__name__} holds units that this method can score; it needs blocks "
                f"that run one after the other, '{next(iter(self.sites))}' is in none"
            )
        return replace(self, sites={name: site for name, site in self.sites.items() if name in scores})

    def conclude(self, masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Decision:
        """The decision for these masks, checked against what the model's code allows."""
        self.structure.changes({name: int(mask.sum()) for name, mask in masks.items()})
        decision = Decision(sites=dict(self.sites), masks=dict(masks), structure=self.structure)
        decision.scores = dict(scores) if self.task.keep_scores else {}
        decision.warnings = [f"'{module}' ({name}): {why}" for module, name, why in self.structure.unknown]
        decision.warnings += self._missed({name: int(mask.sum()) for name, mask in masks.items()})
        decision.facts = _facts(self.structure, self.sites, masks)
        return decision

    def _missed(self, counts: Counts) -> list[str]:
        """A word where more goes than a budget asks."""
        if self.budget.quantity is Quantity.MILLISECONDS or self.cost is None:
            return []
        return overshot(self.budget, self.cost(counts), self.dense, "the widths that can be chosen lie further apart")

    def scores(self, criterion: Criterion, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores at the sites' full size: what went in an earlier step stays lowest."""
        if all(bool(mask.all()) for mask in masks.values()):
            found = criterion(View(self.task.model, self.structure, self.sites, self.task))
        else:
            found = self._scored_again(criterion, masks)
        if not found:
            raise ModelError(f"the criterion has a score for none of the sites, e.g. '{next(iter(self.sites))}'")
        for name, score in found.items():
            if torch.isnan(score).any():
                raise NumericsError(f"'{name}': its importance scores hold NaN; check the weights and calibration data")
        ordered = {name: found[name].float().cpu() for name in self.sites if name in found}
        return normalised(ordered, self.settings.normalise)

    def _scored_again(self, criterion: Criterion, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._cut(masks):
            smaller = analyse(self.task.model, self.example)
            # a site that is down to one group is gone, or stands for the channels of that group
            there = {n: site for n, site in smaller.sites.items() if n in masks and site.units == int(masks[n].sum())}
            view = {name: there[name] for name in self.sites if name in there}
            found = dict(criterion(View(self.task.model, smaller, view, self.task))) if view else {}
        for name, mask in masks.items():
            if name not in view and int(mask.sum()) == 1 < len(mask):
                found[name] = torch.ones(1)  # its last unit, which is no site any more, but still among the units
        wide = {}
        for name, score in found.items():
            wide[name] = torch.full(masks[name].shape, -torch.inf)
            wide[name][masks[name]] = score.float().cpu()
        return wide

    def _cut(self, masks: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return cut_out(self.task.model, Plan(sites=dict(self.sites), masks=dict(masks)), self.structure)

    def as_measured(self, scores: Mapping[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measure the cut model against the dense one and aim again, until the time asked for is met.

        Raises:
            BudgetError: not met after `AIMS` tries; gives the nearest time.
        """
        dense, best, aim = copy.deepcopy(self.task.model), float("inf"), self.budget
        for _ in range(AIMS):
            with self._cut(masks):
                times = latency({"dense": (dense, self.example), "cut": (self.task.model, self.example)}, seconds=1.0)
            whole, found = times["dense"].p10, times["cut"].p10
            ratio = found / target_of(self.budget, whole)
            best = min(best, ratio, key=lambda one: abs(one - 1))
            if abs(ratio - 1) <= LATENCY_TOLERANCE:
                return masks
            aim = replace(aim, amount=min(1.0, max(0.01, target_of(aim, whole) / whole / ratio)))
            masks = self.choose(scores, aim, masks, near=False)
        raise BudgetError(
            f"{self.budget} was not met within {LATENCY_TOLERANCE:.0%} in {AIMS} measured tries; the nearest was "
            f"{best:.3g} times what was asked for. Time on a quiet machine, "
            + (f"allow other widths ({self.widths.wider}), " if self.widths.wider else "")
            + "or ask for another amount"
        )
