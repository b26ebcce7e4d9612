"""Several runs of the same code that wait for each other: batches that share each decision."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence, Set
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


def wait(point: str) -> None:
    """Called inside a run of `lockstep`: stop here until the point is released."""
    getcurrent().parent.switch(point)


def current() -> Hashable:
    """Which run of `lockstep` this is."""
    run: Hashable = getcurrent()
    return run


def lockstep(runs: Sequence[Callable[[], T]], release: Callable[[Set[str]], str]) -> list[T]:
    """Do all runs, one at a time, in this thread; their results in order.

    Each goes on until it ends or calls `wait`. When none can go on, `release(points)` is given the
    points at which runs are waiting, does what is due there, and names the one to go on from.
    """
    workers = [greenlet(run) for run in runs]
    waiting: dict[int, str] = {}
    results: dict[int, T] = {}

    def go_on(index: int) -> None:
        value: Any = workers[index].switch()
        if workers[index].dead:
            results[index] = value
        else:
            waiting[index] = value

    for index in range(len(workers)):
        go_on(index)
    while waiting:
        point = release(set(waiting.values()))
        for index in [index for index, where in waiting.items() if where == point]:
            del waiting[index]
            go_on(index)
    return [results[index] for index in range(len(workers))]
