"""Measured times that outlive the process: one file for each machine and way of running."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.measure.latency import latency
from secateur.measure.machine import cpu_name

FORMAT = 1
TOGETHER = 4  # calls that are timed against each other; the file is written after each such group
ELEMENTS = 2**26  # weights and inputs of a group's calls: 256 MB in float32
LAYER_SECONDS = 0.03
MODEL_SECONDS = 0.5

Work = tuple[nn.Module, Batch]
Timer = Callable[[Mapping[str, Work], float], Mapping[str, float]]
"""(models and their inputs, seconds for each) -> milliseconds by name."""


def undisturbed(candidates: Mapping[str, Work], seconds: float) -> dict[str, float]:
    """Milliseconds that a call takes while nothing else runs: the 10th percentile of interleaved rounds.

    What disturbs a call only ever adds to its time; the median of short calls on a shared machine is
    mostly other people's work.
    """
    measured = latency(candidates, seconds=seconds, warmup=2)
    return {name: found.p10 for name, found in measured.items()}


def cache_folder() -> Path:
    """Where measurements are kept: `SECATEUR_CACHE`, else `~/.cache/secateur`."""
    return Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur")


def machine(device: torch.device, dtype: str) -> dict[str, Any]:
    """What times depend on besides the work itself; with torch's present number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "cpu": cpu_name(),
        "device": f"{device.type} {name}".strip(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class Timings:
    """Times by name, measured once and kept in a file.

    Attributes:
        path: the file.
        times: name -> milliseconds.
        measured: how many were measured by this object rather than read.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], timer: Timer) -> None:
        digest = hashlib.blake2b(json.dumps(dict(facts), sort_keys=True).encode(), digest_size=6).hexdigest()
        self.path = folder / f"latency-{digest}.json"
        self.facts = dict(facts)
        self.timer = timer
        self.times = self._read()
        self.measured = 0

    def measure(
        self, wanted: Mapping[str, Callable[[], Work]], progress: Progress, seconds: float = LAYER_SECONDS
    ) -> None:
        """Time what is not known yet. An interrupted run keeps every group of calls that it finished.

        Args:
            wanted: name -> a function that makes the work, called right before it is timed.
            progress: told of every piece of work.
            seconds: time to spend on each.
        """
        missing = [name for name in wanted if name not in self.times]
        if not missing:
            return
        progress.start("latency table", len(missing))
        try:
            for group in _groups((name, wanted[name]()) for name in missing):
                found = self.timer(group, seconds)
                self.times.update({name: float(found[name]) for name in group})
                self.measured += len(group)
                self._write()
                progress.advance(len(group))
        finally:
            progress.finish()

    def _read(self) -> dict[str, float]:
        if not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            times = data["times"]
            if data["format"] != FORMAT or data["machine"] != self.facts or not all(map(_is_time, times.values())):
                raise ValueError("it holds something else than times of this machine")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(
                f"the latency cache '{self.path}' cannot be used ({error}); everything is measured again", stacklevel=2
            )
            return {}
        return dict(times)

    def _write(self) -> None:
        """Replace the file as a whole, so that a reader or a killed run never sees half of it."""
        data = {"format": FORMAT, "machine": self.facts, "times": self.times}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(self.path) as file:
                file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            warnings.warn(
                f"the latency cache '{self.path}' cannot be written ({error.strerror}); set SECATEUR_CACHE to a folder "
                "that can be, or everything is measured again next time",
                stacklevel=2,
            )


def _groups(work: Iterable[tuple[str, Work]]) -> Iterator[dict[str, Work]]:
    group: dict[str, Work] = {}
    for name, (model, batch) in work:
        group[name] = (model, batch)
        elements = sum(
            tensor.numel() for model, batch in group.values() for tensor in (*model.parameters(), *batch.tensors)
        )
        if len(group) == TOGETHER or elements >= ELEMENTS:
            yield group
            group = {}
    if group:
        yield group


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value > 0
