"""Export: a model as one `.pt2` or `.onnx` file, run by its runtime and compared with torch before it is kept."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import (
    DataError,
    MissingExtraError,
    ModelError,
    OutputError,
    SecateurError,
    SettingsError,
    UnknownNameError,
)
from secateur.core.files import MARK, sweep
from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.data.batches import forward
from secateur.data.running import device_of, dtype_of, evaluating, logits, resized
from secateur.measure.latency import Candidate, Latency, latency

OUTPUT = "logits"
BATCH_AXIS = "batch"


class Kind(StrEnum):
    """What an exported file is."""

    PT2 = "pt2"
    ONNX = "onnx"


TOLERANCE = {Kind.PT2: 1e-5, Kind.ONNX: 1e-4}
"""Largest difference to torch, as a fraction of the largest output; of 1 where all outputs are smaller."""

HALF_TOLERANCE = 8  # the same in units of the output's machine epsilon, which matters for half precision only

Prepare = Callable[[Batch], Callable[[], Any]]
"""From inputs to a call without arguments, fit for a stopwatch."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with torch; None where the export was not verified.

    Attributes:
        file: the exported model.
        kind: its format.
        bytes: its size, a weight file beside it included.
        dynamic_batch: whether it takes any batch size, or only the probe's.
        opset: ONNX only: version of the operator set.
        batch_size: samples in the probe; the latencies are of this size.
        compared: batch sizes at which the outputs were compared; the first is the probe, the others are random.
        difference: the largest between an output of torch and of the exported model.
        allowed: the largest that would have been accepted.
        torch_latency, runtime_latency: times of one call, interleaved, with the same number of threads.
    """

    file: Path
    kind: Kind
    bytes: int
    dynamic_batch: bool
    opset: int | None
    batch_size: int
    compared: tuple[int, ...] = ()
    difference: float | None = None
    allowed: float | None = None
    torch_latency: Latency | None = None
    runtime_latency: Latency | None = None

    @property
    def torch_ms(self) -> float | None:
        """Median milliseconds of torch."""
        return self.torch_latency.median if self.torch_latency else None

    @property
    def runtime_ms(self) -> float | None:
        """Median milliseconds of the exported model in its runtime."""
        return self.runtime_latency.median if self.runtime_latency else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"file": str(self.file), "torch_ms": self.torch_ms, "runtime_ms": self.runtime_ms}


def export(
    model: nn.Module,
    target: str | Path,
    probe: Batch,
    *,
    kind: Kind | str | None = None,
    verify: bool = True,
    force: bool = False,
    opset: int | None = None,
    dynamic_batch: bool = True,
    seconds: float = 0.5,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a model that runs without this library and without the model's own code.

    A `.pt2` file is a zip archive made by `torch.export.save`, with the weights as raw bytes, not
    pickles; `torch.export.load(file).module()` runs it, called as the probe calls the model. A
    `.onnx` file is made by torch's exporter and runs in onnxruntime; its inputs are named as in the
    model's `forward`. From 1.5 GB on its weights stand beside it in `NAME.onnx.data`. Both give one
    tensor, the logits; a transformers model runs without key/value cache. Sizes other than the
    batch, a text's length for one, are the probe's. Neither holds the probe or paths of this machine.

    Args:
        model: in any mode, with masks and removals applied; it is left as it was.
        target: the file; its suffix says the format.
        probe: inputs that the model is traced with; inputs that are no tensors become constants.
        kind: the format where the suffix does not say it.
        verify: load the file, compare its outputs with torch's on the probe and on random inputs
            of other batch sizes, and time both.
        force: replace an existing file.
        opset: ONNX operator set; default: torch's.
        dynamic_batch: whether the file takes any number of samples.
        seconds: time to spend on each latency.
        progress: where the latency measurement reports to.

    Raises:
        OutputError: the file exists or cannot be written, or its outputs differ; no file is left.
        ModelError: the model cannot be exported; names the operator or the line.
        DataError: the probe has inputs that an exported file cannot take.
        SettingsError: an unknown suffix or an opset that does not go with this model.
        MissingExtraError: a package for ONNX is not installed.
    """
    target = Path(os.path.abspath(target))
    kind = _kind(target, kind)
    _check_settings(model, kind, verify, opset)
    _check_free(target, force)
    probe = Batch(probe.args, probe.kwargs).to(device_of(model))
    wrapped = Logits(model, probe)
    traced = resized(probe, 2) if dynamic_batch and probe.samples == 1 else probe  # torch fixes sizes 0 and 1
    with evaluating(model), _whole_file(target, force) as file:
        logits(model, probe)
        program = _traced(wrapped, _tensors(traced), dynamic_batch)
        found = _write(program, file, kind, opset, wrapped.names)
        size = sum(path.stat().st_size for path in file.parent.iterdir())
        report = ExportReport(target, kind, size, dynamic_batch, found, probe.samples)
        measured: dict[str, Any] = {}
        if verify:
            prepare = _runtime(wrapped, file, kind)
            measured = _compared(wrapped, prepare, probe, report)
            candidates: dict[str, Candidate] = {"torch": (model, probe), "runtime": prepare(_tensors(probe))}
            times = latency(candidates, seconds=seconds, progress=progress)
            measured |= {f"{name}_latency": found for name, found in times.items()}
    return ExportReport(**(vars(report) | measured))


class Logits(nn.Module):
    """A model's logits as a function of its tensor inputs alone, with the names of the model's own parameters.

    Attributes:
        names: of the tensor inputs, in order.
    """

    def __init__(self, model: nn.Module, probe: Batch):
        super().__init__()
        self.model = model
        self._positional = _positional_names(model, len(probe.args))
        inputs = dict(zip(self._positional, probe.args, strict=True)) | probe.kwargs
        nested = [name for name, item in inputs.items() if isinstance(item, (tuple, list, dict))]
        if nested:
            raise DataError(f"the input '{nested[0]}' holds several values, which export cannot name; give tensors")
        self._constants = {name: item for name, item in inputs.items() if not isinstance(item, Tensor)}
        self._keywords = tuple(probe.kwargs)
        self.names = [name for name in inputs if name not in self._constants]
        if not self.names:
            raise DataError("export needs a probe with at least one tensor; give a batch of the model's inputs")
        # torch.export reads the names from the signature, and mixes up `**kwargs` with a dynamic size
        self.forward = self._named(inspect.Signature([_parameter(name) for name in self.names]))

    def _named(self, signature: inspect.Signature) -> Callable[..., Tensor]:
        def run(*args: Tensor, **kwargs: Tensor) -> Tensor:
            given = self._constants | signature.bind(*args, **kwargs).arguments
            keywords = {name: given[name] for name in self._keywords}
            return forward(self.model, Batch(tuple(given[name] for name in self._positional), keywords))

        run.__signature__ = signature  # type: ignore[attr-defined]
        return run


def _tensors(batch: Batch) -> Batch:
    """The batch's tensors, positional and by name as they were."""
    args = tuple(item for item in batch.args if isinstance(item, Tensor))
    return Batch(args, {name: item for name, item in batch.kwargs.items() if isinstance(item, Tensor)})


def _parameter(name: str) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    """The names of the model's first parameters; made up where it takes `*args`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [name for name, found in inspect.signature(model.forward).parameters.items() if found.kind in kinds]
    return [*named, *(f"input_{index}" for index in range(len(named), count))][:count]


# --- what is asked --------------------------------------------------------------------------------------


def _kind(target: Path, kind: Kind | str | None) -> Kind:
    name = target.suffix[1:].lower() if kind is None else kind
    if name in list(Kind):
        return Kind(name)
    if kind is not None:
        raise UnknownNameError("export format", kind, list(Kind))
    raise SettingsError(f"'{target.name}' does not say what to export to; let it end in .pt2 or .onnx")


def _check_settings(model: nn.Module, kind: Kind, verify: bool, opset: int | None) -> None:
    if kind is Kind.PT2:
        if opset is not None:
            raise SettingsError("an opset goes with .onnx files; a .pt2 file has none")
        return
    if device_of(model).type != "cpu":
        raise SettingsError(f"ONNX files are made and compared on the CPU, the model is on '{device_of(model)}'")
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if verify else [])):
        _needed(package)


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, "export", "exporting to ONNX") from None


# --- the file -------------------------------------------------------------------------------------------


def _check_free(path: Path, force: bool) -> None:
    try:
        folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long
        raise OutputError(f"cannot write '{path}': {error.strerror}; choose another name") from error
    if folder:
        raise OutputError(f"'{path}' is a folder; name a file")
    if exists and not force:
        raise OutputError(f"'{path}' exists already; choose another name or add --force to replace it")


@contextlib.contextmanager
def _whole_file(target: Path, force: bool) -> Iterator[Path]:
    """A path in a temporary folder beside `target`; what is written there appears when the block succeeds."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        # a folder, so that `sweep` finds and removes it when this process is killed
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}{MARK}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside '{target}': {error.strerror}") from error
    try:
        yield temporary / target.name
        written = sorted(temporary.iterdir(), key=lambda path: path.name == target.name)  # the weights first
        for path in written:
            _check_free(target.with_name(path.name), force)
        for path in written:
            os.replace(path, target.with_name(path.name))
    except OSError as error:
        raise OutputError(
            f"'{target}' could not be written: {error.strerror or error}; choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(program: Any, file: Path, kind: Kind, opset: int | None, names: list[str]) -> int | None:
    """Write the traced program; returns the ONNX opset that it has."""
    if kind is Kind.ONNX:
        return _write_onnx(program, file, opset, names)
    with _Sink(io.FileIO(file, "w")) as sink, _quiet():
        torch.export.save(program, sink)
    if sink.error is not None:
        raise sink.error
    return None


class _Sink(io.BufferedWriter):
    """A file that keeps the error of a full disk to itself: torch's writer would end the process over it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


def _write_onnx(program: Any, file: Path, opset: int | None, names: list[str]) -> int:
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=opset, input_names=names, output_names=[OUTPUT]
            )
    except Exception as error:
        # the exporter wraps whatever an operator's translation raised
        raise ModelError(_untranslated(error)) from error
    found = int(made.model.opset_imports[""])
    if opset is not None and found != opset:
        raise SettingsError(
            f"this model cannot be had in ONNX opset {opset}, torch fell back to {found}; "
            f"take that, or leave --opset out"
        )
    if hasattr(made, "rename_axes"):  # older versions of torch keep the name by themselves
        made.rename_axes({str(symbol): BATCH_AXIS for symbol in program.range_constraints})
    made.save(file)
    return found


def _untranslated(error: BaseException) -> str:
    """One sentence with the operator that ONNX lacks, or with the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    operator = re.search(r"OpOverload\(op='([\w.]+)'", str(error))
    if operator:
        return f"ONNX has no counterpart of the operator '{operator[1]}'; export to a .pt2 file, or change the layer"
    return f"the model cannot be translated to ONNX: {_first_line(error)}; export to a .pt2 file"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".!")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No notes of the exporters inside the block: what matters becomes our own error."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --- tracing --------------------------------------------------------------------------------------------


def _traced(wrapped: Logits, inputs: Batch, dynamic_batch: bool) -> Any:
    """The model as a graph.

    Raises:
        ModelError: it has none; names the line of the model's code.
    """
    shapes = None
    if dynamic_batch:
        axis = torch.export.Dim(BATCH_AXIS)
        given = dict(zip(wrapped.names, (*inputs.args, *inputs.kwargs.values()), strict=True))
        per_sample = {name: tensor.dim() > 0 and len(tensor) == inputs.samples for name, tensor in given.items()}
        shapes = {name: {0: axis} if per_sample[name] else {} for name in given}
    # copies, since one tensor given for two inputs would make them one input of the graph
    args, kwargs = tuple(map(Tensor.clone, inputs.args)), {name: item.clone() for name, item in inputs.kwargs.items()}
    try:
        with _quiet():
            program = torch.export.export(wrapped, args, kwargs, dynamic_shapes=shapes, strict=False)
    except SecateurError:
        raise
    except Exception as error:
        # tracing runs the model's own code, on stand-ins for tensors, and that can raise anything
        raise ModelError(_untraceable(error, wrapped.model)) from error
    _forget(program)
    return program


def _forget(program: Any) -> None:
    """Drop what files would keep of this machine: the probe, and paths and lines of source code."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _untraceable(error: Exception, model: nn.Module) -> str:
    name, place = type(model).__name__, _place(error, model)
    reason = " ".join(str(error).split("\n\n")[0].split())
    if type(error).__name__ == "UnsupportedOperatorException":
        return f"the operator '{reason}'{place} cannot be traced: register its shapes with torch.library.register_fake"
    if "data-dependent" in reason:
        return (
            f"{name} decides by the values of its inputs{place}, which an exported graph cannot follow; "
            f"rewrite it with tensor operations such as torch.where"
        )
    if "specialized" in reason or "Constraints violated" in reason:
        return (
            f"{name} computes with a fixed batch size, so a file for any batch size cannot be had; "
            f"add --static (dynamic_batch=False)"
        )
    return f"{name} cannot be exported: {reason.rstrip('.')}{place}"


def _place(error: Exception, model: nn.Module) -> str:
    """The innermost line of the model's own code."""
    modules = {type(module).__module__ for module in model.modules()}
    own = {getattr(sys.modules.get(name), "__file__", None) for name in modules if not name.startswith("torch.")}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in own]
    return f" at `{frames[-1].line}` ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


# --- comparing with torch -------------------------------------------------------------------------------


def _runtime(wrapped: Logits, file: Path, kind: Kind) -> Prepare:
    return _pt2_runtime(file) if kind is Kind.PT2 else _onnx_runtime(file, wrapped.model, wrapped.names)


def _compared(wrapped: Logits, prepare: Prepare, probe: Batch, report: ExportReport) -> dict[str, Any]:
    """The report's figures on the outputs.

    Raises:
        OutputError: the outputs differ.
        ModelError: the runtime cannot run the file.
    """
    # one sample is what many graphs get wrong, and what many users run
    sizes = {1, probe.samples + 1} - {probe.samples} if report.dynamic_batch else {probe.samples}
    batches = [probe, *(_drawn(resized(probe, size), seed=size) for size in sorted(sizes))]
    difference, allowed = 0.0, 0.0
    for batch in batches:
        expected = logits(wrapped.model, batch)
        found = _ran(prepare(_tensors(batch)), batch, report.dynamic_batch)
        difference = max(difference, _gap(expected, found))
        allowed = max(allowed, _allowed(expected, report.kind))
    if difference > allowed:
        raise OutputError(
            f"'{report.file.name}' was not kept: its outputs differ from torch's by up to {difference:.3g}, "
            f"and {allowed:.2g} is allowed; draws of random numbers inside the model do this"
        )
    return {"compared": tuple(batch.samples for batch in batches), "difference": difference, "allowed": allowed}


def _pt2_runtime(file: Path) -> Prepare:
    with _quiet():
        module: Any = torch.export.load(file).module()

    def prepare(batch: Batch) -> Callable[[], Any]:
        return lambda: module(*batch.args, **batch.kwargs)

    return prepare


def _onnx_runtime(file: Path, model: nn.Module, names: list[str]) -> Prepare:
    onnx, onnxruntime = _needed("onnx"), _needed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    try:
        onnx.checker.check_model(str(file))
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # both have a family of exceptions of their own, with no common base but this
        raise ModelError(f"onnxruntime cannot run this model: {_first_line(error)}{_half(model)}") from error
    wanted = {item.name for item in session.get_inputs()}

    def prepare(batch: Batch) -> Callable[[], Any]:
        given = zip(names, (*batch.args, *batch.kwargs.values()), strict=True)
        feed = {name: tensor.numpy() for name, tensor in given if name in wanted}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return prepare


def _half(model: nn.Module) -> str:
    """A hint: the CPU lacks many operators in half precision."""
    return "" if dtype_of(model) == "float32" else f"; it is in {dtype_of(model)}, --dtype float32 is the safe choice"


def _ran(call: Callable[[], Any], batch: Batch, dynamic_batch: bool) -> Tensor:
    try:
        found: Tensor = call()
    except Exception as error:
        # each runtime has its own exceptions
        hint = "; add --static (dynamic_batch=False)" if dynamic_batch else ""
        raise ModelError(
            f"the exported model cannot be run on {batch.samples} samples: {_first_line(error)}{hint}"
        ) from error
    return found


def _drawn(batch: Batch, seed: int) -> Batch:
    """Another batch of the same kind: values drawn from each input's own; masks and shared inputs stay."""
    rng = generator(seed, "export")

    def draw(item: Any) -> Any:
        if not isinstance(item, Tensor) or item.dim() == 0 or len(item) != batch.samples or _is_mask(item):
            return item
        index = torch.randint(item.numel(), tuple(item.shape), generator=rng)
        return item.flatten()[index.to(item.device)]

    return Batch(tuple(map(draw, batch.args)), {name: draw(item) for name, item in batch.kwargs.items()})


def _is_mask(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and bool(((tensor == 0) | (tensor == 1)).all())


def _gap(expected: Tensor, found: Tensor) -> float:
    """Largest difference; NaN and infinity count as equal where both have the same."""
    expected, found = expected.double().cpu(), found.double().cpu()
    if expected.shape != found.shape:
        return float("inf")
    same = expected.eq(found) | (expected.isnan() & found.isnan())
    gap = torch.where(same, 0.0, (expected - found).abs()).nan_to_num(nan=float("inf"))
    return float(gap.max()) if gap.numel() else 0.0


def _allowed(expected: Tensor, kind: Kind) -> float:
    precision = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    finite = expected.double()[expected.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return max(TOLERANCE[kind], HALF_TOLERANCE * precision) * scale
