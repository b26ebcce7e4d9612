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
from secateur.core.budget import Budget, Pattern
from secateur.core.errors import BudgetError, DataError
from secateur.core.files import check_free, sweep, write_json
from secateur.core.method import Method
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.data.dataset import Dataset, Splits
from secateur.io.data import open_data
from secateur.io.models import OpenedModel, open_model
from secateur.lab.record import Outcome, make_record
from secateur.measure import MachineFacts, Measurement, measure_together, probe_machine, quality, quality_interval
from secateur.recover import Recovery, Request
from secateur.report import Record, write
from secateur.shrink.apply import apply_
from secateur.shrink.folder import OWN
from secateur.shrink.save import save

RECORD, PAGE = "report.json", "report.html"
RECOVERY_WINDOWS = 4096  # windows of text to train on; images are used up to the data's end


@dataclass(frozen=True)
class Job:
    """Everything `secateur prune` was asked for; see its help for the meaning of each field."""

    model: str
    method: str
    sparsity: float | None = None
    pattern: str | None = None
    minimum: int = 0
    data: str | None = None
    samples: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    recover: str | None = None
    recover_settings: Mapping[str, str] = field(default_factory=dict)
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
        if (self.sparsity is None) == (self.pattern is None):
            raise BudgetError("give either --sparsity or --pattern")
        if self.pattern is not None:
            return Budget.nm(Pattern.parse(self.pattern))
        assert self.sparsity is not None
        return Budget(self.sparsity, floor=self.minimum)

    def command(self, out: str) -> str:
        """The command line that makes this result again."""
        words = ["secateur", "prune", self.model, "--method", self.method]
        words += ["--sparsity", f"{self.sparsity:g}"] if self.sparsity is not None else []
        words += ["--pattern", self.pattern] if self.pattern is not None else []
        words += ["--minimum", str(self.minimum)] if self.minimum else []
        words += ["--data", self.data] if self.data else []
        words += ["--samples", str(self.samples)] if self.samples else []
        words += [w for key, value in self.settings.items() for w in ("--set", f"{key}={value}")]
        words += [w for name in self.include if name != "*" for w in ("--include", name)]
        words += [w for name in self.exclude for w in ("--exclude", name)]
        words += ["--recover", self._recover_word()] if self.recover else []
        words += ["--weights", self.weights] if self.weights else []
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--dtype", self.dtype] if self.dtype else []
        return shlex.join([*words, "--seed", str(self.seed), "--out", out])

    def _recover_word(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.recover_settings.items())
        return f"{self.recover}:{settings}" if settings else str(self.recover)


@dataclass(frozen=True)
class Prepared:
    """A job with its model and data opened and its names checked."""

    job: Job
    opened: OpenedModel
    method: Method
    recovery: Recovery | None
    data: str | None
    samples: int
    splits: Splits | None


def prepare(job: Job) -> Prepared:
    """Check every name and number before anything slow, then open model and data."""
    method = api.find_method(job.method)
    method.configure(dict(job.settings))
    _ = job.budget
    recovery = recover.find(job.recover) if job.recover else None
    if recovery:
        recovery.configure(job.recover_settings)
    opened = open_model(
        job.model, job.weights, device=job.device, dtype=job.dtype, trust_factory=job.trust_factory
    )
    data = job.data or opened.data
    if data is None and (method.needs_data or recovery):
        needs = method.name if method.needs_data else job.recover
        raise DataError(f"{needs} needs data and '{job.model}' has none of its own; give --data")
    samples = job.samples or default_samples(opened)
    splits = open_data(data, opened, job.seed, samples) if data else None
    return Prepared(job, opened, method, recovery, data, samples, splits)


def default_samples(opened: OpenedModel) -> int:
    """Calibration samples: 128 as in the papers; 64 for the zoo's small models."""
    return 64 if opened.name.startswith("zoo:") else 128


def make_plan(prepared: Prepared, progress: Progress | None = None) -> Plan:
    """The plan alone: what `--dry-run` shows."""
    job = prepared.job
    settings: dict[str, Any] = dict(job.settings)
    return api.plan(
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


def prune(job: Job, out: str | Path, progress: Progress | None = None) -> Record:
    """Prune, recover, measure, save and report; the folder appears whole at the end.

    Returns:
        The record that `out/secateur/report.json` and `out/report.html` were made from.

    Raises:
        SecateurError: anything wrong with names, numbers, model, data or output.
    """
    out = Path(out)
    progress = progress or Silent()
    check_free(out, job.force)
    sweep(out.absolute().parent)
    prepared = prepare(job)
    dense = copy.deepcopy(prepared.opened.model)
    plan = make_plan(prepared, progress)
    model = apply_(prepared.opened.model, plan)
    evaluation = prepared.splits.evaluation if prepared.splits else None
    pruned = quality(model, evaluation, progress=progress) if evaluation is not None and prepared.recovery else None
    figures = _recover(prepared, plan, model, progress) if prepared.recovery else {}
    before, after = _measure(dense, model, evaluation, job.seed, progress)
    facts = probe_machine(device=job.device, progress=progress)
    outcome = Outcome(
        job=job,
        prepared=prepared,
        plan=plan,
        before=before,
        after=after,
        pruned=pruned,
        pruned_interval=quality_interval(pruned) if pruned else None,
        recovery_figures=figures,
        machine=facts,
        command=job.command(str(out)),
    )
    written: list[Record] = []

    def extend(folder: Path) -> None:
        record = make_record(outcome, prepared.opened.folder, folder)
        write_json(folder / OWN / RECORD, record.model_dump(mode="json"))
        write([record], folder / PAGE)
        written.append(record)

    save(
        model,
        out,
        plan,
        source=prepared.opened.folder,
        factory=prepared.opened.factory,
        data=prepared.data,
        probe=next(evaluation.batches(2)) if evaluation is not None else None,
        verify=job.verify,
        force=job.force,
        extend=extend,
    )
    return written[0]


def _recover(prepared: Prepared, plan: Plan, model: nn.Module, progress: Progress) -> dict[str, float]:
    assert prepared.recovery is not None
    assert prepared.splits is not None
    request = Request(model, plan, _training_data(prepared), prepared.job.seed, progress)
    return prepared.recovery.run(request, prepared.recovery.configure(prepared.job.recover_settings))


def _training_data(prepared: Prepared) -> Dataset:
    """All the training samples there are: calibration took only a few."""
    assert prepared.data is not None
    assert prepared.splits is not None
    is_text = prepared.splits.calibration.targets is None
    count = RECOVERY_WINDOWS if is_text else None
    return open_data(prepared.data, prepared.opened, prepared.job.seed, count).calibration


def _measure(
    dense: nn.Module, model: nn.Module, evaluation: Dataset | None, seed: int, progress: Progress
) -> tuple[Measurement, Measurement]:
    found = measure_together({"before": dense, "after": model}, evaluation, seed=seed, progress=progress)
    return found["before"], found["after"]


__all__ = ["Job", "MachineFacts", "Prepared", "make_plan", "prepare", "prune"]
