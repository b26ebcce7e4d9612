"""Feature maps: what the units of a structured site send on, one matrix per sample, wherever the model computes them.

The maps of an axis are taken where it leaves an activation; where none follows, after its norms, and where there
is none of these, as convolutions and linear layers make them. An axis that several layers make, as a residual
stream, has maps in several places. Which result of which function has which axis the observed run says
(`structure.observe`), so activations that are called as functions are seen like modules.

Of a convolution a map is rows x columns of its pixels (further dimensions count as rows). Where positions have one
dimension only, as tokens have, the matrix of a unit is its features x positions: a head's is head_dim x tokens, a
neuron's is a row. Without positions it is 1 x 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.core.errors import DataError, ModelError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Progress, track
from secateur.core.select import all_finite
from secateur.data.batches import run, split_batch
from secateur.data.running import device_of, evaluating
from secateur.stats.zeros import RECTIFIERS, SMOOTH
from secateur.structure.analysis import Structure
from secateur.structure.dims import Axis, Concat, Dim, axes, resolve, size

CHUNK = 2**22  # entries of maps that are measured at a time: 16 MiB
Measure = Callable[[Tensor], Tensor]
"""Maps `[n, rows, columns]` float32 -> one number for each, `[n]`."""

ACTIVATIONS: frozenset[Callable[..., Any]] = (
    RECTIFIERS | SMOOTH | {F.hardswish, F.hardtanh, F.prelu, torch.prelu, torch.tanh, Tensor.tanh}
)
NORMS: frozenset[Callable[..., Any]] = frozenset(
    {F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm}
)
PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, torch.addmm}
)
STAGES: tuple[frozenset[Callable[..., Any]], ...] = (ACTIVATIONS, NORMS, PRODUCTS)


@dataclass(frozen=True)
class Place:
    """One result of the observed run that holds the maps of a site.

    Attributes:
        site: whose maps.
        dim: the dimension of the result along which its units lie.
        indices: int64 `[units, k]`: where along it.
    """

    site: str
    dim: int
    indices: Tensor

    def maps(self, result: Tensor) -> Tensor:
        """`[samples, units, maps of a unit, rows, columns]`."""
        x = result.movedim(self.dim, 1)[:, self.indices.to(result.device)]  # (samples, units, k, *positions)
        match x.dim():
            case 3:
                return x[:, :, None, None]
            case 4:
                return x[:, :, None]
            case _:
                return x.flatten(3, -2)


def mean_over_maps(
    model: nn.Module,
    structure: Structure,
    sites: Iterable[str],
    batches: Iterable[Batch],
    *,
    measure: Measure,
    progress: Progress,
) -> dict[str, Tensor]:
    """Site -> a measure of its units' maps, float64 `[units]`: mean over samples, then over the places of the site.

    Sites whose maps are seen nowhere are left out.

    Args:
        model: left as it was; run in eval mode.
        structure: of this model.
        sites: names in `structure`.
        batches: calibration data.
        measure: a number per map.
        progress: one step per batch.

    Raises:
        DataError: no samples.
        ModelError: the run takes another way than the observed one.
        NumericsError: a map holds NaN or infinity.
    """
    parts = list(batches)
    if not parts:
        raise DataError("feature maps need at least one calibration sample")
    places = find_places(model, structure, list(sites), split_batch(parts[0], 1)[0])
    listener = _Listener(structure, places, measure)
    with evaluating(model):
        for batch in track(parts, progress, "feature maps"):
            moved = batch.to(device_of(model))  # outside: every function inside is numbered
            listener.call = 0
            with listener:
                run(model, moved)
    return listener.means()


def find_places(
    model: nn.Module, structure: Structure, sites: list[str], sample: Batch
) -> dict[int, list[tuple[Place, int]]]:
    """Call number -> the sites whose maps its result holds, and which of its tensors that is."""
    stages, sample = _Stages(), sample.to(device_of(model))
    with evaluating(model), stages:
        run(model, sample)
    found: dict[str, dict[int, list[tuple[int, tuple[int, Place]]]]] = {name: {} for name in sites}
    names = {structure.axes[name]: name for name in sites}
    for call, stage in stages.of.items():
        for number, dims in enumerate(structure.observation.results.get(call, ())):
            for place in _places(dims or (), names):
                found[place.site].setdefault(stage, []).append((call, (number, place)))
    chosen: dict[int, list[tuple[Place, int]]] = {}
    for by_stage in found.values():
        for call, (number, place) in by_stage[min(by_stage)] if by_stage else ():
            chosen.setdefault(call, []).append((place, number))
    return chosen


def _places(dims: tuple[Dim, ...], names: Mapping[Axis, str]) -> Iterable[Place]:
    """The sites among the dimensions of a result; the first dimension holds samples."""
    for d, dim in enumerate(dims[1:], 1):
        for axis in dict.fromkeys(axes(dim)):
            if axis in names:
                yield Place(names[axis], d, indices_of(dim, axis))


def indices_of(dim: Dim, axis: Axis) -> Tensor:
    """Where the units of an axis lie along a dimension, int64 `[units, k]`."""
    owners = _owners(dim, axis)
    order = torch.argsort(owners, stable=True)
    return order[int((owners < 0).sum()) :].reshape(axis.size, -1)


def _owners(dim: Dim, axis: Axis) -> Tensor:
    """The unit at every index of a dimension, -1 where it is none of the axis."""
    dim = resolve(dim)
    if dim is axis:
        return torch.arange(axis.size)
    if isinstance(dim, (int, Axis)):
        return torch.full((size(dim),), -1)
    parts = [_owners(part, axis) for part in dim.parts]
    if isinstance(dim, Concat):
        return torch.cat(parts)
    found = parts[0]
    for part in parts[1:]:
        found = torch.maximum(found[:, None], part).reshape(-1)
    return found


class _Calls(TorchFunctionMode, ABC):
    """Numbers functions as the observed run did: those that return tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.call = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = tuple(out) if isinstance(out, (list, tuple)) else (out,)
        if any(isinstance(item, Tensor) for item in tensors):
            self.call += 1
            self.see(func, tensors)
        return out

    @abstractmethod
    def see(self, func: Callable[..., Any], tensors: tuple[Any, ...]) -> None:
        """A function has returned."""


class _Stages(_Calls):
    """Which calls are activations (0), norms (1) and products (2)."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, int] = {}

    def see(self, func: Callable[..., Any], tensors: tuple[Any, ...]) -> None:
        stage = next((number for number, stage in enumerate(STAGES) if func in stage), None)
        if stage is not None:
            self.of[self.call] = stage


class _Listener(_Calls):
    """Measures maps as they are computed; what follows may write into them."""

    def __init__(self, structure: Structure, places: Mapping[int, list[tuple[Place, int]]], measure: Measure) -> None:
        super().__init__()
        self.structure, self.places, self.measure = structure, places, measure
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}

    def see(self, func: Callable[..., Any], tensors: tuple[Any, ...]) -> None:
        for place, number in self.places.get(self.call, ()):
            self._check(place, number, tensors)
            key, maps = (place.site, self.call), place.maps(tensors[number].float())
            self.sums[key] = self.sums.get(key, 0) + self._measured(maps).mean(2).sum(0)
            self.counts[key] = self.counts.get(key, 0) + len(maps)

    def _check(self, place: Place, number: int, tensors: tuple[Any, ...]) -> None:
        dims = self.structure.observation.results[self.call][number]
        found = tensors[number] if number < len(tensors) else None
        if dims is None or not isinstance(found, Tensor) or found.shape[1:] != tuple(map(size, dims))[1:]:
            shape = list(found.shape) if isinstance(found, Tensor) else "no tensor"
            raise ModelError(
                f"the feature maps of '{place.site}' were seen as {dims} and are {shape} on the calibration data; give "
                "samples of one size, and an example of that size"
            )
        if not all_finite(found):
            raise NumericsError(f"the feature maps of '{place.site}' hold NaN or infinity; check the data and weights")

    def _measured(self, maps: Tensor) -> Tensor:
        """`[samples, units, maps of a unit]` float64."""
        flat = maps.flatten(0, 2)
        chunks = torch.split(flat, max(1, CHUNK // max(1, flat[0].numel())))
        return torch.cat([self.measure(chunk) for chunk in chunks]).double().view(maps.shape[:3])

    def means(self) -> dict[str, Tensor]:
        """Over samples, then over places."""
        found: dict[str, list[Tensor]] = {}
        for (site, call), total in self.sums.items():
            found.setdefault(site, []).append(total / self.counts[site, call])
        return {site: torch.stack(parts).mean(0) for site, parts in found.items()}
