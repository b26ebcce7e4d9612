"""What can be removed from a network: its axes as sites, and what each removal costs and brings.

The observed run says which dimensions are one. Here the code's own size arithmetic is checked: an
axis is free when, for any number of kept units, every size that the code computes comes out right,
by itself or after changing integer attributes (`num_heads`, `groups`). All others are frozen with
the reason.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import prod

from torch import nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.units import Occurrence, Site
from secateur.data.running import resized
from secateur.structure.dims import Axis, Concat, Dim, axes, count, freeze, resolve, size, unify
from secateur.structure.kinds import kinds_of, produced
from secateur.structure.observe import Observation, Requirement, observe
from secateur.structure.traced import Extent, Slot, evaluate, extents_in, slots_in, solve


@dataclass(frozen=True)
class Frozen:
    """Units that cannot go, and why."""

    parameter: str
    dim: int
    units: int
    reason: str


@dataclass(frozen=True)
class Change:
    """An integer attribute that must change with a cut."""

    slot: Slot
    value: int


@dataclass
class Structure:
    """The sites of a model and the arithmetic of cutting them.

    Attributes:
        observation: what the run showed.
        sites: name -> site, in the order of the model's parameters.
        axes: name -> axis, the same keys.
        frozen: what cannot go and why, one entry for each axis, at its first occurrence.
        minimums: name -> the smallest number of kept units at which the code does what it was seen to do.
        within: sites of channels inside the groups of convolutions and norms -> the site of these groups.
        multiples: name -> what the number of kept units must be a multiple of, where a kernel asks for it.
    """

    observation: Observation
    sites: dict[str, Site] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    frozen: list[Frozen] = field(default_factory=list)
    multiples: dict[str, int] = field(default_factory=dict)
    minimums: dict[str, int] = field(default_factory=dict)
    within: dict[str, str] = field(default_factory=dict)

    @property
    def unknown(self) -> list[tuple[str, str, str]]:
        """(module, operator, why) of operators without a rule."""
        return [(module, name, why) for (module, name), why in self.observation.unknown.items()]

    @cached_property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Module -> those of its members that add their input to what they compute.

        Each of these can go as a whole: the sum passes its input on, with the same shape.
        """
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.observation.residual:
            found[name.rpartition(".")[0]].append(name)
        return {parent: tuple(dict.fromkeys(names)) for parent, names in found.items()}

    @cached_property
    def _arithmetic(self) -> Arithmetic:
        return Arithmetic(self.observation)

    def kept(self, counts: Mapping[str, int]) -> dict[Axis, int]:
        """Site counts as axis counts."""
        return {self.axes[name]: units for name, units in counts.items() if units != self.axes[name].size}

    def parameters(self, counts: Mapping[str, int]) -> int:
        """Parameters of the whole model when every named site keeps that many units."""
        return self._arithmetic.parameters(self.kept(counts))

    def bytes(self, counts: Mapping[str, int], sizes: Mapping[str, int]) -> int:
        """Bytes of the tensors named in `sizes` (bytes of one element), for the same counts."""
        kept = self.kept(counts)
        tensors = self.observation.tensors
        return sum(size * prod(count(dim, kept) for dim in tensors[name]) for name, size in sizes.items())

    def flops(self, counts: Mapping[str, int]) -> float:
        """FLOPs of the observed run (multiply-add = 2), for the same counts."""
        return self._arithmetic.flops(self.kept(counts))

    def changes(self, counts: Mapping[str, int]) -> list[Change]:
        """The attributes that must change with a cut.

        Raises:
            ModelError: the code computes a size that does not fit; names where.
        """
        changes, broken = consequences(self._index, self.kept(counts))
        if broken is not None:
            raise ModelError(f"these counts cannot be cut: {broken.reason}")
        return changes

    @cached_property
    def _index(self) -> Index:
        return Index(self.observation.requirements)


class Arithmetic:
    """Parameters and FLOPs as functions of kept units, with what never changes added up once."""

    def __init__(self, observation: Observation) -> None:
        self.parameter_shapes = [tuple(map(resolve, observation.tensors[name])) for name in observation.parameters]
        self.products = [(one.factor, tuple(map(resolve, one.dims))) for one in observation.products]

    def parameters(self, kept: Mapping[Axis, int]) -> int:
        """Number of parameters."""
        return sum(prod(count(dim, kept) for dim in dims) for dims in self.parameter_shapes)

    def flops(self, kept: Mapping[Axis, int]) -> float:
        """FLOPs of the observed run."""
        return sum(factor * prod(count(dim, kept) for dim in dims) for factor, dims in self.products)


# --- the code's own sizes -------------------------------------------------------------------------


class Index:
    """Which requirements speak of an axis or an attribute."""

    def __init__(self, requirements: Iterable[Requirement]) -> None:
        self.by_axis: dict[Axis, list[Requirement]] = defaultdict(list)
        self.by_slot: dict[int, list[Requirement]] = defaultdict(list)
        self.anchors: dict[int, Requirement] = {}  # attribute -> a dimension whose size it is
        for requirement in requirements:
            if isinstance(requirement.expression, Slot):
                self.anchors.setdefault(requirement.expression.key, requirement)
            for axis in set(involved(requirement)):
                self.by_axis[axis].append(requirement)
            for slot in slots_in(requirement.expression):
                self.by_slot[slot.key].append(requirement)


def involved(requirement: Requirement) -> Iterator[Axis]:
    """The axes that a requirement speaks of."""
    yield from axes(requirement.dim)
    for dim in extents_in(requirement.expression):
        yield from axes(dim)


def consequences(index: Index, kept: Mapping[Axis, int]) -> tuple[list[Change], Requirement | None]:
    """The attribute changes that a cut needs, and the first requirement that cannot be met."""
    work = _Consequences(index, kept)
    waiting = deque(
        sorted(
            _unique(requirement for axis in kept for requirement in index.by_axis[axis]),
            key=lambda requirement: not isinstance(requirement.expression, Slot),
        )
    )
    work.seen.update(map(id, waiting))
    checked = []
    while waiting:
        requirement = waiting.popleft()
        checked.append(requirement)
        more = work.meet(requirement)
        if more is None:
            return [], requirement
        waiting += more
    broken = next((requirement for requirement in checked if not work.holds(requirement)), None)
    if broken is not None:
        return [], broken
    return [Change(slot, work.values[name]) for name, slot in work.changed.items()], None


class _Consequences:
    """New values of attributes, as one requirement after the other asks for them."""

    def __init__(self, index: Index, kept: Mapping[Axis, int]) -> None:
        self.index, self.kept = index, kept
        self.values: dict[int, int] = {}
        self.changed: dict[int, Slot] = {}
        self.seen: set[int] = set()

    def meet(self, requirement: Requirement) -> list[Requirement] | None:
        """Change what the requirement needs; returns what must be looked at because of it, None if it cannot be met."""
        more: list[Requirement] = []
        for slot in slots_in(requirement.expression):
            anchor = self.index.anchors.get(slot.key)
            if anchor is not None and slot.key not in self.values:
                more += self._take(slot, count(anchor.dim, self.kept))
        if self.holds(requirement):
            return more
        found = solve(requirement.expression, count(requirement.dim, self.kept), self.kept, self.values)
        return None if found is None else more + self._take(*found)

    def holds(self, requirement: Requirement) -> bool:
        """Whether the code's size is the tensor's."""
        return evaluate(requirement.expression, self.kept, self.values) == count(requirement.dim, self.kept)

    def _take(self, slot: Slot, value: int) -> list[Requirement]:
        self.values[slot.key] = value
        if value == slot.value:
            return []
        self.changed[slot.key] = slot
        more = [other for other in self.index.by_slot[slot.key] if id(other) not in self.seen]
        self.seen.update(map(id, more))
        return more


def _unique(requirements: Iterable[Requirement]) -> list[Requirement]:
    return list({id(requirement): requirement for requirement in requirements}.values())


def share(observation: Observation) -> None:
    """Dimensions whose size the code reads from one attribute or tensor are one: they must stay equally long."""
    first: dict[int, Requirement] = {}
    for requirement in observation.requirements:
        expression = requirement.expression
        if isinstance(expression, Extent) and _may_differ(expression.dim, requirement.dim):
            unify(expression.dim, requirement.dim, requirement.reason)
        elif isinstance(expression, Slot):
            other = first.setdefault(expression.key, requirement)
            if size(other.dim) == size(requirement.dim):
                unify(other.dim, requirement.dim, f"'{expression}' is the size of several things")


def _may_differ(a: Dim, b: Dim) -> bool:
    """Whether two dimensions of one size can have other sizes after a cut."""
    if size(a) != size(b):
        return False
    involved = sorted({*axes(a), *axes(b)}, key=lambda axis: axis.size)
    primes = dict(zip(involved, _primes(), strict=False))
    return count(a, primes) != count(b, primes)


def _primes() -> Iterator[int]:
    """Numbers by which no two different products of axes come out equal."""
    found: list[int] = []
    n = 2
    while True:
        if all(n % prime for prime in found):
            found.append(n)
            yield n
        n += 1


def settle(observation: Observation) -> None:
    """Freeze every axis that the code's size arithmetic cannot follow, alone or together with the others."""
    _reserve(observation)
    index = Index(observation.requirements)
    everywhere = (axis for dims in observation.tensors.values() for dim in dims for axis in axes(dim))
    for axis in list(dict.fromkeys(everywhere)):
        if axis.link is None and axis.frozen is None and axis in index.by_axis:
            index = _settle_alone(observation, index, axis)
    rng = random.Random(0)
    while True:
        free = [axis for axis in index.by_axis if axis.link is None and axis.frozen is None]
        least = {axis: min(observation.minimums.get(axis, 1), axis.size - 1) for axis in free}
        _, broken = consequences(index, {axis: rng.randint(least[axis], axis.size - 1) for axis in free})
        if broken is None:
            return
        guilty = {axis for axis in involved(broken) if axis.frozen is None}
        for slot in slots_in(broken.expression):
            for other in index.by_slot[slot.key]:
                guilty |= {axis for axis in involved(other) if axis.frozen is None}
        if not guilty:
            raise ModelError(f"the sizes that the model computes cannot be followed: {broken.reason}")
        for axis in guilty:
            freeze(axis, broken.reason)


def _reserve(observation: Observation) -> None:
    """Units of which the code chooses k must be k at least; those that are chosen in groups stay."""
    for dim, k in observation.chosen:
        axis = resolve(dim)
        if isinstance(axis, Axis) and k < axis.size:
            observation.minimums[axis] = max(k, observation.minimums.get(axis, 1))
        else:
            freeze(axis, "its units are chosen in groups")


def _settle_alone(observation: Observation, index: Index, axis: Axis) -> Index:
    """One axis by itself. Where another of its size reads the same attribute, the two become one."""
    reserved = observation.minimums.get(axis, 1)
    for kept in (axis.size - 1, max((axis.size + 1) // 2, reserved)):
        _, broken = consequences(index, {axis: kept})
        while broken is not None:
            partner = _partner(index, axis, broken)
            if partner is None:
                axis.frozen = broken.reason
                return index
            unify(partner, axis, broken.reason)
            reserved = max(reserved, observation.minimums.get(partner, 1))
            index = Index(observation.requirements)
            _, broken = consequences(index, {axis: kept})
    observation.minimums[axis] = max(reserved, _least(index, axis, max((axis.size + 1) // 2, reserved)))
    return index


def _partner(index: Index, axis: Axis, broken: Requirement) -> Axis | None:
    """An axis that must lose as many units as this one, because the code reads both sizes from one place."""
    mine = {slot.key for requirement in index.by_axis[axis] for slot in slots_in(requirement.expression)}
    if not mine.intersection(slot.key for slot in slots_in(broken.expression)):
        return None
    others = (other for other in involved(broken) if other is not axis and other.frozen is None)
    return next((other for other in others if other.size == axis.size), None)


def _least(index: Index, axis: Axis, high: int) -> int:
    """The smallest count at which the code takes the branches that it took at `high`: comparisons may change below."""
    low = 1
    if high == 1 or consequences(index, {axis: 1})[1] is None:
        return 1
    while high - low > 1:
        middle = (low + high) // 2
        _, broken = consequences(index, {axis: middle})
        low, high = (low, middle) if broken is None else (middle, high)
    return high


# --- sites ----------------------------------------------------------------------------------------


def analyse(model: nn.Module, batch: Batch) -> Structure:
    """Find everything that can be removed from a model. No weights are needed.

    Args:
        model: any module, its weights may be on the meta device; it is left exactly as it was.
        batch: example inputs as the model takes them; two samples of it are used.

    Returns:
        The sites, the frozen rest and the cost arithmetic.

    Raises:
        ModelError: the model cannot be run on the batch, or the run depends on values.
    """
    if batch.tensors:
        batch = resized(batch, min(2, batch.samples))
    observation = observe(model, batch)
    share(observation)
    settle(observation)
    roots = _roots(observation)
    modules = dict(model.named_modules())
    active = _active(observation)
    routed = {axis for role, dim in observation.roles if role == "experts" for axis in axes(dim)}
    for axis, places in roots.items():
        source = next((place.parameter for place in places if place.parameter not in observation.parameters), None)
        if source and axis not in routed and not produced(modules, observation, places):
            freeze(axis, f"its units come from the buffer '{source}'")
        if axis not in active:
            idle = all(place.parameter not in observation.used for place in places)
            what = f"'{places[0].parameter}' takes" if idle else f"these units of '{places[0].parameter}' take"
            freeze(axis, f"{what} no part in the run")
    _freeze_other_ways(observation, roots)
    structure = Structure(observation)
    free = {axis: places for axis, places in roots.items() if axis.frozen is None}
    _describe(model, structure, {a: p for a, p in free.items() if _has_parameter(observation, p)})
    structure.frozen = [
        Frozen(places[0].parameter, places[0].dim, axis.size, axis.frozen)
        for axis, places in roots.items()
        if axis.frozen is not None and _has_parameter(observation, places)
    ]
    return structure


def _freeze_other_ways(observation: Observation, roots: dict[Axis, list[Occurrence]]) -> None:
    """Where values decide what runs, weights that did not run may read what would be cut: their sizes stay."""
    idle: dict[int, str] = {}
    for name in observation.parameters - observation.used:
        dims = observation.tensors[name]
        under = any(name.startswith(f"{module}." if module else "") for module in observation.branches)
        if under and len(dims) > 1:
            idle |= dict.fromkeys(map(size, dims), name)
    for axis, places in roots.items():
        for place in places if idle else ():
            other = idle.get(size(observation.tensors[place.parameter][place.dim]))
            if other is not None:
                freeze(axis, f"values decide what runs, and '{other}', which has its size, did not")


def _active(observation: Observation) -> set[Axis]:
    """The axes that some result has or some product runs over."""
    rows = (dims for results in observation.results.values() for dims in results if dims is not None)
    products = (product.dims for product in observation.products)
    return {axis for dims in chain(rows, products) for dim in dims for axis in axes(dim)}


def _has_parameter(observation: Observation, places: list[Occurrence]) -> bool:
    return any(place.parameter in observation.parameters for place in places)


def _roots(observation: Observation) -> dict[Axis, list[Occurrence]]:
    """Axis -> everywhere it stands in parameters and buffers, in the order of the model."""
    found: dict[Axis, list[Occurrence]] = defaultdict(list)
    for name, dims in observation.tensors.items():
        for d, dim in enumerate(dims):
            for axis, offset, stride, outer in _places(resolve(dim), 0, 1, ()):
                for shift in _shifts(outer[:-1]):
                    times, period = outer[-1] if outer else (1, 0)
                    found[axis].append(Occurrence(name, d, offset + shift, stride, stride, times, period))
    return found


Outer = tuple[tuple[int, int], ...]


def _places(dim: Dim, offset: int, inner: int, outer: Outer) -> Iterator[tuple[Axis, int, int, Outer]]:
    """(axis, offset, indices of one unit, (copies, distance) outside of it) for every axis in a dimension."""
    if isinstance(dim, Axis):
        yield dim, offset, inner, outer
    elif isinstance(dim, Concat):
        for part in dim.parts:
            yield from _places(part, offset, inner, outer)
            offset += size(part) * inner
    elif not isinstance(dim, int):
        before, after = 1, dim.size
        for part in dim.parts:
            after //= size(part)
            here = ((before, size(part) * after * inner),) if before > 1 else ()
            yield from _places(part, offset, after * inner, outer + here)
            before *= size(part)


def _shifts(outer: Outer) -> Iterator[int]:
    if not outer:
        yield 0
        return
    (times, period), rest = outer[0], outer[1:]
    for t in range(times):
        for shift in _shifts(rest):
            yield t * period + shift


def _describe(model: nn.Module, structure: Structure, free: dict[Axis, list[Occurrence]]) -> None:
    arithmetic = structure._arithmetic
    everything = arithmetic.parameters({})
    labels = kinds_of(model, structure.observation, free)
    used: dict[str, int] = defaultdict(int)
    marginal = _marginal_costs(structure.observation, free)
    multiples = {axis: m for dim, m in structure.observation.multiples for axis in axes(dim)}
    for axis, places in free.items():
        kind, name = labels[axis]
        used[name] += 1
        unique = name if used[name] == 1 else f"{name}#{used[name]}"
        structure.axes[unique] = axis
        if structure.observation.minimums.get(axis, 1) > 1:
            structure.minimums[unique] = structure.observation.minimums[axis]
        if axis in multiples:
            structure.multiples[unique] = multiples[axis]
        structure.sites[unique] = Site(unique, kind, (axis.size,), cost=marginal[axis], occurrences=tuple(places))
    names = {axis: name for name, axis in structure.axes.items()}
    for outer, inner in structure.observation.grouped:
        around = next((names[axis] for axis in axes(outer) if axis in names), None)
        inside = [names[axis] for axis in axes(inner) if axis in names] if around else []
        structure.within |= {name: around for name in inside if around and name != around}
    if not structure.sites and not everything:
        raise ModelError(
            f"{type(model).__name__} has no parameters that could be cut (quantised modules keep theirs packed)"
        )


def _marginal_costs(observation: Observation, free: Iterable[Axis]) -> dict[Axis, int]:
    """Parameters that vanish with one unit of an axis while everything else stays."""
    costs = dict.fromkeys(free, 0)
    for name in observation.parameters:
        dims = tuple(map(resolve, observation.tensors[name]))
        total = prod(map(size, dims))
        for axis in {axis for dim in dims for axis in axes(dim)}:
            if axis in costs:
                costs[axis] += total - prod(count(dim, {axis: axis.size - 1}) for dim in dims)
    return costs
