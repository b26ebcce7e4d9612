"""A training that ends with a cut: penalties act while it lasts, then the units of lowest score go.

A method that works so overrides the hook points of `StructuredEnd` that it needs and says how units are scored.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from secateur.core.errors import BudgetError
from secateur.core.method import Decision, Task
from secateur.core.units import Site
from secateur.data.running import evaluating
from secateur.shrink.structured import (
    Criterion,
    Filter,
    Members,
    StructuredSettings,
    View,
    begin,
    refuse_settings,
    weight_places,
)
from secateur.structure.kinds import OUT_DIM
from secateur.structure.layers import layout_of
from secateur.train.groups import Groups
from secateur.train.masking import refuse_outsiders
from secateur.train.part import Part
from secateur.train.sparsifier import Sparsifier

NEAR = 0.01  # of the largest score: below it a unit counts as driven to zero


class EndSettings(StructuredSettings):
    """What the cut at the end of a training is asked for."""

    coupled: bool = Field(True, description="also units that several layers make together, as on residual streams")

    def filter(self, model: nn.Module) -> Filter | None:
        """The sites that may be cut; None for all."""
        return None if self.coupled else made_alone(model)


def made_alone(model: nn.Module) -> Filter:
    """Whether at most one layer that mixes its inputs makes a site's units; depthwise convolutions pass them on."""
    layers = {f"{name}.weight": module for name, module in model.named_modules()}

    def alone(site: Site) -> bool:
        makers = set()
        for place in site.occurrences:
            layer = layers.get(place.parameter)
            layout = None if layer is None else layout_of(layer)
            if layout is not None and place.dim == OUT_DIM[layout] and not _depthwise(layer):
                makers.add(place.parameter)
        return len(makers) <= 1

    return alone


def _depthwise(layer: nn.Module | None) -> bool:
    groups = getattr(layer, "groups", 1)
    return bool(groups > 1 and groups == getattr(layer, "in_channels", None))


def unit_places(view: View, members: Members) -> set[tuple[str, int]]:
    """The (parameter, dimension) pairs of a unit's weights.

    `producers`: the weights of the layers that make it, as in `weight_places`. `all`: everything that goes with it,
    also what reads it, biases, and the scales and shifts of norms.
    """
    if members is Members.PRODUCERS:
        return weight_places(view, members)
    known = {name for name, _ in view.model.named_parameters()}
    places = (place for site in view.sites.values() for place in site.occurrences)
    return {(place.parameter, place.dim) for place in places if place.parameter in known}


class StructuredEnd(Part):
    """Finds the sites at the start, and scores and chooses when the training is over.

    Args:
        settings: of the cut.
        criterion: one score per unit, from the weights alone; higher = keep.

    Attributes:
        work: the sites and the budget, from the start on.
    """

    ready_at_end = True

    def __init__(self, settings: EndSettings, criterion: Criterion):
        self.settings, self.criterion = settings, criterion
        self.final: Decision | None = None

    def start(self, run: Sparsifier) -> None:
        """Find the sites; refuse now what could not be met in the end.

        Raises:
            ModelError: nothing can be cut, or has a score.
            BudgetError: out of reach; gives the reachable range.
        """
        refuse_settings(self.settings, "steps")
        order = run.order
        task = Task(
            model=run.model,
            budget=order.budget,
            seed=order.seed,
            include=order.include,
            exclude=order.exclude,
            keep_scores=True,
            progress=run.progress,
            example=order.inputs(run.model),
        )
        with evaluating(run.model):
            self.work = begin(task, self.settings, self.settings.filter(run.model))
            scores = self.work.scores(self.criterion, self.work.whole())
        self.work.refuse_unreachable(scores)

    def view(self) -> View:
        """What the criterion sees."""
        return View(self.work.task.model, self.work.structure, self.work.sites, self.work.task)

    def groups(self, run: Sparsifier, places: set[tuple[str, int]]) -> Groups:
        """The weights that a penalty acts on.

        Raises:
            ModelError: one of them is frozen or belongs to no group of the optimiser.
        """
        found = Groups(run.model, self.work.sites, places)
        refuse_outsiders(found.parameters, run.optimizer)
        return found

    def finish(self, run: Sparsifier) -> None:
        """Refuse an end before the end; note how far scores have separated.

        Raises:
            BudgetError: training stopped too early.
        """
        if run.step < run.steps:
            raise BudgetError(
                f"training stopped after {run.step} of {run.steps} steps, before its penalty had done its work; train "
                "on, or plan with fewer steps"
            )
        found = self.final = self.decision(run)
        kept = sum(int(mask.sum()) for mask in found.masks.values()) / sum(site.units for site in found.sites.values())
        scores = torch.cat(list(found.scores.values()))
        share = float((scores <= NEAR * scores.max()).double().mean())
        run.log.append({"step": run.step, "what": "cut", "density": kept, "near_zero": share})
        dead = next((name for name, score in found.scores.items() if not bool(score.any())), None)
        if dead is not None:
            run.warn(f"every unit of '{dead}' was driven to zero, so nothing passes there: lower the penalty's weight")

    def decision(self, run: Sparsifier) -> Decision:
        """What would go now; once the training is over, what goes."""
        return self.decided(run) if self.final is None else self.final

    def decided(self, run: Sparsifier) -> Decision:
        """The decision on the weights as they are: after a training the nearest widths are better than none."""
        with evaluating(run.model):
            return self.work.decided(self.criterion, near=False)
