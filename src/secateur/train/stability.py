"""Stability of a sparse network's training: to pruning and to the order of the data (Frankle et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from secateur.core.errors import SettingsError
from secateur.train.distance import angle, barrier, l2_distance
from secateur.train.loop import Fit
from secateur.train.snapshot import model_state, put_back
from secateur.train.study import Level, State, Study
from secateur.train.tickets import trained_beside


def stability(
    study: Study, dense: Level, level: Level, name: str, *, start: int, shares: Sequence[float] = (0.5,)
) -> dict[str, float]:
    """Distances of a trained sparse network to the dense one, and to itself under another order of the data.

    Args:
        study: its `fit` or its extras must know `reordered(seed)`; its extras `reestimate(model)` for networks
            with batch norm.
        dense: trained from the same state with the same order of the data.
        level: the sparse network.
        name: of the results in the ledger.
        start: optimiser step that both were trained from.
        shares: where on the line between the two orders the barrier is looked for.

    Returns:
        L2 distances and angles (degrees) over kept weights, and the barrier of the error between the two orders.
    """
    swapped = replace(study, fit=reordered(study))
    other = trained_beside(swapped, f"{name}-order", level.index, level.before, level.masks, start=start)
    height = study.ledger.once(f"{name}-barrier", lambda: _barrier(study, level, other, shares))
    return {
        "distance_to_dense": l2_distance(dense.after, level.after, level.masks),
        "angle_to_dense": angle(dense.after, level.after, level.masks),
        "distance_of_orders": l2_distance(level.after, other.after, level.masks),
        "angle_of_orders": angle(level.after, other.after, level.masks),
        "barrier_of_orders": height,
    }


def _barrier(study: Study, level: Level, other: Level, shares: Sequence[float]) -> float:
    """Of the metric turned round, or of a loss. A training of no steps is an evaluation."""
    sign = 1 if study.metric.endswith("loss") else -1

    def error(state: State) -> float:
        return sign * study.trained(state, level.masks, study.steps, study.steps)[1][study.metric]

    def reestimated(state: State) -> State:
        model = study.model()
        put_back(model, state)
        study.extras["reestimate"](model)
        return model_state(model)

    return barrier(level.after, other.after, error, reestimated if "reestimate" in study.extras else None, shares)


def reordered(study: Study, *draw: str) -> Fit:
    """The same training with another order of the data, and another one for every `draw`.

    Raises:
        SettingsError: nobody said how.
    """
    make = study.extras.get("reordered") or getattr(study.fit, "reordered", None)
    if make is None:
        raise SettingsError(
            "this needs the same training with another order of the data: give fit a method reordered(seed), or "
            "extras={'reordered': seed -> fit}"
        )
    fit: Fit = make(study.rng("order", *draw).initial_seed())
    return fit
