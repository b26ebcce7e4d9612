"""By-passes: what they compute, written out by hand; masks against cuts; attaching, copies, saved state."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.shrink.additions import additions_of, attach
from secateur.shrink.apply import apply_
from secateur.shrink.branches import Branch
from secateur.shrink.bypass import Bypass, hang, make_bypass
from secateur.shrink.fuse import merged

INPUTS, FILTERS = 4, 6


class Tower(nn.Module):
    """conv - norm - ReLU, in place as many models have it."""

    def __init__(self, **geometry):
        super().__init__()
        self.conv = nn.Conv2d(INPUTS, FILTERS, 3, **{"padding": 1, **geometry})
        self.norm = nn.BatchNorm2d(FILTERS, eps=1e-3, momentum=0.2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def addition(kept=None, kernel=(3, 3), groups=2, normed=True, merged=False):
    own = {"kernel": list(kernel), "groups": groups, "normed": normed, "kept": kept, "merged": merged}
    return {"kind": "bypass", "conv": "conv", "norm": "norm", **own}


def fill(model, seed=0):
    """Values everywhere, so that nothing agrees by chance."""
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=rng) + (0.2 if name.endswith("var") else -0.5))
    return model


def built(kept=None, geometry=None, affine=True, **own):
    model = Tower(**(geometry or {}))
    if not affine:
        model.norm.weight = model.norm.bias = None
    attach(model, [addition(kept, **own)])
    return fill(model).eval()


def inputs():
    return torch.randn(3, INPUTS, 7, 7, generator=torch.Generator().manual_seed(5))


def norm_of(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


GEOMETRIES = [
    {},
    {"stride": 2},
    {"dilation": 2, "padding": 2},
    {"padding": 0},
    {"padding": "same"},
    {"padding_mode": "circular"},
    {"padding": (1, 0), "stride": (1, 2)},
    {"bias": False},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_branch_adds_to_the_norm_before_what_follows(geometry):
    model, x = built(geometry=geometry), inputs()
    bypass, conv = model.norm.bypass, model.conv
    padded, padding = x, conv.padding
    if conv.padding_mode == "circular":
        padded, padding = F.pad(x, (1, 1, 1, 1), mode="circular"), 0
    beside = F.conv2d(padded, bypass.conv.weight, None, conv.stride, padding, conv.dilation, groups=2)
    expected = F.relu(norm_of(model.norm, conv(x)) + norm_of(bypass.norm, beside))
    torch.testing.assert_close(model(x), expected)
    assert (bypass.norm.eps, bypass.norm.momentum) == (1e-3, 0.2)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_branch_may_stand_beside_a_convolution_that_keeps_the_size(stride):
    model, x = built(geometry={"stride": stride}, kernel=(1, 1)), inputs()
    beside = F.conv2d(x, model.norm.bypass.conv.weight, None, stride, groups=2)
    expected = F.relu(norm_of(model.norm, model.conv(x)) + norm_of(model.norm.bypass.norm, beside))
    torch.testing.assert_close(model(x), expected)


def test_without_a_norm_the_branch_has_a_bias():
    model, x = built(normed=False), inputs()
    branch = model.norm.bypass.conv
    expected = F.relu(norm_of(model.norm, model.conv(x)) + F.conv2d(x, branch.weight, branch.bias, padding=1, groups=2))
    torch.testing.assert_close(model(x), expected)


def test_a_masked_filter_contributes_exactly_nothing():
    """Not even the shift of its norm: only the branch is left."""
    model, x = built(), inputs()
    keep = torch.tensor([1.0, 0, 0, 1, 1, 0])
    model.norm.bypass.mask = lambda conv, norm: keep if (conv, norm) == (model.conv, model.norm) else None
    found = model(x)
    beside = norm_of(model.norm.bypass.norm, model.norm.bypass.conv(x))
    assert torch.equal(found[:, keep == 0], F.relu(beside[:, keep == 0]))
    assert model.norm.bias[keep == 0].abs().max() > 0.1
    assert not torch.allclose(found[:, keep == 1], F.relu(beside[:, keep == 1]))


@pytest.mark.parametrize("train", [False, True])
def test_cut_is_masked(train):
    kept = [1, 4, 5]
    masked, x = built().train(train), inputs()
    keep = torch.zeros(FILTERS)
    keep[kept] = 1
    masked.norm.bypass.mask = lambda conv, norm: keep
    narrow = Tower()
    attach(narrow, [addition(kept)])
    state = masked.state_dict()
    for name, tensor in dict(narrow.named_parameters()).items() | dict(narrow.named_buffers()).items():
        if name in state:
            own = state[name]
            main = name.startswith(("conv.", "norm.")) and "bypass" not in name and own.dim()
            tensor.data = own[kept].clone() if main else own.clone()
    narrow.train(train)
    assert narrow.conv.weight.shape[0] == 3
    torch.testing.assert_close(narrow(x), masked(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(narrow.norm.running_mean, masked.norm.running_mean[kept])
    torch.testing.assert_close(narrow.norm.bypass.norm.running_var, masked.norm.bypass.norm.running_var)


def merged_tower(kept, geometry, groups=2, affine=True, kernel=(3, 3), normed=True):
    """The same network twice: full with its branch, and with the branch in the kept filters."""
    full = built(geometry=geometry, affine=affine, groups=groups, kernel=kernel, normed=normed)
    branch = full.norm.bypass
    one = Branch("conv", "norm", FILTERS, kernel, groups, normed, cost=0.1, merge=True)
    keep = torch.zeros(FILTERS, dtype=torch.bool)
    keep[kept] = True
    branch.mask = lambda conv, norm: keep
    narrow = Tower(**geometry)
    if not affine:
        narrow.norm.weight = narrow.norm.bias = None
    if len(kept) < FILTERS:
        attach(narrow, [one.addition(kept)])
    values = one.weights(full, branch, keep)
    for name, tensor in dict(narrow.named_parameters()).items() | dict(narrow.named_buffers()).items():
        if tensor.is_floating_point():
            assert tensor.dim() == values[name].dim()
            tensor.data = values.pop(name)
    assert set(values) <= {"norm.bypass.norm.num_batches_tracked"}
    return full, narrow.eval()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kept", [[1, 4, 5], [0], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("groups", [2, 1])
def test_a_merged_branch_computes_the_same_without_running_beside_kept_filters(geometry, kept, groups):
    full, narrow = merged_tower(kept, geometry, groups)
    torch.testing.assert_close(narrow(inputs()), full(inputs()), rtol=1e-5, atol=1e-5)
    if len(kept) < FILTERS:
        branch = narrow.norm.bypass.conv
        assert branch.weight.shape == (FILTERS - len(kept), INPUTS // groups, 3, 3)
    else:
        assert not hasattr(narrow.norm, "bypass")


@pytest.mark.parametrize("own", [{"kernel": (1, 1)}, {"normed": False}, {"affine": False}])
def test_branches_of_all_kinds_merge(own):
    full, narrow = merged_tower([0, 3, 4], {"dilation": 2, "padding": 2}, **own)
    torch.testing.assert_close(narrow(inputs()), full(inputs()), rtol=1e-5, atol=1e-5)
    assert (narrow.norm.weight is None) is ("affine" in own)


def test_the_norm_of_merged_filters_has_the_statistics_of_what_they_make():
    """The means exactly, the variances but for what the two branches have in common."""
    rng = torch.Generator().manual_seed(1)
    model, x = built(groups=2), torch.randn(400, INPUTS, 7, 7, generator=rng)
    for name in ("norm", "norm.bypass.norm"):
        norm = model.get_submodule(name)
        norm.momentum = None  # an average over all batches
        norm.reset_running_stats()
    model.train()(x)
    model.eval()
    conv, norm = merged(model.conv, model.norm, model.norm.bypass)
    made = F.conv2d(x.double(), conv["weight"], conv["bias"], padding=1)
    torch.testing.assert_close(norm["running_mean"], made.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm["running_var"], made.var((0, 2, 3)), rtol=0.5, atol=0)
    assert not torch.allclose(norm["running_var"], model.norm.running_var.double(), rtol=0.5)


def test_a_branch_beside_the_model_is_no_part_of_it_and_follows_its_mode():
    model, x = fill(Tower()), inputs()
    names = model.state_dict().keys()
    conv, norm, bypass = make_bypass(model, addition())
    undo = hang(conv, norm, bypass)
    fill(bypass)
    assert model.state_dict().keys() == names
    before = bypass.norm.running_mean.clone()
    model.eval()(x)
    assert torch.equal(bypass.norm.running_mean, before)
    model.train()(x)
    assert not torch.equal(bypass.norm.running_mean, before)
    assert bypass.norm.num_batches_tracked == 1
    for one in undo:
        one()
    model.eval()
    torch.testing.assert_close(model(x), F.relu(norm_of(model.norm, model.conv(x))))


def test_attaching_draws_nothing_and_undo_leaves_no_trace():
    model = Tower()
    state, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    undo = attach(model, [addition([0, 2])])
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.norm.bypass.conv.weight.any()  # nor is it left to what was in memory
    undo()
    assert model.state_dict().keys() == state.keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_copies_have_branches_of_their_own():
    model, x = built(), inputs()
    before = model(x).detach().clone()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), before)
        with torch.no_grad():
            other.norm.bypass.norm.bias.add_(3)
        assert torch.equal(model(x), before)
        assert not torch.allclose(other(x), before)


def test_a_model_knows_its_branches_and_a_fresh_one_gets_them_back():
    for kept, merge in ((None, False), ([0, 5], False), ([0, 5], True)):
        model = nn.Sequential(built(kept, normed=kept is None, merged=merge))
        (found,) = additions_of(model)
        assert found == {**addition(kept, normed=kept is None, merged=merge), "conv": "0.conv", "norm": "0.norm"}
        assert ("0.norm.bypass.places" in model.state_dict()) == (kept is not None)
        fresh = nn.Sequential(Tower())
        attach(fresh, [found])
        assert fresh.state_dict().keys() == model.state_dict().keys()
    with torch.device("meta"):
        outline = nn.Sequential(Tower())
        attach(outline, [found])
    assert outline[0].norm.bypass.conv.weight.is_meta


def test_a_branch_is_trained_like_any_part():
    model = built([0, 3])
    with torch.no_grad():
        for tensor in (model.conv.weight, model.conv.bias, model.norm.weight, model.norm.bias):
            tensor.data = tensor[:2].clone()
        model.norm.running_mean, model.norm.running_var = torch.zeros(2), torch.ones(2)
    model(inputs()).square().sum().backward()
    assert model.norm.bypass.conv.weight.grad.abs().sum() > 0
    assert model.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("names", "message"),
    [({"norm": "act"}, "'act' is a ReLU"), ({"conv": "norm"}, "'norm' is a BatchNorm2d"), ({"conv": "gone"}, "gone")],
)
def test_wrong_places_are_refused_and_change_nothing(names, message):
    model = Tower()
    before = copy.deepcopy(model.state_dict())
    site = Site("conv:filter", UnitKind.CHANNEL, (FILTERS,))
    plan = Plan({site.name: site}, {site.name: torch.ones(FILTERS, dtype=torch.bool)})
    plan.additions = (addition(), {**addition(), **names})
    with pytest.raises(PlanError, match=message):
        apply_(model, plan)
    assert model.state_dict().keys() == before.keys()
    assert not isinstance(getattr(model.norm, "bypass", None), Bypass)
    assert not model.norm._forward_hooks
