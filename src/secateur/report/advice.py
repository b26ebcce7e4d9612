"""What to try next: one small rule for each situation, in the order the reader should think."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from secateur.core.tags import Speedup
from secateur.report.figures import percent, times
from secateur.report.record import Record

NOTICEABLE = 0.05  # relative loss of quality from which the rules speak up
SMALL = 0.01
EMPTY = 0.99  # sparsity from which a layer hardly works


def advise(record: Record) -> list[str]:
    """Sentences that follow from the record's own figures; empty where no rule applies."""
    return [sentence for rule in RULES if (sentence := rule(record))]


def came_back(record: Record) -> str | None:
    """How much of the lost quality recovery brought back, as a sentence."""
    if record.recovery is None:
        return None
    quality = record.quality
    lost, left = quality.loss(quality.pruned), quality.loss(quality.after)
    if not isfinite(left):
        return f"Recovery ({record.recovery.name}) did not bring the {quality.metric} back to a finite value."
    if lost <= 0:
        return f"Pruning cost no {quality.metric}, so there was nothing to bring back."
    if not isfinite(lost):
        return f"Recovery made an unusable model usable; {_left(left)}."
    share = (lost - left) / lost
    if share < 0:
        return f"Recovery made it worse: the loss grew from {percent(lost)} to {percent(left)}."
    return f"{percent(share)} of the lost {quality.metric} came back; {_left(left)}."


def _left(loss: float) -> str:
    if loss > 0:
        return f"{percent(loss)} of the dense model's value is still missing"
    return f"it is now {percent(-loss)} better than the dense model"


def _loss(record: Record) -> float:
    return record.quality.loss(record.quality.after)


def _lost(record: Record) -> str:
    loss = _loss(record)
    name = record.quality.metric
    return f"The {name} is {percent(loss)} worse" if isfinite(loss) else f"The {name} is no longer measurable"


def _recover_first(record: Record) -> str | None:
    if _loss(record) <= NOTICEABLE or record.recovery:
        return None
    return (
        f"{_lost(record)} and nothing was retrained: add a recovery step (--recover), "
        "a short fine-tune of the kept weights is the first thing to try."
    )


def _prune_less(record: Record) -> str | None:
    if _loss(record) <= NOTICEABLE or not record.recovery:
        return None
    return (
        f"{_lost(record)} even after recovery: recover for longer, or remove less than "
        f"{percent(record.budget.sparsity)} of the {record.budget.units}."
    )


def _look_at_activations(record: Record) -> str | None:
    zeros = record.structure in (Speedup.UNSTRUCTURED, Speedup.SEMI_STRUCTURED)
    if _loss(record) <= NOTICEABLE or record.calibration or not zeros:
        return None
    return (
        f"{record.method.name} looked at no data; a method that weighs activations (wanda) or compensates "
        "the kept weights (sparsegpt) may lose less at the same sparsity."
    )


def _relax_pattern(record: Record) -> str | None:
    if _loss(record) <= NOTICEABLE or record.structure is not Speedup.SEMI_STRUCTURED:
        return None
    return (
        "An N:M pattern binds every small group of weights: a wider one of the same sparsity (4:8 for 2:4) or "
        "unstructured sparsity loses less, at the price of the hardware that runs the pattern fast."
    )


def _cut_less_abruptly(record: Record) -> str | None:
    if _loss(record) <= NOTICEABLE or record.structure is not Speedup.STRUCTURED:
        return None
    return (
        "Cut in several smaller steps with recovery between them, or choose a smaller unit (neurons, heads, channels)."
    )


def _slower(record: Record) -> str | None:
    rows = [row for row in record.latency.rows if row.clear and row.speedup < 1] if record.latency else []
    if not rows:
        return None
    cases = ", ".join(f"{row.label} ({times(1 / row.speedup)})" for row in rows)
    return f"Measured slower than the dense model on this machine: {cases}. Do not use this result for speed here."


def _structure_for_speed(record: Record) -> str | None:
    zeros = record.structure in (Speedup.UNSTRUCTURED, Speedup.SEMI_STRUCTURED)
    if not zeros or record.latency is None or any(row.clear and row.speedup > 1 for row in record.latency.rows):
        return None
    return (
        "The zeros brought no measured speed: to be faster with ordinary kernels remove whole blocks, "
        "channels, heads or neurons."
    )


def _file_not_smaller(record: Record) -> str | None:
    file = record.sizes.file_bytes
    if file is None or record.sizes.nonzeros.kept > 0.95 or file.kept < 0.95:
        return None
    return (
        f"The file is not smaller although {percent(1 - record.sizes.nonzeros.kept)} of the weights are gone: zeros "
        "are stored like any number. Compress the file for transport, or remove whole structures."
    )


def _floor(record: Record) -> str | None:
    hollow = [layer for layer in record.layers if layer.sparsity >= EMPTY]
    if not hollow:
        return None
    others = f" and {len(hollow) - 1} more" if len(hollow) > 1 else ""
    return (
        f"{hollow[0].site}{others} kept {percent(1 - EMPTY)} or less: a floor per layer or a uniform allocation keeps "
        "every layer working."
    )


def _measure_more(record: Record) -> str | None:
    before, after = record.quality.before, record.quality.after
    if before.interval is None or after.interval is None:
        return None
    overlap = before.interval[0] <= after.interval[1] and after.interval[0] <= before.interval[1]
    if not overlap or before.value == after.value:
        return None
    return "The 95 % intervals before and after overlap: measure on more samples before relying on the difference."


def _prune_more(record: Record) -> str | None:
    if _loss(record) > SMALL:
        return None
    return (
        f"The {record.quality.metric} held: there may be room to remove more than "
        f"{percent(record.budget.sparsity)} of the {record.budget.units}."
    )


Rule = Callable[[Record], str | None]

RULES: tuple[Rule, ...] = (
    _slower,
    _recover_first,
    _prune_less,
    _look_at_activations,
    _relax_pattern,
    _cut_less_abruptly,
    _structure_for_speed,
    _file_not_smaller,
    _floor,
    _measure_more,
    _prune_more,
)
