"""What zeros and cuts bring on this machine: measured each time, on one linear layer 1024 -> 4096."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.core.progress import Progress
from secateur.measure.latency import Latency, latency
from secateur.measure.layouts import IN, OUT, Layout, Product, has_onnxruntime, product, stored

BATCHES = (1, 16)
NOTICEABLE = 1.1  # a ratio nearer to 1 than this is called "no gain"
NOISY = 2.0  # a 90th percentile this many times the 10th is worth a warning


@dataclass(frozen=True)
class Row:
    """One layout at one batch size.

    Attributes:
        layout: how the weight is stored.
        batch: inputs in a call.
        median, p10, p90: milliseconds.
        speedup: dense float32's median over this one; above 1 is faster than dense.
    """

    layout: Layout
    batch: int
    median: float
    p10: float
    p90: float
    speedup: float


@dataclass(frozen=True)
class MachineFacts:
    """What a machine makes of sparsity.

    Attributes:
        cpu: the processor's name.
        device: where it was measured, e.g. `cpu` or `cuda`, with the accelerator's name.
        threads: torch's threads inside an operator.
        torch: torch's version.
        rows: the measurements.
        skipped: layout -> why it could not be measured here.
        sentences: the same in words, one thing each.
    """

    cpu: str
    device: str
    threads: int
    torch: str
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    sentences: tuple[str, ...]

    def speedup(self, layout: Layout, batch: int) -> float | None:
        """Speed-up over dense float32, None where it was not measured."""
        return next((row.speedup for row in self.rows if (row.layout, row.batch) == (layout, batch)), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "layer": [OUT, IN], "rows": [asdict(row) for row in self.rows]}


def probe_machine(
    seconds: float = 2.0,
    device: torch.device | str = "cpu",
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> MachineFacts:
    """Measure a linear layer with weight `[4096, 1024]` dense, sparse and cut, at batch 1 and 16.

    All layouts of a batch size are timed interleaved in this process with the present number of threads.
    Setting up takes about a second more, and on a CPU once as much again for a trial of bfloat16.

    Args:
        seconds: time to spend on the timing itself.
        device: where to measure.
        clock: returns seconds.
        progress: where the rounds are reported to.
    """
    device = torch.device(device)
    weights, skipped = _stored_weights(device)
    rows: list[Row] = []
    for batch in BATCHES:
        products: dict[str, Product] = {
            layout.value: product(layout, weight, batch, device) for layout, weight in weights.items()
        }
        share = seconds / len(BATCHES) / len(products)
        rows += _rows(latency(products, seconds=share, clock=clock, progress=progress), batch)
    return MachineFacts(
        cpu=cpu_name(),
        device=_device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        rows=tuple(rows),
        skipped=skipped,
        sentences=(*map(_sentence, rows), *_about_pattern(rows, device), *_caveats(rows, skipped)),
    )


def _stored_weights(device: torch.device) -> tuple[dict[Layout, Any], dict[str, str]]:
    weights: dict[Layout, Any] = {}
    skipped: dict[str, str] = {}
    for layout in Layout:
        if layout is Layout.ONNXRUNTIME and (device.type != "cpu" or not has_onnxruntime()):
            continue  # an extra, not a part of the comparison
        try:
            weights[layout] = stored(layout, device)
            for batch in BATCHES:
                product(layout, weights[layout], batch, device)()
        except (RuntimeError, NotImplementedError) as error:
            weights.pop(layout, None)
            skipped[layout.value] = str(error).partition("\n")[0]
    return weights, skipped


def _rows(measured: dict[str, Latency], batch: int) -> Iterator[Row]:
    dense = measured[Layout.DENSE.value].median
    for name, found in measured.items():
        speedup = dense / found.median if found.median else float("inf")
        yield Row(Layout(name), batch, found.median, found.p10, found.p90, speedup)


def _sentence(row: Row) -> str:
    if row.layout is Layout.DENSE:
        return f"{row.layout.value} takes {row.median:.3g} ms at batch {row.batch}"
    if row.speedup >= NOTICEABLE:
        verdict = "faster than dense float32"
    elif row.speedup <= 1 / NOTICEABLE:
        verdict = "slower than dense float32"
    else:
        verdict = "no gain over dense float32"
    return f"{row.layout.value}: {row.speedup:.2g}x at batch {row.batch}: {verdict}"


def _about_pattern(rows: list[Row], device: torch.device) -> Iterator[str]:
    medians = {(row.layout, row.batch): row.median for row in rows}
    if device.type != "cuda" and any(row.layout is Layout.TWO_OF_FOUR for row in rows):
        yield f"2:4 zeros were stored as CSR: torch has no kernel for the pattern on {device.type}"
        return
    for batch in BATCHES:
        dense, pattern = medians.get((Layout.BFLOAT16, batch)), medians.get((Layout.TWO_OF_FOUR, batch))
        if dense and pattern:
            yield f"2:4 zeros on their bfloat16 kernel: {dense / pattern:.2g}x at batch {batch} over dense bfloat16"


def _caveats(rows: list[Row], skipped: dict[str, str]) -> Iterator[str]:
    for name, reason in skipped.items():
        yield f"{name}: not measured here: {reason}"
    shaky = max((row.p90 / row.p10 for row in rows if row.p10), default=1.0)
    if shaky >= NOISY:
        yield (
            f"the timings vary by up to {shaky:.2g}x between the 10th and the 90th percentile: something else "
            "uses this machine, measure again when it is quiet"
        )


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system gives it; its architecture where there is no name."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
