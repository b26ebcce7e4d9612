"""Smaller networks trained against the dense one: what each loses, and what its training costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from secateur.core.errors import SettingsError
from secateur.core.method import Batch, Settings
from secateur.data.batches import as_batches, joined
from secateur.data.dataset import DataKind, Dataset
from secateur.measure.flops import flops
from secateur.measure.robustness import robustness
from secateur.measure.similarity import last_features, linear_cka
from secateur.measure.size import parameters
from secateur.measure.training_cost import energy, step_times
from secateur.train.loop import Recipe
from secateur.train.snapshot import model_state, put_back
from secateur.train.study import State, Study
from secateur.train.tickets import gain

Row = dict[str, Any]
BATCH = 64  # samples of a timed step where `fit` has no recipe, with SGD with momentum then; and of held-out samples
DENSE = "dense"


class RaceSettings(Settings):
    """How networks are compared."""

    seeds: int = Field(1, ge=1, description="draws of the initial weights, each with its own dense network")
    xi: float = Field(0.0, ge=0, description="of the metric: a ticket wins if it is at most so much worse than dense")
    deviations: float = Field(
        0.0, ge=0, description="standard deviations of the dense networks over the seeds, added to xi"
    )
    repeats: int = Field(20, ge=1, description="timed training steps of each network, taking turns")
    watts: float = Field(65.0, gt=0, description="power that the machine is taken to draw, for the energy estimate")
    grid: float = Field(0.475, ge=0, description="kg of CO2 equivalents per kWh, for the estimate; the world's mean")
    robust: bool = Field(True, description="accuracy under noise, blur and lost contrast, where there are images")


@dataclass(frozen=True)
class Entrant:
    """One network of a race.

    Attributes:
        network: what it is: ticket, random, filters ...
        make: the network at the start of its training, a new object.
        start: optimiser step that its training starts at.
        facts: columns of its row: p, victims ...
    """

    network: str
    make: Callable[[], nn.Module]
    start: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its results in the ledger."""
        return "-".join([self.network, *(f"{key}{self.facts[key]}" for key in ("p",) if key in self.facts)]) + (
            f"-from{self.start}" if self.start else ""
        )


class Race:
    """All trainings under one seed; every result comes from the study's ledger if it is there.

    Args:
        study: its `fit`, steps and metric; extras: `train`, samples to time steps on (default: those of a
            `Fitting`); `data`, held-out samples for similarity and robustness.
        settings: how to compare.
        draw: number of the seed.

    Raises:
        DataError: the held-out samples are no data.
        ModelError: the network cannot be run on them.
    """

    def __init__(self, study: Study, settings: RaceSettings, draw: int):
        self.study, self.settings, self.draw, self.seed = study, settings, draw, study.seed + draw
        self.dense = Entrant(DENSE, lambda: study.model(self.seed))
        given = study.extras.get("data")
        self.held_out: list[Batch] = [] if given is None else as_batches(given, BATCH)
        self.images = labelled_images(given if isinstance(given, Dataset) else self.held_out)
        if self.held_out:
            last_features(self.dense.make(), self.held_out[:1])  # what fails, fails before the trainings

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """From the ledger."""
        return self.study.ledger.once(f"seed{self.draw}-{name}", make)

    def trained(self, entrant: Entrant) -> tuple[nn.Module, dict[str, float]]:
        """The network after its training, and the figures of `fit`."""

        def make() -> dict[str, Any]:
            model = entrant.make()
            metrics = self.study.fit(model, {}, entrant.start, self.study.steps)
            return {"after": model_state(model), "metrics": {name: float(value) for name, value in metrics.items()}}

        found = self.once(entrant.name, make)
        model = entrant.make()
        put_back(model, found["after"])
        return model, found["metrics"]

    def state_at(self, step: int) -> State:
        """The dense network's state after its first `step` steps."""

        def make() -> State:
            model = self.dense.make()
            if step:
                self.study.fit(model, {}, 0, step)
            return model_state(model)

        found: State = self.once(f"step{step}", make)
        return found

    def rows(self, entrants: Sequence[Entrant]) -> list[Row]:
        """Train the dense network and the others; one row each, the dense one's first."""
        everyone = [self.dense, *entrants]
        ended = [self.trained(entrant) for entrant in everyone]
        times = self.once("times", lambda: self._times(everyone))
        figures = [self._figures(entrant, *end) for entrant, end in zip(everyone, ended, strict=True)]
        return [
            {"seed": self.seed, "network": entrant.network, "start": entrant.start}
            | dict(entrant.facts)
            | self._against(figure, figures[0])
            | self._cost(entrant, times)
            for entrant, figure in zip(everyone, figures, strict=True)
        ]

    # --- what is measured -------------------------------------------------------------------------

    def train_data(self) -> Any:
        """Training samples.

        Raises:
            SettingsError: nobody gave them.
        """
        found = self.study.extras.get("train", getattr(self.study.fit, "data", None))
        if found is None:
            raise SettingsError(
                "training samples are needed to score blocks and to time steps: give extras={'train': ...}, or a fit "
                "with its `data`"
            )
        return found

    def _times(self, everyone: Sequence[Entrant]) -> dict[str, float]:
        given = getattr(self.study.fit, "recipe", None)
        recipe = given if isinstance(given, Recipe) else Recipe(batch=BATCH)
        batch = as_batches(self.train_data(), recipe.batch)[0]
        models = {entrant.name: entrant.make() for entrant in everyone}
        return step_times(
            models, batch, recipe.make_optimizer, repeats=self.settings.repeats, progress=self.study.progress
        )

    def _cost(self, entrant: Entrant, times: Mapping[str, float]) -> Row:
        own, dense = times[entrant.name], times[DENSE]
        seconds = own / 1000 * (self.study.steps - entrant.start)
        spent = energy(seconds, self.settings.watts, self.settings.grid)
        whole = energy(dense / 1000 * self.study.steps, self.settings.watts, self.settings.grid)
        return {
            "step_ms": own,
            "speedup": dense / own,
            "seconds": seconds,
            "kwh": spent.kwh,
            "co2_kg": spent.co2,
            "co2_saved": 100 * (1 - spent.kwh / whole.kwh),
        }

    def _figures(self, entrant: Entrant, model: nn.Module, metrics: Mapping[str, float]) -> Row:
        def make() -> Row:
            example = as_batches(self.train_data(), 1)[0]
            found: Row = {"parameters": parameters(model), "flops": flops(model, example)}
            if self.held_out:
                dense, _ = self.trained(self.dense)
                found["cka"] = linear_cka(last_features(model, self.held_out), last_features(dense, self.held_out))
            if self.settings.robust and self.images is not None:
                found["robustness"] = robustness(model, self.images, self.study.seed)
            return found

        return {"metrics": dict(metrics), **self.once(f"{entrant.name}-figures", make)}

    def _against(self, figure: Row, dense: Row) -> Row:
        difference = gain(figure["metrics"], dense["metrics"], self.study.metric)
        row = {**figure["metrics"], "difference": difference}
        for name in ("parameters", "flops"):
            row[name] = figure[name]
            row[f"{name}_saved"] = 100 * (1 - figure[name] / dense[name])
        if "cka" in figure:
            row["cka"] = figure["cka"]
        if "robustness" in figure:
            row["robustness"] = {
                kind: [own - other for own, other in zip(values, dense["robustness"][kind], strict=True)]
                for kind, values in figure["robustness"].items()
            }
        return row


def judged(rows: Sequence[Row], settings: RaceSettings, metric: str) -> tuple[list[Row], list[Row]]:
    """The rows with a `winning` flag, and one entry per kind of network with means over the seeds.

    A ticket wins if accuracy + xi >= that of the dense network of its seed; on average, if the mean difference
    + xi >= 0.
    """
    dense = [row[metric] for row in rows if row["network"] == DENSE]
    if settings.deviations and len(dense) < 2:
        raise SettingsError(f"deviations={settings.deviations:g} needs two seeds or more; give seeds=3")
    xi = settings.xi + (settings.deviations * stdev(dense) if settings.deviations else 0.0)
    marked = [row | {"winning": row["difference"] + xi >= 0} for row in rows]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in marked:
        groups.setdefault((row["network"], row["start"], row.get("p")), []).append(row)
    summary = [
        {
            "network": network,
            "start": start,
            "p": p,
            **{name: fmean(row[name] for row in group) for name in MEANS if name in group[0]},
            "xi": xi,
            "winning": fmean(row["difference"] for row in group) + xi >= 0,
            "won": sum(row["winning"] for row in group),
            "seeds": len(group),
        }
        for (network, start, p), group in groups.items()
        if network != DENSE
    ]
    return marked, summary


def labelled_images(data: Dataset | Sequence[Batch]) -> Dataset | None:
    """Samples whose images can be damaged and told apart, as one data set; None where they are something else.

    Raises:
        DataError: batches that cannot be joined.
    """
    if isinstance(data, Dataset):
        images = data.kind is DataKind.IMAGE and data.inputs.dim() == 4 and data.targets is not None
        return data if images else None
    if not data or not all(map(_shows_images, data)):
        return None
    everything = joined(data)
    return Dataset("held-out samples", DataKind.IMAGE, everything.args[0], everything.target)


def _shows_images(batch: Batch) -> bool:
    """Whether a batch is images `[samples, channels, height, width]` with one class each, and nothing else."""
    first = batch.args[0] if len(batch.args) == 1 and not batch.kwargs else None
    images = isinstance(first, Tensor) and first.is_floating_point() and first.dim() == 4
    return images and batch.target is not None and batch.target.dim() == 1


MEANS = ("difference", "parameters_saved", "flops_saved", "speedup", "co2_saved", "cka")


def copied(model: nn.Module, state: State) -> nn.Module:
    """A new model with another state."""
    clone = copy.deepcopy(model)
    put_back(clone, state)
    return clone
