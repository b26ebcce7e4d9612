"""What the checks of structured methods share: cut copies, their accuracy and perplexity, a rescaled CNN."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.data.dataset import Dataset, Splits
from secateur.lab.checks._digits import digits
from secateur.lab.checks._language import llama, pruned_perplexity
from secateur.measure import accuracy
from secateur.recover import Request, find
from secateur.shrink.apply import apply_
from secateur.structure.analysis import Structure, analyse

DRAWS = 4  # of random pruning, under each seed
BOTH: Mapping[str, Any] = {"kinds": "head,neuron", "multiple": 1}


def few_windows(seed: int, count: int) -> Splits:
    """`count` calibration windows of the text drawn by `seed` and the fixed evaluation windows."""
    _, data = llama(seed)
    return Splits(data.calibration.sample(count, seed), data.evaluation)


def few_images(seed: int, count: int = 256) -> Dataset:
    """`count` labelled training images drawn by `seed`."""
    return digits().calibration.sample(count, seed)


def cut_perplexity(model: nn.Module, data: Splits, seed: int, method: str, sparsity: float, **settings: Any) -> float:
    """Held-out perplexity without a share of the heads and of the neurons of every block."""
    return pruned_perplexity(model, data, seed, method, sparsity=sparsity, **{**BOTH, **settings})


def random_perplexities(model: nn.Module, data: Splits, seed: int, sparsity: float) -> list[float]:
    """The same for several draws of random heads and neurons, none of which another seed draws."""
    draws = range(seed * DRAWS, (seed + 1) * DRAWS)
    return [cut_perplexity(model, data, draw, "group_random", sparsity) for draw in draws]


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model that a plan was cut out of."""
    return apply_(copy.deepcopy(model), plan)


def points(model: nn.Module) -> float:
    """Accuracy on the held-out digits, in percent."""
    return 100 * accuracy(model.eval(), digits().evaluation).value


def recovered(model: nn.Module, seed: int, progress: Progress, recovery: str, **settings: Any) -> nn.Module:
    """A copy of a cut model after a recovery on the training digits."""
    entry = find(recovery)
    clone = copy.deepcopy(model)
    entry.run(Request(clone, Plan({}, {}), digits().calibration, seed, progress), entry.configure(settings))
    return clone


def same_widths(plan: Plan) -> str:
    """The setting `shares` that makes another method keep as many units in every site as a plan does."""
    gone = {name: site.units - plan.kept(name) for name, site in plan.sites.items()}
    # counts are rounded down, so half a unit more keeps them whole
    return ",".join(f"{name}={(gone[name] + 0.5) / site.units:.6f}" for name, site in plan.sites.items())


def differing(first: Plan, second: Plan) -> int:
    """Units on which two plans differ."""
    return sum(int((first.masks[name] != second.masks[name]).sum()) for name in first.masks)


def example() -> Batch:
    """Two digits."""
    return next(digits().evaluation.batches(2))


def structure_of(model: nn.Module) -> Structure:
    """The structure of a classifier of the digits."""
    return analyse(model, example())


@torch.no_grad()
def rescale_channels(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a CNN with other weights and, up to rounding, the same logits.

    Every channel is multiplied by t = 10^U(-1, 1) where a batch norm makes it, and divided by t where a
    convolution or linear layer reads it, also on residual streams: ReLU(t x) = t ReLU(x) for t > 0.
    """
    clone = copy.deepcopy(model)
    parameters = dict(clone.named_parameters())
    for name, site in structure_of(clone).sites.items():
        t = 10 ** (2 * torch.rand(site.units, generator=generator(seed, "rescale", name)) - 1)
        for place in site.occurrences:
            tensor = parameters.get(place.parameter)
            if tensor is not None and (tensor.dim() == 1 or place.dim == 1):
                tensor.mul_(_along(t if tensor.dim() == 1 else 1 / t, tensor.dim()))
    return clone


def _along(factors: Tensor, dims: int) -> Tensor:
    """`[n]`, or `[1, n, 1, ...]` for a weight's inputs."""
    return factors if dims == 1 else factors.view(1, -1, *[1] * (dims - 2))
