"""Ranks as units: what layers cost at a rank, how a budget becomes ranks, and the plan that factorises."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from secateur.allocate.structured import Counts
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError
from secateur.core.method import Batch, Decision
from secateur.core.units import Layout, Scheme, Site, UnitKind
from secateur.data.batches import run
from secateur.data.running import evaluating, resized
from secateur.measure.flops import flops
from secateur.scores.spectrum import Rule, Spectrum, full_rank
from secateur.shrink.bypass import Bypass, bypasses_in
from secateur.structure.sites import weight_layers
from secateur.train.sharding import whole


def undecided(budget: Budget) -> bool:
    """Whether a budget leaves ranks to a rule: sparsity 0."""
    return budget.quantity is Quantity.SPARSITY and budget.of(UnitKind.RANK).amount == 0


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

    @property
    def uses(self) -> tuple[int, int]:
        """How often weights of the first and of the second factor are used for one output, borders aside.

        A factor that comes before a stride works at the finer resolution.
        """
        if not isinstance(self.module, nn.Conv2d) or self.scheme is Scheme.CHANNEL:
            return 1, 1
        height, width = self.module.stride
        return (width, 1) if self.scheme is Scheme.SPATIAL else (height * width, 1)

    def pays(self, rank: int) -> bool:
        """Whether the two layers have fewer weights than the one, and fewer multiplications."""
        work = sum(side * use for side, use in zip(self.sides, self.uses, strict=True))
        return rank * max(self.cost, work) < self.weight.numel()

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
        work: what FLOPs were counted with, once a budget has asked for them.
    """

    model: nn.Module
    layers: Mapping[str, RankLayer]
    skipped: Mapping[str, str]
    work: list[Work] = field(default_factory=list)

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
        listed = weight_layers(model, wants, needed=False)
        kept = _shared(model) | _of_bypasses(model)
        for parameter, layer in listed.layers.items():
            name, module = parameter.rpartition(".")[0], layer.module
            reason = _unfit(module, linear, layer.site.layout) or kept.get(id(layer.module.weight), "")
            if reason:
                skipped[name] = reason
            else:
                found[name] = RankLayer(name, module, scheme if isinstance(module, nn.Conv2d) else Scheme.CHANNEL)
        if not found:
            raise ModelError(
                f"{type(model).__name__} has no layer whose rank could be cut"
                + "".join(f"; '{name}' is left alone: {why}" for name, why in [*skipped.items()][:1])
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

    def by_rule(self, spectra: Mapping[str, Spectrum], rule: Rule, amount: float) -> Counts:
        """The ranks that a rule keeps, layer by layer.

        Raises:
            SettingsError: a share that is not in (0, 1].
        """
        return self.worth({name: spectra[name].rank(rule, amount) for name in self.layers})

    def cost(self, budget: Budget, example: Callable[[], Batch]) -> Callable[[Counts], float]:
        """What a budget counts, as a function of ranks; only FLOPs need an example.

        Raises:
            BudgetError: it counts something else than parameters or FLOPs.
        """
        if budget.quantity in (Quantity.PARAMETERS, Quantity.SPARSITY, Quantity.DENSITY):
            return self.parameters
        if budget.quantity is Quantity.FLOPS:
            self.work[:] = [Work.of(self, resized(example(), 1))]
            return self.work[0].flops
        raise BudgetError(f"ranks take a budget in parameters or flops, or a sparsity of parameters, not in {budget}")

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
        found.warnings = self._left_alone(name for name in self.layers if counts[name] == self.layers[name].full)
        next(iter(found.facts.values())).update(self._shares(counts))
        return found

    def _shares(self, counts: Mapping[str, int]) -> dict[str, float]:
        """What of the dense model's parameters stays, and of its FLOPs where a budget asked for these."""
        dense = {name: layer.full for name, layer in self.layers.items()}
        found = {"parameters_kept": self.parameters(counts) / self.parameters(dense)}
        if self.work:
            found["flops_kept"] = self.work[0].flops(counts) / self.work[0].whole
        return {name: round(share, 6) for name, share in found.items()}

    def _left_alone(self, whole: Iterable[str]) -> list[str]:
        """One sentence for each reason why layers are not factorised."""
        names = defaultdict(list)
        for name, reason in self.skipped.items():
            names[reason].append(name)
        names["two thinner layers would not be smaller than the one"] += whole
        return [
            f"{len(found)} layer{'s are' if len(found) > 1 else ' is'} not factorised, "
            f"'{found[0]}'{' first' if len(found) > 1 else ''}: {reason}"
            for reason, found in names.items()
            if found
        ]


def _shared(model: nn.Module) -> dict[int, str]:
    """For weights that are in the model more than once, by their `id`: why they cannot be replaced."""
    places = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            places[id(parameter)].append(name)
    return {key: f"its weight is that of '{names[1]}' too" for key, names in places.items() if len(names) > 1}


def _of_bypasses(model: nn.Module) -> dict[int, str]:
    """For weights of by-passes and of convolutions beside them, by their `id`: why they stay as they are."""
    beside = (model.get_submodule(one["conv"]).weight for one in bypasses_in(model))
    inside = (
        parameter for module in model.modules() if isinstance(module, Bypass) for parameter in module.parameters()
    )
    found = dict.fromkeys(map(id, beside), "a by-pass stands beside it")
    return found | dict.fromkeys(map(id, inside), "it is a part of a by-pass")


def _unfit(module: nn.Module, linear: bool, layout: Layout) -> str:
    """Why a layer cannot be factorised; empty if it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and does not call it"
    plain = layout is Layout.TRANSPOSED or type(module).forward in (nn.Linear.forward, nn.Conv2d.forward)
    if not plain:
        return f"layers of class {type(module).__name__} are not factorised"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "grouped convolutions are many small layers"
    if linear or (isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)):
        return ""
    return "linear layers and 1 x 1 kernels were not asked for"


def _addition(layer: RankLayer, rank: int) -> dict[str, Any]:
    return {"kind": "factorised", "module": layer.name, "rank": rank, "scheme": layer.scheme.value}


def _values(layer: RankLayer, spectrum: Spectrum, rank: int) -> dict[str, Tensor]:
    first, second = (value.to(layer.weight.dtype).contiguous() for value in spectrum.factors(rank))
    found = {f"{layer.name}.first.weight": first, f"{layer.name}.second.weight": second}
    bias = getattr(layer.module, "bias", None)
    return found | ({f"{layer.name}.second.bias": whole(bias.detach()).clone()} if isinstance(bias, Tensor) else {})


@dataclass
class Work:
    """FLOPs of the model as a function of ranks.

    Attributes:
        whole: of the dense model on the example.
        layers: the layers and their costs.
        places: layer -> multiplications of every weight: at the outputs, at the first factor's, at the second's.
        reads: layer -> how often other code looks at its weight, for which two factors have to be multiplied out.
    """

    whole: int
    layers: RankLayers
    places: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: RankLayers, example: Batch) -> Work:
        """See how often every weight is used on an example."""
        found = cls(flops(layers.model, example), layers)

        def watch(name: str, layer: RankLayer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor], output: Tensor) -> None:
                counts = _places(layer, args[0] if args else next(iter(given.values())), output)
                before = found.places.get(name, (0, 0, 0))
                found.places[name] = (before[0] + counts[0], before[1] + counts[1], before[2] + counts[2])

            return hook

        handles = [
            one.module.register_forward_hook(watch(name, one), with_kwargs=True) for name, one in layers.layers.items()
        ]
        try:
            with evaluating(layers.model), _counting_reads(layers.layers, found.reads):
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
        used = rank * (first * layer.sides[0] + second * layer.sides[1])
        return dense * layer.weight.numel() - used - self.reads.get(name, 0) * rank * layer.weight.numel()


@contextlib.contextmanager
def _counting_reads(layers: Mapping[str, RankLayer], reads: dict[str, int]) -> Iterator[None]:
    """Inside the block, count who looks at a layer's weight without calling the layer, as for its dtype."""
    inside, classes = set[nn.Module](), {name: layer.module.__class__ for name, layer in layers.items()}

    def counted(name: str, own: type[nn.Module]) -> type[nn.Module]:
        def read(module: nn.Module, attribute: str) -> Any:
            if attribute == "weight" and module not in inside:
                reads[name] = reads.get(name, 0) + 1
            return own.__getattr__(module, attribute)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inside.add(module)
            try:
                return own.__call__(module, *args, **kwargs)
            finally:
                inside.discard(module)

        return type(own.__name__, (own,), {"__getattr__": read, "__call__": call})

    try:
        for name, layer in layers.items():
            layer.module.__class__ = counted(name, classes[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.module.__class__ = classes[name]


def _places(layer: RankLayer, x: Tensor, output: Tensor) -> tuple[int, int, int]:
    """How often the weights of the one layer and of the two factors are used."""
    if layer.weight.dim() == 2:
        rows = x.numel() // x.shape[-1]
        return rows, rows, rows
    after = output.numel() // output.shape[-3]  # also without a dimension of samples
    if layer.scheme is Scheme.CHANNEL:
        return after, after, after
    if layer.scheme is Scheme.SPATIAL:  # the first factor takes care of the height only
        return after, after // output.shape[-1] * x.shape[-1], after
    return after, x.numel() // x.shape[-3], after
