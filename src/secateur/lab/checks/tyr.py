"""Tyr-the-Pruner's small-scale check: compensation against zeroing, search against even shares, budgets kept.

One matrix as in the paper's notes: 64 correlated inputs, 32 outputs, 32 inputs kept. Then half of the heads and
neurons of the shipped Llama (dense perplexity 4.02): zeroing what the even local pruning removes leaves 7.9, local
pruning about 6.0, the search about 5.5. The search is two iterations of 8 generations with 16 offspring, stages of
4 and of all 64 calibration windows; with all of them in the last stage its fitness can only fall, where stages of two
windows make it jump up and down.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.data.batches import forward
from secateur.data.dataset import Dataset
from secateur.lab.checks._language import blocks_plan, llama
from secateur.lab.checks._llama_full import of_units
from secateur.lab.checks._structured import BOTH
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import perplexity
from secateur.recover.group_obs import GroupOBS, Pace
from secateur.search.fitness import divergence, positions
from secateur.shrink.apply import masked

SPARSITY = 0.5
EVEN: Mapping[str, Any] = {"iterations": 1, "generations": 0}
SEARCH: Mapping[str, Any] = {
    "iterations": 2,
    "generations": 8,
    "offspring": 16,
    "tokens": "384,6144",
    "survivors": "4,1",
    "least_neurons": 1,
}
NOISY: Mapping[str, Any] = {**SEARCH, "iterations": 1, "tokens": "192,192"}
CLAIMS = {
    "matrix": Expectation(
        "relative output error of one pruned matrix, as a fraction of what zeroing the same inputs leaves",
        "<= 0.55",
        "both",
    ),
    "magnitude": Expectation(
        "relative output error, as a fraction of least squares on the inputs with the largest weights",
        "<= 0.95",
        "both",
    ),
    "local": Expectation(
        "perplexity at 50 % of heads and neurons everywhere, as a fraction of zeroing the same units", "<= 0.9", "both"
    ),
    "search": Expectation(
        "held-out KL to the dense model after the search, as a fraction of even shares'", "<= 0.95", "both"
    ),
    "history": Expectation(
        "largest rise of fitness from one generation to the next over both iterations (baseline: two windows a stage)",
        "<= 1.03",
        "baseline",
    ),
    "conserved": Expectation(
        "units by which the heads and the neurons removed miss a half (baseline: one global ranking by norm)",
        "== 0",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Controls: zeroing, even shares; random inputs and random units."""
    model, data = llama(seed)
    even = blocks_plan(model, data, seed, "tyr", sparsity=SPARSITY, **BOTH, **EVEN)
    found = blocks_plan(model, data, seed, "tyr", sparsity=SPARSITY, **BOTH, **SEARCH)
    noisy = blocks_plan(model, data, seed, "tyr", sparsity=SPARSITY, **BOTH, **NOISY)
    ranked = blocks_plan(model, data, seed, "channel_norm", sparsity=SPARSITY, **BOTH, scope="global", normalise="none")
    chance = blocks_plan(model, data, seed, "group_random", sparsity=SPARSITY, **BOTH)
    zeroed = of_plan(model, data.evaluation, without_weights(even))[0]
    local, drift = of_plan(model, data.evaluation, even)
    random, lost = of_plan(model, data.evaluation, chance)
    return {
        **one_matrix(seed),
        "local": Sample(local / zeroed, 1.0, random / zeroed),
        "search": Sample(of_plan(model, data.evaluation, found)[1] / drift, 1.0, lost / drift),
        "history": Sample(largest_rise(found), largest_rise(noisy), largest_rise(noisy)),
        "conserved": Sample(missed(found), missed(ranked), missed(chance)),
    }


def one_matrix(seed: int) -> dict[str, Sample]:
    """Inputs of 16 sources and some noise of their own, of different scales."""
    rng = generator(seed, "one matrix")
    sources, mixing = torch.randn(2048, 16, generator=rng), torch.randn(16, 64, generator=rng)
    scales = torch.exp(0.5 * torch.randn(64, generator=rng))
    X = ((sources @ mixing / 4 + 0.35 * torch.randn(2048, 64, generator=rng)) * scales).double()
    W = torch.randn(32, 64, generator=rng)
    pruned = GroupOBS(W, X.t() @ X, torch.arange(64)[:, None]).prune(32, Pace(step=16))

    def error(weight: Tensor) -> float:
        whole = X @ W.double().t()
        return float((X @ weight.double().t() - whole).norm() / whole.norm())

    def solved(keep: Tensor) -> float:
        inputs, weight = keep.nonzero().flatten(), torch.zeros_like(W)
        weight[:, inputs] = torch.linalg.lstsq(X[:, inputs], X @ W.double().t()).solution.t().float()
        return error(weight)

    def largest(scores: Tensor) -> Tensor:
        return torch.zeros(64, dtype=torch.bool).index_fill_(0, scores.topk(32).indices, True)

    own, zeroed = error(pruned.weight), error(W * pruned.keep)
    magnitude, chance = solved(largest(W.norm(dim=0))), solved(largest(torch.rand(64, generator=rng)))
    return {
        "matrix": Sample(own / zeroed, 1.0, chance / zeroed),
        "magnitude": Sample(own / magnitude, 1.0, chance / magnitude),
    }


def without_weights(plan: Plan) -> Plan:
    """The same units gone and nothing made up for."""
    bare = copy.copy(plan)
    bare.weights = {}
    return bare


def of_plan(model: nn.Module, data: Dataset, plan: Plan) -> tuple[float, float]:
    """Held-out perplexity, and the mean KL divergence from the dense model per token, in nats."""
    dense = answers(model, data)
    with masked(model, plan):
        apart = [divergence(own, other, None) for own, other in zip(answers(model, data), dense, strict=True)]
        return perplexity(model, data).value, float(torch.cat([one.flatten() for one in apart]).mean())


@torch.no_grad()
def answers(model: nn.Module, data: Dataset) -> list[Tensor]:
    """The logits that predict something."""
    return [positions(forward(model, batch)) for batch in data.batches(16)]


def largest_rise(plan: Plan) -> float:
    """Of the fitness, generation by generation, in the order of the search."""
    search = plan.facts["search"]
    names = sorted(
        (name for name in search if name.startswith("fitness_")), key=lambda name: [*map(int, name.split("_")[1:])]
    )
    values = [search[name] for name in names]
    return max(after / before for before, after in pairwise(values))


def missed(plan: Plan) -> float:
    """Units, over both kinds, by which what went is not exactly half of them."""
    apart = 0
    for kind in ("head", "neuron"):
        sites = [name for name, site in plan.sites.items() if site.kind.value == kind]
        units = sum(plan.sites[name].units for name in sites)
        apart += abs(sum(plan.kept(name) for name in sites) - units // 2)
    return float(apart)


check = Check(CLAIMS, run, of_units("tyr"))
