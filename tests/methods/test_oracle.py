"""The oracle study: rows against networks cut by hand, fresh copies, signs, ties, dead networks, killed runs."""

import json
from itertools import combinations

import pytest
import torch
from scipy.stats import kendalltau
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import BudgetError, ModelError, NumericsError, SettingsError
from secateur.core.seeding import seeded
from secateur.data.dataset import DataKind, Dataset
from secateur.measure.quality import mean_loss
from secateur.train.loop import Fitting, Recipe
from secateur.train.snapshot import model_state, put_back

STEPS = 8
SITE = "0:channel"
HALF = [list(units) for units in combinations(range(6), 3)]


def make():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def dataset():
    rng = torch.Generator().manual_seed(0)
    targets = torch.arange(90) % 3
    return Dataset("tiny", DataKind.IMAGE, torch.randn(90, 1, 4, 4, generator=rng) + targets.view(-1, 1, 1, 1), targets)


DATA = dataset()
TEST = DATA.take(torch.arange(0, 90, 2))


def figures(model):
    logits = model(TEST.inputs)
    return {
        "accuracy": float((logits.argmax(1) == TEST.targets).double().mean()),
        "loss": float(F.cross_entropy(logits, TEST.targets)),
        "training_loss": mean_loss(model, DATA),
    }


def fitting(**more):
    settings = {"steps": STEPS, "batch": 30, "lr": 0.05, "decay": "constant"} | more
    return Fitting(DATA, Recipe(**settings), figures)


def trained():
    with seeded(1):
        model = make()
    Fitting(DATA, Recipe(steps=40, batch=30, lr=0.1), seed=1)(model)
    return model_state(model)


STATE = trained()


class Spy:
    """The caller's own fit: remembers what it was given, dies in the n-th training."""

    def __init__(self, dies_at=0, **more):
        self.fit, self.steps, self.calls, self.dies_at = fitting(**more), STEPS, [], dies_at

    def reordered(self, seed):
        other = Spy()
        other.fit, other.calls = self.fit.reordered(seed), self.calls
        other.dies_at = self.dies_at
        return other

    def __call__(self, model, masks, start, stop):
        assert not masks
        self.calls.append((model, model_state(model), stop))
        if len(self.calls) == self.dies_at:
            self.fit(model, masks, start, stop // 2)
            raise KeyboardInterrupt
        return self.fit(model, masks, start, stop)


def study(fit=None, sparsity=0.5, extras=None, **more):
    settings = {"seed": 3, "repeats": 1, "include": ("0.weight",), "candidates": 6} | more
    return sc.study(make, fit or fitting(), "oracle", sparsity, extras={"state": STATE} | (extras or {}), **settings)


def needed():
    return {"loss": lambda model: mean_loss(model, DATA), "example": DATA.inputs[:2]}


def candidates(found):
    return [row for row in found.rows if row["network"] == "candidate"]


def ranking(found, figure, criterion="pruned_loss"):
    return next(r for r in found.summary["rankings"] if (r["criterion"], r["figure"]) == (criterion, figure))


def by_hand(removed):
    """The trained network without these filters, built anew at its smaller size."""
    keep = [unit for unit in range(6) if unit not in removed]
    model = make()
    model[0], model[1], model[3] = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
    cut = {}
    for name, value in STATE.items():
        first = name.startswith(("0.", "1.")) and value.dim()
        cut[name] = value[keep] if first else value[:, keep] if name == "3.weight" else value
    put_back(model, cut)
    return model


def test_every_row_is_what_a_network_cut_by_hand_gives():
    found = study(candidates=20)
    rows = candidates(found)
    assert [row["removed"][SITE] for row in rows] == HALF
    for row in rows[::4]:
        model = by_hand(row["removed"][SITE])
        model.eval()
        with torch.no_grad():
            assert row["pruned_loss"] == pytest.approx(float(F.cross_entropy(model(DATA.inputs), DATA.targets)))
            assert row["before"] == pytest.approx(figures(model))
        assert row["after"] == pytest.approx(fitting()(model), rel=1e-4)
        assert row["l1_norm"] == pytest.approx(float(STATE["0.weight"][row["removed"][SITE]].abs().sum()))


def test_the_loss_is_of_the_training_data_in_eval_mode_and_not_of_the_test_data():
    row = study().rows[0]
    model = by_hand(row["removed"][SITE])
    model.train()
    in_train_mode = F.cross_entropy(model(DATA.inputs), DATA.targets).item()
    assert row["pruned_loss"] == pytest.approx(row["before"]["training_loss"])
    assert row["pruned_loss"] != pytest.approx(row["before"]["loss"], rel=1e-3)
    assert row["pruned_loss"] != pytest.approx(in_train_mode, rel=1e-3)


def test_without_retraining_the_loss_ranks_itself():
    found = study(steps=1, figures=("training_loss",))
    itself = ranking(found, "training_loss")["before"]
    assert itself["tau"] == pytest.approx(1)
    assert itself["anomaly"] == 0
    assert itself["valid"]
    assert all(row["pruned_loss"] == row["before"]["training_loss"] for row in found.rows)


def test_every_retraining_starts_from_its_own_copy_of_the_trained_weights():
    spy = Spy()
    found = study(spy, extras=needed(), repeats=3, candidates=5)
    assert len({id(model) for model, _, _ in spy.calls}) == len(spy.calls)
    beside = found.rows[-1]  # L1-norm pruning, trained only if it is no candidate
    rows = candidates(found) + [beside] * (beside["removed"] not in [row["removed"] for row in candidates(found)])
    assert len(spy.calls) == 4 * len(rows)  # once as it is, three retrainings
    for place, row in enumerate(rows):
        kept = [unit for unit in range(6) if unit not in row["removed"][SITE]]
        stops = [stop for _, _, stop in spy.calls[4 * place : 4 * place + 4]]
        assert stops == [0, STEPS, STEPS, STEPS]
        for _, state, _ in spy.calls[4 * place : 4 * place + 4]:
            assert torch.equal(state["0.weight"], STATE["0.weight"][kept])
            assert torch.equal(state["1.running_mean"], STATE["1.running_mean"][kept])
            assert torch.equal(state["3.weight"], STATE["3.weight"][:, kept])


def test_repetitions_have_other_orders_and_are_averaged_before_they_are_ranked():
    found = study(repeats=3)
    rows = candidates(found)
    for row in rows:
        values = [run["mean"]["loss"] for run in row["repeats"]]
        assert len(set(values)) == 3
        assert row["after"]["loss"] == pytest.approx(sum(values) / 3)
    expected = kendalltau([row["pruned_loss"] for row in rows], [row["after"]["loss"] for row in rows])
    got = ranking(found, "loss")
    assert (got["tau"], got["p"]) == pytest.approx((expected.statistic, expected.pvalue))
    assert got["pairs"] == found.summary["n"] == 6
    first, second = ([row["repeats"][run]["mean"]["loss"] for row in rows] for run in (0, 1))
    assert found.summary["repeatability"]["loss"]["tau"] == pytest.approx(kendalltau(first, second).statistic)
    assert study(repeats=1).rows[0]["repeats"][0] == rows[0]["repeats"][0]


def test_candidates_are_distinct_sorted_and_stop_where_there_are_no_more():
    assert study(steps=1, candidates=30).summary["exhaustive"]
    some = study(steps=1, candidates=7)
    lists = [row["removed"][SITE] for row in candidates(some)]
    assert len(lists) == len({tuple(one) for one in lists}) == 7
    assert lists == sorted(lists)
    assert all(one in HALF for one in lists)
    assert (some.summary["n"], some.summary["ways"], some.summary["exhaustive"]) == (7, 20, False)
    other = [row["removed"][SITE] for row in candidates(study(steps=1, candidates=7, seed=4))]
    assert other != lists


def test_the_candidates_do_not_depend_on_what_is_done_with_them():
    first = candidates(study(steps=1, candidates=7))
    again = candidates(study(fitting(lr=0.01), candidates=7, repeats=2, criterion="l1_norm"))
    assert [row["removed"] for row in first] == [row["removed"] for row in again]


def test_same_seed_same_findings():
    assert study(candidates=4, repeats=2).to_json() == study(candidates=4, repeats=2).to_json()


def test_signs_small_is_good_for_a_criterion_and_for_a_loss_and_bad_for_an_accuracy():
    known = {json.dumps(row["removed"]): row["after"] for row in study().rows}

    def of(figure, sign):
        return lambda model, removed: sign * known[json.dumps(removed)][figure]

    perfect = {"perfect": of("loss", 1), "backwards": of("loss", -1), "accurate": of("accuracy", -1)}
    found = study(extras={"criteria": perfect}, criterion="perfect")
    right, wrong = ranking(found, "loss", "perfect"), ranking(found, "loss", "backwards")
    assert (right["tau"], right["anomaly"], right["valid"]) == (pytest.approx(1), 0, True)
    assert (wrong["tau"], wrong["anomaly"], wrong["valid"]) == (pytest.approx(-1), pytest.approx(5 / 6), False)
    accurate = ranking(found, "accuracy", "accurate")
    assert (accurate["tau"], accurate["anomaly"], accurate["valid"]) == (pytest.approx(-1), 0, True)
    best = min(candidates(found), key=lambda row: row["after"]["loss"])
    assert found.summary["oracle"]["removed"] == best["removed"]


def test_the_chosen_candidate_comes_as_a_plan_that_can_be_applied():
    found = study()
    best = min(candidates(found), key=lambda row: row["pruned_loss"])
    assert found.summary["oracle"]["removed"] == best["removed"]
    model = make()
    put_back(model, STATE)
    sc.apply_(model, found.plan)
    assert model[0].weight.shape[0] == 3
    assert mean_loss(model, DATA) == pytest.approx(best["pruned_loss"])


def test_l1_norm_pruning_stands_beside_and_is_no_candidate():
    found = study(steps=1, candidates=20)
    smallest = STATE["0.weight"].abs().flatten(1).sum(1).argsort()[:3].sort().values.tolist()
    beside = found.rows[-1]
    assert beside["network"] == "l1"
    assert beside["removed"] == {SITE: smallest}
    own = next(row for row in candidates(found) if row["removed"][SITE] == smallest)
    assert beside["after"] == own["after"]  # all ways are there, so it is among them
    assert ranking(found, "loss")["pairs"] == 20


def test_the_last_evaluations_the_last_and_the_best():
    def of(final):
        fit = Fitting(DATA, Recipe(steps=STEPS, batch=30, lr=0.05, decay="constant"), figures, also_at=(2, 4, 6))
        return study(fit, final=final, tail=3, candidates=3, repeats=2)

    mean, last, best = (of(final).rows[0] for final in ("mean", "last", "best"))
    # a shorter training takes the same steps, so its end is the evaluation in between
    hand = [fitting()(by_hand(mean["removed"][SITE]), {}, 0, stop)["loss"] for stop in (4, 6, 8)]
    assert mean["repeats"][0]["mean"]["loss"] == pytest.approx(sum(hand) / 3, rel=1e-4)
    assert mean["repeats"][0]["last"]["loss"] == pytest.approx(hand[-1], rel=1e-4)
    for repeat in (0, 1):  # also under another order of the data
        assert mean["repeats"][repeat]["mean"] != mean["repeats"][repeat]["last"]
    assert last["after"]["loss"] == pytest.approx(sum(run["last"]["loss"] for run in last["repeats"]) / 2)
    assert best["after"]["accuracy"] >= last["after"]["accuracy"]


def test_early_retraining_can_be_compared_with_the_whole():
    short = fitting(steps=2)
    found = study(extras={"short": short}, candidates=10)
    rows = candidates(found)
    assert rows[0]["short"] == pytest.approx(short(by_hand(rows[0]["removed"][SITE])), rel=1e-4)
    expected = kendalltau([row["short"]["loss"] for row in rows], [row["after"]["loss"] for row in rows]).statistic
    assert found.summary["short"]["loss"]["tau"] == pytest.approx(expected)


def test_dead_networks_do_not_stop_the_study():
    def dead(model):
        return {"accuracy": 0.0, "loss": float("inf")}

    found = study(Fitting(DATA, Recipe(steps=2, batch=30, lr=0.01), dead), candidates=5)
    assert found.summary["tau"] is None
    assert found.summary["anomaly"] == 0
    assert not found.summary["valid"]
    json.dumps(found.summary["rankings"], allow_nan=False)


def test_what_diverges_ranks_last_and_is_named():
    class Diverging(Spy):
        def __call__(self, model, masks, start, stop):
            if stop and torch.equal(model[0].weight, STATE["0.weight"][[3, 4, 5]]):
                raise NumericsError("the loss is nan at training step 0; lower lr")
            return super().__call__(model, masks, start, stop)

    spy = Diverging()
    spy.steps = 1
    found = study(
        spy, candidates=20, extras=needed() | {"criteria": {"first": lambda model, removed: sum(removed[SITE])}}
    )
    rows = candidates(found)
    assert rows[0]["removed"][SITE] == [0, 1, 2]
    assert rows[0]["after"] == {}
    assert ranking(found, "loss", "first")["anomaly"] == pytest.approx(19 / 20)  # all others end better
    assert ranking(found, "accuracy", "first")["anomaly"] == pytest.approx(19 / 20)
    assert any("1 candidates became NaN" in words for words in found.warnings)


@pytest.mark.parametrize("dies_at", [1, 2, 6, 10])
def test_a_killed_study_goes_on_to_the_same_findings(dies_at, tmp_path):
    def of(spy, **more):
        return study(spy, extras=needed(), candidates=4, repeats=2, **more)

    straight = Spy()
    expected = of(straight)
    dying = Spy(dies_at)
    with pytest.raises(KeyboardInterrupt):
        of(dying, folder=tmp_path)
    again = Spy()
    found = of(again, folder=tmp_path)
    assert found.to_json() == expected.to_json()
    assert len(again.calls) == len(straight.calls) - (dies_at - 1)


def test_a_finished_folder_takes_further_criteria_without_training_but_no_other_weights(tmp_path):
    spy = Spy()
    study(spy, extras=needed(), candidates=4, folder=tmp_path)
    again = Spy()
    more = {"criteria": {"middle": lambda model, removed: abs(removed[SITE][1] - 2.5)}}
    found = study(again, extras=needed() | more, candidates=4, folder=tmp_path)
    assert not again.calls
    assert ranking(found, "loss", "middle")["pairs"] == 4
    other = {name: value + 1 if name == "0.bias" else value for name, value in STATE.items()}
    with pytest.raises(SettingsError, match="other weights"):
        study(Spy(), extras={"state": other}, candidates=4, folder=tmp_path)


def test_a_criterion_sees_the_whole_model_and_what_goes():
    seen = []

    def criterion(model, removed):
        seen.append((model[0].weight.shape[0], removed))
        return float(model[0].weight[removed[SITE]].norm())

    study(extras={"criteria": {"norm": criterion}}, steps=1, candidates=3)
    assert {units for units, _ in seen} == {6}
    assert len(seen) in (3, 4)


def test_the_trained_model_is_left_alone():
    model = make()
    put_back(model, STATE)
    before = model_state(model)
    sc.study(lambda: model, fitting(), "oracle", 0.5, include=("0.*",), candidates=4, repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in model_state(model).items())


def test_the_caveats_say_what_the_number_rests_on():
    found = study(candidates=7, repeats=2)
    values = len({row["after"]["accuracy"] for row in candidates(found)})
    assert "7 candidates (a random sample of 20), each averaged over 2 retrainings" in found.warnings[0]
    assert f"{values} distinct values" in found.warnings[0]
    assert "all there are" in study(steps=1, candidates=20).warnings[0]
    assert found.summary["valid"] or any("no proof" in words for words in found.warnings)


def test_several_layers_and_own_shares():
    found = study(steps=1, include=("*",), exclude=("6.*",), shares="3=0.25", candidates=30)
    lists = [row["removed"] for row in candidates(found)]
    assert all(len(one[SITE]) == 3 and len(one["3:channel"]) == 1 for one in lists)
    assert found.summary["ways"] == 20 * 4
    assert len({json.dumps(one) for one in lists}) == 30
    assert all(row["network"] == "candidate" for row in candidates(found))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))


def test_residual_streams_stay_whole_unless_asked_for():
    def sites(**more):
        found = sc.study(Residual, fitting(), "oracle", 0.5, steps=1, repeats=1, candidates=3, **more)
        return set(found.rows[0]["removed"])

    assert sites() == {"inner:channel"}
    assert sites(coupled=True) == {"inner:channel", "stem:channel"}


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"criterion": "hessian"}, SettingsError, "'hessian' is none of"),
        ({"extras": {"criteria": {"after": len}}}, SettingsError, "cannot be named 'after'"),
        ({"extras": {"criteria": {"a/b": len}}}, SettingsError, "cannot be named 'a/b'"),
        ({"shares": "9=0.5"}, SettingsError, "no layer matches '9'"),
        ({"shares": "0=1.5"}, SettingsError, "pattern=share"),
        ({"sparsity": 0.1}, SettingsError, "removes no whole unit"),
        ({"sparsity": 1.0}, BudgetError, "sparsity"),
        ({"include": ("7.*",)}, ModelError, "nothing is left to cut"),
        ({"figures": ("perplexity",), "steps": 1}, SettingsError, "no figure 'perplexity'"),
        ({"metric": "f1", "steps": 1}, SettingsError, "no figure 'f1'"),
        ({"candidates": 1}, SettingsError, "candidates"),
    ],
)
def test_what_cannot_work_is_refused(more, error, words):
    with pytest.raises(error, match=words):
        study(**more)


def test_a_fit_of_one_s_own_must_say_what_the_loss_and_another_order_are():
    with pytest.raises(SettingsError, match="loss"):
        study(Spy(), extras={"example": DATA.inputs[:2]})

    def plain(model, masks, start, stop):
        return fitting()(model, masks, start, stop)

    with pytest.raises(SettingsError, match="another order"):
        study(plain, steps=STEPS, extras=needed(), repeats=2)
    found = study(plain, steps=2, extras=needed() | {"reordered": fitting().reordered}, repeats=2, candidates=3)
    assert found.summary["repeats"] == 2
