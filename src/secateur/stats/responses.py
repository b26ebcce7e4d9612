"""Response curves: what the network's output loses when one layer alone is pruned by more and more.

Everything before the pruned layer computes what it computed before. The outputs of all weight layers in
one run are therefore kept, and a probe replays those that come before the layer under test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.core.select import all_finite
from secateur.data.running import evaluating, logits
from secateur.scores.weights import magnitude
from secateur.structure.layers import WeightLayer, layout_of


@dataclass(frozen=True)
class Curve:
    """A layer's response.

    Attributes:
        removed: weights removed at each amount d / resolution: floor(d / resolution * size), and at
            least those that were zero from the start.
        distortions: squared error of the network's output at each amount, 0 where nothing changes;
            infinity where the output is no longer finite.
    """

    removed: list[int]
    distortions: list[float]


@dataclass(frozen=True)
class Responses:
    """Curves by layer, and the layers that the forward pass never uses."""

    curves: dict[str, Curve]
    unreached: list[str]


def response_curves(
    model: nn.Module,
    layers: Mapping[str, WeightLayer],
    batches: Sequence[Batch],
    resolution: int,
    progress: Progress,
    *,
    worst_case: bool = True,
) -> Responses:
    """Zero the smallest d / resolution of each layer's weights, d = 0..resolution, and compare the outputs.

    A sample's error is the mean of the squared difference over all outputs (classes; positions and
    vocabulary for text). The model runs in eval mode; weights are put back bit for bit.

    Args:
        model: any module.
        layers: parameter name -> layer, probed one at a time, all others as they are.
        batches: calibration data.
        resolution: number of steps of the amount.
        progress: one step per layer and batch.
        worst_case: the largest error over the samples; otherwise their mean.

    Raises:
        DataError: fewer than two samples, of which neither a mean nor a worst case says anything.
        NumericsError: the unpruned model's output is NaN or infinite.
    """
    total = sum(batch.samples for batch in batches)
    if total < 2:
        raise DataError(f"response curves need at least 2 calibration samples, got {total}; give more data")
    removed = {name: _removed(layer.weight, resolution) for name, layer in layers.items()}
    found = {name: torch.zeros(resolution + 1, dtype=torch.float64) for name in layers}
    reached: set[str] = set()
    progress.start("response curves", len(batches) * len(layers))
    try:
        with evaluating(model):
            for batch in batches:
                with Probe(model, batch) as probe:
                    for name, layer in layers.items():
                        errors = probe.errors(layer, removed[name])  # [amounts, samples]
                        worst = torch.maximum(found[name], errors.amax(1))
                        found[name] = worst if worst_case else found[name] + errors.sum(1) / total
                        if probe.calls(layer) or bool(errors[-1].any()):
                            reached.add(name)
                        progress.advance()
    finally:
        progress.finish()
    curves = {name: Curve(removed[name], found[name].tolist()) for name in layers if name in reached}
    return Responses(curves, [name for name in layers if name not in reached])


def _removed(weight: Tensor, resolution: int) -> list[int]:
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    return [max(d * weight.numel() // resolution, zeros) for d in range(resolution + 1)]


@contextlib.contextmanager
def borrowed(weight: Tensor) -> Iterator[Tensor]:
    """A parameter that may be overwritten inside the block; its bits are put back afterwards."""
    kept = weight.clone()
    try:
        yield kept
    finally:
        weight.copy_(kept)


class Probe:
    """Outputs of a model on one batch while single layers are changed. Enter in eval mode without gradients."""

    def __init__(self, model: nn.Module, batch: Batch):
        self.model, self.batch = model, batch
        self.modules = [module for module in model.modules() if layout_of(module) is not None]
        self.outputs: list[Tensor] = []  # of all calls of weight layers, in order
        self.first: dict[int, int] = {}  # id(weight) -> place of its first call
        self.place = 0
        self.until = 0  # calls before this one are replayed

    def __enter__(self) -> Probe:
        self.own = [vars(module).get("forward") for module in self.modules]
        for module in self.modules:
            module.forward = partial(self._remember, module, module.forward)
        try:
            self.dense = self._run(0)
        except BaseException:
            self.__exit__()
            raise
        for module, own in zip(self.modules, self.own, strict=True):
            module.forward = partial(self._replay, own or partial(type(module).forward, module))
        if not all_finite(self.dense):
            self.__exit__()
            raise NumericsError(
                f"the output of {type(self.model).__name__} is NaN or infinite on the calibration data before "
                f"anything is pruned; check the data and the weights"
            )
        return self

    def __exit__(self, *_: object) -> None:
        for module, own in zip(self.modules, self.own, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own

    def calls(self, layer: WeightLayer) -> bool:
        """Whether a module with this layer's weight was called."""
        return id(layer.module.weight) in self.first

    @torch.no_grad()
    def errors(self, layer: WeightLayer, removed: Sequence[int]) -> Tensor:
        """Per-sample errors with the given numbers of smallest weights zeroed, float64 `[amounts, samples]`."""
        weight = layer.weight
        order = magnitude(weight).reshape(-1).sort(stable=True).indices  # ties fall as in core.select
        errors = torch.zeros(len(removed), self.dense.shape[0], dtype=torch.float64)
        with borrowed(weight) as original:
            until = self._safe_start(layer)
            weight.copy_(original)
            work = original.flatten().clone()
            done = removed[0]
            for d, count in enumerate(removed):
                if count == done:  # nothing more goes than before
                    errors[d] = errors[d - 1] if d else 0
                    continue
                work[order[done:count]] = 0  # zeros from the start come first in the order
                weight.copy_(work.view_as(weight))
                errors[d] = self._error(self._run(until))
                done = count
        return errors

    def _safe_start(self, layer: WeightLayer) -> int:
        """From which call on a changed weight can matter; 0 where replaying would change the result.

        A module outside of our sight may use the weight earlier, as fused attention does.
        """
        until = self.first.get(id(layer.module.weight), 0)
        if not until:
            return 0
        # other values altogether: behind zeros, a change further up would not be seen
        layer.weight.copy_(-layer.weight.flatten().flip(0).view_as(layer.weight) / 2)
        return until if torch.equal(self._run(until), self._run(0)) else 0

    def _error(self, output: Tensor) -> Tensor:
        change = (output - self.dense).flatten(1).double().square().mean(1).cpu()
        return change.nan_to_num(nan=inf, posinf=inf)

    def _run(self, until: int) -> Tensor:
        self.place, self.until = 0, until
        return logits(self.model, self.batch)

    def _remember(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        self.first.setdefault(id(module.weight), len(self.outputs))
        self.outputs.append(output.clone())  # what follows may write into it
        return output

    def _replay(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        place, self.place = self.place, self.place + 1
        return self.outputs[place].clone() if place < self.until else forward(*args, **kwargs)
