"""Synaptic flow: how much of everything that runs from the inputs to the outputs runs through a weight.

Tanaka, Kunin, Yamins, Ganguli 2020 (arXiv 2006.05467): R = 1^T (prod_l |W_l|) 1 over the layers l, score
|dR/dw * w|: the sum over all paths through w of the products of the absolute weights on them. Summed
over a layer the scores of a network without branches give R, whatever the layer (conservation).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import NumericsError
from secateur.core.method import Batch
from secateur.core.select import all_finite
from secateur.data.batches import taken
from secateur.data.running import device_of, logits

SYNFLOW_ROUNDS = 100
BATCH_NORM = nn.modules.batchnorm._BatchNorm
CHANNEL_NORMS = (BATCH_NORM, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
FEATURE_NORMS = (nn.LayerNorm, nn.RMSNorm)
TABLES = (nn.Embedding, nn.EmbeddingBag)


class ChannelGain(nn.Module):
    """A batch, group or instance norm without its normalisation: a factor per channel (dimension 1)."""

    def __init__(self, factor: Tensor | None):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """`[n, channels, ...]`."""
        return x if self.factor is None else x * self.factor.view(-1, *[1] * (x.dim() - 2))


class FeatureGain(nn.Module):
    """A layer norm that divides by the root mean square, held fixed: linear, but the stream does not grow."""

    def __init__(self, factor: Tensor | None):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """`[..., features]`."""
        size = x.detach().square().mean(-1, keepdim=True).sqrt()
        x = x / size.where(size > 0, torch.ones_like(size))
        return x if self.factor is None else x * self.factor


def synaptic_flow(
    model: nn.Module, example: Batch, names: Sequence[str], reference: bool = False
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function from keep-masks to the scores of the network under them.

    The given model is not touched: its linearised copy is in float64, since R grows with every layer.

    Args:
        model: any module.
        example: what it can be run on; only the shape matters, numbers become 1.
        names: parameters to score.
        reference: as the official code: biases and running statistics take part, by absolute value.

    Raises:
        ModelError: (by the function) the copy cannot be run in float64 on ones.
        NumericsError: (by the function) the flow is too large for float64 (names the layer), or zero.
    """
    network = linearised(model, reference)
    inputs = all_ones(example).to(device_of(network))
    parameters = dict(network.named_parameters())
    weights = [parameters[name] for name in names]
    dense = [weight.detach().clone() for weight in weights]

    def score(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, weight, full in zip(names, weights, dense, strict=True):
                weight.copy_(full * masks[name].to(full.device))
        with torch.enable_grad():
            flow = logits(network, inputs).sum()
        gradients = torch.autograd.grad(flow, weights, allow_unused=True, materialize_grads=True)
        scores = [(weight.detach() * gradient).abs() for weight, gradient in zip(weights, gradients, strict=True)]
        sick = next((name for name, found in zip(names, scores, strict=True) if not all_finite(found)), None)
        if sick is not None:
            raise NumericsError(f"the synaptic flow through layer '{sick}' exceeds float64; scale the weights down")
        if not any(found.any() for found in scores):
            raise NumericsError("no synaptic flow passes any layer; a layer of zeros or an activation stops it")
        return dict(zip(names, scores, strict=True))

    return score


def all_ones(example: Batch) -> Batch:
    """One sample of ones; token ids and other whole numbers stay, their embeddings are what becomes 1."""
    sample = taken(example, torch.zeros(1, dtype=torch.int64))

    def ones(item: Any) -> Any:
        numbers = isinstance(item, Tensor) and item.is_floating_point()
        return torch.ones_like(item, dtype=torch.float64) if numbers else item

    return Batch(tuple(map(ones, sample.args)), {key: ones(value) for key, value in sample.kwargs.items()})


def linearised(model: nn.Module, reference: bool = False) -> nn.Module:
    """A float64 copy with absolute weights, no biases, linear norms and embeddings of 1.

    On positive numbers ReLU and max-pooling are then linear. Other activations stay what they are;
    where they saturate the flow ends, and scores of 0 tell.
    """
    network = copy.deepcopy(model).double().eval().requires_grad_(True)
    with torch.no_grad():
        for tensor in network.state_dict().values():  # shares memory with parameters and buffers
            if tensor.is_floating_point():
                tensor.abs_()
        for module in network.modules():
            if isinstance(module, TABLES):
                module.weight.fill_(1)
    if not reference:
        _without_biases(network)
        _without_norms(network)
    return network


@torch.no_grad()
def _without_biases(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if name.rpartition(".")[2].endswith("bias"):
            parameter.zero_()


def _without_norms(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, CHANNEL_NORMS):
                setattr(parent, name, ChannelGain(_gain(module)))
            elif isinstance(module, FEATURE_NORMS):
                setattr(parent, name, FeatureGain(_gain(module)))
            elif type(module).__name__.endswith("Norm") and not list(module.children()):
                setattr(parent, name, FeatureGain(None))  # a library's own norm; what its weight means is not known


def _gain(norm: nn.Module) -> Tensor | None:
    """|weight|, and for batch norms over the running deviation, which is 1 before training."""
    weight = norm.weight.detach() if isinstance(norm.weight, Tensor) else None
    if not isinstance(norm, BATCH_NORM) or norm.running_var is None:
        return weight
    deviation = (norm.running_var + norm.eps).sqrt()
    return 1 / deviation if weight is None else weight / deviation
