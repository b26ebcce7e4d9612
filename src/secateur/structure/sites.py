"""Weight sites: every prunable weight of a model once, and why others are left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from secateur.core.errors import ModelError
from secateur.core.units import Site, UnitKind
from secateur.structure.layers import WeightLayer, layout_of


@dataclass(frozen=True)
class WeightLayers:
    """What `weight_layers` finds: layers by parameter name, and the reasons for the rest."""

    layers: dict[str, WeightLayer]
    skipped: dict[str, str]

    @property
    def sites(self) -> dict[str, Site]:
        """The layers' sites."""
        return {name: layer.site for name, layer in self.layers.items()}


def weight_layers(
    model: nn.Module,
    wants: Callable[[str], bool] = lambda name: True,
    within: Iterable[str] = ("",),
    *,
    needed: bool = True,
) -> WeightLayers:
    """Every linear and convolution weight below the modules named `within`.

    A weight that several layers share is listed once, under its first name. One that an embedding
    or any other kind of module uses as well is skipped: pruning it would change what that module
    does.

    Args:
        model: any module.
        wants: filter over parameter names.
        within: qualified module names; `""` is the whole model.
        needed: refuse a model in which nothing is found.

    Raises:
        ModelError: nothing is left to prune.
    """
    users = _users(model)
    prefixes = tuple(f"{name}." if name else "" for name in within)
    layers: dict[str, WeightLayer] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        layout = layout_of(module)
        parameter = f"{name}.weight" if name else "weight"
        if layout is None or not parameter.startswith(prefixes):
            continue
        others = users[id(module.weight)]
        if not others:
            skipped[parameter] = "is computed from other parameters (torch.nn.utils.parametrize)"
            continue
        first = others[0][0]
        foreign = [other for other, user in others if layout_of(user) is not layout]
        if not wants(parameter):
            skipped[parameter] = "left out by the include/exclude patterns"
        elif foreign:
            skipped[parameter] = f"tied to '{foreign[0]}', which is no layer of the same kind"
        elif first != name:
            skipped[parameter] = f"shares its weight with '{first}', pruned there"
        else:
            shape = tuple(module.weight.shape)
            layers[parameter] = WeightLayer(Site(parameter, UnitKind.WEIGHT, shape, layout), module)
    skipped |= _without_a_layer(model, [prefix for prefix in prefixes if prefix], layers)
    if needed and not layers:
        raise ModelError(_nothing_left(model, skipped))
    return WeightLayers(layers, skipped)


def _users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """id(parameter) -> every (module name, module) that holds it as `weight`."""
    users = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].append((name, module))
    return users


def _without_a_layer(model: nn.Module, prefixes: list[str], layers: dict[str, WeightLayer]) -> dict[str, str]:
    """Matrices inside blocks that no layer of ours multiplies with, e.g. experts fused in one tensor."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: "is no weight of a linear or convolution layer"
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(prefixes)) and parameter.dim() >= 2 and id(parameter) not in embeddings
        if id(parameter) not in {id(layer.module.weight) for layer in layers.values()} and not _is_layer(model, name)
    }


def _is_layer(model: nn.Module, parameter: str) -> bool:
    return layout_of(model.get_submodule(parameter.rpartition(".")[0])) is not None


def _nothing_left(model: nn.Module, skipped: dict[str, str]) -> str:
    if skipped:
        name, reason = next(iter(skipped.items()))
        return f"no weight is left to prune; {len(skipped)} were skipped, the first is '{name}': {reason}"
    return f"{type(model).__name__} has no linear or convolution layer to prune"
