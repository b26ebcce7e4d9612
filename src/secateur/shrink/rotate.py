"""Layers in other bases of the residual stream, with the norms before them folded in; all products in float64.

Letters: d features of the stream, D of a smaller basis, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.units import Layout
from secateur.shrink.additions import attach
from secateur.shrink.biases import add_biases_
from secateur.shrink.cut import Cut, Undo, descriptions, install, tensors_of
from secateur.structure.layers import layout_of, to_matrix
from secateur.structure.norms import NormForm

Weights = dict[str, Tensor]


def reading(name: str, layer: nn.Module, form: NormForm, basis: Tensor) -> Weights:
    """A layer `[O, d]` that read gain * x + shift and now reads x in the basis `[d, D]`: `[O, D]`, and its bias.

    A layer without a bias gets one where the norm has a shift.
    """
    weight, bias = _parts(layer)
    matrix = _matrix(layer)
    found = {f"{name}.weight": _shaped(layer, (matrix * form.gain.to(matrix.device)) @ basis.to(matrix.device))}
    if bool(form.shift.any()):
        moved = matrix @ form.shift.to(matrix.device)
        found[f"{name}.bias"] = (moved if bias is None else bias.double() + moved).to(weight.dtype)
    return found


def writing(name: str, layer: nn.Module, basis: Tensor, centre: bool) -> Weights:
    """A layer `[d, I]` that writes to the stream, writing in the basis `[d, D]`: `[D, I]`, and its bias.

    Args:
        name: of the layer.
        layer: linear.
        basis: where to.
        centre: write without the mean feature, which the norms of the model ignore.
    """
    weight, bias = _parts(layer)
    matrix, basis = _matrix(layer), basis.to(weight.device)
    found = {f"{name}.weight": _shaped(layer, basis.T @ (matrix - matrix.mean(0) if centre else matrix))}
    if bias is not None:
        wide = bias.double()
        found[f"{name}.bias"] = (basis.T @ (wide - wide.mean() if centre else wide)).to(bias.dtype)
    return found


def table(name: str, layer: nn.Module, basis: Tensor, centre: bool) -> Weights:
    """An embedding table `[V, d]` that gives the basis `[d, D]`: `[V, D]`; see `writing`."""
    weight, _ = _parts(layer)
    wide = weight.double()
    wide = wide - wide.mean(1, keepdim=True) if centre else wide
    return {f"{name}.weight": (wide @ basis.to(weight.device)).to(weight.dtype)}


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


def _matrix(layer: nn.Module) -> Tensor:
    layout = layout_of(layer)
    assert layout is not None
    return to_matrix(_parts(layer)[0], layout).double()


def _shaped(layer: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix `[O, I]` as the layer's parameter has it."""
    matrix = matrix.t() if layout_of(layer) is Layout.TRANSPOSED else matrix
    return matrix.to(_parts(layer)[0].dtype).contiguous()


def rebuild_(
    model: nn.Module, weights: Mapping[str, Tensor], additions: Sequence[dict[str, Any]]
) -> tuple[Undo, list[dict[str, Any]]]:
    """Attach additions and give parameters values of other shapes, in place.

    Args:
        model: the dense model.
        weights: parameter, also of an addition or an absent bias -> value.
        additions: as `additions.attach` takes them.

    Returns:
        A function that puts everything back, and the changed attributes for a loader.

    Raises:
        PlanError: the model has nothing of the name that an addition or a value has; nothing was changed.
    """
    try:
        detach = attach(model, additions)
    except AttributeError as error:
        raise PlanError(f"the plan adds to what {type(model).__name__} does not have: {error}") from error
    unbias = add_biases_(model, [name for name in weights if name.rpartition(".")[2] == "bias"])
    tensors = tensors_of(model)
    unknown = weights.keys() - tensors.keys()
    if unknown:
        unbias()
        detach()
        raise PlanError(f"the plan gives values to '{min(unknown)}', which {type(model).__name__} does not have")
    values = {name: value.detach().to(tensors[name].device, tensors[name].dtype) for name, value in weights.items()}
    changes = descriptions(model, values, set())
    put_back = install(model, Cut({name: torch.clone(value) for name, value in values.items()}, changes))

    def undo() -> None:
        put_back()
        unbias()
        detach()

    return undo, [change.to_json() for change in changes]
