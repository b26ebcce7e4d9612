"""Adapt-Pruner's small-scale check: a layer that does little loses most, and pruning in between trainings.

The third layer of the shipped Llama is made nearly an identity: what it writes into the residual stream is scaled by
0.1, and all other weights are trained for a moment. 40 % of all neurons go in ten iterations, with half of the
increment as amplitude and with all of it; ten instead of the note's twenty, and 4 layers instead of 6, save time.
The control of the sign is the released one for a distance, under which the near-identity layer keeps most.

Adapt-Accel removes half of all parameters, heads and neurons, in five stages; both ways see the same 60 batches under
one warm-stable-decay curve. Its control removes random groups.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur import api, zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.data.dataset import DataKind, Dataset
from secateur.lab.checks._llama_full import of_units
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import perplexity
from secateur.shrink.apply import masked
from secateur.train.loop import Decay, Fitting, OptimizerName, Recipe
from secateur.zoo import text

QUIET, GAIN, MENDING = 2, 0.1, 80  # the near-identity layer, how much it still writes, steps of training after that
TOKENS, CALIBRATION = 65, 64
ITERATIONS, AMPLITUDES = 25, (0.02, 0.04)
STEPS, BATCH, HALF = 60, 16, Budget(0.5, Quantity.PARAMETERS)
ADAM: Mapping[str, Any] = {"optimizer": OptimizerName.ADAMW, "betas": (0.9, 0.95), "warmup": 0.05, "clip": 1.0}
CLAIMS = {
    "quiet": Expectation(
        "neurons left in the near-identity layer, as a fraction of the other layers' mean (baseline: amplitude 0, "
        "random: the released sign for Euclidean distances)",
        "<= 0.85",
        "both",
    ),
    "fewest": Expectation(
        "other layers that keep no more neurons than the near-identity layer (the same controls)", "== 0", "both"
    ),
    "adaptive": Expectation(
        "perplexity without 40 % of the neurons at the better of two amplitudes, as a fraction of amplitude 0's",
        "<= 0.995",
        "both",
    ),
    "taylor": Expectation(
        "perplexity at amplitude 0, as a fraction of what random neurons leave", "<= 0.909", "random"
    ),
    "interleaved": Expectation(
        "perplexity after five stages of pruning and training, as a fraction of pruning once and the same training "
        "(random: five stages that remove random groups)",
        "<= 1.01",
        "random",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    model = with_quiet_layer(seed)
    uniform, *adaptive = (thinned(model, seed, amplitude=amplitude) for amplitude in (0.0, *AMPLITUDES))
    inverted = thinned(model, seed, amplitude=AMPLITUDES[0], distance="euclidean", reference=True)
    random = left(model, thinned(model, seed, amplitude=0.0, score="random"))
    found, best = left(model, uniform), min(left(model, plan) for plan in adaptive)
    once = accelerated(model, seed, stages=1)
    return {
        "quiet": Sample(*(share_of_quiet(plan) for plan in (adaptive[0], uniform, inverted))),
        "fewest": Sample(*(no_more_than_quiet(plan) for plan in (adaptive[0], uniform, inverted))),
        "adaptive": Sample(best / found, 1.0, random / found),
        "taylor": Sample(found / random, found / random, 1.0),
        "interleaved": Sample(
            accelerated(model, seed, stages=5) / once,
            1.0,
            accelerated(model, seed, stages=5, score="random", amplitude=0.0) / once,
        ),
    }


def with_quiet_layer(seed: int) -> nn.Module:
    """The shipped Llama, one layer of which hardly changes its input any more, trained to live with it."""
    model = zoo.load_model("pydoc-llama")
    block: Any = model.get_submodule(f"model.layers.{QUIET}")
    writers = (block.self_attn.o_proj.weight, block.mlp.down_proj.weight)
    with torch.no_grad():
        for weight in writers:
            weight.mul_(GAIN).requires_grad_(False)
    recipe = Recipe(steps=MENDING, batch=BATCH, lr=1e-3, **ADAM)
    Fitting(windows(MENDING * BATCH, seed, "mend"), recipe, seed=seed)(model)
    for weight in writers:
        weight.requires_grad_(True)
    return model.eval()


def windows(count: int, seed: int, purpose: str) -> Dataset:
    """Random windows of the training text."""
    stream = text.tokens(text.training_text())
    drawn = text.random_windows(stream, count, TOKENS, generator(seed, "adapt_pruner", purpose))
    return Dataset("pydoc", DataKind.TEXT, drawn)


def thinned(model: nn.Module, seed: int, **settings: Any) -> Plan:
    """A plan without 40 % of the neurons."""
    data = windows(CALIBRATION, seed, "calibration")
    asked = {"kinds": "neuron", "iterations": ITERATIONS, **settings}
    return api.plan(model, "adapt_pruner", sparsity=0.4, data=data, seed=seed, **asked)


def left(model: nn.Module, plan: Plan) -> float:
    """Held-out perplexity under a plan."""
    with masked(model, plan):
        return held_out(model)["perplexity"]


def held_out(model: nn.Module, count: int = 160) -> dict[str, float]:
    """Perplexity on the first of the fixed evaluation windows."""
    data = zoo.load_data("pydoc").evaluation
    return {"perplexity": perplexity(model, data.take(torch.arange(count)), 32).value}


def share_of_quiet(plan: Plan) -> float:
    """Neurons of the near-identity layer, as a fraction of the others' mean."""
    quiet, others = neurons(plan)
    return quiet * len(others) / sum(others)


def no_more_than_quiet(plan: Plan) -> float:
    """How many other layers keep no more neurons than it."""
    quiet, others = neurons(plan)
    return float(sum(count <= quiet for count in others))


def neurons(plan: Plan) -> tuple[int, list[int]]:
    """What the near-identity layer keeps, and what the others keep."""
    counts = [plan.kept(name) for name in plan.sites]
    return counts[QUIET], counts[:QUIET] + counts[QUIET + 1 :]


def accelerated(model: nn.Module, seed: int, **settings: Any) -> float:
    """Held-out perplexity with half of the parameters, after the whole training."""
    recipe = Recipe(steps=STEPS, batch=BATCH, lr=5e-4, decay=Decay.WSD, cooldown=0.1, last=0.1, **ADAM)
    fit = Fitting(windows(STEPS * BATCH, seed, "training"), recipe, partial(held_out, count=64), seed=seed)
    asked = {"iterations": ITERATIONS, "samples": CALIBRATION // 2, "amplitude": AMPLITUDES[0], **settings}
    found = api.study(
        partial(copy.deepcopy, model), fit, "adapt_pruner", budget=HALF, seed=seed, metric="perplexity", **asked
    )
    return float(found.summary["perplexity"])


check = Check(CLAIMS, run, of_units("adapt_pruner"))
