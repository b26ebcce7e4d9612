"""From what a job found to the record that reports are made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.core.budget import Budget
from secateur.core.errors import DataError
from secateur.core.plan import Plan
from secateur.core.tags import Speedup
from secateur.core.units import UnitKind
from secateur.measure import Interval, Latency, MachineFacts, Measurement, Metric, Quality, quality_interval
from secateur.report import record as parts
from secateur.report.record import Record

if TYPE_CHECKING:
    from secateur.lab.prune import Job, Prepared

ZEROS = (
    "Zeros alone make the model neither smaller nor faster: shapes, FLOPs and files stay dense. Only a sparse format "
    "or 2:4 kernels gain from them; the report says what they gain on this machine, measured."
)
CHANGED = "This method also changed the kept weights: the result is not a mask on the original weights."


@dataclass(frozen=True)
class Outcome:
    """Everything a finished job knows."""

    prepared: Prepared
    plan: Plan
    before: Measurement
    after: Measurement
    pruned: Quality | None
    recovery_figures: dict[str, float]
    machine: MachineFacts
    command: str


def make_record(outcome: Outcome) -> Record:
    """The record of a job, without the sizes of files that are not written yet.

    Raises:
        DataError: there was no data to measure the quality on.
    """
    plan, method = outcome.plan, outcome.prepared.method
    provenance = plan.provenance[0]
    structured = any(kind is not UnitKind.WEIGHT for kind in plan.kinds)
    pattern = provenance.budget.get("pattern")
    structure = Speedup.STRUCTURED if structured else Speedup.SEMI_STRUCTURED if pattern else Speedup.UNSTRUCTURED
    warnings = list(plan.warnings)
    warnings += [] if structured else [ZEROS]
    warnings += [CHANGED] if method.changes_weights else []
    return Record(
        title=f"{outcome.prepared.job.model} pruned by {method.name}",
        model=parts.ModelInfo(name=outcome.prepared.job.model, fingerprint=fingerprint(plan)),
        method=parts.MethodInfo(name=method.name, title=method.title, citation=method.citation, formula=method.formula),
        budget=parts.BudgetInfo(
            asked=asked(outcome.prepared.job.budget),
            sparsity=plan.sparsity,
            units=", ".join(f"{kind.value}s" for kind in plan.kinds),
        ),
        structure=structure,
        quality=_quality(outcome),
        sizes=_sizes(outcome),
        layers=_layers(outcome),
        reproduce=parts.Reproduction(
            command=outcome.command,
            python=snippet(outcome.prepared),
            seed=outcome.prepared.job.seed,
            settings=dict(provenance.settings),
            versions=dict(provenance.versions),
        ),
        calibration=parts.DataInfo(**provenance.data) if provenance.data else None,
        latency=_latency(outcome),
        evenness=_evenness(outcome),
        machine=_machine(outcome.machine),
        recovery=_recovery(outcome),
        warnings=warnings,
    )


def fingerprint(plan: Plan) -> str:
    """A short digest of the model that was planned on."""
    text = json.dumps(plan.planned_on, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def asked(budget: Budget) -> str:
    """The budget in the user's words."""
    floor = f", at least {budget.floor} units in every site" if budget.floor else ""
    return f"{budget}{floor}"


def snippet(prepared: Prepared) -> str:
    """The same plan in Python."""
    job = prepared.job
    lines = ["import secateur as sc", f"opened = sc.open_model({_call(job.model, **_opening(job))})"]
    if prepared.data:
        sampling = _call(seed=job.seed, samples=prepared.samples)
        lines.append(f"data = sc.open_data({prepared.data!r}, opened, {sampling})")
    words = [_call(method=job.method), budget_word(job)]
    words += ["data=data.calibration"] if prepared.data else []
    words += [_call(seed=job.seed, **job.settings)]
    words += [_call(include=job.include)] if job.include != ("*",) else []
    words += [_call(exclude=job.exclude)] if job.exclude else []
    lines.append(f"plan = sc.plan(opened.model, {', '.join(words)})")
    lines += ["plan = sc.compensate(plan, opened.model, data.calibration)"] if job.compensate else []
    return "\n".join([*lines, "sc.apply_(opened.model, plan)"])


def budget_word(job: Job) -> str:
    """A job's budget as an argument in Python."""
    if job.pattern is not None:
        return _call(pattern=job.pattern)
    if job.sparsity is None:
        budget = job.budget
        floor = f", floor={budget.floor}" if budget.floor else ""
        return f"budget=sc.Budget({budget.amount!r}, {budget.quantity.value!r}{floor})"
    if job.minimum:
        return f"budget=sc.Budget({job.sparsity!r}, floor={job.minimum})"
    return _call(sparsity=job.sparsity)


def _opening(job: Job) -> dict[str, Any]:
    """The arguments of `open_model` that differ from its defaults."""
    defaults = {"weights": None, "device": "cpu", "dtype": None, "trust_factory": False}
    return {name: getattr(job, name) for name, default in defaults.items() if getattr(job, name) != default}


def _call(*positional: Any, **named: Any) -> str:
    """Arguments as they stand in a call."""
    return ", ".join([*map(repr, positional), *(f"{name}={value!r}" for name, value in named.items())])


def _quality(outcome: Outcome) -> parts.Quality:
    before, after = outcome.before, outcome.after
    if before.quality is None or after.quality is None:
        raise DataError("no data to measure the quality on: a report needs --data")
    dense, final = _measured(before.quality, before.interval), _measured(after.quality, after.interval)
    pruned = _measured(outcome.pruned, quality_interval(outcome.pruned)) if outcome.pruned else final
    assert outcome.prepared.splits is not None
    is_accuracy = before.quality.metric is Metric.ACCURACY
    return parts.Quality(
        metric=before.quality.metric.value,
        unit="%" if is_accuracy else "",
        higher_is_better=before.quality.higher_is_better,
        data=outcome.prepared.splits.evaluation.name,
        before=dense,
        pruned=pruned,
        recovered=final if outcome.prepared.recovery else None,
    )


def _measured(quality: Quality, interval: Interval | None) -> parts.Measure:
    scale = 100.0 if quality.metric is Metric.ACCURACY else 1.0
    ends = (interval.low * scale, interval.high * scale) if interval else None
    value = quality.value * scale
    if ends and not ends[0] <= value <= ends[1]:
        # a bootstrap of nearly equal samples can miss the estimate by rounding
        ends = (min(ends[0], value), max(ends[1], value))
    return parts.Measure(value=value, interval=ends, samples=quality.samples)


def with_file_sizes(record: Record, source: Path | None, target: Path) -> Record:
    """The record with the bytes of the weight files before and after, where the former are known."""
    before = weight_files(source)
    if not before:
        return record
    files = parts.Pair(before=before, after=weight_files(target))
    return record.model_copy(update={"sizes": record.sizes.model_copy(update={"file_bytes": files})})


def _sizes(outcome: Outcome) -> parts.Sizes:
    before, after = outcome.before, outcome.after
    return parts.Sizes(
        parameters=parts.Pair(before=before.parameters, after=after.parameters),
        nonzeros=parts.Pair(before=before.nonzeros, after=after.nonzeros),
        flops=parts.Pair(before=before.flops, after=after.flops or 0) if before.flops else None,
        flops_note="one sample; a multiply-add is 2 FLOPs; zeros counted as work",
        weight_bytes=parts.Pair(before=before.weight_bytes, after=after.weight_bytes),
    )


def _layers(outcome: Outcome) -> list[parts.Layer]:
    """The plan's sites with its figures, and the PQ index of the weights left where the site is a weight."""
    left = outcome.after.evenness.layers if outcome.after.evenness else {}
    rows = outcome.plan.table()
    return [parts.Layer.of_row(row | ({"pq_index": left[row["site"]]} if row["site"] in left else {})) for row in rows]


def _evenness(outcome: Outcome) -> parts.Evenness | None:
    before, after = outcome.before.evenness, outcome.after.evenness
    return parts.Evenness(before=before.total, after=after.total) if before and after else None


def weight_files(folder: Path | None) -> int:
    """Bytes of the safetensors files directly in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder else 0


def _latency(outcome: Outcome) -> parts.Latency | None:
    before, after = outcome.before, outcome.after
    if not before.latency or not after.latency:
        return None
    rows = [
        parts.LatencyRow(label=f"batch {size}", before=_timing(found), after=_timing(after.latency[size]))
        for size, found in before.latency.items()
    ]
    first = next(iter(before.latency.values()))
    peaks = (before.memory and before.memory.peak, after.memory and after.memory.peak)
    return parts.Latency(
        rows=rows,
        threads=first.threads,
        dtype=first.dtype or "none",
        device=first.device or "cpu",
        peak_memory=parts.Pair(before=peaks[0], after=peaks[1]) if peaks[0] and peaks[1] else None,
    )


def _timing(found: Latency) -> parts.Timing:
    return parts.Timing(median=found.median, p10=found.p10, p90=found.p90, throughput=found.throughput)


def _machine(facts: MachineFacts) -> parts.Machine:
    rows = [
        parts.MachineRow(label=row.layout.value, batch=row.batch, ms=row.median, speedup=row.speedup)
        for row in facts.rows
    ]
    return parts.Machine(rows=rows, sentences=list(facts.sentences))


def _recovery(outcome: Outcome) -> parts.RecoveryInfo | None:
    if outcome.prepared.recovery is None:
        return None
    recovery, settings = outcome.prepared.recovery
    found = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in outcome.recovery_figures.items())
    return parts.RecoveryInfo(
        name=recovery.name, settings=settings.model_dump(mode="json"), text=f"{recovery.title} ({found})"
    )
