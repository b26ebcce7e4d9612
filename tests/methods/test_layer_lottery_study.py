"""Layer lottery, the experiment: what is trained from where, what it is compared with, what a kill costs."""

from __future__ import annotations

import copy

import pytest
import torch
from procedure_tools import Dying
from residual_models import ResNet
from test_layer_lottery import DATA, NamedStages, images
from torch import nn

import secateur as sc
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, DataError, ModelError, SettingsError
from secateur.core.seeding import seeded
from secateur.measure import accuracy, parameters
from secateur.methods.depth.layer_lottery import LayerLotterySettings
from secateur.shrink import race
from secateur.shrink.filters import count_filters
from secateur.shrink.race import judged
from secateur.train.loop import Fitting, Recipe
from secateur.train.snapshot import model_state

T = 6
MEASURED = {"step_ms", "speedup", "seconds", "kwh", "co2_kg", "co2_saved"}


def make():
    return ResNet(blocks=3)


def fitting(steps=T):
    recipe = Recipe(steps=steps, batch=20, lr=0.05)
    return Fitting(DATA, recipe, lambda model: {"accuracy": 100 * accuracy(model, HELD_OUT).value})


HELD_OUT = images(40)


class Watched:
    """A fit that remembers what it was given."""

    def __init__(self):
        self.fit, self.calls, self.steps, self.data, self.recipe = fitting(), [], T, DATA, fitting().recipe

    def __call__(self, model, masks, start, stop):
        before = (copy.deepcopy(model), start, stop)
        found = self.fit(model, masks, start, stop)
        self.calls.append((*before, model_state(model)))
        return found


def study(fit=None, p=(2,), **more):
    settings = {"strict": False, "repeats": 1, "robust": False, "budget": sc.Budget(0.0)} | more
    return sc.study(make, fit or fitting(), "layer_lottery", p=p, **settings)


def initial(seed=0):
    with seeded(seed):
        return make()


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def blocks_of(model):
    return [block.state_dict() for stage in model.stages for block in stage]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- at initialisation -----------------------------------------------------------------------------


def test_tickets_are_trained_from_their_own_initial_weights_by_the_whole_recipe():
    fit = Watched()
    found = study(fit, p=(1, 3), seed=5)
    assert [row["network"] for row in found.rows] == ["dense", "ticket", "ticket"]
    assert [call[1:3] for call in fit.calls] == [(0, T)] * 3
    dense = blocks_of(initial(5))
    assert all(same(a, b) for a, b in zip(blocks_of(fit.calls[0][0]), dense, strict=True))
    for row, (model, *_) in zip(found.rows[1:], fit.calls[1:], strict=True):
        names = [f"stages.{s}.{i}" for s in range(3) for i in range(3)]
        kept = [block for name, block in zip(names, dense, strict=True) if name not in row["removed"]]
        assert len(row["removed"]) == row["p"] == sum(row["victims"].values())
        assert all(same(a, b) for a, b in zip(blocks_of(model), kept, strict=True))
        assert same(model.head.state_dict(), initial(5).head.state_dict())
    plan = sc.plan(initial(5), "layer_lottery", sparsity=0, p=(3,), strict=False, data=DATA, seed=5)
    assert {name: int((~mask).sum()) for name, mask in plan.masks.items()} == found.rows[2]["victims"]


def test_rows_say_what_a_ticket_loses_saves_and_resembles():
    found = study(p=(3,), extras={"data": HELD_OUT}, robust=True, watts=1000.0, grid=0.5)
    dense, ticket = found.rows
    assert ticket["difference"] == ticket["accuracy"] - dense["accuracy"]
    assert ticket["winning"] == (ticket["difference"] >= 0)
    assert (dense["cka"], dense["speedup"], dense["difference"]) == (pytest.approx(1), 1, 0)
    assert 0 < ticket["cka"] < 1
    assert ticket["parameters_saved"] == pytest.approx(100 * (1 - ticket["parameters"] / dense["parameters"]))
    assert dense["parameters"] == parameters(make()) > ticket["parameters"]
    assert ticket["flops_saved"] > 25  # three of nine blocks of equal cost, and the stem
    assert ticket["seconds"] == pytest.approx(ticket["step_ms"] * T / 1000)
    assert ticket["kwh"] == pytest.approx(ticket["seconds"] / 3600)
    assert ticket["co2_kg"] == pytest.approx(0.5 * ticket["kwh"])
    assert ticket["speedup"] == pytest.approx(dense["step_ms"] / ticket["step_ms"])
    assert ticket["co2_saved"] == pytest.approx(100 * (1 - ticket["co2_kg"] / dense["co2_kg"]))
    assert {kind: len(values) for kind, values in ticket["robustness"].items()} == {
        "noise": 5,
        "blur": 5,
        "contrast": 5,
    }
    assert all(value == 0 for values in dense["robustness"].values() for value in values)
    assert any("estimates" in warning and "1000 W" in warning for warning in found.warnings)
    assert not any("similarity" in warning for warning in found.warnings)
    assert any("similarity" in warning for warning in study(p=(1,)).warnings)


def test_robustness_of_a_ticket_is_its_own_minus_that_of_the_dense_network(monkeypatch):
    monkeypatch.setattr(race, "robustness", lambda model, *_: {"noise": [parameters(model), 2.0 * parameters(model)]})
    dense, ticket = study(extras={"data": HELD_OUT}, robust=True).rows
    less = ticket["parameters"] - dense["parameters"]
    assert less < 0
    assert ticket["robustness"] == {"noise": [less, 2.0 * less]}


def test_held_out_samples_may_be_pairs():
    pairs = [(batch.args[0], batch.target) for batch in HELD_OUT.batches(15)]
    settings = {"p": (3,), "robust": True}
    found, expected = (study(extras={"data": data}, **settings).rows for data in (pairs, HELD_OUT))
    for row, other in zip(found, expected, strict=True):
        assert row["cka"] == pytest.approx(other["cka"], rel=1e-6)
        assert row["robustness"] == other["robustness"]
    unlabelled = study(extras={"data": [HELD_OUT.inputs]}, **settings).rows
    assert unlabelled[1]["cka"] == pytest.approx(expected[1]["cka"], rel=1e-6)
    assert "robustness" not in unlabelled[1]


@pytest.mark.parametrize("version", ["initial", "trained"])
@pytest.mark.parametrize(
    ("data", "error", "words"),
    [(3, DataError, "data must be"), ([(torch.rand(2, 5, 8, 8), torch.zeros(2).long())], ModelError, "cannot be run")],
)
def test_held_out_samples_that_are_none_are_refused_before_any_training(data, error, words, version):
    fit = Watched()
    with pytest.raises(error, match=words):
        study(fit, extras={"data": data}, version=version)
    assert fit.calls == []


def test_random_blocks_leave_as_many_in_a_list_as_the_floor_says():
    """Of 3 + 2 + 2 blocks that can go 3 may: one of every list."""
    for seed in range(3):
        found = study(p=(), budget=sc.Budget(4 / 7, Quantity.DENSITY, floor=2), controls=("random",), seed=seed)
        assert [row["victims"] for row in found.rows[1:]] == [{f"stages.{s}": 1 for s in range(3)}] * 2


def test_a_ticket_wins_within_xi():
    rows = study(p=(2,), seeds=2).rows
    assert [row["seed"] for row in rows] == [0, 0, 1, 1]
    lost = -min(row["difference"] for row in rows)
    marked, (summary,) = judged(rows, LayerLotterySettings(xi=lost + 0.01), "accuracy")
    assert all(row["winning"] for row in marked)
    assert summary["won"] == summary["seeds"] == 2
    assert summary["difference"] == pytest.approx((rows[1]["difference"] + rows[3]["difference"]) / 2)
    _, (spread,) = judged(rows, LayerLotterySettings(deviations=1.0), "accuracy")
    assert spread["xi"] == pytest.approx(abs(rows[0]["accuracy"] - rows[2]["accuracy"]) / 2**0.5)
    made_worse = [row | {"difference": -2.0} if row["network"] == "ticket" else row for row in rows]
    for xi, wins in ((1.9, False), (2.0, True)):
        assert judged(made_worse, LayerLotterySettings(xi=xi), "accuracy")[1][0]["winning"] is wins
    with pytest.raises(SettingsError, match="two seeds"):
        judged(rows[:2], LayerLotterySettings(deviations=1.0), "accuracy")


def test_controls_differ_from_the_ticket_in_what_they_say():
    fit = Watched()
    found = study(fit, p=(3,), controls=("random", "reinit", "filters"), seed=4)
    rows, models = (
        {row["network"]: one for row, one in zip(found.rows, ones, strict=True)}
        for ones in (found.rows, [call[0] for call in fit.calls])
    )
    assert list(rows) == ["dense", "ticket", "random", "reinit", "filters"]
    assert len(rows["random"]["removed"]) == 3
    assert rows["random"]["removed"] != rows["ticket"]["removed"]
    assert rows["reinit"]["removed"] == rows["ticket"]["removed"]
    one, other = (models[name].stages[0][0].conv1.weight for name in ("ticket", "reinit"))
    assert one.shape == other.shape
    assert not torch.equal(one, other)
    filters = models["filters"]
    assert count_filters(filters) == count_filters(models["ticket"]) < count_filters(models["dense"])
    assert [len(stage) for stage in filters.stages] == [3, 3, 3]
    assert rows["filters"]["filters"] == count_filters(models["dense"]) - count_filters(filters)
    # what stays has its own initial weights
    whole, cut = models["dense"].stages[2][0].conv1.weight, filters.stages[2][0].conv1.weight
    assert all(any(torch.equal(row, old) for old in whole) for row in cut)


def test_what_is_found_is_the_trained_ticket_as_a_cut_of_the_dense_network():
    fit = Watched()
    found = study(fit, p=(1, 3), xi=100.0)
    assert found.summary["chosen"] == {"p": 3, "start": 0, "winning": True}
    model = initial()
    model.load_state_dict(found.state)
    sc.apply_(model, found.plan)
    assert same(model_state(model), fit.calls[-1][3])
    assert found.plan.provenance[0].method == "layer_lottery"
    planned = sc.plan(initial(), "layer_lottery", sparsity=0, p=(3,), strict=False, data=DATA)
    assert found.plan.facts == planned.facts
    assert "score_0" in found.plan.facts["stages.0"]


def test_the_ticket_of_blocks_with_names_is_found_in_the_dense_networks_names():
    fit = Watched()
    found = sc.study(NamedStages, fit, "layer_lottery", sparsity=0, p=(3,), strict=False, repeats=1)
    with seeded(0):
        model = NamedStages()
    model.load_state_dict(found.state)
    sc.apply_(model, found.plan)
    assert same(model_state(model), fit.calls[-1][3])
    assert all("block_" in name for name in found.rows[1]["removed"])


def test_a_study_says_where_the_head_stays_and_what_l1_is():
    assert any("l1 tells stages apart" in warning for warning in study(criterion="l1").warnings)

    class Loud(ResNet):
        def forward(self, x):
            return super().forward(x).log_softmax(1)

    settings = {"p": (1,), "strict": False, "repeats": 1}
    found = sc.study(Loud, fitting(), "layer_lottery", sparsity=0, **settings)
    assert any("no linear layer makes the model's output" in warning for warning in found.warnings)


# --- the classic lottery -----------------------------------------------------------------------------


def test_the_classic_lottery_scores_after_training_and_rewinds_weights_and_rates():
    fit = Watched()
    found = study(fit, p=(2,), version="trained", criterion="kl", rewind=(0.0, 0.5))
    assert [(row["network"], row["start"]) for row in found.rows] == [("dense", 0), ("ticket", 0), ("ticket", 3)]
    assert sorted(call[1:3] for call in fit.calls) == [(0, 3), (0, T), (0, T), (3, T)]
    trained = next(call for call in fit.calls if call[1:3] == (0, T))
    middle = next(call for call in fit.calls if call[1:3] == (0, 3))
    late = next(call for call in fit.calls if call[1:3] == (3, T))
    assert torch.equal(late[0].stem[0].weight, middle[3]["stem.0.weight"])
    assert sum(len(stage) for stage in late[0].stages) == 7
    dense = initial()
    dense.load_state_dict(trained[3])
    plan = sc.plan(dense, "layer_lottery", 0, p=(2,), criterion="kl", strict=False, data=DATA)
    assert {name: int((~mask).sum()) for name, mask in plan.masks.items()} == found.rows[1]["victims"]
    assert any("not counted" in warning for warning in found.warnings)
    dense_row, _, late_row = found.rows
    assert late_row["co2_saved"] == pytest.approx(100 * (1 - late_row["step_ms"] / dense_row["step_ms"] * (T - 3) / T))


def test_rewinding_the_rates_alone_keeps_the_trained_weights():
    fit = Watched()
    study(fit, version="trained", criterion="expect_abs", rewind=(0.5,), rewind_to="lr")
    assert [call[1:3] for call in fit.calls] == [(0, T), (3, T)]
    assert torch.equal(fit.calls[1][0].stem[0].weight, fit.calls[0][3]["stem.0.weight"])


# --- kills, refusals ---------------------------------------------------------------------------------


def test_a_killed_study_goes_on_with_the_same_result(tmp_path):
    settings = {"p": (2,), "controls": ("random", "filters"), "extras": {"data": HELD_OUT, "train": DATA}}
    straight = study(**settings)
    with pytest.raises(KeyboardInterrupt):
        study(Dying(3, fitting()), folder=tmp_path / "run", **settings)
    again = study(folder=tmp_path / "run", **settings)
    assert without_times(again.rows) == without_times(straight.rows)
    assert same(again.state, straight.state)
    third = study(Dying(1, fitting()), folder=tmp_path / "run", **settings)  # nothing is trained any more
    assert third.rows == again.rows


def test_what_does_not_go_together_is_refused():
    with pytest.raises(BudgetError, match="blocks to remove"):
        study(p=())
    with pytest.raises(SettingsError, match="version=trained"):
        study(rewind=(0.5,))
    with pytest.raises(SettingsError, match="shares"):
        study(version="trained", rewind=(1.0,))
    fit = Watched()
    with pytest.raises(SettingsError, match=r"rewind=\(0\.5, 0\.99\) of steps=6 .* would not be trained"):
        study(fit, version="trained", rewind=(0.5, 0.99))
    assert fit.calls == []
    with pytest.raises(SettingsError, match="scores whole blocks"):
        study(criterion="expect_abs", controls=("filters",))

    def plain(model: nn.Module, masks, start, stop):
        return {"accuracy": 0.0}

    with pytest.raises(SettingsError, match="extras"):
        study(plain, steps=3)


@pytest.mark.parametrize(
    "twice", [{"p": (1, 2, 1)}, {"version": "trained", "rewind": (0.0, 0.0)}, {"controls": ("random", "random")}]
)
def test_a_ticket_is_counted_once(twice):
    with pytest.raises(SettingsError, match="names one twice, and it would be the same ticket"):
        study(**twice)
