import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.counts import erk, uniform, with_floor
from secateur.allocate.spread import Spread, choose, keep_counts
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.units import Layout, Site, UnitKind

SITES = {
    "z.weight": Site("z.weight", UnitKind.WEIGHT, (4, 6)),
    "gpt.weight": Site("gpt.weight", UnitKind.WEIGHT, (8, 3), Layout.TRANSPOSED),
    "conv.weight": Site("conv.weight", UnitKind.WEIGHT, (2, 2, 3, 2), Layout.CONV),
}
SIZES = {name: site.units for name, site in SITES.items()}
EVERYTHING = sum(SIZES.values())
SPREADS = [Spread.GLOBAL, Spread.UNIFORM, Spread.ERK]  # these take any budget; test_allocate_ratios.py has the others


def scores_of(seed, levels=6):
    """Few different values: ties everywhere."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, levels, site.shape, generator=rng).float() for name, site in SITES.items()}


def lowest_go(values, keep):
    order = sorted(range(len(values)), key=lambda index: values[index])
    gone = set(order[: len(values) - keep])
    return [index not in gone for index in range(len(values))]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from(SPREADS), st.integers(0, 5))
def test_the_total_is_exact_and_every_site_keeps_its_best(seed, percent, spread, floor):
    scores, budget = scores_of(seed), Budget(percent / 100, floor=floor)
    total = EVERYTHING - EVERYTHING * percent // 100
    if total < 3 * floor:
        with pytest.raises(BudgetError, match="highest sparsity with this floor"):
            choose(scores, SITES, budget, spread)
        return
    masks = choose(scores, SITES, budget, spread)
    assert list(masks) == list(SITES)
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(counts.values()) == total
    assert all(count >= floor for count in counts.values())
    for name, mask in masks.items():
        assert mask.shape == SITES[name].shape
        assert mask.flatten().tolist() == lowest_go(scores[name].flatten().tolist(), counts[name])
    if spread is Spread.UNIFORM:
        assert counts == with_floor(uniform(SIZES, total), SIZES, floor)
    if spread is Spread.ERK:
        assert counts == with_floor(erk({name: site.shape for name, site in SITES.items()}, total), SIZES, floor)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(0, 99))
def test_global_is_one_ranking_over_all_sites(seed, percent):
    scores = scores_of(seed)
    masks = choose(scores, SITES, Budget(percent / 100), Spread.GLOBAL)
    everything = torch.cat([score.flatten() for score in scores.values()]).tolist()
    kept = torch.cat([mask.flatten() for mask in masks.values()]).tolist()
    assert kept == lowest_go(everything, sum(kept))


def test_a_floor_takes_from_the_others():
    scores = {
        "z.weight": torch.ones(4, 6) * 9,
        "gpt.weight": torch.ones(8, 3),
        "conv.weight": torch.ones(2, 2, 3, 2) * 8,
    }
    budget = Budget(40, Quantity.UNITS)
    bare = choose(scores, SITES, budget, Spread.GLOBAL)
    assert [int(mask.sum()) for mask in bare.values()] == [24, 0, 16]
    held = choose(scores, SITES, Budget(40, Quantity.UNITS, floor=5), Spread.GLOBAL)
    assert [int(mask.sum()) for mask in held.values()] == [21, 5, 14]


@pytest.mark.parametrize("spread", SPREADS)
def test_the_three_spreads_differ(spread):
    scores = {name: score + index * 10 for index, (name, score) in enumerate(scores_of(0).items())}
    counts = [int(mask.sum()) for mask in choose(scores, SITES, Budget(0.5), spread).values()]
    # shape sums 10, 11 and 9 of 36 kept
    assert counts == {Spread.GLOBAL: [0, 12, 24], Spread.UNIFORM: [12, 12, 12], Spread.ERK: [12, 13, 11]}[spread]


@pytest.mark.parametrize("text", ["1:2", "2:3", "1:3", "5:6"])
def test_patterns_run_along_the_inputs_of_every_layout(text):
    sites = {
        "linear": Site("linear", UnitKind.WEIGHT, (4, 12)),
        "gpt": Site("gpt", UnitKind.WEIGHT, (6, 5), Layout.TRANSPOSED),
        "conv": Site("conv", UnitKind.WEIGHT, (2, 2, 3), Layout.CONV),
        "up": Site("up", UnitKind.WEIGHT, (6, 3, 2), Layout.CONV_TRANSPOSED),
    }
    rng = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(site.shape, generator=rng) for name, site in sites.items()}
    keep, of = map(int, text.split(":"))
    for spread in Spread:
        masks = choose(scores, sites, Budget.nm(text), spread)
        for name, mask in masks.items():
            assert mask.shape == sites[name].shape
            assert mask.is_contiguous()
        rows = {
            "linear": (masks["linear"], scores["linear"]),
            "gpt": (masks["gpt"].t(), scores["gpt"].t()),
            "conv": (masks["conv"].reshape(2, 6), scores["conv"].reshape(2, 6)),
            "up": (masks["up"].reshape(6, 6).t(), scores["up"].reshape(6, 6).t()),
        }
        for mask, score in rows.values():
            groups = zip(mask.reshape(-1, of).tolist(), score.reshape(-1, of).tolist(), strict=True)
            assert all(kept == lowest_go(values, keep) for kept, values in groups)


def test_a_pattern_that_does_not_divide_names_the_layer():
    with pytest.raises(BudgetError, match=r"z\.weight: 6 inputs do not divide into groups of 4"):
        choose(scores_of(0), SITES, Budget.nm("2:4"), Spread.GLOBAL)


def test_counts_per_site():
    masks = keep_counts({"a": torch.tensor([[1.0, 3.0], [2.0, 1.0]]), "b": torch.tensor([5.0])}, {"a": 2, "b": 0})
    assert masks["a"].tolist() == [[False, True], [True, False]]
    assert masks["b"].tolist() == [False]


@pytest.mark.parametrize("spread", SPREADS)
def test_the_floor_holds_for_every_spread(spread):
    sites = {"big": Site("big", UnitKind.WEIGHT, (20, 20)), "small": Site("small", UnitKind.WEIGHT, (2, 3))}
    scores = {"big": torch.ones(20, 20), "small": torch.zeros(2, 3)}

    def kept(floor):
        return [int(mask.sum()) for mask in choose(scores, sites, Budget(0.9, floor=floor), spread).values()]

    assert kept(6) == [35, 6]
    assert kept(0)[1] < 6
    assert sum(kept(0)) == 41
