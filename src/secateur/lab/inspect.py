"""What can be removed from a model: open it, with or without weights, run it once on a probe, and describe it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, prod

from torch import nn

from secateur.core.errors import DataError, ModelError, SettingsError
from secateur.core.method import Batch
from secateur.core.units import Layout, Occurrence, Site
from secateur.data.probe import of_shape, of_tokens, probe_for
from secateur.data.running import resized
from secateur.io.data import open_data
from secateur.io.models import OpenedModel, open_model, open_outline
from secateur.report.structure import Fixed, Group, Place, Role, Row, StructureView, Touch, Unruled
from secateur.structure.analysis import Structure, analyse
from secateur.structure.dims import Axis, Concat, Dim, resolve, size
from secateur.structure.layers import layout_of

ALIGNED = 8  # matrix kernels like widths that are multiples of it
SAMPLES = 2
TIMES = " \N{MULTIPLICATION SIGN} "
WAYS = "give samples with --data, a shape with --input 2,3,224,224 or token ids with --tokens 2x16"


@dataclass(frozen=True)
class Inspection:
    """What the user asked for.

    Attributes:
        model: a MODEL argument.
        weights: a safetensors file for a factory.
        outline: build the model without weights.
        data: a DATA argument; its first samples are the probe.
        shape: of a made-up tensor of numbers, as `2,3,224,224`.
        tokens: of made-up token ids, as `2x16`.
    """

    model: str
    weights: str | None = None
    outline: bool = False
    trust_factory: bool = False
    data: str | None = None
    shape: str | None = None
    tokens: str | None = None
    seed: int = 0


def inspect(asked: Inspection) -> StructureView:
    """Open, run once without values, describe.

    Raises:
        DataError: it is not clear what the model takes.
        ModelError: it cannot be opened or observed.
    """
    opened = _open(asked)
    batch, words = probe(opened, asked)
    try:
        structure = analyse(opened.model, batch)
    except ModelError as error:
        if words.startswith("made up"):
            raise ModelError(f"{error} (the inputs were {words}; if they do not fit, {WAYS})") from error
        raise
    return describe(opened.model, structure, batch, opened.name, words)


def _open(asked: Inspection) -> OpenedModel:
    if asked.outline and asked.weights:
        raise SettingsError("--weights and --no-weights exclude each other; give one of them")
    bare = open_outline(asked.model, asked.outline)
    return bare or open_model(asked.model, asked.weights, trust_factory=asked.trust_factory)


def probe(opened: OpenedModel, asked: Inspection) -> tuple[Batch, str]:
    """The inputs to run the model on, and what they are in words.

    Raises:
        DataError: there are none, or several ways are mixed.
    """
    given = [word for word in (asked.data, asked.shape, asked.tokens) if word]
    if len(given) > 1:
        raise SettingsError("--data, --input and --tokens exclude each other; give one of them")
    if asked.shape:
        shape = _numbers(asked.shape, ",", "--input", "2,3,224,224")
        return of_shape(opened.model, shape), f"one tensor of numbers {list(shape)}"
    if asked.tokens:
        samples, length = _numbers(asked.tokens, "x", "--tokens", "2x16", 2)
        return of_tokens(opened.model, samples, length), f"token ids {[samples, length]}"
    source = asked.data or opened.data
    if source:
        inputs = open_data(source, opened, asked.seed).calibration.inputs
        return resized(Batch((inputs[:SAMPLES],)), SAMPLES), f"two samples of {source}"
    made = probe_for(opened.model)
    if made is None:
        raise DataError(f"it is not clear what '{opened.name}' ({type(opened.model).__name__}) takes; {WAYS}")
    shapes = " and ".join(str(list(tensor.shape)) for tensor in made.tensors)
    return made, f"made up, {shapes}"


def _numbers(text: str, separator: str, option: str, example: str, count: int | None = None) -> tuple[int, ...]:
    words = text.split(separator)
    if not all(word.strip().isdigit() and int(word) > 0 for word in words) or (count and len(words) != count):
        raise SettingsError(f"{option} takes sizes as {example}, got '{text}'")
    return tuple(map(int, words))


# --- from the engine to plain data ----------------------------------------------------------------


def describe(model: nn.Module, structure: Structure, batch: Batch, name: str, inputs: str) -> StructureView:
    """A model's structure as plain data.

    Args:
        model: the analysed model.
        structure: what `analyse` found.
        batch: what it was analysed on.
        name: of the model, for the reader.
        inputs: what the batch is, in words.
    """
    samples = min(SAMPLES, batch.samples)
    halves = {site.name: _half(site) for site in structure.sites.values()}
    return StructureView(
        model=name,
        kind=type(model).__name__,
        inputs=inputs,
        parameters=structure.parameters({}),
        flops=structure.flops({}) / samples,
        halved_parameters=structure.parameters(halves),
        halved_flops=structure.flops(halves) / samples,
        rows=tuple(_rows(model, structure)),
        sites=tuple(_group(model, structure, site) for site in structure.sites.values()),
        frozen=tuple(_fixed(structure)),
        unknown=tuple(Unruled(module=m, operator=o, reason=why) for m, o, why in structure.unknown),
    )


def _half(site: Site) -> int:
    return site.units - site.units // 2


def _group(model: nn.Module, structure: Structure, site: Site) -> Group:
    halved = {site.name: _half(site)}
    touches = _touches(model, site.occurrences)
    made = (place for place in site.occurrences if _role(model, place) is Role.MAKES)
    first = next(made, site.occurrences[0])
    same = [place for place in site.occurrences if (place.parameter, place.dim) == (first.parameter, first.dim)]
    width = sum(place.repeat * place.times for place in same)
    assert isinstance(site.cost, int)
    return Group(
        name=site.name,
        kind=site.kind.value,
        units=site.units,
        cost=site.cost,
        width=width,
        multiple=ALIGNED // gcd(ALIGNED, width),
        parameters_share=_share(structure.parameters(halved), structure.parameters({})),
        flops_share=_share(structure.flops(halved), structure.flops({})),
        touches=touches,
        coupled=tuple(dict.fromkeys(t.module for t in touches if t.module != site.name.partition(":")[0])),
        occurrences=tuple(Place(**vars(place)) for place in site.occurrences),
    )


def _share(left: float, whole: float) -> float:
    return 1 - left / whole if whole else 0.0


def _touches(model: nn.Module, places: tuple[Occurrence, ...]) -> tuple[Touch, ...]:
    """Each module once; a bias goes with the outputs that the same layer makes."""
    found: dict[str, set[Role]] = {}
    for place in places:
        found.setdefault(_owner(place.parameter), set()).add(_role(model, place))
    return tuple(Touch(module=module, role=_together(roles)) for module, roles in found.items())


def _together(roles: set[Role]) -> Role:
    if {Role.MAKES, Role.READS} <= roles:
        return Role.BOTH
    return next(role for role in Role if role in roles)


def _role(model: nn.Module, place: Occurrence) -> Role:
    owner, _, name = place.parameter.rpartition(".")
    module = model.get_submodule(owner)
    layout = layout_of(module)
    if isinstance(module, nn.Embedding):
        return Role.MAKES if place.dim == 1 else Role.READS
    if layout is not None and name == "weight":
        outputs = 1 if layout in (Layout.TRANSPOSED, Layout.CONV_TRANSPOSED) else 0
        return Role.MAKES if place.dim == outputs else Role.READS
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and "weight" in name:
        return Role.MAKES if place.dim == 0 else Role.READS
    return Role.CARRIES


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _rows(model: nn.Module, structure: Structure) -> Iterator[Row]:
    """Every layer with a parameter of two or more dimensions, in the order of execution."""
    matrices: dict[str, list[str]] = {}
    for name in structure.observation.tensors:
        if name in structure.observation.parameters and len(structure.observation.tensors[name]) > 1:
            matrices.setdefault(_owner(name), []).append(name)
    for module in _ordered(list(matrices), [product.module for product in structure.observation.products]):
        own = dict(model.get_submodule(module).named_parameters(recurse=False))
        reads, makes = _written_dims(model, structure, matrices[module])
        yield Row(module=module, parameters=sum(p.numel() for p in own.values()), reads=reads, makes=makes)


def _ordered(defined: list[str], executed: list[str]) -> list[str]:
    """Executed layers in that order; the others, e.g. tables, stay behind the layer that they were defined after."""
    place = {module: index for index, module in reversed(list(enumerate(executed)))}
    last, keys = -1, {}
    for module in defined:
        last = place.get(module, last)
        keys[module] = last
    return sorted(defined, key=keys.__getitem__)


def _written_dims(model: nn.Module, structure: Structure, parameters: list[str]) -> tuple[str, str]:
    for name in parameters:
        dims = structure.observation.tensors[name]
        roles = {_role(model, Occurrence(name, d)): d for d in range(2)}
        if Role.CARRIES not in roles:
            return written(dims[roles[Role.READS]]), written(dims[roles[Role.MAKES]])
    sizes = [written(dim) for dim in structure.observation.tensors[parameters[0]] if size(dim) > 1]
    return "", ", ".join(sizes)


def written(dim: Dim) -> str:
    """A dimension as the algebra has it: `256`, `4 × 24`, `64 + 32`."""
    dim = resolve(dim)
    if isinstance(dim, (int, Axis)):
        return f"{size(dim):,}"
    parts = [written(part) for part in dim.parts]
    if isinstance(dim, Concat):
        return _sum(parts)
    return TIMES.join(f"({part})" if "+" in part else part for part in parts)


def _sum(parts: list[str]) -> str:
    """A long sum, such as a dense block's, by its ends."""
    return " + ".join(parts if len(parts) < 5 else [*parts[:2], "…", parts[-1]])


def _fixed(structure: Structure) -> Iterator[Fixed]:
    for axis in structure.frozen:
        numel = prod(map(size, structure.observation.tensors[axis.parameter]))
        yield Fixed(parameter=axis.parameter, dim=axis.dim, units=axis.units, parameters=numel, reason=axis.reason)
