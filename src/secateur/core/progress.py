"""Progress of long work, reported to whoever asked: the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives the progress of named stages. The command line draws bars from it."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` is its number of steps where known."""

    def advance(self, steps: int = 1) -> None:
        """The current stage went on by `steps`."""

    def finish(self) -> None:
        """The current stage is over."""


class Silent:
    """The default: nobody listens."""

    def start(self, stage: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, steps: int = 1) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


def track(items: Iterable[T], progress: Progress, stage: str) -> Iterator[T]:
    """Yield `items` while reporting one step for each."""
    progress.start(stage, len(items) if isinstance(items, Sized) else None)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.finish()
