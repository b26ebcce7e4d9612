"""The weight layers' calls in one run of a model, and how each is run alone, at any widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.units import Layout
from secateur.data.running import bound, device_of, evaluating
from secateur.measure.grid import Widths
from secateur.measure.timings import TOGETHER, Work
from secateur.structure.analysis import Structure
from secateur.structure.dims import Axis, Dim, count, factor, product, resolve, size
from secateur.structure.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, layout_of

CACHE = 2**26  # bytes of weights after which the first ones are read from memory again
COPIES = 64
FILL = 0.01  # of weights and inputs: zeros, denormals and NaN would not be typical

Dims = tuple[Dim, Dim, Dim, Dim]


@dataclass(frozen=True)
class Kernel:
    """What a call of a weight layer is, apart from its widths.

    Attributes:
        kind: the class of the layer, e.g. `Conv2d`.
        settings: arguments of the class besides the widths.
        batch, positions: the input's dimensions before and after the channels; empty for linear layers,
            whose leading dimensions are the rows.
        dtype, device: of the weight.
        channels_last: whether the input is stored that way.
        copies: layers of equal size that take turns when it is timed. In the model, the other layers'
            weights come by before a layer's own are needed again, and push them out of the cache.
    """

    kind: str
    settings: tuple[tuple[str, Any], ...]
    batch: Widths
    positions: Widths
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    copies: int

    def name(self, widths: Widths) -> str:
        """The same for equal work, in this process and the next."""
        settings = " ".join(f"{name}={value}" for name, value in self.settings)
        layout = " channels_last" if self.channels_last else ""
        inputs, outputs, groups, rows = widths
        return (
            f"{self.kind} in={inputs} out={outputs} groups={groups} rows={rows} batch={list(self.batch)} "
            f"positions={list(self.positions)} {settings} {str(self.dtype).removeprefix('torch.')}{layout} "
            f"copies={self.copies}"
        )

    def work(self, widths: Widths) -> Work:
        """A layer with its own weights and an input: `widths` are inputs and outputs of a group, groups, rows."""
        inputs, outputs, groups, rows = widths
        layers = [self._layer(inputs, outputs, groups) for _ in range(self.copies)]
        shape = (*self.batch, inputs * groups, *self.positions) if self.positions else (rows, inputs)
        x = torch.full(shape, FILL, dtype=self.dtype, device=self.device)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return (Turns(layers) if self.copies > 1 else layers[0]), Batch((x,))

    def _layer(self, inputs: int, outputs: int, groups: int) -> nn.Module:
        with torch.device("meta"):
            layer = self._described(inputs, outputs, groups)
        layer = layer.to(self.dtype).to_empty(device=self.device).requires_grad_(False).eval()
        for parameter in layer.parameters():
            parameter.fill_(FILL)
        if self.channels_last:
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return layer

    def _described(self, inputs: int, outputs: int, groups: int) -> nn.Module:
        settings = dict(self.settings)
        if self.kind == "Linear":
            return nn.Linear(inputs, outputs, **settings)
        if self.kind == "Conv1D":
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(outputs, inputs)
            return layer
        convolution: nn.Module = getattr(nn, self.kind)(inputs * groups, outputs * groups, groups=groups, **settings)
        return convolution


class Turns(nn.Module):
    """Layers of which each call runs the next."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        """The next layer's result."""
        self.turn = (self.turn + 1) % len(self.layers)
        result: Tensor = self.layers[self.turn](x)
        return result


@dataclass(frozen=True)
class Call:
    """One call of a layer in the model's run.

    Attributes:
        module: the layer's qualified name.
        kernel: what is called.
        dims: inputs of a group, outputs of a group, groups, rows.
        full: their sizes in this run; rows can be more than the structure saw.
        results: elements of the result.
        elements: elements of the weight.
    """

    module: str
    kernel: Kernel
    dims: Dims
    full: Widths
    results: int
    elements: int

    def widths(self, kept: Mapping[Axis, int]) -> Widths:
        """The widths when `kept` units of each axis stay."""
        return tuple(
            max(1, full * count(dim, kept) // size(dim)) for dim, full in zip(self.dims, self.full, strict=True)
        )

    def activations(self, widths: Widths) -> float:
        """Elements of the result at these widths."""
        return self.results * prod(widths[1:]) / prod(self.full[1:])

    def weights(self, widths: Widths) -> float:
        """Weights that are read at these widths."""
        return self.elements * prod(widths[:3]) / prod(self.full[:3])


def record(model: nn.Module, structure: Structure, batch: Batch) -> list[Call]:
    """The weight layers' calls in one run of the model, in order.

    Raises:
        ModelError: the model has no weights, does not run on the batch, or is not the structure's.
    """
    if device_of(model).type == "meta":
        raise ModelError(f"{type(model).__name__} has no weights (device 'meta') and cannot be timed; load its weights")
    recorder = _Recorder(structure, sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()))
    handles = [
        module.register_forward_hook(partial(recorder.on_call, name))
        for name, module in model.named_modules()
        if layout_of(module) is not None and _weight_name(name, structure) in structure.observation.tensors
    ]
    try:
        with evaluating(model), torch.inference_mode():
            bound(model, batch)()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} cannot be run to be timed: {first}; give inputs that it expects"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return recorder.calls


class _Recorder:
    """Writes calls down as they happen; `footprint` is the bytes of the model's weights."""

    def __init__(self, structure: Structure, footprint: int) -> None:
        self.structure = structure
        self.footprint = footprint
        self.calls: list[Call] = []

    def on_call(self, name: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A forward hook."""
        if not (args and isinstance(args[0], Tensor) and isinstance(result, Tensor)):
            return
        x, weight = args[0], module.weight
        assert isinstance(weight, Tensor)
        dims = self._dims(name, module, weight)
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        spatial = weight.dim() - 2
        kernel = Kernel(
            kind=_kind(module),
            settings=_settings(module),
            batch=tuple(x.shape[: -spatial - 1]) if spatial else (),
            positions=tuple(x.shape[-spatial:]) if spatial else (),
            dtype=weight.dtype,
            device=weight.device,
            channels_last=channels_last,
            copies=_copies(weight, self.footprint),
        )
        rows = 1 if spatial else prod(x.shape[:-1])
        full = (*map(size, dims[:3]), rows)
        self.calls.append(Call(name, kernel, dims, full, result.numel(), weight.numel()))

    def _dims(self, name: str, module: nn.Module, weight: Tensor) -> Dims:
        """Inputs of a group, outputs of a group, groups, rows."""
        dims = self.structure.observation.tensors[_weight_name(name, self.structure)]
        if tuple(map(size, dims)) != tuple(weight.shape):
            raise ModelError(
                f"'{name}.weight' is {list(weight.shape)} but {list(map(size, dims))} in the structure, which is "
                "another model's or from before a cut; analyse this model"
            )
        rows: Dim = 1
        groups: Dim = 1
        match layout_of(module):
            case Layout.LINEAR:
                outputs, inputs, rows = *dims, self._rows(name)
            case Layout.TRANSPOSED:
                inputs, outputs, rows = *dims, self._rows(name)
            case _:
                inputs, outputs, groups = _grouped(module, dims)
        return resolve(inputs), resolve(outputs), resolve(groups), resolve(rows)

    def _rows(self, name: str) -> Dim:
        """What stands before the features of a linear layer's input: it can hold units, as in token mixing."""
        products = self.structure.observation.products
        return next((product(*one.dims[:-2]) for one in products if one.module == name and len(one.dims) > 1), 1)


def _weight_name(module: str, structure: Structure) -> str:
    """The name under which a layer's weight is known; tied weights have one name."""
    name = f"{module}.weight" if module else "weight"
    return structure.observation.aliases.get(name, name)


def _copies(weight: Tensor, footprint: int) -> int:
    """So many that they hold a quarter of the model's bytes, as a group of four is timed in turns; a power of 2."""
    wanted = min(footprint, CACHE) // (TOGETHER * weight.numel() * weight.element_size())
    return min(COPIES, 1 << wanted.bit_length())


def _grouped(module: nn.Module, dims: tuple[Dim, ...]) -> tuple[Dim, Dim, Dim]:
    """Inputs and outputs of a group, and the groups, of a convolution."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    groups, own = factor(dims[0], size(dims[0]) // module.groups, f"groups of '{module}'")
    return (own, dims[1], groups) if module.transposed else (dims[1], own, groups)


def _kind(module: nn.Module) -> str:
    """The class in torch or transformers: what a subclass adds is not the layer's own time."""
    known = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
    classes = [kind.__name__ for kind in type(module).__mro__ if kind in known]
    return classes[0] if classes else "Conv1D"


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    if layout_of(module) is Layout.TRANSPOSED:
        return ()
    settings: list[tuple[str, Any]] = [("bias", module.bias is not None)]
    if isinstance(module, nn.modules.conv._ConvNd):
        names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
        names += ["output_padding"] if module.transposed else []
        settings += [(name, getattr(module, name)) for name in names]
    return tuple(settings)
