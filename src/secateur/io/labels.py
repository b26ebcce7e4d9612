"""Labels as a model's head numbers them: by the names of the classes, where both sides have names."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.data.batches import refuse_foreign_labels
from secateur.data.dataset import Dataset, Splits
from secateur.data.running import device_of, evaluating, logits

UNNAMED = re.compile(r"label[_ ]?\d+", re.IGNORECASE)  # what transformers writes where nobody gave names


def as_the_head_has_them(data: Dataset, model: nn.Module) -> Dataset:
    """The same samples, their labels numbered as in `model.config.id2label`.

    A class matches a name, or else one of a name's comma-separated synonyms, case, `_` and `-` aside. Unless every
    class matches one of its own, labels stay as they are: the head's under other names, in the same order, or none of
    its (`refuse_other_classes`).
    """
    heads = names_of(model)
    if data.targets is None or not data.classes or not heads:
        return data
    found = [_place(name, heads) for name in data.classes]
    places = [place for place in found if place is not None]
    if len(set(places)) < len(data.classes):
        return data
    return replace(data, targets=torch.tensor(places)[data.targets], classes=tuple(heads[i] for i in sorted(heads)))


def refuse_other_classes(splits: Splits, model: nn.Module) -> None:
    """Look at all labels before anything slow is begun; the model is run on one sample of each, if it is in memory.

    As many classes as the head has may have other names, unless one of its names stands at another's place.

    Raises:
        DataError: a class that the head does not have, by its name or by its number.
    """
    for part in (splits.calibration, splits.evaluation):
        if part.targets is not None:
            _refuse_other_classes(part, part.targets, model)


def _refuse_other_classes(data: Dataset, targets: Tensor, model: nn.Module) -> None:
    heads = names_of(model)
    if data.classes and heads:
        found = [_place(name, heads) for name in data.classes]
        strange = [name for name, place in zip(data.classes, found, strict=True) if place is None]
        moved = any(place not in (None, index) for index, place in enumerate(found))
        if strange and (moved or len(found) != len(heads)):
            raise DataError(
                f"'{data.name}' has the class '{strange[0]}', which is none of the {len(heads)} of the model's head "
                f"('{heads[min(heads)]}', ...); give data with its classes, or a model with a head for these"
            )
    out = _logits(data, model)
    if out is not None and out.dim() == 2:  # other heads have losses of their own
        refuse_foreign_labels(out, targets, data.name, ignored=False)


def _logits(data: Dataset, model: nn.Module) -> Tensor | None:
    """Of one sample; None where the output has none, or the size of the head is not known."""
    if device_of(model).type == "meta":
        classes = getattr(getattr(model, "config", None), "num_labels", None)
        return torch.empty(1, classes, device="meta") if isinstance(classes, int) and names_of(model, True) else None
    with evaluating(model):
        try:
            return logits(model, next(data.batches(1)))
        except DataError:
            return None


def names_of(model: nn.Module, unnamed: bool = False) -> dict[int, str]:
    """Class index -> plain name; empty where the model names no classes, unless their `unnamed` numbers will do."""
    found: Any = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(found, dict):
        return {}
    if not unnamed and all(UNNAMED.fullmatch(str(name)) for name in found.values()):
        return {}
    return {int(index): plain(str(name)) for index, name in found.items()}


def plain(name: str) -> str:
    """In lower case, `_` and `-` as spaces."""
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def _place(name: str, heads: dict[int, str]) -> int | None:
    """The head's class of this name, or with it as a synonym; None where there is none or there are several."""
    for known in (
        [(heads[index], index) for index in heads],
        [(word.strip(), index) for index in heads for word in heads[index].split(",")],
    ):
        counts = Counter(word for word, _ in known)
        if plain(name) in counts:
            return dict(known)[plain(name)] if counts[plain(name)] == 1 else None
    return None
