"""Ending a job by signal the way Ctrl-C does, so that temporary folders are removed."""

from __future__ import annotations

import signal
from types import FrameType


class TerminatedError(KeyboardInterrupt):
    """The process was asked to end (SIGTERM, SIGHUP)."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise TerminatedError(f"signal {number}")


def clean_exit_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into an exception; clean-up code then runs as for Ctrl-C."""
    signal.signal(signal.SIGTERM, _raise)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _raise)
