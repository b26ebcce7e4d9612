"""Labels as a model's head numbers them: by the names of the classes, where both sides have names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.core.errors import DataError
from secateur.data.dataset import Dataset

UNNAMED = re.compile(r"label[_ ]?\d+", re.IGNORECASE)  # what transformers writes where nobody gave names


def as_the_head_has_them(data: Dataset, model: nn.Module) -> Dataset:
    """The same samples, their labels numbered as in `model.config.id2label`.

    A class matches a name or one of its comma-separated synonyms, case aside. Where no name matches and there are as
    many classes as the head has, they are taken to be those of the head under other names, in the same order.

    Raises:
        DataError: classes that are not the head's; names the first.
    """
    heads = names_of(model)
    if data.targets is None or not data.classes or not heads:
        return data
    known = {word.strip(): index for index, name in heads.items() for word in (name, *name.split(","))}
    places = [known.get(name.casefold()) for name in data.classes]
    if not any(place is not None for place in places) and len(places) == len(heads):
        return data
    if None in places:
        raise DataError(
            f"'{data.name}' has the class '{data.classes[places.index(None)]}', which is none of the "
            f"{len(heads)} of the model's head ('{heads[min(heads)]}', ...); give data with its classes, or a model "
            "with a head for these"
        )
    targets = torch.tensor(places)[data.targets]
    return replace(data, targets=targets, classes=tuple(heads[index] for index in sorted(heads)))


def names_of(model: nn.Module) -> dict[int, str]:
    """Class index -> name in lower case; empty where the model names no classes."""
    found: Any = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(found, dict) or all(UNNAMED.fullmatch(str(name)) for name in found.values()):
        return {}
    return {int(index): str(name).casefold() for index, name in found.items()}
