"""Layer densities: the published rules, exact totals, ties, and budgets that do not fit."""

from fractions import Fraction
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate import ratios
from secateur.allocate.spread import Spread, choose, choose_in_rounds, shares
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, UnknownNameError
from secateur.core.progress import Silent
from secateur.core.units import Layout, Site, UnitKind


def conv_net(width):
    """Shapes of 3x3 convolutions of w, 2w, 4w, 4w channels and a classifier."""
    channels = (1, width, 2 * width, 4 * width, 4 * width)
    shapes = {f"c{i}": (channels[i], channels[i - 1], 3, 3) for i in range(1, 5)}
    return shapes | {"fc": (10, 4 * width)}


TIES = {"c1": (8, 3, 3, 3), "t1": (12, 6, 3, 3), "t2": (12, 6, 3, 3), "t3": (6, 12, 3, 3)}
TIES |= {"big": (64, 48, 3, 3), "fc": (10, 12)}
NETS = {"w16": conv_net(16), "w4": conv_net(4), "ties": TIES}
# printed by `Masking.init` of github.com/VITA-Group/Random_Pruning at 871077f, CIFAR/sparselearning/core.py
OFFICIAL = {
    ("w16", "er", 0.05): [1.0, 0.107444, 0.053722, 0.035815, 0.132515],
    ("w16", "er", 0.3): [1.0, 0.671431, 0.335716, 0.22381, 0.828099],
    ("w16", "erk", 0.05): [1.0, 0.093055, 0.043942, 0.028864, 0.918139],
    ("w16", "erk", 0.3): [1.0, 0.70403, 0.332459, 0.21838, 1.0],
    ("w4", "er", 0.05): [0.360542, 0.108163, 0.054081, 0.036054, 0.04687],
    ("w4", "er", 0.3): [1.0, 0.673589, 0.336795, 0.22453, 0.291889],
    ("w4", "erk", 0.05): [0.489386, 0.100102, 0.041709, 0.026416, 0.260264],
    ("w4", "erk", 0.3): [1.0, 0.71657, 0.298571, 0.189095, 1.0],
    ("ties", "er", 0.05): [0.424675, 0.231641, 0.231641, 0.231641, 0.033781, 0.16987],
    ("ties", "erk", 0.05): [0.523323, 0.246269, 0.246269, 0.246269, 0.028379, 1.0],
    ("ties", "erk", 0.3): [1.0, 1.0, 1.0, 1.0, 0.242274, 1.0],  # three tied layers become dense together
}


def densities(shapes, rule, density, ends=ratios.PLAIN):
    total = density * sum(map(prod, shapes.values()))
    found = shares(Spread(rule), shapes, total, ends)
    return ratios.densities(found, shapes)


@pytest.mark.parametrize("case", OFFICIAL, ids=str)
def test_densities_are_the_official_ones(case):
    net, rule, density = case
    assert list(densities(NETS[net], rule, density).values()) == pytest.approx(OFFICIAL[case], abs=1e-6)


shape = st.one_of(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3)),
)
nets = st.lists(shape, min_size=1, max_size=7).map(lambda found: {f"s{9 - i}": s for i, s in enumerate(found)})
RULES = ["uniform", "uniform_plus", "er", "erk", "erk_plus"]


@settings(deadline=None, max_examples=300)
@given(nets, st.floats(0.001, 1), st.sampled_from(RULES), st.sampled_from([0.5, 1.0, 2.0]))
def test_every_rule_meets_the_total_within_the_layers(shapes, density, rule, power):
    everything = sum(map(prod, shapes.values()))
    ends = ratios.Ends(power=power, classifier_density=0.5)
    try:
        found = densities(shapes, rule, density, ends)
    except BudgetError:
        assert rule.endswith("plus")
        return
    assert list(found) == list(shapes)
    assert all(0 <= d <= 1 + 1e-12 for d in found.values())
    assert all(d > 0 for d in found.values()) or rule.endswith("plus")  # theirs may leave nothing to the rest
    kept = sum(d * prod(shapes[name]) for name, d in found.items())
    assert kept == pytest.approx(density * everything, rel=1e-6)


@settings(deadline=None, max_examples=100)
@given(nets, st.floats(0.01, 0.99), st.sampled_from(["er", "erk"]))
def test_below_one_densities_are_proportional_to_the_factors(shapes, density, rule):
    found = densities(shapes, rule, density)
    seen = {name: s[:2] if rule == "er" else s for name, s in shapes.items()}
    factor = {name: Fraction(sum(s), prod(s)) for name, s in seen.items()}
    free = [name for name, d in found.items() if d < 1 - 1e-9]
    scales = [found[name] / float(factor[name]) for name in free]
    assert max(scales, default=1) == pytest.approx(min(scales, default=1))
    # a layer is dense only if its factor asked for it
    assert all(float(factor[name]) * scales[0] >= 1 - 1e-6 for name in found if free and name not in free)


def test_kernels_count_in_erk_only_and_the_exponent_bends():
    shapes = {"conv": (3, 2, 3, 3), "linear": (5, 6)}
    assert densities(shapes, "er", 0.2)["conv"] / densities(shapes, "er", 0.2)["linear"] == pytest.approx(
        (5 / 6) / (11 / 30)
    )
    for power in (1.0, 2.0):
        found = densities(shapes, "erk", 0.2, ratios.Ends(power=power))
        assert found["conv"] / found["linear"] == pytest.approx(((11 / 54) / (11 / 30)) ** power)
    assert densities({"a": (4, 6)}, "er", 0.3) == densities({"a": (6, 4)}, "erk", 0.3)


def test_uniform_plus_spends_the_whole_budget():
    shapes = {"stem": (4, 1, 3, 3), "a": (10, 10, 1, 1), "b": (20, 10, 1, 1), "head": (10, 10)}  # 36, 100, 200, 100
    found = densities(shapes, "uniform_plus", 0.25)  # 109 of 436: 36 dense, 25 in the head (0.25 > 0.2), 48 for 300
    assert found == pytest.approx({"stem": 1.0, "a": 0.16, "b": 0.16, "head": 0.25})
    found = densities(shapes, "uniform_plus", 0.15)  # 65.4: 36, 20 (0.2 > 0.15), 9.4 for 300
    assert found == pytest.approx({"stem": 1.0, "a": 9.4 / 300, "b": 9.4 / 300, "head": 0.2})
    with pytest.raises(BudgetError, match="'head' 20 and 'stem' 36; the other layers can keep 0 to 300"):
        densities(shapes, "uniform_plus", 0.1)


def test_the_ends_are_the_first_convolution_and_the_last_layer_unless_named():
    mlp = {"in.weight": (8, 4), "mid.weight": (8, 8), "out.weight": (4, 8)}
    found = densities(mlp, "uniform_plus", 0.1)
    assert found["out.weight"] == 0.2
    assert found["in.weight"] == found["mid.weight"] < 0.1
    named = densities(mlp, "uniform_plus", 0.7, ratios.Ends(first="mid", classifier="in.weight"))
    assert named == pytest.approx({"in.weight": 0.7, "mid.weight": 1.0, "out.weight": 0.1})  # 22.4 + 64 + 3.2
    plus = densities(mlp, "erk_plus", 0.5, ratios.Ends(classifier="mid", classifier_density=0.25))
    assert plus["mid.weight"] == 0.25
    rest = {name: s for name, s in mlp.items() if name != "mid.weight"}
    assert {name: plus[name] for name in rest} == pytest.approx(densities(rest, "erk", (64 - 16) / 64))
    with pytest.raises(UnknownNameError, match="layer 'mit'; did you mean mid"):
        densities(mlp, "uniform_plus", 0.5, ratios.Ends(first="mit"))


def test_erk_plus_that_does_not_fit_is_refused():
    shapes = {"a": (10, 10), "fc": (10, 10)}
    with pytest.raises(BudgetError, match="'fc' 100"):
        densities(shapes, "erk_plus", 0.4)
    with pytest.raises(BudgetError, match="the other layers can keep 0 to 100"):
        densities(shapes, "erk_plus", 0.9, ratios.Ends(classifier_density=0.5))
    assert densities(shapes, "erk_plus", 0.6) == pytest.approx({"a": 0.2, "fc": 1.0})


@pytest.mark.parametrize("rule", RULES)
def test_one_layer_takes_everything(rule):
    assert densities({"only": (4, 1, 3, 3)}, rule, 0.3) == pytest.approx({"only": 0.3})


SITES = {
    "stem": Site("stem", UnitKind.WEIGHT, (4, 1, 3, 3), Layout.CONV),
    "a": Site("a", UnitKind.WEIGHT, (10, 10)),
    "head": Site("head", UnitKind.WEIGHT, (10, 10)),
}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 60), st.sampled_from(RULES), st.integers(0, 3))
def test_masks_round_the_shares_to_the_exact_total(percent, rule, seed):
    rng = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(site.shape, generator=rng) for name, site in SITES.items()}
    try:
        masks = choose(scores, SITES, Budget(percent / 100), Spread(rule))
    except BudgetError:
        assert rule.endswith("plus")
        return
    total = 236 - 236 * percent // 100
    wanted = shares(Spread(rule), {name: site.shape for name, site in SITES.items()}, total)
    assert sum(int(mask.sum()) for mask in masks.values()) == total
    assert all(abs(int(mask.sum()) - wanted[name]) < 1 + 1e-6 for name, mask in masks.items())


# --- in rounds ----------------------------------------------------------------------------------


def test_rounds_score_the_thinner_network_and_nothing_comes_back():
    sites = {name: Site(name, UnitKind.WEIGHT, (16,)) for name in ("a", "b")}
    base = {"a": torch.arange(16.0), "b": torch.arange(16.0) + 0.5}
    seen = []

    def score(masks):
        seen.append({name: mask.clone() for name, mask in masks.items()})
        flip = -1 if len(seen) % 2 == 0 else 1  # the next round likes what the last one threw away
        return {name: flip * base[name] for name in masks}

    masks, scores = choose_in_rounds(score, sites, Budget(2, Quantity.UNITS), 4, Silent())
    kept = [sum(int(mask.sum()) for mask in round_.values()) for round_ in (*seen, masks)]
    assert kept == [32, 16, 8, 4, 2]  # 32 * (1 / 16) ** (k / 4)
    for before, after in zip(seen, [*seen[1:], masks], strict=True):
        assert all(not (after[name] & ~before[name]).any() for name in sites)
    assert torch.equal(scores["a"], -base["a"])


def test_one_round_is_one_shot_and_floors_hold():
    sites = {name: Site(name, UnitKind.WEIGHT, (10,)) for name in ("a", "b")}
    scores = {"a": torch.arange(10.0) + 100, "b": torch.arange(10.0)}
    once, _ = choose_in_rounds(lambda masks: scores, sites, Budget(0.5), 1, Silent())
    assert [int(mask.sum()) for mask in once.values()] == [10, 0]
    held, _ = choose_in_rounds(lambda masks: scores, sites, Budget(0.5, floor=2), 7, Silent())
    assert [int(mask.sum()) for mask in held.values()] == [8, 2]
    assert held["b"].tolist() == [False] * 8 + [True] * 2
