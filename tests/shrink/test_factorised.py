"""Layers as two: at full rank the same outputs, below those of the truncated weight; counts by formula and counter."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError
from secateur.core.method import Batch
from secateur.core.units import Scheme
from secateur.measure import parameters
from secateur.measure.flops import flops
from secateur.scores.spectrum import Rule, Spectrum
from secateur.shrink.additions import additions_of, attach
from secateur.shrink.factorised import Factorised
from secateur.shrink.rank_budget import RankBudget
from secateur.shrink.ranks import RankLayer, RankLayers, Work

FORMS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "without_bias": {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    "odd_kernel": {"kernel_size": (5, 3), "padding": (2, 0), "stride": (1, 2)},
    "even_kernel": {"kernel_size": (2, 4), "padding": (0, 1), "stride": (2, 1)},
    "same": {"kernel_size": (3, 4), "padding": "same"},
    "same_dilated": {"kernel_size": (3, 4), "padding": "same", "dilation": (2, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilated": {"kernel_size": 3, "padding": (2, 3), "dilation": (2, 3), "stride": 2},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    "replicate": {"kernel_size": (3, 5), "padding": "same", "padding_mode": "replicate"},
    "one_by_one": {"kernel_size": 1, "stride": 2},
    "flat": {"kernel_size": (1, 5), "padding": (0, 2)},
}
X = torch.randn(2, 6, 11, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conv(outputs=8, inputs=6, **form):
    torch.manual_seed(1)
    return nn.Conv2d(inputs, outputs, dtype=torch.float64, **form)


def factorised(layer, rank, scheme):
    """Two layers and the spectrum that they come from."""
    found = RankLayer("layer", layer, scheme if isinstance(layer, nn.Conv2d) else Scheme.CHANNEL)
    spectrum = Spectrum.of(found.weight, found.scheme)
    model = nn.Sequential(copy.deepcopy(layer))
    attach(model, [{"kind": "factorised", "module": "0", "rank": rank, "scheme": found.scheme.value}])
    with torch.no_grad():
        for place, value in zip((model[0].first, model[0].second), spectrum.factors(rank), strict=True):
            assert place.weight.shape == value.shape
            place.weight.copy_(value)
        if layer.bias is not None:
            model[0].bias.copy_(layer.bias)
    return model[0], spectrum


# --- what is computed -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("form", FORMS)
def test_full_rank_gives_the_same_outputs(form, scheme):
    layer = conv(**FORMS[form])
    two, _ = factorised(layer, RankLayer("", layer, scheme).full, scheme)
    expected = layer(X)
    assert expected.std() > 0.1
    torch.testing.assert_close(two(X), expected, rtol=0, atol=1e-10)
    assert two.float()(X.float()).dtype == torch.float32
    torch.testing.assert_close(two(X.float()), expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("form", FORMS)
def test_a_lower_rank_gives_the_outputs_of_the_truncated_weight(form, scheme):
    layer = conv(**FORMS[form])
    rank = max(1, RankLayer("", layer, scheme).full // 2)
    two, spectrum = factorised(layer, rank, scheme)
    near = spectrum.cut([rank] * len(spectrum.values)).weight
    torch.testing.assert_close(two.weight, near, rtol=0, atol=1e-12)
    dense = layer(X)
    with torch.no_grad():
        layer.weight.copy_(near)
    torch.testing.assert_close(two(X), layer(X), rtol=0, atol=1e-10)
    if rank < spectrum.values.shape[1]:
        assert (two(X) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 9), (9, 6)])
def test_linear_layers_of_both_layouts(inputs, outputs, bias):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    swapped = Conv1D(outputs, inputs).double()
    with torch.no_grad():
        swapped.weight.copy_(linear.weight.t())
        swapped.bias.copy_(linear.bias if bias else torch.zeros(outputs))
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    for layer in (linear, swapped):
        for rank in (6, 4):
            two, spectrum = factorised(layer, rank, Scheme.CHANNEL)
            near = spectrum.cut([rank]).weight
            torch.testing.assert_close(two(x), nn.functional.linear(x, near, linear.bias), rtol=0, atol=1e-12)
            torch.testing.assert_close(two.weight, near, rtol=0, atol=1e-12)
    torch.testing.assert_close(factorised(swapped, 6, Scheme.CHANNEL)[0](x), linear(x), rtol=0, atol=1e-12)


def test_gradients_reach_both_factors_and_copies_are_their_own():
    two, _ = factorised(conv(kernel_size=3), 3, Scheme.SPATIAL)
    two(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in two.parameters())
    for other in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert torch.equal(other(X), two(X))
        with torch.no_grad():
            other.first.weight.zero_()
        assert two.first.weight.any()
    assert "rank=3, scheme=spatial" in repr(two)


def test_the_mode_and_dtype_of_the_layer_are_kept():
    layer = conv(kernel_size=3).to(torch.bfloat16).eval()
    two = Factorised(layer, 2, "decoupled")
    assert not two.second.training
    assert {p.dtype for p in two.parameters()} == {torch.bfloat16}


# --- in models --------------------------------------------------------------------------------------


def test_a_model_knows_its_factors_and_gets_them_again():
    def fresh():
        torch.manual_seed(3)
        return nn.Sequential(conv(kernel_size=3), nn.Sequential(conv(4, 8, kernel_size=3, stride=2)))

    model = fresh()
    undo = attach(
        model,
        [
            {"kind": "factorised", "module": "0", "rank": 3, "scheme": "channel"},
            {"kind": "factorised", "module": "1.0", "rank": 2, "scheme": "decoupled"},
            {"kind": "factorised", "module": "0.second", "rank": 1, "scheme": "channel"},  # once more
        ],
    )
    again = fresh()
    attach(again, additions_of(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))
    assert len(additions_of(model)) == 3
    undo()
    assert additions_of(model) == []
    assert model.state_dict().keys() == fresh().state_dict().keys()
    assert torch.equal(model(X), fresh()(X))


def test_a_wrong_name_changes_nothing():
    model = nn.Sequential(conv(kernel_size=3))
    additions = [{"kind": "factorised", "module": name, "rank": 3, "scheme": "channel"} for name in ("0", "9.x")]
    with pytest.raises(AttributeError):
        attach(model, additions)
    assert isinstance(model[0], nn.Conv2d)


# --- counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("form", ["plain", "strided", "odd_kernel", "dilated", "valid", "reflect"])
@pytest.mark.parametrize("samples", [3, 0])
def test_announced_parameters_and_flops_are_the_counted_ones(form, scheme, samples):
    torch.manual_seed(0)
    model = nn.Sequential(conv(**FORMS[form]), nn.ReLU(), conv(7, 8, kernel_size=3, padding=1)).double()
    x = X[:samples] if samples else X[0]
    example = Batch((x,))
    layers = RankLayers.find(model, scheme, lambda name: True)
    work = Work.of(layers, example)
    full = {name: layer.full for name, layer in layers.layers.items()}
    assert work.flops(full) == flops(model, example)
    for counts in ({"0": 2, "2": 3}, {"0": 1, "2": full["2"]}):
        two = copy.deepcopy(model)
        decision = layers.decision(layers.spectra(), counts, keep_scores=False)
        attach(two, decision.additions)
        assert layers.parameters(counts) == parameters(two)
        assert work.flops(counts) == flops(two, example)


@pytest.mark.parametrize(
    ("scheme", "weights"), [("channel", 3 * (54 + 8)), ("spatial", 3 * (18 + 24)), ("decoupled", 3 * (48 + 72))]
)
def test_weights_by_the_formulas(scheme, weights):
    """N 8, C 6, k 3, r 3."""
    layer = conv(kernel_size=3, bias=False)
    assert sum(p.numel() for p in Factorised(layer, 3, scheme).parameters()) == weights
    assert 3 * RankLayer("", layer, Scheme(scheme)).cost == weights


@pytest.mark.parametrize(("scheme", "stride", "largest"), [
    # dense 8 * 6 * 9 = 432
    ("channel", 1, 6), ("channel", 2, 6),  # 62 r
    ("spatial", 1, 10), ("spatial", 2, 7),  # 42 r; (2 * 18 + 24) r multiplications at stride 2
    ("decoupled", 1, 3), ("decoupled", 2, 1),  # 120 r; (4 * 48 + 72) r
])  # fmt: skip
def test_two_layers_pay_only_with_fewer_weights_and_multiplications(scheme, stride, largest):
    layer = RankLayer("", conv(kernel_size=3, stride=stride), Scheme(scheme))
    assert layer.pays(largest)
    assert not layer.pays(largest + 1)


# --- which layers -----------------------------------------------------------------------------------


class Odd(nn.Linear):
    """Computes something of its own."""

    def forward(self, x):
        return super().forward(x) + 1


class Many(nn.Module):
    """One of everything that cannot be written as two."""

    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
        self.point, self.line = nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 3)
        self.up, self.odd, self.linear = nn.ConvTranspose2d(4, 4, 3), Odd(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.twice = nn.ModuleList([nn.Linear(4, 4)] * 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def test_what_cannot_be_two_layers_is_left_alone_and_said():
    found = RankLayers.find(Many(), Scheme.CHANNEL, lambda name: True)
    assert found.layers.keys() == {"conv", "point", "linear"}
    reasons = {
        "depthwise": "grouped", "line": "Conv1d", "up": "ConvTranspose2d", "odd": "Odd", "one": "that of 'other' too",
        "attention.out_proj": "MultiheadAttention", "twice.0": r"that of 'twice.1' too",
    }  # fmt: skip
    assert found.skipped.keys() >= reasons.keys()
    assert all(word in found.skipped[name] for name, word in reasons.items())
    few = RankLayers.find(Many(), Scheme.CHANNEL, lambda name: True, linear=False)
    assert few.layers.keys() == {"conv"}
    warnings = few.decision(few.spectra(), {"conv": 4}, keep_scores=False).warnings
    assert "4 layers are not factorised, 'point' first: linear layers and 1 x 1 kernels were not asked for" in warnings
    assert any("would not be smaller" in warning and "'conv'" in warning for warning in warnings)


def test_nothing_to_factorise_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="no layer whose rank could be cut; '0' is left alone: grouped"):
        RankLayers.find(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), Scheme.CHANNEL, lambda name: True)


# --- budgets ----------------------------------------------------------------------------------------


def layers_of_three(scheme=Scheme.CHANNEL):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, 2, 1)
    net = nn.Sequential(first, second, nn.Flatten(2), nn.Linear(16, 10))
    return RankLayers.find(net, scheme, lambda name: True), Batch((torch.randn(2, 3, 8, 8),))


def chosen(layers, budget, example, **more):
    return RankBudget.of(layers, layers.spectra(), budget, lambda: example).counts(**more)


def worthwhile(layers):
    """Every choice of ranks that are worth having."""
    ranks = {
        name: [rank for rank in range(1, one.full + 1) if one.pays(rank) or rank == one.full]
        for name, one in layers.layers.items()
    }
    return [dict(zip(ranks, chosen, strict=True)) for chosen in product(*ranks.values())]


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("quantity", [Quantity.PARAMETERS, Quantity.FLOPS])
@pytest.mark.parametrize("share", [0.95, 0.9, 0.8, 0.7, 0.5])
def test_budgets_are_met_within_one_percent_or_refused(scheme, quantity, share):
    layers, example = layers_of_three(scheme)
    budget, spectra = Budget(share, quantity), layers.spectra()
    asked = RankBudget.of(layers, spectra, budget, lambda: example)
    counts = asked.counts(near=False)
    cost = layers.cost(budget, lambda: example)
    dense = cost({name: layer.full for name, layer in layers.layers.items()})
    assert cost(counts) <= share * dense
    assert counts in worthwhile(layers)
    missed = asked.missed(counts)
    if share * dense - cost(counts) <= 0.01 * dense:
        assert not missed
        assert asked.counts() == counts
        return
    nearest = max(found for one in worthwhile(layers) if (found := cost(one)) <= share * dense)
    assert nearest < (share - 0.01) * dense  # no choice of ranks would do
    assert cost(counts) == nearest
    said = f"found leave {cost(counts) / dense:.4g}, and one rank more .*, of the dense"
    with pytest.raises(BudgetError, match=said):
        asked.counts()


def test_where_nothing_is_lost_nothing_is_given_back():
    """Weights of rank 1 need no more than that, however much a budget allows."""
    layers, example = layers_of_three()
    with torch.no_grad():
        for layer in layers.layers.values():
            layer.module.weight.copy_(layer.module.weight[:2].sum(0, keepdim=True).expand_as(layer.module.weight))
    counts = chosen(layers, Budget(0.9, Quantity.FLOPS), example)
    assert set(counts.values()) == {1}
    asked = RankBudget.of(layers, layers.spectra(), Budget(0.9, Quantity.FLOPS), lambda: example)
    assert asked.missed(counts) == ""
    assert not asked.goal.met(counts)


def test_a_sparsity_is_a_share_of_all_parameters():
    layers, example = layers_of_three()
    by_share = chosen(layers, Budget(0.4), example)
    assert by_share == chosen(layers, Budget(0.6, Quantity.PARAMETERS), example)
    assert by_share == chosen(layers, Budget(0.6, Quantity.DENSITY), example)


def test_floors_hold():
    layers, example = layers_of_three()
    counts = chosen(layers, Budget(0.5, floor=4), example)
    assert all(rank >= min(4, layers.layers[name].full) for name, rank in counts.items())
    plain = chosen(layers, Budget(0.8), example)
    assert min(plain.values()) < 4


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(0.99), "out of reach"),
        (Budget(0.05, Quantity.FLOPS), "out of reach"),
        (Budget(5, Quantity.UNITS), "not in units"),
        (Budget(1e9, Quantity.PARAMETERS), "out of reach"),
    ],
)
def test_budgets_out_of_reach_are_refused(budget, words):
    layers, example = layers_of_three()
    with pytest.raises(BudgetError, match=words):
        chosen(layers, budget, example)


def test_rules_leave_layers_whole_where_two_would_be_larger():
    layers, _ = layers_of_three()
    counts = layers.by_rule(layers.spectra(), Rule.RATE, 0.9)
    assert counts == {name: layer.full for name, layer in layers.layers.items()}
    counts = layers.by_rule(layers.spectra(), Rule.RATE, 0.5)
    assert counts["1"] == 12
