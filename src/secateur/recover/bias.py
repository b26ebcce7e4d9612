"""What removed units gave on average, added to the bias of the layer that read them.

A layer y = W x + b that loses the inputs R gets b' = b + W[:, R] E[x_R], with the mean over calibration
data on the dense model: of all constants the one that leaves the smallest squared error of y (FLAP, An et
al. 2023, arXiv 2312.11983). A convolution's padding is part of the mean: what is added is
the mean over all output positions, which without padding is the kernel's sum times the channel's mean. A
layer without bias in front of a batch norm loses the same amount from the norm's running mean.

The mean of every output is kept, and its squared error falls. The model's loss need not follow: where most of
a network without norms is removed, what is left shrinks as a whole, and full-size means weigh too much in it
(measured on the shipped digits MLP, random neurons: better at 10 %, worse at 50 %; compare before you use it).

FLAP does this for the output projections of attention and MLP; here it is every linear layer and
convolution that reads removed units.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError, NumericsError, PlanError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent, track
from secateur.core.select import all_finite
from secateur.core.units import Layout
from secateur.data.batches import as_batches
from secateur.shrink.apply import changed_weights
from secateur.shrink.cut import removed_indices, tensors_of
from secateur.shrink.fuse import LAYERS, feeding, plain, run_once
from secateur.structure.layers import TRANSPOSED_CONVOLUTIONS, layout_of, to_matrix
from secateur.structure.readers import IN_DIM

PACKED = (nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)
"""Layers that read along dimension 1 of several weights, or of one that is several."""
FACT = "compensated"


@dataclass(frozen=True)
class Compensation:
    """New values and the layers that could not get one.

    Attributes:
        values: parameter or buffer -> new value, at the dense model's size.
        left: layer that reads removed units -> why nothing makes up for them.
    """

    values: dict[str, Tensor]
    left: dict[str, str]


def compensate(plan: Plan, model: nn.Module, data: Any, progress: Progress | None = None) -> Plan:
    """The plan with biases and running means that make up for the mean of what it removes.

    Args:
        plan: removes channels, neurons, heads or widths.
        model: the dense model that was planned on; left as it is.
        data: calibration data: a Dataset, a tensor of inputs, or an iterable of batches.
        progress: receives progress; silent by default.

    Returns:
        A new plan; layers that have neither a bias nor a norm to take the mean are in its warnings.

    Raises:
        PlanError: the plan belongs to another model or makes up for the mean already.
        DataError, ModelError, NumericsError: what is wrong with data, model or activations.
    """
    if any(FACT in facts for facts in plan.facts.values()):
        raise PlanError("this plan makes up for the mean of what it removes already; use it as it is")
    if plan.additions:
        raise PlanError(
            "this plan adds modules to the model (shortcuts, factorised layers, by-passes); means are not made up "
            "for through these"
        )
    found = compensation(model, plan, as_batches(data), progress or Silent())
    warnings = plan.warnings
    if found.left:
        name, why = next(iter(found.left.items()))
        warnings += (
            f"the mean of removed units is not made up for in layers: {len(found.left)}; the first is '{name}': {why}",
        )
    facts = dict(plan.facts)
    if plan.sites:  # like all figures of a whole plan, at its first site
        first = next(iter(plan.sites))
        facts[first] = {**facts.get(first, {}), FACT: float(len(found.values))}
    return replace(plan, weights={**plan.weights, **found.values}, warnings=warnings, facts=facts)


def mean_to_bias(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], progress: Progress | None = None
) -> dict[str, Tensor]:
    """New biases and running means by name, at the dense model's size: `compensation` without its reasons."""
    return compensation(model, plan, batches, progress or Silent()).values


def compensation(model: nn.Module, plan: Plan, batches: Sequence[Batch], progress: Progress) -> Compensation:
    """Measure the mean contribution of removed units to every layer that reads them.

    Args:
        model: dense; run in eval mode and left as it is.
        plan: what is removed; its new weights, where it has any, are the ones that count.
        batches: calibration data.
        progress: where to report.

    Raises:
        PlanError: the plan belongs to another model.
        DataError: there are no batches.
        ModelError: the weights are on the meta device, or the model does not run on a batch.
        NumericsError: NaN or infinity in what enters a layer; names it.
    """
    plan.check_model(dict(model.named_parameters()))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model's weights are on the meta device, and means need their values; load the weights")
    if not batches:
        raise DataError("the mean of removed units is measured on calibration data, and there is none; give batches")
    new = {id(tensor): value for _, tensor, value in changed_weights(model, plan)}
    readers, left = _readers(model, plan, new)
    _find_places(model, readers, left, batches[0])
    for reader in readers:
        if reader.name not in left:
            reader.listen()
    try:
        for batch in track(batches, progress, "means of removed units"):
            run_once(model, batch)
    finally:
        for reader in readers:
            reader.stop()
    return Compensation(_values(model, readers, left, new), left)


@dataclass(eq=False)
class _Reader:
    """A layer that loses inputs, and the mean over all positions of what they give to its outputs."""

    name: str
    module: nn.Module
    layout: Layout
    weight: Tensor
    gone: Tensor
    place: str = ""
    sign: int = 1
    mean: Tensor | float = 0.0
    positions: int = 0
    handle: Any = None

    def listen(self) -> None:
        """Measure at every call."""
        self.handle = self.module.register_forward_pre_hook(self._update, with_kwargs=True)

    def stop(self) -> None:
        """Measure no more."""
        if self.handle is not None:
            self.handle.remove()

    def _update(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        x, rest = given[0], given[1:]
        lost = self.weight.index_select(IN_DIM[self.layout], self.gone.to(self.weight.device)).float()
        if isinstance(module, nn.modules.conv._ConvNd):
            found, positions = self._convolved(module, x, lost, rest)
        else:
            rows = x.reshape(-1, x.shape[-1])
            mean = rows.mean(0, dtype=torch.float32)[self.gone.to(x.device)]
            found, positions = to_matrix(lost, self.layout) @ mean, len(rows)
        self.positions += positions
        self.mean = self.mean + (found - self.mean) * (positions / max(1, self.positions))

    def _convolved(
        self, module: nn.modules.conv._ConvNd, x: Tensor, lost: Tensor, rest: list[Any]
    ) -> tuple[Tensor, int]:
        """The convolution of the removed channels alone; it is linear, so the samples' mean is enough."""
        samples = x if x.dim() == lost.dim() else x[None]
        groups = torch.arange(module.groups) * (module.in_channels // module.groups)
        channels = (groups[:, None] + self.gone).flatten()
        mean = samples.mean(0, keepdim=True, dtype=torch.float32).index_select(1, channels.to(x.device))
        alone = copy.copy(module)  # calls of `forward` itself pass by the hooks
        alone._parameters = {"weight": nn.Parameter(lost, requires_grad=False), "bias": None}
        out = alone.forward(mean, *rest)[0].flatten(1)
        return out.mean(1), len(samples) * out.shape[1]


def _readers(model: nn.Module, plan: Plan, new: dict[int, Tensor]) -> tuple[list[_Reader], dict[str, str]]:
    """Layers whose inputs the plan removes, and those whose share of them cannot be told."""
    tensors = tensors_of(model)
    removed: dict[int, dict[int, Tensor]] = {}
    for parameter, dims in removed_indices(plan).items():
        if parameter not in tensors:
            raise PlanError(
                f"the plan cuts '{parameter}', which this model does not have; use the model it was made for"
            )
        removed[id(tensors[parameter])] = dims
    readers, left = [], {}
    for name, module in model.named_modules():
        layout = layout_of(module)
        if layout is None and not isinstance(module, PACKED):
            continue
        dim = 1 if layout is None else IN_DIM[layout]
        cuts = [removed[id(parameter)] for parameter in _own(module) if id(parameter) in removed]
        gone = next((dims[dim] for dims in cuts if dim in dims), None)
        if gone is None:
            continue
        why = _unlike(module, layout)
        if layout is None or why is not None:
            left[name] = why or ""
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        readers.append(_Reader(name, module, layout, new.get(id(weight), weight.detach()), gone))
    return readers, left


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices of one layer, also where they are kept in a parametrisation."""
    packed = isinstance(module, nn.MultiheadAttention)  # its output projection is a layer itself
    return (parameter for parameter in module.parameters(recurse=not packed) if parameter.dim() > 1)


def _unlike(module: nn.Module, layout: Layout | None) -> str | None:
    """Why a layer's output is not known to be its weight times its inputs."""
    if layout is None:
        return f"a {type(module).__name__} multiplies with several weights inside"
    if module._parameters.get("weight") is None:
        return "its weight is computed from other parameters"
    if layout is not Layout.TRANSPOSED and not plain(module, LAYERS):
        return f"it is a {type(module).__name__}, which does more than torch's layer of that kind"
    if isinstance(module, TRANSPOSED_CONVOLUTIONS) and module.groups > 1:
        return "it is a transposed convolution in groups"
    return None


def _find_places(model: nn.Module, readers: list[_Reader], left: dict[str, str], batch: Batch) -> None:
    """Where each layer's mean goes: its bias, or the running mean of the norm behind it."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    norms: dict[str, str] | None = None
    for reader in readers:
        bias = reader.module._parameters.get("bias")
        if bias is not None and owners[id(bias)] == 1:
            reader.place = f"{reader.name}.bias" if reader.name else "bias"
        elif bias is not None:
            left[reader.name] = "it shares its bias with another layer"
        else:
            norms = dict(feeding(model, batch)[0]) if norms is None else norms
            if reader.name in norms:
                reader.place, reader.sign = f"{norms[reader.name]}.running_mean", -1
            else:
                left[reader.name] = "it has no bias, and no batch norm follows it directly"


def _values(
    model: nn.Module, readers: list[_Reader], left: dict[str, str], new: dict[int, Tensor]
) -> dict[str, Tensor]:
    tensors = tensors_of(model)
    values = {}
    for reader in readers:
        if reader.name in left:
            continue
        if not isinstance(reader.mean, Tensor):
            left[reader.name] = "the run does not call it as a layer"
            continue
        if not all_finite(reader.mean):
            raise NumericsError(
                f"the calibration activations that enter layer '{reader.name}' contain NaN or infinity; "
                "check the data and the layers before it"
            )
        before = tensors[reader.place].detach()
        value = new.get(id(tensors[reader.place]), before).to(reader.mean.device).float() + reader.sign * reader.mean
        values[reader.place] = value.to(before.dtype).cpu()
    return values
