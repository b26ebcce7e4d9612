"""What the checks of trainings that end with a cut share: the digits ResNet, trained with a method and without."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from secateur import api
from secateur.core.budget import Budget
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.data.batches import run as outputs
from secateur.data.running import evaluating
from secateur.lab.checks._digits import digits
from secateur.lab.checks._structured import DRAWS, cut_copy, example, points, same_widths
from secateur.lab.checks._training import sparse_trained
from secateur.train.loop import Fitting, Recipe
from secateur.zoo.vision import digits_resnet

NEAR = 0.01  # of the largest score: below it a unit counts as driven to zero
RECIPE = Recipe(steps=300, batch=64, lr=0.05, weight_decay=1e-4)


@dataclass(frozen=True)
class Trained:
    """A network after its training, uncut, and what was decided."""

    model: nn.Module
    plan: Plan

    @property
    def accuracy(self) -> float:
        """In percent on the evaluation digits, right after the cut."""
        return points(cut_copy(self.model, self.plan))

    @property
    def near_zero(self) -> float:
        """Share of units whose score is below a hundredth of the largest."""
        scores = torch.cat(list(self.plan.scores.values()))
        return float((scores < NEAR * scores.max()).double().mean())

    def gap(self) -> float:
        """Largest difference that the cut makes to a logit of the evaluation digits."""
        return float((_logits(cut_copy(self.model, self.plan)) - _logits(self.model)).abs().max())


def fresh(seed: int) -> nn.Module:
    """An untrained digits ResNet."""
    with seeded(seed):
        return digits_resnet()


def trained(
    model: nn.Module, fit: Fitting, method: str, budget: Budget, progress: Progress, **settings: Any
) -> Trained:
    """The model, trained in place with a method until its cut is decided."""
    plan = sparse_trained(model, fit, method, None, progress, budget=budget, **settings)
    return Trained(model.eval(), plan)


def random_cuts(found: Trained, seed: int) -> list[Trained]:
    """The same network without random channels, as many of every site, some draws."""
    widths: dict[str, Any] = {"shares": same_widths(found.plan), "multiple": 1, "example": example()}
    draws = range(seed * DRAWS, (seed + 1) * DRAWS)
    # the shares decide the widths; the budget is only there because a plan needs one
    plans = [api.plan(found.model, "group_random", budget=Budget(0.5), seed=draw, **widths) for draw in draws]
    return [Trained(found.model, plan) for plan in plans]


def chance(found: Trained, seed: int) -> float:
    """Mean accuracy in percent of random cuts."""
    return mean(one.accuracy for one in random_cuts(found, seed))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    with evaluating(model):
        found: Any = [outputs(model, batch) for batch in digits().evaluation.batches(256)]
        return torch.cat(found)
