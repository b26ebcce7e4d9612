"""The random control's own check on structured units: repeatable, independent, exact, and worse than norm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from secateur import api, zoo
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.lab.checks._structured import (
    cut_copy,
    cut_perplexity,
    differing,
    example,
    few_windows,
    structure_of,
)
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import parameters

MODELS = ("digits-mlp", "digits-resnet", "digits-vit")
SPARSITY = 0.3
CLAIMS = {
    "same": Expectation("units on which two plans of one seed differ (baseline: of two seeds)", "== 0", "baseline"),
    "independent": Expectation(
        "share of the kept neurons that another seed keeps too, minus the density 0.5 (baseline: norm)",
        "<= 0.05",
        "baseline",
    ),
    "exact": Expectation(
        "units kept too many or too few over all sites of three networks at 30 % (baseline: multiples of 8)",
        "== 0",
        "baseline",
    ),
    "parameters": Expectation(
        "parameters of the cut networks beside the promised number (baseline: the dense networks')", "== 0", "baseline"
    ),
    "worse": Expectation(
        "perplexity at 50 % of heads and neurons, as a multiple of the L2 norm's (a control that a criterion can beat)",
        ">= 1.2",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Where there is a random control, it is a second draw."""
    mlp = zoo.load_model(MODELS[0])
    first, again, other = (random_plan(mlp, number, 0.5) for number in (seed, seed, seed + 1000))
    norm = api.plan(mlp, "channel_norm", sparsity=0.5, seed=seed, example=example(), multiple=1)
    llama, data = zoo.load_model("pydoc-llama"), few_windows(seed, 10)
    reference = cut_perplexity(llama, data, seed, "channel_norm", 0.5)
    drawn = [cut_perplexity(llama, data, number, "group_random", 0.5) / reference for number in (seed, seed + 1000)]
    miscounts = [miscount(name, seed, 1) for name in MODELS]
    dense = sum(missing for _, _, missing in miscounts)
    return {
        "same": Sample(differing(first, again), differing(first, other), differing(again, other)),
        "independent": Sample(
            abs(overlap(first, other) - 0.5), abs(overlap(norm, norm) - 0.5), abs(overlap(again, other) - 0.5)
        ),
        "exact": Sample(
            sum(units for units, _, _ in miscounts), sum(miscount(name, seed, 8)[0] for name in MODELS), 0.0
        ),
        "parameters": Sample(sum(wrong for _, wrong, _ in miscounts), dense, 0.0),
        "worse": Sample(drawn[0], 1.0, drawn[1]),
    }


def random_plan(model: nn.Module, seed: int, sparsity: float, multiple: int = 1) -> Plan:
    """Random units of a network for the digits."""
    return api.plan(model, "group_random", sparsity=sparsity, seed=seed, example=example(), multiple=multiple)


def overlap(first: Plan, second: Plan) -> float:
    """Share of the units that one plan keeps and another keeps too."""
    return (first & second).units()[0] / first.units()[0]


def miscount(name: str, seed: int, multiple: int) -> tuple[int, int, int]:
    """Units and parameters that a cut network has too many or too few, and parameters that go."""
    model = zoo.load_model(name)
    plan = random_plan(model, seed, SPARSITY, multiple)
    wrong = sum(abs(plan.kept(site) - (s.units - int(SPARSITY * s.units + 1e-9))) for site, s in plan.sites.items())
    promised = structure_of(model).parameters({site: plan.kept(site) for site in plan.sites})
    return wrong, abs(parameters(cut_copy(model, plan)) - promised), parameters(model) - promised


check = Check(CLAIMS, run)
