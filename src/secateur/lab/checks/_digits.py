"""What the checks on the digits share: small MLPs trained per seed, accuracy under a plan."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from torch import nn

from secateur import api, zoo
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.data.dataset import Splits
from secateur.measure import accuracy
from secateur.recover import Request, find
from secateur.shrink.apply import apply_


@cache
def digits() -> Splits:
    """All training images and the fixed evaluation images."""
    return zoo.load_data("digits")


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Flatten, then linear layers with ReLU between them, Xavier-normal weights.

    The initial scale decides what global magnitude does at extreme sparsity: torch's default gives
    the widest layer the smallest weights, and at 99 % the whole layer is gone.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(widths: Sequence[int], seed: int, progress: Progress) -> nn.Sequential:
    """The MLP after 800 steps of SGD (0.1, momentum 0.9, cosine)."""
    with seeded(seed):
        model = mlp(widths)
    _train(Request(model, Plan({}, {}), digits().calibration, seed, progress), steps=800, lr=0.1)
    return model.eval()


def recovered_accuracy(model: nn.Module, seed: int, progress: Progress, method: str, **settings: Any) -> float:
    """Test accuracy in percent of a copy, pruned and fine-tuned for 300 steps with its masks kept."""
    model = copy.deepcopy(model)
    plan = api.plan(model, method, data=digits().calibration, seed=seed, **settings)
    _train(Request(apply_(model, plan), plan, digits().calibration, seed, progress), steps=300, lr=0.05)
    return 100 * accuracy(model.eval(), digits().evaluation).value


def _train(request: Request, steps: int, lr: float) -> None:
    recovery = find("finetune")
    settings = {"steps": steps, "lr": lr, "optimizer": "sgd", "batch": 128, "warmup": 0, "clip": 1e6}
    recovery.run(request, recovery.configure(settings))
