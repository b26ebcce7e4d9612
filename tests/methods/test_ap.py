"""AP: what goes and how much, by hand; hosts, controls, running out of negatives, zero rates, killed runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from procedure_tools import Dying, dataset, fitting, make
from torch import nn

import secateur as sc
from secateur.core.budget import Quantity
from secateur.core.errors import ModelError, SettingsError
from secateur.core.seeding import seeded
from secateur.methods.weights.ap import ApSettings, Cycles, HostName, Pool, least_moved, shares
from secateur.train.study import Level, Study

WEIGHTS = 608


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def study_of(model=make, budget=None, **extras):
    return Study(model, fitting(), 12, budget or sc.Budget(0.9), seed=4, extras=extras)


def level_between(before, after, masks=None, index=0):
    """A round that trained one model into another."""
    first, last = ({n: v.detach().clone() for n, v in m.state_dict().items()} for m in (before, after))
    names = masks or {
        name: torch.ones_like(p, dtype=torch.bool) for name, p in before.named_parameters() if p.dim() > 1
    }
    for state in (first, last):
        for name, keep in names.items():
            state[name][~keep] = 0
    return Level(index, names, first, last, {})


def trained():
    """A level whose weights all moved, by different amounts, some across zero."""
    with seeded(0):
        return level_between(make(), make())


def cycles(**settings):
    extras = {"host": settings.pop("function")} if "function" in settings else {}
    return Cycles(study_of(**extras), ApSettings(**settings))


# --- one cycle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["global", "layer"])
def test_ap_takes_the_least_moved_negative_weights_that_the_host_left(host):
    level = trained()
    cut = cycles(host=host, p=0.3, q=0.1).cut(level, 0)
    assert (kept(level.masks) - kept(cut.masks), kept(cut.by_ap), cut.missing) == (182, 60, 0)
    before, after, taken, left = (
        torch.cat([part[name].reshape(-1) for name in cut.masks])
        for part in (level.before, level.after, cut.by_ap, cut.masks)
    )
    moved = (after - before).abs()
    assert (after[taken] < 0).all()  # the sign of the weight now, not at the start of the cycle
    assert (before[taken] > 0).any()
    assert moved[taken].max() <= moved[left & (after < 0)].min()


def test_the_host_takes_what_it_would_take_alone_at_the_smaller_share():
    level = trained()
    with_ap = cycles(p=0.3, q=0.1).cut(level, 0)
    alone = cycles(q=0.0).hosted(level.after, level.masks, WEIGHTS - 182 + 60)
    assert all(torch.equal(with_ap.by_host[name], ~alone[name]) for name in alone)


def test_layerwise_host_removes_the_same_share_everywhere():
    level = trained()
    cut = cycles(host="layer", p=0.25, q=0.0).cut(level, 0)
    for name, mask in cut.masks.items():
        assert int(mask.sum()) == pytest.approx(0.75 * mask.numel(), abs=1)
        assert level.after[name][mask].abs().min() >= level.after[name][~mask].abs().max()


def test_movement_is_that_of_this_very_training():
    """P is where the cycle's training began, whatever the network is rewound to afterwards."""
    with seeded(0):
        start, end = make(), make()
    level = level_between(start, end)
    score = least_moved(level, level.masks, Pool.NEGATIVE)
    weight = end.get_parameter("0.weight").detach()
    moved = (weight.double() - start.get_parameter("0.weight").detach().double()).abs()
    assert torch.equal(score["0.weight"], torch.where(weight < 0, moved, torch.inf))


def test_a_weight_of_exactly_zero_is_not_negative_and_not_removed():
    level = trained()
    level.after["5.weight"].zero_()
    cut = cycles(p=0.3, q=0.1, host="layer").cut(level, 0)
    assert not cut.by_ap["5.weight"].any()
    assert cut.masks["5.weight"].any()  # a mask, not the value, says what is pruned


def test_ties_in_movement_give_exact_counts():
    with seeded(0):
        start, end = make(), make()
    for first, last in zip(start.parameters(), end.parameters(), strict=True):
        last.data = first.data - 0.5  # all moved alike
    cut = cycles(p=0.3, q=0.1).cut(level_between(start, end), 0)
    assert (kept(cut.by_ap), kept(cut.masks)) == (60, WEIGHTS - 182)


@given(st.integers(1, 10**7), st.floats(0.01, 0.6), st.floats(0, 1), st.integers(0, 10**7))
def test_shares_are_of_the_survivors_and_q_is_part_of_p(alive, p, part, target):
    target = min(target, alive)
    settings = ApSettings(p=p, q=part * p * 0.99)
    going, due = shares(alive, target, settings)
    assert 0 <= due <= going <= alive - target
    if alive - target > math.floor(p * alive + 1e-9):
        assert going == math.floor(p * alive + 1e-9)
        assert due == math.floor(settings.q * alive + 1e-9)
    else:
        assert going == alive - target  # the last cycle stops where it was asked to


def test_pools_of_the_controls():
    level = trained()
    positive = cycles(p=0.3, q=0.1, pool="positive").cut(level, 0)
    random = cycles(p=0.3, q=0.1, pool="random").cut(level, 0)
    sign = {
        name: torch.cat([level.after[layer][gone] for layer, gone in cut.by_ap.items()]).sign().mean()
        for name, cut in (("positive", positive), ("random", random))
    }
    assert sign["positive"] == 1
    assert -0.6 < sign["random"] < 0.6
    assert kept(positive.by_ap) == kept(random.by_ap) == 60
    again = cycles(p=0.3, q=0.1, pool="random").cut(level, 0)
    assert all(torch.equal(again.by_ap[name], gone) for name, gone in random.by_ap.items())


@pytest.mark.parametrize("pool", ["negative", "random"])
def test_the_first_layer_can_be_left_to_the_host(pool):
    assert cycles(p=0.3, q=0.1, pool=pool).cut(trained(), 0).by_ap["0.weight"].any()
    cut = cycles(p=0.3, q=0.1, pool=pool, skip_first=True).cut(trained(), 0)
    assert not cut.by_ap["0.weight"].any()
    assert cut.by_host["0.weight"].any()
    assert kept(cut.by_ap) == 60


def test_layers_that_could_fall_below_the_floor_are_left_to_the_host():
    study = study_of(budget=sc.Budget(0.9, floor=45))  # the last layer has 48 weights
    cut = Cycles(study, ApSettings(p=0.3, q=0.1)).cut(trained(), 0)
    assert not cut.by_ap["5.weight"].any()
    assert int(cut.masks["5.weight"].sum()) >= 45
    assert kept(cut.by_ap) == 60


def test_when_negatives_run_out_the_host_takes_the_rest():
    level = trained()
    for name in level.masks:
        level.after[name].abs_()
    level.after["3.weight"].view(-1)[:7] = -5.0  # so large that the host leaves them
    cut = cycles(p=0.3, q=0.1).cut(level, 0)
    assert (kept(cut.by_ap), cut.missing) == (7, 53)
    assert kept(level.masks) - kept(cut.masks) == 182
    assert kept(cut.by_host) == 175
    assert not any((cut.by_host[name] & cut.by_ap[name]).any() for name in cut.masks)


# --- hosts --------------------------------------------------------------------------------------


def test_any_method_of_the_catalogue_can_be_the_host():
    def host(model, sparsity, masks):
        return sc.plan(model, "global_magnitude", sparsity=sparsity).masks

    level = trained()
    ours, theirs = cycles(p=0.3, q=0.1), cycles(p=0.3, q=0.1, host="given", function=host)
    first, second = ours.cut(level, 0), theirs.cut(level, 0)
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
    level = level_between(make(), make(), first.masks, index=1)  # pruned weights go first again
    assert kept(theirs.cut(level, 0).masks) == kept(ours.cut(level, 0).masks)


def test_hosts_that_do_not_keep_their_word_are_refused():
    with pytest.raises(SettingsError, match="host=given needs host="):
        cycles(host="given")
    level = trained()
    level.masks["0.weight"][0] = False
    revive = cycles(host="given", function=lambda m, s, masks: {n: torch.ones_like(k) for n, k in masks.items()})
    with pytest.raises(ModelError, match=r"'0\.weight'.*brought removed weights"):
        revive.cut(level, 0)
    idle = cycles(host="given", function=lambda m, s, masks: dict(masks))
    with pytest.raises(ModelError, match="the host kept 596 weights instead of"):
        idle.cut(level, 0)
    with pytest.raises(ModelError, match=r"no mask for '0\.weight'"):
        cycles(host="given", function=lambda m, s, masks: {}).cut(level, 0)


# --- the loop -----------------------------------------------------------------------------------


def study(fit=None, sparsity=0.7, **given):
    folder = given.pop("folder", None)
    extras = given.pop("extras", {"data": dataset()})
    settings = {"p": 0.3, "q": 0.05} | given
    return sc.study(make, fit or fitting(), "ap", sparsity, seed=4, folder=folder, extras=extras, **settings)


def test_sparsity_falls_as_with_the_host_alone_and_ends_exactly():
    with_ap, alone = study(), study(q=0.0)
    assert [row["density"] for row in with_ap.rows] == [row["density"] for row in alone.rows]
    assert with_ap.plan.units() == (WEIGHTS - math.floor(0.7 * WEIGHTS), WEIGHTS)
    left = WEIGHTS
    for row in with_ap.rows[1:-1]:
        left -= math.floor(0.3 * left)
        assert round(row["density"] * WEIGHTS) == left
    first = with_ap.rows[0]
    assert sum(first["by_ap"].values()) == math.floor(0.05 * WEIGHTS)
    assert sum(first["by_ap"].values()) + sum(first["by_host"].values()) == math.floor(0.3 * WEIGHTS)
    assert with_ap.summary["removed_by_ap"] == sum(sum(row["by_ap"].values()) for row in with_ap.rows[:-1])
    assert alone.summary["removed_by_ap"] == 0


def test_zero_rates_are_those_of_the_trained_network():
    found = study()
    model = make()
    model.load_state_dict(found.state)
    dead = model.eval()[:3](dataset().inputs) == 0
    rate = found.rows[-1]["zero_rates"]["2"]
    assert (rate["neurons"], rate["total"]) == (20, pytest.approx(float(dead.double().mean())))
    assert found.rows[-1]["zero_rate"]["neurons"] == 36
    assert "zero_rate" not in study(extras={}).rows[0]


def test_smooth_nets_are_refused_unless_the_surrogate_is_asked_for():
    def smooth():
        return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 3))

    extras = {"data": dataset()}
    with pytest.raises(ModelError, match="surrogate"):
        sc.study(smooth, fitting(), "ap", 0.5, extras=extras)
    assert sc.study(smooth, fitting(), "ap", 0.5, extras=extras, surrogate=True).rows[0]["zero_rate"]["total"] > 0


class Watching:
    """Notes what each training starts from and ends with."""

    def __init__(self):
        self.fit, self.steps, self.states = fitting(), 12, []

    def __call__(self, model, masks, start, stop):
        first = {name: value.clone() for name, value in model.state_dict().items()}
        metrics = self.fit(model, masks, start, stop)
        self.states.append((first, {name: value.clone() for name, value in model.state_dict().items()}))
        return metrics


@pytest.mark.parametrize("rewind", ["init", "none"])
def test_pro_rewinds_and_lite_goes_on(rewind):
    fit = Watching()
    found = study(fit, sparsity=0.3, rewind=rewind)  # one cycle
    (first, trained_), (second, _) = fit.states
    source = first if rewind == "init" else trained_
    assert all(torch.equal(second[name], source[name] * mask) for name, mask in found.masks.items())
    assert torch.equal(second["0.bias"], source["0.bias"])


def test_running_out_of_negatives_is_said():
    class Positive(Watching):
        def __call__(self, model, masks, start, stop):
            metrics = self.fit(model, masks, start, stop)
            for name in masks:
                model.get_parameter(name).data.abs_()
            return metrics

    found = study(Positive(), sparsity=0.3)
    assert found.warnings == ["cycle 1: AP found 30 weights too few, the host took them instead; lower q"]
    assert found.plan.units()[0] == WEIGHTS - 182


def test_shares_that_make_no_sense_are_refused():
    with pytest.raises(SettingsError, match="give q < p"):
        study(p=0.1, q=0.1)
    with pytest.raises(SettingsError, match="less than one"):
        study(p=0.001, q=0.0)


@pytest.mark.parametrize(("dies_at", "pool"), [(1, "negative"), (3, "negative"), (3, "random")])
def test_a_killed_run_goes_on_and_ends_with_the_same(dies_at, pool, tmp_path):
    straight = study(pool=pool)
    with pytest.raises(KeyboardInterrupt):
        study(Dying(dies_at, fitting()), pool=pool, folder=tmp_path / "run")
    found = study(pool=pool, folder=tmp_path / "run")
    assert found.to_json() == straight.to_json()
    assert all(torch.equal(found.state[name], value) for name, value in straight.state.items())
    assert all(torch.equal(found.masks[name], value) for name, value in straight.masks.items())


def test_a_budget_in_units_is_met():
    budget = sc.Budget(500, Quantity.UNITS)
    found = sc.study(make, fitting(), "ap", budget=budget, host=HostName.LAYER)
    assert found.plan.units()[0] == 500
