"""A network of convolutions as a graph and back, without loss (Liu, Wang, Zhang 2025: networks for metanetworks).

Nodes: the input channels, then the output channels of every layer in the order in which the layers run, the classes
last. Edges: for every layer all pairs of an output and an input channel, the output outermost; `index` row 0 holds the
output, row 1 the input. Features (a network *with* residual sums | *without*):

    nodes  8: batch norm weight, bias, mean, variance, and the same of the shortcut's | 5: those four, the layer's bias
           where there is none: 1 0 0 1 (1 0 0 1) | 1 0 0 1 0; a layer without norm keeps its bias in slot 1 | slot 4
    edges  the weights of the pair: 9 for a 3x3 kernel, a single weight in the middle of a padded 3x3. Where a network
           has other kernels, every size is a type of edge of its own (ResNet-50: 49, 9, 1), nothing is padded.
    residual sums: the shortcut's 1x1 convolution as edges from the block's inputs to its outputs; an unchanged input
           as edges between all pairs, 1 in the middle for equal channels and 0 elsewhere (own types: equal ones only).
           Inputs padded with channels of zeros, which the released code has no edges for, are equal to those that they
           are added to.

`decode` reads trainable tensors only, each exactly where `encode` put it; running statistics, padding and identity
edges are never read. The released code reads the classifier of its small networks back transposed; here it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.structure.wiring import INPUT, Layer, Wiring, wire

SMALL = 9  # a 3x3 kernel; single weights are padded to it where there are no other kernels
NORM = ("weight", "bias", "running_mean", "running_var")
ABSENT = (1.0, 0.0, 0.0, 1.0)  # what a norm that changes nothing would hold


@dataclass(frozen=True)
class Family:
    """What two networks share whose graphs one metanetwork can read.

    Attributes:
        node: features of a node: 8 with residual sums, 5 without.
        edges: features of an edge, by type, largest first.
    """

    node: int
    edges: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.node} node features, edges of {', '.join(map(str, self.edges))} weights"


@dataclass(frozen=True)
class Features:
    """What a graph's nodes and edges hold: `[nodes, features]`, and one `[edges, weights]` for each type."""

    nodes: Tensor
    edges: tuple[Tensor, ...]


@dataclass(frozen=True)
class Slot:
    """A vector of a network in the nodes: one number for each channel of a layer."""

    name: str
    feature: int
    nodes: slice


@dataclass(frozen=True)
class Bundle:
    """A weight of a network in the edges of one type: rows `edges`, columns `middle` or all."""

    name: str
    kind: int
    edges: slice
    shape: tuple[int, ...]
    middle: int | None


@dataclass
class Graph:
    """Where every tensor of a network stands in its graph.

    Attributes:
        family: sizes of the features.
        index: int64 `[2, edges]` over all types, one type after the other: output node, input node.
        slots: vectors, those of running statistics among them.
        bundles: weights.
        identities: (type, edges, what they hold) of unchanged inputs of residual sums.
        trainable: names of the network's parameters.
        total: number of nodes.
    """

    family: Family
    index: Tensor
    slots: list[Slot]
    bundles: list[Bundle]
    identities: list[tuple[int, slice, Tensor]]
    trainable: frozenset[str]
    total: int

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Number of edges by type."""
        ends = [0] * len(self.family.edges)
        for kind, rows in (*((b.kind, b.edges) for b in self.bundles), *((k, e) for k, e, _ in self.identities)):
            ends[kind] = max(ends[kind], rows.stop)
        return tuple(ends)

    def encode(self, tensors: Mapping[str, Tensor]) -> Features:
        """The graph's features, in the highest precision among the tensors.

        Args:
            tensors: parameters and buffers of a network of the architecture that the graph was built for.
        """
        first = tensors[self.bundles[0].name]
        names = [slot.name for slot in self.slots] + [bundle.name for bundle in self.bundles]
        held = [tensors[name].dtype for name in names]
        some = first.new_empty(0, dtype=reduce(torch.promote_types, held))  # norms may be of higher precision
        defaults = ABSENT * 2 if self.family.node == 8 else (*ABSENT, 0.0)
        nodes = some.new_tensor(defaults).repeat(self.total, 1)
        edges = tuple(some.new_zeros(count, size) for count, size in zip(self.edges, self.family.edges, strict=True))
        for slot in self.slots:
            nodes[slot.nodes, slot.feature] = tensors[slot.name].detach().to(some)
        for bundle in self.bundles:
            target = edges[bundle.kind][bundle.edges]
            weight = tensors[bundle.name].detach()
            if bundle.middle is None:
                target.copy_(weight.reshape(target.shape))
            else:
                target[:, bundle.middle] = weight.reshape(-1).to(some)
        for kind, rows, ones in self.identities:
            edges[kind][rows, self.family.edges[kind] // 2] = ones.to(some)
        return Features(nodes, edges)

    def decode(self, features: Features) -> dict[str, Tensor]:
        """The trainable tensors, differentiable with respect to the features."""
        found = {
            slot.name: features.nodes[slot.nodes, slot.feature] for slot in self.slots if slot.name in self.trainable
        }
        for bundle in self.bundles:
            rows = features.edges[bundle.kind][bundle.edges]
            found[bundle.name] = (rows if bundle.middle is None else rows[:, bundle.middle]).reshape(bundle.shape)
        return found


def graph_of(model: nn.Module, example: Batch) -> Graph:
    """Lay a network out as a graph.

    Args:
        model: a network of convolutions; it is left exactly as it was.
        example: its inputs, images in one tensor.

    Raises:
        ModelError: something in it has no place in a graph; names the layer.
    """
    return _Builder(model, wire(model, example)).build()


@dataclass
class _Builder:
    model: nn.Module
    wiring: Wiring
    slots: list[Slot] = field(default_factory=list)
    bundles: list[Bundle] = field(default_factory=list)
    identities: list[tuple[int, slice, Tensor]] = field(default_factory=list)

    def build(self) -> Graph:
        sizes = {layer.per_pair for layer in self.wiring.layers}
        self.padded = sizes <= {1, SMALL}
        self.family = Family(8 if self.wiring.residual else 5, (SMALL,) if self.padded else self._types(sizes))
        self.starts, total = self._nodes()
        self.pairs: list[list[Tensor]] = [[] for _ in self.family.edges]
        self.counts = [0] * len(self.family.edges)
        for layer in self._ordered():
            self._place_vectors(layer)
            self._place_weights(layer)
        trainable = dict(self.model.named_parameters())
        placed = {slot.name for slot in self.slots} | {bundle.name for bundle in self.bundles}
        for name in trainable:
            if name not in placed:
                raise ModelError(
                    f"parameter '{name}' of {type(self.model).__name__} has no place in a graph: it belongs to no "
                    "convolution, linear layer or batch norm that took part in the run"
                )
        index = torch.cat([pair for pairs in self.pairs for pair in pairs], 1)
        return Graph(self.family, index, self.slots, self.bundles, self.identities, frozenset(trainable), total)

    def _types(self, sizes: set[int]) -> tuple[int, ...]:
        plain = {1} if any(layer.identity is not None for layer in self.wiring.layers) else set[int]()
        return tuple(sorted(sizes | plain, reverse=True))

    def _nodes(self) -> tuple[dict[int, int], int]:
        """The first node of every layer that has its own."""
        starts, total = {INPUT: 0}, self.wiring.inputs
        for number, layer in enumerate(self.wiring.layers):
            if layer.adds_to is None:
                starts[number] = total
                total += layer.outputs
        return starts, total

    def _ordered(self) -> Iterator[Layer]:
        """Shortcuts behind the layers that they are added to, whenever they ran."""
        behind = {layer.adds_to: layer for layer in self.wiring.layers if layer.adds_to is not None}
        for number, layer in enumerate(self.wiring.layers):
            if layer.adds_to is None:
                yield layer
            if number in behind:
                yield behind[number]

    def _own(self, layer: Layer) -> slice:
        """The nodes whose numbers the layer makes."""
        number = self.wiring.layers.index(layer) if layer.adds_to is None else layer.adds_to
        return slice(self.starts[number], self.starts[number] + layer.outputs)

    def _place_vectors(self, layer: Layer) -> None:
        first, nodes = (4 if layer.adds_to is not None else 0), self._own(layer)
        if layer.norm is not None:
            module = self.model.get_submodule(layer.norm)
            given = [leaf for leaf in NORM if getattr(module, leaf, None) is not None]
            self.slots += [Slot(f"{layer.norm}.{leaf}", first + NORM.index(leaf), nodes) for leaf in given]
        if self.model.get_submodule(layer.name)._parameters.get("bias") is None:
            return
        if layer.norm is not None and self.family.node == 8:
            raise ModelError(
                f"'{layer.name}' has a bias beside its batch norm '{layer.norm}'; in networks with residual sums nodes "
                "have no place for it (bias=False changes nothing there: the norm takes the mean away)"
            )
        self.slots.append(Slot(f"{layer.name}.bias", first + 1 if self.family.node == 8 else 4, nodes))

    def _place_weights(self, layer: Layer) -> None:
        own = self._own(layer)
        source = self._range(layer.source)
        shape = tuple(self.model.get_submodule(layer.name).get_parameter("weight").shape)
        middle = SMALL // 2 if self.padded and layer.per_pair == 1 else None
        kind = 0 if self.padded else self.family.edges.index(layer.per_pair)
        rows = self._connect(kind, torch.cartesian_prod(torch.arange(own.start, own.stop), source).T)
        self.bundles.append(Bundle(f"{layer.name}.weight", kind, rows, shape, middle))
        if layer.identity is not None:
            self._place_identity(torch.arange(own.start, own.stop), self._range(layer.identity), layer.offset)

    def _place_identity(self, outputs: Tensor, inputs: Tensor, offset: int) -> None:
        equal = torch.stack([outputs[offset : offset + len(inputs)], inputs])
        if not self.padded:
            kind = self.family.edges.index(1)
            self.identities.append((kind, self._connect(kind, equal), torch.ones(len(inputs))))
            return
        ones = torch.zeros(len(outputs), len(inputs))
        ones[equal[0] - outputs[0], equal[1] - inputs[0]] = 1
        self.identities.append((0, self._connect(0, torch.cartesian_prod(outputs, inputs).T), ones.flatten()))

    def _range(self, number: int) -> Tensor:
        return torch.arange(self.starts[number], self.starts[number] + self.wiring.width(number))

    def _connect(self, kind: int, pairs: Tensor) -> slice:
        """Add edges of a type; their rows among that type's."""
        start = self.counts[kind]
        self.pairs[kind].append(pairs)
        self.counts[kind] += pairs.shape[1]
        return slice(start, self.counts[kind])
