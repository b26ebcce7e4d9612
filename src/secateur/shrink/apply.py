"""A plan on a model: for a while (`masked`) or for good (`apply_`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.fingerprint import digests
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.shrink.depth import Undo, blocks_of, kept_list, remove_blocks_

M = TypeVar("M", bound=nn.Module)


def changed_weights(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, live parameter, its value under the plan) for every weight the plan changes.

    Zeros are exact and positive. Values have the parameter's dtype and device.
    """
    parameters = dict(model.named_parameters())
    for name, site in plan.sites.items():
        if site.kind is UnitKind.WEIGHT:
            parameter = parameters[name]
            value = plan.weights.get(name, parameter.detach()).to(parameter.device, parameter.dtype)
            yield name, parameter, value.masked_fill(~plan.masks[name].to(parameter.device), 0)


def stamp(model: nn.Module, plan: Plan) -> None:
    """Record in the plan which model it was made on and what its weights become."""
    plan.planned_on = digests(dict(model.named_parameters()))
    plan.applied = digests({name: value for name, _, value in changed_weights(model, plan)})


def _check(model: nn.Module, plan: Plan, other_weights: bool) -> None:
    """Refuse before anything is changed what does not fit anywhere in the plan."""
    plan.check_model(dict(model.named_parameters()), other_weights)
    for name, site in plan.sites.items():
        if site.kind is UnitKind.BLOCK:
            blocks_of(model, name, site.units)
        elif site.kind is not UnitKind.WEIGHT:
            raise PlanError(f"'{name}' holds units of the kind {site.kind}; only weights and blocks can be applied")


def _remove_blocks(model: nn.Module, plan: Plan) -> list[Undo]:
    return [
        remove_blocks_(model, name, kept_list(plan.masks[name]))
        for name, site in plan.sites.items()
        if site.kind is UnitKind.BLOCK and not bool(plan.masks[name].all())
    ]


@contextlib.contextmanager
def masked(model: M, plan: Plan, other_weights: bool = False) -> Iterator[M]:
    """The model under the plan inside the block; bit for bit as before afterwards.

    No hooks and no wrappers: state-dict keys, deepcopy and compilation see plain parameters. Changes
    made to masked weights inside the block are dropped with the masks.

    Args:
        model: the model that the plan was made for.
        plan: what stays.
        other_weights: accept the same architecture with other values, e.g. after fine-tuning.

    Raises:
        PlanError: the plan belongs to another model; nothing was changed.
    """
    _check(model, plan, other_weights)
    originals = []
    undo: list[Undo] = []
    try:
        for _, parameter, value in changed_weights(model, plan):
            originals.append((parameter, parameter.data))
            parameter.data = value
        undo = _remove_blocks(model, plan)
        yield model
    finally:
        for put_back in reversed(undo):
            put_back()
        for parameter, data in originals:
            parameter.data = data


def apply_(model: M, plan: Plan, other_weights: bool = False) -> M:
    """Make the plan permanent, in place: zeros written, new weights set, blocks removed.

    Applying the masks of a plan twice does what applying them once does.

    Args:
        model: the model that the plan was made for.
        plan: what stays.
        other_weights: accept the same architecture with other values, e.g. after fine-tuning.

    Returns:
        The same model.

    Raises:
        PlanError: the plan belongs to another model; nothing was changed.
    """
    _check(model, plan, other_weights)
    with torch.no_grad():
        for _, parameter, value in changed_weights(model, plan):
            parameter.copy_(value)
    if plan.planned_on and not plan.applied and not other_weights:
        # combined from plans that each knew only their own result
        plan.applied = digests({name: value for name, _, value in changed_weights(model, plan)})
    _remove_blocks(model, plan)
    return model
