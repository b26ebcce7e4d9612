"""Weights of experts that share one tensor `[experts, outputs, inputs]`, seen as one matrix for each expert.

Code of such experts multiplies with slices of the tensor, `F.linear(x, self.gate_up_proj[e])`. While `hearing`, that
call is listened to, whatever the code around it does, so that every expert's own inputs are known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.units import Site, UnitKind
from secateur.structure.layers import WeightLayer, layout_of

DIMS = 3  # of a tensor that holds a matrix for each expert


@dataclass(frozen=True)
class FusedPart(WeightLayer):
    """One expert's matrix in a tensor of several.

    Attributes:
        parameter: the tensor's qualified name.
        index: which expert.
    """

    parameter: str
    index: int

    @property
    def whole(self) -> nn.Parameter:
        """The live parameter."""
        found = self.module._parameters[self.parameter.rpartition(".")[2]]
        assert found is not None
        return found

    @property
    def weight(self) -> Tensor:
        """The expert's matrix, detached."""
        return self.whole.detach()[self.index]

    def input_key(self) -> tuple[object, ...]:
        """Experts never share an input."""
        return (self.name,)

    def input_matrix(self, x: Tensor) -> Tensor:
        """The tokens that came to the expert, `[T, I]`."""
        return x.reshape(-1, x.shape[-1])


def fused_sites(model: nn.Module, wants: Callable[[str], bool], within: Sequence[str]) -> dict[str, Site]:
    """Parameters below the modules `within` that hold a matrix for each of several experts, with their sites."""
    prefixes = tuple(f"{name}." if name else "" for name in within)
    return {
        name: Site(name, UnitKind.WEIGHT, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.dim() == DIMS and name.startswith(prefixes) and wants(name)
        if layout_of(model.get_submodule(name.rpartition(".")[0])) is None
    }


def parts_of(model: nn.Module, site: Site) -> list[FusedPart]:
    """A tensor's experts, in order."""
    module = model.get_submodule(site.name.rpartition(".")[0])
    experts, *matrix = site.shape
    return [
        FusedPart(Site(f"{site.name}[{index}]", UnitKind.WEIGHT, tuple(matrix)), module, site.name, index)
        for index in range(experts)
    ]


@contextlib.contextmanager
def hearing(parts: Sequence[FusedPart], heard: Callable[[FusedPart, Tensor], object]) -> Iterator[None]:
    """Call `heard(part, inputs)` before every product with an expert's matrix inside the block."""
    if not parts:
        yield
        return
    known: dict[str, dict[int, FusedPart]] = {}
    for part in parts:
        known.setdefault(part.parameter, {})[part.index] = part
    linear = F.linear

    def listening(input: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:  # noqa: A002
        if weight.dim() == DIMS - 1:
            for group in known.values():
                index = _slice_of(weight, next(iter(group.values())).whole)
                if index in group:
                    heard(group[index], input)
                    weight = group[index].weight  # it may have been replaced just now
                    break
        return linear(input, weight, *rest, **named)

    F.linear = listening
    try:
        yield
    finally:
        F.linear = linear


def _slice_of(weight: Tensor, whole: Tensor) -> int:
    """Which slice of the tensor a matrix is; -1 for none."""
    if weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or weight.shape != whole.shape[1:]:
        return -1
    return (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)


@contextlib.contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Experts are run one after the other inside the block, not by one kernel for all."""
    choose = getattr(model, "set_experts_implementation", None)
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if choose is None or before in (None, "eager"):
        yield
        return
    choose("eager")
    try:
        yield
    finally:
        choose(before)
