"""What all recoveries share: a name, settings, and one call on a pruned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.core.method import Settings, configure
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.units import UnitKind
from secateur.data.dataset import Dataset


@dataclass(frozen=True)
class Request:
    """What a recovery works on.

    Attributes:
        model: already pruned; changed in place.
        plan: what was removed and must stay removed.
        data: training samples.
        seed: of the data order.
        progress: where to report.
        dense: the model before pruning, for recoveries that learn from it.
    """

    model: nn.Module
    plan: Plan
    data: Dataset
    seed: int
    progress: Progress
    dense: nn.Module | None = None


def anything(model: nn.Module, data: Dataset, removed: UnitKind) -> None:
    """Refuses nothing."""


@dataclass(frozen=True)
class Recovery:
    """A way to win back quality.

    Attributes:
        name: of the catalogue.
        title: what to expect of it.
        settings: of `run`.
        run: returns figures worth reporting, such as the last training loss.
        refuse: (model, data, what was or will be removed) -> raises what can be told before anything is removed.
    """

    name: str
    title: str
    settings: type[Settings]
    run: Callable[[Request, Any], dict[str, float]]
    refuse: Callable[[nn.Module, Dataset, UnitKind], None] = anything

    def configure(self, values: Mapping[str, Any]) -> Settings:
        """Checked settings.

        Raises:
            UnknownNameError, SettingsError: a wrong name or value.
        """
        return configure(self.name, self.settings, values)
