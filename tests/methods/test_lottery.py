"""Lottery tickets and rewinding: what goes back to where, how long is trained, what is compared with what."""

from functools import partial

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.budget import Budget
from secateur.core.errors import ModelError, SettingsError
from secateur.data.dataset import DataKind, Dataset
from secateur.methods.weights.lottery import lottery
from secateur.methods.weights.lottery import method as lottery_method
from secateur.methods.weights.rewinding import method as rewinding_method
from secateur.methods.weights.rewinding import rewinding
from secateur.train.loop import Fitting, Recipe
from secateur.train.snapshot import model_state, put_back
from secateur.train.study import Ledger, Study

T = 20


def network():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def data():
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 1, 4, 4, generator=rng)
    return Dataset("made", DataKind.IMAGE, inputs, inputs.flatten(1)[:, :4].argmax(1))


DATA = data()


def figures(model):
    (batch,) = DATA.batches(120)
    logits = model(batch.args[0])
    right = (logits.argmax(1) == batch.target).float().mean()
    return {"accuracy": 100 * float(right), "loss": float(nn.functional.cross_entropy(logits, batch.target))}


def fitting(also_at=(), **recipe):
    given = {"steps": T, "batch": 20, "lr": 0.1, "decay": "steps"} | recipe
    return Fitting(DATA, Recipe(**given), figures, also_at=also_at)


class Watched:
    """A fit that remembers how it was called."""

    def __init__(self, fit, stop_at=None):
        self.fit, self.calls, self.stop_at = fit, [], stop_at
        self.steps, self.recipe = fit.steps, fit.recipe

    def reordered(self, seed):
        return self.fit.reordered(seed)

    def __call__(self, model, masks, start, stop):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((model_state(model), dict(masks), start, stop))
        return self.fit(model, masks, start, stop)


def study(method, fit=None, sparsity=0.6, make=network, **more):
    return sc.study(make, fit or fitting(), method, sparsity=sparsity, **more)


def anew(model):
    """Batch-norm statistics of all samples."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(DATA.inputs)
    for norm in norms:
        norm.momentum = 0.1


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- lottery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("strategy", ["iterative", "continued", "one_shot"])
def test_every_strategy_keeps_exactly_what_was_asked(strategy, ranking):
    found = study("lottery", strategy=strategy, ranking=ranking)
    total = 16 * 24 + 24 * 16 + 16 * 4
    assert found.plan.units() == (total - int(0.6 * total), total)
    assert found.rows[-1]["kept"] == total - int(0.6 * total)
    for name, keep in found.masks.items():
        assert (found.state[name][~keep] == 0).all()
        assert (found.state[name][keep] != 0).any()
    assert found.rows[0]["network"] == "dense"
    assert found.rows[-1]["network"] == "ticket"


def test_every_round_starts_from_the_initial_values_and_trains_all_steps():
    fit = Watched(fitting(momentum=0.9, weight_decay=1e-2))
    found = study("lottery", fit, seed=3)
    assert len(fit.calls) == found.summary["rounds"] + 1 == found.summary["trainings"]
    torch.manual_seed(3)
    initial = model_state(network())
    for state, masks, start, stop in fit.calls:
        assert (start, stop) == (0, T)
        for name, value in state.items():
            expected = initial[name].masked_fill(~masks[name], 0) if name in masks else initial[name]
            assert torch.equal(value, expected), name
    assert torch.equal(fit.calls[-1][0]["2.running_mean"], torch.zeros(24))  # statistics went back as well


def test_the_mask_is_taken_from_the_trained_and_not_from_the_initial_weights():
    found = study("lottery", strategy="one_shot", ranking="global")
    model = network_at(0)
    fitting()(model, {})
    trained = torch.cat([model.state_dict()[n].abs().flatten() for n in ("1.weight", "4.weight")])
    keep = torch.cat([found.masks[n].flatten() for n in ("1.weight", "4.weight")])
    assert trained[keep].min() >= trained[~keep].max()


def network_at(seed, make=network):
    torch.manual_seed(seed)
    return make()


def test_continued_training_goes_on_and_resets_once():
    fit = Watched(fitting())
    found = study("lottery", fit, strategy="continued")
    (first, *between, last) = fit.calls
    initial = first[0]
    for call, before in zip(between, fit.calls, strict=False):
        kept = call[1]["1.weight"]
        assert not torch.equal(call[0]["1.weight"][kept], initial["1.weight"][kept])  # trained on
        assert before[2] == call[2] == 0
    mask = last[1]["1.weight"]
    assert torch.equal(last[0]["1.weight"], initial["1.weight"].masked_fill(~mask, 0))
    assert same(last[1], between[-1][1])
    assert [row["network"] for row in found.rows] == ["dense", *["continued"] * len(between), "ticket"]


def test_one_shot_is_not_done_when_rounds_are_asked_for():
    assert study("lottery").summary["rounds"] == 5
    assert study("lottery", rounds=3).summary["rounds"] == 3
    assert study("lottery", strategy="one_shot").summary["rounds"] == 1
    with pytest.raises(SettingsError, match="one_shot"):
        study("lottery", strategy="one_shot", rounds=3)


def test_controls_differ_from_the_ticket_in_one_thing_each():
    fit = Watched(fitting())
    found = study("lottery", fit, controls=("reinit", "shuffled"), draws=2, control_levels=(2,))
    initial, level = fit.calls[0][0], found.summary["rounds"]
    rows = [(row["level"], row["network"], row["draw"]) for row in found.rows]
    both = [("reinit", 0), ("reinit", 1), ("shuffled", 0), ("shuffled", 1)]
    assert [row for row in rows if row[1] in {"reinit", "shuffled"}] == [(n, *c) for n in (2, level) for c in both]
    calls = dict(zip(rows, fit.calls, strict=True))
    ticket, reinit, shuffled = (calls[level, name, 0] for name in ("ticket", "reinit", "shuffled"))
    assert same(ticket[1], reinit[1])
    assert not torch.equal(initial["1.weight"] * reinit[1]["1.weight"], reinit[0]["1.weight"])
    assert all(call[2:] == (0, T) for call in calls.values())
    for name, keep in shuffled[1].items():
        assert keep.sum() == ticket[1][name].sum()
        assert not torch.equal(keep, ticket[1][name])
        # dense initial values at the new places, not the ticket's zeros
        assert torch.equal(shuffled[0][name], initial[name].masked_fill(~keep, 0))
    assert not same(shuffled[1], calls[level, "shuffled", 1][1])
    with pytest.raises(SettingsError, match="levels 1 to"):
        study("lottery", control_levels=(9,))


def test_a_layer_kept_whole_is_whole_in_the_shuffled_control_too():
    fit = Watched(fitting())
    study("lottery", fit, ranking="global", controls=("shuffled",), shuffle="global")
    assert fit.calls[-1][1]["6.weight"].all()


def test_early_stopping_is_read_from_the_figures_of_fit():
    found = study("lottery", fitting(also_at=(5, 10, 15)), stopping="loss")
    for row in found.rows:
        places = {5: row["loss@5"], 10: row["loss@10"], 15: row["loss@15"], T: row["loss"]}
        assert places[row["stopped_at"]] == min(places.values())
    assert study("lottery").rows[0]["stopped_at"] is None


def test_a_ticket_that_loses_is_said_to_lose():
    found = study("lottery", sparsity=0.97, metric="loss")
    assert found.rows[-1]["loss"] > found.rows[0]["loss"]
    assert any("worse than the dense network" in warning for warning in found.warnings)
    assert found.summary["smallest_winning_density"] in {None, *(row["density"] for row in found.rows)}
    with pytest.raises(SettingsError, match="'bleu'"):
        study("lottery", metric="bleu")


def test_the_released_thresholds_remove_more_and_say_so():
    found = study("lottery", reference=True)
    assert found.rows[-1]["kept"] < 833 - int(0.6 * 833)
    assert any("not exact" in warning for warning in found.warnings)


def test_a_fit_that_revives_weights_is_refused():
    def careless(model, masks, start, stop):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        return {"accuracy": 1.0}

    with pytest.raises(ModelError, match="non-zero"):
        study("lottery", careless, steps=T)


# --- rewinding ------------------------------------------------------------------------------------


def test_step_0_is_the_lottery_ticket_bit_for_bit():
    one = study("lottery", ranking="global")
    other = study("rewinding", k=0)
    assert same(one.masks, other.masks)
    assert same(one.state, other.state)


def test_rounds_start_at_step_k_with_its_weights_and_statistics():
    fit, k = Watched(fitting(momentum=0.9)), 6
    found = study("rewinding", fit, k=k)
    trunk, *rounds = fit.calls
    assert trunk[2:] == (0, k)
    assert [call[2:] for call in rounds] == [(k, T)] * (found.rows[-1]["level"] + 1)  # T - k steps each
    model = network_at(0)
    fitting(momentum=0.9)(model, {}, 0, k)
    state = model_state(model)
    assert state["2.running_mean"].abs().sum() > 0
    for before, masks, _, _ in rounds:
        for name, value in before.items():
            assert torch.equal(value, state[name].masked_fill(~masks[name], 0) if name in masks else state[name]), name


def test_rates_and_batches_go_on_at_step_k():
    seen = []

    class Spy(Fitting):
        def advance(self, model, optimizer, step, penalty=None):
            loss = super().advance(model, optimizer, step, penalty)
            seen.append((step, optimizer.param_groups[0]["lr"], self.stream.at(step).target))
            return loss

    fit, k = Spy(DATA, Recipe(steps=T, batch=20, lr=0.4, decay="cosine"), figures), 7
    study("rewinding", fit, k=k, sparsity=0.2)
    starts = [index for index, (step, _, _) in enumerate(seen) if step == k]
    assert len(seen) == k + len(starts) * (T - k)
    for start in starts:
        assert [step for step, _, _ in seen[start : start + T - k]] == list(range(k, T))
        assert seen[start][1] == fit.recipe.rate(k) < 0.4
        assert torch.equal(seen[start][2], fit.stream.at(k).target)


def test_rewinding_without_pruning_reproduces_the_straight_run():
    fit = fitting(momentum=0.0)
    straight = network_at(0, plain)
    fit(straight, {})
    found = study("rewinding", fit, sparsity=0.0, k=9, make=plain)
    for name, value in straight.state_dict().items():
        assert torch.allclose(found.state[name], value, atol=1e-6), name
    later = study("rewinding", fitting(momentum=0.9), sparsity=0.0, k=9, make=plain)
    momentum = network_at(0, plain)
    fitting(momentum=0.9)(momentum, {})
    assert not torch.allclose(later.state["1.weight"], momentum.state_dict()["1.weight"], atol=1e-4)  # starts fresh


def test_steps_outside_of_the_training_are_refused_and_the_end_is_one_shot():
    with pytest.raises(SettingsError, match="21"):
        study("rewinding", k=T + 1)
    with pytest.raises(SettingsError, match="not both"):
        study("rewinding", k=1, scan=(1, 2))
    with pytest.raises(SettingsError, match="step 0"):
        study("rewinding", k=1, rewind="init")
    found = study("rewinding", k=T, rounds=1)
    model = network_at(0)
    fitting()(model, {})
    for name, keep in found.masks.items():
        assert torch.equal(found.state[name], model.state_dict()[name].masked_fill(~keep, 0))


def test_a_step_beyond_the_first_drop_is_fine_tuning():
    assert any("beyond the first drop" in warning for warning in study("rewinding", k=11).warnings)
    assert not any("beyond the first drop" in warning for warning in study("rewinding", k=10).warnings)


def test_learning_rate_rewinding_keeps_the_weights():
    fit = Watched(fitting())
    study("rewinding", fit, rewind="lr", k=5, rounds=2)
    _, dense, first, second = fit.calls
    assert dense[2] == first[2] == second[2] == 5
    model = network_at(0)
    put_back(model, dense[0])
    fitting()(model, {}, 5, T)
    keep = first[1]["1.weight"]
    assert torch.equal(first[0]["1.weight"], model.state_dict()["1.weight"].masked_fill(~keep, 0))
    assert torch.equal(first[0]["2.running_mean"], model.state_dict()["2.running_mean"])


def test_the_smallest_good_step_is_chosen():
    found = study("rewinding", scan=(8, 0, 4), tolerance=1000.0)
    assert found.summary["k"] == 0
    assert [entry["k"] for entry in found.summary["scan"]] == [0, 4, 8]
    assert {row["k"] for row in found.rows} == {0, 4, 8}
    assert same(found.masks, study("rewinding", k=0).masks)

    def worse(model, masks, start, stop):
        result = fitting()(model, masks, start, stop)
        share = sum(float(mask.float().mean()) for mask in masks.values()) / len(masks) if masks else 1
        return result | {"accuracy": share + (5 if start == 4 else 0)}

    none = study("rewinding", worse, steps=T, scan=(0, 4), tolerance=0.01)
    assert none.summary["k"] is None
    assert any("no ticket is within" in warning for warning in none.warnings)


def test_stability_compares_runs_of_one_trunk():
    fit = Watched(fitting())
    found = study("rewinding", fit, k=4, rounds=2, stability=True, extras={"reestimate": anew})
    dense, _, ticket, control = found.rows
    assert "distance_to_dense" not in dense
    assert [row["network"] for row in found.rows] == ["dense", "ticket", "ticket", "shuffled"]
    again = network_at(0)
    put_back(again, fit.calls[1][0])
    fitting()(again, {}, 4, T)
    gap = [(again.state_dict()[n] - found.state[n])[keep] for n, keep in found.masks.items()]
    assert ticket["distance_to_dense"] == pytest.approx(float(torch.cat(gap).norm()), rel=1e-5)
    assert ticket["distance_of_orders"] > 0
    assert 0 < ticket["angle_to_dense"] < control["angle_to_dense"] < 180
    assert control["kept"] == ticket["kept"]
    assert fit.calls[4][2:] == (4, T)  # the control starts at the step rewound to
    trunk = fit.calls[1][0]
    for name, keep in fit.calls[4][1].items():
        assert torch.equal(fit.calls[4][0][name], trunk[name].masked_fill(~keep, 0))


def test_orders_of_the_data_alone_make_the_distance_of_orders():
    fit = fitting()
    extras = {"reestimate": anew, "reordered": lambda seed: fit}
    found = study("rewinding", fit, k=4, rounds=1, stability=True, extras=extras)
    assert found.rows[-1]["distance_of_orders"] == found.rows[-2]["distance_of_orders"] == 0
    assert found.rows[-2]["distance_to_dense"] > 0


def test_what_stability_lacks_is_named():
    with pytest.raises(SettingsError, match="running statistics"):
        study("rewinding", k=4, rounds=1, stability=True)
    with pytest.raises(SettingsError, match="reordered"):
        study("rewinding", fitting().__call__, steps=T, k=4, rounds=1, stability=True)


# --- killed anywhere --------------------------------------------------------------------------------

JOBS = {
    "lottery": (lottery, lottery_method.configure({"controls": ("reinit", "shuffled"), "strategy": "continued"})),
    "rewinding": (rewinding, rewinding_method.configure({"scan": (0, 3), "rounds": 2, "stability": True})),
}


def job(name, fit, folder):
    procedure, settings = JOBS[name]
    ledger = Ledger(folder, {"name": name})
    made = partial(Study, make=network, fit=fit, steps=T, budget=Budget(0.4), ledger=ledger)
    return procedure(made(extras={"reestimate": anew}), settings)


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_run_goes_on_to_the_same_result(name, tmp_path):
    straight = Watched(fitting())
    expected = job(name, straight, tmp_path / "straight")
    for stop_at in (1, 3, len(straight.calls) - 1):
        folder = tmp_path / f"killed-{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            job(name, Watched(fitting(), stop_at), folder)
        fit = Watched(fitting())
        found = job(name, fit, folder)
        assert len(fit.calls) < len(straight.calls)
        assert found.rows == expected.rows
        assert same(found.state, expected.state)
        assert same(found.masks, expected.masks)
