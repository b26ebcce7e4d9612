"""First-order Taylor's small-scale check: blind to rescaling, and it knows which weights the loss needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur import api, zoo
from secateur.core.progress import Progress
from secateur.data.dataset import Splits
from secateur.lab.checks._digits import digits
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import accuracy
from secateur.shrink.apply import masked
from secateur.zoo.perturb import rescale_mlp

SPARSITY = 0.8
CLAIMS = {
    "invariance": Expectation(
        "accuracy points that change at 80 % when the MLP is rescaled without changing its function",
        "<= 0.5",
        control="baseline",  # random masks do not look at weights, so they pass this one by nature
    ),
    "rescaled": Expectation("accuracy points over global magnitude on the rescaled MLP at 80 %", ">= 5", "both"),
    "chance": Expectation("accuracy points over random pruning at 80 % on the plain MLP", ">= 5", "random"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed: 256 labelled images, no fine-tuning. Baseline: global magnitude."""
    splits = digits()
    data = Splits(splits.calibration.sample(256, seed), splits.evaluation)
    plain = zoo.load_model("digits-mlp")
    assert isinstance(plain, nn.Sequential)
    rescaled = rescale_mlp(plain, seed)

    def both(method: str, **settings: Any) -> tuple[float, float]:
        return score(plain, data, seed, method, **settings), score(rescaled, data, seed, method, **settings)

    taylor, magnitude, random = both("taylor"), both("global_magnitude", minimum=1), both("random")
    return {
        "invariance": Sample(*(abs(found[0] - found[1]) for found in (taylor, magnitude, random))),
        "rescaled": Sample(taylor[1] - magnitude[1], 0.0, random[1] - magnitude[1]),
        "chance": Sample(taylor[0] - random[0], magnitude[0] - random[0], 0.0),
    }


def score(model: nn.Module, data: Splits, seed: int, method: str, **settings: Any) -> float:
    """Accuracy in percent right after pruning."""
    plan = api.plan(model, method, sparsity=SPARSITY, data=data.calibration, seed=seed, **settings)
    with masked(model, plan):
        return 100 * accuracy(model, data.evaluation).value


check = Check(CLAIMS, run)
