"""Peak memory of a piece of work, in this process, and how it was found out."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.method import Batch
from secateur.data.running import bound, device_of, evaluating

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Memory:
    """Peak memory while the work ran.

    Attributes:
        peak: bytes in use at the highest point: weights, activations and, on a CPU, everything else
            the process holds (the interpreter and its libraries too). None where it cannot be known.
        rise: bytes of `peak` that came on top of what was in use before. None where it cannot be known.
        method: how it was measured, in words.
    """

    peak: int | None
    rise: int | None
    method: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def forward_memory(model: nn.Module, batch: Batch) -> Memory:
    """Peak memory of one forward pass in eval mode without gradients."""
    with evaluating(model):
        return peak_memory(bound(model, batch), device_of(model))


def peak_memory(work: Callable[[], Any], device: torch.device | str = "cpu", proc: Path = PROC) -> Memory:
    """Peak memory of `work()`, which is run twice: the first run makes what is made once and kept.

    On CUDA this is the allocator's peak, without the driver's own memory. On Linux it is the peak of
    resident memory, its record reset through `/proc/self/clear_refs`; other threads of the process
    count too. Where that is not permitted only the peak of the process's whole life is known, and
    `Memory.method` says so.

    Args:
        work: what to run; its result is dropped.
        device: where it works.
        proc: the process's folder in procfs.
    """
    device = torch.device(device)
    work()
    gc.collect()
    if device.type == "cuda":
        return _cuda(work, device)
    _give_back_freed_memory()
    if not _reset_peak(proc):
        work()
        return _lifetime()
    before = _status(proc, "VmRSS")
    work()
    peak = _status(proc, "VmHWM")
    return Memory(peak, max(0, peak - before), "peak resident memory of the process during the pass (VmHWM, reset)")


def _cuda(work: Callable[[], Any], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return Memory(peak, peak - before, "peak of CUDA's allocator during the pass (max_memory_allocated)")


def _give_back_freed_memory() -> None:
    # what the allocator keeps for later would hide the next rise; only glibc offers this call
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak(proc: Path) -> bool:
    """Set the record of peak resident memory to the present value; False where that is not possible."""
    try:
        with (proc / "clear_refs").open("r+b", buffering=0) as file:
            file.write(b"5")
        _status(proc, "VmHWM")
    except (OSError, KeyError):
        return False
    return True


def _status(proc: Path, field: str) -> int:
    for line in (proc / "status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def _lifetime() -> Memory:
    try:
        import resource
    except ImportError:
        return Memory(None, None, "not measured: this system tells no peak of resident memory")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = usage if sys.platform == "darwin" else usage * 1024  # macOS counts bytes, the others KiB
    return Memory(peak, None, "peak resident memory of the process's whole life so far (getrusage)")
