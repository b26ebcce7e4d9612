"""CFSP's small-scale check: activation norms beat weights, and budgets by importance beat even ones.

Scores inside blocks are compared at even budgets (`coarse=uniform`), budgets between blocks with one score. The
random control of the budgets gives CFSP's own widths to blocks in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.data.dataset import Splits
from secateur.lab.checks._language import blocks_plan, llama, pruned_perplexity
from secateur.lab.checks._llama_full import of_units
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import perplexity
from secateur.shrink.apply import masked

SHARES, DRAWS = (0.2, 0.4, 0.6), 3
CLAIMS = {
    "random": Expectation("perplexity at 40 % of the neurons, even budgets, as a fraction of random's mean", "< 0.7"),
    "weights": Expectation("the same as a fraction of the best score by weights alone", "< 1", "both"),
    "budgets": Expectation("perplexity at 60 %, as a fraction of that with even budgets", "< 1", "both"),
    "harmless": Expectation("at 20 % and 40 %, the larger of the two fractions", "<= 1.03"),
    "spread": Expectation(
        "largest less smallest share that a block keeps at 40 % (baseline: sums of 6144 tokens unscaled; random: even)",
        ">= 0.25",
        "both",
    ),
    "total": Expectation(
        "neurons more or less than the budget at 20, 40 and 60 % (baseline and random: multiples of 64)", "<= 4", "both"
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    model, data = llama(seed)

    def cut(sparsity: float, method: str = "cfsp", number: int = seed, **settings: Any) -> float:
        return pruned_perplexity(model, data, number, method, sparsity=sparsity, **settings)

    even = {share: cut(share, coarse="uniform") for share in SHARES}
    plans = {share: blocks_plan(model, data, seed, "cfsp", sparsity=share) for share in SHARES}
    led = {share: under(model, data, plan) for share, plan in plans.items()}
    others = {share: shuffled(model, data, seed, plans[share]) for share in SHARES}
    plain: dict[str, Any] = {"kinds": "neuron", "multiple": 1}
    chance = sum(cut(0.4, "group_random", seed * DRAWS + draw, **plain) for draw in range(DRAWS)) / DRAWS
    weights = min(
        cut(0.4, coarse="uniform", fine="mag_base"),
        cut(0.4, "channel_norm", **plain),
        cut(0.4, "channel_norm", members="producers", **plain),
    )
    return {
        "random": Sample(even[0.4] / chance, weights / chance, 1.0),
        "weights": Sample(even[0.4] / weights, 1.0, chance / weights),
        "budgets": Sample(led[0.6] / even[0.6], 1.0, others[0.6] / even[0.6]),
        "harmless": Sample(*(max(one[s] / even[s] for s in (0.2, 0.4)) for one in (led, even, others))),
        "spread": Sample(
            spread(plans[0.4]), spread(blocks_plan(model, data, seed, "cfsp", sparsity=0.4, tokens=0)), 0.0
        ),
        "total": totals(model, data, seed, plans),
    }


def under(model: nn.Module, data: Splits, plan: Plan) -> float:
    """Held-out perplexity under a plan."""
    with masked(model, plan):
        return perplexity(model, data.evaluation).value


def spread(plan: Plan) -> float:
    """Difference between the largest and the smallest share that a site keeps."""
    kept = [plan.kept(name) / site.units for name, site in plan.sites.items()]
    return max(kept) - min(kept)


def shuffled(model: nn.Module, data: Splits, seed: int, plan: Plan) -> float:
    """Perplexity with the plan's widths given to other blocks, none of them to its own."""
    names = list(plan.sites)
    shift = 1 + int(torch.randint(len(names) - 1, (1,), generator=generator(seed, "widths")))
    widths = [plan.kept(name) for name in names]
    shares = ",".join(
        f"{name}={(plan.sites[name].units - widths[(place + shift) % len(names)] + 0.5) / plan.sites[name].units:.6f}"
        for place, name in enumerate(names)
    )
    return pruned_perplexity(model, data, seed, "cfsp", sparsity=0.5, shares=shares)


def totals(model: nn.Module, data: Splits, seed: int, plans: Mapping[float, Plan]) -> Sample:
    """By how many neurons the plans miss their budgets, the worst of them."""

    def missed(plan: Plan, share: float) -> float:
        kept, everything = plan.units()
        return abs(kept - (1 - share) * everything)

    rounded = {share: blocks_plan(model, data, seed, "cfsp", sparsity=share, multiple=64) for share in plans}
    drift = max(missed(plan, share) for share, plan in rounded.items())
    return Sample(max(missed(plan, share) for share, plan in plans.items()), drift, drift)


check = Check(CLAIMS, run, of_units("cfsp"))
