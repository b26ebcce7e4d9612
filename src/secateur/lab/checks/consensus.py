"""The consensus network's small-scale check: polarised gates agree, so the static network is the trained one.

Three stages of four residual blocks (widths 8, 16, 32; 10 blocks can have gates), 12 epochs of the digits at batch 64,
SGD 0.05 with momentum, cosine. Baselines: no polarisation at all, and for `removed` one of constant weight.
The random control removes as many random blocks (mean of ten draws), or as many random channels of every block; for
`unpolarised` both controls are the polarised network. Beside channels the baseline is the network without blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from secateur import api
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator, seeded
from secateur.data.batches import forward
from secateur.data.running import evaluating, training
from secateur.gates.polarisation import agreement
from secateur.lab.checks._digits import digits
from secateur.lab.checks._residual import Block
from secateur.lab.checks._training import accuracy_of, fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.methods.channels.consensus import ConsensusGates
from secateur.shrink.apply import apply_
from secateur.train.loop import Recipe

EPOCHS, BATCH, DRAWS = 12, 64, 10

CLAIMS = {
    "agreement": Expectation(
        "share of gates on evaluation images that equal their block's majority", ">= 0.995", "both"
    ),
    "unpolarised": Expectation("the same share where the loss has no polarisation", "<= 0.97", "both"),
    "gap": Expectation("accuracy points between the gated and the static network, either way", "<= 0.2"),
    "logits": Expectation("largest difference of logits, static network to gates held at the consensus", "<= 1e-05"),
    "accuracy": Expectation("accuracy points of the static above the ungated network", ">= -2"),
    "channel_accuracy": Expectation("the same of the network with channels cut out, from gates on channels", ">= -2"),
    "channel_logits": Expectation("as logits, of the network with channels cut out", "<= 1e-05"),
    "removed": Expectation("blocks of 10 removed, with the polarisation's weight ramped", ">= 1", "baseline"),
}


def residual_net() -> nn.Sequential:
    """Stem, three stages of four blocks, classifier."""
    stages = [
        nn.Sequential(Block(before, width), *(Block(width, width) for _ in range(3)))
        for before, width in ((8, 8), (8, 16), (16, 32))
    ]
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(stem, *stages, head)


@dataclass
class Outcome:
    """One gated training.

    Attributes:
        model: the trained network without its gates, blocks still in it.
        plan: what stays.
        agreement: of the gates on the evaluation images.
        dynamic: accuracy in percent with gates.
        held: logits of the evaluation images with gates held at the consensus.
    """

    model: nn.Module
    plan: Plan
    agreement: float
    dynamic: float
    held: Tensor

    @property
    def removed(self) -> int:
        """Blocks that go."""
        kept, total = self.plan.units()
        return total - kept

    @cached_property
    def network(self) -> nn.Module:
        """A copy without the blocks that go."""
        return apply_(copy.deepcopy(self.model), self.plan)

    @property
    def static(self) -> float:
        """Its accuracy in percent."""
        return accuracy_of(self.network)

    @property
    def difference(self) -> float:
        """Largest difference between its logits and those with gates held at the consensus."""
        return float((logits_of(self.network) - self.held).abs().max())


def logits_of(model: nn.Module) -> Tensor:
    """`[images, classes]` of the evaluation digits."""
    with evaluating(model):
        return torch.cat([forward(model, batch) for batch in digits().evaluation.batches(256)])


def recipe() -> Recipe:
    """12 epochs."""
    steps = EPOCHS * (len(digits().calibration) // BATCH)
    return Recipe(steps=steps, batch=BATCH, lr=0.05, weight_decay=1e-4)


def gated(seed: int, **settings: Any) -> Outcome:
    """Train with gates from the seed's start."""
    with seeded(seed):
        model = residual_net()
    fit = fitting(recipe(), seed)
    optimizer = fit.recipe.make_optimizer(model)
    sparsifier = api.sparsify(model, optimizer, "consensus", 0.0, steps=fit.steps, seed=seed, hidden=8, **settings)
    with training(model, seed):
        for step in range(fit.steps):
            fit.advance(model, optimizer, step, sparsifier.penalty)
    part = sparsifier.parts[0]
    assert isinstance(part, ConsensusGates)
    agreed = agreement(part.gates_on(model, digits().evaluation.batches(256)))
    dynamic = accuracy_of(model)
    hold(part)
    held = logits_of(model)
    return Outcome(model, sparsifier.finish(), agreed, dynamic, held)


@torch.no_grad()
def hold(part: ConsensusGates) -> None:
    """From now on every gate says what most samples said, whatever its input."""
    for name, rate in part.rates.items():
        part.gates[name].last.weight.zero_()
        part.gates[name].last.bias.copy_(torch.where(rate > 0.5, 5.0, -5.0))


def at_random(outcome: Outcome, seed: int, draw: int) -> Outcome:
    """The same network without as many other blocks, drawn from those that had gates."""
    plan = copy.deepcopy(outcome.plan)
    places = [
        (stack, int(name.removeprefix("open_")))
        for stack, facts in plan.facts.items()
        for name in facts
        if name.startswith("open_")
    ]
    order = torch.randperm(len(places), generator=generator(seed, "control", str(draw))).tolist()
    for mask in plan.masks.values():
        mask.fill_(True)
    for index in order[: outcome.removed]:
        stack, place = places[index]
        plan.masks[stack][place] = False
    return replace(outcome, plan=plan)


def shuffled(plan: Plan, seed: int) -> Plan:
    """As many channels of every site, but others."""
    plan = copy.deepcopy(plan)
    for name, mask in plan.masks.items():
        plan.masks[name] = mask[torch.randperm(len(mask), generator=generator(seed, "control", name))]
    return plan


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    with seeded(seed):
        dense = residual_net()
    full = fitting(recipe(), seed, progress=progress)(dense)["accuracy"]
    ours, free, constant = gated(seed), gated(seed, polarisation=0.0), gated(seed, ramp=False)
    thin = gated(seed, mode="channel")
    drawn = [at_random(ours, seed, draw) for draw in range(DRAWS)]
    other = replace(thin, plan=shuffled(thin.plan, seed))
    static, missed = ours.static, [one.static for one in drawn]
    lost = mean(abs(one - ours.dynamic) for one in missed)
    return {
        "agreement": Sample(ours.agreement, free.agreement, free.agreement),
        "unpolarised": Sample(free.agreement, ours.agreement, ours.agreement),
        "gap": Sample(abs(static - ours.dynamic), abs(free.static - free.dynamic), lost),
        "logits": Sample(ours.difference, free.difference, mean(one.difference for one in drawn)),
        "accuracy": Sample(static - full, free.static - full, mean(missed) - full),
        "channel_accuracy": Sample(thin.static - full, static - full, other.static - full),
        "channel_logits": Sample(thin.difference, ours.difference, other.difference),
        "removed": Sample(float(ours.removed), float(constant.removed), float(ours.removed)),
    }


check = Check(CLAIMS, run)
