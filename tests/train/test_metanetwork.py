"""The metanetwork: against loops written out, equivariance, direction, the residual form, folders; its gradient."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.budget import Budget
from secateur.core.errors import MissingExtraError, ModelError, NumericsError, PlanError
from secateur.core.method import Batch
from secateur.scores.growing import group_norms, growing_factors, growing_gradient, member_weights
from secateur.structure.analysis import analyse
from secateur.structure.graph import Features, graph_of
from secateur.train.meta import MetaSettings, MetaTraining, Subject, meta_gradient, task_gradient
from secateur.train.metanetwork import Metanetwork, Shape
from secateur.train.study import Study
from secateur.zoo.vision import ResidualBlock

IMAGES = Batch((torch.rand(2, 1, 8, 8),))
SETTINGS = MetaSettings(layers=2, width=6, node_ratio=0.05, edge_ratio=0.05, reg=0.5, batch=10)


def network(seed=0):
    """Two residual blocks with statistics that are not their defaults."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        ResidualBlock(4, 4), ResidualBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.2)
    return model.eval()


def metanetwork(seed=0, **changes):
    torch.manual_seed(seed)
    given = {"node": 8, "edges": (9,), "layers": 2, "width": 6, "node_ratio": 0.05, "edge_ratio": 0.05}
    return Metanetwork(Shape(**(given | changes)))


def subject(model=None):
    model = network() if model is None else model
    images = Batch((IMAGES.args[0].to(model[0].weight.dtype),))
    return Subject(model, graph_of(model, images), analyse(model, images).sites)


def batches(count=3):
    rng = torch.Generator().manual_seed(5)
    return [
        Batch((torch.rand(7, 1, 8, 8, generator=rng),), target=torch.randint(3, (7,), generator=rng))
        for _ in range(count)
    ]


def random_graph(nodes=7, seed=0, dtype=torch.float64):
    """Edges that are no layers at all: the metanetwork knows only graphs."""
    rng = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([(o, i) for o in range(3, nodes) for i in range(3)] + [(6, 5), (6, 4)])
    values = [torch.randn(*shape, generator=rng, dtype=dtype) for shape in ((nodes, 8), (len(pairs), 9))]
    return Features(values[0], (values[1],)), pairs.T


# --- the forward pass -------------------------------------------------------------------------------


def by_hand(net, given, index):
    """Loops over edges and nodes, nothing of torch-geometric."""

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def exchange(own, h, ends, e):
        lin = [F.silu(part[0](h)) for part in (own.lin1, own.lin2, own.lin3, own.lin4)]
        edges = torch.stack([lin[2][j] * lin[3][i] * e[k] for k, (j, i) in enumerate(ends)])
        gathered = []
        for node in range(len(h)):
            messages = [lin[1][node] * lin[0][j] * e[k] for k, (j, i) in enumerate(ends) if i == node]
            if not messages:
                gathered.append(h.new_zeros(4 * h.shape[1]))
                continue
            m = torch.stack(messages)
            variance = m.square().mean(0) - m.mean(0).square()
            deviation = torch.where(variance <= 1e-5, torch.zeros_like(variance), variance.clamp_min(1e-5).sqrt())
            gathered.append(torch.cat([m.mean(0), deviation, m.amax(0), m.amin(0)]))
        return own.down(torch.stack(gathered)), edges

    s = torch.tensor([1.0] * (net.shape.width // 2) + [-1.0] * (net.shape.width - net.shape.width // 2)).double()
    h, e = net.node_encoder(given.nodes), net.edge_encoders[0](given.edges[0])
    ends = [tuple(pair) for pair in index.T.tolist()]
    for own in net.exchanges:
        nodes, edges = exchange(own, norm(h), ends, e)
        nodes_back, edges_back = exchange(own, norm(h), [(i, j) for j, i in ends], s * e)
        h, e = h + nodes + nodes_back, e + edges + s * edges_back
    return Features(
        given.nodes + net.shape.node_ratio * net.node_decoder(norm(h)),
        (given.edges[0] + net.shape.edge_ratio * net.edge_decoders[0](norm(e)),),
    )


@pytest.mark.parametrize("width", [6, 7])
def test_the_forward_pass_is_the_formula(width):
    net = metanetwork(width=width, layers=3).double()
    given, index = random_graph()
    with torch.no_grad():
        found, expected = net(given, index), by_hand(net, given, index)
    torch.testing.assert_close(found.nodes, expected.nodes, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.edges[0], expected.edges[0], atol=1e-12, rtol=0)


def test_parameters_are_those_of_the_paper_without_the_unused_ones():
    net = metanetwork(layers=8, width=64, node_ratio=0.01, edge_ratio=0.01)
    assert sum(p.numel() for p in net.parameters()) == 308_625 - 33_280


def test_the_sign_vector_tells_directions_apart():
    net = metanetwork().double()
    given, index = random_graph()
    with torch.no_grad():
        there, back = net(given, index), net(given, index.flip(0))
        assert (there.nodes - back.nodes).abs().max() > 1e-4
        net.signs.fill_(1)  # without it a graph and its reverse are one
        there, back = net(given, index), net(given, index.flip(0))
    torch.testing.assert_close(there.nodes, back.nodes, atol=1e-12, rtol=0)
    torch.testing.assert_close(there.edges[0], back.edges[0], atol=1e-12, rtol=0)


def test_ratios_weigh_what_is_added_and_inputs_stay():
    given, index = random_graph()
    before = copy.deepcopy((given.nodes, given.edges[0]))
    with torch.no_grad():
        small, large = (metanetwork(node_ratio=r, edge_ratio=r).double()(given, index) for r in (0.01, 0.1))
    assert torch.equal(given.nodes, before[0])
    assert torch.equal(given.edges[0], before[1])
    torch.testing.assert_close(10 * (small.nodes - given.nodes), large.nodes - given.nodes)
    torch.testing.assert_close(10 * (small.edges[0] - before[1]), large.edges[0] - before[1])
    assert 0 < (small.edges[0] - before[1]).abs().max() < 0.05


def permuted(model, seed=1):
    """The same function with its hidden channels in another order, and site -> order."""
    other, orders = copy.deepcopy(model), {}
    tensors = other.state_dict()
    with torch.no_grad():
        for name, site in analyse(model, IMAGES).sites.items():
            orders[name] = torch.randperm(site.units, generator=torch.Generator().manual_seed(seed))
            for place in site.occurrences:
                tensors[place.parameter].copy_(tensors[place.parameter].index_select(place.dim, orders[name]))
    return other, orders


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_permuted_channels_come_out_permuted_alike(dtype, tolerance):
    model, net = network().to(dtype), metanetwork().to(dtype)
    images = Batch((IMAGES.args[0].to(dtype),))
    other = permuted(network())[0].to(dtype)
    with torch.no_grad():
        assert torch.allclose(model(images.args[0]), other(images.args[0]), atol=1e-5), "it is the same function"
        assert not torch.equal(model[0].weight, other[0].weight)
        found = net.changed(graph_of(model, images), model.state_dict())
        expected = copy.deepcopy(model)
        expected.load_state_dict(model.state_dict() | found)
        expected = permuted(expected.float())[0].to(dtype) if dtype is torch.float32 else _permuted_double(expected)
        of_other = net.changed(graph_of(other, images), other.state_dict())
    state = expected.state_dict()
    assert any(not torch.equal(found[name], model.state_dict()[name]) for name in found)
    for name, value in of_other.items():
        assert (value - state[name]).abs().max() <= tolerance, name


def _permuted_double(model):
    _, orders = permuted(network())
    with torch.no_grad():
        for name, site in analyse(network(), IMAGES).sites.items():
            for place in site.occurrences:
                tensor = model.state_dict()[place.parameter]
                tensor.copy_(tensor.index_select(place.dim, orders[name]))
    return model


@pytest.mark.parametrize("seed", [0, 3])
def test_where_kernels_differ_every_edge_has_its_own_weights(seed):
    """Hidden channels of a bottleneck network in another order: edges under the wrong ends would show."""
    torch.manual_seed(seed)
    model = Bottlenecks().double().eval()
    images = Batch((torch.rand(1, 3, 16, 16, dtype=torch.float64),))
    other = copy.deepcopy(model)
    order = torch.randperm(3)
    with torch.no_grad():
        for name, dim in (("conv1.weight", 0), ("bn1.weight", 0), ("bn1.bias", 0), ("conv2.weight", 1)):
            value = other.get_parameter(name)
            value.copy_(value.index_select(dim, order))
        net = metanetwork(edges=(49, 9, 1)).double()
        assert torch.allclose(model(*images.args), other(*images.args))
        assert graph_of(model, images).family.edges == (49, 9, 1)
        found, moved = (net.changed(graph_of(one, images), one.state_dict()) for one in (model, other))
    for name, value in found.items():
        dims = {"conv1.weight": 0, "bn1.weight": 0, "bn1.bias": 0, "conv2.weight": 1}
        expected = value.index_select(dims[name], order) if name in dims else value
        torch.testing.assert_close(moved[name], expected, rtol=0, atol=1e-9)


class Bottlenecks(nn.Module):
    """A 7x7 stem and a bottleneck with an unchanged input."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv3, self.bn3 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return self.head(F.relu(x + self.bn3(self.conv3(y))).mean((2, 3)))


def test_types_of_edges_have_encoders_of_their_own():
    net = metanetwork(edges=(49, 9, 1)).double()
    rng = torch.Generator().manual_seed(0)
    edges = tuple(torch.randn(n, size, generator=rng, dtype=torch.float64) for n, size in ((2, 49), (3, 9), (4, 1)))
    index = torch.tensor([[1, 2, 3, 3, 3, 4, 4, 4, 4], [0, 0, 0, 1, 2, 0, 1, 2, 3]])
    nodes = torch.randn(5, 8, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        found = net(Features(nodes, edges), index)
    assert [tuple(own.shape) for own in found.edges] == [(2, 49), (3, 9), (4, 1)]
    assert all((new - old).abs().max() > 0 for new, old in zip(found.edges, edges, strict=True))


def test_another_family_is_refused():
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    with pytest.raises(ModelError, match="5 node features, edges of 9 weights, the metanetwork was made for 8"):
        metanetwork().changed(graph_of(plain, IMAGES), plain.state_dict())


def test_folders_hold_no_pickle_and_come_back_equal(tmp_path):
    net, model = metanetwork(), network()
    net.save(tmp_path / "net", {"epoch": 3})
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["metanetwork.json", "metanetwork.safetensors"]
    again = Metanetwork.load(tmp_path / "net")
    assert not any(p.requires_grad for p in again.parameters())
    one, other = (n.changed(graph_of(model, IMAGES), model.state_dict()) for n in (net, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "net" / "metanetwork.safetensors").write_bytes(b"broken")
    with pytest.raises(PlanError, match="no whole metanetwork"):
        Metanetwork.load(tmp_path / "net")
    with pytest.raises(PlanError, match="does not exist"):
        Metanetwork.load(tmp_path / "none")


def test_without_torch_geometric_its_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "secateur.train.exchange", raising=False)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(
        MissingExtraError, match=r"needs the package 'torch-geometric': pip install 'secateur\[graph\]'"
    ):
        metanetwork()


# --- the growing gradient -----------------------------------------------------------------------------


def test_norms_and_gradient_by_loops():
    model = network()
    sites, members = analyse(model, IMAGES).sites, member_weights(model)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    norms = group_norms(sites, tensors, members)
    expected = {name: torch.zeros_like(tensors[name]) for name in members}
    for name, site in sites.items():
        own = [place for place in site.occurrences if place.parameter in members]
        assert any(place.dim == 1 for place in own), "layers that read the units belong to them"
        importance = [
            sum(float(tensors[p.parameter].select(p.dim, k).square().sum()) for p in own) / len(own)
            for k in range(site.units)
        ]
        assert norms[name].tolist() == pytest.approx(importance, rel=1e-5)
        u = [one**0.5 for one in importance]
        for k in range(site.units):
            gamma = 16 ** ((max(u) - u[k]) / (max(u) - min(u)))
            for p in own:
                expected[p.parameter].select(p.dim, k).add_(0.3 * gamma * tensors[p.parameter].select(p.dim, k))
    found = growing_gradient(sites, tensors, members, strength=0.3)
    assert not any(name.endswith("bias") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, rtol=1e-4, atol=1e-6)


def test_gamma_grows_for_small_units_and_is_left_out_where_all_are_equal():
    assert growing_factors(torch.tensor([1.0, 4.0, 9.0]), 16).tolist() == pytest.approx([16, 4, 1])
    assert growing_factors(torch.tensor([2.0, 2.0]), 16) is None
    assert growing_factors(torch.tensor([3.0]), 16) is None
    assert growing_factors(torch.tensor([1.0, float("nan")]), 16) is None
    model = network()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    tensors = dict(model.named_parameters())
    assert growing_gradient(analyse(model, IMAGES).sites, tensors, member_weights(model), strength=1.0) == {}


def test_a_dead_unit_shrinks_fastest_and_makes_no_nan():
    model = network()
    with torch.no_grad():
        model[3].conv1.weight[1] = 0
        model[3].norm1.weight[1] = 0
        model[3].conv2.weight[:, 1] = 0
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    found = growing_gradient(analyse(model, IMAGES).sites, tensors, member_weights(model), strength=1.0)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not found["3.conv1.weight"][1].any()


# --- one step -----------------------------------------------------------------------------------------


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_one_product_gives_the_gradient_of_a_backward_pass_per_batch():
    one, net = subject(network().double()), metanetwork().double()
    data = [Batch((b.args[0].double(),), target=b.target) for b in batches()]
    meta_gradient(net, one, data, SETTINGS)
    found = gradients(net)
    net.zero_grad()
    weights = net.changed(one.graph, one.tensors)
    for batch in data:  # a graph that is kept, a pass through the metanetwork for every batch
        loss = F.cross_entropy(torch.func.functional_call(one.model, weights, batch.args).float(), batch.target)
        loss.backward(retain_graph=True)
    fixed = {name: value.detach() for name, value in weights.items()}
    sparse = growing_gradient(one.sites, fixed, one.members, strength=SETTINGS.reg, alpha=SETTINGS.alpha)
    torch.autograd.backward([weights[name] for name in sparse], list(sparse.values()))
    torch.testing.assert_close(found, gradients(net), rtol=1e-5, atol=1e-7)
    assert found.abs().max() > 1e-4


def test_gamma_is_a_constant_and_no_loss():
    """The sparse part is the product with fixed factors, not the derivative of sum gamma w^2 / 2."""
    one, net = subject(network().double()), metanetwork().double()
    meta_gradient(net, one, [], SETTINGS)
    found = gradients(net)
    net.zero_grad()
    weights = net.changed(one.graph, one.tensors)
    norms = group_norms(one.sites, weights, one.members)
    u = {name: value.double().sqrt() for name, value in norms.items()}
    assert not any(value.requires_grad for value in norms.values())
    total = sum(
        SETTINGS.reg / 2 * 16 ** ((u[name].max() - u[name][k]) / (u[name].max() - u[name].min()))
        * weights[p.parameter].select(p.dim, k).square().sum()
        for name, site in one.sites.items() for p in site.occurrences if p.parameter in one.members
        for k in range(site.units)
    )  # fmt: skip
    total.backward()
    torch.testing.assert_close(found, gradients(net), rtol=1e-4, atol=1e-6)


def test_the_network_its_statistics_and_its_modes_stay_as_they_were():
    one, net = subject(), metanetwork()
    one.model.train()
    before = copy.deepcopy(one.model.state_dict())
    meta_gradient(net, one, batches(), SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert all(part.training for part in one.model.modules())
    assert all(p.grad is None for p in one.model.parameters())


def test_the_order_of_networks_changes_no_forward_pass():
    net, models = metanetwork(), [network(seed) for seed in range(3)]
    with torch.no_grad():
        first = [net.changed(graph_of(m, IMAGES), m.state_dict()) for m in models]
        second = [net.changed(graph_of(m, IMAGES), m.state_dict()) for m in reversed(models)][::-1]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_an_infinite_loss_is_named():
    one = subject()
    weights = {name: value * float("nan") for name, value in one.model.named_parameters()}
    with pytest.raises(NumericsError, match="the metanetwork's weights is nan"):
        task_gradient(one.model, weights, batches(1))


def test_weights_whose_gradient_is_not_finite_are_left_out(monkeypatch):
    one, net = subject(), metanetwork()
    gradient = task_gradient

    def broken(model, weights, given):
        found, loss = gradient(model, weights, given)
        found["0.weight"] = torch.full_like(found["0.weight"], float("nan"))
        return found, loss

    monkeypatch.setattr("secateur.train.meta.task_gradient", broken)
    meta_gradient(net, one, batches(), SETTINGS)
    assert torch.isfinite(gradients(net)).all()
    assert gradients(net).abs().max() > 0
    every = {name: torch.full_like(p, float("nan")) for name, p in one.model.named_parameters()}
    monkeypatch.setattr("secateur.train.meta.task_gradient", lambda *given: (every, 0.0))
    with pytest.raises(NumericsError, match="no gradient of the network's weights is finite"):
        meta_gradient(net, one, batches(), SETTINGS)


def test_synchronised_norms_are_members_too():
    model = network()
    assert member_weights(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))) == member_weights(model)


def test_the_rate_drops_at_the_milestones():
    settings = MetaSettings(lr=1.0, milestones=(3, 5))
    assert [settings.rate(epoch) for epoch in (0, 2, 3, 4, 5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_each_network_has_one_step_an_epoch_with_one_batch_or_all(monkeypatch):
    seen = []

    def watched(net, one, given, settings):
        seen.append((subjects.index(one), len(given)))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        return {"task_loss": 0.0}

    monkeypatch.setattr("secateur.train.meta.meta_gradient", watched)
    subjects, data = [subject(network(seed)) for seed in range(3)], batches(4)
    for one_batch in (True, False):
        seen.clear()
        study = Study(network, None, 1, Budget(0.5))
        settings = SETTINGS.model_copy(update={"epochs": 2, "one_batch": one_batch})
        MetaTraining(study, subjects, data, settings).run()
        assert [sorted(number for number, _ in seen[i : i + 3]) for i in (0, 3)] == [[0, 1, 2], [0, 1, 2]]
        assert {count for _, count in seen} == {1 if one_batch else 4}
