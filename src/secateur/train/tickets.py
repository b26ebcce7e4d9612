"""What procedures that look for sparse networks say about each of them: rows, gains, early stopping, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.core.errors import SettingsError
from secateur.train.study import Level, Masks, State, Study, masked_state


def trained_beside(study: Study, name: str, index: int, state: State, masks: Masks, *, start: int = 0) -> Level:
    """One more training from a state under masks, from step `start` to the end; from the ledger if it is there.

    Args:
        study: what to train and how.
        name: of the result in the ledger.
        index: the level that it belongs to.
        state: all parameters and buffers; masked here.
        masks: in force during the training.
        start: optimiser step that the training starts at.
    """
    before = masked_state(state, masks)

    def make() -> dict[str, Any]:
        after, metrics = study.trained(before, masks, start, study.steps)
        return {"masks": masks, "before": before, "after": after, "metrics": metrics}

    return Level(index=index, **study.ledger.once(name, make))


def level_row(study: Study, level: Level, network: str, draw: int = 0, stopping: str = "") -> dict[str, Any]:
    """One row of a procedure's table.

    Args:
        study: knows the metric.
        level: a trained network.
        network: what it is: dense, ticket, reinit ...
        draw: number of the draw, for what is drawn.
        stopping: figure that early stopping goes by; default: the metric.
    """
    return {
        "level": level.index,
        "network": network,
        "draw": draw,
        "density": level.density,
        "kept": sum(int(mask.sum()) for mask in level.masks.values()),
        "stopped_at": early_stop(level.metrics, stopping or study.metric, study.steps),
        **level.metrics,
    }


def gain(row: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> float:
    """By how much a row is better than another; a figure whose name ends in `loss` is better when lower.

    Raises:
        SettingsError: `fit` gives no such figure.
    """
    if metric not in row or metric not in other:
        raise SettingsError(f"fit gives no figure '{metric}', it gives {sorted(row)}; choose one by metric=...")
    return float(row[metric] - other[metric]) * (-1 if metric.endswith("loss") else 1)


def early_stop(metrics: Mapping[str, float], figure: str, steps: int) -> int | None:
    """The step with the best of `figure@step` and, for the last step, `figure`; the earliest of equals.

    Frankle and Carbin 2019 take the iteration of the least validation loss: a measure of learning speed.
    """
    places = {int(name.rpartition("@")[2]): value for name, value in metrics.items() if name.startswith(f"{figure}@")}
    if not places:
        return None
    if figure in metrics:
        places[steps] = metrics[figure]
    sign = 1 if figure.endswith("loss") else -1
    return min(sorted(places), key=lambda step: sign * places[step])


def dead_layers(masks: Masks) -> list[str]:
    """A sentence for every layer that keeps nothing."""
    return [f"'{name}' has no weight left: nothing passes" for name, mask in masks.items() if not bool(mask.any())]
