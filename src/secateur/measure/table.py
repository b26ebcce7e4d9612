"""Predict how long a model takes with any widths, from times of its layers that were measured here.

Every convolution and linear layer is timed alone, at the widths where its time bends (see `grid`). What
the layers leave of the whole model's time, such as norms, activations and Python's own, is split into a
fixed part and one that goes with the number of activations, by timing the model a second time with half
of everything cut out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError, PlanError, SecateurError, SettingsError, UnknownNameError
from secateur.core.fingerprint import describe
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.core.units import Layout
from secateur.data.running import bound, device_of, dtype_of, evaluating
from secateur.measure.grid import Grid, Widths
from secateur.measure.timings import MODEL_SECONDS, Timer, Timings, Work, cache_folder, machine, undisturbed
from secateur.shrink.cut import install, make_cut
from secateur.structure.analysis import Structure
from secateur.structure.dims import Axis, Dim, count, factor, product, resolve, size
from secateur.structure.layers import layout_of

FILL = 0.01  # of weights and inputs: zeros, denormals and NaN would not be typical


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
    """

    kind: str
    settings: tuple[tuple[str, Any], ...]
    batch: Widths
    positions: Widths
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    def name(self, widths: Widths) -> str:
        """The same for equal work, in this process and the next."""
        settings = " ".join(f"{name}={value}" for name, value in self.settings)
        layout = " channels_last" if self.channels_last else ""
        inputs, outputs, groups, rows = widths
        return (
            f"{self.kind} in={inputs} out={outputs} groups={groups} rows={rows} batch={list(self.batch)} "
            f"positions={list(self.positions)} {settings} {str(self.dtype).removeprefix('torch.')}{layout}"
        )

    def work(self, widths: Widths) -> Work:
        """A layer with its own weights and an input: `widths` are inputs and outputs of a group, groups, rows."""
        inputs, outputs, groups, rows = widths
        with torch.device("meta"):
            layer = self._layer(inputs, outputs, groups)
        layer = layer.to(self.dtype).to_empty(device=self.device).requires_grad_(False).eval()
        for parameter in layer.parameters():
            parameter.fill_(FILL)
        shape = (*self.batch, inputs * groups, *self.positions) if self.positions else (rows, inputs)
        x = torch.full(shape, FILL, dtype=self.dtype, device=self.device)
        if self.channels_last:
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            x = x.to(memory_format=torch.channels_last)
        return layer, Batch((x,))

    def _layer(self, inputs: int, outputs: int, groups: int) -> nn.Module:
        settings = dict(self.settings)
        if self.kind == "Linear":
            return nn.Linear(inputs, outputs, **settings)
        if self.kind == "Conv1D":
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(outputs, inputs)
            return layer
        convolution: nn.Module = getattr(nn, self.kind)(inputs * groups, outputs * groups, groups=groups, **settings)
        return convolution


@dataclass(frozen=True)
class Call:
    """One call of a layer in the model's run.

    Attributes:
        module: the layer's qualified name.
        kernel: what is called.
        dims: inputs of a group, outputs of a group, groups, rows.
        full: their sizes in this run; rows can be more than the structure saw.
        results: elements of the result.
    """

    module: str
    kernel: Kernel
    dims: tuple[Dim, Dim, Dim, Dim]
    full: Widths
    results: int

    def widths(self, kept: Mapping[Axis, int]) -> Widths:
        """The widths when `kept` units of each axis stay."""
        return tuple(
            max(1, full * count(dim, kept) // size(dim)) for dim, full in zip(self.dims, self.full, strict=True)
        )

    def activations(self, widths: Widths) -> float:
        """Elements of the result at these widths."""
        return self.results * prod(widths[1:]) / prod(self.full[1:])


@dataclass(frozen=True)
class Point:
    """One measurement of a layer alone.

    Attributes:
        inputs, outputs: channels of all groups together.
        groups: of a convolution.
        rows: of a linear layer's input; 1 for convolutions.
        milliseconds: of one call.
    """

    inputs: int
    outputs: int
    groups: int
    rows: int
    milliseconds: float


@dataclass
class LatencyTable:
    """Times of a model's layers on this machine, and the model's time at any widths read off them.

    Attributes:
        structure: the sites that counts speak of.
        calls: the weight layers' calls in one run.
        dense: milliseconds of the whole model, as measured.
        half: milliseconds of the model with every site at half, as measured; None if it cannot be run.
        fixed, moving: the part of `dense` outside of the layers that stays, and the one that goes with
            the activations.
        scale: measured time of the layers inside the model over that of the layers alone, at most 1.
        measured: how many times were measured rather than read from the cache.
        path: the cache file.
    """

    structure: Structure
    calls: list[Call]
    dense: float = 0.0
    half: float | None = None
    fixed: float = 0.0
    moving: float = 0.0
    scale: float = 1.0
    measured: int = 0
    path: Path | None = None
    _grids: dict[tuple[Kernel, Widths, Widths], Grid] = field(default_factory=dict)
    _terms: list[tuple[Call, Grid, int]] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        structure: Structure,
        batch: Batch,
        cache: Path | None = None,
        threads: int | None = None,
        *,
        timer: Timer = undisturbed,
        progress: Progress | None = None,
    ) -> LatencyTable:
        """Measure what is not in the cache yet. The model is left as it was.

        Args:
            model: with real weights, dense, where it is to be timed.
            structure: of this model.
            batch: the inputs whose latency counts.
            cache: a folder for measurements; None is `SECATEUR_CACHE`, else `~/.cache/secateur`.
            threads: torch's threads inside an operator; None takes the present number.
            timer: measures; tests put their own here.
            progress: told of every piece of work.

        Raises:
            ModelError: the model cannot be run on the batch, or is not the structure's.
            SettingsError: threads below 1.
        """
        with _threads(threads):
            table = cls(structure, record(model, structure, batch))
            facts = machine(device_of(model), dtype_of(model))
            timings = Timings(cache or cache_folder(), facts, timer)
            table.path = timings.path
            table._measure_layers(timings, progress or Silent())
            table._measure_model(model, batch, timings, progress or Silent())
        table.measured = timings.measured
        return table

    def milliseconds(self, counts: Mapping[str, int]) -> float:
        """Predicted time of the whole model when each named site keeps that many units; `{}` is dense.

        Raises:
            UnknownNameError: no such site.
            PlanError: a site would keep none of its units, or more than it has.
        """
        self._check(counts)
        layers, share = self._layers(self.structure.kept(counts))
        return self.scale * layers + self.fixed + self.moving * share

    def layers(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Layer -> predicted milliseconds of all its calls, in the order of the run."""
        self._check(counts)
        kept = self.structure.kept(counts)
        found: dict[str, float] = {}
        for call in self.calls:
            time = self.scale * self._grid(call).at(call.widths(kept))
            found[call.module] = found.get(call.module, 0.0) + time
        return found

    def curve(self, module: str) -> list[Point]:
        """What was measured of one layer alone, widest first.

        Raises:
            UnknownNameError: no layer of that name was seen in the run.
        """
        call = next((call for call in self.calls if call.module == module), None)
        if call is None:
            raise UnknownNameError("layer", module, {call.module for call in self.calls})
        values = self._grid(call).values
        return [
            Point(inputs * groups, outputs * groups, groups, rows, values[inputs, outputs, groups, rows])
            for inputs, outputs, groups, rows in sorted(values, reverse=True)
        ]

    def _check(self, counts: Mapping[str, int]) -> None:
        for name, kept in counts.items():
            site = self.structure.sites.get(name)
            if site is None:
                raise UnknownNameError("site", name, self.structure.sites)
            if not 1 <= kept <= site.units:
                raise PlanError(f"'{name}' cannot keep {kept} of its {site.units} units; give 1 to {site.units}")

    def _grid(self, call: Call) -> Grid:
        return self._grids[self._key(call)]

    def _key(self, call: Call) -> tuple[Kernel, Widths, Widths]:
        return call.kernel, call.widths(dict.fromkeys(self.structure.axes.values(), 1)), call.full

    def _layers(self, kept: Mapping[Axis, int]) -> tuple[float, float]:
        """Milliseconds of all layers alone, and the share of activations that stays."""
        layers = share = total = 0.0
        for call, grid, times in self._terms:
            widths = call.widths(kept)
            layers += times * grid.at(widths)
            share += times * call.activations(widths)
            total += times * call.results
        return layers, share / total if total else 1.0

    def _measure_layers(self, timings: Timings, progress: Progress) -> None:
        for call in self.calls:
            self._grids.setdefault(self._key(call), Grid(*self._key(call)[1:]))
        kernels = [(kernel, grid) for (kernel, _, _), grid in self._grids.items()]
        while any(grid.needed() for _, grid in kernels):
            wanted = {
                kernel.name(widths): partial(kernel.work, widths)
                for kernel, grid in kernels
                for widths in grid.needed()
            }
            timings.measure(wanted, progress)
            for kernel, grid in kernels:
                grid.values.update({widths: timings.times[kernel.name(widths)] for widths in grid.needed()})
                grid.refine()
        alike = Counter((self._key(call), call.dims) for call in self.calls)
        first = {(self._key(call), call.dims): call for call in reversed(self.calls)}
        self._terms = [(first[key], self._grids[key[0]], times) for key, times in alike.items()]

    def _measure_model(self, model: nn.Module, batch: Batch, timings: Timings, progress: Progress) -> None:
        counts = {name: max(1, site.units // 2) for name, site in self.structure.sites.items()}
        name = _digest(model, batch)
        dense, half = f"{name} dense", f"{name} half"
        timings.measure({dense: lambda: (model, batch)}, progress, MODEL_SECONDS)
        if half not in timings.times:
            with contextlib.suppress(SecateurError, RuntimeError, ValueError), _cut(model, self.structure, counts):
                timings.measure({half: lambda: (model, batch)}, progress, MODEL_SECONDS)
        self.dense, self.half = timings.times[dense], timings.times.get(half)
        self._calibrate(counts)

    def _calibrate(self, counts: Mapping[str, int]) -> None:
        """Choose scale, fixed and moving so that the measured models are met, none of them negative."""
        layers, _ = self._layers({})
        half_layers, share = self._layers(self.structure.kept(counts))
        half = self.half if self.half is not None else self.dense
        ratios = [whole / part for whole, part in ((self.dense, layers), (half, half_layers)) if part]
        self.scale = min(1.0, *ratios)
        rest = self.dense - self.scale * layers
        drop = rest - (half - self.scale * half_layers) if self.half is not None else rest * (1 - share)
        self.moving = min(max(drop / (1 - share), 0.0), rest) if share < 1 else 0.0
        self.fixed = rest - self.moving


# --- the run --------------------------------------------------------------------------------------


def record(model: nn.Module, structure: Structure, batch: Batch) -> list[Call]:
    """The weight layers' calls in one run of the model, in order.

    Raises:
        ModelError: the model has no weights, does not run on the batch, or is not the structure's.
    """
    if device_of(model).type == "meta":
        raise ModelError(f"{type(model).__name__} has no weights (device 'meta') and cannot be timed; load its weights")
    calls: list[Call] = []
    handles = []

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            calls.append(_call(name, module, structure, args[0], result))

    for name, module in model.named_modules():
        if layout_of(module) is not None and f"{name}.weight" in structure.observation.tensors:
            handles.append(module.register_forward_hook(partial(watch, name)))
    try:
        with evaluating(model), torch.inference_mode():
            bound(model, batch)()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} cannot be run to be timed: {first}; give inputs it expects"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _call(name: str, module: nn.Module, structure: Structure, x: Tensor, result: Tensor) -> Call:
    weight = module.weight
    assert isinstance(weight, Tensor)
    dims = structure.observation.tensors[f"{name}.weight"]
    if tuple(map(size, dims)) != tuple(weight.shape):
        raise ModelError(
            f"'{name}.weight' is {list(weight.shape)} but {list(map(size, dims))} in the structure, which is another "
            "model's or from before a cut; analyse this model"
        )
    layout = layout_of(module)
    if layout in (Layout.CONV, Layout.CONV_TRANSPOSED):
        inputs, outputs, groups = _grouped(module, dims)
        spatial = weight.dim() - 2
        batch, positions = tuple(x.shape[: -spatial - 1]), tuple(x.shape[-spatial:])
        rows: Dim = 1
        full = (size(inputs), size(outputs), size(groups), 1)
    else:
        outputs, inputs = dims if layout is Layout.LINEAR else (dims[1], dims[0])
        batch, positions, groups, rows = (), (), 1, _rows(name, structure)
        full = (size(inputs), size(outputs), 1, prod(x.shape[:-1]))
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    kernel = Kernel(_kind(module), _settings(module), batch, positions, weight.dtype, weight.device, last)
    resolved = (resolve(inputs), resolve(outputs), resolve(groups), resolve(rows))
    return Call(name, kernel, resolved, full, result.numel())


def _grouped(module: nn.Module, dims: tuple[Dim, ...]) -> tuple[Dim, Dim, Dim]:
    """Inputs and outputs of a group, and the groups, of a convolution."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    groups, own = factor(dims[0], size(dims[0]) // module.groups, f"groups of '{module}'")
    return (own, dims[1], groups) if module.transposed else (dims[1], own, groups)


def _rows(name: str, structure: Structure) -> Dim:
    """What stands before the features of a linear layer's input: it can hold units, as in token mixing."""
    for one in structure.observation.products:
        if one.module == name and len(one.dims) >= 2:
            return product(*one.dims[:-2])
    return 1


def _kind(module: nn.Module) -> str:
    """The class in torch or transformers: what a subclass adds is not the layer's own time."""
    known = (nn.Linear, *vars(nn.modules.conv).values())
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


# --- the whole model ------------------------------------------------------------------------------


@contextlib.contextmanager
def _cut(model: nn.Module, structure: Structure, counts: Mapping[str, int]) -> Iterator[None]:
    """The model with the first units of every site, put back afterwards."""
    sites = {name: structure.sites[name] for name in counts}
    masks = {name: torch.arange(site.units) < counts[name] for name, site in sites.items()}
    undo = install(model, make_cut(model, Plan(sites=sites, masks=masks), structure))
    try:
        yield
    finally:
        undo()


def _digest(model: nn.Module, batch: Batch) -> str:
    """Names models that do the same work: their classes, sizes and inputs, not their values."""
    facts = {
        "modules": [(name, str(type(module))) for name, module in model.named_modules()],
        "settings": [module.extra_repr() for module in model.modules()],
        "parameters": [(name, describe(tensor)) for name, tensor in model.named_parameters()],
        "inputs": [describe(item) if isinstance(item, Tensor) else str(item) for item in batch.args],
        "named": [(k, describe(v) if isinstance(v, Tensor) else str(v)) for k, v in sorted(batch.kwargs.items())],
    }
    return f"{type(model).__name__} {hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()}"


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted is not None and wanted < 1:
        raise SettingsError(f"threads must be 1 or more, got {wanted}")
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
