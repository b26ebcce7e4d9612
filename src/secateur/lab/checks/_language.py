"""What the checks on the shipped Llama share."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur import api, zoo
from secateur.core.plan import Plan
from secateur.data.dataset import Splits
from secateur.measure import perplexity
from secateur.shrink.apply import masked

LAYERS = ("model.layers.*",)


def llama(seed: int) -> tuple[nn.Module, Splits]:
    """The shipped Llama with 64 calibration windows drawn by `seed` and the fixed 160 evaluation windows."""
    return zoo.load_model("pydoc-llama"), zoo.load_data("pydoc", seed=seed)


def blocks_plan(model: nn.Module, data: Splits, seed: int, method: str, **settings: Any) -> Plan:
    """A plan on the linear layers of the blocks, calibrated on `data`."""
    return api.plan(model, method, data=data.calibration, seed=seed, include=LAYERS, **settings)


def pruned_perplexity(model: nn.Module, data: Splits, seed: int, method: str, **settings: Any) -> float:
    """Held-out perplexity under a plan of `blocks_plan`."""
    with masked(model, blocks_plan(model, data, seed, method, **settings)):
        return perplexity(model, data.evaluation).value


def magnitude(model: nn.Module, data: Splits, seed: int, **budget: Any) -> float:
    """Held-out perplexity after magnitude pruning, every layer alike."""
    return pruned_perplexity(model, data, seed, "global_magnitude", spread="uniform", **budget)
