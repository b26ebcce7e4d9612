"""Procedures around whole trainings: what they are given, and how they survive being killed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.budget import Budget
from secateur.core.errors import ModelError, SettingsError
from secateur.core.method import Settings, matches
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import generator, seeded
from secateur.core.trees import load_tree, save_tree
from secateur.core.units import Site
from secateur.structure.sites import weight_layers
from secateur.train.loop import Fit
from secateur.train.snapshot import model_state, put_back

State = dict[str, Tensor]
Masks = dict[str, Tensor]
ORDER = "order"  # in a ledger's folder


class Ledger:
    """Results by name, each written once: a killed procedure finds them again and goes on.

    Args:
        folder: where; in memory only without one. Made with the first result, or by `begin`.
        order: what the results depend on.

    Raises:
        SettingsError: the folder's results were made with another order; names the first difference.
    """

    def __init__(self, folder: Path | None, order: Mapping[str, Any]):
        self.folder, self.order, self._held = folder, dict(order), dict[str, Any]()
        if folder is None or not (folder / ORDER).exists():
            return
        saved = load_tree(folder / ORDER)
        if found := _first_difference(saved, self.order):
            raise SettingsError(
                f"'{folder}' holds a run with {found}; choose another folder or the same settings, or remove it"
            )

    def begin(self) -> None:
        """Write down what the results depend on; whoever comes with another order is refused from now on."""
        if self.folder is not None and not (self.folder / ORDER).exists():
            save_tree(self.order, self.folder / ORDER)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The stored result of that name, or `make()`, stored. Results are plain data and tensors."""
        if name in self._held:
            return self._held[name]
        if self.folder is None:
            self._held[name] = make()
            return self._held[name]
        place = self.folder / name
        if not place.exists():
            made = make()
            self.begin()
            save_tree(made, place)
        return load_tree(place)


def _first_difference(saved: Mapping[str, Any], asked: Mapping[str, Any], before: str = "") -> str:
    for key in {**asked, **saved}:
        one, other = saved.get(key), asked.get(key)
        if one != other and isinstance(one, Mapping) and isinstance(other, Mapping):
            return _first_difference(one, other, f"{before}{key}.")
        if one != other:
            return f"{before}{key}={one!r}, this one has {other!r}"
    return ""


@dataclass
class Study:
    """What a procedure works with.

    Attributes:
        make: a freshly initialised model; called with torch seeded, so that a seed gives always the same one.
        fit: the caller's training, `fit(model, masks, start, stop) -> metrics`.
        steps: optimiser steps of one whole training.
        budget: what stays in the end.
        seed: of initialisation and every random draw.
        metric: name of the figure that is compared; higher = better unless it ends in `loss`.
        include, exclude: shell patterns over parameter names that may be pruned.
        ledger: where results are kept.
        progress: where to report.
        extras: what single procedures need besides, e.g. `reordered` or `loss`, by name.
    """

    make: Callable[[], nn.Module]
    fit: Fit
    steps: int
    budget: Budget
    seed: int = 0
    metric: str = "accuracy"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    ledger: Ledger = field(default_factory=lambda: Ledger(None, {}))
    progress: Progress = field(default_factory=Silent)
    extras: Mapping[str, Any] = field(default_factory=dict)

    def model(self, seed: int | None = None) -> nn.Module:
        """A freshly initialised model."""
        with seeded(self.seed if seed is None else seed):
            return self.make()

    def sites(self, model: nn.Module) -> dict[str, Site]:
        """The weights that may be pruned."""
        return weight_layers(model, lambda name: matches(name, self.include, self.exclude)).sites

    def rng(self, *purpose: str) -> torch.Generator:
        """A generator for one purpose."""
        return generator(self.seed, *purpose)

    def extra(self, name: str, method: str) -> Any:
        """Something only some procedures need.

        Raises:
            SettingsError: it was not given.
        """
        if name not in self.extras:
            raise SettingsError(f"{method} needs {name}=...; see its documentation")
        return self.extras[name]

    def trained(self, state: State, masks: Masks, start: int, stop: int) -> tuple[State, dict[str, float]]:
        """A fresh model with this state, trained under masks; its state afterwards and the metrics.

        Raises:
            ModelError: the caller's `fit` let a removed weight become non-zero.
        """
        model = self.model()
        put_back(model, masked_state(state, masks))
        metrics = {name: float(value) for name, value in self.fit(model, masks, start, stop).items()}
        found = model_state(model)
        for name, keep in masks.items():
            if bool((found[name][~keep] != 0).any()):
                raise ModelError(
                    f"fit left removed weights of '{name}' non-zero; train inside "
                    "`with secateur.MaskKeeper(model, masks, optimizer)`"
                )
        return found, metrics


@dataclass
class Findings:
    """What a procedure found.

    Attributes:
        rows: a table, one row per round, candidate or setting; plain data.
        summary: figures over all rows.
        masks: what stays in the end, for procedures that prune.
        state: the weights that belong to it.
        warnings: sentences for the user.
        plan: the masks as a plan with provenance; set by the caller of the procedure.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    masks: Masks | None = None
    state: State | None = None
    warnings: list[str] = field(default_factory=list)
    plan: Plan | None = None

    def to_json(self) -> dict[str, Any]:
        """Rows, summary and warnings as plain data."""
        return {"rows": self.rows, "summary": self.summary, "warnings": self.warnings}


def masked_state(state: State, masks: Masks) -> State:
    """A copy with zeros where masks remove."""
    return {
        name: value.masked_fill(~masks[name], 0) if name in masks else value.clone() for name, value in state.items()
    }


class RewindTo(StrEnum):
    """What the survivors are put back to before they are trained again."""

    INIT = "init"  # their values at initialisation (the lottery ticket)
    STEP = "step"  # their values at step k (Frankle et al. 2019)
    LR = "lr"  # not at all; only the learning rate goes back to step k (Renda et al. 2020)
    NONE = "none"  # not at all; the whole schedule is run again from where the weights are


class RewindSettings(Settings):
    """How rounds follow each other."""

    rewind: RewindTo = Field(RewindTo.INIT, description="init, step (weights of step k), lr (schedule only) or none")
    k: int = Field(0, ge=0, description="optimiser steps after initialisation that rewinding goes back to")


@dataclass(frozen=True)
class Level:
    """One round: pruned `index` times, trained, not yet pruned again.

    Attributes:
        index: 0 is the dense network.
        masks: in force during the training.
        before, after: states at the start and at the end of the training.
        metrics: what `fit` said.
        density: fraction of the prunable weights kept.
    """

    index: int
    masks: Masks
    before: State
    after: State
    metrics: dict[str, float]

    @property
    def density(self) -> float:
        """Fraction of the prunable weights kept."""
        return sum(int(m.sum()) for m in self.masks.values()) / max(1, sum(m.numel() for m in self.masks.values()))


class Rounds:
    """Train, prune, put back, train again: each round from the ledger if it is there.

    Args:
        study: what to train and how.
        settings: where the survivors are put back to.
        name: prefix of the results in the ledger.
    """

    def __init__(self, study: Study, settings: RewindSettings, name: str = "round"):
        if settings.k > study.steps:
            raise SettingsError(f"cannot rewind to step {settings.k} of a training of {study.steps} steps")
        if settings.rewind is RewindTo.INIT and settings.k:
            raise SettingsError(f"rewind=init is step 0; for k={settings.k} give rewind=step")
        self.study, self.settings, self.name = study, settings, name

    @property
    def start(self) -> int:
        """The optimiser step that each round's training starts at."""
        return self.settings.k if self.settings.rewind in (RewindTo.STEP, RewindTo.LR) else 0

    def trunk(self) -> State:
        """The state that every round goes back to: initial, or after k steps of dense training."""
        study, k = self.study, self.start

        def make() -> State:
            initial = model_state(study.model())
            return study.trained(initial, {}, 0, k)[0] if k else initial

        found: State = study.ledger.once(f"{self.name}-trunk", make)
        return found

    def first(self) -> Level:
        """Round 0: the dense network, trained from the trunk."""
        masks = {name: torch.ones(site.shape, dtype=torch.bool) for name, site in self._sites().items()}
        return self._trained(0, masks, self.trunk())

    def next(self, level: Level, masks: Masks) -> Level:
        """The round after `level`, with masks that keep no more than its own.

        Raises:
            ModelError: a mask would bring a removed weight back.
        """
        for name, keep in masks.items():
            if bool((keep & ~level.masks[name]).any()):
                raise ModelError(f"round {level.index + 1} would bring back removed weights of '{name}'")
        keeps = self.settings.rewind in (RewindTo.LR, RewindTo.NONE)
        return self._trained(level.index + 1, masks, level.after if keeps else self.trunk())

    def _sites(self) -> dict[str, Site]:
        return self.study.sites(self.study.model())

    def _trained(self, index: int, masks: Masks, state: State) -> Level:
        study = self.study

        def make() -> dict[str, Any]:
            after, metrics = study.trained(state, masks, self.start, study.steps)
            return {"masks": masks, "before": masked_state(state, masks), "after": after, "metrics": metrics}

        return Level(index=index, **study.ledger.once(f"{self.name}-{index}", make))
