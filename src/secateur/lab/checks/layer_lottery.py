"""Layer lottery's small-scale check: five blocks go before training, the accuracy stays, the time falls.

A residual network of 3 x 5 blocks (widths 8, 16, 32; 13 of the blocks can go) learns the digits in 8 epochs: SGD 0.1
with momentum, cosine, weight decay 5e-4, batch 64. Random tickets win as they do in the paper, so accuracies have
another control: the same blocks cut out of the trained dense network, without any training after that. The control
of time and equality is zeroing the blocks' convolutions instead of removing the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import nn

from secateur import api
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator, seeded
from secateur.lab.checks._digits import digits
from secateur.lab.checks._residual import stages_net
from secateur.lab.checks._resnet_full import NORM, from_scratch
from secateur.lab.checks._training import accuracy_of, fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import flops
from secateur.measure.training_cost import step_times
from secateur.shrink.apply import apply_
from secateur.train.loop import Recipe

EPOCHS, BATCH, BLOCKS, GONE, DRAWS = 8, 64, 5, 5, 10
PAPER = {5: 6.82, 9: 3.75}  # blocks a stage -> percent of the FLOPs of ResNet-32 and ResNet-56 that one block is

CLAIMS = {
    "grasp": Expectation("accuracy points of GraSP's ticket over the dense network", ">= -1", "baseline"),
    "snip": Expectation("the same of SNIP's ticket, scores averaged over a block's weights", ">= -1", "baseline"),
    "filters": Expectation(
        "accuracy points of GraSP's ticket over the network that lacks as many filters, not blocks",
        ">= -0.5",
        "baseline",
    ),
    "time": Expectation("percent of a training step's time that GraSP's ticket saves", ">= 20", "baseline"),
    "stage": Expectation("victims in the first stage, of 5 (baseline: SNIP, averaged)", ">= 3", "both"),
    "sign": Expectation(
        "victims that GraSP with the other sign removes too (baseline: its absolute value)", "<= 0", "both"
    ),
    "equal": Expectation(
        "largest difference of logits from the network with the removed branches times 0 (random: other blocks)",
        "<= 1e-6",
        "both",
    ),
    "flops": Expectation(
        "percentage points by which a block's share of the FLOPs of ResNet-32 or -56 misses the paper's",
        "<= 0.02",
        "both",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    start, fit = network(seed), fitting(recipe(), seed, progress=progress)
    found = api.study(
        lambda: stages_net((8, 16, 32), BLOCKS),
        fit,
        "layer_lottery",
        sparsity=0,
        p=(GONE,),
        strict=False,
        controls=("random", "filters"),
        repeats=1,
        seed=seed,
    )
    points = {row["network"]: row["accuracy"] for row in found.rows}
    dense = copy.deepcopy(start)
    fit(dense)
    ours, snip = planned(start, seed), planned(start, seed, criterion="snip", aggregate="mean")
    thin = cut(start, snip)
    fit(thin)

    def over(value: float, plan: Plan, other: str = "dense") -> Sample:
        return Sample(
            value - points[other], accuracy_of(cut(dense, plan)) - points[other], points["random"] - points[other]
        )

    return {
        "grasp": over(points["ticket"], ours),
        "snip": over(accuracy_of(thin), snip),
        "filters": over(points["ticket"], ours, "filters"),
        **times(start, seed, ours),
        **ranking(start, seed, ours, snip),
        **surgery(dense, seed, ours),
    }


def recipe() -> Recipe:
    """8 epochs."""
    return Recipe(steps=EPOCHS * (len(digits().calibration) // BATCH), batch=BATCH, lr=0.1, weight_decay=5e-4)


def network(seed: int) -> nn.Sequential:
    """The untrained network."""
    with seeded(seed):
        return stages_net((8, 16, 32), BLOCKS)


def planned(model: nn.Module, seed: int, **settings: Any) -> Plan:
    """Five blocks less."""
    return api.plan(
        model,
        "layer_lottery",
        sparsity=0,
        p=(GONE,),
        strict=False,
        data=digits().calibration,
        seed=seed,
        keep_scores=True,
        **settings,
    )


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy without the plan's blocks."""
    return apply_(copy.deepcopy(model), plan, other_weights=True)


def victims(plan: Plan) -> list[str]:
    """Names of the blocks that go."""
    return [f"{name}.{i}" for name, mask in plan.masks.items() for i, stays in enumerate(mask.tolist()) if not stays]


def zeroed(model: nn.Module, plan: Plan, kind: type[nn.Module]) -> nn.Module:
    """A copy in which the convolutions, or the norms, of the plan's blocks are zeros."""
    clone = copy.deepcopy(model)
    for name in victims(plan):
        for module in clone.get_submodule(name).modules():
            if isinstance(module, kind):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
    return clone


def times(start: nn.Module, seed: int, ours: Plan) -> dict[str, Sample]:
    """Training steps side by side."""
    other = planned(start, seed, criterion="random")
    models = {
        "dense": copy.deepcopy(start),
        "ticket": cut(start, ours),
        "zeros": zeroed(start, ours, nn.Conv2d),
        "random": cut(start, other),
    }
    (batch,) = digits().calibration.take(torch.arange(BATCH)).batches(BATCH)
    found = step_times(models, batch, recipe().make_optimizer, repeats=30)
    return {"time": Sample(*(100 * (1 - found[name] / found["dense"]) for name in ("ticket", "zeros", "random")))}


def ranking(start: nn.Module, seed: int, ours: Plan, snip: Plan) -> dict[str, Sample]:
    """Where the victims are, and whether the sign decides."""
    random = [planned(start, seed * DRAWS + draw, criterion="random") for draw in range(DRAWS)]

    def first(plan: Plan) -> float:
        return float(sum(name.startswith("1.") for name in victims(plan)))

    scores = {
        f"{name}.{i}": score
        for name, values in ours.scores.items()
        for i, score in enumerate(values.tolist())
        if score < torch.inf
    }

    def lowest(sign: int) -> set[str]:
        return set(sorted(scores, key=lambda name: sign * scores[name])[:GONE])

    def shared(one: set[str], other: set[str]) -> float:
        return float(len(one & other))

    absolute = set(sorted(scores, key=lambda name: abs(scores[name]))[:GONE])
    chance = mean(shared(set(victims(plan)), lowest(-1)) for plan in random)
    return {
        "stage": Sample(first(ours), first(snip), mean(map(first, random))),
        "sign": Sample(shared(lowest(1), lowest(-1)), shared(absolute, absolute), chance),
    }


@torch.no_grad()
def surgery(dense: nn.Module, seed: int, ours: Plan) -> dict[str, Sample]:
    """The trained network without the blocks, and what a block of the paper's networks costs."""
    images = digits().evaluation.inputs
    other = planned(dense, seed, criterion="random")
    expected = zeroed(dense, ours, nn.BatchNorm2d).eval()(images)

    def apart(model: nn.Module) -> float:
        return float((model.eval()(images) - expected).abs().max())

    missed = [abs(share - saved(blocks, how, seed)) for how in (True, False) for blocks, share in PAPER.items()]
    return {
        "equal": Sample(apart(cut(dense, ours)), apart(zeroed(dense, ours, nn.Conv2d)), apart(cut(dense, other))),
        "flops": Sample(max(missed[:2]), min(missed[2:]), min(missed[2:])),
    }


def saved(blocks: int, removed: bool, seed: int) -> float:
    """Percent of the FLOPs that go with one random block of a CIFAR ResNet, or with zeros in it."""
    model = stages_net((16, 32, 64), blocks, channels=3)
    batch = Batch((torch.rand(1, 3, 32, 32, generator=generator(seed, "image")),))
    plan = api.plan(model, "layer_lottery", sparsity=0, p=(1,), criterion="random", example=batch, seed=seed)
    smaller = cut(model, plan) if removed else zeroed(model, plan, nn.Conv2d)
    return 100 * (1 - flops(smaller, batch) / flops(model, batch))


check = Check(CLAIMS, run, from_scratch("layer_lottery", ("flops", 0.8), 1, NORM))
