"""SliceGPT's small-scale check: nothing sliced changes nothing, principal axes cost little, random axes a lot.

On the note's model slicing 10 / 25 / 40 % left perplexities of 4.11 / 4.13 / 4.22 (dense 4.09) with principal axes
and 25 / 71 / 161 with random ones. The stream of so small a model has a low rank: principal axes are nearly free,
and an error in a rotation, a norm's width or a shortcut shows at once. A second control takes the weakest features of
the stream as it stands, by the norm of all weights that use them: at the same share of the width, which leaves it fewer
parameters, and at the same number of parameters, shortcuts included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur import api, zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.progress import Progress
from secateur.data.batches import forward
from secateur.data.dataset import Splits
from secateur.lab.checks._language import llama
from secateur.lab.checks._llama_full import of_units
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import parameters, perplexity
from secateur.shrink.apply import masked

RANDOM = {"axes": "random"}
FEATURES = {"kinds": "embedding"}
CLAIMS = {
    "nothing": Expectation("largest change of a logit when nothing is sliced (baseline: 10 %)", "< 1e-3", "baseline"),
    "quarter": Expectation("perplexity at 25 %, as a multiple of the dense model's", "< 1.1", "both"),
    "two_fifths": Expectation("perplexity at 40 %, as a multiple of the dense model's", "< 1.1", "both"),
    "grouped": Expectation(
        "perplexity at 25 % where queries share keys, as a multiple of the dense one", "< 1.1", "both"
    ),
    "equal_size": Expectation(
        "perplexity with 60 % of the parameters, shortcuts counted, as a multiple of the dense model's",
        "< 1.25",
        "both",
    ),
    "chance": Expectation("perplexity at 25 % on random axes, as a multiple of the dense one", "> 5", "baseline"),
    "counted": Expectation(
        "parameters of the models at 25 % and 40 % beside those announced (baseline: beside 1 - sparsity)",
        "== 0",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed: 64 calibration windows. Baseline: without the weakest features by norm."""
    model, data = llama(seed)
    quarter, fifths, size = (_compared(model, data, seed, **budget) for budget in BUDGETS)
    return {
        "nothing": _changes(model, data, seed),
        "quarter": quarter,
        "two_fifths": fifths,
        "grouped": _compared(zoo.load_model("pydoc-llama-gqa"), data, seed, sparsity=0.25),
        "equal_size": size,
        "chance": Sample(quarter.random, quarter.value, quarter.random),
        "counted": _counts(model, data, seed),
    }


BUDGETS: tuple[dict[str, Any], ...] = (
    {"sparsity": 0.25},
    {"sparsity": 0.4},
    {"budget": Budget(0.6, Quantity.PARAMETERS)},
)


def _compared(model: nn.Module, data: Splits, seed: int, **budget: Any) -> Sample:
    """Perplexities under one budget as multiples of the dense model's."""
    dense = perplexity(model, data.evaluation).value

    def multiple(method: str, **settings: Any) -> float:
        plan = api.plan(model, method, data=data.calibration, seed=seed, **budget, **settings)
        with masked(model, plan):
            return perplexity(model, data.evaluation).value / dense

    return Sample(multiple("slicegpt"), multiple("channel_norm", **FEATURES), multiple("slicegpt", **RANDOM))


def _changes(model: nn.Module, data: Splits, seed: int) -> Sample:
    """Largest change of a logit on 32 held-out windows."""
    batch = next(data.evaluation.batches(32))

    def change(sparsity: float, **settings: Any) -> float:
        plan = api.plan(model, "slicegpt", sparsity, data=data.calibration, seed=seed, **settings)
        with torch.no_grad():
            dense = forward(model, batch)
            with masked(model, plan):
                return float((forward(model, batch) - dense).abs().max())

    return Sample(change(0.0), change(0.1), change(0.0, **RANDOM))


def _counts(model: nn.Module, data: Splits, seed: int) -> Sample:
    """Parameters of cut models beside what the plan says and beside what the sparsity seems to say."""
    dense = parameters(model)
    announced, naive = 0.0, 0.0
    for sparsity in (0.25, 0.4):
        plan = api.plan(model, "slicegpt", sparsity, data=data.calibration, seed=seed)
        (facts,) = plan.facts.values()
        with masked(model, plan):
            found = parameters(model)
        announced += abs(found - facts["parameters"])
        naive += abs(found - round((1 - sparsity) * dense))
    return Sample(announced, naive, announced)


check = Check(CLAIMS, run, of_units("slicegpt"))
