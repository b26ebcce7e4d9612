"""Re-estimating batch-norm statistics after pruning: no gradients, one pass, often most of the gap."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from pydantic import Field
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.method import Settings
from secateur.core.progress import track
from secateur.core.units import UnitKind
from secateur.data.dataset import Dataset
from secateur.data.running import evaluating, logits
from secateur.recover.recovery import Recovery, Request
from secateur.structure.layers import BATCH_NORMS

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class BatchNormSettings(Settings):
    """Settings of the re-estimation."""

    batches: int = Field(16, ge=1, description="batches to average over")
    batch: int = Field(64, ge=2, description="samples per batch")


@contextlib.contextmanager
def _averaging(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Norms that forget their statistics and average over the batches that follow; momenta are put back."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _norms(model: nn.Module) -> list[BatchNorm]:
    found = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    if not found:
        raise ModelError(f"{type(model).__name__} has no batch norm to re-estimate; use --recover finetune")
    return found


def refuse(model: nn.Module, data: Dataset, removed: UnitKind) -> None:
    """Say before anything is removed that there is nothing to re-estimate.

    Raises:
        ModelError: the model has no batch norm with running statistics.
    """
    _norms(model)


def reestimate(request: Request, settings: BatchNormSettings) -> dict[str, float]:
    """Replace running means and variances by plain averages of the batches' own.

    Raises:
        ModelError: the model has no batch norm with running statistics, or does not run on the data.
    """
    norms = _norms(request.model)
    data = request.data.sample(settings.batches * settings.batch, request.seed)
    batches = [batch for batch in data.batches(settings.batch) if batch.samples > 1]
    with evaluating(request.model), _averaging(norms):
        for batch in track(batches, request.progress, "batch-norm statistics"):
            logits(request.model, batch)
    return {"norms": float(len(norms)), "samples": float(len(data))}


recovery = Recovery(
    name="batchnorm",
    title="re-estimate batch-norm statistics; seconds, no training, for networks with batch norm",
    settings=BatchNormSettings,
    run=reestimate,
    refuse=refuse,
)
