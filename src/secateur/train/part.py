"""What a method does during training: parts with hook points, driven by the sparsifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.core.method import Decision

if TYPE_CHECKING:
    from secateur.train.sparsifier import Sparsifier


class Part:
    """One thing that happens while a network trains. Override the hook points that it needs.

    `run` is the sparsifier: `run.step` optimiser steps are done, `run.masks` holds the masks, `run.weight(name)` the
    weights, `run.steps` the length of the training. Order within one optimiser step: `before_batch` ->
    forward, backward -> `after_backward` -> `before_step` -> the optimiser -> `after_step`.

    Attributes:
        needs_gradients: reads `run.gradient(name)` in `after_step`; dense gradients must be there.
        has_penalty: the loss must contain `sparsifier.penalty()`.
        ready_at_end: what stays is known only when training is over; no earlier state can be the result.
        hangs: has modules of its own beside the model's, which wrappers that copy or spread the model do not know.
    """

    needs_gradients = False
    has_penalty = False
    ready_at_end = False
    hangs = False

    def start(self, run: Sparsifier) -> None:
        """Once, when the sparsifier is attached."""

    def before_batch(self, run: Sparsifier) -> None:
        """Before the next forward pass, e.g. a projection of the weights."""

    def after_backward(self, run: Sparsifier) -> None:
        """Gradients are there: edit them, add a regulariser's."""

    def before_step(self, run: Sparsifier) -> None:
        """Right before the optimiser changes weights; clipping has been done."""

    def after_step(self, run: Sparsifier) -> None:
        """The optimiser has stepped and masks are enforced; `.grad` still holds what it used."""

    def end_round(self, run: Sparsifier) -> None:
        """A round of training is over; called by procedures."""

    def finish(self, run: Sparsifier) -> None:
        """Training is over: make what was learned permanent."""

    def close(self, run: Sparsifier) -> None:
        """Take off what hangs beside the model; called in any case, also after a failure, perhaps twice."""

    def penalty(self, run: Sparsifier) -> Tensor | None:
        """A term of the loss for the batch that has just been run."""
        return None

    def decision(self, run: Sparsifier) -> Decision | None:
        """What goes where that is not masked weights, e.g. blocks."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if nothing had happened: plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
