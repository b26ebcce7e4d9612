"""SparseGPT's small-scale check: one layer against the least-squares bound, then the shipped Llama."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.core.select import keep_top
from secateur.lab.checks._language import llama, magnitude, pruned_perplexity
from secateur.lab.checks._llama_full import of_weights
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import perplexity
from secateur.recover.obs import inverse_factor, solve_on_support, sweep

CLAIMS = {
    "layer": Expectation(
        "squared output error of one 64x256 layer at 50 % on correlated inputs, as a fraction of magnitude's",
        "<= 0.65",
        "both",
    ),
    "bound": Expectation(
        "the same error as a multiple of the least-squares optimum on SparseGPT's own mask", "<= 2.5", "both"
    ),
    "sixty": Expectation("perplexity at 60 %, as a fraction of the better of magnitude and Wanda", "< 1", "both"),
    "n_of_m": Expectation("perplexity lost at 2:4, as a fraction of what Wanda loses", "< 0.5", "both"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    model, data = llama(seed)
    dense = perplexity(model, data.evaluation).value
    losses = {
        method: pruned_perplexity(model, data, seed, method, pattern="2:4") - dense
        for method in ("sparsegpt", "wanda", "random")
    }
    sixty = {m: pruned_perplexity(model, data, seed, m, sparsity=0.6) for m in ("sparsegpt", "wanda", "random")}
    best = min(sixty["wanda"], magnitude(model, data, seed, sparsity=0.6))
    layer, bound = one_layer(seed)
    return {
        "layer": layer,
        "bound": bound,
        "sixty": Sample(sixty["sparsegpt"] / best, 1.0, sixty["random"] / best),
        "n_of_m": Sample(losses["sparsegpt"] / losses["wanda"], 1.0, losses["random"] / losses["wanda"]),
    }


def one_layer(seed: int) -> tuple[Sample, Sample]:
    """Errors relative to magnitude's, and relative to least squares on SparseGPT's mask."""
    rng = generator(seed, "one layer")
    W = torch.randn(64, 256, generator=rng)
    X = torch.randn(512, 256, generator=rng) @ (torch.randn(256, 256, generator=rng) / 16)
    H = 2 * X.t() @ X

    def rule(ahead: Tensor, diagonal: Tensor) -> Tensor:
        scores = (ahead / diagonal).square().reshape(1, -1)
        return keep_top(scores, scores.shape[1] // 2).view(ahead.shape)

    def error(weight: Tensor) -> float:
        return float(((W - weight).double() @ X.t().double()).square().sum())

    solved = sweep(W, inverse_factor(H), rule)
    best = error(solve_on_support(W, H, solved.keep))
    plain = error(W * keep_top(W.abs().reshape(1, -1), W.numel() // 2).view(W.shape))
    chance = error(W * keep_top(torch.rand(1, W.numel(), generator=rng), W.numel() // 2).view(W.shape))
    found = error(solved.weight)
    return Sample(found / plain, 1.0, chance / plain), Sample(found / best, plain / best, chance / best)


check = Check(CLAIMS, run, of_weights("sparsegpt"))
