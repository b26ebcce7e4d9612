"""Group Taylor's small-scale check: blind to rescaling where the norm is not, and better than chance.

`form=absolute` is claimed against norm and chance. `squared`, the default, lets the signs of a whole
calibration set cancel, which leaves little in networks that are trained to the end: it is claimed against
chance on the ViT's neurons, not on its heads nor on the Llama, where it is no better than the norm. On the
digits ResNet, once its batch-norm statistics are re-estimated, neither form is better than chance at half of
the FLOPs (81 % and 86 % against 90 %), so only the choice itself is claimed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur import api, zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.lab.checks._resnet_full import of_trained
from secateur.lab.checks._structured import (
    DRAWS,
    cut_copy,
    cut_perplexity,
    differing,
    few_images,
    few_windows,
    points,
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
    "squared": Expectation("accuracy points of the default form over random neurons, ViT at 50 %", ">= 2", "random"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed, no fine-tuning. Baseline: the L2 norm of the same units."""
    plain, data = zoo.load_model("pydoc-llama"), few_windows(seed, WINDOWS)
    rescaled = rescale_llama(plain, seed)

    def half(method: str, **settings: Any) -> tuple[float, float]:
        found = [cut_perplexity(model, data, seed, method, 0.5, **settings) for model in (plain, rescaled)]
        return found[0], found[1]

    taylor, norm, random = half("group_taylor", form="absolute"), half("channel_norm"), half("group_random")
    return {
        "invariance": invariance(seed),
        "steady": Sample(*(abs(found[0] - found[1]) for found in (taylor, norm, random))),
        "rescaled": Sample(taylor[1] / norm[1], 1.0, random[1] / norm[1]),
        "chance": vit(seed, "head,neuron", form="absolute"),
        "squared": vit(seed, "neuron"),
    }


def invariance(seed: int) -> Sample:
    """Fractions of the ResNet's channels that change sides."""
    model = zoo.load_model("digits-resnet")
    rescaled = rescale_channels(model, seed)

    def changed(method: str) -> float:
        first, second = (images_plan(m, method, seed, budget=HALF_FLOPS) for m in (model, rescaled))
        return differing(first, second) / first.units()[1]

    return Sample(changed("group_taylor"), changed("channel_norm"), changed("group_random"))


def vit(seed: int, kinds: str, **settings: Any) -> Sample:
    """Accuracy points over the mean of several random draws, at half of the units."""
    model = zoo.load_model("digits-vit")

    def accuracy(method: str, number: int, **more: Any) -> float:
        return points(cut_copy(model, images_plan(model, method, number, sparsity=0.5, kinds=kinds, **more)))

    draws = [accuracy("group_random", number) for number in range(seed * DRAWS, (seed + 1) * DRAWS)]
    chance = sum(draws) / DRAWS
    taylor, norm = accuracy("group_taylor", seed, **settings), accuracy("channel_norm", seed)
    return Sample(taylor - chance, norm - chance, 0.0)


def images_plan(model: nn.Module, method: str, seed: int, **settings: Any) -> Plan:
    """A plan with any width, calibrated on 256 digits."""
    return api.plan(model, method, data=few_images(seed), seed=seed, multiple=1, **settings)


check = Check(CLAIMS, run, of_trained("group_taylor"))
