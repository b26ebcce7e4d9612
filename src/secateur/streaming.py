"""Pruning a model folder that may be larger than memory: from its shards to new ones, block by block, resumable."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from secateur import api
from secateur.core.budget import Budget
from secateur.core.distributed import several, share
from secateur.core.errors import DataError, ModelError, OutputError, SettingsError
from secateur.core.files import check_free, read_json, write_json
from secateur.core.fingerprint import describe
from secateur.core.journal import Journal
from secateur.core.method import Batch, Decision, Method, Settings, Task
from secateur.core.plan import Plan, Provenance, versions
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import seeded
from secateur.data.dataset import Dataset
from secateur.data.example import describe_example, example_for
from secateur.measure.quality import Quality
from secateur.measure.streamed import streamed_perplexity
from secateur.shrink.checkpoint import Checkpoint
from secateur.shrink.folder import CONFIG, OWN
from secateur.shrink.load import layout_of_folder
from secateur.shrink.resident import Streamed, skeleton
from secateur.shrink.stream import Writer, check_space, save_streamed

TOKENS = 1024  # per batch: enough for matrix products at full rate, few enough to stay in caches
NEW_WEIGHTS = "the plan beside this model holds the masks; the new weights are in the model's own files only"


@dataclass(frozen=True)
class Finished:
    """What a streamed job did.

    Attributes:
        folder: the result.
        seconds: for every block visited by this process, in order, with what was between visits.
        peak_bytes: largest resident memory of this process until the decision was made.
    """

    folder: Path
    seconds: list[float]
    peak_bytes: int

    @property
    def plan(self) -> Plan:
        """The decision, read from the folder."""
        return Plan.load(self.folder / OWN)


class _Timed:
    """Passes progress on and keeps the time between steps of the walks over blocks."""

    def __init__(self, inner: Progress):
        self.inner, self.seconds, self._last, self._blocks = inner, [], 0.0, False  # type: ignore[var-annotated]

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins."""
        self._blocks, self._last = stage == "blocks", time.perf_counter()
        self.inner.start(stage, total)

    def advance(self, steps: int = 1) -> None:
        """The stage went on."""
        now = time.perf_counter()
        if self._blocks and steps == 1:
            self.seconds.append(now - self._last)
        self._last = now
        self.inner.advance(steps)

    def finish(self) -> None:
        """The stage is over."""
        self.inner.finish()


@dataclass(frozen=True)
class OpenFolder:
    """A model folder whose weights are read when they are needed.

    Attributes:
        folder: where it is.
        model: its outline; parameters are on the meta device.
        checkpoint: the stored weights.
        device: where blocks are run.
        dtype: of the weights while blocks are run; None: as stored.
    """

    folder: Path
    model: nn.Module
    checkpoint: Checkpoint
    device: str = "cpu"
    dtype: torch.dtype | None = None

    @property
    def residency(self) -> Streamed:
        """Brings weights for visits."""
        return Streamed(self.model, self.checkpoint, self.device, self.dtype)


def open_folder(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> OpenFolder:
    """A Hugging Face decoder folder, without reading its weights.

    Raises:
        ModelError: no transformers folder, quantised, damaged or missing shards, or widths that its config cannot say.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise ModelError(f"'{folder}' is no Hugging Face folder (no {CONFIG}); streaming needs one")
    if layout_of_folder(folder) == "uneven":
        raise ModelError(f"'{folder}' has uneven widths that its config cannot say; load it whole with secateur.load")
    model = skeleton(folder)
    return OpenFolder(folder, model, Checkpoint(folder, model), device, dtype)


def prune_folder(
    source: str | Path,
    out: str | Path,
    method: str,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    budget: Budget | None = None,
    data: Any = None,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    work: str | Path | None = None,
    spill: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
    extend: Callable[[Path, Plan], None] | None = None,
    **settings: Any,
) -> Finished:
    """Prune a decoder's folder into a new one, with one block's weights in memory at a time.

    Run again after a kill with the same arguments, it goes on at the block where it stopped and writes the same
    bytes. In a job of several processes (torch.distributed) each takes its share of the calibration samples, all
    decide alike, and the first writes the result.

    Args:
        source: a Hugging Face folder with safetensors.
        out: the result's folder; loads like the source (`AutoModelForCausalLM.from_pretrained`, or `secateur.load`
            where widths differ between layers).
        method: a one-shot method that works block by block, e.g. `wanda`, `sparsegpt`, `cfsp`.
        sparsity: fraction of the method's units to remove.
        pattern: instead, e.g. "2:4".
        budget: instead of both.
        data: calibration data: a Dataset, a tensor of token ids `[windows, length]`, or an iterable of batches.
        seed: of everything random.
        include: shell patterns over parameter names that may be pruned.
        exclude: patterns that may not.
        work: folder for what has been found so far; default: beside `out`; removed at the end.
        spill: keep activations between blocks on disk only.
        device: where blocks are run.
        dtype: of the weights while blocks are run; default: as stored. The result has the stored dtype.
        force: replace an existing result.
        progress: receives progress; silent by default.
        extend: called with the temporary folder and the plan before the folder gets its name, to add more files.
        **settings: the method's own settings.

    Raises:
        SettingsError: the work folder holds an unfinished run with other settings; says which.
        ModelError: damaged folder; a state that the model changes between blocks; no space on the disk.
        OutputError: `out` exists, or is the source.
        BudgetError, DataError, NumericsError: as for `secateur.plan`.
    """
    source, out = Path(source), Path(out)
    _refuse_same(source, out)
    check_free(out, force)
    entry = api.find_method(method)
    if entry.run is None:
        raise ModelError(f"{entry.name} is no one-shot method, it cannot prune a folder by itself")
    if not entry.streams:
        able = ", ".join(sorted(name for name, one in api.methods().items() if one.streams))
        raise SettingsError(f"{entry.name} needs the whole model in memory, it cannot be streamed; these can: {able}")
    checked = entry.configure(settings)
    wanted = api.budget_of(entry, sparsity, pattern, budget)
    opened = open_folder(source, device=device, dtype=dtype)
    check_space(out, opened.checkpoint.bytes)
    batches = api.calibration(entry, checked, _small_batches(data))
    described = api.describe_data(batches, data)
    job = _Job(entry, checked, wanted, opened, batches, described, seed, tuple(include), tuple(exclude))
    place = Path(work) if work is not None else out.absolute().parent / f".{out.name}.secateur-work"
    _claim(place, job.order())
    timed = _Timed(progress or Silent())
    rank, _ = share()
    task = job.task(Journal(place / f"process-{rank}", spill=spill), timed)
    with torch.no_grad(), seeded(seed):
        decision = entry.run(task, checked)
    plan = job.plan(decision, task)
    api.refuse_empty(plan, wanted, decision)
    peak = peak_resident()
    if rank == 0:
        save_streamed(
            opened.model,
            out,
            plan,
            Writer(opened.checkpoint, plan, decision.weights),
            structure=decision.structure,
            source=source,
            force=force,
            progress=timed,
            extend=None if extend is None else partial(_extended, extend, plan),
        )
    if several():
        dist.barrier()
    if rank == 0:
        shutil.rmtree(place, ignore_errors=True)
    return Finished(out, timed.seconds, peak)


def _extended(extend: Callable[[Path, Plan], None], plan: Plan, folder: Path) -> None:
    extend(folder, plan)


@dataclass(frozen=True)
class _Job:
    """What was asked for, checked."""

    method: Method
    settings: Settings
    budget: Budget
    opened: OpenFolder
    batches: list[Batch]
    data: dict[str, Any]
    seed: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def order(self) -> dict[str, Any]:
        """As plain data: an unfinished run may only go on with the very same."""
        entries = self.opened.checkpoint.entries
        stored = [[name, str(one.dtype), list(one.shape), one.file.name, one.start] for name, one in entries.items()]
        files = sorted({one.file for one in entries.values()})
        return {
            "method": self.method.name,
            "settings": self.settings.model_dump(mode="json"),
            "budget": self.budget.to_json() | {"include": list(self.include), "exclude": list(self.exclude)},
            "seed": self.seed,
            "data": self.data,
            "source": {
                "folder": str(self.opened.folder),
                "tensors": hashlib.blake2b(json.dumps(sorted(stored)).encode(), digest_size=8).hexdigest(),
                "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
            },
            "dtype": str(self.opened.dtype),
            "versions": versions(),
        }

    def task(self, journal: Journal, progress: Progress) -> Task:
        """What the method works on; this process's share of the data."""
        return Task(
            model=self.opened.model,
            budget=self.budget,
            batches=_own_share(self.batches),
            seed=self.seed,
            include=self.include,
            exclude=self.exclude,
            progress=progress,
            example=example_for(self.opened.model, self.batches[:1] or None) if self.method.structured else None,
            journal=journal,
            residency=self.opened.residency,
        )

    def plan(self, decision: Decision, task: Task) -> Plan:
        """The decision with where it came from; masks stay where they are."""
        order = self.order()
        # what is not in the checkpoint is small: biases of layers that had none
        added = {name: decision.weights[name] for name in decision.weights if not self.opened.checkpoint.has(name)}
        origin = Provenance(
            method=self.method.name,
            settings=order["settings"],
            budget=order["budget"],
            seed=self.seed,
            model={"class": type(self.opened.model).__name__, "source": str(self.opened.folder)},
            data=self.data,
            versions=versions(),
        )
        return Plan(
            sites=decision.sites,
            masks=decision.masks,
            scores=dict(decision.scores),
            provenance=(origin,),
            weights=added,
            warnings=(*decision.warnings, *((NEW_WEIGHTS,) if len(decision.weights) > len(added) else ())),
            facts=decision.facts,
            planned_on={name: f"{describe(value)} meta" for name, value in self.opened.model.named_parameters()},
            example=describe_example(task.example) if self.method.structured else None,
        )


def folder_perplexity(
    folder: str | Path,
    dataset: Dataset,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity of a model folder, with one block's weights in memory at a time; see `measure.perplexity`."""
    opened = open_folder(folder, device=device, dtype=dtype)
    batches = tuple(dataset.batches(max(1, TOKENS // dataset.inputs.shape[1])))
    task = Task(opened.model, Budget(0.0), batches=batches, progress=progress or Silent(), residency=opened.residency)
    return streamed_perplexity(task)


def peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _refuse_same(source: Path, out: Path) -> None:
    if out.exists() and source.exists() and out.resolve() == source.resolve():
        raise OutputError(f"'{out}' is the folder to be pruned; choose another folder for the result")


def _small_batches(data: Any) -> Any:
    """Windows of text in batches of about `TOKENS` tokens; anything else as it is."""
    if isinstance(data, Dataset):
        return list(data.batches(max(1, TOKENS // data.inputs.shape[1])))
    if isinstance(data, torch.Tensor):
        return [Batch((part,)) for part in torch.split(data, max(1, TOKENS // data.shape[-1]))]
    return data


def _own_share(batches: list[Batch]) -> list[Batch]:
    rank, ranks = share()
    if batches and len(batches) < ranks:
        raise DataError(
            f"{len(batches)} batches of calibration data cannot be split among {ranks} processes; give more samples"
        )
    return batches[rank::ranks]


def _claim(place: Path, order: Mapping[str, Any]) -> None:
    """Begin in the work folder, or go on there if it was begun for the same order."""
    note = place / "order.json"
    wanted = json.loads(json.dumps(order))
    if note.exists():
        begun = read_json(note)
        odd = [key for key in wanted if begun.get(key) != wanted[key]]
        if odd:
            raise SettingsError(
                f"'{place}' holds an unfinished run with another {odd[0]}; repeat the command that began it, or delete "
                "the folder to start afresh"
            )
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{place}': {error.strerror}") from error
    write_json(note, wanted)
