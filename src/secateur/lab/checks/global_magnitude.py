"""Global magnitude's small-scale check: one global list beats layer-wise, the minimum threshold repairs collapse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur import api
from secateur.core.progress import Progress
from secateur.lab.checks._cifar import comparison
from secateur.lab.checks._digits import recovered_accuracy, trained
from secateur.lab.reproduce import Check, Expectation, Sample

WIDE = (64, 512, 512, 10)
DEEP = (64, 256, 256, 256, 64, 16, 10)
MINIMUM_WIDE, MINIMUM_DEEP = 150, 82

CLAIMS = {
    "wide": Expectation("accuracy points over layer-uniform, wide MLP at 99 %, fine-tuned", ">= 2", "both"),
    "deep": Expectation("accuracy points over layer-uniform, deep MLP at 97 %, fine-tuned", ">= 30", "both"),
    "minimum": Expectation(
        "accuracy points that the minimum threshold adds, deep MLP at 99.5 %, where a layer is nearly empty",
        ">= 3",
        "both",
    ),
    "same": Expectation(
        "weights on which plain and minimum-threshold masks differ when no layer is below it (wide MLP, 90 %)",
        "== 0",
        "both",
    ),
    "exact": Expectation("weights kept too many or too few over both models and modes", "== 0", "baseline"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baseline: layer-uniform magnitude; for `exact` the official code's counts."""
    wide, deep = trained(WIDE, seed, progress), trained(DEEP, seed, progress)

    def score(model: nn.Module, method: str, **settings: Any) -> float:
        return recovered_accuracy(model, seed, progress, method, **settings)

    uniform_wide = score(wide, "global_magnitude", sparsity=0.99, spread="uniform")
    uniform_deep = score(deep, "global_magnitude", sparsity=0.97, spread="uniform")
    plain = score(deep, "global_magnitude", sparsity=0.995, minimum=1)
    guarded = score(deep, "global_magnitude", sparsity=0.995, minimum=MINIMUM_DEEP)
    return {
        "wide": Sample(
            score(wide, "global_magnitude", sparsity=0.99) - uniform_wide,
            0.0,
            score(wide, "random", sparsity=0.99) - uniform_wide,
        ),
        "deep": Sample(
            score(deep, "global_magnitude", sparsity=0.97) - uniform_deep,
            0.0,
            score(deep, "random", sparsity=0.97) - uniform_deep,
        ),
        "minimum": Sample(guarded - plain, 0.0, score(deep, "random", sparsity=0.995) - plain),
        "same": Sample(
            differing(wide, seed, {"minimum": MINIMUM_WIDE}),
            differing(wide, seed, {"spread": "uniform"}),
            differing(wide, seed, {}, "random"),
        ),
        "exact": Sample(
            miscount(wide, 0.99, seed, minimum=0)
            + miscount(wide, 0.99, seed, minimum=MINIMUM_WIDE)
            + miscount(deep, 0.97, seed, minimum=0)
            + miscount(deep, 0.995, seed, minimum=MINIMUM_DEEP),
            miscount(wide, 0.99, seed, reference=True),
            0.0,
        ),
    }


def differing(model: nn.Module, seed: int, settings: dict[str, Any], method: str = "global_magnitude") -> int:
    """Weights on which another plan at 90 % differs from plain global magnitude."""
    plain = api.plan(model, "global_magnitude", sparsity=0.9, seed=seed)
    other = api.plan(model, method, sparsity=0.9, seed=seed, **settings)
    return sum(row["only_first"] + row["only_second"] for row in plain.diff(other))


def miscount(model: nn.Module, sparsity: float, seed: int, **settings: Any) -> int:
    """By how many weights a plan misses the asked count."""
    plan = api.plan(model, "global_magnitude", sparsity=sparsity, seed=seed, **settings)
    kept, total = plan.units()
    return abs(kept - (total - int(sparsity * total + 1e-9)))


check = Check(CLAIMS, run, comparison("global_magnitude"))
