"""What jobs that train have in common: the request, its file, the data, fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import Field
from torch import nn

from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, DataError, ModelError, SettingsError
from secateur.core.method import Settings, configure
from secateur.core.seeding import generator
from secateur.data.dataset import Dataset, Splits
from secateur.io.data import open_data, split_generated
from secateur.io.labels import refuse_other_classes
from secateur.io.models import OpenedModel
from secateur.shrink.load import build
from secateur.train.loop import Recipe
from secateur.zoo import get
from secateur.zoo.loading import make

BUDGETS = ("sparsity", "parameters", "flops")
WINDOWS = 4096  # windows of text to train on; images are used up to the data's end


class TrainingRequest(Settings):
    """What a job that trains can be asked for, by flags or in one YAML file."""

    model: str = Field(description="zoo:NAME, a folder, a hub id, or module.path:factory")
    method: str = Field(description="a name from `secateur methods`")
    sparsity: float | None = Field(None, description="fraction of the units to remove, in [0, 1)")
    parameters: float | None = Field(None, description="instead: parameters kept; up to 1 a share")
    flops: float | None = Field(None, description="instead: FLOPs kept; up to 1 a share")
    minimum: int = Field(0, ge=0, description="every layer keeps at least so many units")
    data: str | None = Field(None, description="training and test data; default: the model's own")
    settings: dict[str, Any] = Field(default_factory=dict, description="of the method")
    recipe: dict[str, Any] = Field(default_factory=dict, description="how to train: steps, batch, lr, optimizer, ...")
    include: tuple[str, ...] = Field(("*",), description="only weights that match")
    exclude: tuple[str, ...] = Field((), description="no weights that match")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the training data that decides")
    seed: int = Field(0, description="of everything random")
    weights: str | None = Field(None, description="safetensors file for module.path:factory")
    device: str = Field("cpu", description="cpu, cuda, ...")
    trust_factory: bool = Field(False, description="import the factory that a result folder names")
    verify: bool = Field(True, description="reload the result and compare before keeping it")
    force: bool = Field(False, description="replace an existing output folder")

    @property
    def budget(self) -> Budget:
        """What stays in the end."""
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) != 1:
            raise BudgetError(f"give one of {', '.join(f'--{name}' for name in BUDGETS)}; got {len(given)}")
        ((name, amount),) = given.items()
        return Budget(amount, Quantity(name), floor=self.minimum)

    def checked_recipe(self) -> Recipe:
        """How to train."""
        found = configure("the recipe", Recipe, self.recipe)
        assert isinstance(found, Recipe)
        return found


Request = TypeVar("Request", bound=TrainingRequest)


def read_job(kind: type[Request], config: Path | None, flags: Mapping[str, Any]) -> Request:
    """A job from a YAML file and flags; flags win.

    Raises:
        SettingsError, UnknownNameError: the file cannot be read, a name or value is wrong.
    """
    given: dict[str, Any] = {}
    if config is not None:
        try:
            given = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"'{config}' cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise SettingsError(f"'{config}' must hold names and values, like 'method: granet'")
    for name, value in flags.items():
        given[name] = {**given.get(name, {}), **value} if isinstance(value, Mapping) else value
    for name in ("model", "method"):
        if name not in given:
            raise SettingsError(f"give the {name}: as a flag or in the file")
    job = configure("the job", kind, given)
    assert isinstance(job, kind)
    return job


def training_data(request: TrainingRequest, opened: OpenedModel) -> Splits:
    """All the training images there are, or a number of windows for text; and what is measured on in the end.

    Raises:
        DataError: no data was named and the model has none of its own, or labels that its head does not have.
        SettingsError: the data are for calibration only.
    """
    data = request.data or opened.data
    if data is None:
        raise DataError(f"training needs data and '{request.model}' has none of its own; give --data")
    if split_generated(data)[1] is not None:
        raise SettingsError(f"the option generated of '{data}' is for calibration; train on the text itself")
    found = open_data(data, opened, request.seed)
    if found.calibration.targets is None:
        return open_data(data, opened, request.seed, WINDOWS)
    refuse_other_classes(found, opened.model)
    return found


def split(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(validation, the rest), drawn with `seed`.

    Raises:
        DataError: one of them would be empty.
    """
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise DataError(f"{share:g} of {len(data)} samples leave nothing to validate or to train on; give more data")
    order = torch.randperm(len(data), generator=generator(seed, "validation"))
    return data.take(order[:count]), data.take(order[count:])


def fresh_model(opened: OpenedModel) -> nn.Module:
    """The same network with new random weights, drawn from torch's generator: seed it.

    Raises:
        ModelError: the model does not say how it is initialised.
    """
    if opened.name.startswith("zoo:"):
        return make(get(opened.name))
    if opened.factory is not None:
        return build(opened.factory)
    if hasattr(opened.model, "config"):
        found: nn.Module = type(opened.model)(opened.model.config)
        return found
    raise ModelError(f"'{opened.name}' cannot be initialised anew; give module.path:factory without --weights")
