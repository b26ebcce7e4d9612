"""PAGCP's small-scale check: one trunk, three tasks; the most sensitive task decides how far a layer can go.

Four convolutions read digits turned by a multiple of 90 degrees; three heads say the digit, the turn, and where the ink
is and how much (regression, in tenths). With other images than it was trained on, layers are pruned as far as the
tolerances allow (r 0.6, T 4, no filter P: with r 0.1 and T 1.6 a net of four layers stays nearly whole). The baseline
is uniform L1 pruning, the random control random filters from all layers alike, both with at least as many FLOPs left.

A loss counts relative to the dense network's on the same images, and of the three tasks the worst one counts: at most
half of uniform pruning's in the mean over three seeds (1.52 to 3.21 with seeds 0 to 2), and less in every seed. Six
seeds show how near that is to chance: less in each of them, and in the mean 0.009 more than half.

Nothing is claimed after fine-tuning. 100 more steps of the training leave no difference that shows: with seeds 0 to 2
the worst task is then at 1.22, 1.18 and 1.93 after PAGCP (mean 1.44), at 1.17, 1.50 and 1.64 after uniform pruning
(1.44) and at 1.23, 1.31 and 1.48 after random (1.34).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import prod
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import api
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress, track
from secateur.core.seeding import generator, seeded
from secateur.data.batches import taken
from secateur.data.dataset import Dataset
from secateur.data.losses import TaskLosses, mean_losses
from secateur.data.running import evaluating, training
from secateur.lab.checks._digits import digits
from secateur.lab.checks._resnet_full import of_trained
from secateur.lab.checks._structured import DRAWS, cut_copy
from secateur.lab.reproduce import Check, Expectation, Sample

SELECTION, STEPS, BATCH = 350, 900, 64
CLAIMS = {
    "worst": Expectation(
        "worst task's relative test loss, less half of that of uniform L1 pruning at the same FLOPs", "<= 0", "both"
    ),
    "every_seed": Expectation("share of the seeds in which it is below that of uniform pruning", ">= 1", "both"),
    "guard": Expectation(
        "worst task's relative loss on the selection images, over the product of all tolerances used (baseline: with a "
        "guard on the sum of the losses; random: random filters)",
        "<= 1.000001",
        "both",
    ),
}


class Heads(nn.Module):
    """A trunk 32-48-64-64 and three heads: images `[n, 1, 8, 8]` to three tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 48, 64, 64)
        layers: list[nn.Module] = []
        for place, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if place == 1 else 1  # as good on 8x8 images, in a third of the time
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({"digit": nn.Linear(64, 10), "turn": nn.Linear(64, 4), "ink": nn.Linear(64, 3)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of digit and turn, centre and amount of ink."""
        features = self.trunk(images).mean((2, 3))
        return {name: head(features) for name, head in self.heads.items()}


def losses(output: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Cross entropy of two tasks, squared error of the third."""
    wanted = batch.targets
    return {
        "digit": F.cross_entropy(output["digit"], wanted["digit"]),
        "turn": F.cross_entropy(output["turn"], wanted["turn"]),
        "ink": F.mse_loss(output["ink"], wanted["ink"]),
    }


def summed(output: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """The sum of the three losses as one."""
    return {"sum": torch.stack(list(losses(output, batch).values())).sum()}


def tasks(data: Dataset, seed: int, name: str) -> Batch:
    """Every image turned by a random quarter, and what the heads should say."""
    assert data.targets is not None  # the digits have labels
    turns = torch.randint(4, (len(data),), generator=generator(seed, "turns", name))
    images = torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(data.inputs, turns, strict=True)])
    ink = images.mean((1, 2, 3))
    places = torch.linspace(-1, 1, 8)
    mass = images[:, 0] / images.sum((1, 2, 3)).clamp_min(1e-6)[:, None, None]
    centre = [(mass * places[:, None]).sum((1, 2)), (mass * places).sum((1, 2))]
    targets = {"digit": data.targets, "turn": turns, "ink": 10 * torch.stack([*centre, 3 * ink], 1)}
    return Batch((images,), targets=targets)


def train(model: nn.Module, data: Batch, seed: int, progress: Progress) -> None:
    """900 steps of Adam (2e-3) on the sum of the three losses, in place."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with training(model, seed):
        for step in track(range(STEPS), progress, "training three heads"):
            chosen = torch.randint(data.samples, (BATCH,), generator=generator(seed, "batch", str(step)))
            batch = taken(data, chosen)
            optimizer.zero_grad()
            torch.autograd.backward(summed(model(*batch.args), batch)["sum"])
            optimizer.step()
    model.eval()


def relative(model: nn.Module, dense: nn.Module, batch: Batch) -> float:
    """The worst task's loss over the dense network's."""
    with evaluating(model), evaluating(dense):
        now, before = (mean_losses(one, [batch], losses) for one in (model, dense))
    return max(now[name] / before[name] for name in before)


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    shuffled = digits().calibration.sample(len(digits().calibration), seed)
    order = torch.arange(len(shuffled))
    select = tasks(shuffled.take(order[:SELECTION]), seed, "selection")
    fit, test = tasks(shuffled.take(order[SELECTION:]), seed, "training"), tasks(digits().evaluation, seed, "test")
    with seeded(seed):
        model = Heads()
    train(model, fit, seed, progress)
    plan, hidden = (guarded(model, select, task_losses) for task_losses in (losses, summed))
    images = select.args[0][:2]
    even = alike(model, kept(plan), images, method="channel_norm", norm="l1", members="producers")
    draws = range(seed * DRAWS, (seed + 1) * DRAWS)
    chances = [alike(model, kept(plan), images, method="group_random", seed=draw) for draw in draws]

    def worst(one: Plan, batch: Batch) -> float:
        return relative(cut_copy(model, one), model, batch)

    uniform, chance = worst(even, test), fmean(worst(one, test) for one in chances)
    ours = worst(plan, test)
    return {
        "worst": Sample(*(one - uniform / 2 for one in (ours, uniform, chance))),
        "every_seed": Sample(float(ours < uniform), 0.0, float(chance < uniform)),
        "guard": Sample(
            worst(plan, select) / used(plan),
            worst(hidden, select) / used(hidden),
            fmean(worst(one, select) for one in chances) / used(plan),
        ),
    }


def guarded(model: nn.Module, select: Batch, task_losses: TaskLosses) -> Plan:
    """What PAGCP leaves, as far as the tolerances allow."""
    return api.plan(
        model,
        "pagcp",
        budget=Budget(0.5, Quantity.FLOPS),  # only said beside what is reached
        data=[select],
        losses=task_losses,
        tolerance=0.6,
        total_tolerance=4.0,
        top=1.0,
        stop_at_budget=False,
    )


def alike(model: nn.Module, least: float, images: Tensor, **settings: Any) -> Plan:
    """The same share of every layer gone, with as few FLOPs left as that allows, but not fewer than PAGCP leaves.

    Raises:
        BudgetError: no widths come near enough.
    """
    for more in range(20):
        budget = Budget(min(1.0, least + more / 1000), Quantity.FLOPS)
        plan = api.plan(model, budget=budget, example=images, multiple=1, **settings)
        if kept(plan) >= least - 1e-6:
            return plan
    raise BudgetError(f"no uniform widths leave {least:g} to {least + 0.02:g} of the FLOPs")


def kept(plan: Plan) -> float:
    """Share of the FLOPs that is left."""
    return next(iter(plan.facts.values()))["flops_kept"]


def used(plan: Plan) -> float:
    """Product of 1 + tolerance over the units that lost filters."""
    return prod(1 + figures["tolerance"] for figures in plan.facts.values() if "tolerance" in figures)


check = Check(CLAIMS, run, of_trained("pagcp"))
