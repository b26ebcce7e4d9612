"""What can be removed: units, and the sites that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

import torch
from torch import Tensor


class UnitKind(StrEnum):
    """The smallest thing that is kept or removed as a whole."""

    WEIGHT = "weight"
    CHANNEL = "channel"
    NEURON = "neuron"
    HEAD = "head"
    KV_GROUP = "kv_group"
    HEAD_DIM = "head_dim"
    EMBEDDING = "embedding"
    BLOCK = "block"
    EXPERT = "expert"
    RANK = "rank"
    TOKEN = "token"
    EDGE = "edge"
    STEP = "step"
    SAMPLE = "sample"
    AGENT = "agent"


class Layout(StrEnum):
    """How a weight tensor maps to the matrix [out, in] that multiplies the input features."""

    LINEAR = "linear"  # [out, in]
    TRANSPOSED = "transposed"  # [in, out], GPT-2's Conv1D
    CONV = "conv"  # [out, in / groups, *kernel] -> [out, in / groups * prod(kernel)]
    CONV_TRANSPOSED = "conv_transposed"  # [in, out / groups, *kernel]


class Scheme(StrEnum):
    """Which matrix a weight `[N, C, k_h, k_w]` is seen as where its rank counts."""

    CHANNEL = "channel"  # [N, C k_h k_w]; of a linear layer [N, C]
    SPATIAL = "spatial"  # [C k_h, N k_w]
    DECOUPLED = "decoupled"  # for each output [C, k_h k_w]


@dataclass(frozen=True)
class Occurrence:
    """One place where an axis shows up: index ranges along dimension `dim` of a parameter or buffer.

    Unit i owns the `repeat` indices that start at `offset + t * period + i * stride`, for each t < `times`:
    a head of a fused projection has times 1 and repeat head_dim, a head dimension times heads and repeat 1.
    """

    parameter: str
    dim: int
    offset: int = 0
    stride: int = 1
    repeat: int = 1
    times: int = 1
    period: int = 0

    def indices(self, units: int) -> Tensor:
        """The indices of every unit, `[units, times * repeat]`."""
        starts = self.offset + torch.arange(units)[:, None, None] * self.stride
        found = starts + torch.arange(self.times)[:, None] * self.period + torch.arange(self.repeat)
        return found.reshape(units, self.times * self.repeat)

    def removed(self, mask: Tensor) -> Tensor:
        """The indices that go with the units whose mask is False."""
        return self.indices(len(mask))[~mask].reshape(-1)


@dataclass(frozen=True)
class Site:
    """A named place in a model that holds units of one kind.

    Attributes:
        name: the parameter's qualified name for weights; the module list's for blocks.
        kind: what one unit is.
        shape: shape of the keep-mask; the weight's own shape for weights, `(units,)` otherwise.
        layout: for weights, how the tensor maps to `[out, in]`.
        cost: parameters that go with one unit while all others stay; a tuple where units differ.
        occurrences: for structured units, everything that is cut with them.
    """

    name: str
    kind: UnitKind
    shape: tuple[int, ...]
    layout: Layout = Layout.LINEAR
    cost: int | tuple[int, ...] = 1
    occurrences: tuple[Occurrence, ...] = ()

    @property
    def units(self) -> int:
        """How many units the site holds."""
        return prod(self.shape)

    @property
    def parameters(self) -> int:
        """How many parameters the site's units hold together."""
        return self.cost * self.units if isinstance(self.cost, int) else sum(self.cost)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of the weight seen as a matrix."""
        match self.layout:
            case Layout.TRANSPOSED:
                return self.shape[1], self.shape[0]
            case Layout.CONV_TRANSPOSED:
                return self.shape[1] * prod(self.shape[2:]), self.shape[0]
            case _:
                return self.shape[0], prod(self.shape[1:])

    def to_json(self) -> dict[str, Any]:
        """Plain data for `plan.json`."""
        return {
            "name": self.name,
            "kind": self.kind.value,
            "shape": list(self.shape),
            "layout": self.layout.value,
            "cost": self.cost if isinstance(self.cost, int) else list(self.cost),
            "occurrences": [vars(occurrence) for occurrence in self.occurrences],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Site:
        """The inverse of `to_json`."""
        cost = data["cost"]
        return cls(
            name=data["name"],
            kind=UnitKind(data["kind"]),
            shape=tuple(data["shape"]),
            layout=Layout(data["layout"]),
            cost=cost if isinstance(cost, int) else tuple(cost),
            occurrences=tuple(Occurrence(**item) for item in data["occurrences"]),
        )
