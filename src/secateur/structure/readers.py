"""Who reads a site's units: the one layer whose input columns they are, as o_proj reads heads and down_proj neurons.

Statistics of what units send, and repairs after their removal, belong to that layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.units import Layout, Site
from secateur.structure.layers import layout_of, to_matrix

IN_DIM = {Layout.LINEAR: 1, Layout.CONV: 1, Layout.TRANSPOSED: 0, Layout.CONV_TRANSPOSED: 0}
"""The dimension of a weight along which it reads."""


@dataclass(frozen=True, eq=False)
class Reader:
    """The layer that reads the units of a site.

    Attributes:
        site: the units.
        layer: the layer's weight, e.g. `model.layers.0.mlp.down_proj.weight`.
        columns: int64 `[units, width]`: which inputs of the layer every unit is.
        layout: of the layer's weight.
    """

    site: Site
    layer: str
    columns: Tensor
    layout: Layout = Layout.LINEAR

    @property
    def module(self) -> str:
        """The layer's qualified name."""
        return self.layer.rpartition(".")[0]

    @property
    def width(self) -> int:
        """Inputs of one unit: 1 for a neuron, head_dim for a head, several heads for a key/value group."""
        return self.columns.shape[1]

    def matrix(self, weight: Tensor) -> Tensor:
        """What the layer does with the units: its weight's columns `[O, units * width]`, float32."""
        return to_matrix(weight, self.layout)[:, self.columns.flatten().to(weight.device)].float()

    def summed(self, values: Tensor) -> Tensor:
        """One number per input, `[I]`, added up per unit, `[units]`."""
        return values[self.columns.to(values.device)].sum(1)

    def expanded(self, values: Tensor) -> Tensor:
        """One value per unit, `[units]`, as one per input of the unit: `[units * width]` beside `columns.flatten()`."""
        return values.repeat_interleave(self.width)

    def inside(self, block: str) -> bool:
        """Whether the layer is in the block of that name."""
        return self.layer.startswith(f"{block}.")


def readers(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Reader]:
    """Site -> its reader.

    Raises:
        ModelError: the units of a site are read by no linear layer or convolution, or by several; names it.
    """
    layouts = {f"{name}.weight": layout_of(module) for name, module in model.named_modules()}
    found = {}
    for name, site in sites.items():
        own = [
            place
            for place in site.occurrences
            if (layout := layouts.get(place.parameter)) is not None and place.dim == IN_DIM[layout]
        ]
        if len(own) != 1:
            who = ", ".join(sorted({place.parameter for place in own})) or "no layer that this method knows"
            raise ModelError(
                f"'{name}' is read by {who}; this method needs exactly one linear layer that reads the units, as in "
                f"the blocks of transformers; exclude it (--exclude '{name.partition(':')[0]}')"
            )
        layout = layouts[own[0].parameter]
        assert layout is not None  # or it would not be one of its own
        found[name] = Reader(site, own[0].parameter, own[0].indices(site.units), layout)
    return found
