"""Layer lottery: all tickets win at initialisation (Jordao et al. 2023, ICCV workshop, arXiv 2301.10835).

A residual block computes y = f(x) + x; without f it is y = x, so the block can go, and its time with it. Before any
training every block is scored by one batch, as the sum over its weights of

    snip    |w dL/dw|
    grasp   w (H g), signed: what the gradient's norm would lose with w

and the p lowest of one ranking over all stages go. The rest keeps its own initial weights and is trained by the
recipe of the dense network: `sc.plan` is the cut, `sc.study` the experiment. `version=trained` is the classic
lottery: train the dense network, score (also by outputs: `hrank`, `expect_abs`, `kl`, `pls`), put the rest back to its
weights of step i, train from i to the end at the rates of those steps; `rewind_to=lr` puts back the rates alone.

No code was released. Reconstructed: the sum over a block's weights (with `aggregate=mean` SNIP empties the last stage),
the batch of SNIP, blocks' outputs as their features. GraSP scores under a newly drawn output layer, as its own code
does, but not where that layer's weight is tied to another one; both halves of its batch hold all classes, which in its
own code follow one another. The weights of step i are those of a second dense run of i steps, so `fit` must be
deterministic. The paper's saved memory is left out: what a process holds says little about one network.

Spared are blocks that change the shape and, if `strict`, those that run directly before and after a change of
resolution. A list never becomes empty: its best block stays. After the sum, post-activation blocks have a ReLU that
goes too, which changes nothing where their input is not negative. Random tickets win in the paper as well: the finding
is that some blocks are not needed, not that a criterion is.

Extras of a study: `train`, samples to score with (default: those of the `Fitting`), `data`, held-out samples for
similarity and robustness (a Dataset, or batches such as pairs of inputs and labels), `example`. Energy and CO2 are
estimates from measured step times.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.allocate.depth import block_site, keep_without
from secateur.allocate.structured import Widths, overshot, target_of
from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, NumericsError, SettingsError
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.plan import Plan
from secateur.core.seeding import seeded
from secateur.core.units import UnitKind
from secateur.data.batches import as_batches
from secateur.data.example import example_for
from secateur.data.running import evaluating, logits, resized
from secateur.measure.flops import flops
from secateur.measure.size import parameters
from secateur.shrink.apply import apply_, stamp
from secateur.shrink.block_criteria import BlockCriterionSettings, Criterion, block_scores, head_warnings, weight_scores
from secateur.shrink.depth import kept_list, remove_blocks_, renumbered
from secateur.shrink.filters import InnerFilters, count_filters
from secateur.shrink.race import Entrant, Race, RaceSettings, copied, judged
from secateur.structure.analysis import analyse
from secateur.structure.removable import Removable, removable
from secateur.train.controls import reinitialised
from secateur.train.snapshot import model_state
from secateur.train.sparsifier import Order
from secateur.train.study import Findings, Masks, RewindTo, State, Study

NEIGHBOURS = "; strict=false adds those next to a change of resolution"
# what a budget may count beside blocks
MEASURED: Mapping[Quantity, Callable[[nn.Module, Any], int]] = {
    Quantity.FLOPS: flops,
    Quantity.PARAMETERS: lambda model, _: parameters(model),
}


class Version(StrEnum):
    """When blocks are scored."""

    INITIAL = "initial"  # before any training, the paper's proposal
    TRAINED = "trained"  # after a dense training; what stays goes back to an earlier step


class Control(StrEnum):
    """What is trained beside a ticket."""

    RANDOM = "random"  # as many random blocks gone
    REINIT = "reinit"  # the ticket from another draw of the initial weights
    FILTERS = "filters"  # all blocks there, but as few filters as the ticket has


class LayerLotterySettings(BlockCriterionSettings, RaceSettings):
    """Defaults: GraSP at initialisation, without the blocks that the paper spares."""

    strict: bool = Field(True, description="spare the blocks directly before and after a change of resolution")
    p: tuple[int, ...] = Field((), description="blocks that go, instead of a sparsity (say 0); a study tries each")
    version: Version = Field(Version.INITIAL, description="study: initial (paper) or trained (classic lottery)")
    rewind: tuple[float, ...] = Field((0.0,), description="trained: shares of the training to go back to, each tried")
    rewind_to: RewindTo = Field(RewindTo.STEP, description="trained: step (weights and rates) or lr (rates alone)")
    controls: tuple[Control, ...] = Field((), description="study: random, reinit, filters, beside each ticket")

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        for name in ("p", "rewind", "controls"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                words = ",".join(map(str, given))
                raise SettingsError(f"{name}={words} names one twice, and it would be the same ticket")
        return self

    @property
    def uses_example(self) -> bool:
        """The structure is found in a run."""
        return True


# --- the cut -----------------------------------------------------------------------------------------


def plan(task: Task, settings: LayerLotterySettings) -> Decision:
    """Score every block that can go, remove the lowest."""
    if len(settings.p) > 1:
        raise SettingsError(f"one plan removes one number of blocks, p={settings.p}; sc.study tries several")
    lists = candidates(task, settings)
    if task.budget.quantity in MEASURED and not settings.p:
        if not room(lists, task.budget.floor):
            raise BudgetError(stuck(lists, task.budget.floor, settings))
        scores = block_scores(task, settings, lists)
        count = fewest(task, settings, lists, scores)
    else:
        (count,) = amounts(task.budget, settings, lists)
        scores = block_scores(task, settings, lists)
    found = without_lowest(lists, scores, count, task.budget.floor)
    kept = kept_shares(task, found.masks)
    found.facts[lists[0].stack.name] |= kept
    found.warnings += [*cautions(task, settings, lists), *beyond(task, settings, lists, kept)]
    return found if task.keep_scores else _without_scores(found)


def candidates(task: Task, settings: LayerLotterySettings) -> list[Removable]:
    """The lists of residual blocks, and which of these can go.

    Raises:
        ModelError: there are none, or the model cannot be run on the example.
    """
    assert task.example is not None  # `uses_example`
    with evaluating(task.model):
        logits(task.model, task.example)
    structure = analyse(task.model, task.example)
    found = removable(task.model, structure, task.example, strict=settings.strict, wants=task.wants)
    if not found:
        raise ModelError(
            f"{type(task.model).__name__} has no residual blocks: layer_lottery takes out blocks that add what they "
            "compute to their input and stand in an nn.Sequential or nn.ModuleList inside the model, as in a ResNet "
            "or a transformer; for plain networks use a method that removes channels"
        )
    return found


def cautions(task: Task, settings: LayerLotterySettings, lists: list[Removable]) -> list[str]:
    """What to know about the scores of these blocks."""
    names = [name for one in lists for name in one.names]
    found = head_warnings(task, settings, names) if names else []
    if settings.criterion is Criterion.L1:
        found.append("l1 tells stages apart and not blocks: all that goes comes from the narrow early stages")
    return found


def beyond(task: Task, settings: LayerLotterySettings, lists: list[Removable], kept: Mapping[str, float]) -> list[str]:
    """Where what was asked for is not what a reader of the plan may expect."""
    if settings.p:
        return []
    quantity, free = task.budget.quantity, sum(len(one.free) for one in lists)
    blocks = sum(len(one.stack.blocks) for one in lists)
    if quantity not in MEASURED:
        return [f"{task.budget} is a share of the {free} of {blocks} blocks that may go"] if free < blocks else []
    assert task.example is not None  # `uses_example`
    dense = MEASURED[quantity](task.model, resized(task.example, 1))
    return overshot(task.budget, kept[f"{quantity}_kept"] * dense, dense, "whole blocks lie further apart")


def amounts(budget: Budget, settings: LayerLotterySettings, lists: list[Removable]) -> tuple[int, ...]:
    """How many blocks go: the budget's number, a share of those that can, or each p.

    Raises:
        BudgetError: out of reach, or two answers.
    """
    budget, free = budget.of(UnitKind.BLOCK), sum(len(one.free) for one in lists)
    if budget.quantity in MEASURED and not settings.p:
        raise BudgetError(f"a study of tickets counts blocks, which {budget} does not; give a sparsity or p")
    asked = 0 if budget.quantity in MEASURED else free - budget.keep(free)
    if settings.p and (asked or budget.quantity in MEASURED):
        raise BudgetError(f"give either p={settings.p} or {budget}; beside p the sparsity is 0")
    most = room(lists, budget.floor)
    idle = not settings.p and budget in (Budget(0.0, floor=budget.floor), Budget(1.0, Quantity.DENSITY, budget.floor))
    least = 0 if idle else 1
    for count in settings.p or (asked,):
        if not least <= count <= most:
            more = NEIGHBOURS if settings.strict else ""
            if not most:
                raise BudgetError(stuck(lists, budget.floor, settings))
            raise BudgetError(
                f"cannot remove {count} of the {free} residual blocks that may go: 1 to {most} are in reach, since one "
                f"of them, and one block of every list, must stay{more}"
            )
    return settings.p or (asked,)


def kept_shares(task: Task, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """What of the dense model's FLOPs and parameters the cut leaves."""
    assert task.example is not None  # `uses_example`
    cut = _without(copy.deepcopy(task.model), masks)
    shares = {name: of(cut, task.example) / of(task.model, task.example) for name, of in MEASURED.items()}
    return {f"{name}_kept": round(share, 6) for name, share in shares.items()}


def room(lists: list[Removable], floor: int) -> int:
    """The most blocks that can go: one of those that may, and one of every list, stays."""
    free = sum(len(one.free) for one in lists)
    spare = (max(0, len(one.stack.blocks) - max(1, floor)) for one in lists)
    return max(0, min(free - 1, sum(min(len(one.free), most) for one, most in zip(lists, spare, strict=True))))


def stuck(lists: list[Removable], floor: int, settings: LayerLotterySettings) -> str:
    """Why no block can go."""
    free = sum(len(one.free) for one in lists)
    if free:
        more = NEIGHBOURS if settings.strict else ""
        return (
            f"no residual block can be removed: {free} may go, but one of these, and {max(1, floor)} of every list, "
            f"must stay{more}"
        )
    more = ", or by strict=true, which spares those next to a change of resolution" if settings.strict else ""
    return f"no residual block can be removed: all are left out by include and exclude{more}"


def fewest(task: Task, settings: LayerLotterySettings, lists: list[Removable], scores: Mapping[str, float]) -> int:
    """How many of the lowest blocks have to go until FLOPs or parameters are down to the budget.

    Raises:
        BudgetError: it is not met without all that may go.
    """
    most = room(lists, task.budget.floor)
    assert task.example is not None  # `uses_example`
    measure, one = MEASURED[task.budget.quantity], resized(task.example, 1)

    def left(count: int) -> int:
        masks = without_lowest(lists, scores, count, task.budget.floor).masks
        return measure(_without(copy.deepcopy(task.model), masks), one)

    dense, least = left(0), left(most)
    target = target_of(task.budget, dense)
    if not least <= target <= dense:
        raise BudgetError(
            f"{task.budget} is out of reach: {most} residual blocks may go together, and without these "
            f"{least / dense:.4g} of the dense {task.budget.quantity} ({least} of {dense}) are left"
            f"{NEIGHBOURS if settings.strict else ''}"
        )
    return bisect_left(range(most + 1), True, key=lambda count: left(count) <= target)


def without_lowest(lists: list[Removable], scores: Mapping[str, float], count: int, floor: int) -> Decision:
    """The `count` lowest of one ranking over all lists go; facts say from where.

    Raises:
        NumericsError: all blocks score the same, which ranks nothing.
    """
    if count and len(set(scores.values())) == 1:
        raise NumericsError(
            f"all {len(scores)} blocks score {next(iter(scores.values())):g}, which ranks nothing; check that they are "
            "used and that data and labels vary"
        )
    found = Decision(sites={one.stack.name: block_site(one.stack) for one in lists})
    for one in lists:
        numbers = [scores[name] if i in one.free else torch.inf for i, name in enumerate(one.stack.names)]
        found.scores[one.stack.name] = torch.tensor(numbers, dtype=torch.float64)
    found.masks = keep_without(found.scores, found.sites, count, Widths(minimum=max(1, floor)))
    for one in lists:
        gone = int((~found.masks[one.stack.name]).sum())
        own = {f"score_{index}": scores[one.stack.block_name(index)] for index in one.free}
        found.facts[one.stack.name] = {"candidates": len(one.free), "victims": gone, **own}
    return found


def _without_scores(found: Decision) -> Decision:
    found.scores = {}
    return found


# --- the experiment ----------------------------------------------------------------------------------


def lottery(study: Study, settings: LayerLotterySettings) -> Findings:
    """Tickets of every p, trained beside the dense network of their seed; one row per network."""
    draws = [_Draw(study, settings, draw) for draw in range(settings.seeds)]
    rows, summary = judged([row for draw in draws for row in draw.rows()], settings, study.metric)
    tickets = [one for one in summary if one["network"] == TICKET]
    good = [one for one in tickets if one["winning"]]
    chosen = max(good, key=lambda one: one["p"]) if good else min(tickets, key=lambda one: one["p"])
    state, cut = draws[0].result(chosen["p"], chosen["start"])
    return Findings(
        rows,
        {"chosen": {name: chosen[name] for name in ("p", "start", "winning")}, "tickets": summary},
        state=state,
        warnings=[*draws[0].cautions(), *_caveats(study, settings)],
        plan=cut,
    )


TICKET = "ticket"


class _Draw:
    """Everything under one seed."""

    def __init__(self, study: Study, settings: LayerLotterySettings, draw: int):
        self.study, self.settings, self.draw, self.race = study, settings, draw, Race(study, settings, draw)
        data, initial = self.race.train_data(), self.race.dense.make()
        self.initial, self.scored = model_state(initial), initial
        example = example_for(initial, study.extras.get("example", data))
        self.task = Task(
            initial,
            study.budget,
            as_batches(data),
            self.race.seed,
            study.include,
            study.exclude,
            progress=study.progress,
            example=example,
        )
        self.lists = candidates(self.task, settings)
        self.amounts = amounts(study.budget, settings, self.lists)
        if self.amounts == (0,):
            raise BudgetError("a study of tickets needs blocks to remove: give a sparsity above 0, or p")
        self.starts = self._starts()
        if settings.version is Version.TRAINED:
            self.scored, _ = self.race.trained(self.race.dense)
            self.task = replace(self.task, model=self.scored)
        self.scores: dict[str, float] = self.race.once("scores", partial(self._scored, block_scores, self.lists))

    @property
    def floor(self) -> int:
        """Blocks that stay in every list."""
        return self.study.budget.floor

    def _starts(self) -> list[int]:
        """Steps that tickets are put back to."""
        own = self.settings
        if own.version is Version.INITIAL:
            if own.rewind != (0.0,) or own.rewind_to is not RewindTo.STEP:
                raise SettingsError("a ticket found at initialisation starts there; rewind is for version=trained")
            return [0]
        if own.rewind_to not in (RewindTo.STEP, RewindTo.LR) or not all(0 <= share < 1 for share in own.rewind):
            raise SettingsError(
                f"rewind={own.rewind} must be shares in [0, 1) of the training and rewind_to step or lr, got "
                f"{own.rewind_to}"
            )
        found = sorted({round(share * self.study.steps) for share in own.rewind})
        if found[-1:] == [self.study.steps]:
            raise SettingsError(
                f"rewind={own.rewind} of steps={self.study.steps} goes back to the last step, so that the ticket would "
                "not be trained; give smaller shares or more steps"
            )
        return found

    def _scored(self, score: Callable[..., Any], *more: Any) -> Any:
        with evaluating(self.task.model), seeded(self.race.seed):
            return score(self.task, self.settings, *more)

    def decision(self, p: int) -> Decision:
        """What stays of every list, and the facts."""
        return without_lowest(self.lists, self.scores, p, self.floor)

    def cautions(self) -> list[str]:
        """What to know about the scores."""
        return cautions(self.task, self.settings, self.lists)

    def rows(self) -> list[dict[str, Any]]:
        """All networks of this seed."""
        return self.race.rows([one for start in self.starts for p in self.amounts for one in self.entrants(p, start)])

    def entrants(self, p: int, start: int) -> Iterator[Entrant]:
        """A ticket and its controls."""
        masks = dict(self.decision(p).masks)
        yield self.entrant(TICKET, p, start, masks)
        for control in self.settings.controls:
            match control:
                case Control.RANDOM:
                    rng = self.task.rng("layer_lottery", "random", str(p))
                    drawn = torch.rand(len(self.scores), generator=rng, dtype=torch.float64).tolist()
                    other = without_lowest(self.lists, dict(zip(self.scores, drawn, strict=True)), p, self.floor)
                    yield self.entrant(control, p, start, dict(other.masks))
                case Control.REINIT:
                    if start == self.starts[0]:  # from new weights there is no step to go back to
                        yield self.entrant(control, p, 0, masks, reinitialised(self.study, self.draw))
                case _:
                    yield self.fewer_filters(p, start, masks)

    def entrant(self, network: str, p: int, start: int, masks: Masks, state: State | None = None) -> Entrant:
        """A network without blocks."""
        stacks = [one.stack for one in self.lists]
        gone = [stack.names[i] for stack in stacks for i, stays in enumerate(masks[stack.name].tolist()) if not stays]
        victims = {name: int((~keep).sum()) for name, keep in masks.items()}

        def make() -> nn.Module:
            return _without(copied(self.race.dense.make(), state or self.before(start)), masks)

        return Entrant(str(network), make, start, {"p": p, "removed": gone, "victims": victims})

    def fewer_filters(self, p: int, start: int, masks: Masks) -> Entrant:
        """All blocks, but only as many filters as the ticket has."""
        model, example = self.scored, self.task.example
        assert example is not None
        blocks = [name for one in self.lists for name in one.stack.names]
        inner = InnerFilters(model, example, analyse(model, example), blocks)
        surplus = count_filters(model) - count_filters(_without(copied(model, model_state(model)), masks))
        scores = self._scored(weight_scores, [name for one in self.lists for name in one.names])
        cut = inner.lowest(scores, surplus, self.settings.aggregate)

        def make() -> nn.Module:
            dense = copied(self.race.dense.make(), self.before(start))
            return apply_(dense, cut, other_weights=True, example=example)

        missing = max(0, surplus - inner.room)
        return Entrant(str(Control.FILTERS), make, start, {"p": p, "filters": surplus - missing, "missing": missing})

    def before(self, start: int) -> State:
        """What a training from a step starts with."""
        if self.settings.version is Version.INITIAL:
            return self.initial
        return model_state(self.scored) if self.settings.rewind_to is RewindTo.LR else self.race.state_at(start)

    def order(self) -> Order:
        """What was asked for, for the provenance."""
        study, given = self.study, self.settings.model_dump(mode="json")
        return Order("layer_lottery", study.budget, study.steps, given, study.seed, study.include, study.exclude)

    def result(self, p: int, start: int) -> tuple[State, Plan]:
        """A trained ticket as weights of the dense network and a plan that cuts it out of them."""
        found = self.decision(p)
        masks = dict(found.masks)
        found.facts[self.lists[0].stack.name] |= kept_shares(self.task, masks)
        provenance = self.order().provenance(type(self.scored).__name__)
        made = Plan(found.sites, masks, provenance=(provenance,), facts=found.facts)
        after = model_state(self.race.trained(self.entrant(TICKET, p, start, masks))[0])
        leaves = {one.stack.name: one.stack.leaves for one in self.lists}
        places = {name: renumbered(name, made, leaves) for name in self.initial}
        state = {name: after[place] if place else self.initial[name] for name, place in places.items()}
        stamp(copied(self.scored, state), made)
        return state, made


def _without(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    for name, keep in masks.items():
        remove_blocks_(model, name, kept_list(keep))
    return model


def _caveats(study: Study, settings: LayerLotterySettings) -> Iterator[str]:
    yield (
        f"kWh and CO2 are estimates: measured time of a step, times the steps, times {settings.watts:g} W and "
        f"{settings.grid:g} kg per kWh"
        + ("; the dense training that finds the tickets is not counted" * (settings.version is Version.TRAINED))
    )
    if settings.seeds < 3:
        yield f"{settings.seeds} of 3 seeds: random tickets often win too, so fewer seeds tell no criterion from chance"
    if "data" not in study.extras:
        yield "similarity and robustness were not measured: give held-out samples as extras={'data': ...}"


method = Method(
    name="layer_lottery",
    paper="24",
    title="When layers play the lottery, all tickets win at initialization",
    citation="Jordao, Correa de Araujo, de Almeida Maia, Pedrini 2023, ICCV workshop, arXiv 2301.10835",
    formula="sum over a block's weights of w * (H g), or |w dL/dw|, before training; the p lowest residual blocks go",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.BEFORE_TRAINING}),
        criterion=frozenset({t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.LAYER, t.Granularity.BLOCK}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.SCRATCH,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM}),
        physical=True,
    ),
    settings=LayerLotterySettings,
    run=plan,
    procedure=lottery,
    units=UnitKind.BLOCK,
    exact=Group.TOTAL,
    needs_labels=True,
)
