"""Networks as graphs: by hand, there and back bit for bit, and everything else refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import zoo
from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.lab.cifar import CifarResNet
from secateur.structure.graph import Family, Features, graph_of
from secateur.zoo.vision import ResidualBlock

GRAY, COLOUR = Batch((torch.rand(2, 1, 8, 8),)), Batch((torch.rand(2, 3, 32, 32),))


def settled(model):
    """Statistics, scales and biases that are not their defaults."""
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return model.eval()


def residual(head=None):
    return settled(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            ResidualBlock(4, 4), ResidualBlock(4, 6, 2), ResidualBlock(6, 6),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), head or nn.Linear(6, 10),
        )
    )  # fmt: skip


def plain():
    """VGG's form: convolutions with bias and norm, pooling, two linear layers."""
    return settled(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(4),
            nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3),
        )
    )  # fmt: skip


class Bottleneck(nn.Module):
    """As in torchvision: 1x1, 3x3, 1x1; the shortcut runs first if asked."""

    def __init__(self, inputs, inner, outputs, stride=1, early=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.early, self.downsample = nn.ReLU(inplace=True), early, None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        side = self.downsample(x) if self.early and self.downsample is not None else x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if not self.early and self.downsample is not None:
            side = self.downsample(x)
        y += side
        return self.relu(y)


def large(early=False):
    """ResNet-50's form: a 7x7 stem, max pooling, bottlenecks."""
    return settled(
        nn.Sequential(
            nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
            Bottleneck(4, 3, 8, early=early), Bottleneck(8, 3, 8), Bottleneck(8, 4, 12, 2, early=early),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(12, 7),
        )
    )  # fmt: skip


def positions():
    """A classifier that reads every position: 16 weights for each pair."""
    return settled(nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))


NETWORKS = {
    "digits-resnet": (lambda: zoo.load_model("digits-resnet"), GRAY),
    "residual": (residual, GRAY),
    "plain": (plain, GRAY),
    "large": (large, COLOUR),
    "early": (lambda: large(early=True), COLOUR),
    "positions": (positions, GRAY),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_bit_for_bit(name):
    make, images = NETWORKS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    graph = graph_of(model, images)
    found = graph.decode(graph.encode(model.state_dict()))
    parameters = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(torch.equal(found[n], p) and found[n].shape == p.shape for n, p in parameters.items())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert graph.index.shape[1] == sum(graph.edges)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_number_has_a_place_of_its_own(name):
    """Another value anywhere in the features changes at most one parameter; each parameter is changed by some."""
    make, images = NETWORKS[name]
    graph = graph_of(make(), images)
    features = graph.encode(make().state_dict())
    marked = Features(
        torch.arange(features.nodes.numel()).double().view_as(features.nodes),
        tuple(torch.arange(e.numel()).double().view_as(e) + 10**6 * (k + 1) for k, e in enumerate(features.edges)),
    )
    numbers = torch.cat([value.flatten() for value in graph.decode(marked).values()])
    assert len(numbers.unique()) == len(numbers) == sum(p.numel() for p in make().parameters())


def test_a_small_network_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(2, 3))  # fmt: skip
    settled(model)
    graph = graph_of(model, GRAY)
    features = graph.encode(model.state_dict())
    norm, head = model[1], model[5]
    assert graph.family == Family(5, (9,))
    assert graph.index.tolist() == [[1, 2, 3, 3, 4, 4, 5, 5], [0, 0, 1, 2, 1, 2, 1, 2]]
    assert features.nodes[0].tolist() == [1, 0, 0, 1, 0]
    for k in range(2):
        own = [float(t.detach()[k]) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
        assert features.nodes[1 + k].tolist() == [*own, 0]
    assert torch.equal(features.nodes[3:, 4], head.bias)
    assert features.nodes[3:, :4].tolist() == [[1, 0, 0, 1]] * 3
    edges = features.edges[0]
    assert torch.equal(edges[:2], model[0].weight.flatten(1))
    assert torch.equal(edges[2:, 4].view(3, 2), head.weight)
    assert not edges[2:, [0, 1, 2, 3, 5, 6, 7, 8]].any()


def test_residual_sums_by_hand():
    model = residual()
    graph = graph_of(model, GRAY)
    features, edges = graph.encode(model.state_dict()), {}
    for column, (output, source) in enumerate(graph.index.T.tolist()):
        edges.setdefault((output, source), []).append(features.edges[0][column])
    starts = {"stem": 1, "3.conv1": 5, "3.conv2": 9, "4.conv1": 13, "4.conv2": 19}
    for i in range(4):
        for j in range(4):  # an unchanged input
            one = edges[starts["3.conv2"] + i, starts["stem"] + j]
            assert len(one) == 1
            assert one[0].tolist() == [0, 0, 0, 0, float(i == j), 0, 0, 0, 0]
    shortcut = model[4].shortcut
    for i in range(6):
        for j in range(4):
            assert edges[starts["4.conv2"] + i, starts["3.conv2"] + j][0][4] == shortcut[0].weight[i, j, 0, 0]
    norm = torch.stack([shortcut[1].weight, shortcut[1].bias, shortcut[1].running_mean, shortcut[1].running_var], 1)
    assert torch.equal(features.nodes[19:25, 4:], norm)
    assert features.nodes[13:19, 4:].tolist() == [[1, 0, 0, 1]] * 6
    assert torch.equal(features.nodes[-10:, 1], model[-1].bias)


def test_other_kernels_are_types_of_their_own():
    graph = graph_of(large(), COLOUR)
    assert graph.family == Family(8, (49, 9, 1))
    assert graph.edges[0] == 3 * 4
    assert graph.edges[1] == 3 * 3 + 3 * 3 + 4 * 4
    widths = 4 * 3 + 3 * 8 + 4 * 8 + 8 * 3 + 3 * 8 + 8 * 4 + 4 * 12 + 8 * 12 + 12 * 7
    assert graph.edges[2] == widths + 8  # and one edge for each unchanged channel
    assert [len(ones) for _, _, ones in graph.identities] == [8]


def test_shortcuts_padded_with_zeros_are_edges_of_equal_channels():
    model = settled(CifarResNet(2, 4))
    graph = graph_of(model, COLOUR)
    features = graph.encode(model.state_dict())
    assert graph.family == Family(8, (9,))
    assert len(graph.identities) == 6
    kind, rows, _ = graph.identities[2]  # the first block of the second stage: 4 channels into the middle of 8
    outputs, inputs = graph.index[:, rows]
    held = features.edges[kind][rows]
    assert held[:, 4].tolist() == [
        float(o - outputs[0] == i - inputs[0] + 2) for o, i in zip(outputs, inputs, strict=True)
    ]
    assert held.sum() == 4
    found = graph.decode(features)
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


def test_when_the_shortcut_runs_does_not_matter():
    model = large()
    other = large(early=True)
    other.load_state_dict(model.state_dict())
    first, second = graph_of(model, COLOUR), graph_of(other, COLOUR)
    assert torch.equal(first.index, second.index)
    for a, b in zip(first.encode(model.state_dict()).edges, second.encode(other.state_dict()).edges, strict=True):
        assert torch.equal(a, b)


def test_running_statistics_padding_and_identities_are_never_read():
    model = residual()
    graph = graph_of(model, GRAY)
    features = graph.encode(model.state_dict())
    placed = {slot.name for slot in graph.slots}
    assert any(name.endswith("running_mean") for name in placed)
    kind, rows, _ = graph.identities[0]
    features.edges[kind][rows] = 7
    features.nodes[:, [2, 3, 6, 7]] = 7
    found = graph.decode(features)
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


class Stemmed(nn.Module):
    """The block's input is a 1x1 convolution, as bare as a shortcut's: it is no shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.c1, self.c2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head((x + self.c2(F.relu(self.c1(x)))).mean((2, 3)))


def test_what_a_block_reads_is_its_unchanged_input_whatever_made_it():
    model = settled(Stemmed())
    graph = graph_of(model, GRAY)
    assert graph.total == 1 + 4 + 4 + 4 + 3
    (identity,) = graph.identities
    outputs, inputs = graph.index[:, identity[1]]
    assert sorted(set(outputs.tolist())) == [9, 10, 11, 12]
    assert sorted(set(inputs.tolist())) == [1, 2, 3, 4]
    found = graph.decode(graph.encode(model.state_dict()))
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("dims", [1, -3, (1,), (1, 2), (-3, -1)])
@pytest.mark.parametrize("how", ["mean", "amax"])
def test_channels_that_are_averaged_are_none_any_more(dims, how):
    """Also where as many rows as channels are left."""

    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, padding=1)
            self.head = nn.Linear(64 if dims in (1, -3, (1,)) else 8, 3)

        def forward(self, x):
            return self.head(getattr(self.conv(x), how)(dims).flatten(1))

    with pytest.raises(ModelError, match=f"computes {how} over samples or channels"):
        graph_of(Averaging(), GRAY)


def test_reductions_over_positions_are_pooling():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.conv(x).mean(dim=[-1, -2], keepdim=False))

    assert graph_of(Pooled(), GRAY).total == 1 + 8 + 3


def test_norms_of_higher_precision_lose_nothing():
    model = residual().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
            module.weight.data.add_(1e-4)
    graph = graph_of(residual(), GRAY)
    found = graph.decode(graph.encode(model.state_dict()))
    assert all(torch.equal(found[name].to(p.dtype), p) for name, p in model.named_parameters())


def test_a_pruned_network_has_a_graph_too():
    model = sc.apply_(residual(), sc.plan(residual(), "channel_norm", 0.5, example=GRAY, multiple=1))
    graph = graph_of(model, GRAY)
    found = graph.decode(graph.encode(model.state_dict()))
    assert graph.total < graph_of(residual(), GRAY).total
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


def test_gradients_flow_back_to_the_features():
    model = plain()
    graph = graph_of(model, GRAY)
    given = graph.encode(model.state_dict())
    leaf = Features(given.nodes.requires_grad_(), tuple(edges.requires_grad_() for edges in given.edges))
    torch.stack([value.sum() for value in graph.decode(leaf).values()]).sum().backward()
    assert leaf.edges[0].grad.sum() == sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1)
    assert leaf.nodes.grad[:, 2:4].abs().sum() == 0


class Joined(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.join, self.head = join, nn.Linear(4, 3)

    def forward(self, x):
        a = self.a(x)
        y = self.join(a, self.b(F.relu(a)))
        return self.head(y.mean((2, 3))[:, :4] if y.shape[1] > 4 else y.mean((2, 3)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(1, 2)

    def forward(self, x):
        return self.head(self.conv(self.conv(x)).mean((2, 3)))


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(1, 4, 3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def seq(*layers):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers)


REFUSED = {
    "grouped": (seq(nn.Conv2d(4, 4, 3, groups=2)), r"'1' computes a grouped convolution"),
    "transposed": (seq(nn.ConvTranspose2d(4, 4, 3)), r"'1' computes conv_transpose2d"),
    "even kernel": (seq(nn.Conv2d(4, 4, 2)), r"'1' computes a convolution with a kernel of 2x2"),
    "oblong kernel": (seq(nn.Conv2d(4, 4, (1, 3))), r"'1' computes a convolution with a kernel of 1x3"),
    "layer norm": (seq(nn.LayerNorm(8)), r"'1' computes layer_norm"),
    "group norm": (seq(nn.GroupNorm(2, 4)), r"'1' computes group_norm"),
    "norm first": (seq(nn.ReLU(), nn.BatchNorm2d(4)), r"'2' computes batch norm that does not follow a layer directly"),
    "two norms": (seq(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), r"'2' computes batch norm that does not follow"),
    "attention": (seq(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 8)), r"'2(\.\w+)*' computes \w+"),
    "prelu": (seq(nn.PReLU()), r"'1' computes prelu"),
    "softmax": (seq(nn.Softmax(1)), r"'1' computes softmax"),
    "linear on maps": (seq(nn.Linear(8, 3)), r"'1' computes a linear layer on inputs of 4 dimensions"),
    "concatenated": (Joined(lambda a, b: torch.cat([a, b], 1)), r"'Joined' computes cat, behind 'b'"),
    "gated": (Joined(lambda a, b: a * b), r"'Joined' computes mul, behind 'b'"),
    "scaled": (Joined(lambda a, b: a + 0.5 * b), r"'Joined' computes (mul|__mul__|__rmul__), behind 'b'"),
    "transposed maps": (Joined(lambda a, b: b.transpose(1, 2)), r"'Joined' computes transpose, behind 'b'"),
    "shuffled": (
        Joined(lambda a, b: a + b[:, torch.tensor([1, 0, 2, 3])]),
        "'Joined' computes __getitem__, behind 'b'",
    ),
    "half": (Joined(lambda a, b: a + F.pad(b[:, :2], (0, 0, 0, 0, 0, 2))), "'Joined' computes __getitem__, behind 'b'"),
    "padded maps": (Joined(lambda a, b: F.pad(b, (1, 1, 1, 1))), "'Joined' computes pad, behind 'b'"),
    "padded with ones": (Joined(lambda a, b: F.pad(b, (0, 0, 0, 0, 0, 2), value=1.0)), "'Joined' computes pad"),
    "padded and read": (
        Joined(lambda a, b: F.pad(b, (0, 0, 0, 0, 0, 2))),
        "computes mean on channels padded with zeros",
    ),
    "padded main": (
        Joined(lambda a, b: F.pad(a, (0, 0, 0, 0, 0, 2)) + F.pad(b, (0, 0, 0, 0, 2, 0))),
        "a sum of other things than a layer's channels",
    ),
    "added thrice": (Joined(lambda a, b: a + b + a), r"a sum of three and more, 'b' among them"),
    "twice": (Twice(), r"'conv' runs twice"),
    "idle": (Idle(), r"parameter 'scale' of Idle has no place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_refused_by_name(name):
    model, message = REFUSED[name]
    with pytest.raises(ModelError, match=message) as error:
        graph_of(model, GRAY)
    assert "\n" not in str(error.value)


def test_a_bias_beside_a_norm_has_no_place_in_residual_networks():
    model = residual()
    model[3].conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=True)
    with pytest.raises(ModelError, match=r"'3\.conv1' has a bias beside its batch norm '3\.norm1'"):
        graph_of(model, GRAY)


def test_other_inputs_are_refused():
    with pytest.raises(ModelError, match="must take one tensor of images and nothing else"):
        graph_of(plain(), Batch(kwargs={"x": GRAY.args[0]}))
    with pytest.raises(ModelError, match="cannot be run on inputs of shape"):
        graph_of(plain(), COLOUR)


def test_no_hook_is_left_behind():
    before = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    with pytest.raises(ModelError):
        graph_of(REFUSED["gated"][0], GRAY)
    assert before == (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks))
