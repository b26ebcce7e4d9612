"""Channel norm's small-scale check: the small channels are the cheap ones, budgets are met, a cut is a mask.

Half of the FLOPs of the digits ResNet go, in one ranking of all layers by L2 norm over a layer's largest, and
chance is random channels at the very same widths, so that the claim is about which channels go and not how
many per layer. What shows: accuracy at once, after batch-norm statistics, after 20 steps. What does not: after
100 steps norm and chance are both at 99 %, on a task this easy; and layer by layer at half of the FLOPs (the
method's default scope) the two are within the spread of the draws. At a quarter of the FLOPs that shows too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur import api, zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.data.batches import run as outputs
from secateur.data.running import evaluating
from secateur.lab.checks._beside import beside
from secateur.lab.checks._digits import digits
from secateur.lab.checks._resnet_full import FLOPS, NORM, TRAINED, UNITS
from secateur.lab.checks._structured import DRAWS, cut_copy, example, points, recovered, same_widths, structure_of
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import flops, parameters
from secateur.shrink.reference import reference
from secateur.shrink.verify import difference

HALF, QUARTER = Budget(0.5, Quantity.FLOPS), Budget(0.25, Quantity.FLOPS)
RANKED = {"scope": "global", "normalise": "max"}
OVER = "accuracy points over random channels at the same widths, at"
CLAIMS = {
    "at_once": Expectation(f"{OVER} half of the FLOPs, right after the cut", ">= 10", "both"),
    "statistics": Expectation(f"{OVER} half of the FLOPs, batch-norm statistics re-estimated", ">= 4", "both"),
    "tuned": Expectation(f"{OVER} half of the FLOPs, 20 steps of fine-tuning", ">= 4", "both"),
    "local": Expectation(
        f"{OVER} a quarter of the FLOPs, every layer alike, batch-norm statistics re-estimated", ">= 5", "both"
    ),
    "budget": Expectation(
        "largest miss of a budget of half the FLOPs or parameters, measured on the cut model, as a fraction of the "
        "dense model (baseline: half of the channels)",
        "<= 0.01",
        "baseline",
    ),
    "cut": Expectation(
        "largest difference between the logits of the cut and of the masked model (baseline: not cut; random: cut "
        "elsewhere)",
        "<= 1e-5",
        "both",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baseline of the accuracies: random channels, every layer alike."""
    model = zoo.load_model("digits-resnet")
    ranked = channel_plan(model, "channel_norm", seed, HALF, **RANKED)
    local = channel_plan(model, "channel_norm", seed, QUARTER)
    found = accuracies(model, ranked, seed, progress)
    alike = accuracies(model, channel_plan(model, "group_random", seed, HALF), seed, progress)
    chance = chances(model, ranked, seed, progress)
    local_found = accuracies(model, local, seed, progress)["statistics"]
    local_chance = chances(model, local, seed, progress)["statistics"]
    return {
        **{name: Sample(found[name] - chance[name], alike[name] - chance[name], 0.0) for name in found},
        "local": Sample(local_found - local_chance, 0.0, 0.0),
        "budget": budgets(model, seed),
        "cut": gaps(model, ranked, channel_plan(model, "group_random", seed, HALF)),
    }


def channel_plan(model: nn.Module, method: str, seed: int, budget: Budget, **settings: Any) -> Plan:
    """A plan with any width."""
    return api.plan(model, method, budget=budget, seed=seed, example=example(), multiple=1, **settings)


def accuracies(model: nn.Module, plan: Plan, seed: int, progress: Progress) -> dict[str, float]:
    """Accuracy in percent after the cut, by claim."""
    cut = cut_copy(model, plan)
    tuned = recovered(cut, seed, progress, "finetune", steps=20, lr=0.01, optimizer="sgd")
    return {
        "at_once": points(cut),
        "statistics": points(recovered(cut, seed, progress, "batchnorm")),
        "tuned": points(tuned),
    }


def chances(model: nn.Module, plan: Plan, seed: int, progress: Progress) -> dict[str, float]:
    """Mean accuracies of random channels at a plan's widths."""
    draws = range(seed * DRAWS, (seed + 1) * DRAWS)
    # the shares decide the widths; the budget is only there because a plan needs one
    plans = [channel_plan(model, "group_random", draw, Budget(0.5), shares=same_widths(plan)) for draw in draws]
    found = [accuracies(model, plan, seed, progress) for plan in plans]
    return {name: sum(one[name] for one in found) / DRAWS for name in found[0]}


def budgets(model: nn.Module, seed: int) -> Sample:
    """The larger miss of two budgets; random channels meet them just as well."""

    def miss(method: str) -> float:
        halves = {quantity: Budget(0.5, quantity) for quantity in (Quantity.FLOPS, Quantity.PARAMETERS)}
        plans = {quantity: channel_plan(model, method, seed, budget) for quantity, budget in halves.items()}
        return max(abs(share(model, plan, quantity) - 0.5) for quantity, plan in plans.items())

    units = channel_plan(model, "channel_norm", seed, Budget(0.5))
    read_as_units = max(abs(share(model, units, q) - 0.5) for q in (Quantity.FLOPS, Quantity.PARAMETERS))
    return Sample(miss("channel_norm"), read_as_units, miss("group_random"))


def share(model: nn.Module, plan: Plan, quantity: Quantity) -> float:
    """What a cut model has left of the dense one's FLOPs or parameters, by measuring both."""
    cut = cut_copy(model, plan)
    if quantity is Quantity.PARAMETERS:
        return parameters(cut) / parameters(model)
    return flops(cut, example()) / flops(model, example())


def gaps(model: nn.Module, plan: Plan, other: Plan) -> Sample:
    """Differences of logits from the masked model's on 64 held-out images, two at a time as the structure was seen."""
    structure = structure_of(model)
    pairs = list(digits().evaluation.sample(64, 0).batches(2))
    expected = [reference(model, plan, structure, pair) for pair in pairs]

    def gap(found: nn.Module) -> float:
        with evaluating(found):
            return max(difference(wanted, outputs(found, pair)) for wanted, pair in zip(expected, pairs, strict=True))

    return Sample(gap(cut_copy(model, plan)), gap(model), gap(cut_copy(model, other)))


check = Check(CLAIMS, run, beside(TRAINED, NORM, UNITS, UNITS, FLOPS))
