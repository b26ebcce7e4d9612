"""Response curves against plain forward passes of a copied model."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError, NumericsError
from secateur.core.fingerprint import digests
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.stats.responses import Probe, response_curves
from secateur.structure.sites import weight_layers


class Branched(nn.Module):
    """A shared layer that is called twice, writes in place, a skip, a depthwise convolution, batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.shared = nn.Conv2d(4, 4, 1)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        y = self.depthwise(x).add_(1)
        x = x + y + self.shared(y)
        x += self.shared(x)
        return self.head(x.mean((2, 3)))


def branched():
    torch.manual_seed(0)
    model = Branched()
    with torch.no_grad():  # a batch norm that has seen something
        model(torch.randn(64, 2, 6, 6) * 2 + 1)
    return model


def data(samples=7):
    return torch.randn(samples, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def curves(model, batches, resolution=6, **settings):
    return response_curves(model, weight_layers(model).layers, batches, resolution, Silent(), **settings)


def by_hand(model, name, removed, inputs):
    """Per-sample errors of a pruned copy, float64."""
    model, dense = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    weight = dict(model.named_parameters())[name]
    order = sorted(range(weight.numel()), key=lambda i: (abs(float(weight.detach().flatten()[i])), i))
    with torch.no_grad():
        for i in order[:removed]:
            weight.view(-1)[i] = 0
        return (model(inputs) - dense(inputs)).double().square().mean(1)


@pytest.mark.parametrize("worst_case", [True, False])
def test_curves_are_errors_of_the_network_s_output(worst_case):
    model, inputs = branched(), data()
    found = curves(model, [Batch((inputs[:3],)), Batch((inputs[3:],))], worst_case=worst_case)
    assert found.unreached == ["unused.weight"]
    assert set(found.curves) == {"stem.weight", "depthwise.weight", "shared.weight", "head.weight"}
    for name, curve in found.curves.items():
        size = dict(model.named_parameters())[name].numel()
        assert curve.removed == [d * size // 6 for d in range(7)]
        errors = [by_hand(model, name, count, inputs) for count in curve.removed]
        expected = [float(e.max() if worst_case else e.mean()) for e in errors]
        assert curve.distortions == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert curve.distortions[0] == 0 < curve.distortions[-1]


def test_the_model_is_left_bit_for_bit_as_it_was():
    model = branched().train()
    model.shared.forward = model.shared.forward  # an own forward, as wrappers set it, stays too
    own = model.shared.forward
    model.stem.weight.data[0, 0, 0, 0] = -0.0
    before = digests(model.state_dict())
    curves(model, [Batch((data(),))])
    assert digests(model.state_dict()) == before
    assert vars(model.shared)["forward"] is own
    assert not any("forward" in vars(part) for part in model.modules() if part is not model.shared)
    assert all(part.training for part in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("breaks", ["while probing", "at once"])
def test_it_is_left_as_it_was_when_the_model_fails(breaks):
    model, calls = branched(), []

    def hook(*_):
        calls.append(1)
        if len(calls) > (3 if breaks == "while probing" else 0):
            raise RuntimeError("out of luck")

    handle, before = model.head.register_forward_pre_hook(hook), digests(model.state_dict())
    with pytest.raises(ModelError, match="out of luck"):
        curves(model, [Batch((data(),))])
    handle.remove()
    assert digests(model.state_dict()) == before
    assert not any("forward" in vars(part) for part in model.modules())


def test_batch_norm_runs_on_its_statistics_even_in_a_model_in_train_mode():
    model, inputs = branched(), data()
    training = curves(model.train(), [Batch((inputs,))])
    assert training == curves(model.eval(), [Batch((inputs,))])


def test_tied_weights_are_probed_once_at_every_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    inputs = torch.randn(5, 4)
    found = curves(model, [Batch((inputs,))]).curves
    assert list(found) == ["0.weight", "3.weight"]
    expected = [float(by_hand(model, "0.weight", count, inputs).max()) for count in found["0.weight"].removed]
    assert found["0.weight"].distortions == pytest.approx(expected, rel=1e-5)


def test_zeros_go_first_and_cost_nothing():
    model = branched()
    with torch.no_grad():
        model.head.weight.view(-1)[::2] = 0
    curve = curves(model, [Batch((data(),))]).curves["head.weight"]
    assert curve.removed == [10, 10, 10, 10, 13, 16, 20]
    assert curve.distortions[:4] == [0.0] * 4
    assert curve.distortions[4] > 0


class Functional(nn.Module):
    """Uses a layer's weight before the layer is called, which no call of a module shows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x @ self.second.weight).tanh()
        x = x + self.attention(x, x, x)[0]
        return self.second(x).mean(1)


def test_weights_that_are_used_unseen_are_measured_in_full():
    torch.manual_seed(0)
    model, inputs = Functional(), torch.randn(4, 3, 4)
    found = curves(model, [Batch((inputs,))])
    assert "attention.out_proj.weight" in found.curves
    assert not found.unreached
    for name, curve in found.curves.items():
        expected = [float(by_hand(model, name, count, inputs).max()) for count in curve.removed]
        assert curve.distortions == pytest.approx(expected, rel=1e-4, abs=1e-9), name


def test_layers_before_the_probed_one_are_not_computed_again():
    model, counts = branched().eval(), {"stem": 0, "head": 0}
    layers = weight_layers(model).layers
    with torch.no_grad():
        for name in counts:
            part = model.get_submodule(name)

            def counted(x, name=name, part=part):
                counts[name] += 1
                return type(part).forward(part, x)

            part.forward = counted
        with Probe(model, Batch((data(),))) as probe:
            counts.update(stem=0, head=0)
            probe.errors(layers["head.weight"], [0, 5, 10, 15])
    assert counts == {"stem": 1, "head": 5}  # 3 amounts, and other weights with and without replay


def test_errors_name_what_is_wrong():
    model = branched()
    with pytest.raises(DataError, match="at least 2 calibration samples, got 1"):
        curves(model, [Batch((data(1),))])
    with pytest.raises(NumericsError, match="before anything is pruned"):
        curves(model, [Batch((data() * torch.inf,))])
    assert not any("forward" in vars(part) for part in model.modules())


def test_an_output_that_is_no_number_any_more_is_infinitely_wrong():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x / x.norm(dim=1, keepdim=True)

    torch.manual_seed(0)
    curve = curves(Normed(), [Batch((torch.randn(5, 4),))], 4).curves["layer.weight"]
    assert curve.distortions[-1] == torch.inf
    assert curve.distortions[0] == 0 < curve.distortions[1] < torch.inf


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(1, 6), seed=st.integers(0, 99))
def test_how_samples_are_batched_does_not_matter(cut, seed):
    torch.manual_seed(seed)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(7, 3)
    for worst_case in (True, False):
        whole = curves(model, [Batch((inputs,))], worst_case=worst_case).curves
        parts = curves(model, [Batch((inputs[:cut],)), Batch((inputs[cut:],))], worst_case=worst_case).curves
        for name in whole:
            assert parts[name].distortions == pytest.approx(whole[name].distortions, rel=1e-3, abs=1e-9)
