"""Predict how long a model takes with any widths, from times of its layers that were measured here.

Every convolution and linear layer is timed alone, at the widths where its time bends (see `grid`). What
the layers leave of the whole model's time, such as norms, activations and Python's own, is split into
parts that stay, that go with the number of activations and that go with the number of weights, by timing
the model a second time with half of everything cut out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError, SecateurError, SettingsError, UnknownNameError
from secateur.core.fingerprint import describe
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.data.running import device_of, dtype_of
from secateur.measure.calls import Call, Kernel, record
from secateur.measure.grid import Grid, Widths
from secateur.measure.timings import MODEL_SECONDS, Timer, Timings, cache_folder, machine, undisturbed
from secateur.shrink.cut import install, make_cut
from secateur.structure.analysis import Structure
from secateur.structure.dims import Axis


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
        fixed, activations, weights: the parts of `dense` that the layers alone do not show: one that
            stays, and those that go with the activations and the weights that stay.
        scale: time of the layers inside the model over their time alone, at most 1.
        measured: how many times were measured rather than read from the cache.
        path: the cache file.
    """

    structure: Structure
    calls: list[Call]
    dense: float = inf
    half: float | None = None
    fixed: float = 0.0
    activations: float = 0.0
    weights: float = 0.0
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
            name, progress = _digest(model, batch), progress or Silent()
            # the model before and after its layers, so that one bad moment does not decide
            table._measure_model(model, batch, f"{name} before", timings, progress)
            table._measure_layers(timings, progress)
            table._measure_model(model, batch, f"{name} after", timings, progress)
        table._calibrate()
        table.measured = timings.measured
        return table

    def milliseconds(self, counts: Mapping[str, int]) -> float:
        """Predicted time of the whole model when each named site keeps that many units; `{}` is dense.

        Raises:
            UnknownNameError: no such site.
            PlanError: a site would keep none of its units, or more than it has.
        """
        self._check(counts)
        layers, activations, weights = self._layers(self.structure.kept(counts))
        return self.scale * layers + self.fixed + self.activations * activations + self.weights * weights

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

    def _layers(self, kept: Mapping[Axis, int]) -> tuple[float, float, float]:
        """Milliseconds of all layers alone, and the shares of activations and weights that stay."""
        layers = activations = weights = 0.0
        for call, grid, times in self._terms:
            widths = call.widths(kept)
            layers += times * grid.at(widths)
            activations += times * call.activations(widths)
            weights += times * call.weights(widths)
        total = sum(call.results for call in self.calls) or 1
        total_weights = sum(call.elements for call in self.calls) or 1
        return layers, activations / total, weights / total_weights

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

    def _measure_model(self, model: nn.Module, batch: Batch, name: str, timings: Timings, progress: Progress) -> None:
        """Time the model dense and, where it can be cut, at half; the lower of repeated times counts."""
        dense, half = f"{name} dense", f"{name} half"
        timings.measure({dense: lambda: (model, batch)}, progress, MODEL_SECONDS)
        if half not in timings.times:
            with (
                contextlib.suppress(SecateurError, RuntimeError, ValueError),
                _cut(model, self.structure, self._halves()),
            ):
                timings.measure({half: lambda: (model, batch)}, progress, MODEL_SECONDS)
        self.dense = min(self.dense, timings.times[dense])
        if half in timings.times:
            self.half = min(self.half or inf, timings.times[half])

    def _halves(self) -> dict[str, int]:
        return {name: max(1, site.units // 2) for name, site in self.structure.sites.items()}

    def _calibrate(self) -> None:
        """Choose scale and parts, none of them negative, so that dense is met, and half where layers leave room.

        Layers gain less inside the model than alone where the rest would have to grow to meet half.
        What falls faster than activations do is the reading of weights, which fall with both sides of a layer.
        """
        layers, *_ = self._layers({})
        half_layers, activations, weights = self._layers(self.structure.kept(self._halves()))
        self.scale = min(1.0, self.dense / layers) if layers else 1.0
        gain = None if self.half is None else self.dense - self.half
        if gain is not None and layers > half_layers:
            self.scale = min(self.scale, max(0.0, gain / (layers - half_layers)))
        rest = self.dense - self.scale * layers
        usual = rest * (1 - activations)
        drop = usual if gain is None else max(0.0, gain - self.scale * (layers - half_layers))
        if drop <= usual:
            self.activations = drop / (1 - activations) if activations < 1 else 0.0
        else:
            self.weights = min(rest, (drop - usual) / (activations - weights)) if weights < activations else 0.0
            self.activations = rest - self.weights
        self.fixed = rest - self.activations - self.weights


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
