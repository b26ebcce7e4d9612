"""Group Taylor's small-scale check: blind to rescaling where the norm is not, and better than chance.

`form=absolute` is claimed against norm and chance; `squared`, the default, lets the signs of a whole
calibration set cancel, and on networks that are trained to the end it is noisier: it is claimed against
chance only. On the digits ResNet, once its batch-norm statistics are re-estimated, neither form is better than
chance at half of the FLOPs (84 % and 86 % against 90 %), so only the choice itself is claimed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur import api, zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.lab.checks._structured import (
    DRAWS,
    cut_copy,
    cut_perplexity,
    differing,
    few_images,
    few_windows,
    points,
    random_perplexities,
    rescale_channels,
)
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.zoo.perturb import rescale_llama

HALF_FLOPS = Budget(0.5, Quantity.FLOPS)
WINDOWS = 16
CLAIMS = {
    "invariance": Expectation(
        "channels of the ResNet that are chosen otherwise at half of the FLOPs when it is rescaled without changing "
        "its function, as a fraction of all",
        "<= 0.01",
        "baseline",  # random choices do not look at weights, so they pass this one by nature
    ),
    "steady": Expectation(
        "change of the Llama's perplexity without 50 % of heads and neurons when it is rescaled", "<= 0.02", "baseline"
    ),
    "rescaled": Expectation(
        "perplexity at 50 % on the rescaled Llama, as a fraction of the L2 norm's", "<= 0.85", "both"
    ),
    "chance": Expectation("accuracy points over random heads and neurons, ViT at 50 %", ">= 5", "random"),
    "squared": Expectation(
        "perplexity of the default form at 25 % of heads and neurons, as a fraction of random's", "<= 0.9", "random"
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed, no fine-tuning. Baseline: the L2 norm of the same units."""
    plain, data = zoo.load_model("pydoc-llama"), few_windows(seed, WINDOWS)
    rescaled = rescale_llama(plain, seed)

    def half(method: str, **settings: Any) -> tuple[float, float]:
        found = [cut_perplexity(model, data, seed, method, 0.5, **settings) for model in (plain, rescaled)]
        return found[0], found[1]

    taylor, norm, random = half("group_taylor", form="absolute"), half("channel_norm"), half("group_random")
    chance = sum(random_perplexities(plain, data, seed, 0.25)) / DRAWS
    squared, norm_quarter = (cut_perplexity(plain, data, seed, m, 0.25) for m in ("group_taylor", "channel_norm"))
    return {
        "invariance": invariance(seed),
        "steady": Sample(*(abs(found[0] - found[1]) for found in (taylor, norm, random))),
        "rescaled": Sample(taylor[1] / norm[1], 1.0, random[1] / norm[1]),
        "chance": vit(seed),
        "squared": Sample(squared / chance, norm_quarter / chance, 1.0),
    }


def invariance(seed: int) -> Sample:
    """Fractions of the ResNet's channels that change sides."""
    model = zoo.load_model("digits-resnet")
    rescaled = rescale_channels(model, seed)

    def changed(method: str) -> float:
        first, second = (images_plan(m, method, seed, budget=HALF_FLOPS) for m in (model, rescaled))
        return differing(first, second) / first.units()[1]

    return Sample(changed("group_taylor"), changed("channel_norm"), changed("group_random"))


def vit(seed: int) -> Sample:
    """Accuracy points over the mean of several random draws."""
    model, settings = zoo.load_model("digits-vit"), {"sparsity": 0.5, "kinds": "head,neuron"}

    def accuracy(method: str, number: int, **more: Any) -> float:
        return points(cut_copy(model, images_plan(model, method, number, **settings, **more)))

    draws = [accuracy("group_random", number) for number in range(seed * DRAWS, (seed + 1) * DRAWS)]
    chance = sum(draws) / DRAWS
    return Sample(accuracy("group_taylor", seed, form="absolute") - chance, accuracy("channel_norm", seed) - chance, 0.0)


def images_plan(model: nn.Module, method: str, seed: int, **settings: Any) -> Plan:
    """A plan with any width, calibrated on 256 digits."""
    return api.plan(model, method, data=few_images(seed), seed=seed, multiple=1, **settings)


check = Check(CLAIMS, run)
