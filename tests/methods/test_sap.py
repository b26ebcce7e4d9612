"""SAP: the official code's counts, adaptive shares by hand, scopes, stops, and a killed run that goes on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from procedure_tools import Dying, fitting, make
from torch import nn

import secateur as sc
from secateur.core.errors import NumericsError, SettingsError
from secateur.core.seeding import seeded
from secateur.methods.weights.sap import SapSettings, Scope, floored, indices, prune, units
from secateur.scores.compressibility import pq_index
from secateur.structure.sites import weight_layers
from secateur.train.study import Level

WEIGHTS = 608


def level_of(model, masks=None):
    """A trained round with these weights."""
    sites = weight_layers(model).sites
    masks = masks or {name: torch.ones(site.shape, dtype=torch.bool) for name, site in sites.items()}
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, keep in masks.items():
        state[name][~keep] = 0
    return Level(0, masks, state, state, {}), sites


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def step(level, sites, target=0, **settings):
    return prune(level, level.after, sites, SapSettings(**settings), target)


def linear():
    with seeded(0):
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


GOLDEN = [
    ({"scope": "global", "p": 0.5, "q": 1.0}, 8374, 8373),
    ({"scope": "global", "p": 1.0, "q": 2.0}, 6988, 6987),
    ({"scope": "layer", "p": 0.5, "q": 1.0}, 8400, 8399),
    ({"scope": "layer", "p": 1.0, "q": 2.0}, 7063, 7062),
    ({"scope": "neuron", "p": 0.5, "q": 1.0}, 8477, 8477),
    ({"scope": "neuron", "p": 1.0, "q": 2.0}, 7147, 7147),
    ({"scope": "global", "ratio": "fixed"}, 7577, 7577),
]


@pytest.mark.parametrize(("settings", "official", "exact"), GOLDEN)
def test_official_counts_after_one_step(settings, official, exact):
    level, sites = level_of(linear())
    assert kept(step(level, sites, reference=True, **settings)) == official
    # on integers: d - r of every unit, where float32 can lose one
    assert kept(step(level, sites, **settings)) == exact


def brute(weights, masks, scope, p, q):
    """Unit by unit in plain Python: norms, bound, count, sort."""
    found = {name: mask.clone() for name, mask in masks.items()}

    def one(entries):  # (|w|, name, flat index) of the kept entries of one unit
        d = len(entries)
        low = sum(w**p for w, *_ in entries) ** (1 / p)
        high = sum(w**q for w, *_ in entries) ** (1 / q)
        index = 1 - d ** (1 / q - 1 / p) * low / high
        r = math.ceil(d * (1 - index) ** (p * q / (q - p)) - 1e-9)
        c = math.floor(min(d - r, 0.9 * d) + 1e-9)
        for _, name, place in sorted(entries)[:c]:
            found[name].view(-1)[place] = False

    rows = []
    for name, mask in masks.items():
        for row in range(mask.shape[0]):
            width = mask[row].numel()
            rows.append(
                [
                    (float(weights[name].reshape(-1)[k].double().abs()), name, k)
                    for k in range(row * width, (row + 1) * width)
                    if mask.reshape(-1)[k]
                ]
            )
    groups = {
        Scope.NEURON: rows,
        Scope.LAYER: [[e for r in rows for e in r if e[1] == name] for name in masks],
        Scope.GLOBAL: [[e for r in rows for e in r]],
    }[scope]
    for entries in groups:
        if entries:
            one(entries)
    return found


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.3, 1.6)])
def test_two_steps_equal_brute_force(scope, p, q):
    torch.manual_seed(1)
    level, sites = level_of(nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(5, 4)))
    for _ in range(2):  # the second with masks in force: removed entries are neither counted nor sorted
        masks = step(level, sites, scope=scope, p=p, q=q)
        expected = brute(level.after, level.masks, scope, p, q)
        assert all(torch.equal(masks[name], expected[name]) for name in masks)
        assert kept(masks) < kept(level.masks)
        level = Level(1, masks, level.before, {**level.after, **{n: level.after[n] * m for n, m in masks.items()}}, {})


def test_rows_of_a_transposed_layer_are_its_outputs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(3, 40)  # weight [in, out]
    level, sites = level_of(nn.Sequential(layer))
    (unit,) = units(level.after, level.masks, sites, Scope.NEURON).values()
    assert unit.weights.shape == (3, 40)
    (mask,) = step(level, sites, scope="neuron").values()
    assert mask.shape == layer.weight.shape
    index = pq_index(layer.weight.t())
    assert mask.sum(0).tolist() == [math.ceil(40 * (1 - float(i))) for i in index]


def test_a_unit_of_equal_magnitudes_or_zeros_loses_nothing():
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    model[0].weight.data = torch.tensor([[2.0] * 6, [0.0] * 6, [9.0, 0, 0, 0, 0, 0]])
    level, sites = level_of(model)
    (mask,) = step(level, sites, scope="neuron").values()
    # one-hot: r = ceil(6 * (1 - 5/6)) = 1, so 5 are due, all of them zeros; beta allows floor(5.4)
    assert mask.sum(1).tolist() == [6, 6, 1]
    assert bool(mask[2, 0])


def test_a_kept_weight_that_is_zero_counts_as_an_entry():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    level, sites = level_of(model)
    (mask,) = step(level, sites).values()
    assert mask.tolist() == [[True, True, False, False]]  # I = 1/2 of d = 4; by non-zeros it would be 0


def test_gamma_eta_and_beta_by_hand():
    torch.manual_seed(0)
    level, sites = level_of(nn.Sequential(nn.Linear(100, 1, bias=False)))
    index = float(pq_index(level.after["0.weight"]))
    r = math.ceil(100 * (1 - index))
    assert kept(step(level, sites)) == r
    assert kept(step(level, sites, gamma=3)) == 100 - 3 * (100 - r)
    assert kept(step(level, sites, gamma=100)) == 10
    assert kept(step(level, sites, gamma=100, beta=0.5)) == 50
    assert kept(step(level, sites, eta=0.5)) == math.ceil(100 * (1 - index) / 1.5**2)


@given(st.integers(0, WEIGHTS), st.sampled_from(list(Scope)), st.sampled_from(["sap", "fixed"]))
def test_never_beyond_the_target(target, scope, ratio):
    with seeded(3):
        level, sites = level_of(make())
    free = kept(step(level, sites, scope=scope, ratio=ratio, p=1, q=2))
    masks = step(level, sites, target, scope=scope, ratio=ratio, p=1, q=2)
    assert kept(masks) == max(free, target)


def test_the_floor_of_a_layer_holds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2))
    model[1].weight.data *= 1e-3
    level, sites = level_of(model)
    masks = step(level, sites, gamma=5)
    assert int(masks["1.weight"].sum()) < 5
    held = floored(masks, level.masks, level.after, 5)
    assert (int(held["1.weight"].sum()), kept(held)) == (5, kept(masks))
    gone = model[1].weight.abs()[~held["1.weight"]]
    assert gone.max() <= model[1].weight.abs()[held["1.weight"]].min()


def test_ties_go_by_index_or_survive_as_in_the_official_code():
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -1.0, 1.0, 1.0, 5.0, 5.0]])
    level, sites = level_of(model)
    (exact,) = step(level, sites, ratio="fixed", rate=0.4).values()  # ceil(0.4 * 5) = 2
    assert exact.tolist() == [[False, False, True, True, True, True]]
    assert kept(step(level, sites, ratio="fixed", rate=0.4, reference=True)) == 6


def test_nan_is_refused_with_the_layers_name():
    model = nn.Sequential(nn.Linear(6, 2))
    model[0].weight.data[0, 0] = math.nan
    level, sites = level_of(model)
    with pytest.raises(NumericsError, match=r"0\.weight"):
        step(level, sites, scope="layer")


# --- the loop -----------------------------------------------------------------------------------


def study(fit=None, sparsity=0.6, **settings):
    chosen = {"p": 1.0, "q": 2.0, "rounds": 20} | settings
    return sc.study(make, fit or fitting(), "sap", sparsity, seed=4, **chosen)


def test_shares_fall_and_the_sparsity_is_hit_exactly():
    found = study()
    shares = [row["pruned_share"] for row in found.rows[:-1]]
    assert found.plan.units() == (WEIGHTS - math.floor(0.6 * WEIGHTS), WEIGHTS)
    assert shares[0] > 2 * shares[-2]
    assert found.summary["stop"] == "reached the sparsity"
    assert not found.warnings
    for before, after in zip(found.rows, found.rows[1:], strict=False):
        assert after["density"] == pytest.approx(before["density"] * (1 - before["pruned_share"]))


def test_rows_hold_the_indices_of_trained_and_pruned_weights():
    found = study(rounds=1, p=0.5, q=1.0)
    first, last = found.rows
    sites = {site.name: site for site in weight_layers(make()).sites.values()}
    assert indices(found.state, found.masks, sites, SapSettings()) == {
        name: value for name, value in last.items() if name.startswith(("pq_index", "gini"))
    }
    assert first["pruned_pq_index_global"] < first["pq_index_global"]  # the smallest are gone, the rest is more even
    assert set(last["densities"]) == set(sites)
    assert 0 <= first["pruned_accuracy"] <= 1
    assert "pruned_accuracy" not in study(rounds=1, evaluate_pruned=False).rows[0]


def test_the_index_is_that_of_trained_not_of_rewound_weights():
    found = study(rounds=2)
    with seeded(4):
        fresh = make()
    level, sites = level_of(fresh, found.masks)
    initial = indices(level.after, found.masks, sites, SapSettings(p=1, q=2))
    assert abs(initial["pq_index_global"] - found.rows[-1]["pq_index_global"]) > 1e-3


class Watching:
    """Notes what each training starts from."""

    def __init__(self):
        self.fit, self.steps, self.starts = fitting(), 12, []

    def __call__(self, model, masks, start, stop):
        self.starts.append({name: value.clone() for name, value in model.state_dict().items()})
        return self.fit(model, masks, start, stop)


@pytest.mark.parametrize("rewind", ["init", "none"])
def test_every_round_starts_where_it_should(rewind):
    fit = Watching()
    found = study(fit, rounds=2, rewind=rewind, evaluate_pruned=False)
    first, second = fit.starts[0], fit.starts[1]
    masks = {name: value != 0 for name, value in second.items() if name in found.masks}
    back = all(torch.equal(second[name], first[name] * masks[name]) for name in masks)
    biases = all(torch.equal(second[name], first[name]) for name in first if name not in masks)
    assert (back, biases) == ((True, True) if rewind == "init" else (False, False))  # norms and statistics as well


def test_one_shot_ranks_by_the_first_dense_network():
    found = study(rounds=3, one_shot=True, scope="global", ratio="fixed")
    dense = fitting()
    with seeded(4):
        model = make()
    dense(model)
    size = {name: model.get_parameter(name).detach().abs() for name in found.masks}
    low = torch.cat([size[name][mask] for name, mask in found.masks.items()]).min()
    high = torch.cat([size[name][~mask] for name, mask in found.masks.items()]).max()
    assert low >= high
    assert not all(
        torch.equal(found.masks[name], other) for name, other in study(rounds=3, ratio="fixed").masks.items()
    )


def test_a_fixed_ratio_removes_a_constant_share():
    found = study(ratio="fixed", rate=0.25, rounds=4, sparsity=0.9)
    left = WEIGHTS
    for row in found.rows[1:]:
        left -= math.ceil(0.25 * (left - 1))
        assert round(row["density"] * WEIGHTS) == left


def test_a_stalled_run_stops_and_says_so():
    def even(model, masks, start, stop):  # all magnitudes equal: the index asks for nothing
        for name, keep in masks.items():
            model.get_parameter(name).data = keep * 0.5
        return {"accuracy": 1.0}

    found = sc.study(make, even, "sap", 0.9, steps=3)
    assert len(found.rows) == 1
    assert "stalled" in found.summary["stop"]
    assert "before the sparsity asked" in found.warnings[0]
    short = study(rounds=1, sparsity=0.95)
    assert "rounds" in short.summary["stop"]
    assert short.warnings


def test_powers_are_checked_before_anything_is_trained():
    def never(*_):
        raise AssertionError

    with pytest.raises(SettingsError, match="0 < p < q"):
        sc.study(make, never, "sap", 0.5, steps=1, p=1.0, q=1.0)


@pytest.mark.parametrize("dies_at", [1, 3, 4])
def test_a_killed_run_goes_on_and_ends_with_the_same(dies_at, tmp_path):
    straight = study(rounds=3)
    with pytest.raises(KeyboardInterrupt):
        study(Dying(dies_at, fitting()), rounds=3, folder=tmp_path / "run")
    found = study(rounds=3, folder=tmp_path / "run")
    assert found.to_json() == straight.to_json()
    assert all(torch.equal(found.state[name], value) for name, value in straight.state.items())
    assert all(torch.equal(found.masks[name], value) for name, value in straight.masks.items())
