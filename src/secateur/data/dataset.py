"""A data set that fits in memory: inputs, targets where there are any, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.fingerprint import data_digest
from secateur.core.method import Batch
from secateur.core.seeding import generator


class DataKind(StrEnum):
    """What the inputs are."""

    TEXT = "text"
    IMAGE = "image"


@dataclass(frozen=True)
class Dataset:
    """Samples of equal shape.

    Attributes:
        name: what the user calls it, e.g. `zoo:digits` or a path.
        kind: text or image.
        inputs: text: token ids int64 `[samples, length]`; images: float32 `[samples, channels, height, width]`.
        targets: class indices int64 `[samples]`; None for text, whose targets are the next tokens.
        classes: names of the classes, if known.
    """

    name: str
    kind: DataKind
    inputs: Tensor
    targets: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.targets is not None and len(self.targets) != len(self.inputs):
            raise DataError(f"'{self.name}' has {len(self.inputs)} inputs but {len(self.targets)} targets")
        if not len(self.inputs):
            raise DataError(f"'{self.name}' holds no samples")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def digest(self) -> str:
        """A hash of all samples, in order."""
        return data_digest([self.inputs] if self.targets is None else [self.inputs, self.targets])

    def batches(self, size: int = 64) -> Iterator[Batch]:
        """The samples in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            target = None if self.targets is None else self.targets[start : start + size]
            yield Batch((self.inputs[start : start + size],), target=target)

    def take(self, indices: Tensor) -> Dataset:
        """The samples at `indices`, in that order."""
        targets = None if self.targets is None else self.targets[indices]
        return replace(self, inputs=self.inputs[indices], targets=targets)

    def to(self, dtype: torch.dtype) -> Dataset:
        """The same samples with inputs of another floating-point dtype; token ids stay as they are."""
        return replace(self, inputs=self.inputs.to(dtype)) if self.inputs.is_floating_point() else self

    def sample(self, count: int, seed: int) -> Dataset:
        """`count` samples without repetition, drawn with `seed`; all of them if there are fewer."""
        order = torch.randperm(len(self), generator=generator(seed, "sample"))
        return self.take(order[:count])


@dataclass(frozen=True)
class Splits:
    """What a data source gives: samples to calibrate or recover on, and others to measure on."""

    calibration: Dataset
    evaluation: Dataset
