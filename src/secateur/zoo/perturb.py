"""Changes of a model's weights that leave its function as it is.

A small model trained from scratch has no outlier features, so criteria that look at activations and
criteria that look only at weights choose alike. After these rescalings they do not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.seeding import generator


def _factors(count: int, seed: int, *purpose: str) -> Tensor:
    """`count` factors 10^u, u uniform in [-1, 1)."""
    return 10 ** (2 * torch.rand(count, generator=generator(seed, "rescale", *purpose)) - 1)


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    factors = factors.to(linear.weight)
    linear.weight.mul_(factors[:, None])
    if linear.bias is not None:
        linear.bias.mul_(factors)


def _scale_columns(linear: nn.Linear, factors: Tensor) -> None:
    linear.weight.mul_(factors.to(linear.weight))


@torch.no_grad()
def rescale_llama(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a Llama with other weights and, up to rounding, the same logits.

    In each block: the weight of each of the two norms times s, a factor for every residual feature,
    and the columns of the projections that read the norm (q, k, v; gate, up) by s; the rows of up
    times t, a factor for every feed-forward neuron, and the columns of down by t. All factors are
    10^U(-1, 1).

    Raises:
        ModelError: the model has no blocks of Llama's shape.
    """
    clone: Any = copy.deepcopy(model)
    try:
        for index, block in enumerate(clone.model.layers):
            _rescale_block(block, seed, f"block {index}")
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no blocks as Llama's: {error}") from error
    result: nn.Module = clone
    return result


def _rescale_block(block: Any, seed: int, where: str) -> None:
    attention, mlp = block.self_attn, block.mlp
    readers = {
        "input_layernorm": (attention.q_proj, attention.k_proj, attention.v_proj),
        "post_attention_layernorm": (mlp.gate_proj, mlp.up_proj),
    }
    for name, projections in readers.items():
        norm = getattr(block, name)
        s = _factors(norm.weight.numel(), seed, where, name)
        norm.weight.mul_(s.to(norm.weight))
        for projection in projections:
            _scale_columns(projection, 1 / s)
    t = _factors(mlp.up_proj.out_features, seed, where, "neurons")
    _scale_rows(mlp.up_proj, t)
    _scale_columns(mlp.down_proj, 1 / t)


@torch.no_grad()
def rescale_mlp(model: nn.Sequential, seed: int) -> nn.Sequential:
    """A copy of a ReLU network with other weights and, up to rounding, the same logits.

    For every hidden neuron the incoming row and bias are multiplied by a factor t = 10^U(-1, 1) and
    the outgoing column is divided by it; ReLU(t x) = t ReLU(x) for t > 0.

    Raises:
        ModelError: between two linear layers stands something else than a ReLU.
    """
    clone = copy.deepcopy(model)
    before: nn.Linear | None = None
    for name, layer in clone.named_children():
        if isinstance(layer, nn.Linear):
            if before is not None:
                t = _factors(before.out_features, seed, name)
                _scale_rows(before, t)
                _scale_columns(layer, 1 / t)
            before = layer
        elif before is not None and not isinstance(layer, nn.ReLU):
            raise ModelError(f"layer '{name}' is {type(layer).__name__}; only ReLU keeps the function under rescaling")
    return clone
