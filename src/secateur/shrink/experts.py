"""Fewer experts, each a mixture of old ones: put into a model for a while, with a mapped or a sliced router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.data.running import evaluating, logits
from secateur.shrink.cut import Undo, tensors_of
from secateur.shrink.rotate import rebuild_
from secateur.shrink.routers import MappedRouter
from secateur.structure.experts import CHOSEN, COUNTS, ExpertLayer

SAME = 1e-3  # relative to the largest output; routers are run in float32, models may not be


@dataclass(frozen=True)
class Coefficients:
    """What becomes of one layer's n experts.

    Attributes:
        merge: M, float32 `[n', n]`: expert i's matrices become sum_j M_ij W_j.
        route: R, float32 `[n', n]`: the routing probabilities p become p R^T.
    """

    merge: Tensor
    route: Tensor

    @property
    def picks(self) -> Tensor | None:
        """The expert whose probability every row of R takes, int64 `[n']`, if each takes one of its own."""
        places = self.route.argmax(1)
        hot = torch.equal(self.route, torch.eye(self.route.shape[1])[places])
        return places if hot and len(set(places.tolist())) == len(places) else None


def mixed(parts: Tensor | Sequence[Tensor], merge: Tensor) -> Tensor:
    """sum_j M_ij W_j for every i, `[n', ...]`, in float32 or better; rows that pick one expert are copies of it."""
    first = parts[0]
    kind = torch.promote_types(first.dtype, torch.float32)
    out = torch.empty((len(merge), *first.shape), dtype=first.dtype, device=first.device)
    for index, row in enumerate(merge.tolist()):
        used = [place for place, share in enumerate(row) if share]
        if len(used) == 1 and row[used[0]] == 1:
            out[index] = parts[used[0]]
            continue
        total = torch.zeros(first.shape, dtype=kind, device=first.device)
        for place in used:
            total.add_(parts[place].to(kind), alpha=row[place])
        out[index] = total
    return out


def addition_of(model: nn.Module, layer: ExpertLayer, kept: int, mapped: bool, active: int = 0) -> dict[str, Any]:
    """What a layer gets, as `routers.attach_experts` takes it.

    Args:
        model: the dense model.
        layer: of it.
        kept: experts that stay.
        mapped: whether the router is mapped, or sliced.
        active: experts that a token takes from now on; 0: as many as before.

    Raises:
        ModelError: no attribute says how many experts a token takes, and it is to change.
    """
    changes = [(*place, kept) for place in layer.attributes(model, COUNTS, layer.count)]
    takes = layer.attributes(model, CHOSEN, layer.chosen) if active and active != layer.chosen else []
    if active and active != layer.chosen and not takes:
        raise ModelError(
            f"'{layer.name}': no attribute ({', '.join(CHOSEN)}) says that a token takes {layer.chosen} experts, so it "
            "cannot take fewer; leave active at 0"
        )
    return {
        "kind": "experts",
        "gate": layer.gate,
        "members": layer.members,
        "kept": kept,
        "chosen": active or layer.chosen,
        "mapped": mapped,
        "attributes": [list(change) for change in (*changes, *((*place, active) for place in takes))],
    }


def values_of(model: nn.Module, layer: ExpertLayer, found: Coefficients, mapped: bool) -> Iterator[tuple[str, Tensor]]:
    """(parameter or buffer of the model with fewer experts, its value)."""
    tensors = tensors_of(model)
    for names in layer.tensors:
        merged = mixed(tensors[names[0]] if layer.fused else [tensors[name] for name in names], found.merge)
        if layer.fused:
            yield names[0], merged
        else:
            yield from ((names[index], value) for index, value in enumerate(merged))
    if mapped:
        yield f"{layer.gate}.map", found.route
        return
    picks = found.picks
    assert picks is not None
    for name in layer.routing:
        yield name, tensors[name].detach()[picks.to(tensors[name].device)]


@torch.no_grad()
def mix_(
    model: nn.Module,
    layers: Sequence[ExpertLayer],
    found: Mapping[str, Coefficients],
    active: int = 0,
    mapped: bool = True,
) -> Undo:
    """Give layers of experts fewer ones, in place.

    Args:
        model: the dense model.
        layers: of it.
        found: name of the layer -> its coefficients.
        active: experts that a token takes from now on; 0: as many as before.
        mapped: map the routers' probabilities; False slices the routers, which needs one-hot R.

    Returns:
        A function that puts everything back.
    """
    values: dict[str, Tensor] = {}
    for layer in layers:
        values |= dict(values_of(model, layer, found[layer.name], mapped))
    additions = [addition_of(model, layer, len(found[layer.name].merge), mapped, active) for layer in layers]
    return rebuild_(model, values, additions)[0]


def routers(model: nn.Module) -> list[MappedRouter]:
    """The mapped routers of a model."""
    return [module for module in model.modules() if isinstance(module, MappedRouter)]


def check_mapping(model: nn.Module, layers: Sequence[ExpertLayer], batch: Batch) -> None:
    """See that a mapped router with R = 1 changes nothing.

    Raises:
        ModelError: a layer's router is something else than a softmax of a linear layer and a choice of the best.
    """
    with evaluating(model):
        dense = logits(model, batch).double()
        for layer in layers:
            if not _unchanged(model, layer, batch, dense):
                raise ModelError(
                    f"the router '{layer.gate}' of block '{layer.name}' is no softmax of a linear layer followed by a "
                    "choice of the best, so its probabilities cannot be mapped; use router=fold, or exclude the block"
                )


def _unchanged(model: nn.Module, layer: ExpertLayer, batch: Batch, dense: Tensor) -> bool:
    whole = torch.eye(layer.count)
    undo = mix_(model, [layer], {layer.name: Coefficients(whole, whole)})
    try:
        found = logits(model, batch).double()
    except (ModelError, AttributeError):  # a router's own code misses what only its linear layer had
        return False
    finally:
        undo()
    return float((found - dense).abs().max()) <= SAME * max(float(dense.abs().max()), 1e-12)
