"""Metanetworks: a graph neural network reads a trained network and gives it other weights (Liu, Wang, Zhang 2025).

With x, a the features of the graph's nodes and edges, s = +1 in the first half of the entries and -1 in the rest:

    h = W_n x + b,  e = W_e a + b                                 one encoder for each type of edge
    per layer, H = norm(h):  (n, u) = exchange(H, edges, e),  (n', u') = exchange(H, edges turned around, s * e)
                             h <- h + n + n',  e <- e + u + s * u'          the same weights both ways
    x' = x + rho_n decode_n(norm(h)),  a' = a + rho_e decode_e(norm(e))     one decoder for each type of edge

s is what tells the two directions apart. The residual form with small rho keeps the network what it was. Permuted
channels of the network come out permuted alike. A metanetwork fits one family of graphs, not one size.

Saved as a folder, `metanetwork.safetensors` and `metanetwork.json`; no pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import MissingExtraError, ModelError, PlanError
from secateur.core.files import read_json, whole_folder, write_json
from secateur.structure.graph import Family, Features, Graph

FORMAT = 1
TENSORS, DOCUMENT = "metanetwork.safetensors", "metanetwork.json"


class Shape(BaseModel):
    """How large a metanetwork is and what it reads.

    Attributes:
        node: features of a node.
        edges: features of an edge, by type.
        layers: exchanges of messages.
        width: of hidden nodes and edges.
        node_ratio, edge_ratio: rho, the weight of what is added to the features.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: int
    edges: tuple[int, ...]
    layers: int
    width: int
    node_ratio: float
    edge_ratio: float


def decoder(width: int, features: int) -> nn.Sequential:
    """From hidden states, which are normed first, to what is added to the features."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features))


class Metanetwork(nn.Module):
    """Features of a graph to other features of the same graph.

    Raises:
        MissingExtraError: torch-geometric is not installed.
    """

    signs: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        try:
            from secateur.train.exchange import Exchange
        except ImportError:
            raise MissingExtraError("torch-geometric", "graph", "a metanetwork") from None
        self.shape, width = shape, shape.width
        self.node_encoder = nn.Linear(shape.node, width)
        self.edge_encoders = nn.ModuleList(nn.Linear(size, width) for size in shape.edges)
        self.exchanges = nn.ModuleList(Exchange(width) for _ in range(shape.layers))
        self.node_decoder = decoder(width, shape.node)
        self.edge_decoders = nn.ModuleList(decoder(width, size) for size in shape.edges)
        signs = torch.ones(width)
        signs[width // 2 :] = -1
        self.register_buffer("signs", signs)

    @property
    def family(self) -> Family:
        """The graphs that it reads."""
        return Family(self.shape.node, self.shape.edges)

    def forward(self, given: Features, index: Tensor) -> Features:
        """Other features for a graph with these edges, `[2, edges]`: output, input. The given ones stay as they are."""
        h = self.node_encoder(given.nodes)
        e = torch.cat([encode(own) for encode, own in zip(self.edge_encoders, given.edges, strict=True)])
        for exchange in self.exchanges:
            normed = _norm(h)
            nodes, edges = exchange(normed, index, e)
            nodes_back, edges_back = exchange(normed, index.flip(0), self.signs * e)
            h, e = h + nodes + nodes_back, e + edges + self.signs * edges_back
        parts = torch.split(_norm(e), [len(own) for own in given.edges])
        added = (decode(part) for decode, part in zip(self.edge_decoders, parts, strict=True))
        return Features(
            given.nodes + self.shape.node_ratio * self.node_decoder(_norm(h)),
            tuple(own + self.shape.edge_ratio * more for own, more in zip(given.edges, added, strict=True)),
        )

    def changed(self, graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values for the trainable tensors of a network, differentiable; its running statistics have none.

        Args:
            graph: of the network.
            tensors: its parameters and buffers.

        Raises:
            ModelError: the graph is of another family.
        """
        if graph.family != self.family:
            raise ModelError(
                f"the network's graph has {graph.family}, the metanetwork was made for {self.family}; use one that was "
                "meta-trained on networks of this kind"
            )
        device = self.signs.device
        features = graph.encode(tensors)
        moved = Features(features.nodes.to(self.signs), tuple(own.to(self.signs) for own in features.edges))
        return graph.decode(self(moved, graph.index.to(device)))

    # --- disk ---------------------------------------------------------------------------------

    def save(self, folder: str | Path, about: Mapping[str, Any], force: bool = False) -> Path:
        """Write the folder, whole or not at all.

        Args:
            folder: where.
            about: plain data on how it was trained, for the reader.
            force: replace what is there.
        """
        with whole_folder(Path(folder), force) as place:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, place / TENSORS)
            shape = self.shape.model_dump(mode="json")
            write_json(place / DOCUMENT, {"format": FORMAT, "shape": shape, "about": dict(about)})
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Metanetwork:
        """Read what `save` wrote.

        Raises:
            PlanError: no metanetwork is there, or it is damaged.
        """
        document, file = read_json(Path(folder) / DOCUMENT), Path(folder) / TENSORS
        try:
            if document["format"] != FORMAT:
                raise PlanError(f"'{folder}' is not a metanetwork of format {FORMAT}")
            found = cls(Shape(**document["shape"]))
            found.load_state_dict(load_file(file))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PlanError(f"'{folder}' holds no whole metanetwork: {type(error).__name__} {error}") from error
        return found.eval().requires_grad_(False)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
