"""Sparse training as one job: open, train under a method, keep the best, save, measure, report."""

from __future__ import annotations

import copy
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from secateur import api, recover
from secateur.core.errors import SecateurError
from secateur.core.files import check_free, sweep, write_json
from secateur.core.fingerprint import model_digest
from secateur.core.method import Method
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent, track
from secateur.core.seeding import seeded
from secateur.core.trees import load_tree, save_tree
from secateur.data.dataset import Dataset, Splits
from secateur.data.running import evaluating, training
from secateur.io.models import OpenedModel, open_model
from secateur.lab import prune
from secateur.lab.record import Outcome, budget_word, make_record, with_file_sizes
from secateur.lab.training import BUDGETS, TrainingRequest, fresh_model, split, training_data
from secateur.measure import Quality, measure_together, probe_machine, quality
from secateur.recover import Request
from secateur.report import Record, write
from secateur.shrink.apply import apply_
from secateur.shrink.folder import OWN
from secateur.shrink.save import save
from secateur.train.keep import weight_masks
from secateur.train.logs import Log
from secateur.train.loop import Fitting, Recipe
from secateur.train.snapshot import model_state, put_back
from secateur.train.sparsifier import Sparsifier
from secateur.train.study import Ledger

HISTORY = "training"  # folder in OUT/secateur with the log


class TrainJob(TrainingRequest):
    """Everything `secateur train` can be asked for; the method acts during training."""

    from_scratch: bool = Field(False, description="start from new random weights")
    evaluate_every: int = Field(100, ge=1, description="optimiser steps between validations")
    patience: int | None = Field(
        None, ge=1, description="stop after so many validations on target without a better one"
    )
    tensorboard: bool = Field(False, description="write scalars for TensorBoard")
    recover: str = Field("", description="after the training and its cut: finetune:steps=300, batchnorm, ...")

    def command(self, out: str) -> str:
        """The command line that makes this result again."""
        words = ["secateur", "train", self.model, "--method", self.method]
        for name in BUDGETS:
            words += _flag(name, getattr(self, name)) if getattr(self, name) is not None else []
        words += ["--steps", str(self.recipe["steps"])] if "steps" in self.recipe else []
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if name in ("model", "method", *BUDGETS) or value == info.get_default(call_default_factory=True):
                continue
            words += _flag(name, value)
        return shlex.join([*words, "--out", out])


def _flag(name: str, value: Any) -> list[str]:
    flag = {"settings": "--set", "recipe": "--recipe"}.get(name, f"--{name.replace('_', '-')}")
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{name.replace('_', '-')}"]
    if isinstance(value, Mapping):
        return [word for key, one in value.items() if key != "steps" for word in (flag, f"{key}={_text(one)}")]
    if isinstance(value, tuple):
        return [word for one in value for word in (flag, str(one))]
    return [flag, str(value)]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Recovered:
    """What a recovery after the training came to: the quality right after the cut, its own figures."""

    pruned: Quality
    figures: dict[str, float]


@dataclass
class Session:
    """A training with everything it needs: models, data, optimiser, sparsifier, what was best so far.

    Attributes:
        step: optimiser steps done.
        best: value of the best validation on target, and its step; None before there is one.
        stale: validations on target since then.
        recovered: what came after the cut, if anything.
    """

    job: TrainJob
    opened: OpenedModel
    method: Method
    recipe: Recipe
    splits: Splits
    validation: Dataset
    fit: Fitting
    optimizer: torch.optim.Optimizer
    sparsifier: Sparsifier
    folder: Path
    log: Log
    step: int = 0
    best: tuple[float, int] | None = None
    stale: int = 0
    seen: int = field(default=0)
    recovered: Recovered | None = None

    # --- one after the other ------------------------------------------------------------------

    def run(self, progress: Progress) -> None:
        """Train to the end of the recipe or until nothing improves."""
        model = self.opened.model
        with training(model, self.job.seed):
            for _ in track(range(self.step, self.recipe.steps), progress, f"training with {self.method.name}"):
                loss = self.fit.advance(model, self.optimizer, self.step, self._penalty())
                self.step += 1
                self._write_events()
                if self.step % self.job.evaluate_every == 0 or self.step == self.recipe.steps:
                    self._validate(loss)
                    self.save_state()
                    if self.job.patience is not None and self.stale >= self.job.patience:
                        self.log.write(self.step, event="early stop")
                        break

    def _penalty(self) -> Any:
        return self.sparsifier.penalty if any(part.has_penalty for part in self.sparsifier.parts) else None

    def _write_events(self) -> None:
        for entry in self.sparsifier.log[self.seen :]:
            self.log.write(**{"event" if key == "what" else key: value for key, value in entry.items()})
        self.seen = len(self.sparsifier.log)

    def _validate(self, loss: float) -> None:
        with evaluating(self.opened.model):
            found = quality(self.opened.model, self.validation)
        figures = {"train_loss": loss, f"validation_{found.metric}": found.value, "density": self.sparsifier.density}
        self.log.write(self.step, lr=self.optimizer.param_groups[0]["lr"], **figures)
        if not self.sparsifier.on_target:
            return  # a denser network is no candidate
        self.stale += 1
        if self.best is None or _better(found, self.best[0]):
            self.best, self.stale = (found.value, self.step), 0
            save_tree(
                {"model": model_state(self.opened.model), "sparsifier": self.sparsifier.state_dict()},
                self.folder / "best",
            )

    # --- killed and resumed -------------------------------------------------------------------

    def save_state(self) -> None:
        """Everything that the next step depends on."""
        state = {
            "model": model_state(self.opened.model),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "own": {name: getattr(self, name) for name in ("step", "best", "stale", "seen")},
        }
        save_tree(state, self.folder / "state")

    def finish(self) -> Plan:
        """The best state on target as the model, and its plan."""
        if self.best is not None:
            found = load_tree(self.folder / "best")
            put_back(self.opened.model, found["model"])
            self.sparsifier.load_state_dict(found["sparsifier"])
        plan = self.sparsifier.finish()
        self.opened.model.eval()
        if len(weight_masks(plan)) < len(plan.masks):
            apply_(self.opened.model, plan, example=next(self.splits.evaluation.batches(2)))
        self.log.close()
        return plan


def _better(found: Quality, best: float) -> bool:
    return found.value > best if found.higher_is_better else found.value < best


def train(job: TrainJob, out: str | Path, progress: Progress | None = None) -> Record:
    """Train sparsely, keep the state that is best on validation data, measure it on test data, save and report.

    While it runs, its state is in `OUT.training/`; run the same command again after a kill and it goes on there.

    Raises:
        SecateurError: anything wrong with names, numbers, model, data or output.
    """
    out, progress = Path(out), progress or Silent()
    check_free(out, job.force)
    sweep(out.absolute().parent)
    session, dense = prepare(job, out.with_name(out.name + ".training"), progress)
    try:
        session.run(progress)
    except SecateurError:
        if not (session.folder / "state").exists():  # nothing to go on from, so nothing that another try must match
            shutil.rmtree(session.folder)
        raise
    plan = session.finish()
    if job.recover:
        session.recovered = recover_after(session, plan, dense, progress)
    record = _record(session, dense, plan, str(out), progress)

    def extend(folder: Path) -> None:
        found = with_file_sizes(record, session.opened.folder, folder)
        write_json(folder / OWN / prune.RECORD, found.model_dump(mode="json"))
        write([found], folder / prune.PAGE)
        (folder / OWN / HISTORY).mkdir()
        shutil.copy(session.log.path, folder / OWN / HISTORY)
        if (board := session.folder / "tensorboard").exists():
            shutil.copytree(board, folder / OWN / HISTORY / "tensorboard")

    save(
        session.opened.model,
        out,
        plan,
        source=session.opened.folder,
        factory=session.opened.factory,
        data=job.data or session.opened.data,
        probe=next(session.splits.evaluation.batches(2)),
        verify=job.verify,
        force=job.force,
        extend=extend,
    )
    shutil.rmtree(session.folder)
    return record


def prepare(job: TrainJob, folder: Path, progress: Progress) -> tuple[Session, nn.Module]:
    """Check every name and number before anything slow, open everything, resume if there is something to resume.

    Returns:
        The session, and the model as it was before training.
    """
    method = api.find_method(job.method)
    method.configure(dict(job.settings))
    _ = job.budget
    recovery = recover.in_words(job.recover)[0] if job.recover else None
    recipe = job.checked_recipe()
    opened = open_model(job.model, job.weights, device=job.device, trust_factory=job.trust_factory)
    splits = training_data(job, opened)
    if recovery:
        recovery.refuse(opened.model, splits.calibration, method.units)
    if job.from_scratch:
        with seeded(job.seed):
            put_back(opened.model, model_state(fresh_model(opened)))
    dense = copy.deepcopy(opened.model)
    validation, rest = split(splits.calibration, job.validation, job.seed)
    for parameter in opened.model.parameters():
        parameter.requires_grad_(True)
    fit = Fitting(rest, recipe, seed=job.seed, progress=progress)
    order = job.model_dump(mode="json", exclude={"force", "verify", "tensorboard"})
    ledger = Ledger(folder, order | fit.known_by | {"network": model_digest(dense)})
    state = load_tree(folder / "state") if (folder / "state").exists() else None
    optimizer = recipe.make_optimizer(opened.model)
    if state is not None:
        put_back(opened.model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
    sparsifier = api.sparsify(
        opened.model,
        optimizer,
        method.name,
        budget=job.budget,
        steps=recipe.steps,
        seed=job.seed,
        include=job.include,
        exclude=job.exclude,
        progress=progress,
        example=rest,
        state=None if state is None else state["sparsifier"],
        **job.settings,
    )
    own: dict[str, Any] = {} if state is None else state["own"]
    ledger.begin()
    log = Log(folder, own.get("step", 0), job.tensorboard)
    found = Session(job, opened, method, recipe, splits, validation, fit, optimizer, sparsifier, folder, log, **own)
    return found, dense


def recover_after(session: Session, plan: Plan, dense: nn.Module, progress: Progress) -> Recovered:
    """Repair the cut network with the data that it was trained on."""
    job, model = session.job, session.opened.model
    pruned = quality(model, session.splits.evaluation, progress=progress)
    recovery, settings = recover.in_words(job.recover)
    request = Request(model, plan, session.fit.data, job.seed, progress, dense)
    return Recovered(pruned, recovery.run(request, settings))


def _record(session: Session, dense: nn.Module, plan: Plan, out: str, progress: Progress) -> Record:
    job, model, recovered = session.job, session.opened.model, session.recovered
    found = measure_together(
        {"before": dense, "after": model}, session.splits.evaluation, seed=job.seed, progress=progress
    )
    budget = {name: getattr(job, name) for name in BUDGETS}
    recovery = recover.in_words(job.recover) if job.recover else None
    asked = prune.Job(job.model, job.method, **budget, minimum=job.minimum, seed=job.seed)
    data = job.data or session.opened.data
    prepared = prune.Prepared(asked, session.opened, session.method, recovery, data, 0, session.splits)
    record = make_record(
        Outcome(
            prepared=prepared,
            plan=plan,
            before=found["before"],
            after=found["after"],
            pruned=recovered.pruned if recovered else None,
            recovery_figures=recovered.figures if recovered else {},
            machine=probe_machine(device=job.device, progress=progress),
            command=job.command(out),
        )
    )
    chosen = f"best of the validations on target: step {session.best[1]}" if session.best else "the last state"
    reproduce = record.reproduce.model_copy(
        update={
            "python": f"import secateur as sc\n# in your own loop:\nsparsifier = sc.sparsify(model, optimizer, "
            f"{session.method.name!r}, {budget_word(asked)}, steps={session.recipe.steps}, seed={job.seed})",
            "settings": dict(record.reproduce.settings) | {"recipe": session.recipe.model_dump(mode="json")},
        }
    )
    return record.model_copy(
        update={
            "title": f"{job.model} trained with {session.method.name} ({chosen})",
            "reproduce": reproduce,
        }
    )
