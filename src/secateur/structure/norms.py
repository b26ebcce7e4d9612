"""What a norm over the last dimension computes, found by running it: no list of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
PROBES = 8
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of others 1e-4: some norms compute in float32 anyway


@dataclass(frozen=True)
class NormForm:
    """gain * c(x) / sqrt(mean c(x)^2 + eps) + shift, where c subtracts the mean of the features or does nothing.

    Attributes:
        centred: whether c subtracts the mean: a layer norm; otherwise an RMS norm.
        gain, shift: float64 `[features]`.
        eps: added to the mean square.
    """

    centred: bool
    gain: Tensor
    shift: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of x, in float64."""
        x = x.double()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain + self.shift


def norm_form(norm: nn.Module, name: str, width: int) -> NormForm:
    """The form of a norm.

    Args:
        norm: with its weights, on any device.
        name: for the message.
        width: features it normalises.

    Raises:
        ModelError: it computes something else than a layer or RMS norm.
    """
    eps = next((value for key in EPS_NAMES if isinstance(value := getattr(norm, key, None), float)), None)
    weight, bias = _vector(norm, "weight", width), _vector(norm, "bias", width)
    like: Any = next(norm.parameters(), torch.empty(0))
    eps = float(torch.finfo(like.dtype).eps) if eps is None else eps
    gain = torch.ones(width, dtype=torch.float64, device=like.device) if weight is None else weight
    shift = torch.zeros_like(gain) if bias is None else bias
    x = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.logspace(0, 2, PROBES, dtype=torch.float64)[:, None] * eps**0.5  # near eps and far above it
    x = ((x + 0.5) * sizes).to(like.device, like.dtype)
    with torch.no_grad():
        given = norm(x).double()
    tolerance = TOLERANCE.get(like.dtype, 1e-4)
    for centred in (False, True):
        for scale in (gain, gain + 1):  # some keep the gain's distance from 1
            form = NormForm(centred, scale, shift, eps)
            if torch.allclose(form(x), given, rtol=tolerance, atol=tolerance):
                return form
    raise ModelError(
        f"'{name}' ({type(norm).__name__}) is neither a layer norm nor an RMS norm, so it cannot be folded"
    )


def _vector(norm: nn.Module, name: str, width: int) -> Tensor | None:
    value = getattr(norm, name, None)
    fits = isinstance(value, Tensor) and value.shape == (width,)
    return value.detach().double() if fits and isinstance(value, Tensor) else None
