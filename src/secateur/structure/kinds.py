"""What an axis is called: its kind from the algebra, its name from where it is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import takewhile

from torch import nn

from secateur.core.units import Layout, Occurrence, UnitKind
from secateur.structure.dims import Axis, Product, axes, resolve, size
from secateur.structure.layers import layout_of
from secateur.structure.observe import Observation

OUT_DIM = {Layout.LINEAR: 0, Layout.CONV: 0, Layout.TRANSPOSED: 1, Layout.CONV_TRANSPOSED: 1}
MANY = 3  # layers that write to an axis, from which on it is a stream through the network


def kinds_of(
    model: nn.Module, observation: Observation, free: Mapping[Axis, list[Occurrence]]
) -> dict[Axis, tuple[UnitKind, str]]:
    """Axis -> (kind, name)."""
    roles = _roles(observation)
    modules = dict(model.named_modules())
    return {axis: _label(modules, roles.get(axis, set()), places) for axis, places in free.items()}


def _roles(observation: Observation) -> dict[Axis, set[str]]:
    found: dict[Axis, set[str]] = defaultdict(set)
    for role, dim in observation.roles:
        dim = resolve(dim)
        shared = role == "heads" and isinstance(dim, Product)
        for position, axis in enumerate(axes(dim)):
            found[axis].add("shared" if shared and position == 0 else role)
    return found


def _label(modules: Mapping[str, nn.Module], roles: set[str], places: list[Occurrence]) -> tuple[UnitKind, str]:
    producers = _producers(modules, places)
    first = producers[0] if producers else _owner(places[0].parameter)
    if roles and any(_of_stream(modules, place) for place in places):
        roles = set()  # the width of the stream is made of heads; it is still the stream's
    for role, kind in (
        ("experts", UnitKind.EXPERT),
        ("shared", UnitKind.KV_GROUP),
        ("heads", UnitKind.HEAD),
        ("head_dim", UnitKind.HEAD_DIM),
        ("hidden", UnitKind.NEURON),
    ):
        if role in roles:
            around = _around([place for place in places if _weight(modules, place)] or places)
            if role == "experts":
                around = _around(places)
            if role == "hidden":
                around = _owner(places[0].parameter)
            return kind, f"{around or first}:{kind.value}"
    kind = _plain_kind(modules, producers, places)
    if kind is UnitKind.EMBEDDING:
        first = _owner(next((p.parameter for p in places if _is_table(modules, p)), f"{first}."))
    return kind, f"{first}:{kind.value}"


def _plain_kind(modules: Mapping[str, nn.Module], producers: list[str], places: list[Occurrence]) -> UnitKind:
    tables = any(_is_table(modules, place) for place in places)
    layouts = {layout_of(modules[name]) for name in producers}
    convolutions = layouts <= {Layout.CONV, Layout.CONV_TRANSPOSED} and bool(layouts)
    if convolutions:
        return UnitKind.CHANNEL
    return UnitKind.EMBEDDING if tables or len(producers) >= MANY else UnitKind.NEURON


def _of_stream(modules: Mapping[str, nn.Module], place: Occurrence) -> bool:
    """Whether a norm weighs the axis together with others: it is a factor of a layer's whole width."""
    owner = modules.get(_owner(place.parameter))
    several = place.times > 1 or place.repeat > 1
    return several and owner is not None and layout_of(owner) is None and "Norm" in type(owner).__name__


def _is_table(modules: Mapping[str, nn.Module], place: Occurrence) -> bool:
    return isinstance(modules.get(_owner(place.parameter)), nn.Embedding)


def _weight(modules: Mapping[str, nn.Module], place: Occurrence) -> bool:
    module = modules.get(_owner(place.parameter))
    return module is not None and layout_of(module) is not None


def _producers(modules: Mapping[str, nn.Module], places: list[Occurrence]) -> list[str]:
    """The weight layers whose outputs the axis is, in order."""
    found = []
    for place in places:
        owner = _owner(place.parameter)
        layout = layout_of(modules[owner]) if owner in modules else None
        if layout is not None and place.parameter.endswith("weight") and place.dim == OUT_DIM[layout]:
            found.append(owner)
    return list(dict.fromkeys(found))


def produced(modules: Mapping[str, nn.Module], observation: Observation, places: list[Occurrence]) -> bool:
    """Whether weights make the axis, and not only buffers that weights then read."""
    vectors = any(
        place.parameter in observation.parameters
        and sum(size(dim) > 1 for dim in observation.tensors[place.parameter]) == 1
        for place in places
    )
    return vectors or bool(_producers(modules, places))


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _around(places: list[Occurrence]) -> str:
    """The innermost module that holds all of them."""
    paths = [_owner(place.parameter).split(".") for place in places]
    together = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in together)
