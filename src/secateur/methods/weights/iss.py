"""Iterative soft shrinkage, ISS-P (Wang, Wang, Zhang, Fu, Tao 2023, ICCV).

From random initialisation, no dense training first. After each of the first K_P optimiser steps, in every layer:

    U = the min(ceil(p n), floor(0.995 n)) weights of smallest |w|,   w_i <- alpha w_i for i in U,

all others untouched; U is found anew at every step, so a shrunk weight that gets gradient comes back. At K_P the last
U is removed and the sparse network is fine-tuned. alpha = 0 is the hard baseline IHT. `penalty` replaces the
shrinking by an L2 penalty that grows while a weight is in U (ISS-R): R_i w_i is added to the gradient.

Hold the learning rate at its first value while `sparsifier.step < parts[1].hold_until` (K_P) and start the schedule
then, with the same optimiser object: its moments carry over (a warning tells when the rate moved). Averaged weights
(EMA) lag behind the mask: `sparsifier.masks.apply_to(average)`. The zeros bring no speed unless the hardware knows
their pattern (2:4), and K_P was 100,000 steps in the paper's runs, before 200,000 to 500,000 of fine-tuning.

An N:M budget (`Budget.nm("1:20")`, keep 1 of 20) chooses inside groups of consecutive entries of the flattened tensor,
as published; `groups=inputs` takes groups along each output's inputs, as 2:4 hardware wants. If M does not divide the
weights of all layers, as many are removed more per larger group until it does: the real pattern is in the warnings.

The official code names this IST. Its K_P is a counter's side effect (100,020 steps); its N:M mode ignores the layers'
ratios and prunes skipped layers (here ratio 0 and `exclude` stay dense); its fast mode never shrinks (here it does: the
threshold comes from sampled weights while shrinking, and the frozen mask is exact).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import floor, gcd
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from secateur.core import tags as t
from secateur.core.budget import Budget, Pattern, Quantity
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.method import Group, Method, Protocol, Settings, matches
from secateur.core.select import keep_pattern, keep_top
from secateur.core.units import UnitKind
from secateur.scores.weights import magnitude, uniform_random
from secateur.structure.layers import from_matrix, to_matrix
from secateur.train.part import Part
from secateur.train.parts import SoftShrink
from secateur.train.sharding import local, parted_like
from secateur.train.sparsifier import Order, Sparsifier

MOST = 0.995  # of a layer that goes at most
SAMPLED = 32_400


class Mode(StrEnum):
    """Which weights of a layer are unimportant; rand and max are the paper's ablations."""

    MIN = "min"
    RAND = "rand"
    MAX = "max"


class Groups(StrEnum):
    """Where the groups of an N:M budget lie."""

    FLATTENED = "flattened"
    INPUTS = "inputs"


class IssSettings(Settings):
    """Settings; alpha is that of all published commands, stage that of SwinIR-Light (100K of 300K steps)."""

    alpha: float = Field(0.95, ge=0, le=1, description="factor of unimportant weights per step; 0 is IHT")
    stage: float = Field(1 / 3, gt=0, le=1, description="share of the training that shrinks; then frozen, fine-tuned")
    mode: Mode = Field(Mode.MIN, description="smallest magnitudes shrink; rand or max for comparison")
    ratios: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="other sparsities by layer pattern, e.g. 'tail*=0,body*=0.95'; 0 dense, 1 is capped at 99.5 %"
    )
    groups: Groups = Field(
        Groups.FLATTENED, description="N:M groups: of the flattened tensor (published) or along inputs"
    )
    fast: bool = Field(False, description=f"thresholds from {SAMPLED} sampled weights while shrinking; frozen exactly")
    penalty: float = Field(0.0, ge=0, description="ISS-R instead of shrinking: growth of the penalty (official: 1e-4)")
    penalty_every: int = Field(20, ge=1, description="steps between two growths of the penalty")
    report: int = Field(100, ge=1, description="steps between two log entries: changed membership, gradient norm")

    @field_validator("ratios", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """A dict, or `pattern=ratio` with commas between."""
        if not isinstance(value, str):
            return value
        pairs = [item.partition("=") for item in value.split(",") if item]
        return {name.strip(): ratio for name, _, ratio in pairs}


def kept(size: int, sparsity: float) -> int:
    """How many of n weights stay: n - min(ceil(p n), floor(0.995 n)), with p read as the decimal that was typed."""
    if sparsity == 1:
        return size - floor(MOST * size)
    return max(Budget(1 - sparsity, Quantity.DENSITY).keep(size), size - floor(MOST * size))


def widened(pattern: Pattern, sizes: Sequence[int]) -> Pattern:
    """The pattern, or the next one that removes more of larger groups and divides all sizes.

    Raises:
        BudgetError: there is none.
    """
    common = gcd(*sizes)
    for of in range(pattern.of, common + 1):
        if common % of == 0:
            return Pattern(pattern.keep, of)
    raise BudgetError(
        f"neither the pattern {pattern} nor a longer one divides all layers' weights (common divisor {common}); "
        f"exclude the layer with an odd size or give a sparsity"
    )


class Choice(Part):
    """What every layer keeps at this step."""

    def __init__(self, budget: Budget, settings: IssSettings, until: int):
        self.budget, self.settings, self.until = budget, settings, until
        self.counts: dict[str, int] = {}
        self.pattern: Pattern | None = None

    def start(self, run: Sparsifier) -> None:
        """Settle counts or the pattern."""
        ratios = {name: self._ratio(name) for name in run.sites}
        for asked in self.settings.ratios:
            if not any(matches(name, (asked,)) for name in run.sites):
                raise SettingsError(f"ratios: the pattern '{asked}' fits no layer; there are {', '.join(run.sites)}")
        if self.budget.pattern:
            self._settle_pattern(run, ratios)
            return
        for name, ratio in ratios.items():
            size = run.sites[name].units
            sparsity = self.budget.sparsity if ratio is None else ratio
            self.counts[name] = max(kept(size, sparsity), min(self.budget.floor, size))
            if sparsity > MOST:
                run.warn(f"layer '{name}' keeps {self.counts[name]} weights: at most 99.5 % of a layer go")

    def _ratio(self, name: str) -> float | None:
        return next((ratio for asked, ratio in self.settings.ratios.items() if matches(name, (asked,))), None)

    def _settle_pattern(self, run: Sparsifier, ratios: Mapping[str, float | None]) -> None:
        assert self.budget.pattern is not None
        for name, ratio in ratios.items():
            if ratio:
                raise SettingsError(
                    f"ratios: layer '{name}' follows the pattern {self.budget.pattern}; only 0 (dense) goes with it"
                )
        pruned = [name for name, ratio in ratios.items() if ratio is None]
        self.counts = {name: run.sites[name].units for name in ratios if name not in pruned}
        self.pattern = self.budget.pattern
        if self.settings.groups is Groups.FLATTENED and pruned:
            self.pattern = widened(self.budget.pattern, [run.sites[name].units for name in pruned])
        if self.pattern != self.budget.pattern:
            run.warn(
                f"{self.budget.pattern} does not divide all layers; used {self.pattern}, "
                f"sparsity {1 - self.pattern.keep / self.pattern.of:.4g}"
            )

    def keep(self, run: Sparsifier, name: str) -> Tensor:
        """The layer's keep-mask for this step."""
        scores = self._scores(run, name)
        if name not in self.counts:
            return self._in_groups(run, name, scores)
        count = self.counts[name]
        if self.settings.fast and run.step < self.until and SAMPLED < scores.numel() > count:
            return _sampled(scores, count, run.rng("fast", name))
        return keep_top(scores.reshape(-1), count).view(scores.shape)

    def _scores(self, run: Sparsifier, name: str) -> Tensor:
        weight = run.weight(name)
        if self.settings.mode is Mode.RAND:
            return uniform_random(tuple(weight.shape), run.rng("rand", name)).to(weight.device)
        return magnitude(weight) if self.settings.mode is Mode.MIN else -magnitude(weight)

    def _in_groups(self, run: Sparsifier, name: str, scores: Tensor) -> Tensor:
        assert self.pattern is not None
        if self.settings.groups is Groups.FLATTENED:
            return keep_pattern(scores.reshape(1, -1), self.pattern, name).view(scores.shape)
        site = run.sites[name]
        return from_matrix(keep_pattern(to_matrix(scores, site.layout), self.pattern, name), site)


def _sampled(scores: Tensor, keep: int, rng: torch.Generator) -> Tensor:
    """About `keep` of the highest scores: those above the threshold of a sample."""
    flat = scores.reshape(-1)
    sample = flat[torch.randint(flat.numel(), (SAMPLED,), generator=rng).to(flat.device)]
    going = max(1, round(SAMPLED * (1 - keep / flat.numel())))
    return scores > sample.kthvalue(going).values


class GrowingPenalty(Part):
    """R_i w_i in the gradient, with R_i growing whenever weight i is chosen (ISS-R)."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.penalties: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_backward(self, run: Sparsifier) -> None:
        """Let the penalties grow if it is time, and add their gradient."""
        settings = self.choice.settings
        if run.step >= self.choice.until:
            return
        for name, parameter in run.masks.parameters.items():
            if (run.step + 1) % settings.penalty_every == 0:
                grown = (~self.choice.keep(run, name)).to(parameter.dtype) * settings.penalty
                self.penalties[name] = self.penalties.get(name, 0) + grown
            if name in self.penalties and parameter.grad is not None:
                penalty = parted_like(self.penalties[name], parameter)
                local(parameter.grad).add_(penalty * local(parameter.detach()))

    def state_dict(self) -> dict[str, Any]:
        """The penalties."""
        return {"penalties": dict(self.penalties)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.penalties = dict(state["penalties"])


def make_parts(order: Order, settings: IssSettings) -> Sequence[Part]:
    """Choose, shrink (or penalise), freeze."""
    until = max(1, round(settings.stage * order.steps))
    choice = Choice(order.budget.of(UnitKind.WEIGHT), settings, until)
    alpha = 1.0 if settings.penalty else settings.alpha
    shrink = SoftShrink(until, alpha, choice.keep, settings.report)
    return [choice, shrink, GrowingPenalty(choice)] if settings.penalty else [choice, shrink]


method = Method(
    name="iss",
    paper="36",
    title="Iterative soft shrinkage learning for efficient image super-resolution",
    citation="Wang, Wang, Zhang, Fu, Tao 2023, ICCV, arXiv 2303.09650",
    formula="each step, per layer: the smallest |w| times alpha, chosen anew; after K_P steps they go",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.OTHER}),
        learn=frozenset({t.Learn.SPARSITY_REGULARIZATION}),
    ),
    settings=IssSettings,
    parts=make_parts,
    units=UnitKind.WEIGHT,
    exact=Group.SITE,
    patterns=True,
    changes_weights=True,
)
