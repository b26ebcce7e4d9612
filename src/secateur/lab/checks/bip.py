"""BiP's small-scale check: at 1 % kept, without fine-tuning, far above HYDRA and magnitudes, level with many rounds.

A 64-128-128-10 network, trained for 20 epochs of the digits. Everything then gets 20 epochs of weight updates at 1 %
of the weights; BiP takes as many batches again for its scores. The rounds (20 % of the survivors each, 3 epochs after
each) need 63. The random control is a random mask with the same fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn

from secateur import api
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.lab.checks._cifar import comparison
from secateur.lab.checks._digits import digits, mlp
from secateur.lab.checks._training import accuracy_of, fitting, sparse_trained
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.shrink.apply import apply_
from secateur.train.keep import weight_masks
from secateur.train.loop import Recipe

WIDTHS = (64, 128, 128, 10)
DENSITY, BATCH = 0.01, 64
ROUND_RATE, ROUND_EPOCHS = 0.2, 3

CLAIMS = {
    "magnitude": Expectation(
        "accuracy points of BiP without fine-tuning above one-shot magnitude with 20 epochs of it, 1 % kept",
        ">= 10",
        "both",
    ),
    "hydra": Expectation("accuracy points above HYDRA (scores on frozen weights), 1 % kept", ">= 10", "both"),
    "rounds": Expectation(
        "accuracy points above iterative magnitude pruning in 21 rounds of 3 epochs, 1 % kept", ">= -2", "both"
    ),
    "updates": Expectation("weight updates as a share of those of the 21 rounds", "<= 0.5", "baseline"),
}


def recipe(epochs: float, lr: float) -> Recipe:
    """SGD with momentum 0.9 and weight decay, cosine."""
    steps = round(epochs * (len(digits().calibration) // BATCH))
    return Recipe(steps=steps, batch=BATCH, lr=lr, weight_decay=5e-4)


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baselines: magnitude, and for `updates` the rounds."""
    with seeded(seed):
        dense = mlp(WIDTHS)
    fitting(recipe(20, 0.1), seed, progress=progress)(dense)
    bip, hydra = copy.deepcopy(dense), copy.deepcopy(dense)
    sparse_trained(bip, fitting(recipe(40, 0.05), seed), "bip", 1 - DENSITY, progress, report=recipe(2, 0.05).steps)
    sparse_trained(hydra, fitting(recipe(20, 0.05), seed), "bip", 1 - DENSITY, progress, variant="hydra")
    once = one_shot(dense, "global_magnitude", seed)
    chance = one_shot(dense, "random", seed)
    rounds, updates = in_rounds(dense, seed)
    found = {name: accuracy_of(model) for name, model in (("bip", bip), ("hydra", hydra), ("rounds", rounds))}
    share = recipe(20, 0.05).steps / updates
    return {
        "magnitude": Sample(found["bip"] - once, 0.0, chance - once),
        "hydra": Sample(found["bip"] - found["hydra"], 0.0, chance - found["hydra"]),
        "rounds": Sample(found["bip"] - found["rounds"], once - found["rounds"], chance - found["rounds"]),
        "updates": Sample(share, 1.0, share),
    }


def one_shot(dense: nn.Module, method: str, seed: int) -> float:
    """Accuracy in percent after one-shot pruning and 20 epochs of fine-tuning."""
    model = copy.deepcopy(dense)
    _prune_and_train(model, DENSITY, lambda budget: api.plan(model, method, budget=budget, seed=seed), 20, seed)
    return accuracy_of(model)


def in_rounds(dense: nn.Module, seed: int) -> tuple[nn.Module, int]:
    """Iterative magnitude pruning: the network, and the updates that it took."""
    model, density, updates = copy.deepcopy(dense), 1.0, 0
    while density > DENSITY:
        density = max(DENSITY, (1 - ROUND_RATE) * density)
        updates += _prune_and_train(
            model, density, lambda budget: api.plan(model, "global_magnitude", budget=budget), ROUND_EPOCHS, seed
        )
    return model, updates


def _prune_and_train(model: nn.Module, density: float, plan: Callable[[Budget], Plan], epochs: int, seed: int) -> int:
    made = plan(Budget(density, Quantity.DENSITY, floor=1))
    fit = fitting(recipe(epochs, 0.05), seed)
    fit(apply_(model, made), weight_masks(made))
    return fit.steps


check = Check(CLAIMS, run, comparison("bip"))
