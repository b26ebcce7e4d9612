"""What can be removed from a model, as plain data: the content of `secateur inspect`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

PLACE = re.compile(r" in '([^']*)'(?: \([^()]*\))?$")


class Role(StrEnum):
    """What a layer does with an axis."""

    MAKES = "makes"  # its outputs
    READS = "reads"  # its inputs
    BOTH = "both"  # inputs and outputs are the same units
    CARRIES = "carries"  # one value a unit: a norm, a bias, a table of positions


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Touch(_Part):
    """A module in which a group occurs, and how."""

    module: str
    role: Role


class Place(_Part):
    """One index range of a parameter or buffer; see `Occurrence`."""

    parameter: str
    dim: int
    offset: int
    stride: int
    repeat: int
    times: int
    period: int


class Group(_Part):
    """Units that can go one by one, each with everything that is coupled to it.

    Attributes:
        cost: parameters that go with one unit while all others stay.
        width: indices that one unit takes in the first layer that makes it.
        multiple: keep a multiple of so many units and that layer's width stays a multiple of 8.
        parameters_share, flops_share: of the model's, what vanishes if half of the units go.
        touches: modules in which it occurs, in the order of the model.
        coupled: those other than the one that names it.
    """

    name: str
    kind: str
    units: int
    cost: int
    width: int
    multiple: int
    parameters_share: float
    flops_share: float
    touches: tuple[Touch, ...]
    coupled: tuple[str, ...]
    occurrences: tuple[Place, ...]

    @property
    def module(self) -> str:
        """The module that names it."""
        return self.name.partition(":")[0]

    def layers(self, role: Role) -> list[str]:
        """The modules that play this role, alone or with another."""
        wanted = (role, Role.BOTH) if role in (Role.MAKES, Role.READS) else (role,)
        return [touch.module for touch in self.touches if touch.role in wanted]


class Fixed(_Part):
    """Units that cannot go; `parameters` are those of the tensor they stand in."""

    parameter: str
    dim: int
    units: int
    parameters: int
    reason: str

    @property
    def module(self) -> str:
        """The module whose parameter it is."""
        return self.parameter.rpartition(".")[0]


class Unruled(_Part):
    """An operator without a rule: all that it touches stays as it is."""

    module: str
    operator: str
    reason: str


class Row(_Part):
    """One layer in the order of execution.

    Attributes:
        reads, makes: its input and output dimension as written by the algebra, e.g. `4 × 24`.
    """

    module: str
    parameters: int
    reads: str
    makes: str


class StructureView(_Part):
    """Everything that `inspect` shows.

    Attributes:
        model, kind: its name and class.
        inputs: what it was run on, in words.
        parameters, flops: of the whole model; FLOPs of one sample.
        halved_parameters, halved_flops: what is left when half of every group goes.
    """

    model: str
    kind: str
    inputs: str
    parameters: int
    flops: float
    halved_parameters: int
    halved_flops: float
    rows: tuple[Row, ...]
    sites: tuple[Group, ...]
    frozen: tuple[Fixed, ...]
    unknown: tuple[Unruled, ...]


class Reason(_Part):
    """Frozen axes that share a reason."""

    text: str
    axes: tuple[Fixed, ...]

    @property
    def units(self) -> int:
        """Units of all of them."""
        return sum(axis.units for axis in self.axes)

    @property
    def parameters(self) -> int:
        """Parameters in the tensors that they stand in, each tensor once."""
        return sum({axis.parameter: axis.parameters for axis in self.axes}.values())


def by_reason(frozen: Iterable[Fixed]) -> list[Reason]:
    """Frozen axes grouped by their reason without its place, most units first."""
    found: dict[str, list[Fixed]] = {}
    for axis in frozen:
        found.setdefault(PLACE.sub("", axis.reason), []).append(axis)
    reasons = [Reason(text=text, axes=tuple(axes)) for text, axes in found.items()]
    return sorted(reasons, key=lambda reason: -reason.units)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more
