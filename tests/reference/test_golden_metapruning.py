"""Meta pruning against the official code: the graph, the metanetwork's forward pass, the pruner's gradient."""

import json
from pathlib import Path

import metapruning_recipes as recipes
import pytest
import torch

from secateur.core.method import Batch
from secateur.scores.growing import growing_gradient, member_weights
from secateur.structure.analysis import analyse
from secateur.structure.graph import Features, graph_of
from secateur.train.metanetwork import Metanetwork, Shape

GOLDEN = json.loads((Path(__file__).parent / "golden_metapruning.json").read_text())
IMAGES = Batch((torch.zeros(2, 3, 32, 32),))


def test_the_graph_is_the_official_one_bit_for_bit():
    network = recipes.network()
    graph = graph_of(network, IMAGES)
    features = graph.encode(network.state_dict())
    assert [graph.total, graph.index.shape[1]] == GOLDEN["graph"]["sizes"]
    assert recipes.digest(graph.index) == GOLDEN["graph"]["index"]
    assert recipes.digest(features.nodes) == GOLDEN["graph"]["nodes"]
    assert recipes.digest(*features.edges) == GOLDEN["graph"]["edges"]


def test_the_metanetwork_computes_what_the_official_one_does():
    net = Metanetwork(Shape(**recipes.SHAPE)).double()
    state = net.state_dict()
    with torch.no_grad():
        recipes.fill({name: state[name] for name in sorted(state) if name != "signs"}, 33)
        nodes, index, edges = recipes.metanetwork_inputs()
        found = net(Features(nodes, (edges,)), index)
    expected = [torch.tensor(GOLDEN["forward"][name], dtype=torch.float64) for name in ("nodes", "edges")]
    assert (expected[0] - nodes).abs().max() > 1e-3, "the golden metanetwork changes something"
    torch.testing.assert_close(found.nodes, expected[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.edges[0], expected[1], atol=1e-12, rtol=0)


def test_the_growing_gradient_is_the_official_pruners():
    network = recipes.network(20)
    sites = analyse(network, IMAGES).sites
    tensors = {name: value.detach() for name, value in network.named_parameters()}
    found = growing_gradient(sites, tensors, member_weights(network), strength=10.0, alpha=16.0)
    assert {name for name, sums in GOLDEN["growing"].items() if any(sums)} == found.keys()
    for name, gradient in found.items():
        expected = GOLDEN["growing"][name]
        scale = float(gradient.abs().double().sum()) * max(1, gradient.numel())
        assert recipes.checksums(gradient) == pytest.approx(expected, abs=5e-6 * scale), name
