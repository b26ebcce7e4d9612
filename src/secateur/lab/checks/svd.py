"""Factorisation's small-scale check: leading singular directions are the ones that count, and a budget is met.

The shipped digits ResNet in all three schemes; only batch-norm statistics are re-estimated afterwards, of the controls
too. Random control: as many directions of every weight, drawn at random, weights projected on them. Baseline: the
directions of the smallest singular values; for the budget the same share of every layer's ranks.

Without new statistics the channel scheme loses 10 points at 80 % of the parameters and 86 at half; with them 19 at
half, where whole channels by their norm lose 8: after training, ranks are no better than channels here. Lower
ranks need a training that prepares them (`trp`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur import api, zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.core.units import Scheme
from secateur.lab.checks._resnet_full import of_trained
from secateur.lab.checks._structured import cut_copy, example, points, recovered
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import flops, parameters
from secateur.scores.spectrum import Spectrum

PLACES = {  # scheme, share of the parameters that stays
    "channel": (Scheme.CHANNEL, 0.8),
    "spatial": (Scheme.SPATIAL, 0.8),
    "decoupled": (Scheme.DECOUPLED, 0.8),
    "channel_65": (Scheme.CHANNEL, 0.65),
    "spatial_65": (Scheme.SPATIAL, 0.65),
}
CLAIMS = {
    name: Expectation(
        f"accuracy points lost at {100 * share:g} % of the parameters, {scheme.value} scheme",
        "<= 3" if share > 0.7 else "<= 5",
        "both",
    )
    for name, (scheme, share) in PLACES.items()
} | {
    "budget": Expectation(
        "largest miss of half of the parameters or FLOPs, measured (both controls: half of every layer's ranks)",
        "<= 0.01",
        "both",
    ),
}


def plan_of(model: nn.Module, scheme: Scheme, budget: Budget) -> Plan:
    """The factorisation."""
    return api.plan(model, "svd", budget=budget, scheme=scheme.value, example=example())


def in_directions(model: nn.Module, plan: Plan, seed: int | None) -> nn.Module:
    """A copy at a plan's ranks, in random directions or, without a seed, in those of least value."""
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for addition in plan.additions:
            name = addition["module"]
            layer = clone.get_submodule(name)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weight.copy_(_elsewhere(Spectrum.of(weight, Scheme(addition["scheme"])), addition["rank"], name, seed))
    return clone


def _elsewhere(spectrum: Spectrum, rank: int, name: str, seed: int | None) -> Tensor:
    if seed is None:
        values = spectrum.values.clone()
        values[:, :-rank] = 0
        return replace(spectrum, values=values).weight
    shape = (*spectrum.values.shape, rank)
    basis = torch.linalg.qr(torch.randn(shape, generator=generator(seed, "directions", name)).double()).Q
    moved = basis @ (basis.transpose(1, 2) @ (spectrum.values.unsqueeze(2) * spectrum.right))
    return replace(spectrum, right=moved, values=torch.ones_like(spectrum.values)).weight


def share(model: nn.Module, plan: Plan, quantity: Quantity) -> float:
    """What is left of the parameters or FLOPs, by measuring both models."""
    cut = cut_copy(model, plan)
    if quantity is Quantity.PARAMETERS:
        return parameters(cut) / parameters(model)
    return flops(cut, example()) / flops(model, example())


def misses(model: nn.Module) -> tuple[float, float]:
    """Largest miss of two budgets; and of ranks that are halved everywhere."""
    half = api.plan(model, "svd", 0.0, rule="rate", amount=0.5, example=example())
    quantities = (Quantity.PARAMETERS, Quantity.FLOPS)
    ours = (abs(share(model, plan_of(model, Scheme.CHANNEL, Budget(0.5, one)), one) - 0.5) for one in quantities)
    return max(ours), max(abs(share(model, half, one) - 0.5) for one in quantities)


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed: it draws the random directions."""
    model = zoo.load_model("digits-resnet")
    dense, found = points(model), {}
    for name, (scheme, kept) in PLACES.items():
        plan = plan_of(model, scheme, Budget(kept, Quantity.PARAMETERS))
        made = cut_copy(model, plan), in_directions(model, plan, None), in_directions(model, plan, seed)
        found[name] = Sample(*(dense - points(recovered(one, seed, progress, "batchnorm")) for one in made))
    miss, even = misses(model)
    return {**found, "budget": Sample(miss, even, even)}


check = Check(CLAIMS, run, of_trained("svd"))
