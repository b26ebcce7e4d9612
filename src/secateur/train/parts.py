"""The parts that sparse-training methods are composed of: start sparse, prune along a schedule, regrow, shrink."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor

from secateur.allocate.counts import largest_remainder, uniform, with_floor
from secateur.allocate.ratios import PLAIN, Ends
from secateur.allocate.spread import Spread, choose, keep_counts, keep_floored, shares
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.select import all_finite, count_true, keep_top, places
from secateur.scores.weights import magnitude, uniform_random
from secateur.train.part import Part
from secateur.train.schedules import CosineRate, Ramp, Window, checked_window
from secateur.train.sharding import local, parted_like
from secateur.train.sparsifier import Sparsifier, refuse_unreached

GONE = -1.0  # below every growth: what stays is never chosen again
SAMPLED = 256  # places that are looked at first


class StartSparse(Part):
    """A random mask at the start, layer densities by `spread`; its positions depend on seed and layer only.

    Args:
        density: fraction of all weights that trains from the start; None: what the budget keeps, exactly.
        spread: from one density to one for each layer.
        ends: what the rules on shapes leave open.
    """

    def __init__(self, density: float | None = None, spread: Spread = Spread.ERK, ends: Ends = PLAIN):
        self.density, self.spread, self.ends = density, spread, ends

    def start(self, run: Sparsifier) -> None:
        """Draw and set."""
        keep = run.target if self.density is None else floor(self.density * run.units + 1e-9)
        if abs(keep - run.target) <= 1:
            keep = run.target  # a sparsity rounds the other way than a density
        scores = {name: uniform_random(site.shape, run.rng("start", name)) for name, site in run.sites.items()}
        masks = choose(scores, run.sites, Budget(keep, Quantity.UNITS, floor=run.floor), self.spread, self.ends)
        counts = {name: count_true(mask) for name, mask in masks.items()}
        _say_floored(run, counts, run.floor)
        run.set_masks(masks, "start", kept=counts)


class PruneTo(Part):
    """At every event of a ramp the smallest survivors go; the last event leaves exactly the target.

    Survivors are ranked among themselves, so a mask only ever loses entries here.

    Args:
        ramp: density along the training; its last value is what the budget asks for.
        spread: one ranking over all layers, or a density for each from their shapes.
        score: weights -> importance, each by itself.
        ends: what the rules on shapes leave open.
    """

    def __init__(
        self,
        ramp: Ramp,
        spread: Spread = Spread.GLOBAL,
        score: Callable[[Tensor], Tensor] = magnitude,
        ends: Ends = PLAIN,
    ):
        self.ramp, self.spread, self.score, self.ends = ramp, spread, score, ends

    def start(self, run: Sparsifier) -> None:
        """Refuse what cannot be reached, now and not in the middle of the training."""
        checked_window(self.ramp.window, run.steps, f"the pruning schedule of {run.order.method}")
        if self.ramp.final > self.ramp.initial:
            raise BudgetError(
                f"the final density {self.ramp.final:g} is above the initial {self.ramp.initial:g}: pruning only "
                "removes; lower the final or raise the initial density"
            )
        sizes = {name: site.units for name, site in run.sites.items()}
        with_floor(uniform(sizes, run.target), sizes, self.floor(run))
        if self.spread is not Spread.GLOBAL:
            self.counts(run, run.target)

    def floor(self, run: Sparsifier) -> int:
        """Weights that every layer keeps at every event."""
        return run.floor

    def ranked(self, run: Sparsifier, name: str, alive: Tensor) -> Tensor:
        """Importance of one layer's weights at the flat indices `alive`, for the event at this step, higher = keep."""
        return self.score(run.weight(name).reshape(-1).index_select(0, alive))

    def after_step(self, run: Sparsifier) -> None:
        """One event, if it is time."""
        if self.ramp.window.fires(run.step):
            self.prune(run)

    def wanted(self, run: Sparsifier) -> int:
        """Weights kept after the event at this step: floor(density * N); the target, exactly, at the last."""
        if run.step >= self.ramp.window.stop:
            return run.target
        return floor(self.ramp.density(run.step) * run.units + 1e-9)

    def prune(self, run: Sparsifier) -> None:
        """The event: rank survivors, keep as many as are wanted."""
        keep = max(run.target, self.wanted(run))
        if keep >= sum(run.masks.kept.values()):
            return
        masks = {name: run.masks.get(name) for name in run.sites}
        alive = {name: places(mask) for name, mask in masks.items()}
        scores = {name: self.ranked(run, name, index) for name, index in alive.items()}
        least = self.floor(run)
        if self.spread is Spread.GLOBAL:
            stays = keep_floored(scores, keep, least)
        else:
            stays = keep_counts(scores, self.counts(run, keep))
        counts = {}
        for name, mask in masks.items():
            gone = alive[name].index_select(0, places(~stays[name]))
            mask.view(-1).index_fill_(0, gone, False)
            counts[name] = len(alive[name]) - len(gone)
        _say_floored(run, counts, least)
        run.set_masks(masks, "prune", asked=keep / run.units, kept=counts)

    def counts(self, run: Sparsifier, keep: int) -> dict[str, int]:
        """Survivors of each layer by the rule on shapes; none gets more than it has, whatever the rounding."""
        shapes = {name: site.shape for name, site in run.sites.items()}
        wanted = shares(self.spread, shapes, keep, self.ends)
        return with_floor(largest_remainder(wanted, keep, run.masks.kept), run.masks.kept, self.floor(run))

    def finish(self, run: Sparsifier) -> None:
        """Nothing is left to do, or training stopped too early."""
        refuse_unreached(run)


class Growth(StrEnum):
    """Where connections come back."""

    GRADIENT = "gradient"
    RANDOM = "random"
    MOMENTUM = "momentum"


class Regrow(Part):
    """At every event, in every layer: the smallest survivors go and as many connections come back elsewhere.

    The layer's density does not change. New connections start at 0 with clean optimiser states.

    Args:
        rate: share of the survivors that is exchanged, along the training.
        window: when.
        growth: largest |gradient| of the batch just used, largest momentum, or at random.
    """

    def __init__(self, rate: CosineRate, window: Window, growth: Growth = Growth.GRADIENT):
        self.rate, self.window, self.growth = rate, window, growth
        self.needs_gradients = growth is not Growth.RANDOM
        self.averages: dict[str, Tensor] = {}  # [2, *weight]: of gradients and of their squares
        self.adaptive = False

    def start(self, run: Sparsifier) -> None:
        """Refuse a window that does not fit."""
        checked_window(self.window, run.steps, f"the regrowing of {run.order.method}")

    def after_step(self, run: Sparsifier) -> None:
        """One event, if it is time."""
        if self.growth is Growth.MOMENTUM:
            self._remember(run)
        if not self.window.fires(run.step):
            return
        masks, moved = {}, 0
        for name in run.sites:
            kept = run.masks.kept[name]
            scores = self._growth_scores(run, name)
            if scores is None:
                return  # a refused event leaves every layer as it is
            if kept < run.sites[name].units and self._tells(run, name, scores):
                masks[name] = self.exchanged(run, name, scores)
                moved += count_true(masks[name] & ~run.masks.get(name))
        if masks:
            run.set_masks(masks, "regrow", rate=self.rate.at(run.step), grown=moved)

    def exchanged(self, run: Sparsifier, name: str, growth: Tensor) -> Tensor:
        """The mask after the exchange in one layer."""
        kept = run.masks.kept[name]
        leaving = min(ceil(self.rate.at(run.step) * kept), kept)
        return exchange(run.weight(name), run.masks.get(name), growth, leaving)

    def _growth_scores(self, run: Sparsifier, name: str) -> Tensor | None:
        if self.growth is Growth.RANDOM:
            return uniform_random(run.sites[name].shape, run.rng("grow", name)).to(run.masks.removed[name].device)
        if self.growth is Growth.MOMENTUM and name in self.averages:
            return self._momentum(name)
        gradient = run.gradient(name)
        if gradient is None:
            run.warn(f"step {run.step}: '{name}' has no gradient, so nothing was regrown (zero_grad before the step?)")
            return None
        if not all_finite(gradient):
            run.warn(f"step {run.step}: the gradient of '{name}' is NaN or infinite, so nothing was regrown")
            return None
        return gradient.float()

    def _tells(self, run: Sparsifier, name: str, scores: Tensor) -> bool:
        """Whether the removed weights have gradients: without any, the exchange would go by their index."""
        mask, step = run.masks.get(name), max(1, scores.numel() // SAMPLED)
        # nearly always the few sampled places settle it
        found = any(
            bool(growth.masked_fill(keep, 0).any())
            for growth, keep in ((scores.reshape(-1)[::step], mask.reshape(-1)[::step]), (scores, mask))
        )
        if not found and bool(scores.any()):
            run.warn(
                f"the {self.growth} of '{name}' was zero at every removed weight, so nothing was regrown "
                "there; do not mask gradients, nor weights in the forward pass"
            )
        return found

    def _remember(self, run: Sparsifier) -> None:
        """Averages of gradients over the steps, of all weights: the optimiser's own are zero where weights are."""
        for name in run.sites:
            gradient = run.gradient(name)
            if gradient is None or not all_finite(gradient):
                continue
            mean, square = self.averages.get(name, gradient.new_zeros((2, *gradient.shape)))
            self.averages[name] = torch.stack(
                [torch.lerp(mean, gradient, 0.1), torch.lerp(square, gradient.square(), 0.001)]
            )
            self.adaptive = "exp_avg_sq" in run.optimizer.state.get(run.masks.parameters[name], {})

    def _momentum(self, name: str) -> Tensor:
        """|m|; for optimisers with second moments |m| / (sqrt(v) + 1e-8)."""
        mean, square = self.averages[name].float().unbind()
        found: Tensor = mean.abs() / (square.sqrt() + 1e-8) if self.adaptive else mean.abs()
        return found

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"averages": dict(self.averages), "adaptive": self.adaptive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.averages, self.adaptive = dict(state["averages"]), bool(state["adaptive"])


def exchange(weight: Tensor, mask: Tensor, growth: Tensor, leaving: int) -> Tensor:
    """The mask after the `leaving` smallest survivors went and as many places with the largest growth came.

    Whatever is open then competes, also what has just left: it may come back at once.

    Args:
        weight: one layer's.
        mask: of its shape, True = keep.
        growth: of its shape; its absolute value counts.
        leaving: at most the number of survivors.

    Returns:
        A mask with as many True as before.
    """
    alive = places(mask)
    stays = keep_top(magnitude(weight.reshape(-1).index_select(0, alive)), len(alive) - leaving)
    staying = alive.index_select(0, places(stays))
    room = growth.reshape(-1).abs().index_fill_(0, staying, GONE)
    return keep_top(room, leaving).index_fill_(0, staying, True).view(mask.shape)


def _say_floored(run: Sparsifier, counts: Mapping[str, int], least: int) -> None:
    """A warning for the layers that only the floor kept alive."""
    for name, count in counts.items():
        if count == least < run.sites[name].units:
            run.warn(f"layer '{name}' was held at the floor of {least} weights")


class SoftShrink(Part):
    """After every step what a rule calls unimportant shrinks a little; in the end what it names then goes for good.

    Membership is decided anew after each step, so a weight that gets a gradient can come back, and one that does
    not decays as alpha^j. All other weights keep what the optimiser gave them. The shrinking is written into the
    weights, outside of autograd. alpha = 0 is iterative hard thresholding.

    Args:
        until: optimiser steps of the shrinking stage; after the last of them the rule's mask is frozen.
        alpha: factor of the unimportant weights, in [0, 1]; 1 leaves the shrinking to another part.
        keep: (run, layer) -> keep-mask of the weight's shape, for this step only.
        every: steps between two entries in the log.

    Attributes:
        hold_until: the learning rate should stay at its first value up to this step; the schedule starts then.
    """

    def __init__(self, until: int, alpha: float, keep: Callable[[Sparsifier, str], Tensor], every: int = 100):
        self.until, self.alpha, self.keep, self.every = until, alpha, keep, every
        self.hold_until = until
        self.seen: dict[str, Tensor] = {}  # masks at the last entry in the log
        self.rates: list[float] = []

    def start(self, run: Sparsifier) -> None:
        """Refuse a stage that does not fit."""
        checked_window(Window(1, self.until), run.steps, f"the shrinking stage of {run.order.method}")

    def before_step(self, run: Sparsifier) -> None:
        """Watch the learning rate."""
        rates = [float(group["lr"]) for group in run.optimizer.param_groups]
        self.rates = self.rates or rates
        if run.step < self.until and rates != self.rates:
            run.warn(
                f"the learning rate changed during the shrinking stage; hold it until step {self.until} and start the "
                "schedule then (scheduler.step() only if sparsifier.step > hold_until)"
            )

    def after_step(self, run: Sparsifier) -> None:
        """Choose anew and shrink; at the end of the stage, remove."""
        if run.step > self.until:
            return
        masks = {name: self.keep(run, name) for name in run.sites}
        figures = self._figures(run, masks)
        if run.step == self.until:
            run.set_masks(masks, "freeze", **figures)
            return
        for name, keep in masks.items():
            self._shrink(run.masks.parameters[name].detach(), keep)
        if figures:
            run.log.append({"step": run.step, "what": "shrink", "density": run.density, **figures})

    def _shrink(self, weight: Tensor, keep: Tensor) -> None:
        if self.alpha < 1:
            mine = local(weight)
            mine.copy_(torch.where(parted_like(keep, weight), mine, mine * self.alpha))

    def _figures(self, run: Sparsifier, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Weights whose membership differs from the last entry's, and the norm of the step's gradient."""
        if run.step % self.every and run.step not in (1, self.until):
            return {}
        changed = sum(int((masks[name] ^ old.to(masks[name].device)).sum()) for name, old in self.seen.items())
        self.seen = dict(masks)
        gradients = [g.float().norm() for name in run.sites if (g := run.gradient(name)) is not None]
        norm = float(torch.stack(gradients).norm()) if gradients else 0.0
        return {"changed": changed, "gradient_norm": norm}

    def finish(self, run: Sparsifier) -> None:
        """Refuse a stage that is not through.

        Raises:
            BudgetError: training stopped too early.
        """
        if run.step < self.until:
            raise BudgetError(
                f"training stopped after {run.step} of {run.steps} steps, before the shrinking stage ended at step "
                f"{self.until}; train on, or plan with fewer steps"
            )

    def state_dict(self) -> dict[str, Any]:
        """Masks of the last entry in the log, and the first learning rates."""
        return {"seen": dict(self.seen), "rates": list(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.seen, self.rates = dict(state["seen"]), list(state["rates"])
