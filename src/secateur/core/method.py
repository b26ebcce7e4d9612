"""How a method is written down: metadata, settings, and one function that decides what stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, get_args, get_origin
from typing import Protocol as Interface

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from secateur.core.budget import Budget
from secateur.core.errors import SettingsError, UnknownNameError
from secateur.core.journal import Journal
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import generator
from secateur.core.tags import Tags
from secateur.core.units import Site, UnitKind


class Settings(BaseModel):
    """Base of a method's settings: frozen, unknown names refused, every field described."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def uses_data(self) -> bool:
        """Whether with these settings a method reads data that it can do without under others."""
        return False

    @property
    def uses_example(self) -> bool:
        """Whether with these settings a method that is not structured runs the model on an example."""
        return False


def configure(owner: str, kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Checked settings from names and values; strings are converted, `a,b` to several values where several fit.

    Raises:
        UnknownNameError: `owner` has no such setting; gives the nearest names.
        SettingsError: a value of the wrong type or out of range.
    """
    for name in values:
        if name not in kind.model_fields:
            raise UnknownNameError(f"setting of {owner}", name, kind.model_fields)
    given = {name: _several(kind, name, value) for name, value in values.items()}
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "settings"
        raise SettingsError(f"setting '{place}' of {owner}: {first['msg']}, got {first['input']!r}") from None


def _several(kind: type[Settings], name: str, value: Any) -> Any:
    """The parts of a string for a setting that is a tuple; anything else as it is."""
    annotation = kind.model_fields[name].annotation
    if not isinstance(value, str) or tuple not in {get_origin(one) for one in (annotation, *get_args(annotation))}:
        return value
    return tuple(part for part in map(str.strip, value.split(",")) if part)


def describe(kind: type[Settings]) -> list[dict[str, Any]]:
    """Name, type, default and meaning of every setting."""
    return [
        {
            "name": name,
            "type": getattr(info.annotation, "__name__", str(info.annotation)),
            "default": None if info.is_required() else info.get_default(call_default_factory=True),
            "help": info.description or "",
        }
        for name, info in kind.model_fields.items()
    ]


class Protocol(StrEnum):
    """When a method acts: the four protocols of the library."""

    PLAN = "plan"  # before or after training: (model, budget, data) -> plan
    SPARSIFIER = "sparsifier"  # during training: step() after optimizer.step()
    PROCEDURE = "procedure"  # around training: over the caller's own fit(model)
    ATTACHMENT = "attachment"  # at run time: a context manager


class Group(StrEnum):
    """Over what a method meets the sparsity: floor(sparsity * size) units of it go, exactly.

    `COST`: the sparsity is a share of parameters, met as closely as whole units allow. `AIM`: learned or accepted
    under a loss, so it is aimed at; what was reached is in the plan.
    """

    TOTAL = "total"
    SITE = "site"
    ROW = "row"
    COST = "cost"
    AIM = "aim"


@dataclass(frozen=True)
class Batch:
    """One call of a model: positional and keyword inputs, and the target where there is one.

    `targets` are those of a model that serves several tasks, by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """All input tensors in a fixed order, the targets last."""
        inputs = [*self.args, *(self.kwargs[key] for key in sorted(self.kwargs)), self.target]
        inputs += [self.targets[name] for name in sorted(self.targets)]
        return [item for item in inputs if isinstance(item, Tensor)]

    @property
    def samples(self) -> int:
        """Number of sequences or images: the first dimension of the first tensor."""
        return int(self.tensors[0].shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self.each(lambda item: item.to(device) if isinstance(item, Tensor) else item)

    def each(self, change: Callable[[Any], Any]) -> Batch:
        """A batch of what a function makes of every input and target."""
        return Batch(
            tuple(map(change, self.args)),
            {name: change(item) for name, item in self.kwargs.items()},
            change(self.target),
            {name: change(item) for name, item in self.targets.items()},
        )


def matches(name: str, include: Sequence[str], exclude: Sequence[str] = ()) -> bool:
    """Whether shell patterns let a site be pruned; `exclude` wins.

    A pattern that matches a module's name speaks for everything inside that module.
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]

    def matched(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)

    return matched(include) and not matched(exclude)


class Residency(Interface):
    """Where the weights of a model's parts are while nobody needs them."""

    @property
    def device(self) -> torch.device:
        """Where parts are run."""

    def inside(self, name: str) -> AbstractContextManager[None]:
        """The weights of the module `name` are there inside the block."""

    def outside(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """The weights of everything outside the modules `names` are there inside the block."""


@dataclass(frozen=True)
class Task:
    """What a method works on.

    Attributes:
        model: in eval mode, without gradients; a method leaves it as it found it.
        budget: how much may stay.
        batches: calibration data; empty for methods that need none.
        seed: for every random draw, through `rng`.
        include, exclude: shell patterns over site names; exclude wins.
        keep_scores: whether the decision should carry its scores.
        progress: where long work reports to.
        example: inputs to find the structure with, for structured methods; for others whose settings say
            `uses_example` inputs of the right shape.
    """

    model: nn.Module
    budget: Budget
    batches: Sequence[Batch] = ()
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_scores: bool = False
    progress: Progress = field(default_factory=Silent)
    example: Batch | None = None
    journal: Journal = field(default_factory=Journal)
    residency: Residency | None = None

    def rng(self, *purpose: str) -> torch.Generator:
        """A generator for one purpose, e.g. one site."""
        return generator(self.seed, *purpose)

    def wants(self, name: str) -> bool:
        """Whether the user's patterns let a site be pruned."""
        return matches(name, self.include, self.exclude)


@dataclass
class Decision:
    """What a method returns; the library turns it into a plan with provenance.

    Attributes:
        sites, masks: what there was and what stays.
        weights: new values of parameters, for methods that compensate.
        scores: site -> scores, same shape as the mask, for `Task.keep_scores`.
        facts: site -> figures worth a column in the report.
        warnings: sentences for the user.
        structure: what structured methods found the sites with, so that a cut need not look again.
        additions: norms and shortcuts that the model gets; see `Plan.additions`.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    masks: MutableMapping[str, Tensor] = field(default_factory=dict)
    weights: MutableMapping[str, Tensor] = field(default_factory=dict)
    scores: MutableMapping[str, Tensor] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    structure: Any = None
    additions: list[dict[str, Any]] = field(default_factory=list)


PlanFunction = Callable[[Task, Any], Decision]
PartsFunction = Callable[[Any, Any], Sequence[Any]]  # (train.sparsifier.Order, settings) -> train.part.Part, ...
ProcedureFunction = Callable[[Any, Any], Any]  # (train.study.Study, settings) -> train.study.Findings


@dataclass(frozen=True, kw_only=True)
class Method:
    """A catalogue entry. Everything about a method that others generate from is here.

    Attributes:
        name: snake_case; hyphens are accepted from users.
        paper: number or id of the paper in the library's list, e.g. "15" or "B1".
        title: the paper's title.
        citation: authors, year, venue, arXiv number.
        formula: the score or rule in one line.
        kind: which of the four protocols.
        tags: the survey's taxonomy.
        settings: class of the settings.
        run: makes a plan before or after training; None for methods that cannot.
        parts: what acts during training; None for methods that do not.
        procedure: what goes on around whole training runs; None for methods that do not.
        units: what it removes.
        exact: over what the sparsity is met exactly.
        needs_data, needs_labels: what calibration must provide.
        patterns: whether N:M budgets are supported.
        changes_weights: whether kept weights get new values.
        structured: whether it cuts channels, neurons, heads or widths; `units` is then the usual kind.
        streams: whether it touches weights only during visits of a block walk, so that the others may be on disk.
    """

    name: str
    paper: str
    title: str
    citation: str
    formula: str
    kind: Protocol
    tags: Tags
    settings: type[Settings]
    run: PlanFunction | None = None
    parts: PartsFunction | None = None
    procedure: ProcedureFunction | None = None
    units: UnitKind
    exact: Group
    needs_data: bool = False
    needs_labels: bool = False
    patterns: bool = False
    changes_weights: bool = False
    structured: bool = False
    streams: bool = False

    def __post_init__(self) -> None:
        given = {Protocol.PLAN: self.run, Protocol.SPARSIFIER: self.parts, Protocol.PROCEDURE: self.procedure}
        if self.kind in given and given[self.kind] is None:
            raise SettingsError(f"method '{self.name}' is a {self.kind} and has no function for it")

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """All the protocols it can act by; `kind` is the one it is known for."""
        given = {Protocol.PLAN: self.run, Protocol.SPARSIFIER: self.parts, Protocol.PROCEDURE: self.procedure}
        return tuple(protocol for protocol, function in given.items() if function is not None)

    def configure(self, values: dict[str, Any]) -> Settings:
        """Checked settings from names and values (strings are converted).

        Raises:
            UnknownNameError: no such setting; gives the nearest names.
            SettingsError: a value of the wrong type or out of range.
        """
        return configure(self.name, self.settings, values)

    def describe_settings(self) -> list[dict[str, Any]]:
        """Name, type, default and meaning of every setting."""
        return describe(self.settings)

    def to_json(self) -> dict[str, Any]:
        """The catalogue entry as plain data."""
        return {
            "name": self.name,
            "paper": self.paper,
            "title": self.title,
            "citation": self.citation,
            "formula": self.formula,
            "kind": self.kind.value,
            "protocols": [protocol.value for protocol in self.protocols],
            "units": self.units.value,
            "needs_data": self.needs_data,
            "needs_labels": self.needs_labels,
            "patterns": self.patterns,
            "changes_weights": self.changes_weights,
            "structured": self.structured,
            "tags": self.tags.to_json(),
            "settings": self.describe_settings(),
        }
