"""LAPP: layer adaptive progressive pruning of CNNs from scratch (Zhai, Guo, Liu, Xing, Xu 2023).

Every convolution gets one learnable threshold t and a light by-pass; filters whose score is below t are masked, and a
FLOPs constraint and the task loss together move the thresholds:

    y = norm(conv(x)) m + norm'(bypass(x)),  m_i = 1[s_i > t],  s_i = (|W_i| - mean) / std over the layer, detached
    L = L_task + weight max(0, log(F / (p F_0))),  F = FLOPs with by-passes, F_0 = FLOPs of the original network
    t <- t - rate dL/dt (plain SGD);  dm/d(s - t) := 2 - 4|z| up to 0.4, 0.4 up to `reach`, then 0

As soon as F <= p F_0 the masks are frozen and the training goes on; what was masked is cut out in the end. The by-pass
(as many groups as widths allow: depthwise where they are equal) keeps every layer's output at full width, so that a
layer may go down to one filter, and its cost depends on its own filters only. In the end by-passes are kept, or with
`merge` put into the filters that stay: then they run, and count, for masked filters only.

RECONSTRUCTED: there is no official code, and of the paper only the abstract could be had (learnable threshold per
layer, FLOPs constraint, both losses, gradual, in the first epochs, light by-pass per convolution from the start).
Score, estimator, form of the constraint, by-pass, rates and phase are ours, and settings but for the constraint's form.
What is masked is cut out when the training is over, not when masks are frozen: a training with the user's own loop and
optimiser goes on with the tensors it knows, and gets no cheaper before its end.

A budget in FLOPs or parameters counts by-passes in and is a share of the original network; a sparsity counts filters.
It is met from above and frozen at once, so the result lies a little below; `fill` gives back what overshot. A
phase that ends too early raises all thresholds by the amount that meets the budget, and says so.
By-passes train in the optimiser's last group: make learning rate schedulers after attaching. Until `finish` they are
no part of the model: its state dict is as ever, theirs is in `sparsifier.state_dict()`. Copies for averages of weights
(EMA) take by-passes along as they were when copied, so average after `finish`, or not at all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from math import ceil
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.method import Decision, Group, Method, Protocol, matches
from secateur.core.units import UnitKind
from secateur.gates.budget import hinge_loss
from secateur.gates.threshold import LongTail, SigmoidSlope, Slope, frozen, step_gate
from secateur.shrink.branches import (
    Branch,
    BranchSettings,
    branch_state,
    costs_of,
    find_branches,
    largest_within,
    target_in,
)
from secateur.shrink.bypass import Bypass, Undo, hang, make_bypass
from secateur.train.extra import Extra
from secateur.train.part import Part
from secateur.train.sparsifier import Order, Sparsifier

EPS = 1e-8


class Score(StrEnum):
    """What makes a filter important, before it is standardised within its layer."""

    L2 = "l2"
    L1 = "l1"
    SCALE = "scale"


class Surrogate(StrEnum):
    """What stands for the derivative of the mask."""

    LONG_TAIL = "long_tail"
    SIGMOID = "sigmoid"


class LappSettings(BranchSettings):
    """Settings; reconstructed."""

    score: Score = Field(
        Score.L2,
        description="of a filter: norm of its weights (l2, l1), |scale| of its batch norm (alike at the start)",
    )
    surrogate: Surrogate = Field(Surrogate.LONG_TAIL, description="slope of the mask: long_tail or sigmoid")
    reach: float = Field(3.0, gt=0.4, description="how far from the threshold long_tail acts, in standard deviations")
    sharpness: float = Field(1.0, gt=0, description="of sigmoid; a sharp one prunes nothing")
    start: float = Field(-2.0, description="threshold at the start, in standard deviations of a layer's norms")
    rate: float = Field(0.02, gt=0, description="learning rate of the thresholds; 0.08 for a few hundred steps")
    weight: float = Field(3.0, gt=0, description="of the constraint in the loss")
    phase: float = Field(0.15, gt=0, le=1, description="share of the training in which thresholds move")
    late: float = Field(2 / 3, ge=0, le=1, description="share of the phase after which the weight doubles")
    again: float = Field(0.1, gt=0, description="share of the phase after which it doubles again, and so on")
    fill: bool = Field(False, description="give back, by lowering all thresholds, what the last step overshot")
    minimum: int = Field(1, ge=1, description="filters that every layer keeps")
    idle: bool = Field(True, description="keep the by-passes of layers that have lost nothing when masks are frozen")

    def slope(self) -> Slope:
        """The surrogate."""
        return LongTail(self.reach) if self.surrogate is Surrogate.LONG_TAIL else SigmoidSlope(self.sharpness)

    def end(self, steps: int) -> int:
        """The step at which masks are frozen at the latest."""
        return ceil(self.phase * steps)

    def pressure(self, step: int, steps: int) -> float:
        """Weight of the constraint in the step after `step` steps."""
        delay = step / self.end(steps) - self.late
        return self.weight if delay < 0 else self.weight * 2.0 ** (1 + int(delay / self.again + 1e-9))


class Threshold(nn.Module):
    """One layer's learnable threshold; called with the convolution and its norm it gives the mask `[filters]`.

    Attributes:
        value: the threshold, a scalar.
        final: the frozen mask, bool; None while the threshold moves.
    """

    def __init__(self, settings: LappSettings, floor: int, device: torch.device) -> None:
        super().__init__()
        self.settings, self.floor, self.slope = settings, floor, settings.slope()
        self.value = nn.Parameter(torch.tensor(settings.start, device=device))
        self.final: Tensor | None = None

    def scores(self, conv: nn.Module, norm: nn.Module) -> Tensor:
        """Standardised within the layer, without gradient: through it, the constraint would shrink all weights."""
        weight = norm.weight if self.settings.score is Score.SCALE else conv.weight
        assert isinstance(weight, Tensor)
        rows = weight.detach().float().reshape(len(weight), -1)
        norms: Tensor = torch.linalg.vector_norm(rows, 2 if self.settings.score is Score.L2 else 1, dim=1)
        return (norms - norms.mean()) / (norms.std(correction=0) + EPS)

    def forward(self, conv: nn.Module, norm: nn.Module) -> Tensor:
        """The mask of now, whose surrogate gradient goes to the threshold."""
        if self.final is not None:
            return self.final
        return step_gate(self.scores(conv, norm), self.value, self.slope, self.floor)


class Lapp(Part):
    """By-passes and thresholds while the network trains, frozen masks after the phase, narrow layers in the end.

    Attributes:
        branches: layer -> where its by-pass stands.
        bypasses, thresholds: layer -> its modules.
        costs: what the budget counts.
        target: how much of that may stay.
        met: the step after which masks were frozen; None before.
    """

    has_penalty = True
    ready_at_end = True
    hangs = True

    def __init__(self, settings: LappSettings):
        self.settings = settings
        self.met: int | None = None
        self.hung: list[Undo] = []

    def start(self, run: Sparsifier) -> None:
        """Find layers, hang by-passes beside them, give their parameters to the optimiser.

        Raises:
            ModelError: there is no such layer.
            BudgetError: out of reach; says the least that can be reached.
        """
        order, model = run.order, run.model
        batch = order.inputs(model)

        def wanted(name: str) -> bool:
            return matches(name, order.include, order.exclude)

        found, left = find_branches(model, batch, wanted, self.settings)
        for name, why in left.items():
            run.warn(f"'{name}' keeps all of its filters: {why}")
        self.branches = {one.conv: one for one in found}
        self.floor = max(self.settings.minimum, order.budget.floor)
        self.costs = costs_of(model, batch, found, order.budget)
        self.flops = costs_of(model, batch, found, Budget(1.0, Quantity.FLOPS))
        self.target = target_in(self.costs, order.budget, self.floor)
        self.layers = {one.conv: (model.get_submodule(one.conv), model.get_submodule(one.norm)) for one in found}
        self.bypasses = {one.conv: self._bypass(run, one) for one in found}
        self.undo = {name: hang(*self.layers[name], bypass) for name, bypass in self.bypasses.items()}
        self.hung = [undo for undos in self.undo.values() for undo in undos]
        self.counts = {name: branch.filters for name, branch in self.branches.items()}
        every = [p for bypass in self.bypasses.values() for p in bypass.parameters()]
        self.extra = Extra(run.optimizer, every, model, decay=True)
        self.hung.append(self.extra.leave)

    def _bypass(self, run: Sparsifier, one: Branch) -> Bypass:
        conv, _, bypass = make_bypass(run.model, one.addition())
        value = torch.empty(bypass.conv.weight.shape)
        nn.init.kaiming_uniform_(value, 5**0.5, generator=run.rng("bypass", one.conv))  # as torch's convolutions
        bypass.conv.weight.data.copy_(value)
        bypass.mask = Threshold(self.settings, min(self.floor, one.filters), conv.weight.device)
        return bypass

    @property
    def thresholds(self) -> dict[str, Threshold]:
        """Layer -> its threshold."""
        return {name: bypass.mask for name, bypass in self.bypasses.items() if isinstance(bypass.mask, Threshold)}

    # --- while thresholds move ------------------------------------------------------------------

    def gates(self) -> dict[str, Tensor]:
        """Layer -> its mask of now, 0 and 1, differentiable."""
        return {name: one(*self.layers[name]) for name, one in self.thresholds.items()}

    def penalty(self, run: Sparsifier) -> Tensor | None:
        """The constraint: one-sided, and none once masks are frozen."""
        if self.met is not None:
            return None
        share = self.target / self.costs.original
        pressure = self.settings.pressure(run.step, run.steps)
        return pressure * hinge_loss(self.costs.share(self.gates()), share)

    def before_step(self, run: Sparsifier) -> None:
        """A plain gradient step of the thresholds; without gradients the optimiser leaves them alone."""
        self.extra.average()
        for one in self.thresholds.values():
            if one.value.grad is not None and self.met is None:
                one.value.data.sub_(one.value.grad, alpha=self.settings.rate)
            one.value.grad = None

    def after_step(self, run: Sparsifier) -> None:
        """Count what is left; freeze it once the target is met, or when the phase is over.

        Thresholds have had their step and the weights theirs, so these are the masks of the next forward pass.
        """
        if self.met is not None:
            return
        with torch.no_grad():
            self._note(run, {name: int(gate.sum()) for name, gate in self.gates().items()})
        reached = self.costs.total(self.counts) <= self.target
        if reached or run.step >= self.settings.end(run.steps):
            self._freeze(run, reached)

    def _note(self, run: Sparsifier, counts: dict[str, int]) -> None:
        changed, self.counts = counts != self.counts, counts
        if changed:
            run.log.append({"step": run.step, "what": "masks", **self._figures()})

    def _figures(self) -> dict[str, float]:
        kept, filters = sum(self.counts.values()), sum(self.costs.filters.values())
        cost, flops = (one.total(self.counts) / one.original for one in (self.costs, self.flops))
        return {"density": kept / filters, "cost": cost, "flops": flops}

    @torch.no_grad()
    def _freeze(self, run: Sparsifier, reached: bool) -> None:
        scores = {name: one.scores(*self.layers[name]) for name, one in self.thresholds.items()}
        values = {name: one.value.detach() for name, one in self.thresholds.items()}
        masks = {name: frozen(scores[name], values[name], self.thresholds[name].floor).mask for name in scores}
        if not reached or self.settings.fill:
            margins = {name: scores[name] - values[name] for name in scores}
            masks, kept = largest_within(margins, self.costs, self.target, self.floor)
            if not reached:
                shift = torch.cat(list(margins.values())).sort(descending=True).values[kept]
                run.warn(
                    f"after {run.step} steps {self._figures()['cost']:.4g} of the {run.order.budget.quantity} were "
                    f"left, more than asked for, so all thresholds were raised by {float(shift):.3g} at once; raise "
                    "`rate` or `phase` to get there gradually"
                )
        self._hold(masks)
        self._note(run, {name: int(mask.sum()) for name, mask in masks.items()})
        self.met = run.step
        run.log.append({"step": run.step, "what": "freeze", **self._figures(), "bypasses": self._beside()})

    def _beside(self) -> float:
        return sum(self.flops.beside(name, count) for name, count in self.counts.items()) / self.flops.original

    def _hold(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            self.thresholds[name].final = mask.to(self.thresholds[name].value.device)
            if bool(mask.all()) and not self.settings.idle:
                self._drop(name)

    def _drop(self, name: str) -> None:
        for undo in self.undo.pop(name):
            undo()
        self.costs, self.flops = (replace(one, added={**one.added, name: 0.0}) for one in (self.costs, self.flops))

    # --- the end, resuming ----------------------------------------------------------------------

    def finish(self, run: Sparsifier) -> None:
        """Nothing is left to do: masks are frozen, the plan has the by-passes.

        Raises:
            BudgetError: training stopped before masks were frozen.
        """
        if self.met is None:
            raise BudgetError(
                f"training stopped after {run.step} of {run.steps} steps, before the target was met or the phase of "
                f"{self.settings.end(run.steps)} steps over; train on, or plan with fewer steps"
            )

    def close(self, run: Sparsifier) -> None:
        """By-passes come off."""
        for undo in self.hung:
            undo()

    def decision(self, run: Sparsifier) -> Decision:
        """The filters that stay, narrow weights, and the by-passes with what they have learned."""
        found = Decision()
        masks = {name: gate.detach().bool() for name, gate in self.gates().items()}
        for name, branch in self.branches.items():
            site = branch.site(run.model)
            found.sites[site.name], found.masks[site.name] = site, masks[name]
            if name in self.undo:
                found.weights.update(branch.weights(run.model, self.bypasses[name], masks[name]))
                whole = bool(masks[name].all())
                if not (whole and branch.merge):
                    found.additions.append(branch.addition(None if whole else masks[name].nonzero().flatten().tolist()))
            found.facts[site.name] = self._facts(name)
        next(iter(found.facts.values())).update(self._kept(run))
        return found

    def _kept(self, run: Sparsifier) -> dict[str, float]:
        """What of the original network's FLOPs stays, by-passes counted, and of what the budget counts."""
        figures, found = self._figures(), {}
        if run.order.budget.quantity is Quantity.PARAMETERS:
            found["parameters_kept"] = round(figures["cost"], 6)
        return {"flops_kept": round(figures["flops"], 6), **found}

    def _facts(self, name: str) -> dict[str, float]:
        """Threshold, and in shares of the original network's FLOPs what stays of the layer and of its by-pass."""
        kept = self.counts[name] * self.flops.per_filter[name] / self.flops.original
        beside = self.flops.beside(name, self.counts[name]) / self.flops.original
        figures = {"threshold": float(self.thresholds[name].value.detach()), "flops": kept, "bypass_flops": beside}
        return {key: round(value, 6) for key, value in figures.items()}

    def state_dict(self) -> dict[str, Any]:
        """By-passes and thresholds, what the optimiser knows of them, frozen masks."""
        return {
            "extra": self.extra.state_dict(),
            "branches": {name: copy.deepcopy(branch_state(bypass)) for name, bypass in self.bypasses.items()},
            "masks": {name: one.final for name, one in self.thresholds.items() if one.final is not None},
            "counts": dict(self.counts),
            "met": self.met,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.extra.load_state_dict(state["extra"])
        for name, values in state["branches"].items():
            self.bypasses[name].load_state_dict(values, strict=False)
        self._hold(state["masks"])
        self.counts, self.met = dict(state["counts"]), state["met"]


def make_parts(order: Order, settings: LappSettings) -> list[Part]:
    """One part does it all."""
    return [Lapp(settings)]


method = Method(
    name="lapp",
    paper="06",
    title="LAPP: layer adaptive progressive pruning for compressing CNNs from scratch",
    citation="Zhai, Guo, Liu, Xing, Xu 2023, arXiv 2309.14157",
    formula="m_i = 1[(|W_i| - mean) / std > t_l], t_l by SGD on L + a max(0, log(F / (p F_0))); a by-pass per layer",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.LEARNED, t.Criterion.LP_NORM}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.FILTER}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LEARNED,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN}),
        learn=frozenset({t.Learn.SPARSITY_REGULARIZATION}),
        physical=True,
    ),
    settings=LappSettings,
    parts=make_parts,
    units=UnitKind.CHANNEL,
    exact=Group.AIM,
)
