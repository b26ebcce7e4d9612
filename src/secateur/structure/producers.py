"""Who makes a site's neurons: the layers whose output rows they are, as gate_proj and up_proj do.

A fused layer (gate_up_proj) counts once for each of its parts. Beside it stands `readers.py`: who reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.units import Layout, Occurrence, Site
from secateur.structure.kinds import OUT_DIM
from secateur.structure.layers import layout_of, to_matrix


@dataclass(frozen=True, eq=False)
class Producer:
    """One row per unit in one layer.

    Attributes:
        layer: the layer's weight, e.g. `model.layers.0.mlp.gate_proj.weight`.
        layout: of that weight.
        rows: int64 `[units]`: which output of the layer every unit is.
    """

    layer: str
    layout: Layout
    rows: Tensor

    def matrix(self, weight: Tensor) -> Tensor:
        """The units' rows, `[units, I]` float32."""
        return to_matrix(weight, self.layout)[self.rows.to(weight.device)].float()


def producers(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, list[Producer]]:
    """Site -> the rows that make its units, in the order of the parameters.

    Raises:
        ModelError: a site stands in a matrix that no linear layer or convolution multiplies with (experts kept in one
            tensor), or no layer makes its units; names it.
    """
    layouts = {f"{name}.weight": layout_of(module) for name, module in model.named_modules()}
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    found = {}
    for name, site in sites.items():
        foreign = [p.parameter for p in site.occurrences if shapes.get(p.parameter, 0) > 1 and not _known(layouts, p)]
        parts = [part for place in site.occurrences for part in _parts(layouts.get(place.parameter), place, site.units)]
        if foreign or not parts:
            who = (
                f"'{foreign[0]}', which is no layer's weight (experts in one tensor?)" if foreign else "no linear layer"
            )
            raise ModelError(
                f"the units of '{name}' stand in {who}; this method needs layers that make them, as gate_proj and "
                f"up_proj do, exclude it (--exclude '{name.partition(':')[0]}')"
            )
        found[name] = parts
    return found


def _known(layouts: Mapping[str, Layout | None], place: Occurrence) -> bool:
    return layouts.get(place.parameter) is not None


def _parts(layout: Layout | None, place: Occurrence, units: int) -> list[Producer]:
    if layout is None or place.dim != OUT_DIM[layout]:
        return []
    return [Producer(place.parameter, layout, rows) for rows in place.indices(units).unbind(1)]
