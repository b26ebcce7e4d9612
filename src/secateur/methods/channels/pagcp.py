"""PAGCP: channels of a network that serves several tasks, layer by layer under a budget on every task's loss.

Ye, Zhang, Chen, Fan, Wang 2023, IEEE TPAMI. A unit is a group of layers whose channels are tied; C is its width.

    order      by the FLOPs that 30 % of a unit's channels cost: largest first if lambda <= 1, else smallest first
    lambda     prod over i < units of (1 + r lambda^i) = T
    each unit  on top of all units before it: the floor(q C) smallest filters go, q = 0.05, 0.10, ... 0.95, as long as
                   max over tasks of L_t(q) / B_t <= 1 + d
               what is accepted stays; then B_t <- max(B_t, L_t), d <- lambda d (at first the dense losses and r)
    filter     only the share P of the units that cost least loss per FLOP saved are really pruned
    rounds     (`secateur study`) the whole model is retrained, until FLOPs are down to the budget

The losses are the caller's: `losses` names a function (output, batch) -> {task: mean loss}; targets of several tasks
come as a mapping. A filter's size is its L1 norm; of tied layers, the sum of their mean |w|; of what is left of it.

The budget ends a pass as soon as the units that the filter would leave pruned meet it (`stop_at_budget`); where they
never do the plan says why. Cost per FLOP is, as in the released code, what a unit adds to the total loss so far, and
not to the dense one. That code (YOLOv5 only) does not prune a unit that nothing limits until the end, and then at 0.90:
`reference=True`. The paper's figure chooses the task first: `watch=first`.

Ratios with floor(q C) = 0 are left out and use up no tolerance. In the released code they use up none either, but a
unit that accepts no other ratio is a candidate: it saves nothing and may take one of the filter's places from another.
`reference=True` does not copy that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Self

from pydantic import Field, field_serializer, model_validator

from secateur.allocate.tolerances import tolerance_factor
from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, DataError, SettingsError
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.data.losses import TaskLosses, losses_from, name_of, refuse_heads_without_loss, refuse_unusable
from secateur.search.greedy import Guard, Taken, Visit, Watch, scan_greedily
from secateur.shrink.in_order import InOrder
from secateur.shrink.interleave import Interleaved, Shrunk
from secateur.shrink.structured import StructuredSettings, Work, begin, refuse_settings
from secateur.shrink.trying import Trying
from secateur.train.study import Findings, Masks, Study

CONTRIBUTION = Budget(0.3)  # the share of a unit's channels that says what it costs
NEAR_ZERO = 1e-3
LEAST = 1e-20  # FLOPs, for units that save none


class Norm(StrEnum):
    """How large a filter is."""

    L1 = "l1"
    L2 = "l2"


class PagcpSettings(StructuredSettings):
    """Defaults: the paper's r, T and P for detectors of 60 layers; the released code's are 0.05, 5 and 1."""

    losses: str | Callable[..., Any] = Field(
        "",
        description="module.path:function of (output, batch) that gives every task's mean loss by name, all positive; "
        "default: cross entropy. Measured on the data that you give: hold it out from training, and never give the "
        "test set, on which the result would then look better than it is",
    )
    tolerance: float = Field(0.06, gt=0, description="r, what the first unit may add to any task's loss, as a fraction")
    total_tolerance: float = Field(6.0, gt=1, description="T, product of all units' 1 + tolerance; above 1 + r")
    schedule: bool = Field(True, description="tolerances in geometric sequence; False: r for every unit")
    top: float = Field(0.8, gt=0, le=1, description="P, share of the units that is pruned: least loss per FLOP saved")
    norm: Norm = Field(Norm.L1, description="of a filter's weights: l1 or l2")
    ratio_step: float = Field(0.05, gt=0, lt=1, description="share of a unit's channels between two trials")
    watch: Watch = Field(
        Watch.WORST, description="worst task at every trial, or the worst at the first trial throughout"
    )
    max_batches: int = Field(0, ge=0, description="measure losses on the first so many batches only; 0: on all")
    stop_at_budget: bool = Field(True, description="False: always as far as the tolerances allow, past the budget")
    reference: bool = Field(False, description="as the released code: a unit that nothing limits goes last, at 0.90")
    rounds: int = Field(10, ge=1, description="at most so many rounds of pruning and retraining (study)")
    tolerance_slope: float = Field(0.0, description="added to r with every further round")
    total_slope: float = Field(0.0, description="added to T with every further round")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    largest_cut: float = Field(0.95, gt=0, le=1, description="largest ratio that is tried")

    @field_serializer("losses")
    def _name(self, losses: str | TaskLosses) -> str:
        return name_of(losses)

    @model_validator(mode="after")
    def _some_ratio(self) -> Self:
        if not self.ratios():
            raise SettingsError(
                f"ratio_step={self.ratio_step:g} is above largest_cut={self.largest_cut:g}, so that pagcp has no ratio "
                "to try; take a smaller ratio_step or a larger largest_cut"
            )
        return self

    def ratios(self) -> list[float]:
        """The grid, ascending."""
        count = int(self.largest_cut / self.ratio_step + 1e-9)
        return [min(round(self.ratio_step * step, 12), self.largest_cut) for step in range(1, count + 1)]


@dataclass(frozen=True)
class Accepted:
    """How far a unit may go.

    Attributes:
        place: the unit.
        removed: its filters that go.
        values: the tasks' losses when they went.
        written: whether later units were tried on top of it.
    """

    place: str
    removed: int
    values: Mapping[str, float]
    written: bool


@dataclass(frozen=True)
class Pruned:
    """A unit that is really pruned or could be.

    Attributes:
        place: the unit.
        removed: its filters that go.
        values: the tasks' losses when they went.
        cost: what that added to the total loss, per FLOP saved.
        saved: FLOPs.
    """

    place: str
    removed: int
    values: Mapping[str, float]
    cost: float
    saved: float


class Pass:
    """One round on a trained model.

    Args:
        task: the dense model and held-out data.
        settings: of this round.
        start: what is left of the model by earlier rounds.

    Attributes:
        trying: the model on trial.
        before: every task's loss at the start.
        warnings: sentences for the user.

    Raises:
        DataError: no data, or a loss that is not positive.
        SettingsError: a task without a loss.
        ModelError: no unit that may be cut.
    """

    def __init__(self, task: Task, settings: PagcpSettings, start: Masks | None = None):
        refuse_settings(settings, "scope", "normalise", "layout", "steps", "shares")
        if not task.batches:
            raise DataError("pagcp measures losses and needs data; give data=... (--data)")
        losses, work = losses_from(settings.losses), begin(task, settings)
        cuts = InOrder(work, start, 1 if settings.norm is Norm.L1 else 2)
        self.trying = Trying(work, cuts, task.batches[: settings.max_batches or None], losses)
        self.settings, self.progress, self.warnings = settings, task.progress, list[str]()
        self._values: dict[tuple[str, int], dict[str, float]] = {}
        self.before = self.trying.measured({})
        refuse_unusable(self.before)
        self.warnings += refuse_heads_without_loss(task.model, task.batches[0], losses)

    @cached_property
    def factor(self) -> float:
        """Lambda: what every acceptance multiplies the tolerance with."""
        settings = self.settings
        if not settings.schedule:
            return 1.0
        return tolerance_factor(settings.tolerance, len(self.trying.cuts.sites), settings.total_tolerance)

    def order(self) -> list[str]:
        """The units as they are visited: by the FLOPs that go with 30 % of their filters."""
        widths, whole = self.trying.cuts.counts({}), self.trying.flops({})
        gone = {name: widths[name] - CONTRIBUTION.keep(widths[name]) for name in self.trying.cuts.sites}
        costs = {name: whole - self.trying.flops({name: count}) for name, count in gone.items()}
        return sorted(costs, key=lambda name: costs[name], reverse=self.factor <= 1)

    def pruned(self) -> list[Pruned]:
        """Scan and filter; the units that are pruned, in the order of the scan.

        Raises:
            BudgetError: the filter leaves no unit, or the tolerances let nothing go.
            DataError: a loss is not positive.
        """
        if not self.places:
            raise BudgetError(
                f"pagcp can remove nothing: top={self.settings.top:g} of {len(self.trying.cuts.sites)} units is less "
                "than one; raise it"
            )
        found = self.cheapest(self.candidates)
        if self.visits and not found:
            self._say_nothing_goes()
        self._caveats()
        return found

    @cached_property
    def places(self) -> int:
        """How many units the filter lets through: floor(P n), n all units there are."""
        return Budget(self.settings.top, Quantity.DENSITY).keep(len(self.trying.cuts.sites))

    @cached_property
    def visits(self) -> list[Visit]:
        """The greedy scan."""
        settings = self.settings
        return scan_greedily(
            {name: self.trying.levels(name, settings.ratios()) for name in self.order()},
            self._measured,
            Guard(dict(self.before), settings.tolerance, self.factor),
            watch=settings.watch,
            enough=self._enough if settings.stop_at_budget else never,
            unlimited=not settings.reference,
            progress=self.progress,
        )

    def _measured(self, removed: Taken) -> dict[str, float]:
        """Every task's loss, kept under the unit on trial: the scan comes to it only once."""
        values = self._values[next(reversed(removed.items()))] = self.trying.measured(removed)
        return values

    def _enough(self, removed: Taken) -> bool:
        """Whether the budget is met by those of the units that the filter would let through."""
        if not self.trying.met(removed):
            return False
        accepted = [Accepted(*step, self._values[step], written=True) for step in removed.items()]
        return self.trying.met(as_removed(self.cheapest(self._priced(accepted))))

    @cached_property
    def candidates(self) -> list[Pruned]:
        """The units that may go, with what each costs on top of those before it."""
        return self._priced([one for visit in self.visits if (one := self._accepted(visit))])

    def _priced(self, accepted: Sequence[Accepted]) -> list[Pruned]:
        found, total, removed = list[Pruned](), sum(self.before.values()), Taken()
        for one in accepted:
            left = self.trying.flops(removed)
            removed[one.place] = one.removed
            saved, now = left - self.trying.flops(removed), sum(one.values.values())
            found.append(Pruned(one.place, one.removed, one.values, (now - total) / (saved + LEAST), saved))
            total = max(total, now) if one.written else total
        return found

    def _accepted(self, visit: Visit) -> Accepted | None:
        """How far a unit may go; None where it stays whole."""
        count = visit.accepted
        if count and not visit.written:
            count = len(self.trying.levels(visit.place, self.settings.ratios()[:-1]))
        if not count:
            return None
        return Accepted(visit.place, visit.levels[count - 1], visit.values[count - 1], visit.written)

    def cheapest(self, candidates: Sequence[Pruned]) -> list[Pruned]:
        """The layer filter: the candidates of least cost, as many as there are places."""
        chosen = sorted(range(len(candidates)), key=lambda index: candidates[index].cost)[: self.places]
        return [candidates[index] for index in sorted(chosen)]

    def _say_nothing_goes(self) -> None:
        reason = _smallest_rise(self.visits)
        if all(bool(mask.all()) for mask in self.trying.cuts.start.values()):
            raise BudgetError(f"pagcp can remove nothing: {reason}")
        self.warnings.append(f"the rounds end here, nothing more can be removed: {reason}")

    def shortfall(self, found: Sequence[Pruned]) -> str:
        """Why the units that are pruned do not meet the budget, and what to change."""
        if self.trying.met(as_removed(self.candidates)):
            dropped = len(self.candidates) - len(found)
            return (
                f"top={self.settings.top:g} keeps whole {dropped} of the {len(self.candidates)} units that the "
                "tolerances let go, and all of them together would meet it; raise top"
            )
        more = ", total_tolerance or top" if self.settings.top < 1 else " or total_tolerance"
        return f"the tolerances allow no more; raise tolerance{more}"

    def _caveats(self) -> None:
        if self.factor > 1:
            self.warnings.append(
                f"lambda is {self.factor:.4g}, above 1 (few units share T={self.settings.total_tolerance:g}): the "
                "tolerance grows from unit to unit, and the units of fewest FLOPs are pruned first"
            )
        for name, value in self.before.items():
            if value < NEAR_ZERO:
                self.warnings.append(
                    f"loss '{name}' is {value:.3g} before pruning; so near zero it multiplies easily, measure it on "
                    "data that were held out from training"
                )

    def facts(self, found: Sequence[Pruned]) -> dict[str, dict[str, float]]:
        """Unit that is pruned -> what its visit came to: losses as factors of those before it."""
        dense, visits = self.trying.flops({}), {visit.place: visit for visit in self.visits}
        return {
            one.place: {
                "visited": float(number),
                "tolerance": visits[one.place].tolerance,
                "flops_saved": one.saved / dense,
                **{f"rise_{name}": value / visits[one.place].reference[name] for name, value in one.values.items()},
                **{f"limit_{name}": 1.0 for name in (visits[one.place].limiting,) if name is not None},
            }
            for number, one in enumerate(found, 1)
        }

    def forbidden(self) -> dict[str, str]:
        """Unit that stays whole because its smallest cut is too much -> the task that it is too much for."""
        return {one.place: one.limiting for one in self.visits if one.limiting and not one.accepted}


def _smallest_rise(visits: Sequence[Visit]) -> str:
    """Why nothing could go."""
    rises = [(one.values[0][one.limiting] / one.reference[one.limiting], one) for one in visits if one.limiting]
    if not rises:
        return "the widths are too narrow for the ratios; take a smaller ratio_step or a larger largest_cut"
    least, visit = min(rises, key=lambda pair: pair[0])
    return (
        f"the least that the smallest cut of any unit multiplies a loss by is {least:.4g} ('{visit.limiting}', "
        f"'{visit.place}'), and {1 + visit.tolerance:.4g} is allowed there; raise tolerance and total_tolerance, or "
        "measure on data that were held out from training"
    )


def as_removed(found: Sequence[Pruned]) -> Taken:
    """Site -> filters that go, in the order of the scan."""
    return {one.place: one.removed for one in found}


def never(removed: Taken) -> bool:
    """The scan goes on to its end."""
    return False


def plan(task: Task, settings: PagcpSettings) -> Decision:
    """One round: scan, filter, masks of what is left.

    Raises:
        BudgetError: one round cannot reach the budget, or nothing can go.
    """
    run = Pass(task, settings)
    if settings.stop_at_budget:
        run.trying.refuse_unreachable(settings.ratios())
    found = run.pruned()
    cuts, removed = run.trying.cuts, as_removed(found)
    if not run.trying.met(removed):
        run.warnings.append(
            f"{run.trying.work.budget} was asked for and {run.trying.achieved(removed)} is left: "
            f"{run.shortfall(found)}, or retrain in rounds (secateur study)"
        )
    decision = run.trying.work.conclude(cuts.masks(removed), cuts.ranked(removed) if task.keep_scores else {})
    decision.warnings += run.warnings
    decision.facts[next(iter(decision.sites))]["lambda"] = round(run.factor, 6)
    limits = {name: {f"limit_{loss}": 1.0} for name, loss in run.forbidden().items()}
    for name, figures in {**limits, **run.facts(found)}.items():
        decision.facts.setdefault(name, {}).update({key: round(value, 6) for key, value in figures.items()})
    return decision


def rounds(study: Study, settings: PagcpSettings) -> Findings:
    """Prune and retrain in turns until the budget is met; a row per round with every unit's share.

    `make` gives the trained model, or extras={"state": its weights}; extras["calibration"] or extras["data"] are the
    held-out data that losses are measured on; without them the training data of `fit` stand in, and the findings warn.
    What one round cannot reach the next ones may, so that they begin in any case. Findings hold the trained weights at
    the dense shape and a plan.

    Raises:
        SettingsError: no data.
        BudgetError: nothing can go in the first round.
    """
    held_out = study.extras.get("calibration", study.extras.get("data"))
    data = getattr(study.fit, "data", None) if held_out is None else held_out
    asked = replace(study, extras={**study.extras, "calibration": data})
    turns = Interleaved(asked, settings.rounds, None, "pagcp", settings.model_dump(mode="json"))
    if held_out is None:
        turns.warnings.append(
            "losses are measured on the training data of fit, on which pruning looks better than it is; give held-out "
            "data as extras={'calibration': ...}"
        )

    def shrink(task: Task, masks: Masks, number: int) -> tuple[Work, Shrunk]:
        more = {
            "tolerance": settings.tolerance + (number - 1) * settings.tolerance_slope,
            "total_tolerance": settings.total_tolerance + (number - 1) * settings.total_slope,
        }
        run = Pass(task, settings.model_copy(update=more), masks or None)
        found = run.pruned()
        trying, removed = run.trying, as_removed(found)
        met = trying.met(removed)
        details = {
            "lambda": run.factor,
            "losses": run.before,
            "flops_kept": trying.flops(removed) / trying.work.structure.flops({}),
            "met": met,
            "units": run.facts(found),
            "forbidden": run.forbidden(),
        }
        counts = trying.cuts.counts(removed)
        shrunk = Shrunk(trying.cuts.masks(removed), {}, counts, len(found), run.warnings, details, met or not found)
        return trying.work, shrunk

    found = turns.run(shrink)
    last = found.rows[-1]
    if not last["met"]:
        found.warnings.append(
            f"{study.budget} was asked for and {last['flops_kept']:.4g} of the FLOPs are left after {len(found.rows)} "
            "rounds; allow more rounds or raise tolerance and total_tolerance"
        )
    found.summary |= {"asked": str(study.budget), "flops_kept": last["flops_kept"], "met": last["met"]}
    return found


method = Method(
    name="pagcp",
    paper="10",
    title="Performance-aware approximation of global channel pruning for multitask CNNs",
    citation="Ye, Zhang, Chen, Fan, Wang 2023, IEEE TPAMI",
    formula="unit after unit loses its smallest filters while max over tasks L_t / B_t <= 1 + d, d <- lambda d",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LP_NORM, t.Criterion.LOSS_CHANGE}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.FILTER}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
        physical=True,
    ),
    settings=PagcpSettings,
    run=plan,
    procedure=rounds,
    units=UnitKind.CHANNEL,
    exact=Group.AIM,
    needs_data=True,
    needs_labels=True,
    structured=True,
)
