"""Batch norms folded into the layers that feed them, and every way in which that would be wrong."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from secateur import zoo
from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.shrink.fuse import NORMS, fuse_


def used(model):
    """Norms as after training: statistics, scales and shifts of their own; eval mode."""
    rng = torch.Generator().manual_seed(3)

    def draw(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)

    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, NORMS)):
            if norm.running_mean is not None:
                draw(norm.running_mean, -0.5, 0.5)
                draw(norm.running_var, 0.3, 2.0)
            if norm.affine:
                draw(norm.weight, -1.5, 1.5)
                draw(norm.bias, -0.5, 0.5)
    return model.eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution, a norm, and whatever a test does between and around them."""

    def __init__(self, way, conv=None, norm=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(2, 4, 3)
        self.norm = norm or nn.BatchNorm2d(4)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


PAIRS = {
    "conv1d": (nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), (3, 2, 9)),
    "conv2d": (nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (3, 2, 9, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2, dilation=2), nn.BatchNorm3d(4, eps=0.1), (2, 2, 5, 5, 5)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (3, 5)),
    "linear without bias": (nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False), (3, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), (2, 4, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(4, 3, 3), nn.BatchNorm1d(3), (2, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3), (2, 4, 5, 5)),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pair_of_every_kind_is_folded_and_gives_the_same(name):
    layer, norm, shape = copy.deepcopy(PAIRS[name])
    model, x = used(nn.Sequential(layer, norm, nn.ReLU())), images(*shape)
    before = model(x)
    fused = fuse_(model, Batch((x,)))
    assert fused.pairs == [("0", "1")]
    assert not fused.left
    assert isinstance(model[1], nn.Identity)
    assert not model[1].training
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert sum(parameter.numel() for parameter in model.parameters()) == layer.weight.numel() + len(layer.bias)


def test_fold_agrees_with_the_formula_by_hand():
    model = used(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.25)))
    linear, norm = model
    with torch.no_grad():
        for tensor, value in ((linear.weight, 3.0), (linear.bias, 1.0), (norm.weight, 2.0), (norm.bias, 5.0)):
            tensor.fill_(value)
        norm.running_mean.fill_(4.0)
        norm.running_var.fill_(2.0)
    fuse_(model, Batch((images(2, 1),)))
    assert linear.weight.item() == pytest.approx(3 * 2 / 1.5)  # sqrt(2 + 0.25) = 1.5
    assert linear.bias.item() == pytest.approx((1 - 4) * 2 / 1.5 + 5)


def test_shipped_residual_network_loses_all_norms_and_still_trains():
    model = zoo.load_model("digits-resnet")
    x = images(4, 1, 8, 8)
    before = model(x)
    fused = fuse_(model, Batch((x,)))
    assert len(fused.pairs) == 15
    assert ("stage2.0.shortcut.0", "stage2.0.shortcut.1") in fused.pairs
    assert not any(isinstance(module, NORMS) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_made_up_inputs_are_enough():
    assert len(fuse_(zoo.load_model("digits-resnet")).pairs) == 15


def test_frozen_layer_gets_a_frozen_bias():
    model = used(nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4))).requires_grad_(False)
    fuse_(model, Batch((images(1, 2, 4, 4),)))
    assert not model[0].bias.requires_grad


# --- left as they are -----------------------------------------------------------------------------


def _kept(self, x):
    self.seen = self.conv(x)
    return self.norm(self.seen)


def _twice(self, x):
    return self.norm(self.norm(self.conv(x)))


def _conv_twice(self, x):
    return self.norm(self.conv(x)) + self.conv(x + 1).mean()


def _in_place(self, x):
    return self.norm(self.conv(x).relu_())


def _changed_later(self, x):
    y = self.conv(x)
    out = self.norm(y)
    y.mul_(2)
    return out + y


WAYS = {
    "residual": (lambda s, x: s.norm(y := s.conv(x)) + y, "used elsewhere"),
    "also returned": (lambda s, x: (s.norm(y := s.conv(x)), y), "used elsewhere"),
    "a view is returned": (lambda s, x: (s.norm(y := s.conv(x)), y[:, :1]), "used elsewhere"),
    "looked at before": (lambda s, x: s.norm(y) * y.mean() if (y := s.conv(x)) is not None else x, "used elsewhere"),
    "kept on the model": (_kept, "used elsewhere"),
    "changed in place": (_in_place, "used elsewhere"),
    "changed afterwards": (_changed_later, "used elsewhere"),
    "something between": (lambda s, x: s.norm(s.conv(x).relu()), "not the output"),
    "norm first": (lambda s, x: s.norm(x.repeat(1, 2, 1, 1)) + s.conv(x).mean(), "not the output"),
    "norm twice": (_twice, "several places"),
    "layer twice": (_conv_twice, "several places"),
    "norm skipped": (lambda s, x: s.conv(x), "skips"),
}


@pytest.mark.parametrize("name", WAYS)
def test_output_that_others_use_is_left(name):
    way, why = WAYS[name]
    model, x = used(Block(way)), images(2, 2, 6, 6)
    before, state = model(x), copy.deepcopy(model.state_dict())
    fused = fuse_(model, Batch((x,)))
    assert not fused.pairs
    assert why in fused.left["norm"]
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert state.keys() == model.state_dict().keys()


class Standardised(nn.Conv2d):
    """The weight's scale does not reach the output."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def hooked():
    conv = nn.Conv2d(2, 4, 3)
    conv.register_forward_hook(lambda module, args, out: out * 2)
    return conv


STRANGE = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), None, "computed"),
    "own convolution": (lambda: Standardised(2, 4, 3), None, "does more"),
    "own norm": (None, lambda: NormWithActivation(4), "does more"),
    "hook": (hooked, None, "hooks"),
    "no statistics": (None, lambda: nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_layer_or_norm_that_is_more_than_it_seems_is_left(name):
    conv, norm, why = STRANGE[name]
    model = used(Block(lambda s, x: s.norm(s.conv(x)), conv and conv(), norm and norm()))
    x = images(2, 2, 6, 6)
    before = model(x)
    fused = fuse_(model, Batch((x,)))
    assert not fused.pairs
    assert why in fused.left["norm"]
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_weight_shared_by_two_layers_is_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[2].weight = model[0].weight
    fused = fuse_(used(model), Batch((images(3, 4),)))
    assert not fused.pairs
    assert all("shares its parameters" in why for why in fused.left.values())


def test_norm_over_another_dimension_than_the_layer_makes_is_left():
    """On [B, T, F] a linear layer makes F and the norm takes T."""
    fused = fuse_(used(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))), Batch((images(3, 4, 5),)))
    assert not fused.pairs
    assert "channels" in fused.left["1"]


# --- refused --------------------------------------------------------------------------------------


def test_train_mode_is_refused():
    with pytest.raises(ModelError, match=r"train mode.*call model.eval\(\)"):
        fuse_(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), Batch((images(2, 2, 4, 4),)))


def test_model_without_weights_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ModelError, match="meta device"):
        fuse_(model, Batch((images(2, 2, 4, 4),)))


def test_wrong_inputs_are_named():
    with pytest.raises(ModelError, match=r"\[2, 3, 4, 4\]"):
        fuse_(used(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))), Batch((images(2, 3, 4, 4),)))


def test_code_that_looks_into_the_norm_gets_its_model_back():
    model, x = used(Block(lambda s, x: s.norm(s.conv(x)) * s.norm.weight.mean())), images(2, 2, 6, 6)
    before, state = model(x), copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="left as it was"):
        fuse_(model, Batch((x,)))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
