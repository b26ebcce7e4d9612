"""Structured pruning and training in turns, around the caller's `fit`: cut, train a slice of the steps, cut again.

The network of every stage is really smaller. What is kept between stages is its state at the dense shape with
zeros where units are gone, and the masks, so that a plan on the dense model says everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.structured import Counts
from secateur.core.errors import ModelError, SettingsError
from secateur.core.fingerprint import digests
from secateur.core.method import Batch, Task
from secateur.core.plan import Plan
from secateur.core.progress import track
from secateur.core.seeding import seeded
from secateur.core.units import Site
from secateur.data.batches import as_batches
from secateur.data.example import describe_example, example_for
from secateur.data.running import evaluating
from secateur.shrink.apply import stamp
from secateur.shrink.cut import kept_indices, removed_indices, tensors_of
from secateur.shrink.structured import Work
from secateur.shrink.verify import cut_
from secateur.train.distil import Distilling
from secateur.train.loop import Fit, Fitting
from secateur.train.snapshot import model_state, put_back
from secateur.train.sparsifier import Order
from secateur.train.stages import Slices, stage_bounds
from secateur.train.study import Findings, Masks, State, Study


@dataclass(frozen=True)
class Shrunk:
    """How far a cut went.

    Attributes:
        masks: site -> keep-mask at the dense model's width.
        scores: site -> what ranked the units in the last iteration.
        counts: site -> kept units.
        iterations: how many there were.
        warnings: sentences for the user.
        details: for the stage's row, besides what every method has there; plain data.
        last: no further stage is needed.
    """

    masks: Masks
    scores: dict[str, Tensor]
    counts: Counts
    iterations: int
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    last: bool = False


Shrink = Callable[[Task, Masks, int], tuple[Work, Shrunk]]
"""A task on the dense model, what stays of it so far, the stage 1, ..., P -> the sites, and what stays then.

In the first stage the masks are empty: nothing is gone.
"""


class Interleaved:
    """P stages, each from the ledger if it is there.

    Args:
        study: `make` gives the trained model; extras `state` and `calibration` may stand in.
        stages: P.
        slices: how the steps are dealt out; None: every stage is a whole training of its own.
        method, settings: for the plan's provenance.

    Raises:
        SettingsError: a stage gets no step, the steps are not the recipe's, no data to prune on, other weights
            than the folder's.
    """

    def __init__(self, study: Study, stages: int, slices: Slices | None, method: str, settings: Mapping[str, Any]):
        self.study, self.stages, self.method, self.settings = study, stages, method, settings
        self.fit: Fit = study.fit
        self.bounds = [(0, study.steps)] * stages
        self.warnings: list[str] = []
        if slices is not None:
            self.bounds = list(pairwise(stage_bounds(study.steps, stages, slices)))
            self.warnings = _caveats(study)
        data = study.extras.get("calibration", getattr(study.fit, "data", None))
        if data is None:
            raise SettingsError(f"{method} needs data to prune on: extras={{'calibration': ...}}")
        self.batches = as_batches(data)
        self.state = self._initial()
        self.example: Batch = example_for(self.model(self.state), data)

    def _initial(self) -> State:
        model = self.study.model()
        if "state" in self.study.extras:
            put_back(model, self.study.extras["state"])
        weights = digests(tensors_of(model))
        if self.study.ledger.once("weights", lambda: weights) != weights:
            raise SettingsError("the folder holds a study of other weights of this network; choose another folder")
        return model_state(model)

    def model(self, state: State) -> nn.Module:
        """A new dense model with this state."""
        model = self.study.model()
        put_back(model, state)
        return model

    def distil(self, temperature: float, alpha: float) -> None:
        """Let the dense model teach in all stages.

        Raises:
            SettingsError: the training is the caller's own code.
        """
        if type(self.study.fit) is not Fitting:
            raise SettingsError("alpha > 0 needs a secateur Fitting; a fit of your own must bring its own teacher")
        self.fit = Distilling(self.study.fit, self.model(self.state), temperature, alpha)

    def run(self, shrink: Shrink) -> Findings:
        """All stages; a row for each, and the last one's weights with the plan that cuts them.

        Raises:
            BudgetError: a stage's goal cannot be met.
            ModelError: `fit` changed the network's shape.
        """
        found = Findings(rows=[], warnings=list(self.warnings))
        masks, sites, state = Masks(), dict[str, Any](), self.state
        for stage in track(range(1, self.stages + 1), self.study.progress, "stages"):
            make = partial(self.stage, shrink, stage, masks, state)
            result = self.study.ledger.once(f"stage-{stage}", make)
            masks, sites, state = result["masks"], result["sites"], result["state"]
            found.rows.append(result["row"])
            found.warnings += [line for line in result["warnings"] if line not in found.warnings]
            if result["last"]:
                break
        last = found.rows[-1]
        dense = sum(parameter.numel() for parameter in self.study.model().parameters())
        found.summary = {"parameters": last["parameters"], "kept": last["parameters"] / dense, **last["after"]}
        found.state = state
        found.plan = self.plan({name: Site.from_json(data) for name, data in sites.items()}, masks, found)
        return found

    def plan(self, sites: dict[str, Site], masks: Masks, found: Findings) -> Plan:
        """What cuts the dense model with the trained weights."""
        study, model = self.study, self.model(found.state or {})
        order = Order(
            method=self.method,
            budget=study.budget,
            steps=study.steps,
            settings=self.settings,
            seed=study.seed,
            include=study.include,
            exclude=study.exclude,
        )
        made = Plan(
            sites,
            masks,
            provenance=(order.provenance(type(model).__name__),),
            warnings=tuple(found.warnings),
            example=describe_example(self.example),
        )
        stamp(model, made)
        return made

    def stage(self, shrink: Shrink, stage: int, masks: Masks, state: State) -> dict[str, Any]:
        """Cut, train, and put the result back into the dense shape."""
        start, stop = self.bounds[stage - 1]
        model = self.model(state)
        with evaluating(model), seeded(self.study.seed):
            work, found = shrink(self.task(model), masks, stage)
        plan = Plan(sites=dict(work.sites), masks=found.masks)
        shapes = {name: value.shape for name, value in state.items()}
        cut_(model, plan, self.example, structure=work.structure)
        row = {
            "stage": stage,
            "start": start,
            "stop": stop,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "iterations": found.iterations,
            "widths": found.counts,
            **found.details,
            "before": dict(self.fit(model, {}, start, start)),
            "after": dict(self.fit(model, {}, start, stop)),
        }
        sites = {name: site.to_json() for name, site in work.sites.items()}
        trained = widened(model_state(model), plan, shapes)
        result = {"row": row, "masks": found.masks, "state": trained, "sites": sites}
        return result | {"warnings": found.warnings, "last": found.last}

    def task(self, model: nn.Module) -> Task:
        """What the pruning of a stage works on."""
        study = self.study
        return Task(
            model=model,
            budget=study.budget,
            batches=self.batches,
            seed=study.seed,
            include=study.include,
            exclude=study.exclude,
            progress=study.progress,
            example=self.example,
        )


def widened(state: State, plan: Plan, shapes: Mapping[str, torch.Size]) -> State:
    """The state of a cut model at the dense shapes, zero where units are gone.

    Raises:
        ModelError: a tensor has another shape than the cut gave it; names it.
    """
    removed = removed_indices(plan)
    found = {name: wider(value, removed.get(name, {})) for name, value in state.items()}
    for name, value in found.items():
        if value.shape != shapes[name]:
            raise ModelError(f"fit changed the shape of '{name}'; train the network that it is given, in place")
    return found


def wider(tensor: Tensor, removed: Mapping[int, Tensor]) -> Tensor:
    """The inverse of a cut: the tensor with zeros put in at the removed indices."""
    for dim, gone in removed.items():
        size = tensor.shape[dim] + len(gone)
        shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
        kept = kept_indices(size, gone).to(tensor.device)
        tensor = tensor.new_zeros(shape).index_copy_(dim, kept, tensor)
    return tensor


def _caveats(study: Study) -> list[str]:
    steps = getattr(study.fit, "steps", study.steps)
    if steps != study.steps:
        raise SettingsError(
            f"the stages share one training of {steps} steps, the length of the recipe; leave out steps={study.steps}"
        )
    if isinstance(study.fit, Fitting) and steps > study.fit.stream.per_epoch:
        return [
            f"{steps} steps meet the data {steps / study.fit.stream.per_epoch:.3g} times, so that stages share "
            "samples; give more data or fewer steps"
        ]
    return []
