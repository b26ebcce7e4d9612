"""Scores at initialisation from labelled samples: SNIP's connection sensitivity, GraSP's gradient flow.

Both look at a network as training will see it first: in full precision, with batch norms that normalise
by the batch (their running statistics say nothing yet), without dropout. They work on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.core.errors import DataError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.core.select import all_finite
from secateur.data.batches import balanced, drawn, joined, taken, task_loss
from secateur.data.running import device_of
from secateur.scores.weights import taylor
from secateur.stats.gradients import weight_gradients

SNIP_SAMPLES = 128
GRASP_PER_CLASS = 25
GRASP_TEMPERATURE = 200.0
CLASSES_ASSUMED = 10  # of data without class labels: as many samples as ten classes would give


def at_start(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """A copy of the model for its first step, and the batch in the copy's precision and place.

    Raises:
        DataError: one sample only, and batch norms that need two.
    """
    network = copy.deepcopy(model).eval().requires_grad_(True)
    if not any(parameter.dtype is torch.float64 for parameter in network.parameters()):
        network = network.float()
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms and batch.samples < 2:
        raise DataError("batch norms take their statistics from the batch here; give 2 samples or more")
    for norm in norms:
        norm.train()
    return network, like(network, batch)


def like(network: nn.Module, batch: Batch) -> Batch:
    """The batch on the network's device, numbers in its dtype, token ids and labels as they are."""
    dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())

    def cast(item: object) -> object:
        return item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item

    return batch.to(device_of(network)).each(cast)


def redraw_xavier(network: nn.Module, names: Sequence[str], rng: Callable[[str], torch.Generator]) -> None:
    """New Xavier-normal values for the named parameters, each from its own generator."""
    parameters = dict(network.named_parameters())
    for name in names:
        fresh = torch.empty(parameters[name].shape, dtype=parameters[name].dtype)
        nn.init.xavier_normal_(fresh, generator=rng(name))
        with torch.no_grad():
            parameters[name].copy_(fresh)


def snip(
    model: nn.Module,
    batch: Batch,
    names: Sequence[str],
    progress: Progress,
    redraw: Callable[[str], torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """|w * dL/dw| = |dL/dc| of a mask c = 1 on every weight (Lee et al. 2019, equation 6, not normalised).

    Args:
        model: at initialisation.
        batch: one labelled mini-batch, or text.
        names: parameters to score.
        progress: receives progress.
        redraw: generator per parameter; the weights are drawn anew (Xavier normal) on the copy, so
            that the scores do not depend on the scale of the given initialisation.

    Raises:
        DataError: no labels and no text.
        NumericsError: a gradient is NaN or infinite (names the layer), or there is none at all.
    """
    network, batch = at_start(model, batch)
    if redraw is not None:
        redraw_xavier(network, names, redraw)
    gradients = weight_gradients(network, [batch], names, progress)
    parameters = dict(network.named_parameters())
    return _sound({name: taylor(parameters[name].detach(), gradients[name]) for name in names})


def halves(
    batches: Sequence[Batch], per_class: int, rng: torch.Generator, by_class: bool = False
) -> tuple[Batch, Batch]:
    """A class-balanced batch of `per_class` samples of each class, in two halves with the classes mixed.

    Text has no classes: as many samples are drawn as ten classes would give.

    Args:
        batches: labelled samples, or text.
        per_class: samples of each class; a class that has fewer gives all.
        rng: draws them.
        by_class: the official order, class after class, so that each half sees half of the classes.

    Raises:
        DataError: fewer than two samples, or labels that are no class indices.
    """
    if batches[0].target is None:
        batch = drawn(batches, per_class * CLASSES_ASSUMED, rng)
        order = torch.arange(batch.samples)
    else:
        groups = balanced(batches, per_class, rng)
        batch = joined(groups)
        rank = torch.cat([torch.arange(group.samples) for group in groups])
        order = torch.arange(batch.samples) if by_class else rank.argsort(stable=True)
    if batch.samples < 2:
        raise DataError("grasp needs 2 samples or more to make two halves of; give more data")
    middle = batch.samples // 2
    return taken(batch, order[:middle]), taken(batch, order[middle:])


def grasp(
    model: nn.Module, parts: Sequence[Batch], names: Sequence[str], temperature: float = GRASP_TEMPERATURE
) -> dict[str, Tensor]:
    """Gradient flow, w * (H g): the paper's -w * (H g), of which the largest go, with the sign of "higher = keep".

    g is the gradient summed over the parts, H g the sum of the parts' Hessians times g, by a second
    backward pass through <g, gradient> with g held fixed (Wang et al. 2020, equation 8, algorithm 2).

    Args:
        model: at initialisation.
        parts: labelled batches, or text; usually two halves of one.
        names: parameters to score.
        temperature: the logits are divided by it, which flattens the softmax.

    Raises:
        DataError: no labels and no text.
        NumericsError: a product is NaN or infinite (names the layer), or all are zero.
    """
    network, _ = at_start(model, min(parts, key=lambda part: part.samples))
    parts = [like(network, part) for part in parts]
    parameters = dict(network.named_parameters())
    weights = [parameters[name] for name in names]
    # the fused attention kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        gradients = [_gradient(task_loss(network, part, temperature), weights) for part in parts]
        total = [torch.stack(pieces).sum(0) for pieces in zip(*gradients, strict=True)]
        products = [_product(task_loss(network, part, temperature), weights, total) for part in parts]
    hg = [torch.stack(pieces).sum(0) for pieces in zip(*products, strict=True)]
    scores = {name: weight.detach() * product for name, weight, product in zip(names, weights, hg, strict=True)}
    return _sound(scores)


def _gradient(value: Tensor, weights: list[nn.Parameter], graph: bool = False) -> tuple[Tensor, ...]:
    """dvalue/dw, zeros for weights that had no part in it."""
    return torch.autograd.grad(value, weights, create_graph=graph, allow_unused=True, materialize_grads=True)


def _product(loss: Tensor, weights: list[nn.Parameter], fixed: list[Tensor]) -> tuple[Tensor, ...]:
    """H v of one loss for a fixed v."""
    first = _gradient(loss, weights, graph=True)
    along = torch.stack([(a * b).sum() for a, b in zip(fixed, first, strict=True)]).sum()
    return _gradient(along, weights)


def _sound(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not any(score.any() for score in scores.values()):
        raise NumericsError("no gradient reaches any layer; check that the weights are used and the outputs vary")
    for name, score in scores.items():
        if not all_finite(score):
            raise NumericsError(f"the score of layer '{name}' is NaN or infinite on the given data")
    return dict(scores)
