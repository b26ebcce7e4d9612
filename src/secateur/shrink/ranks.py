"""Ranks as units: what layers cost at a rank, how a budget becomes ranks, and the plan that factorises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.structured import Counts, meet_cost
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError
from secateur.core.method import Batch, Decision
from secateur.core.units import Scheme, Site, UnitKind
from secateur.data.batches import run
from secateur.data.running import evaluating
from secateur.measure.flops import flops
from secateur.scores.spectrum import Rule, Spectrum, full_rank
from secateur.structure.layers import layout_of
from secateur.structure.sites import weight_layers


@dataclass(frozen=True)
class RankLayer:
    """A layer that can be written as two.

    Attributes:
        name: the module's.
        module: a linear layer or a convolution without groups.
        scheme: of the factors.
    """

    name: str
    module: nn.Module
    scheme: Scheme

    @property
    def weight(self) -> Tensor:
        """`[N, C, k_h, k_w]` or `[N, C]`, detached."""
        found = self.module.weight
        assert isinstance(found, Tensor)
        return found.detach() if isinstance(self.module, (nn.Linear, nn.Conv2d)) else found.detach().t()

    @property
    def full(self) -> int:
        """The largest rank that the weight can have."""
        return full_rank(self.weight.shape, self.scheme)

    @property
    def sides(self) -> tuple[int, int]:
        """Weights per rank in the first and in the second factor."""
        outputs, inputs = self.weight.shape[:2]
        height, width = self.weight.shape[2:] if self.weight.dim() == 4 else (1, 1)
        match self.scheme:
            case Scheme.CHANNEL:
                return inputs * height * width, outputs
            case Scheme.SPATIAL:
                return inputs * height, outputs * width
            case _:
                return outputs * inputs, outputs * height * width

    @property
    def cost(self) -> int:
        """Weights of one rank."""
        return sum(self.sides)

    def pays(self, rank: int) -> bool:
        """Whether the two layers have fewer weights than the one."""
        return rank * self.cost < self.weight.numel()

    @property
    def site(self) -> Site:
        """Its ranks as units."""
        return Site(f"{self.name}:{UnitKind.RANK.value}", UnitKind.RANK, (self.full,), cost=self.cost)


@dataclass(frozen=True)
class RankLayers:
    """The layers of a model that can be factorised.

    Attributes:
        model: dense.
        layers: by name of the module.
        skipped: module -> why it is left alone.
    """

    model: nn.Module
    layers: Mapping[str, RankLayer]
    skipped: Mapping[str, str]

    @classmethod
    def find(cls, model: nn.Module, scheme: Scheme, wants: Callable[[str], bool], linear: bool = True) -> RankLayers:
        """Layers that can be written as two; grouped convolutions and what else cannot are left alone, with a reason.

        Args:
            model: any module.
            scheme: of convolutions; linear layers have the channel form.
            wants: filter over parameter names.
            linear: linear layers and 1 x 1 convolutions too.

        Raises:
            ModelError: no layer is left.
        """
        found, skipped = {}, {}
        for parameter, layer in weight_layers(model, wants, needed=False).layers.items():
            name, module = parameter.removesuffix(".weight"), layer.module
            reason = _unfit(module, linear)
            if reason:
                skipped[name] = reason
            else:
                found[name] = RankLayer(name, module, scheme if isinstance(module, nn.Conv2d) else Scheme.CHANNEL)
        if not found:
            raise ModelError(
                f"{type(model).__name__} has no layer whose rank could be cut"
                + "".join(f"; '{name}' is left alone: {why}" for name, why in list(skipped.items())[:1])
            )
        return cls(model, found, skipped)

    def spectra(self) -> dict[str, Spectrum]:
        """Every layer's decomposition.

        Raises:
            NumericsError: NaN in a weight; names the layer.
        """
        return {name: Spectrum.of(layer.weight, layer.scheme, name) for name, layer in self.layers.items()}

    def worth(self, counts: Mapping[str, int]) -> Counts:
        """Ranks, with the full one where two layers would not be smaller than one."""
        return {name: rank if self.layers[name].pays(rank) else self.layers[name].full for name, rank in counts.items()}

    def parameters(self, counts: Mapping[str, int]) -> int:
        """Parameters of the model at these ranks."""
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        return whole - sum(
            layer.weight.numel() - counts[name] * layer.cost
            for name, layer in self.layers.items()
            if counts[name] < layer.full
        )

    def cost(self, budget: Budget, example: Batch) -> Callable[[Counts], float]:
        """What a budget counts, as a function of ranks.

        Raises:
            BudgetError: it counts something else than parameters or FLOPs.
        """
        if budget.quantity is Quantity.PARAMETERS:
            return self.parameters
        if budget.quantity is Quantity.FLOPS:
            return Work.of(self, example).flops
        raise BudgetError(f"ranks take a budget in parameters or flops, or a sparsity of parameters, not in {budget}")

    def within(self, spectra: Mapping[str, Spectrum], budget: Budget, example: Batch) -> Counts:
        """Ranks that meet a budget: the largest share of energy, common to all layers, that it allows.

        Raises:
            BudgetError: out of reach; gives the reachable range.
        """
        if budget.quantity in (Quantity.SPARSITY, Quantity.DENSITY):
            budget = Budget(1 - budget.sparsity, Quantity.PARAMETERS)
        sites = {name: layer.site for name, layer in self.layers.items()}

        def at(share: float) -> Counts:
            return self.worth({name: spectra[name].rank(Rule.ENERGY, 1 - share) for name in sites})

        return meet_cost(at, sites, budget, self.cost(budget, example), 1.0)

    def decision(self, spectra: Mapping[str, Spectrum], counts: Mapping[str, int], keep_scores: bool) -> Decision:
        """The plan's parts for these ranks: the leading singular values stay, layers at full rank stay whole."""
        found = Decision()
        for name, layer in self.layers.items():
            rank, spectrum, site = counts[name], spectra[name], layer.site
            found.sites[site.name] = site
            found.masks[site.name] = torch.arange(layer.full) < rank
            found.facts[site.name] = {"rank": rank, "energy": round(spectrum.energy(rank), 9)}
            if keep_scores:
                found.scores[site.name] = spectrum.values.square().sum(0).float().cpu()
            if rank < layer.full:
                found.additions.append(_addition(layer, rank))
                found.weights.update(_values(layer, spectrum, rank))
        found.warnings = [f"'{name}' is left alone: {why}" for name, why in self.skipped.items()]
        return found


def _unfit(module: nn.Module, linear: bool) -> str:
    """Why a layer cannot be factorised; empty if it can."""
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return f"its {module.groups} groups are small layers of their own"
        return "1 x 1 kernels were not asked for" if module.kernel_size == (1, 1) and not linear else ""
    layout = layout_of(module)
    if layout is None or not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        return f"layers of class {type(module).__name__} are not factorised"
    return "" if linear else "linear layers were not asked for"


def _addition(layer: RankLayer, rank: int) -> dict[str, Any]:
    return {"kind": "factorised", "module": layer.name, "rank": rank, "scheme": layer.scheme.value}


def _values(layer: RankLayer, spectrum: Spectrum, rank: int) -> dict[str, Tensor]:
    first, second = (value.to(layer.weight.dtype).contiguous() for value in spectrum.factors(rank))
    found = {f"{layer.name}.first.weight": first, f"{layer.name}.second.weight": second}
    bias = getattr(layer.module, "bias", None)
    return found | ({f"{layer.name}.second.bias": bias.detach().clone()} if isinstance(bias, Tensor) else {})


@dataclass
class Work:
    """FLOPs of the model as a function of ranks.

    Attributes:
        whole: of the dense model on the example.
        layers: the layers and their costs.
        places: layer -> multiplications of every weight: at the outputs, at the first factor's, at the second's.
    """

    whole: int
    layers: RankLayers
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: RankLayers, example: Batch) -> Work:
        """See how often every weight is used on an example."""
        found = cls(flops(layers.model, example), layers)

        def watch(name: str, layer: RankLayer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                counts = _places(layer, args[0], output)
                before = found.places.get(name, (0, 0, 0))
                found.places[name] = (before[0] + counts[0], before[1] + counts[1], before[2] + counts[2])

            return hook

        handles = [one.module.register_forward_hook(watch(name, one)) for name, one in layers.layers.items()]
        try:
            with evaluating(layers.model):
                run(layers.model, example)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def flops(self, counts: Mapping[str, int]) -> float:
        """FLOPs at these ranks; one multiply-add is 2."""
        return self.whole - 2 * sum(self._saved(name, rank) for name, rank in counts.items())

    def _saved(self, name: str, rank: int) -> int:
        layer = self.layers.layers[name]
        if rank == layer.full or name not in self.places:
            return 0
        dense, first, second = self.places[name]
        return dense * layer.weight.numel() - rank * (first * layer.sides[0] + second * layer.sides[1])


def _places(layer: RankLayer, x: Tensor, output: Tensor) -> tuple[int, int, int]:
    """How often the weights of the one layer and of the two factors are used."""
    if layer.weight.dim() == 2:
        rows = x.numel() // x.shape[-1]
        return rows, rows, rows
    after = output.shape[0] * output.shape[-2] * output.shape[-1]
    if layer.scheme is Scheme.CHANNEL:
        return after, after, after
    if layer.scheme is Scheme.SPATIAL:  # the first factor takes care of the height only
        return after, output.shape[0] * output.shape[-2] * x.shape[-1], after
    return after, x.shape[0] * x.shape[-2] * x.shape[-1], after
