"""Rounds of pruning: closed-form counts, exact ends, nested masks, the released codes' thresholds."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, NumericsError, SettingsError
from secateur.core.units import Layout, Site, UnitKind
from secateur.train.cuts import Cuts, CutSettings, Ranking, reference_global, reference_layer, round_counts

SHAPES = {"a": (30, 20), "b": (20, 30), "c": (10, 20)}
CONV = Site("a", UnitKind.WEIGHT, (30, 20), Layout.CONV)
SITES = {name: Site(name, UnitKind.WEIGHT, shape) for name, shape in SHAPES.items()}
SIZES = {name: site.units for name, site in SITES.items()}


def weights(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def ones():
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def all_rounds(cuts, values=None):
    found = [ones()]
    for index in range(1, cuts.rounds + 1):
        found.append(cuts.masks(index, found[-1], values or weights(index)))
    return found


def test_density_follows_the_closed_form_within_one_weight_per_round():
    cuts = Cuts(SITES, Budget(0.95), CutSettings())
    assert cuts.rounds == len(all_rounds(cuts)) - 1 > 12
    for index, masks in enumerate(all_rounds(cuts)[:-1]):
        for name, count in kept(masks).items():
            rate = 0.1 if name == "c" else 0.2
            assert -1e-6 <= count - SIZES[name] * (1 - rate) ** index <= index, (index, name)


@pytest.mark.parametrize("ranking", list(Ranking))
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 0.5, 0.777, 0.8])
def test_the_last_round_ends_on_the_asked_count(ranking, sparsity):
    cuts = Cuts(SITES, Budget(sparsity), CutSettings(ranking=ranking, prune_output=True))
    last = all_rounds(cuts)[-1]
    assert sum(kept(last).values()) == 1400 - math.floor(1400 * sparsity + 1e-9)


def test_what_went_never_returns_even_when_its_weight_is_the_largest():
    cuts = Cuts(SITES, Budget(0.7), CutSettings(ranking="global"))
    rounds = all_rounds(cuts)
    for before, after in itertools.pairwise(rounds):
        assert all(not (after[name] & ~before[name]).any() for name in SITES)


def test_survivors_that_are_zero_rank_above_what_is_gone():
    # all weights are exactly zero: masks alone must say who is still there
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    cuts = Cuts(SITES, Budget(0.6), CutSettings())
    rounds = all_rounds(cuts, zeros)
    assert kept(rounds[-1]) != kept(rounds[-2])
    for before, after in itertools.pairwise(rounds):
        assert all(not (after[name] & ~before[name]).any() for name in SITES)


def test_what_is_gone_stays_below_a_survivor_that_is_zero():
    # ties fall to the lower index, and those gone have the higher ones
    site = {"w": Site("w", UnitKind.WEIGHT, (10,))}
    mask = {"w": torch.arange(10) < 8}
    cuts = Cuts(site, Budget(0.3), CutSettings(rate_output=0.2))
    assert [counts["w"] for counts in cuts.counts] == [10, 8, 7]
    assert cuts.masks(2, mask, {"w": torch.zeros(10)})["w"].tolist() == [False, *[True] * 7, False, False]


def test_layerwise_keeps_the_largest_of_each_layer_and_global_those_of_all():
    values = weights()
    values["a"] *= 0.01
    layerwise = all_rounds(Cuts(SITES, Budget(0.17), CutSettings(rounds=1)), values)[-1]
    for name, mask in layerwise.items():
        size = values[name].abs()
        assert size[mask].min() >= size[~mask].max()
    whole = all_rounds(Cuts(SITES, Budget(0.3), CutSettings(ranking="global", rounds=1)), values)[-1]
    assert kept(whole)["c"] == 200  # the output layer is left alone
    ab = torch.cat([values[n].abs().flatten() for n in "ab"])
    mask = torch.cat([whole[n].flatten() for n in "ab"])
    assert ab[mask].min() >= ab[~mask].max()
    assert kept(whole)["a"] < 0.5 * kept(whole)["b"]


def test_rates_by_kind_of_layer():
    sites = {"a": CONV, "b": SITES["b"], "c": SITES["c"]}
    assert CutSettings(rate_conv=0.1).rates(sites) == {"a": 0.1, "b": 0.2, "c": 0.1}
    assert CutSettings(rate_output=0.05).rates(sites) == {"a": 0.2, "b": 0.2, "c": 0.05}
    assert CutSettings(output="a").rates(sites) == {"a": 0.1, "b": 0.2, "c": 0.2}
    assert CutSettings(prune_output=False).rates(sites)["c"] == 0
    assert CutSettings(ranking="global").rates(sites) == {"a": 0.2, "b": 0.2, "c": 0}
    assert CutSettings(ranking="global", prune_output=True, rate_conv=0.1).rates(sites) == dict.fromkeys("abc", 0.2)
    with pytest.raises(SettingsError, match="head"):
        CutSettings(output="head").rates(sites)


@pytest.mark.parametrize("rounds", [1, 2, 5, 20])
def test_explicit_rounds_scale_the_rates_and_meet_the_count(rounds):
    counts = round_counts(SIZES, {"a": 0.2, "b": 0.2, "c": 0.1}, 280, rounds=rounds)
    totals = [sum(level.values()) for level in counts]
    assert len(counts) == rounds + 1
    assert totals[-1] == 280
    assert all(first > second for first, second in itertools.pairwise(totals))
    assert counts[-1]["c"] / 200 > counts[-1]["a"] / 600


def test_the_floor_holds_in_every_round():
    values = weights()
    values["a"] *= 1e-3
    for masks in all_rounds(Cuts(SITES, Budget(0.75, floor=50), CutSettings(ranking="global")), values):
        assert all(count >= 50 for count in kept(masks).values())
    unguarded = all_rounds(Cuts(SITES, Budget(0.75), CutSettings(ranking="global")), values)
    assert kept(unguarded[-1])["a"] < 50


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(BudgetError, match="201 weights"):
        Cuts(SITES, Budget(100, Quantity.UNITS), CutSettings(ranking="global", rate=0.999))
    with pytest.raises(BudgetError, match="at least"):  # one shot takes at most all of a and b, and half of c
        Cuts(SITES, Budget(60, Quantity.UNITS), CutSettings(rounds=1))
    with pytest.raises(SettingsError, match="too many"):
        round_counts({"a": 10}, {"a": 0.2}, 9, rounds=5)
    with pytest.raises(SettingsError, match="rounds"):
        Cuts(SITES, Budget(0.5), CutSettings(rounds=2, reference=True))
    broken = weights() | {"b": torch.full(SHAPES["b"], torch.nan)}
    with pytest.raises(NumericsError, match="'b'"):
        Cuts(SITES, Budget(0.5), CutSettings()).masks(1, ones(), broken)


@given(
    st.lists(st.integers(50, 4000), min_size=1, max_size=4),
    st.floats(0.05, 0.6),
    st.floats(0.05, 0.95),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_counts_fall_in_every_group_and_end_exactly(sizes, rate, sparsity, rounds):
    groups = {str(index): size for index, size in enumerate(sizes)}
    keep = max(60, int(sum(sizes) * (1 - sparsity)))
    assume(sum(sizes) - keep >= 4 * len(sizes) * (rounds or 0))  # fewer weights than rounds are refused
    counts = round_counts(groups, dict.fromkeys(groups, rate), keep, rounds=rounds)
    for before, after in itertools.pairwise(counts):
        assert all(0 <= after[group] <= before[group] for group in groups)
    assert sum(counts[-1].values()) == min(keep, sum(sizes))


def test_more_rounds_than_weights_are_refused():
    with pytest.raises(SettingsError, match="2 rounds are too many to remove 1 weights; take fewer"):
        round_counts({"a": 61}, {"a": 0.5}, 60, rounds=2)


# --- the released codes -----------------------------------------------------------------------------


def test_the_first_released_code_removes_one_more_and_all_ties():
    ten = torch.arange(1.0, 11.0)
    everything = torch.ones(10, dtype=torch.bool)
    assert int((~reference_layer(everything, ten, 0.2, "w")).sum()) == 3  # 2 were asked for
    tied = torch.tensor([1.0, 2, 3, 3, 3, 3, 7, 8, 9, 10])
    assert int((~reference_layer(everything, tied, 0.2, "w")).sum()) == 6
    with pytest.raises(BudgetError, match="'w' has 0"):
        reference_layer(~everything, ten, 0.2, "w")


def test_ours_removes_what_was_asked_ties_by_index():
    site = {"w": Site("w", UnitKind.WEIGHT, (10,))}
    mask = {"w": torch.ones(10, dtype=torch.bool)}
    cuts = Cuts(site, Budget(0.2), CutSettings(prune_output=True, rate_output=0.2))
    tied = {"w": torch.tensor([1.0, -2, 3, 3, 3, 3, 7, 8, 9, 1])}
    assert cuts.masks(1, mask, tied)["w"].tolist() == [False, *[True] * 8, False]


def made():
    """Inputs of the golden numbers; RandomState's streams are frozen."""
    rng = np.random.RandomState(7)
    return {
        name: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        for name, shape in {"a": (20, 30), "b": (20, 20), "c": (10, 20)}.items()
    }


# Made by `Strategy.prune` of pruning/sparse_global.py in github.com/facebookresearch/open_lth at 2ce732f, three rounds
# of 0.2 on the inputs of `made()`: kept weights per tensor and round, and the sum of kept flat indices in the end.
OPEN_LTH = {
    (): ([(485, 315, 159), (386, 251, 129), (301, 199, 111)], (92739, 39906, 10516)),
    ("c",): ([(458, 301, 200), (339, 227, 200), (253, 158, 200)], (77185, 30275, 19900)),
}


@pytest.mark.parametrize("whole", OPEN_LTH)
def test_global_thresholds_are_those_of_open_lth(whole):
    values = made()
    masks = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in values.items()}
    counts, places = OPEN_LTH[whole]
    for expected in counts:
        masks = reference_global(masks, values, 0.2, whole)
        assert tuple(kept(masks).values()) == expected
    assert tuple(int(mask.flatten().nonzero().sum()) for mask in masks.values()) == places


def test_open_lth_removes_one_more_than_it_counts():
    # 1,384 weights, ceil(0.2 * 1384) = 277 asked for
    values = {"w": torch.from_numpy(np.random.RandomState(0).standard_normal(1384))}
    masks = reference_global({"w": torch.ones(1384, dtype=torch.bool)}, values, 0.2)
    assert int((~masks["w"]).sum()) == 278


def test_the_reference_switch_reaches_both_codes():
    values = weights()
    layerwise = Cuts(SITES, Budget(0.5), CutSettings(reference=True)).masks(1, ones(), values)
    assert kept(layerwise) == {"a": 600 - 121, "b": 600 - 121, "c": 200 - 21}
    together = Cuts(SITES, Budget(0.5), CutSettings(reference=True, ranking="global")).masks(1, ones(), values)
    assert kept(together)["c"] == 200
    assert sum(kept(together).values()) == 1400 - 281
