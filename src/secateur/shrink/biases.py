"""Biases that a model does not have yet: layers built without one get one where a plan gives it values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import Layout
from secateur.shrink.cut import Undo, tensors_of
from secateur.structure.layers import layout_of

BIAS = "bias"


def given_biases(plan: Plan) -> list[str]:
    """Biases that a plan gives values to, without those that the model it was made on is known to have had."""
    return sorted(name for name in plan.weights if name.rpartition(".")[2] == BIAS and name not in plan.planned_on)


def blank_bias(model: nn.Module, name: str) -> Tensor:
    """Zeros `[O]` for the layer that would get the bias `name`, of its weight's dtype and device.

    Raises:
        PlanError: there is no linear layer or convolution of this name without a bias.
    """
    owner, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    open_to_one = module is not None and layout_of(module) in (Layout.LINEAR, Layout.CONV) and module.bias is None
    if leaf != BIAS or not open_to_one:
        raise PlanError(
            f"the plan gives '{name}' values, but this model has no such tensor; use the one it was made for"
        )
    assert module is not None
    assert isinstance(module.weight, Tensor)
    return module.weight.detach().new_zeros(module.weight.shape[0])


def add_biases_(model: nn.Module, names: Iterable[str]) -> Undo:
    """Give layers zero biases under these names, in place; the ones that are there already stay as they are.

    Names in state dicts, deep copies and compilation see plain parameters; they need a gradient where the
    layer's weight does.

    Returns:
        A function that takes them away again.

    Raises:
        PlanError: a name is no bias of a linear layer or convolution; nothing was changed.
    """
    there = tensors_of(model)
    blank = {name: blank_bias(model, name) for name in names if name not in there}
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in blank]
    for owner, value in zip(owners, blank.values(), strict=True):
        owner.register_parameter(BIAS, nn.Parameter(value, requires_grad=bool(owner.weight.requires_grad)))

    def undo() -> None:
        for owner in owners:
            owner.register_parameter(BIAS, None)

    return undo
