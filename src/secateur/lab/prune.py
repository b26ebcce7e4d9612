"""The main job: open, plan, apply, recover, measure, save, report."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from secateur import api, recover
from secateur.core.budget import Budget, Pattern, Quantity
from secateur.core.errors import BudgetError, DataError, SettingsError
from secateur.core.files import check_free, sweep, write_json
from secateur.core.method import Method, Settings
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.data.dataset import Dataset, Splits
from secateur.io.data import open_data, split_generated
from secateur.io.labels import refuse_other_classes
from secateur.io.models import OpenedModel, open_model
from secateur.lab.record import Outcome, make_record, with_file_sizes
from secateur.measure import measure_together, probe_machine, quality
from secateur.recover import Recovery, Request
from secateur.recover.bias import compensate
from secateur.report import Record, write
from secateur.shrink.apply import apply_
from secateur.shrink.folder import OWN
from secateur.shrink.save import save

RECORD, PAGE = "report.json", "report.html"
BUDGETS = {
    "sparsity": Quantity.SPARSITY,
    "pattern": Quantity.SPARSITY,
    "parameters": Quantity.PARAMETERS,
    "flops": Quantity.FLOPS,
    "bytes": Quantity.BYTES,
    "latency": Quantity.MILLISECONDS,
}
"""Flags that say how much may stay or must go -> what they count."""
COSTS = ("parameters", "flops", "bytes", "latency")
RECOVERY_WINDOWS = 4096  # windows of text to train on; images are used up to the data's end


@dataclass(frozen=True)
class Job:
    """Everything `secateur prune` was asked for; see its help for the meaning of each field."""

    model: str
    method: str
    sparsity: float | None = None
    pattern: str | None = None
    parameters: float | None = None
    flops: float | None = None
    bytes: float | None = None
    latency: float | None = None
    minimum: int = 0
    data: str | None = None
    samples: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    compensate: bool = False
    recover: str | None = None
    seed: int = 0
    weights: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    trust_factory: bool = False
    verify: bool = True
    force: bool = False

    @property
    def budget(self) -> Budget:
        """The budget that the flags say."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(f"give one of {', '.join(f'--{name}' for name in BUDGETS)}; got {len(given)}")
        if self.pattern is not None and self.minimum:
            raise BudgetError("--minimum goes with --sparsity; an N:M pattern fixes what every layer keeps")
        if self.pattern is not None:
            return Budget.nm(Pattern.parse(self.pattern))
        return Budget(getattr(self, given[0]), BUDGETS[given[0]], floor=self.minimum)

    def command(self, out: str) -> str:
        """The command line that makes this result again."""
        words = ["secateur", "prune", self.model, "--method", self.method]
        words += ["--sparsity", repr(self.sparsity)] if self.sparsity is not None else []
        words += ["--pattern", self.pattern] if self.pattern is not None else []
        words += [w for name in COSTS if getattr(self, name) for w in (f"--{name}", repr(getattr(self, name)))]
        words += ["--minimum", str(self.minimum)] if self.minimum else []
        words += ["--data", self.data] if self.data else []
        words += ["--samples", str(self.samples)] if self.samples is not None else []
        words += [w for key, value in self.settings.items() for w in ("--set", f"{key}={value}")]
        words += [w for name in self.include if self.include != ("*",) for w in ("--include", name)]
        words += [w for name in self.exclude for w in ("--exclude", name)]
        words += ["--compensate"] if self.compensate else []
        words += ["--recover", self.recover] if self.recover else []
        words += ["--weights", self.weights] if self.weights else []
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--dtype", self.dtype] if self.dtype else []
        words += ["--trust-factory"] if self.trust_factory else []
        words += [] if self.verify else ["--no-verify"]
        return shlex.join([*words, "--seed", str(self.seed), "--out", out])


@dataclass(frozen=True)
class Prepared:
    """A job with its model and data opened and its names checked; `recovery` comes with its settings."""

    job: Job
    opened: OpenedModel
    method: Method
    recovery: tuple[Recovery, Settings] | None
    data: str | None
    samples: int
    splits: Splits | None


def prepare(job: Job) -> Prepared:
    """Check every name and number before anything slow, then open model and data."""
    method = api.find_method(job.method)
    method.configure(dict(job.settings))
    _ = job.budget
    if job.samples is not None and job.samples < 1:
        raise DataError(f"--samples must be 1 or more, got {job.samples}")
    recovery = recover.in_words(job.recover) if job.recover else None
    opened = open_model(job.model, job.weights, device=job.device, dtype=job.dtype, trust_factory=job.trust_factory)
    data = job.data or opened.data
    if job.compensate and not method.structured:
        raise SettingsError(f"--compensate is for methods that cut channels, neurons or heads; {method.name} does not")
    if data is None and (method.needs_data or recovery or job.compensate):
        needs = (
            method.name
            if method.needs_data
            else "--compensate"
            if job.compensate
            else str(job.recover).partition(":")[0]
        )
        raise DataError(f"{needs} needs data and '{job.model}' has none of its own; give --data")
    samples = default_samples(opened) if job.samples is None else job.samples
    splits = open_data(data, opened, job.seed, samples) if data else None
    if splits:
        refuse_other_classes(splits, opened.model)
        if recovery:
            recovery[0].refuse(opened.model, splits.calibration, method.units)
    return Prepared(job, opened, method, recovery, data, samples, splits)


def default_samples(opened: OpenedModel) -> int:
    """Calibration samples: 128 as in the papers; 64 for the zoo's small models."""
    return 64 if opened.name.startswith("zoo:") else 128


def make_plan(prepared: Prepared, progress: Progress | None = None) -> Plan:
    """The plan alone: what `--dry-run` shows."""
    job = prepared.job
    settings: dict[str, Any] = dict(job.settings)
    plan = api.plan(
        prepared.opened.model,
        job.method,
        budget=job.budget,
        data=prepared.splits.calibration if prepared.splits else None,
        seed=job.seed,
        include=job.include,
        exclude=job.exclude,
        source=job.model,
        progress=progress,
        **settings,
    )
    if not job.compensate:
        return plan
    assert prepared.splits is not None
    return compensate(plan, prepared.opened.model, prepared.splits.calibration, progress)


def prune(job: Job, out: str | Path, progress: Progress | None = None) -> Record | None:
    """Prune, recover, measure, save and report; the folder appears whole at the end.

    Returns:
        The record that `out/secateur/report.json` and `out/report.html` were made from; None without
        data, when nothing can be run and so nothing measured.

    Raises:
        SecateurError: anything wrong with names, numbers, model, data or output.
    """
    out = Path(out)
    progress = progress or Silent()
    check_free(out, job.force)
    sweep(out.absolute().parent)
    prepared = prepare(job)
    plan, outcome = _carry_out(prepared, job.command(str(out)), progress)
    record = make_record(outcome) if outcome else None

    def extend(folder: Path) -> None:
        nonlocal record
        if record is not None:
            record = with_file_sizes(record, prepared.opened.folder, folder)
            write_json(folder / OWN / RECORD, record.model_dump(mode="json"))
            write([record], folder / PAGE)

    save(
        prepared.opened.model,
        out,
        plan,
        source=prepared.opened.folder,
        factory=prepared.opened.factory,
        data=prepared.data and split_generated(prepared.data)[0],
        probe=next(prepared.splits.evaluation.batches(2)) if prepared.splits else None,
        verify=job.verify,
        force=job.force,
        extend=extend,
    )
    return record


def _carry_out(prepared: Prepared, command: str, progress: Progress) -> tuple[Plan, Outcome | None]:
    """Plan and apply, then recover and measure where there is data; the opened model is the pruned one afterwards."""
    job, model = prepared.job, prepared.opened.model
    if prepared.splits is None:
        plan = make_plan(prepared, progress)
        apply_(model, plan)
        return plan, None
    dense, evaluation = copy.deepcopy(model), prepared.splits.evaluation
    plan = make_plan(prepared, progress)
    apply_(model, plan)
    pruned, figures = None, {}
    if prepared.recovery is not None:
        pruned = quality(model, evaluation, progress=progress)
        figures = _recover(prepared, plan, dense, progress)
    found = measure_together({"before": dense, "after": model}, evaluation, seed=job.seed, progress=progress)
    return plan, Outcome(
        prepared=prepared,
        plan=plan,
        before=found["before"],
        after=found["after"],
        pruned=pruned,
        recovery_figures=figures,
        machine=probe_machine(device=job.device, progress=progress),
        command=command,
    )


def _recover(prepared: Prepared, plan: Plan, dense: nn.Module, progress: Progress) -> dict[str, float]:
    assert prepared.recovery is not None
    request = Request(prepared.opened.model, plan, _training_data(prepared), prepared.job.seed, progress, dense)
    recovery, settings = prepared.recovery
    return recovery.run(request, settings)


def _training_data(prepared: Prepared) -> Dataset:
    """All the training samples there are: calibration took only a few, which may be the unpruned model's own."""
    assert prepared.data is not None
    assert prepared.splits is not None
    is_text = prepared.splits.calibration.targets is None
    count = RECOVERY_WINDOWS if is_text else None
    return open_data(split_generated(prepared.data)[0], prepared.opened, prepared.job.seed, count).calibration
