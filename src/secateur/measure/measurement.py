"""All figures of a model in one record, and two records side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.data.dataset import Dataset
from secateur.data.running import device_of, resized
from secateur.measure.evenness import Evenness, evenness
from secateur.measure.flops import CONVENTION, Flops, count
from secateur.measure.latency import Latency, latency
from secateur.measure.memory import Memory, forward_memory
from secateur.measure.quality import Quality, quality
from secateur.measure.size import nonzeros, parameters, weight_bytes
from secateur.measure.statistics import Interval, Paired, paired_quality, quality_interval

BATCH_SIZES = (1, 16)


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a model costs and how good it is. What could not be measured for want of data is None or empty.

    Attributes:
        parameters, nonzeros: tied ones once.
        sparsity: fraction of all parameters that is zero.
        weight_bytes: of a dense checkpoint.
        flops: of one sample; one multiply-add is 2 FLOPs.
        effective_flops: of one sample, if every zero weight were skipped.
        latency: batch size -> time of one call.
        memory: peak of a forward pass at the largest batch size of `latency`.
        quality: accuracy or perplexity with its per-sample values.
        interval: 95 % bootstrap interval of the quality over the samples.
        evenness: PQ indices of the non-zero weights, p=0.5, q=1.
    """

    parameters: int
    nonzeros: int
    sparsity: float
    weight_bytes: int
    flops: int | None = None
    effective_flops: int | None = None
    latency: Mapping[int, Latency] | None = None
    memory: Memory | None = None
    quality: Quality | None = None
    interval: Interval | None = None
    evenness: Evenness | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the per-sample values."""
        return {
            "parameters": self.parameters,
            "nonzeros": self.nonzeros,
            "sparsity": self.sparsity,
            "weight_bytes": self.weight_bytes,
            "flops": self.flops,
            "effective_flops": self.effective_flops,
            "flops_convention": CONVENTION,
            "latency": {str(size): found.to_json() for size, found in (self.latency or {}).items()},
            "memory": self.memory.to_json() if self.memory else None,
            "quality": self.quality.to_json() if self.quality else None,
            "interval": self.interval.to_json() if self.interval else None,
            "pq_index": self.evenness.total if self.evenness else None,
        }


@dataclass(frozen=True)
class Change:
    """One figure before and after. `ratio` is after over before, None where before is 0 or either is missing."""

    figure: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """After over before: 0.5 is half."""
        return self.after / self.before if self.before and self.after is not None else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"figure": self.figure, "before": self.before, "after": self.after, "ratio": self.ratio}


@dataclass(frozen=True)
class Comparison:
    """Two measurements side by side.

    Attributes:
        changes: one row a figure that either of the two has.
        quality: the metric's difference, after minus before, over the same samples.
    """

    changes: tuple[Change, ...]
    quality: Paired | None

    def __getitem__(self, figure: str) -> Change:
        return next(change for change in self.changes if change.figure == figure)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "changes": [change.to_json() for change in self.changes],
            "quality": self.quality.to_json() if self.quality else None,
        }


def measure(
    model: nn.Module,
    dataset: Dataset | None = None,
    batch: Batch | None = None,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seconds: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:
    """Measure one model; `measure_together` with a single name."""
    found = measure_together(
        {"model": model}, dataset, batch, batch_sizes=batch_sizes, seconds=seconds, seed=seed, progress=progress
    )
    return found["model"]


def measure_together(
    models: Mapping[str, nn.Module],
    dataset: Dataset | None = None,
    batch: Batch | None = None,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seconds: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Measure models that take the same inputs, their latencies interleaved.

    The costs are measured on samples of `batch`, or of `dataset` where there is no batch, repeated
    where there are fewer than a batch size asks for. Without either only the sizes are known.

    Args:
        models: name -> model; each stays on its device and in its mode.
        dataset: what the quality is measured on; None leaves it out.
        batch: inputs for FLOPs, latency and memory.
        batch_sizes: samples in a call, for the latency; the largest one also for the memory. Empty
            leaves both out.
        seconds: time to spend on the latency of each model and batch size.
        seed: of the bootstrap.
        progress: where long work reports to.

    Raises:
        ModelError: a model cannot be run on the data, or has no weights.
        DataError: data that does not fit the models' task, or a batch size below 1.
    """
    if any(size < 1 for size in batch_sizes):
        raise DataError(f"batch sizes must be 1 or more, got {list(batch_sizes)}")
    if batch is None and dataset is not None:
        batch = Batch((dataset.inputs[: max(batch_sizes, default=1)],))
    qualities = {name: quality(model, dataset, progress=progress) for name, model in models.items()} if dataset else {}
    work = {name: count(model, resized(batch, 1)) for name, model in models.items()} if batch else {}
    times = _latencies(models, batch, batch_sizes, seconds, progress) if batch else {}
    largest = resized(batch, max(batch_sizes)) if batch and batch_sizes else None
    memories = {name: forward_memory(model, largest) for name, model in models.items()} if largest else {}
    return {
        name: _assembled(
            model,
            work.get(name),
            times=times.get(name),
            memory=memories.get(name),
            scored=qualities.get(name),
            seed=seed,
        )
        for name, model in models.items()
    }


def _latencies(
    models: Mapping[str, nn.Module],
    batch: Batch,
    batch_sizes: Sequence[int],
    seconds: float,
    progress: Progress | None,
) -> dict[str, dict[int, Latency]]:
    found: dict[str, dict[int, Latency]] = {name: {} for name in models}
    for size in batch_sizes:
        sized = resized(batch, size)
        pairs = {name: (model, sized.to(device_of(model))) for name, model in models.items()}
        for name, time in latency(pairs, seconds=seconds, progress=progress).items():
            found[name][size] = time
    return found


def _assembled(
    model: nn.Module,
    work: Flops | None,
    *,
    times: Mapping[int, Latency] | None,
    memory: Memory | None,
    scored: Quality | None,
    seed: int,
) -> Measurement:
    total, kept = parameters(model), nonzeros(model)
    return Measurement(
        parameters=total,
        nonzeros=kept,
        sparsity=1 - kept / total if total else 0.0,
        weight_bytes=weight_bytes(model),
        flops=work.total if work else None,
        effective_flops=work.effective if work else None,
        latency=times,
        memory=memory,
        quality=scored,
        interval=quality_interval(scored, seed=seed) if scored else None,
        evenness=evenness(model),
    )


def compare(before: Measurement, after: Measurement, seed: int = 0) -> Comparison:
    """Every figure of two measurements side by side, and the quality's difference over the same samples.

    Latencies are comparable when both come from one `measure_together`.

    Raises:
        DataError: the qualities are of different metrics or numbers of samples.
    """
    first, second = _figures(before), _figures(after)
    changes = tuple(Change(name, first.get(name), second.get(name)) for name in {**first, **second})
    if before.quality is None or after.quality is None:
        return Comparison(changes, None)
    return Comparison(changes, paired_quality(before.quality, after.quality, seed=seed))


def _figures(found: Measurement) -> dict[str, float]:
    figures: dict[str, float | None] = {
        "parameters": found.parameters,
        "nonzeros": found.nonzeros,
        "weight_bytes": found.weight_bytes,
        "flops": found.flops,
        "effective_flops": found.effective_flops,
        **{f"latency_ms_batch_{size}": time.median for size, time in (found.latency or {}).items()},
        "peak_memory": found.memory.peak if found.memory else None,
        "pq_index": found.evenness.total if found.evenness else None,
    }
    if found.quality:
        figures[found.quality.metric.value] = found.quality.value
    return {name: value for name, value in figures.items() if value is not None}
