"""When sparse training acts, as settings: pruning inside a window, exchanging connections until the end.

Moments up to 1 are shares of the training, above 1 optimiser steps; so a schedule stretches with the training.
"""

from __future__ import annotations

from pydantic import Field

from secateur.core.errors import SettingsError
from secateur.core.method import Settings
from secateur.train.parts import Growth, Regrow
from secateur.train.schedules import CosineRate, Window


class EventSettings(Settings):
    """How far apart events are."""

    every: float = Field(
        0.016,
        gt=0,
        description="between two events: below 1 a share of the training (1,000 of 62,500 steps), from 1 on steps",
    )

    def spacing(self, steps: int) -> int:
        """Steps between two events."""
        return max(1, round(self.every * steps if self.every < 1 else self.every))

    def step_of(self, moment: float, steps: int) -> int:
        """The optimiser step of a moment; shares fall on whole multiples of the spacing."""
        if moment > 1:
            return round(moment)
        every = self.spacing(steps)
        return round(moment * steps / every) * every


class PruningEvents(EventSettings):
    """The window of gradual pruning; the last event leaves the target."""

    start: float = Field(0.0, ge=0, description="first pruning event: up to 1 a share of the training, above it a step")
    stop: float = Field(0.5, gt=0, description="last pruning event: up to 1 a share of the training, above it a step")

    def pruning(self, steps: int) -> Window:
        """The window of a training of so many steps.

        Raises:
            SettingsError: it ends before it starts, or is shorter than the spacing.
        """
        first, last, every = self.step_of(self.start, steps), self.step_of(self.stop, steps), self.spacing(steps)
        if last <= first:
            raise SettingsError(
                f"pruning from start={self.start:g} to stop={self.stop:g} is from step {first} to step {last} with "
                f"events every {every} steps; stop must come after start, or every be lower"
            )
        if every > last - first:
            raise SettingsError(
                f"events every {every} steps do not fit into the pruning window from step {first} to step {last}; "
                "lower every or widen start to stop"
            )
        return Window(first, last, every)


class RegrowingEvents(EventSettings):
    """How connections are exchanged: in every layer as many come as go."""

    rate: float = Field(0.5, gt=0, le=1, description="share of a layer's survivors that is exchanged, at the start")
    last_rate: float = Field(0.005, ge=0, le=1, description="the same at the end; a half cosine over the training")
    growth: Growth = Field(Growth.GRADIENT, description="connections come where: gradient, momentum or random")

    def regrowing(self, steps: int, start: int = 0, until: float = 1.0) -> Regrow:
        """The part that exchanges after every `every` steps from `start` to `until`.

        There is no event after the very last step: what comes in at zero would never be trained.

        Raises:
            SettingsError: there is no time for an event.
        """
        every = self.spacing(steps)
        last = min(self.step_of(until, steps), steps - 1)
        stop = start + (last - start) // every * every
        if stop < max(start, 1):
            raise SettingsError(
                f"connections would be exchanged every {every} steps from step {start} on, but there is no such event "
                f"up to step {last} of {steps}; lower every or train longer"
            )
        return Regrow(CosineRate(self.rate, self.last_rate, steps), Window(start, stop, every), self.growth)
