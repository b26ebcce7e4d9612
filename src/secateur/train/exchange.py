"""Messages between the nodes of a network's graph, by torch-geometric (`pip install 'secateur[graph]'`)."""

from __future__ import annotations

from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

AGGREGATIONS = ["mean", "std", "max", "min"]


def mapped(width: int) -> nn.Sequential:
    """A linear map and SiLU."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU())


class Exchange(MessagePassing):  # type: ignore[misc]
    """Messages along edges, and what edges take from their two ends (Liu, Wang, Zhang 2025; principal aggregation).

    With h nodes, e edges from j to i, all products by element:

        m_ij = lin2(h)_i * lin1(h)_j * e_ij,  nodes: W [mean, std, max, min of m over incoming edges],
        edges: lin3(h)_j * lin4(h)_i * e_ij

    The standard deviation is that of all incoming messages, 0 below the root of 1e-5.

    Args:
        width: of nodes and edges.
    """

    def __init__(self, width: int):
        super().__init__(aggr=AGGREGATIONS, flow="source_to_target", node_dim=-2)
        self.lin1, self.lin2, self.lin3, self.lin4 = (mapped(width) for _ in range(4))
        self.down = nn.Linear(len(AGGREGATIONS) * width, width)

    def forward(self, nodes: Tensor, index: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to nodes `[nodes, width]` and edges `[edges, width]`; `index` `[2, edges]`: from, to."""
        gathered = self.propagate(index, x=self.lin1(nodes), z=self.lin2(nodes), edge_attr=edges)
        return self.down(gathered), self.lin3(nodes)[index[0]] * self.lin4(nodes)[index[1]] * edges

    def message(self, z_i: Tensor, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        """One message per edge."""
        return z_i * x_j * edge_attr
