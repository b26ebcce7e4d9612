"""The journey: counts along the schedule, what is pruned, groups, masks under weight decay, the study."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import api
from secateur.core.budget import Budget, Pattern
from secateur.core.errors import BudgetError, SettingsError
from secateur.data.dataset import DataKind, Dataset
from secateur.train.compute import account, plan_steps
from secateur.train.loop import Fitting, OptimizerName, Recipe

WIDTH, SYMBOLS = 16, 24


class Language(nn.Module):
    """Embedding, two linear layers, a norm, and a head that may be tied to the embedding."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


UNITS = 2 * 32 * WIDTH + SYMBOLS * WIDTH


def model(seed=0, **kind):
    torch.manual_seed(seed)
    return Language(**kind)


def fitting(steps, seed=0):
    rng = torch.Generator().manual_seed(5)
    data = Dataset("ids", DataKind.TEXT, torch.randint(SYMBOLS, (64, 8), generator=rng))
    recipe = Recipe(steps=steps, batch=8, optimizer=OptimizerName.ADAMW, lr=3e-3, weight_decay=0.1, clip=1.0)
    probe = next(data.batches(16))

    def evaluate(net):
        return {"loss": float(nn.functional.cross_entropy(net(probe.args[0])[:, :-1].mT, probe.args[0][:, 1:]))}

    return Fitting(data, recipe, evaluate, seed=seed)


def train(net, steps=120, until=None, watch=lambda run: None, budget=None, **settings):
    """Train with the journey; the sparsifier, not finished."""
    fit = fitting(steps)
    optimizer = fit.recipe.make_optimizer(net)
    asked = {"budget": budget} if budget else {"sparsity": settings.pop("sparsity", 0.6)}
    run = api.sparsify(net, optimizer, "journey", steps=steps, **asked, **({"every": 5} | settings))
    for step in range(until or steps):
        fit.advance(net, optimizer, step, run.penalty)
        watch(run)
    return run


@pytest.mark.parametrize("sparsity", [0.2, 0.6, 0.9])
def test_after_event_j_the_density_is_the_formula_s_within_a_weight(sparsity):
    run = train(model(), sparsity=sparsity)
    plan = plan_steps(120, sparsity, every=5)
    events = [entry for entry in run.log if entry["what"] == "prune"]
    assert [entry["step"] for entry in events] == plan.ramp.window.events
    count = (plan.stop - plan.start) // 5 + 1
    assert len(events) == count > 5
    for j, entry in enumerate(events):
        wanted = (1 - sparsity) ** ((j + 1) / count) * UNITS
        assert abs(entry["density"] * UNITS - wanted) <= 1
    kept = run.finish().units()[0]
    assert kept == UNITS - math.floor(sparsity * UNITS + 1e-9)


def test_average_count_of_the_trace_is_the_closed_form():
    run = train(model(), steps=400, every=2)
    cost = account(run.log, run.units, 400)
    g = 0.6 / -math.log(0.4)
    assert cost.average == pytest.approx(UNITS / (0.25 + 0.5 / g + 0.25 / 0.4), rel=0.01)
    by_hand, kept, marks = 0, UNITS, {e["step"]: round(e["density"] * UNITS) for e in run.log}
    for step in range(400):
        kept = marks.get(step, kept)
        by_hand += kept
    assert cost.average == pytest.approx(by_hand / 400)


def test_removed_weights_never_come_back_and_stay_zero_under_weight_decay():
    seen = []

    def watch(run):
        seen.append({name: mask.clone() for name, mask in run.masks.all().items()})
        for name, mask in seen[-1].items():
            assert bool((run.weight(name)[~mask] == 0).all())
            assert int((run.weight(name) != 0).sum()) == int(mask.sum())  # decay does not eat into the mask

    train(model(), watch=watch)
    for before, after in pairwise(seen):
        assert not any(bool((after[name] & ~before[name]).any()) for name in after)


def test_one_list_over_all_layers_decides():
    """A layer with smaller weights ends far below the total's density; a layer-wise threshold would not let it."""
    net = model()
    with torch.no_grad():
        net.down.weight.mul_(0.3)
    run = train(net, sparsity=0.6)
    density = {name: run.masks.kept[name] / site.units for name, site in run.sites.items()}
    assert density["down.weight"] < 0.25
    assert density["head.weight"] > 0.4


def test_events_rank_the_magnitudes_of_that_moment():
    before = {}

    def watch(run):
        if run.log and run.log[-1]["step"] == run.step:
            alive = torch.cat([before[name][run.masks.get(name)] for name in run.sites])
            gone = torch.cat([before[name][~run.masks.get(name)] for name in run.sites])
            assert alive.min() >= gone.max()
            watch.events += 1
        before.update({name: run.weight(name).abs().clone() for name in run.sites})

    watch.events = 0
    net, fit = model(), fitting(60)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)  # weights stand still, so the last step's are this step's
    run = api.sparsify(net, optimizer, "journey", 0.6, steps=60, every=5)
    watch(run)
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.zero_grad()
        fit.loss(net, fit.stream.at(step)).backward()
        optimizer.step()
        watch(run)
    assert watch.events >= 5


def test_the_head_is_pruned_and_the_embedding_is_not():
    run = train(model(), until=1)
    assert set(run.sites) == {"up.weight", "down.weight", "head.weight"}
    assert not run.warnings


def test_a_tied_head_is_left_out_and_that_is_said():
    run = train(model(tied=True))
    assert set(run.sites) == {"up.weight", "down.weight"}
    assert any("head.weight" in line and "embedding" in line for line in run.finish().warnings)


def test_the_random_score_keeps_the_counts_and_chooses_otherwise():
    chosen, drawn, again = (train(model(), score=kind).finish() for kind in ("magnitude", "random", "random"))
    assert chosen.units() == drawn.units()
    assert any(not torch.equal(chosen.masks[name], drawn.masks[name]) for name in chosen.masks)
    assert all(torch.equal(again.masks[name], drawn.masks[name]) for name in drawn.masks)


def groups(mask):
    return mask.reshape(-1, 4).sum(1)


def test_two_of_four_always_stay_in_each_group():
    least = []
    run = train(
        model(),
        budget=Budget.nm("2:4"),
        watch=lambda run: least.append(min(int(groups(run.masks.get(name)).min()) for name in run.sites)),
    )
    assert min(least) == 2
    assert all(bool((groups(mask) == 2).all()) for mask in run.finish().masks.values())


def test_two_of_four_at_a_lower_sparsity_is_one_ranking_of_the_candidates():
    run = train(model(), budget=Budget(0.3, pattern=Pattern(2, 4)))
    masks = run.finish().masks
    assert sum(int(mask.sum()) for mask in masks.values()) == UNITS - math.floor(0.3 * UNITS)
    assert {int(count) for mask in masks.values() for count in groups(mask)} == {2, 3, 4}


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"budget": Budget(0.6, pattern=Pattern(2, 4))}, BudgetError, "2:4 keeps at least 704 of 1408"),
        ({"budget": Budget.nm("2:5")}, BudgetError, "do not divide into groups of 5"),
        ({"every": 100}, SettingsError, "does not fit a training of 120 steps"),
        ({"start": 0.8}, SettingsError, "shares of the compute"),
        ({"sparsity": 1.0}, BudgetError, "sparsity must be in"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(settings, error, words):
    with pytest.raises(error, match=words):
        train(model(), until=1, **settings)


def test_a_training_cut_short_is_refused():
    with pytest.raises(BudgetError, match="before the schedule was through"):
        train(model(), until=40).finish()


# --- the study: several curves at one compute ----------------------------------------------------


class Narrow(Language):
    """A dense model with fewer weights to compare with."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)


def studied(fit, folder=None, **more):
    return sc.study(
        Language,
        fit,
        "journey",
        0.6,
        metric="loss",
        folder=folder,
        every=5,
        extras={"dense": {"narrow": Narrow}},
        **more,
    )


def test_all_curves_cost_the_same_and_end_the_same():
    found = studied(fitting(150))
    rows = {row["run"]: row for row in found.rows}
    assert list(rows) == ["geometric", "cubic", "linear", "constant", "narrow"]
    for shape in ("geometric", "cubic", "linear", "constant"):
        row = rows[shape]
        assert row["average"] == pytest.approx(found.summary["planned_average"], rel=0.02)
        assert row["compute"] == pytest.approx(found.summary["planned_compute"], rel=0.02)
        assert row["final"] == UNITS - math.floor(0.6 * UNITS)
        assert row["weights"] == UNITS
        assert math.isfinite(row["loss"])
    assert len({rows[shape]["loss"] for shape in ("geometric", "cubic", "linear", "constant")}) == 4
    assert rows["cubic"]["stop"] > rows["geometric"]["stop"] > rows["linear"]["stop"]
    assert rows["narrow"]["average"] == 2 * 8 * WIDTH + SYMBOLS * WIDTH
    assert rows["narrow"]["compute"] == pytest.approx(150 * (256 + 384) / UNITS)
    assert found.plan.units() == (rows["geometric"]["final"], UNITS)
    assert all(bool((found.state[name][~mask] == 0).all()) for name, mask in found.masks.items())


class Dying(Fitting):
    """Raises in the middle of the n-th training."""

    def __init__(self, fit, at):
        super().__init__(fit.data, fit.recipe, fit.evaluate, seed=fit.seed)
        self.left = at

    def advance(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().advance(*args, **kwargs)


def test_a_killed_study_goes_on_to_the_same_result(tmp_path):
    straight = studied(fitting(60), against=("cubic",))
    for at in (30, 90, 45):  # in the first, the second and the third training
        with pytest.raises(KeyboardInterrupt):
            studied(Dying(fitting(60), at), tmp_path, against=("cubic",))
    resumed = studied(fitting(60), tmp_path, against=("cubic",))
    assert resumed.rows == straight.rows
    for name, value in straight.state.items():
        assert torch.equal(value, resumed.state[name])


def test_a_fit_of_the_user_s_own_needs_a_sparse_one():
    fit = fitting(60)

    def own(net, masks, start, stop):
        return fit(net, masks, start, stop)

    with pytest.raises(SettingsError, match="sparse_fit"):
        sc.study(Language, own, "journey", 0.6, steps=60, metric="loss", every=5)

    def forgetful(net, attach):
        attach(net, fit.recipe.make_optimizer(net))
        return {"loss": 1.0}

    with pytest.raises(SettingsError, match="60 optimiser steps; it made 0 after 1 calls"):
        sc.study(Language, own, "journey", 0.6, steps=60, metric="loss", every=5, extras={"sparse_fit": forgetful})


def test_a_missing_figure_is_named():
    with pytest.raises(SettingsError, match="fit gives no 'accuracy', only loss"):
        sc.study(Language, fitting(60), "journey", 0.6, every=5, against=())
