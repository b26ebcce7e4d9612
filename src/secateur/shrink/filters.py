"""Filters inside of residual blocks: the control for whole blocks that leaves as many filters in the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from secateur.allocate.depth import keep_without
from secateur.allocate.structured import Widths
from secateur.core.budget import Budget
from secateur.core.errors import ModelError
from secateur.core.method import Batch, Task
from secateur.core.plan import Plan
from secateur.core.units import Site
from secateur.data.example import describe_example
from secateur.scores.blocks import Aggregate
from secateur.scores.groups import group_scores
from secateur.shrink.apply import stamp
from secateur.shrink.structured import Members, View, weight_places
from secateur.structure.analysis import Structure
from secateur.structure.layers import CONVOLUTIONS
from secateur.train.gated import inner_channels


def count_filters(model: nn.Module) -> int:
    """Output channels of all convolutions together."""
    return sum(module.out_channels for module in model.modules() if isinstance(module, CONVOLUTIONS))


class InnerFilters:
    """The filters of a model that only their own block reads.

    Args:
        model: what they are in.
        example: inputs that the structure was found with.
        structure: of that model.
        blocks: names of the blocks to look into.

    Attributes:
        sites: name -> site of channels between two convolutions of one block.
        room: how many filters can go while every site keeps what it must.

    Raises:
        ModelError: there are none.
    """

    def __init__(self, model: nn.Module, example: Batch, structure: Structure, blocks: Sequence[str]):
        self.model, self.example, self.structure = model, example, structure
        names = [name for block in blocks for name in inner_channels(model, structure, block)]
        self.sites: dict[str, Site] = {name: structure.sites[name] for name in names}
        if not self.sites:
            raise ModelError(
                f"{type(model).__name__} has no channels between two convolutions of one block, so a control that "
                "removes filters instead of blocks does not exist; leave out the control 'filters'"
            )
        self.least = {name: max(1, structure.minimums.get(name, 1)) for name in self.sites}
        self.room = sum(site.units - self.least[name] for name, site in self.sites.items())

    def lowest(self, scores: Mapping[str, Tensor], remove: int, how: Aggregate) -> Plan:
        """A plan without the filters of the lowest scores, one ranking over all sites; never more than `room`.

        Args:
            scores: parameter name -> a score for each weight.
            remove: filters that should go.
            how: the sum over a filter's weights, or their mean.
        """
        view = View(self.model, self.structure, self.sites, Task(self.model, Budget(0.0)))
        made_by = weight_places(view, Members.PRODUCERS)

        def vector(name: str, dim: int) -> Tensor | None:
            if (name, dim) not in made_by:
                return None
            per_filter = scores[name].double().movedim(dim, 0).flatten(1)
            return per_filter.mean(1) if how is Aggregate.MEAN else per_filter.sum(1)

        chosen = group_scores(self.sites, vector)
        masks = keep_without(chosen, self.sites, min(remove, self.room), Widths(least=self.least))
        plan = Plan(dict(self.sites), masks, example=describe_example(self.example))
        stamp(self.model, plan)
        return plan
