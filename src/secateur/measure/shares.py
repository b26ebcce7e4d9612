"""How many FLOPs every single weight of a layer takes part in."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from torch import nn

from secateur.core.method import Batch
from secateur.core.progress import Progress, track
from secateur.measure.flops import count
from secateur.stats.responses import borrowed
from secateur.structure.layers import WeightLayer


def weight_flops(
    model: nn.Module, layers: Mapping[str, WeightLayer], batch: Batch, progress: Progress
) -> tuple[dict[str, Fraction], int]:
    """FLOPs of one pass over `batch` by weight, and what no weight of these layers takes part in.

    A layer's FLOPs are what `measure.effective_flops` loses when all its weights become zero, so that
    the sum over kept weights plus the rest is what it will report.

    Returns:
        layer -> FLOPs a weight, and the rest (attention between activations, other layers).
    """
    prices = {}
    for name, layer in track(layers.items(), progress, "FLOPs by layer"):
        with borrowed(layer.weight):
            layer.weight.fill_(1)
            whole = count(model, batch).effective
            layer.weight.zero_()
            prices[name] = Fraction(whole - count(model, batch).effective, layer.site.units)
    in_layers = sum(price * layers[name].site.units for name, price in prices.items())
    return prices, count(model, batch).total - int(in_layers)
