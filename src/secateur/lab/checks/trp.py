"""TRP's small-scale check: weights that are truncated while they are trained can be factorised for nothing.

A convolution 1 -> 16 and four 3x3 convolutions to 32 channels (the first strided) with batch norms on the digits, 15
epochs at batch 64, SGD 0.1 (times 0.1 after 7 and 11), momentum 0.9, weight decay 1e-4; channel scheme, m = 5, e = 0.9.
Baseline: the same training without truncation. Random control: the nuclear norm alone; for `split` random directions
in place of the singular ones, at the same ranks. No fine-tuning anywhere, also not of batch-norm statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur import api
from secateur.core.progress import Progress, track
from secateur.core.seeding import generator, seeded
from secateur.core.units import Scheme
from secateur.data.running import training
from secateur.lab.checks._beside import Rival
from secateur.lab.checks._digits import digits
from secateur.lab.checks._resnet_full import UNITS, from_scratch
from secateur.lab.checks._structured import example
from secateur.lab.checks._training import accuracy_of, fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import flops
from secateur.scores.spectrum import Spectrum
from secateur.shrink.apply import apply_
from secateur.shrink.factorised import Factorised
from secateur.train.loop import Decay, Recipe

EPOCHS, BATCH, RANK, THRESHOLD = 15, 64, 8, 0.05

CLAIMS = {
    "accuracy": Expectation(
        "accuracy points of the network as split in the end above the plainly trained one (baseline: that one at the "
        "same ranks; random: the trained one in random directions)",
        ">= -3",
        "both",
    ),
    "rank_8": Expectation("accuracy points lost by truncation to rank 8 of 32, with the nuclear norm", "< 1", "both"),
    "rank_8_alone": Expectation("the same, by truncation alone", "< 1", "both"),
    "rank_8_plain": Expectation(
        "the same after plain training (both controls: TRP, with the nuclear norm)", "> 20", "both"
    ),
    "values": Expectation("largest number of singular values of at least 0.05 in a layer", "<= 10", "both"),
    "values_plain": Expectation(
        "the same after plain training (both controls: TRP, with the nuclear norm)", ">= 32", "both"
    ),
    "flops": Expectation("share of the FLOPs that is left when layers are split", "<= 0.5", "both"),
}


def network() -> nn.Sequential:
    """Five convolutions with batch norms, global pooling, a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def recipe() -> Recipe:
    """15 epochs, two drops of the rate."""
    steps = EPOCHS * (len(digits().calibration) // BATCH)
    milestones = (7 / EPOCHS, 11 / EPOCHS)
    return Recipe(steps=steps, batch=BATCH, lr=0.1, weight_decay=1e-4, decay=Decay.STEPS, milestones=milestones)


def trained(seed: int, progress: Progress, stage: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The network after its training under TRP, dense and as it is split."""
    with seeded(seed):
        model = network()
    fit = fitting(recipe(), seed)
    optimizer = fit.recipe.make_optimizer(model)
    sparsifier = api.sparsify(model, optimizer, "trp", 0.0, steps=fit.steps, seed=seed, **settings)
    with training(model, seed):
        for step in track(range(fit.steps), progress, stage):
            fit.advance(model, optimizer, step)
    plan = sparsifier.finish()
    return model, apply_(copy.deepcopy(model), plan)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All but the first."""
    return dict([(name, one) for name, one in model.named_modules() if isinstance(one, nn.Conv2d)][1:])


def changed(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> float:
    """Accuracy in percent of a copy with other weights in its convolutions."""
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in convolutions(clone).items():
            layer.weight.copy_(change(name, layer.weight))
    return accuracy_of(clone)


def truncated(weight: Tensor, rank: int) -> Tensor:
    """The nearest weight of a rank."""
    return Spectrum.of(weight, Scheme.CHANNEL).cut([rank]).weight


def lost(model: nn.Module) -> float:
    """Accuracy points that rank 8 in every convolution costs."""
    return accuracy_of(model) - changed(model, lambda name, weight: truncated(weight, RANK))


def most_values(model: nn.Module) -> float:
    """Singular values above the threshold, in the layer that has most."""
    weights = [layer.weight.flatten(1) for layer in convolutions(model).values()]
    return float(max(int((torch.linalg.svdvals(weight) >= THRESHOLD).sum()) for weight in weights))


def at_ranks_of(split: nn.Module, model: nn.Module, seed: int | None = None) -> float:
    """Accuracy in percent of a network at the ranks that another was split at, in its own or random directions."""
    ranks = {name: module.rank for name, module in split.named_modules() if isinstance(module, Factorised)}

    def change(name: str, weight: Tensor) -> Tensor:
        if name not in ranks or seed is None:
            return truncated(weight, ranks.get(name, weight.shape[0]))
        drawn = torch.randn(weight.shape[0], ranks[name], generator=generator(seed, "directions", name))
        basis = torch.linalg.qr(drawn).Q
        return torch.matmul(basis @ basis.T, weight.flatten(1)).view_as(weight)

    return changed(model, change)


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    by_energy = {"truncate": False, "rule": "energy", "amount": 0.9}  # absolute values say nothing of these
    plain, whole = trained(seed, progress, "plain training", nuclear=0.0, **by_energy)
    nuclear, fewer = trained(seed, progress, "nuclear norm", **by_energy)
    ours, split = trained(seed, progress, "TRP with nuclear norm")
    alone, _ = trained(seed, progress, "TRP", nuclear=0.0)
    top = accuracy_of(plain)
    losses = {"plain": lost(plain), "nuclear": lost(nuclear), "ours": lost(ours), "alone": lost(alone)}
    dense = flops(plain, example())
    return {
        "accuracy": Sample(
            accuracy_of(split) - top, at_ranks_of(split, plain) - top, at_ranks_of(split, ours, seed) - top
        ),
        "rank_8": Sample(losses["ours"], losses["plain"], losses["nuclear"]),
        "rank_8_alone": Sample(losses["alone"], losses["plain"], losses["nuclear"]),
        "rank_8_plain": Sample(losses["plain"], losses["alone"], losses["ours"]),
        "values": Sample(most_values(ours), most_values(plain), most_values(nuclear)),
        "values_plain": Sample(*(most_values(one) for one in (plain, alone, ours))),
        "flops": Sample(*(flops(one, example()) / dense for one in (split, whole, fewer))),
    }


check = Check(CLAIMS, run, from_scratch("trp", ("flops", 0.5), 1.24, Rival("trp", "plain"), UNITS))
