"""Ending a job by signal as an exception, so that clean-up code runs and temporary folders go."""

from __future__ import annotations

import signal
from types import FrameType

STOPPED = 130  # exit code, as shells expect after Ctrl-C


class StopRequest(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP. No `except Exception` and no library's own handling of Ctrl-C catches it."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise StopRequest(f"signal {number}")


def stop_by_exception() -> None:
    """Turn the signals that ask a process to end into `StopRequest`."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _raise)
