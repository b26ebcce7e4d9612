"""What a training costs: time of a step, measured side by side; energy and CO2, estimated from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.data.batches import task_loss
from secateur.data.running import device_of
from secateur.measure.latency import latency

JOULES_PER_KWH = 3.6e6
Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def step_times(
    models: Mapping[str, nn.Module],
    batch: Batch,
    optimizers: Optimizers,
    *,
    repeats: int = 20,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Median milliseconds of one training step of each model: forward, backward, optimiser.

    The steps take turns, so that whatever else the machine does hits all alike. The learning rate is 0: what is
    learnt does not matter for the time, and nothing can diverge. The models' batch-norm statistics change.

    Args:
        models: name -> model; left in train mode, with gradients.
        batch: labelled samples or text.
        optimizers: model -> its optimiser.
        repeats: timed steps of each.
        progress: receives progress.
    """
    steps = {name: _step(model, batch, optimizers(model)) for name, model in models.items()}
    found = latency(dict(steps), repeats=repeats, warmup=2, progress=progress)
    return {name: one.median for name, one in found.items()}


def _step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    moved = batch.to(device_of(model))
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad()
            torch.autograd.backward(task_loss(model, moved))
            optimizer.step()

    return step


@dataclass(frozen=True)
class Energy:
    """An estimate: time of computing times the power that the machine is said to draw.

    Attributes:
        kwh: energy.
        co2: kilograms of CO2 equivalents.
    """

    kwh: float
    co2: float


def energy(seconds: float, watts: float, grid: float) -> Energy:
    """Energy of a computation, and what the grid emits for it.

    Args:
        seconds: how long it takes.
        watts: power drawn meanwhile.
        grid: kilograms of CO2 equivalents per kWh.
    """
    kwh = seconds * watts / JOULES_PER_KWH
    return Energy(kwh, kwh * grid)
