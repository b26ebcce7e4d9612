"""RD pruning's small-scale check: its allocation without retraining, and the additivity that it rests on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from secateur import api
from secateur.allocate.counts import uniform
from secateur.allocate.spread import keep_counts
from secateur.core.budget import Budget
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator, seeded
from secateur.core.select import keep_global
from secateur.data.dataset import Dataset
from secateur.data.running import evaluating
from secateur.lab.checks._cifar import comparison
from secateur.lab.checks._digits import digits
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import accuracy
from secateur.scores.weights import lamp, magnitude, uniform_random
from secateur.stats.responses import response_curves
from secateur.structure.sites import weight_layers
from secateur.train.loop import Recipe

CALIBRATION, RESOLUTION = 256, 50  # images; 51 amounts
LEVELS = (0.6, 0.7, 0.8)
COMBINATIONS, GENTLE = 20, 0.6  # of amounts per layer, up to the second

CLAIMS = {
    "over_global": Expectation("accuracy points over global magnitude at 80 %, not retrained", ">= 8", "both"),
    "over_uniform": Expectation("accuracy points over uniform magnitude at 80 %, not retrained", ">= 40", "both"),
    "over_lamp": Expectation("accuracy points over LAMP at 70 %, not retrained", ">= 1", "both"),
    "error": Expectation(
        "levels of 60, 70, 80 % at which the test outputs' error is not below global magnitude's", "== 0", "both"
    ),
    "exact": Expectation("weights that the plans miss the asked count by, over the three levels", "== 0", "baseline"),
    "order": Expectation(
        "rank correlation of the error of 20 pruned networks with the sum of single-layer errors (baseline: with "
        "the number of weights removed; control: with another network's sum)",
        ">= 0.9",
        "both",
    ),
    "size": Expectation(
        "largest factor between that error and that sum, either way (baseline: the largest single error "
        "in place of the sum; control: another network's sum)",
        "<= 2",
        "random",
    ),
}

Masks = Mapping[str, Tensor]


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baselines: the allocation that is compared with."""
    model = trained(seed, progress)
    data = digits().calibration.sample(CALIBRATION, seed)
    plans = {level: rd_plan(model, level, data, seed, progress) for level in LEVELS}
    rivals = {level: dict(rival_masks(model, level, seed)) for level in LEVELS}

    def gain(rival: str, level: float) -> Sample:
        other = score(model, rivals[level][rival])
        control = score(model, rivals[level]["random"])
        return Sample(score(model, plans[level].masks) - other, 0.0, control - other)

    def worse(masks: Mapping[float, Masks]) -> int:
        return sum(error(model, masks[level]) >= error(model, rivals[level]["global"]) for level in LEVELS)

    return {
        "over_global": gain("global", 0.8),
        "over_uniform": gain("uniform", 0.8),
        "over_lamp": gain("lamp", 0.7),
        "error": Sample(
            worse({level: plan.masks for level, plan in plans.items()}),
            worse({level: rivals[level]["uniform"] for level in LEVELS}),
            worse({level: rivals[level]["random"] for level in LEVELS}),
        ),
        "exact": Sample(miscount({k: plan.masks for k, plan in plans.items()}), miscount(on_the_grid(model)), 0.0),
        **additivity(model, data, seed, progress),
    }


def network() -> nn.Sequential:
    """Convolutions 1-16-32-32-64 with batch norm, two of stride 2, then linear 64-64-10."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def trained(seed: int, progress: Progress) -> nn.Module:
    """The network after 15 epochs of SGD (0.05, momentum 0.9, cosine)."""
    with seeded(seed):
        model = network()
    batch = 64
    steps = 15 * math.ceil(len(digits().calibration) / batch)
    fitting(Recipe(steps=steps, batch=batch, lr=0.05, nesterov=True), seed, progress=progress)(model)
    return model.eval()


def rd_plan(model: nn.Module, level: float, data: Dataset, seed: int, progress: Progress) -> Plan:
    """The method, worst-case curves of 51 amounts."""
    batches = list(data.batches(CALIBRATION))
    return api.plan(
        model, "rd", level, data=batches, seed=seed, progress=progress, resolution=RESOLUTION, batch=CALIBRATION
    )


def rival_masks(model: nn.Module, level: float, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Magnitude under other allocations, and random weights under the uniform one."""
    layers = weight_layers(model).layers
    scores = {name: magnitude(layer.weight) for name, layer in layers.items()}
    sizes = {name: score.numel() for name, score in scores.items()}
    keep = Budget(level).keep(sum(sizes.values()))
    even = uniform(sizes, keep)
    draws = {name: uniform_random(x.shape, generator(seed, "control", name)) for name, x in scores.items()}
    yield "global", keep_global(scores, keep)
    yield "lamp", keep_global({name: lamp(layer.weight) for name, layer in layers.items()}, keep)
    yield "uniform", keep_counts(scores, even)
    yield "random", keep_counts(draws, even)


def on_the_grid(model: nn.Module) -> dict[float, Masks]:
    """Uniform magnitude with every layer's count rounded on its own, as amounts are in published code."""
    scores = {name: magnitude(layer.weight) for name, layer in weight_layers(model).layers.items()}
    return {
        level: keep_counts(scores, {name: x.numel() - int(level * x.numel()) for name, x in scores.items()})
        for level in LEVELS
    }


def pruned(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy with zeros."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if name in masks:
            weight.data *= masks[name]
    return model


def score(model: nn.Module, masks: Masks) -> float:
    """Test accuracy in percent."""
    return 100 * accuracy(pruned(model, masks), digits().evaluation).value


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in eval mode."""
    with evaluating(model):
        found: Tensor = model(inputs)
        return found


def error(model: nn.Module, masks: Masks, inputs: Tensor | None = None) -> float:
    """Mean squared change of the outputs on the test images, or on others."""
    inputs = digits().evaluation.inputs if inputs is None else inputs
    return float((outputs(pruned(model, masks), inputs) - outputs(model, inputs)).square().mean())


def miscount(masks: Mapping[float, Masks]) -> int:
    """Weights kept too many or too few."""
    total = 0
    for level, chosen in masks.items():
        kept, units = (sum(count(mask) for mask in chosen.values()) for count in (lambda m: int(m.sum()), Tensor.numel))
        total += abs(kept - Budget(level).keep(units))
    return total


def additivity(model: nn.Module, data: Dataset, seed: int, progress: Progress) -> dict[str, Sample]:
    """Measured errors of random combinations of amounts beside the sums of single-layer errors."""
    layers = weight_layers(model).layers
    batch = Batch((data.inputs,))
    curves = response_curves(model, layers, [batch], RESOLUTION, progress, worst_case=False).curves
    scores = {name: magnitude(layer.weight) for name, layer in layers.items()}
    highest = round(GENTLE * RESOLUTION)
    rng = generator(seed, "combinations")
    picks = torch.randint(0, highest + 1, (COMBINATIONS, len(layers)), generator=rng).tolist()
    measured, sums, largest, removed = [], [], [], []
    for row in picks:
        gone = {name: curves[name].removed[d] for name, d in zip(layers, row, strict=True)}
        masks = keep_counts(scores, {name: scores[name].numel() - gone[name] for name in layers})
        single = [curves[name].distortions[d] for name, d in zip(layers, row, strict=True)]
        measured.append(error(model, masks, data.inputs))
        sums.append(sum(single))
        largest.append(max(single))
        removed.append(sum(gone.values()))
    other = sums[1:] + sums[:1]  # every network with the next one's sum

    def order(predicted: list[Any]) -> float:
        return float(spearmanr(measured, predicted).statistic)

    def factor(predicted: list[float]) -> float:
        return max(max(m / p, p / m) for m, p in zip(measured, predicted, strict=True))

    return {
        "order": Sample(order(sums), order(removed), order(other)),
        "size": Sample(factor(sums), factor(largest), factor(other)),
    }


check = Check(CLAIMS, run, comparison("rd"))
