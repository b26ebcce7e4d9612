"""Layers that multiply their input with a weight: how weight and input look as matrices.

Letters: O outputs, I inputs of the matrix; B samples; T tokens or positions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import ModelError, NumericsError
from secateur.core.select import all_finite
from secateur.core.units import Layout, Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layout_of(module: nn.Module) -> Layout | None:
    """How the module's weight maps to `[O, I]`; None if it is no weight layer."""
    if isinstance(module, nn.Linear):
        return Layout.LINEAR
    if isinstance(module, CONVOLUTIONS):
        return Layout.CONV
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return Layout.CONV_TRANSPOSED
    # a model can only hold transformers' Conv1D if transformers has been imported already
    transformers_layers = sys.modules.get("transformers.pytorch_utils")
    if transformers_layers is not None and isinstance(module, transformers_layers.Conv1D):
        return Layout.TRANSPOSED
    return None


def to_matrix(tensor: Tensor, layout: Layout) -> Tensor:
    """A weight, mask or score of the parameter's shape as `[O, I]`; a view where possible."""
    match layout:
        case Layout.TRANSPOSED:
            return tensor.t()
        case Layout.CONV:
            return tensor.flatten(1)
        case Layout.CONV_TRANSPOSED:
            return tensor.flatten(1).t()
        case _:
            return tensor


def from_matrix(matrix: Tensor, site: Site) -> Tensor:
    """The inverse of `to_matrix`: `[O, I]` back to the site's shape, contiguous."""
    if site.layout in (Layout.TRANSPOSED, Layout.CONV_TRANSPOSED):
        matrix = matrix.t()
    return matrix.reshape(site.shape).contiguous()


@dataclass(frozen=True)
class WeightLayer:
    """One prunable weight: the site, and the module that multiplies with it."""

    site: Site
    module: nn.Module

    @property
    def name(self) -> str:
        """The parameter's qualified name."""
        return self.site.name

    @property
    def weight(self) -> Tensor:
        """The live parameter, detached."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def matrix(self) -> Tensor:
        """The weight as `[O, I]`.

        Raises:
            NumericsError: the weight holds NaN or infinity; names the layer.
        """
        weight = self.weight
        if not all_finite(weight):
            raise NumericsError(f"layer '{self.name}' has NaN or infinite weights; repair the model before pruning it")
        return to_matrix(weight, self.site.layout)

    def to_site(self, matrix: Tensor) -> Tensor:
        """`[O, I]` in the parameter's own shape."""
        return from_matrix(matrix, self.site)

    def input_key(self) -> tuple[object, ...]:
        """Layers with equal keys turn the same input tensor into the same input matrix."""
        if isinstance(self.module, TRANSPOSED_CONVOLUTIONS):
            return ("transposed",)
        if not isinstance(self.module, CONVOLUTIONS):
            return ("features",)
        conv = self.module
        return ("patches", conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.groups)

    def input_matrix(self, x: Tensor) -> Tensor:
        """The layer's input as `[T, I]`, one row per multiplication with the weight.

        Raises:
            ModelError: a grouped or transposed convolution, whose inputs are no single matrix.
        """
        if isinstance(self.module, TRANSPOSED_CONVOLUTIONS):
            raise ModelError(
                f"layer '{self.name}' is a transposed convolution; its input statistics are not defined here, "
                f"exclude it (--exclude '{self.name}')"
            )
        if not isinstance(self.module, CONVOLUTIONS):
            return x.reshape(-1, x.shape[-1])
        if self.module.groups > 1:
            raise ModelError(
                f"layer '{self.name}' is a grouped convolution ({self.module.groups} groups); its rows see different "
                f"inputs, exclude it (--exclude '{self.name}')"
            )
        return patches(self.module, x)


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """Unfold a convolution's input into `[B * positions, C * prod(kernel)]`, for 1 to 3 dimensions.

    Rows follow the output positions, columns the order of `weight.flatten(1)`.
    """
    assert isinstance(conv, CONVOLUTIONS)
    dims = len(conv.kernel_size)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    x = F.pad(x, _padding(conv), mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    for d, (kernel, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        span = (kernel - 1) * dilation + 1
        x = x.unfold(2 + d, span, stride)[..., ::dilation]
    # (B, C, *positions, *kernel) -> (B, *positions, C, *kernel)
    positions, kernel_dims = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    x = x.permute(0, *positions, 1, *kernel_dims)
    return x.reshape(-1, conv.in_channels * prod(conv.kernel_size))


def _padding(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Padding as F.pad wants it: last dimension first, (before, after) each."""
    pads: list[int] = []
    for d in reversed(range(len(conv.kernel_size))):
        if conv.padding == "valid":
            pads += [0, 0]
        elif conv.padding == "same":
            total = conv.dilation[d] * (conv.kernel_size[d] - 1)
            pads += [total // 2, total - total // 2]
        else:
            amount = conv.padding[d]
            assert isinstance(amount, int)
            pads += [amount, amount]
    return pads
