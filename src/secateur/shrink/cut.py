"""Physical removal of structured units: smaller tensors, and the integer attributes that go with them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.structure.analysis import Structure

# ranks are no part of any tensor: layers that lose some are replaced (`shrink.factorised`)
STRUCTURED = frozenset(UnitKind) - {UnitKind.WEIGHT, UnitKind.BLOCK, UnitKind.RANK}

Undo = Callable[[], None]


@dataclass(frozen=True)
class AttributeChange:
    """An integer attribute of a module, or of the config beside it, and its value after the cut."""

    module: str
    attribute: str
    value: int
    index: int | None = None
    on_config: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the card of a saved folder."""
        return dict(vars(self))


@dataclass
class Cut:
    """Everything that a cut sets: `(owner, attribute, new value)` and tensors by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[AttributeChange] = field(default_factory=list)


def structured(plan: Plan) -> list[str]:
    """Names of the plan's sites whose units are cut out of tensors."""
    return [name for name, site in plan.sites.items() if site.kind in STRUCTURED]


def removed_indices(plan: Plan) -> dict[str, dict[int, Tensor]]:
    """Parameter or buffer -> dimension -> bool keep-mask over the indices of that dimension, lazily sized.

    The masks are lists of removed indices, sorted and without repetition.
    """
    found: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name in structured(plan):
        mask = plan.masks[name]
        if not bool(mask.all()):
            for place in plan.sites[name].occurrences:
                found[place.parameter][place.dim].append(place.removed(mask))
    return {name: {dim: torch.unique(torch.cat(parts)) for dim, parts in dims.items()} for name, dims in found.items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each under every name it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def kept_indices(size: int, removed: Tensor) -> Tensor:
    """The indices that stay."""
    keep = torch.ones(size, dtype=torch.bool)
    keep[removed] = False
    return keep.nonzero().flatten()


def smaller(tensor: Tensor, removed: Mapping[int, Tensor]) -> Tensor:
    """The tensor without the removed indices, contiguous in the same memory format."""
    for dim in sorted(removed, key=lambda d: -len(removed[d]) / tensor.shape[d]):
        tensor = tensor.index_select(dim, kept_indices(tensor.shape[dim], removed[dim]).to(tensor.device))
    return tensor


def check_cut(plan: Plan, structure: Structure) -> None:
    """Refuse a plan that this model's structure does not have, or that empties a site.

    Raises:
        PlanError: names the site and what is wrong.
    """
    for name in structured(plan):
        if name not in structure.sites:
            raise PlanError(
                f"'{name}' is no site of this model that can be cut; see `secateur inspect` for the ones that can"
            )
        if structure.sites[name].occurrences != plan.sites[name].occurrences:
            raise PlanError(f"'{name}' has other occurrences in this model than in the plan; plan it on this model")
        if not plan.kept(name):
            raise PlanError(f"'{name}' would lose all of its {plan.sites[name].units} units; keep at least one")
        multiple = structure.multiples.get(name, 1)
        if plan.kept(name) % multiple:
            raise PlanError(
                f"'{name}' must keep a multiple of {multiple} units (its kernel's rule), not {plan.kept(name)}"
            )
        if plan.kept(name) < structure.minimums.get(name, 1):
            least = structure.minimums[name]
            raise PlanError(
                f"'{name}' must keep at least {least} units, the code behaves differently below; not {plan.kept(name)}"
            )


def make_cut(model: nn.Module, plan: Plan, structure: Structure) -> Cut:
    """The new tensors and attributes, without touching the model.

    Raises:
        PlanError: the plan does not fit the structure.
        ModelError: the counts do not fit sizes that the model's code computes.
    """
    check_cut(plan, structure)
    counts = {name: plan.kept(name) for name in structured(plan)}
    changes = structure.changes(counts)
    tensors = tensors_of(model)
    cut = Cut()
    with torch.no_grad():
        for name, removed in removed_indices(plan).items():
            cut.tensors[name] = smaller(tensors[name].detach(), removed)
    modules = {id(module): name for name, module in model.named_modules()}
    for change in changes:
        cut.attributes.append(_located(model, modules, change.slot, change.value))
    known = {(a.module, a.attribute) for a in cut.attributes}
    cut.attributes += descriptions(model, cut.tensors, known)
    cut.attributes += _expert_counts(model, plan, known)
    return cut


def _expert_counts(model: nn.Module, plan: Plan, known: set[tuple[str, str]]) -> list[AttributeChange]:
    """Attributes in which modules beside the experts, such as routers, keep the number of experts without using it."""
    found = []
    for name in structured(plan):
        site = plan.sites[name]
        owners = {place.parameter.rpartition(".")[0] for place in site.occurrences if site.kind is UnitKind.EXPERT}
        for owner, attribute in ((owner, attribute) for owner in sorted(owners) for attribute in EXPERT_COUNTS):
            if (owner, attribute) not in known and getattr(model.get_submodule(owner), attribute, 0) == site.units:
                known.add((owner, attribute))
                found.append(AttributeChange(owner, attribute, plan.kept(name)))
    return found


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names that routers give to the number of their experts."""


def _located(model: nn.Module, modules: Mapping[int, str], slot: Any, value: int) -> AttributeChange:
    if id(slot.owner) in modules:
        return AttributeChange(modules[id(slot.owner)], slot.name, value, slot.index)
    for name, module in model.named_modules():
        for attribute, found in vars(module).items():
            if found is slot.owner:
                return AttributeChange(name, slot.name, value, slot.index, attribute)
    raise PlanError(f"the object that holds '{slot}' cannot be found again; exclude the layer")


def descriptions(model: nn.Module, tensors: Mapping[str, Tensor], known: set[tuple[str, str]]) -> list[AttributeChange]:
    """Attributes by which torch's layers describe themselves and that nothing computes with."""
    found = []
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        for attribute, value in _described(module, leaf, tensor):
            if (owner, attribute) not in known and getattr(module, attribute, value) != value:
                known.add((owner, attribute))
                found.append(AttributeChange(owner, attribute, value))
    return found


def _described(module: nn.Module, leaf: str, tensor: Tensor) -> Iterator[tuple[str, int]]:
    shape = tensor.shape
    if isinstance(module, nn.modules.conv._ConvNd):
        if leaf == "weight":
            yield from _described_convolution(module, shape)
        return
    for kind, leaves, names in DESCRIBED:
        if isinstance(module, kind) and leaf.startswith(leaves):
            yield from ((name, shape[dim]) for name, dim in names if dim < len(shape))  # counters have no dimension
    if type(module).__name__ == "Conv1D" and leaf == "weight":
        yield from (("nx", shape[0]), ("nf", shape[1]))


DESCRIBED: tuple[tuple[type[nn.Module], str, tuple[tuple[str, int], ...]], ...] = (
    (nn.Linear, "weight", (("out_features", 0), ("in_features", 1))),
    (nn.Bilinear, "weight", (("out_features", 0), ("in1_features", 1), ("in2_features", 2))),
    (nn.modules.batchnorm._NormBase, "", (("num_features", 0),)),
    (nn.GroupNorm, "", (("num_channels", 0),)),
    (nn.Embedding, "weight", (("embedding_dim", 1),)),
    (nn.RNNBase, "weight_hh", (("hidden_size", 1),)),
    (nn.RNNBase, "weight_ih_l0", (("input_size", 1),)),
)
"""Class of a layer, start of a tensor's name -> (attribute, the tensor's dimension whose size it repeats)."""


def _described_convolution(module: nn.modules.conv._ConvNd, shape: torch.Size) -> Iterator[tuple[str, int]]:
    own, other = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    if module.groups == 1:
        yield from ((own, shape[0]), (other, shape[1]))
    elif module.groups == module.in_channels:  # depthwise: the groups are cut with the channels
        yield from ((own, shape[0]), (other, shape[0] * shape[1] * module.in_channels // module.out_channels))


def install(model: nn.Module, cut: Cut) -> Undo:
    """Put a cut into the model, in place. Parameters stay the objects they are; their gradients are dropped.

    Returns:
        A function that puts everything back.
    """
    tensors = tensors_of(model)
    before: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for name, value in cut.tensors.items():
        tensor = tensors[name]
        before.append((tensor, tensor.data, tensor.grad))
        tensor.grad = None
        tensor.data = value
    attributes = set_attributes(model, cut.attributes)
    forget_cached(model)

    def undo() -> None:
        attributes()
        for tensor, data, grad in reversed(before):
            tensor.data = data
            tensor.grad = grad
        forget_cached(model)

    return undo


@contextlib.contextmanager
def cut_out(model: nn.Module, plan: Plan, structure: Structure) -> Iterator[None]:
    """The model without a plan's structured units inside the block: really smaller, not checked; for trying out.

    Raises:
        PlanError, ModelError: as for `make_cut`; the model is as it was.
    """
    undo = install(model, make_cut(model, plan, structure))
    try:
        yield
    finally:
        undo()


def forget_cached(model: nn.Module) -> None:
    """Some modules keep values computed from their parameters while in eval mode, and drop them in train mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.eval()
    for module, training in modes:
        module.training = training


def set_attributes(model: nn.Module, changes: list[AttributeChange]) -> Undo:
    """Set integer attributes of modules and configs.

    Returns:
        A function that puts them back.

    Raises:
        PlanError: a module or attribute is missing; names it.
    """
    for change in changes:
        _owner(model, change)  # nothing is set unless everything can be
    before: list[tuple[Any, str, Any]] = []
    for change in changes:
        owner = _owner(model, change)
        old = getattr(owner, change.attribute)
        before.append((owner, change.attribute, old))
        setattr(owner, change.attribute, _replaced(old, change))

    def undo() -> None:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)

    return undo


def odd_attributes(model: nn.Module, fresh: nn.Module) -> list[AttributeChange]:
    """The integer attributes in which a model differs from one of the same form that was just built."""
    others = dict(fresh.named_modules())
    return [
        change
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        for change in _differences(name, attribute, value, getattr(others.get(name), attribute, value))
    ]


def _differences(module: str, attribute: str, value: Any, other: Any) -> list[AttributeChange]:
    if type(value) is int and type(other) is int and value != other:
        return [AttributeChange(module, attribute, value)]
    if type(value) in (tuple, list) and type(other) is type(value) and len(value) == len(other):
        pairs = enumerate(zip(value, other, strict=True))
        return [
            AttributeChange(module, attribute, a, index)
            for index, (a, b) in pairs
            if type(a) is int is type(b) and a != b
        ]
    return []


def _owner(model: nn.Module, change: AttributeChange) -> Any:
    try:
        owner: Any = model.get_submodule(change.module)
        owner = owner if change.on_config is None else getattr(owner, change.on_config)
        getattr(owner, change.attribute)
    except AttributeError:
        raise PlanError(f"the model has no '{change.module}.{change.attribute}'") from None
    return owner


def _replaced(old: Any, change: AttributeChange) -> Any:
    if change.index is None:
        return change.value
    items = [change.value if i == change.index else item for i, item in enumerate(old)]
    return items if isinstance(old, list) else type(old)(items)
