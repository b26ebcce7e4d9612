"""How long a model takes: several models in one process, interleaved, so that drift hits all alike."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.core.errors import SettingsError
from secateur.core.method import Batch
from secateur.core.progress import Progress, Silent
from secateur.data.running import bound, device_of, dtype_of, evaluating

Candidate = Callable[[], Any] | tuple[nn.Module, Batch]

MOST_ROUNDS = 10_000  # ends the measurement of work that takes next to no time


@dataclass(frozen=True)
class Latency:
    """Time of one call.

    Attributes:
        median, p10, p90: milliseconds.
        repeats, warmup: calls that were timed, and calls before them that were not.
        threads: torch's threads inside an operator.
        dtype, device: of the model; None for a plain callable.
        batch_size: samples in a call; None for a plain callable.
        throughput: samples a second (calls a second for a plain callable), from the median.
    """

    median: float
    p10: float
    p90: float
    repeats: int
    warmup: int
    threads: int
    dtype: str | None
    device: str | None
    batch_size: int | None
    throughput: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Runner:
    call: Callable[[], Any]
    devices: tuple[torch.device, ...]
    dtype: str | None = None
    device: str | None = None
    batch_size: int | None = None


def latency(
    candidates: Mapping[str, Candidate],
    *,
    repeats: int | None = None,
    warmup: int = 3,
    seconds: float = 0.5,
    minimum: int = 10,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> dict[str, Latency]:
    """Time several models or callables against each other.

    Every round calls each candidate once, in an order drawn anew, so that none always runs in the
    wake of the same other one. Models run in eval and inference mode; work queued on an accelerator
    is waited for before the clock is read.

    Args:
        candidates: name -> (model, batch), or a callable without arguments.
        repeats: rounds; None goes on until the candidates took `seconds` each on average and
            `minimum` rounds are done.
        warmup: calls of each candidate before the first timed one.
        seconds: time to spend on each candidate.
        minimum: the least number of rounds when `repeats` is None.
        clock: returns seconds.
        progress: where the rounds are reported to.

    Raises:
        SettingsError: no candidates, or a number of repeats below 1.
    """
    if not candidates or min(minimum, minimum if repeats is None else repeats) < 1 or warmup < 0:
        raise SettingsError("latency needs at least one candidate, one repeat and a warm-up of 0 or more")
    runners = {name: _runner(candidate) for name, candidate in candidates.items()}
    with contextlib.ExitStack() as stack, _reported(progress or Silent(), repeats) as bar:
        for candidate in candidates.values():
            if isinstance(candidate, tuple):
                stack.enter_context(evaluating(candidate[0]))
        stack.enter_context(torch.inference_mode())
        for runner in runners.values():
            for _ in range(warmup):
                _timed(runner, clock)
        times = _rounds(
            runners, repeats, minimum=minimum, total_seconds=seconds * len(runners), clock=clock, progress=bar
        )
    return {name: _summary(runners[name], times[name], warmup) for name in candidates}


@contextlib.contextmanager
def _reported(progress: Progress, total: int | None) -> Iterator[Progress]:
    progress.start("latency", total)
    try:
        yield progress
    finally:
        progress.finish()


def _runner(candidate: Candidate) -> _Runner:
    if not isinstance(candidate, tuple):
        available = torch.accelerator.is_available()
        current = torch.accelerator.current_accelerator() if available else None
        return _Runner(candidate, () if current is None else (current,))
    model, batch = candidate
    devices = {parameter.device for parameter in model.parameters()} | {device_of(model)}
    return _Runner(
        bound(model, batch),
        tuple(device for device in devices if device.type != "cpu"),
        dtype_of(model),
        str(device_of(model)),
        batch.samples,
    )


def _rounds(
    runners: Mapping[str, _Runner],
    repeats: int | None,
    *,
    minimum: int,
    total_seconds: float,
    clock: Callable[[], float],
    progress: Progress,
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runners}
    order, shuffle = list(runners), random.Random(0)
    spent, done = 0.0, 0
    while done < (repeats or minimum) or (repeats is None and spent < total_seconds and done < MOST_ROUNDS):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(_timed(runners[name], clock))
            spent += times[name][-1]
        done += 1
        progress.advance()
    return times


def _timed(runner: _Runner, clock: Callable[[], float]) -> float:
    _wait(runner.devices)
    start = clock()
    runner.call()
    _wait(runner.devices)
    return clock() - start


def _wait(devices: tuple[torch.device, ...]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)


def _summary(runner: _Runner, times: list[float], warmup: int) -> Latency:
    import numpy as np

    p10, median, p90 = (float(value) * 1000 for value in np.percentile(times, [10, 50, 90]))
    calls = runner.batch_size or 1
    return Latency(
        median=median,
        p10=p10,
        p90=p90,
        repeats=len(times),
        warmup=warmup,
        threads=torch.get_num_threads(),
        dtype=runner.dtype,
        device=runner.device,
        batch_size=runner.batch_size,
        throughput=1000 * calls / median if median else float("inf"),
    )
