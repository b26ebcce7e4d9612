"""The main job on a folder that is streamed: prune block by block, measure what can be measured, report."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur import api
from secateur.core.errors import DataError, SettingsError
from secateur.core.files import write_json
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.data.dataset import DataKind, Splits
from secateur.io.data import open_data
from secateur.io.labels import refuse_other_classes
from secateur.io.models import DTYPES, OpenedModel, open_model
from secateur.lab.prune import PAGE, RECORD, Job, Prepared, default_samples
from secateur.lab.record import Outcome, make_record, with_file_sizes
from secateur.measure import measure_together, probe_machine
from secateur.report import Record, write
from secateur.shrink.folder import OWN
from secateur.shrink.load import load
from secateur.streaming import folder_perplexity, open_folder, prune_folder

STREAM = "stream.json"
SHARE = 0.25  # of the free memory that a model may take to be measured as a whole, beside its pruned copy


@dataclass(frozen=True)
class Streamed:
    """What a streamed job found.

    Attributes:
        record: the usual record, where both models fit into memory and there is data; None otherwise.
        perplexity_before, perplexity_after: measured block by block where the models do not fit.
        seconds_per_block: time from block to block of the walks.
        peak_bytes: largest resident memory until the result was written.
    """

    record: Record | None
    perplexity_before: float | None
    perplexity_after: float | None
    seconds_per_block: list[float]
    peak_bytes: int


def prune_streamed(job: Job, out: str | Path, *, spill: bool = False, progress: Progress | None = None) -> Streamed:
    """Prune a local folder block by block; run again after a kill, it goes on where it stopped.

    Args:
        job: as for `prune`; `model` is a local Hugging Face folder.
        out: the result's folder.
        spill: keep activations between blocks on disk only.
        progress: receives progress.

    Raises:
        SettingsError: options that need the whole model in memory.
        SecateurError: as for `secateur.streaming.prune_folder`.
    """
    out, progress = Path(out), progress or Silent()
    _refuse_whole_model_options(job)
    prepared = _prepare(job)
    splits = prepared.splits
    found: dict[str, Any] = {"record": None, "perplexity_before": None, "perplexity_after": None}

    def extend(folder: Path, plan: Plan) -> None:
        if splits is None:
            return
        if _fits(Path(job.model)):
            found["record"] = _measured(prepared, plan, folder, job.command(str(out)), progress)
        elif splits.evaluation.kind is DataKind.TEXT:
            options: dict[str, Any] = {"device": job.device, "dtype": _dtype(job), "progress": progress}
            found["perplexity_before"] = folder_perplexity(job.model, splits.evaluation, **options).value
            found["perplexity_after"] = folder_perplexity(folder, splits.evaluation, **options).value

    settings: dict[str, Any] = dict(job.settings)
    done = prune_folder(
        job.model,
        out,
        job.method,
        budget=job.budget,
        data=splits.calibration if splits else None,
        seed=job.seed,
        include=job.include,
        exclude=job.exclude,
        spill=spill,
        device=job.device,
        dtype=_dtype(job),
        force=job.force,
        progress=progress,
        extend=extend,
        **settings,
    )
    result = Streamed(**found, seconds_per_block=done.seconds, peak_bytes=done.peak_bytes)
    write_json(out / OWN / STREAM, {key: value for key, value in asdict(result).items() if key != "record"})
    return result


def _refuse_whole_model_options(job: Job) -> None:
    for name, given in (("--recover", job.recover), ("--compensate", job.compensate), ("--weights", job.weights)):
        if given:
            raise SettingsError(f"{name} needs the whole model in memory and does not go with --stream")
    if job.latency is not None:
        raise SettingsError("--latency needs the whole model in memory and does not go with --stream; ask for --flops")
    if not Path(job.model).is_dir():
        raise SettingsError(f"--stream takes a local Hugging Face folder; '{job.model}' is none")


def _prepare(job: Job) -> Prepared:
    """Everything that `prune` prepares, with the outline in place of the model."""
    method = api.find_method(job.method)
    method.configure(dict(job.settings))
    folder = Path(job.model)
    opened = OpenedModel(open_folder(folder).model, job.model, folder)
    if job.data is None and method.needs_data:
        raise DataError(f"{method.name} needs data and '{job.model}' has none of its own; give --data")
    samples = default_samples(opened) if job.samples is None else job.samples
    splits: Splits | None = open_data(job.data, opened, job.seed, samples) if job.data else None
    if splits:
        refuse_other_classes(splits, opened.model)
    return Prepared(job, opened, method, None, job.data, samples, splits)


def _dtype(job: Job) -> Any:
    return None if job.dtype is None else DTYPES[job.dtype]


def _fits(folder: Path) -> bool:
    """Whether the model and its copy can be loaded to be measured as usual."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return stored < SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _measured(prepared: Prepared, plan: Plan, folder: Path, command: str, progress: Progress) -> Record:
    """The usual measurements on both models as a whole, and the usual report in the folder."""
    job, splits = prepared.job, prepared.splits
    assert splits is not None
    dense = open_model(job.model, device=job.device, dtype=job.dtype).model
    pruned = load(folder)
    pruned.to(next(dense.parameters()).device, next(dense.parameters()).dtype)
    models = {"before": dense, "after": pruned}
    found = measure_together(models, splits.evaluation, seed=job.seed, progress=progress)
    outcome = Outcome(
        prepared=prepared,
        plan=plan,
        before=found["before"],
        after=found["after"],
        pruned=None,
        recovery_figures={},
        machine=probe_machine(device=job.device, progress=progress),
        command=command,
    )
    record = with_file_sizes(make_record(outcome), Path(job.model), folder)
    write_json(folder / OWN / RECORD, record.model_dump(mode="json"))
    write([record], folder / PAGE)
    return record
