"""Layers written as two thinner ones. Torch alone, for copies in saved folders.

A weight of low rank r is a product: the layer becomes `first` (to r features) and `second` (from them).
Letters: N outputs, C inputs, k_h x k_w kernel, r ranks.

    channel    conv C -> r with the whole kernel, then 1 x 1 conv r -> N           r (C k_h k_w + N) weights
    spatial    conv C -> r with k_h x 1, then conv r -> N with 1 x k_w             r (C k_h + N k_w)
    decoupled  1 x 1 conv C -> N r, then k_h x k_w conv of N groups, r -> 1 each   r N (C + k_h k_w)

The decoupled form is a sum of r branches of a pointwise and a depthwise convolution: side by side, output by output,
they are one grouped convolution. Linear layers have the channel form, two linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Undo = Callable[[], None]


CHANNEL, SPATIAL = "channel", "spatial"  # the third form is the decoupled one


class Factorised(nn.Module):
    """A linear layer or convolution as two; the values are to be filled in.

    Args:
        layer: what it stands for: `nn.Linear`, `nn.Conv2d` without groups, or GPT-2's transposed linear layer.
        rank: r.
        scheme: channel, spatial or decoupled.
    """

    def __init__(self, layer: nn.Module, rank: int, scheme: str) -> None:
        super().__init__()
        self.rank, self.scheme = rank, str(scheme)
        self.first, self.second = _convolutions(layer, rank, self.scheme) if _is_conv(layer) else _linear(layer, rank)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the two make together: `[N, C, k_h, k_w]`, or `[outputs, inputs]` of a linear layer."""
        first, second = self.first.weight, self.second.weight
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        if first.dim() == 2:
            return second @ first
        if self.scheme == CHANNEL:
            return torch.einsum("nr,rchw->nchw", second.flatten(1), first)
        if self.scheme == SPATIAL:
            return torch.einsum("nrw,rch->nchw", second.squeeze(2), first.squeeze(3))
        return torch.einsum("nrc,nrhw->nchw", first.view(second.shape[0], self.rank, -1), second)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which the second layer has."""
        found = self.second.bias
        return found if isinstance(found, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        """What the one layer gave."""
        found: Tensor = self.second(self.first(x))
        return found

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rank={self.rank}, scheme={self.scheme}"


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def _linear(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    plain = isinstance(layer, nn.Linear)
    outputs, inputs = weight.shape if plain else (weight.shape[1], weight.shape[0])
    like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    bias = getattr(layer, "bias", None) is not None
    return nn.Linear(inputs, rank, bias=False, **like), nn.Linear(rank, outputs, bias=bias, **like)


def _convolutions(layer: Any, rank: int, scheme: str) -> tuple[nn.Module, nn.Module]:
    inputs, outputs = layer.in_channels, layer.out_channels
    like = {"dtype": layer.weight.dtype, "device": layer.weight.device, "padding_mode": layer.padding_mode}
    bias = layer.bias is not None
    whole = _geometry(layer, (0, 1))
    if scheme == CHANNEL:
        first = nn.Conv2d(inputs, rank, bias=False, **whole, **like)
        return first, nn.Conv2d(rank, outputs, 1, bias=bias, dtype=layer.weight.dtype, device=layer.weight.device)
    if scheme == SPATIAL:
        first = nn.Conv2d(inputs, rank, bias=False, **_geometry(layer, (0,)), **like)
        return first, nn.Conv2d(rank, outputs, bias=bias, **_geometry(layer, (1,)), **like)
    pointwise = nn.Conv2d(inputs, outputs * rank, 1, bias=False, dtype=layer.weight.dtype, device=layer.weight.device)
    return pointwise, nn.Conv2d(outputs * rank, outputs, groups=outputs, bias=bias, **whole, **like)


def _geometry(layer: nn.Conv2d, sides: tuple[int, ...]) -> dict[str, Any]:
    """Kernel, stride, padding and dilation along the sides (0 height, 1 width); the other is left alone."""

    def along(values: Any, otherwise: int) -> tuple[int, int]:
        return values[0] if 0 in sides else otherwise, values[1] if 1 in sides else otherwise

    padding = layer.padding if isinstance(layer.padding, str) else along(layer.padding, 0)
    return {
        "kernel_size": along(layer.kernel_size, 1),
        "stride": along(layer.stride, 1),
        "padding": padding,
        "dilation": along(layer.dilation, 1),
    }


def attach_factors(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Put two layers in the place of one: `{"kind": "factorised", "module", "rank", "scheme"}`."""
    owner, _, leaf = addition["module"].rpartition(".")
    parent, before = model.get_submodule(owner), model.get_submodule(addition["module"])
    setattr(parent, leaf, Factorised(before, addition["rank"], addition["scheme"]))
    return [lambda: setattr(parent, leaf, before)]


def factors_in(model: nn.Module) -> list[dict[str, Any]]:
    """The factorised layers that a model has, as `attach_factors` wants them."""
    return [
        {"kind": "factorised", "module": name, "rank": module.rank, "scheme": module.scheme}
        for name, module in model.named_modules()
        if isinstance(module, Factorised)
    ]
