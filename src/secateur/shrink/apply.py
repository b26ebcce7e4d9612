"""A plan on a model: for a while (`masked`) or for good (`apply_`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.fingerprint import digests
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.shrink.biases import add_biases_, blank_bias, given_biases
from secateur.shrink.cut import AttributeChange, structured, tensors_of
from secateur.shrink.depth import Undo, blocks_of, kept_list, remove_blocks_
from secateur.shrink.rotate import rebuild_
from secateur.shrink.verify import cut_

M = TypeVar("M", bound=nn.Module)


def changed_weights(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, live parameter or buffer, its value under the plan) for everything whose values the plan changes.

    Zeros are exact and positive. Values have the tensor's dtype and device; structured units are not cut here.
    A bias that the model has not (`shrink.biases`) stands for itself as zeros.

    Raises:
        PlanError: the plan gives values to something else that the model has not.
    """
    tensors = tensors_of(model)
    for name, site in plan.sites.items():
        if site.kind is UnitKind.WEIGHT:
            tensor = tensors[name]
            value = plan.weights.get(name, tensor.detach()).to(tensor.device, tensor.dtype)
            yield name, tensor, value.masked_fill(~plan.masks[name].to(tensor.device), 0)
    for name in sorted(plan.weights.keys() - plan.sites.keys()):
        tensor = tensors[name] if name in tensors else blank_bias(model, name)
        yield name, tensor, plan.weights[name].to(tensor.device, tensor.dtype)


def stamp(model: nn.Module, plan: Plan) -> None:
    """Record in the plan which model it was made on and what its weights become."""
    plan.planned_on = digests(dict(model.named_parameters()))
    plan.applied = {} if structured(plan) or plan.additions else _applied(model, plan)


def _applied(model: nn.Module, plan: Plan) -> dict[str, str]:
    return digests({name: value for name, _, value in changed_weights(model, plan)})


def _check(model: nn.Module, plan: Plan, other_weights: bool) -> None:
    """Refuse before anything is changed what does not fit anywhere in the plan."""
    plan.check_model(dict(model.named_parameters()), other_weights)
    tensors = tensors_of(model)
    for name, site in plan.sites.items():
        if site.kind is UnitKind.BLOCK:
            blocks_of(model, name, site.units)
        for place in site.occurrences:
            if place.parameter not in tensors:
                raise PlanError(f"the plan cuts '{place.parameter}', which this model does not have")
    if plan.additions:
        return  # what the weights belong to is there only once they are attached
    for name, value in plan.weights.items():
        shape = list((tensors[name] if name in tensors else blank_bias(model, name)).shape)
        if list(value.shape) != shape:
            raise PlanError(f"the plan gives '{name}' values {list(value.shape)}, it is {shape} in this model")


def _rebuilt(model: nn.Module, plan: Plan) -> Undo:
    undo, attributes = rebuild_(model, plan.weights, plan.additions)
    own = [one["attributes"] for one in plan.additions if one["kind"] == "experts" and not one["mapped"]]
    counts = [AttributeChange(*change).to_json() for changes in own for change in changes]
    plan.attributes = (*attributes, *counts)
    return undo


def _copied(tensor: Tensor) -> Undo:
    before = tensor.detach().clone()

    def undo() -> None:
        tensor.data.copy_(before)

    return undo


def _remove_blocks(model: nn.Module, plan: Plan) -> list[Undo]:
    return [
        remove_blocks_(model, name, kept_list(plan.masks[name]))
        for name, site in plan.sites.items()
        if site.kind is UnitKind.BLOCK and not bool(plan.masks[name].all())
    ]


@contextlib.contextmanager
def masked(
    model: M, plan: Plan, other_weights: bool = False, *, example: Any = None, verify: bool = True
) -> Iterator[M]:
    """The model under the plan inside the block; bit for bit as before afterwards.

    No hooks and no wrappers: state-dict keys, deepcopy and compilation see plain parameters. Changes
    made to masked weights inside the block are dropped with the masks. Structured units are really gone
    inside the block: that is what their masks mean, also where norms count units.

    Args:
        model: the model that the plan was made for.
        plan: what stays.
        other_weights: accept the same architecture with other values, e.g. after fine-tuning.
        example: as for `apply_`.
        verify: as for `apply_`.

    Raises:
        PlanError: the plan belongs to another model; nothing was changed.
    """
    _check(model, plan, other_weights)
    originals = []
    undo: list[Undo] = []
    try:
        if plan.additions:
            undo.append(_rebuilt(model, plan))
            yield model
            return
        undo.append(add_biases_(model, given_biases(plan)))
        for _, parameter, value in changed_weights(model, plan):
            originals.append((parameter, parameter.data))
            parameter.data = value
        if structured(plan):
            undo.append(cut_(model, plan, example, verify))
        undo += _remove_blocks(model, plan)
        yield model
    finally:
        for put_back in reversed(undo):
            put_back()
        for parameter, data in originals:
            parameter.data = data


def apply_(model: M, plan: Plan, other_weights: bool = False, *, example: Any = None, verify: bool = True) -> M:
    """Make the plan permanent, in place: zeros written, new weights set, structured units and blocks cut out.

    Applying the masks of a plan twice does what applying them once does.

    Args:
        model: the model that the plan was made for.
        plan: what stays.
        other_weights: accept the same architecture with other values, e.g. after fine-tuning.
        example: inputs to find the structure with and to check the cut on; default: made-up ones like
            those that were planned with. Only for structured units.
        verify: compare the cut model with the masked one on the example.

    Returns:
        The same model.

    Raises:
        PlanError: the plan belongs to another model, or the cut model gives other results than the
            masked one; nothing was changed.
    """
    _check(model, plan, other_weights)
    if plan.additions:
        _rebuilt(model, plan)
        return model
    undo = [add_biases_(model, given_biases(plan))]
    with torch.no_grad():
        for _, tensor, value in changed_weights(model, plan):
            undo.append(_copied(tensor))
            tensor.copy_(value)
    if structured(plan):
        try:
            cut_(model, plan, example, verify)
        except BaseException:
            for put_back in reversed(undo):
                put_back()
            raise
    elif plan.planned_on and not plan.applied and not other_weights:
        plan.applied = _applied(model, plan)  # combined from plans that each knew only their own result
    _remove_blocks(model, plan)
    return model
