"""Convolutions that may lose filters without losing width, because a by-pass stands beside each: where, at what cost.

A by-pass has as many groups as the widths allow, g = gcd(inputs, filters), depthwise where they are equal: it costs
1 / g of the convolution, and with a 1 x 1 kernel 1 / (g k^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import gcd, prod
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from secateur.allocate.structured import target_of
from secateur.core.budget import COUNTED, Budget, Quantity
from secateur.core.errors import BudgetError, ModelError
from secateur.core.method import Batch, Settings
from secateur.core.select import keep_global, keep_top
from secateur.core.units import Occurrence, Site, UnitKind
from secateur.measure.filter_costs import FilterCosts, flops_by_module
from secateur.shrink.bypass import NAME, Bypass
from secateur.shrink.cut import tensors_of
from secateur.shrink.fuse import feeding, merged, obstacle

FILTERS = COUNTED - {Quantity.PARAMETERS}  # budgets that count filters


class Kernel(StrEnum):
    """Of a by-pass."""

    SAME = "same"
    POINTWISE = "pointwise"


class Coprime(StrEnum):
    """What to do where widths have no common divisor, so that a by-pass would cost as much as its convolution."""

    POINTWISE = "pointwise"
    SKIP = "skip"


class BranchSettings(Settings):
    """Which convolutions get which by-passes."""

    kernel: Kernel = Field(Kernel.SAME, description="of the by-pass: the convolution's own (same) or 1 x 1 (pointwise)")
    coprime: Coprime = Field(
        Coprime.POINTWISE, description="layers whose widths have no common divisor: pointwise by-pass or skip"
    )
    normed: bool = Field(True, description="a batch norm of its own in the by-pass")
    first: bool = Field(False, description="prune the network's first convolution too")
    merge: bool = Field(
        False,
        description="in the end put by-passes into the filters that stay (their norms' statistics are fixed by that), "
        "so that they run for filters that went only; no channel of such a layer can be removed later",
    )


@dataclass(frozen=True)
class Branch:
    """A convolution that may lose filters, and the by-pass beside it.

    Attributes:
        conv, norm: names of the modules.
        filters: of the convolution.
        kernel, groups, normed: of the by-pass.
        cost: FLOPs of the by-pass in shares of the convolution's.
        merge: whether it goes into the filters that stay.
    """

    conv: str
    norm: str
    filters: int
    kernel: tuple[int, int]
    groups: int
    normed: bool
    cost: float
    merge: bool = False

    def addition(self, kept: list[int] | None = None) -> dict[str, Any]:
        """As plans list it; as it hangs beside all filters, with `kept` None."""
        geometry = {"kernel": list(self.kernel), "groups": self.groups, "normed": self.normed}
        own = {"kept": kept, "merged": self.merge and kept is not None}
        return {"kind": "bypass", "conv": self.conv, "norm": self.norm, **geometry, **own}

    def site(self, model: nn.Module) -> Site:
        """The filters: what is cut with one of them."""
        tensors = tensors_of(model)
        mine = [name for name in tensors if name.rpartition(".")[0] in (self.conv, self.norm) and tensors[name].dim()]
        cost = sum(tensors[name][0].numel() for name in mine if isinstance(tensors[name], nn.Parameter))
        places = tuple(Occurrence(name, 0) for name in mine)
        return Site(f"{self.conv}:filter", UnitKind.CHANNEL, (self.filters,), cost=cost, occurrences=places)

    def weights(self, model: nn.Module, bypass: Bypass, keep: Tensor) -> dict[str, Tensor]:
        """Values of everything that changes when the other filters go: narrow tensors, and the by-pass.

        A merged by-pass keeps the rows of the filters that go and is in the weights of the others.
        """
        whole = bool(keep.all())
        beside = branch_state(bypass)
        tensors = tensors_of(model)
        own = {place.parameter: tensors[place.parameter].detach() for place in self.site(model).occurrences}
        if self.merge:
            conv, norm = merged(model.get_submodule(self.conv), model.get_submodule(self.norm), bypass)
            values = {f"{self.conv}.{name}": value for name, value in conv.items()}
            values |= {f"{self.norm}.{name}": value for name, value in norm.items()}
            own = {name: values[name].to(tensor) for name, tensor in own.items()}
            beside = {} if whole else {name: _rows(value, ~keep) for name, value in beside.items()}
        values = {f"{self.norm}.{NAME}.{name}": value.detach().clone() for name, value in beside.items()}
        if whole and not self.merge:
            return values
        return values | {name: _rows(value, keep) for name, value in own.items()}


def _rows(value: Tensor, keep: Tensor) -> Tensor:
    return value.index_select(0, keep.nonzero().flatten().to(value.device)) if value.dim() else value


def branch_state(bypass: Bypass) -> dict[str, Tensor]:
    """Parameters and buffers of a by-pass, without those of the mask that it is tried under."""
    return {name: value for name, value in bypass.state_dict().items() if not name.startswith("mask.")}


def branch_of(name: str, norm: str, conv: nn.Conv2d, settings: BranchSettings) -> Branch | str:
    """The by-pass of one convolution, or why it gets none."""
    groups = gcd(conv.in_channels, conv.out_channels)
    own: tuple[int, int] = (conv.kernel_size[0], conv.kernel_size[1])
    widths = f"its {conv.in_channels} inputs and {conv.out_channels} filters have no common divisor"
    if groups == 1 and settings.coprime is Coprime.SKIP:
        return widths
    kernel = (1, 1) if settings.kernel is Kernel.POINTWISE or groups == 1 else own
    cost = prod(kernel) / (groups * prod(own))
    if cost >= 1:
        return f"{widths}, so a by-pass would cost as much"
    if kernel != own and not _keeps_size(conv):
        return "its padding changes the size, which no 1 x 1 by-pass does"
    if settings.merge and kernel != own and not all(size % 2 for size in own):
        return "a 1 x 1 by-pass has no place in an even kernel (merge=false keeps it beside)"
    return Branch(name, norm, conv.out_channels, kernel, groups, settings.normed, cost, settings.merge)


def _keeps_size(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    return all(2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True))


def find_branches(
    model: nn.Module, batch: Batch, wants: Callable[[str], bool], settings: BranchSettings
) -> tuple[list[Branch], dict[str, str]]:
    """Ungrouped convolutions that a batch norm alone reads, in the order of the model.

    Args:
        model: with weights.
        batch: to run it on.
        wants: whether a weight of this name may lose filters.
        settings: of the by-passes.

    Returns:
        The branches; convolution -> why it gets none although it would be asked for one.

    Raises:
        ModelError: there is no branch; the model does not run on the batch.
    """
    norms = dict(feeding(model, batch)[0])
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    first = next((name for name in flops_by_module(model, batch) if name in convs), None)
    found, left = [], {}
    for name, conv in convs.items():
        if not wants(f"{name}.weight") or (name == first and not settings.first):
            continue
        why: Branch | str | None = "it has groups" if conv.groups > 1 else None
        why = why or ("no batch norm alone reads it" if name not in norms else obstacle(model, name, norms[name]))
        branch = why or branch_of(name, norms[name], conv, settings)
        if isinstance(branch, Branch):
            found.append(branch)
        else:
            left[name] = branch
    if not found:
        why = "".join(f"; '{name}' is left out: {reason}" for name, reason in list(left.items())[:1])
        raise ModelError(
            f"{type(model).__name__} has no convolution to put a by-pass beside: it takes ungrouped ones that a batch "
            f"norm alone reads, after the network's first (first=true takes that too){why}"
        )
    return found, left


# --- what they cost ---------------------------------------------------------------------------------


def costs_of(model: nn.Module, batch: Batch, branches: list[Branch], budget: Budget) -> FilterCosts:
    """What the budget counts, by layer: FLOPs, parameters or filters. By-passes and everything else are counted in.

    Raises:
        BudgetError: it counts something else.
    """
    filters, merge = {one.conv: one.filters for one in branches}, branches[0].merge
    if budget.quantity is Quantity.FLOPS:
        flops = flops_by_module(model, batch)
        per = {name: flops[name] / count for name, count in filters.items()}
        beside = {one.conv: one.cost * flops[one.conv] for one in branches}
        return FilterCosts(sum(flops.values()), filters, per, beside, merge)
    if budget.quantity is Quantity.PARAMETERS:
        per = {one.conv: float(one.site(model).parameters) / one.filters for one in branches}
        added = {one.conv: _parameters(model, one) for one in branches}
        return FilterCosts(sum(p.numel() for p in model.parameters()), filters, per, added, merge)
    if budget.quantity not in FILTERS:
        raise BudgetError(f"filters beside by-passes are counted, or parameters or FLOPs, not {budget.quantity}")
    return FilterCosts(sum(filters.values()), filters, dict.fromkeys(filters, 1.0), dict.fromkeys(filters, 0.0))


def _parameters(model: nn.Module, one: Branch) -> float:
    conv = model.get_submodule(one.conv)
    assert isinstance(conv, nn.Conv2d)
    return one.cost * conv.weight.numel() + one.filters * (2 if one.normed else 1)


def target_in(costs: FilterCosts, budget: Budget, floor: int) -> float:
    """The cost that may stay.

    Raises:
        BudgetError: below what is left with `floor` filters in every layer, or above the original.
    """
    counted = budget.quantity in FILTERS
    target = budget.of(UnitKind.CHANNEL).keep(int(costs.original)) if counted else target_of(budget, costs.original)
    least = costs.least(floor)
    if not least <= target <= costs.original:
        what = "filters" if counted else str(budget.quantity)
        beside = "" if counted else ", the rest of the network and the by-passes"
        raise BudgetError(
            f"{budget} is out of reach: {floor} of the filters in each of {len(costs.filters)} layers{beside} are "
            f"{least / costs.original:.4g} of the {what}; give a share from there to 1 ({least:.6g} to "
            f"{costs.original:.6g})"
        )
    return target


def largest_within(
    margins: Mapping[str, Tensor], costs: FilterCosts, target: float, floor: int
) -> tuple[dict[str, Tensor], int]:
    """As many filters as the target allows, by one ranking of all layers: one threshold common to all margins.

    Args:
        margins: layer -> `[filters]`, how far above its threshold each filter lies.
        costs: of the layers.
        target: the cost that may stay; `costs.least(floor)` must be within.
        floor: filters that every layer keeps, its highest.

    Returns:
        layer -> keep-mask, and how many filters the common ranking keeps.
    """

    def masks(keep: int) -> dict[str, Tensor]:
        ranked = keep_global(margins, keep)
        return {name: ranked[name] | keep_top(margins[name], min(floor, len(margins[name]))) for name in margins}

    low, high = 0, sum(len(one) for one in margins.values())  # low is within
    while low < high:
        middle = (low + high + 1) // 2
        within = costs.total({name: int(mask.sum()) for name, mask in masks(middle).items()}) <= target
        low, high = (middle, high) if within else (low, middle - 1)
    return masks(low), low
