"""Layers that lose chosen units: which ones, how many, copies that lack them, norms by hand."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.budget import Budget
from secateur.core.errors import ModelError, SettingsError
from secateur.core.method import Batch
from secateur.shrink.subsets import Layers

IMAGES = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Two convolutions on a residual stream, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.norm = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.second(self.norm(self.first(x)).relu())).mean((2, 3)))


def small():
    torch.manual_seed(0)
    model = Small()
    model(IMAGES)  # batch-norm statistics that are not those of initialisation
    return model.eval()


def layers(model=None, sparsity=0.5, **more):
    return Layers(model or small(), Batch((IMAGES,)), Budget(sparsity), **more)


def test_which_layers_and_how_many_units():
    assert layers().removals == {"first:channel": (6, 3)}  # stem and second make one stream together
    assert layers(coupled=True).removals == {"stem:channel": (4, 2), "first:channel": (6, 3)}
    assert layers(coupled=True, exclude=("stem.*",)).removals == {"first:channel": (6, 3)}
    assert layers(coupled=True, exclude=("second.weight",)).removals == {"first:channel": (6, 3)}
    assert layers(coupled=True, include=("stem.*",)).removals == {"stem:channel": (4, 2)}
    # second reads what first makes and is not asked for by that
    assert layers(coupled=True, include=("second.*",)).removals == {"stem:channel": (4, 2)}


@pytest.mark.parametrize(("sparsity", "gone"), [(0.5, 3), (0.49, 2), (1 / 3, 2), (0.99, 5)])
def test_a_share_is_rounded_down(sparsity, gone):
    assert layers(sparsity=sparsity).removals == {"first:channel": (6, gone)}


def test_own_shares_the_last_one_counts():
    found = layers(coupled=True, shares="*=0.25,first=0.7,first:channel=0.5")
    assert found.removals == {"stem:channel": (4, 1), "first:channel": (6, 3)}
    assert layers(coupled=True, shares="stem=0").removals == {"first:channel": (6, 3)}
    with pytest.raises(SettingsError, match=r"no layer matches 'frist'; there are first:channel"):
        layers(shares="frist=0.5")


def test_nothing_to_remove_is_said():
    with pytest.raises(SettingsError, match="removes no whole unit"):
        layers(sparsity=0.1)
    with pytest.raises(ModelError, match="nothing is left to cut"):
        layers(include=("head.*",))


def test_a_copy_lacks_the_units_and_the_model_keeps_them():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = layers(model)
    smaller = found.smaller({"first:channel": [0, 2, 5]})
    kept = [1, 3, 4]
    assert torch.equal(smaller.first.weight, before["first.weight"][kept])
    assert torch.equal(smaller.norm.running_var, before["norm.running_var"][kept])
    assert torch.equal(smaller.second.weight, before["second.weight"][:, kept])
    assert smaller.first.out_channels == 3
    with torch.no_grad():
        smaller.first.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.first.out_channels == 6
    again = found.smaller({"first:channel": [0, 2, 5]})
    assert torch.equal(again.first.weight, before["first.weight"][kept])


def test_a_batch_norm_s_shift_goes_with_its_channel():
    model = small()
    with torch.no_grad():
        model.norm.bias.fill_(3.0)
        zeroed = small()
        zeroed.load_state_dict(model.state_dict())
        zeroed.first.weight[[0, 1]] = 0
        zeroed.first.bias[[0, 1]] = 0
        shifted = zeroed(IMAGES)  # a masked filter still gives its shift
        zeroed.norm.weight[[0, 1]] = 0
        zeroed.norm.bias[[0, 1]] = 0
        found = layers(model).smaller({"first:channel": [0, 1]})(IMAGES)
        assert torch.allclose(found, zeroed(IMAGES), atol=1e-6)
        assert not torch.allclose(found, shifted, atol=1e-3)


def test_norms_are_those_of_the_layers_that_make_the_units():
    model = small()
    found = layers(model, coupled=True).norms()
    weights = {name: value.detach().abs() for name, value in model.named_parameters()}
    assert torch.allclose(found["first:channel"], weights["first.weight"].sum((1, 2, 3)))
    made = weights["stem.weight"].sum((1, 2, 3)) + weights["second.weight"].sum((1, 2, 3))
    assert torch.allclose(found["stem:channel"], made)


def test_the_plan_cuts_the_same():
    model = small()
    found = layers(model)
    expected = found.smaller({"first:channel": [4]})(IMAGES)
    plan = found.plan({"first:channel": [4]})
    assert plan.masks["first:channel"].tolist() == [True] * 4 + [False, True]
    assert torch.equal(sc.apply_(model, plan)(IMAGES), expected)
