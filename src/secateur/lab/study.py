"""A procedure around whole trainings as one job: open, train again and again, save what was found."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from secateur import api
from secateur.core.files import check_free, sweep, whole_folder, write_json
from secateur.core.progress import Progress, Silent
from secateur.core.units import UnitKind
from secateur.data.dataset import Dataset
from secateur.io.models import OpenedModel, open_model
from secateur.lab.training import TrainingRequest, fresh_model, split, training_data
from secateur.measure import quality
from secateur.shrink.apply import apply_
from secateur.shrink.folder import OWN
from secateur.shrink.save import save
from secateur.train.loop import Fitting
from secateur.train.snapshot import model_state, put_back
from secateur.train.study import Findings

FINDINGS = "findings.json"  # in OUT/secateur
KNOWN_BY = {"model", "weights", "validation", "pretrained"}  # beside what `api.study` knows a folder by


class StudyJob(TrainingRequest):
    """Everything `secateur study` can be asked for; the method is a procedure around trainings."""

    pretrained: bool = Field(False, description="every training starts from the model's weights, not from new ones")


def study(job: StudyJob, out: str | Path, progress: Progress | None = None) -> Findings:
    """Run the procedure, save its table and, where it prunes, the final network, measured on the test data.

    Every training is kept in `OUT.study/` while it runs; run the same command again after a kill and it goes on.

    Raises:
        SecateurError: anything wrong with names, numbers, model, data or output.
    """
    out, progress = Path(out), progress or Silent()
    check_free(out, job.force)
    sweep(out.absolute().parent)
    _ = job.budget
    recipe = job.checked_recipe()
    api.find_method(job.method).configure(dict(job.settings))
    opened = open_model(job.model, job.weights, device=job.device, trust_factory=job.trust_factory)
    for parameter in opened.model.parameters():
        parameter.requires_grad_(True)
    if job.pretrained:
        api.refuse_sick(opened.model)
    splits = training_data(job, opened)
    validation, rest = split(splits.calibration, job.validation, job.seed)
    kept = out.with_name(out.name + ".study")
    found = api.study(
        maker(opened, job.pretrained),
        Fitting(rest, recipe, lambda model: figures(model, validation), seed=job.seed),
        job.method,
        budget=job.budget,
        folder=kept,
        seed=job.seed,
        metric="accuracy" if validation.targets is not None else "loss",
        include=job.include,
        exclude=job.exclude,
        extras={"data": validation},
        about=job.model_dump(mode="json", include=KNOWN_BY) | {"data": job.data or opened.data},
        progress=progress,
        **job.settings,
    )
    _save(job, out, opened, splits.evaluation, found)
    if kept.exists():
        shutil.rmtree(kept)
    return found


def maker(opened: OpenedModel, pretrained: bool) -> Callable[[], nn.Module]:
    """What makes the network of every training: with new random weights, or as it was opened."""

    def make() -> nn.Module:
        model = copy.deepcopy(opened.model)
        if not pretrained:
            put_back(model, model_state(fresh_model(opened)))
        return model

    return make


def figures(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Accuracy in percent where there are labels, the mean loss of text otherwise."""
    found = quality(model, data)
    return {"accuracy": 100 * found.value} if data.targets is not None else {"loss": math.log(found.value)}


def _save(job: StudyJob, out: Path, opened: OpenedModel, test: Dataset, found: Findings) -> None:
    """The folder: a pruned network with its plan where there is one, the table always."""
    final = found.state is not None and found.plan is not None
    if found.state is not None:
        put_back(opened.model, found.state)
        if found.plan is not None and set(found.plan.kinds) != {UnitKind.WEIGHT}:
            apply_(opened.model, found.plan, verify=job.verify)
        found.summary["test"] = figures(opened.model.eval(), test)
    document: dict[str, Any] = {"job": job.model_dump(mode="json"), **found.to_json()}
    if final:
        save(
            opened.model,
            out,
            found.plan,
            source=opened.folder,
            factory=opened.factory,
            data=job.data or opened.data,
            probe=next(test.batches(2)),
            verify=job.verify,
            force=job.force,
            extend=lambda folder: write_json(folder / OWN / FINDINGS, document),
        )
        return
    with whole_folder(out, job.force) as folder:
        (folder / OWN).mkdir()
        write_json(folder / OWN / FINDINGS, document)
        if found.plan is not None:
            found.plan.write_into(folder / OWN)
