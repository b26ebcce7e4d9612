"""What the checks of pruning before training share: a small convolutional network, trained under fixed masks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from secateur import api
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.lab.checks._digits import digits
from secateur.measure import accuracy
from secateur.train.loop import Fitting, OptimizerName, Recipe

RECIPE = Recipe(steps=200, batch=64, optimizer=OptimizerName.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)


def conv_net(width: int, seed: int) -> nn.Sequential:
    """3x3 convolutions of w, 2w, 4w, 4w channels with batch norm, pooled after the second; then a linear layer."""
    channels = (1, width, 2 * width, 4 * width, 4 * width)
    layers: list[nn.Module] = []
    with seeded(seed):
        for place in range(4):
            layers += [
                nn.Conv2d(channels[place], channels[place + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(channels[place + 1]),
                nn.ReLU(),
            ]
            layers += [nn.MaxPool2d(2)] if place == 1 else []
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)]
    return nn.Sequential(*layers)


def planned(model: nn.Module, seed: int, method: str, **settings: Any) -> Plan:
    """A plan of the untrained network on the training images."""
    return api.plan(model, method, data=digits().calibration, seed=seed, **settings)


def trained_accuracy(model: nn.Module, plan: Plan | None, seed: int, progress: Progress) -> float:
    """Test accuracy in percent of a copy trained under the plan's fixed masks, or dense."""
    model = copy.deepcopy(model)
    Fitting(digits().calibration, RECIPE, seed=seed, progress=progress)(model, plan.masks if plan else None)
    return 100 * accuracy(model.eval(), digits().evaluation).value


def layer_densities(plan: Plan) -> list[float]:
    """Kept fraction of each layer, in order."""
    return [plan.kept(name) / site.units for name, site in plan.sites.items()]


def ends_over_middle(plan: Plan) -> float:
    """Density of the sparser one of first and last layer over that of the densest layer between."""
    first, *middle, last = layer_densities(plan)
    return min(first, last) / max(middle)
