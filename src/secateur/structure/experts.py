"""Layers of experts: a router that scores n experts, and their weights, in one tensor or one module each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.core.method import Batch
from secateur.core.units import Site, UnitKind
from secateur.data.batches import run
from secateur.data.running import device_of, evaluating
from secateur.structure.analysis import Structure

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts", "moe_num_experts")
CHOSEN = ("top_k", "num_experts_per_tok", "topk", "k")
"""Names that code gives to the number of experts, and of those that a token takes."""


@dataclass(frozen=True)
class ExpertLayer:
    """One router and its experts. Experts that every token takes are no part of it.

    Attributes:
        name: of the module that holds both, e.g. `model.layers.0.mlp`.
        gate: the router, a module with `weight` `[experts, features]`.
        count: experts.
        chosen: experts that a token takes.
        routing: tensors of the router with one row for each expert: its weight and biases.
        tensors: one entry for each matrix of an expert: the name of one parameter `[experts, ...]`, or a name for
            every expert.
        members: the list of expert modules; empty where the experts share tensors.
        site: the experts as units.
    """

    name: str
    gate: str
    count: int
    chosen: int
    routing: tuple[str, ...]
    tensors: tuple[tuple[str, ...], ...]
    members: str
    site: Site

    @property
    def fused(self) -> bool:
        """Whether one tensor holds a matrix of all experts."""
        return not self.members

    def attributes(self, model: nn.Module, names: tuple[str, ...], value: int) -> list[tuple[str, str]]:
        """(module, attribute) around the experts that hold a number of experts under one of the names."""
        owners = {self.name, self.gate, *(name.rpartition(".")[0] for pair in self.tensors for name in pair[:1])}
        return [
            (owner, name)
            for owner in sorted(owners)
            for name in names
            if getattr(model.get_submodule(owner), name, None) == value
        ]


@dataclass(frozen=True)
class Experts:
    """What was found.

    Attributes:
        layers: in the order of the model.
        notes: sentences about what was left out.
    """

    layers: list[ExpertLayer]
    notes: list[str]


def find_experts(model: nn.Module, structure: Structure, batch: Batch) -> Experts:
    """All layers of experts of a model, and notes about those that stay whole.

    Args:
        model: any module.
        structure: its own.
        batch: inputs, on which it is seen how many experts a token takes.
    """
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    sites = [site for site in structure.sites.values() if site.kind is UnitKind.EXPERT]
    found = [layer for site in sites if (layer := _fused(model, structure, site)) is not None]
    found += _listed(model, batch)
    odd = _not_mixable(model, found)
    layers = sorted((layer for layer in found if layer.name not in odd), key=lambda layer: order[layer.name])
    known = {layer.name for layer in found}
    notes = [f"'{name}': its experts stay whole: {reason}" for name, reason in odd.items()]
    notes += [
        f"'{owner}': its experts stay whole: {reason}"
        for owner, reason in _frozen(model, structure).items()
        if not any(owner == name or owner.startswith(f"{name}.") for name in known)
    ]
    return Experts(layers, [*notes, *_always(model, layers), *_without_router(model, layers)])


def _not_mixable(model: nn.Module, layers: list[ExpertLayer]) -> dict[str, str]:
    """Layer -> why its experts cannot become mixtures."""
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    found = {}
    for layer in layers:
        own = [model.get_parameter(name) for names in layer.tensors for name in names]
        if any(users[id(parameter)] > 1 for parameter in own):
            found[layer.name] = "they share weights with other modules"
        elif not all(parameter.is_floating_point() for parameter in own):
            found[layer.name] = "their weights are no floating-point numbers"
    return found


def _always(model: nn.Module, layers: list[ExpertLayer]) -> list[str]:
    """Notes about what stands beside routed experts and is taken by every token."""
    notes = []
    for layer in layers:
        routed = {layer.gate, layer.members, *(_owner(names[0]) for names in layer.tensors)}
        for leaf, child in model.get_submodule(layer.name).named_children():
            name = f"{layer.name}.{leaf}" if layer.name else leaf
            if name not in routed and any(True for _ in child.parameters()):
                notes.append(f"'{name}' stays whole: every token takes it")
    return notes


def _without_router(model: nn.Module, layers: list[ExpertLayer]) -> list[str]:
    """Notes about blocks of the same list that have no experts, such as dense first ones."""
    having: dict[str, set[str]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for end in (end for end, part in enumerate(parts) if part.isdecimal()):
            having.setdefault(".".join(parts[:end]), set()).add(parts[end])
    return [
        f"'{stack}.{leaf}' has no router; it stays whole"
        for stack, indices in having.items()
        if isinstance(model.get_submodule(stack), nn.ModuleList)
        for leaf, _ in model.get_submodule(stack).named_children()
        if leaf not in indices
    ]


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _fused(model: nn.Module, structure: Structure, site: Site) -> ExpertLayer | None:
    """Experts in tensors of at least three dimensions, and the router beside them; None for any other form."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    holders = {_owner(place.parameter) for place in site.occurrences if tensors[place.parameter].dim() > 2}
    plain = all(place.dim == 0 and (place.offset, place.stride, place.times) == (0, 1, 1) for place in site.occurrences)
    routing = [place.parameter for place in site.occurrences if _owner(place.parameter) not in holders]
    gates = {_owner(name) for name in routing if name.endswith("weight")}
    if not plain or len(gates) != 1 or not holders:
        return None
    return ExpertLayer(
        name=site.name.rpartition(":")[0],
        gate=gates.pop(),
        count=site.units,
        chosen=structure.minimums.get(site.name, 1),
        routing=tuple(routing),
        tensors=tuple((place.parameter,) for place in site.occurrences if _owner(place.parameter) in holders),
        members="",
        site=site,
    )


def _frozen(model: nn.Module, structure: Structure) -> dict[str, str]:
    """Owner of three-dimensional weights -> why their first axis stays."""
    parameters = dict(model.named_parameters())
    return {
        _owner(entry.parameter): entry.reason
        for entry in structure.frozen
        if entry.dim == 0 and entry.parameter in parameters and parameters[entry.parameter].dim() == 3
        if type(model.get_submodule(_owner(entry.parameter))).__module__.partition(".")[0] != "torch"
    }


def _listed(model: nn.Module, batch: Batch) -> list[ExpertLayer]:
    """Lists of modules of one form beside a linear layer with one output for each, of which a token takes some."""
    candidates = []
    for name, block in model.named_modules():
        for leaf, members in block.named_children():
            if isinstance(members, nn.ModuleList) and _alike(members):
                gates = [key for key, gate in block.named_children() if _scores(gate, len(members))]
                if len(gates) == 1:
                    prefix = f"{name}." if name else ""
                    candidates.append((name, f"{prefix}{gates[0]}", f"{prefix}{leaf}", members))
    with _rows(model, [(gate, members) for _, gate, _, members in candidates]) as rows:
        if candidates:
            with evaluating(model):
                run(model, batch.to(device_of(model)))
    found = []
    for name, gate, leaf, members in candidates:
        scored, taken = rows[gate]
        if scored and 0 < taken < scored * len(members):
            found.append(_layer(model, name, gate, leaf, max(1, round(taken / scored))))
    return found


def _alike(members: nn.ModuleList) -> bool:
    shapes = [[(name, value.shape) for name, value in member.named_parameters()] for member in members]
    return len(members) > 1 and bool(shapes[0]) and all(one == shapes[0] for one in shapes)


def _scores(gate: nn.Module, count: int) -> bool:
    return isinstance(gate, nn.Linear) and gate.out_features == count


@contextlib.contextmanager
def _rows(model: nn.Module, layers: list[tuple[str, nn.ModuleList]]) -> Iterator[dict[str, list[int]]]:
    """Gate -> (rows that it scored, rows that its experts got) of what is run inside the block."""
    rows = {gate: [0, 0] for gate, _ in layers}
    handles = []

    def count(gate: str, place: int) -> None:
        module = model.get_submodule(gate) if place == 0 else None
        for target in [module] if module is not None else list(dict(layers)[gate]):

            def note(_: nn.Module, args: tuple[Tensor, ...], gate: str = gate, place: int = place) -> None:
                rows[gate][place] += args[0].shape[:-1].numel()

            handles.append(target.register_forward_pre_hook(note))

    try:
        for gate, _ in layers:
            count(gate, 0)
            count(gate, 1)
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _layer(model: nn.Module, name: str, gate: str, members: str, chosen: int) -> ExpertLayer:
    module = model.get_submodule(members)
    assert isinstance(module, nn.ModuleList)
    leaves = [leaf for leaf, _ in module[0].named_parameters()]
    count, cost = len(module), sum(value.numel() for value in module[0].parameters())
    routing = tuple(f"{gate}.{leaf}" for leaf, _ in model.get_submodule(gate).named_parameters())
    return ExpertLayer(
        name=name,
        gate=gate,
        count=count,
        chosen=chosen,
        routing=routing,
        tensors=tuple(tuple(f"{members}.{index}.{leaf}" for index in range(count)) for leaf in leaves),
        members=members,
        site=Site(f"{name}:{UnitKind.EXPERT.value}", UnitKind.EXPERT, (count,), cost=cost),
    )
