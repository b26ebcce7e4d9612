"""Progress bars with time left, on stderr; one line per stage where there is no terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET = 1.0  # seconds; stages that take less leave no trace in a log


class Bars:
    """Draws each stage as a bar; used as a context manager around the whole job."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.stages: list[tuple[TaskID, str, float]] = []

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def start(self, stage: str, total: int | None) -> None:
        """Add a bar."""
        self.stages.append((self.bars.add_task(stage, total=total), stage, time.monotonic()))

    def advance(self, steps: int = 1) -> None:
        """Move the innermost bar."""
        if self.stages:
            self.bars.advance(self.stages[-1][0], steps)

    def finish(self) -> None:
        """Remove the innermost bar; say how long a long stage took."""
        task, stage, began = self.stages.pop()
        self.bars.remove_task(task)
        took = time.monotonic() - began
        if took > QUIET:
            self.console.print(f"{stage}: {took:.1f} s", style="dim", highlight=False)
