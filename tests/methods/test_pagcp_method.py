"""PAGCP: a second scan with nets cut again and again, relative losses, filters, budgets, rounds that are killed."""

import copy
from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, DataError, ModelError, SettingsError
from secateur.core.method import Batch, Task
from secateur.core.plan import Plan
from secateur.data.dataset import DataKind, Dataset
from secateur.data.losses import mean_losses
from secateur.data.running import evaluating
from secateur.methods.channels.pagcp import CONTRIBUTION, PagcpSettings, Pass, as_removed
from secateur.shrink.reference import reference
from secateur.shrink.verify import difference
from secateur.structure.analysis import analyse
from secateur.train.loop import Fitting, Recipe
from secateur.train.snapshot import model_state

ALL = Budget(0.01, Quantity.FLOPS)  # only said beside what is reached
FREE = {"stop_at_budget": False, "tolerance": 0.5, "total_tolerance": 4.0, "top": 1.0}


class Segmenter(nn.Module):
    """A stem, a residual block and two heads: what the object is, and where."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(24, 20, 3, padding=1), nn.BatchNorm2d(20), nn.SiLU())
        self.outer = nn.Conv2d(20, 24, 3, padding=1)
        self.down = nn.Conv2d(24, 30, 3, stride=2, padding=1)
        self.kind, self.mask = nn.Linear(30, 3), nn.Conv2d(24, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.inner(x))
        return {"kind": self.kind(F.silu(self.down(x)).amax((2, 3))), "mask": self.mask(x)}


def images(samples, seed, noise=0.2):
    """A bar, a column or a square somewhere, with noise."""
    rng = torch.Generator().manual_seed(seed)
    x, kinds = torch.zeros(samples, 1, 8, 8), torch.arange(samples) % 3
    for image, kind in zip(x, kinds, strict=True):
        row, column = (int(torch.randint(6, (1,), generator=rng)) for _ in range(2))
        height, width = ((1, 3), (3, 1), (2, 2))[int(kind)]
        image[0, row : row + height, column : column + width] = 1
    return Batch((x + noise * torch.randn(x.shape, generator=rng),), targets={"kind": kinds, "mask": x})


def losses(out, batch):
    kind = F.cross_entropy(out["kind"], batch.targets["kind"])
    return {"kind": kind, "mask": F.binary_cross_entropy_with_logits(out["mask"], batch.targets["mask"])}


def trained():
    torch.manual_seed(0)
    model, batch = Segmenter(), images(96, 1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(20):
        optimizer.zero_grad()
        sum(losses(model(*batch.args), batch).values()).backward()
        optimizer.step()
    return model.eval()


MODEL, HELD_OUT = trained(), [images(33, 2), images(20, 3)]
STEM, INNER, DOWN = "stem.0:channel", "inner.0:channel", "down:channel"


def settings(**more):
    return PagcpSettings(**{"losses": losses, **FREE, **more})


def one_pass(model=MODEL, data=HELD_OUT, budget=ALL, **more):
    return Pass(Task(model.eval(), budget, data, example=Batch((HELD_OUT[0].args[0][:2],))), settings(**more))


def planned(budget=ALL, model=MODEL, data=HELD_OUT, **more):
    return sc.plan(model, "pagcp", budget=budget, data=data, **{"losses": losses, **FREE, **more})


def cut_by(model, site, gone, data):
    """A copy, physically without these units of one site, found on the copy's own structure."""
    smaller = copy.deepcopy(model)
    structure = analyse(smaller, Batch((data[0].args[0][:2],)))
    found = structure.sites[site]
    mask = torch.ones(found.units, dtype=torch.bool)
    mask[gone] = False
    return sc.apply_(smaller, Plan({site: found}, {site: mask}), example=data[0].args[0][:2])


def size(model, site):
    """L1 norm of single filters, sums of means for the residual stream, in the model as it is."""
    means = {STEM: [model.stem[0], model.outer], INNER: [model.inner[0]], DOWN: [model.down]}[site]
    return sum(layer.weight.detach().abs().mean((1, 2, 3)) for layer in means)


def by_hand(data=HELD_OUT, r=0.5, total=4.0):
    """The paper's pass with copies that are really cut and analysed anew after every step."""
    model, flops = MODEL, {}
    structure = analyse(model, Batch((data[0].args[0][:2],)))
    for site in (STEM, INNER, DOWN):
        units = structure.sites[site].units
        flops[site] = structure.flops({}) - structure.flops({site: units - int(0.3 * units)})
    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if prod(1 + r * middle**i for i in range(3)) < total else (low, middle)
    with torch.no_grad():
        base, tolerance, accepted = mean_losses(model, data, losses), r, {}
        for site in sorted(flops, key=flops.get, reverse=low <= 1):
            width, best = len(size(model, site)), None
            for step in range(1, 20):
                count = step * width // 20
                if not count:
                    continue
                gone = size(model, site).argsort(stable=True)[:count].tolist()
                candidate = cut_by(model, site, gone, data)
                now = mean_losses(candidate, data, losses)
                if max(now[name] / base[name] for name in base) > 1 + tolerance:
                    break
                best = (count, candidate, now)
            if best:
                accepted[site], model, now = best
                base, tolerance = {name: max(base[name], now[name]) for name in base}, tolerance * low
    return accepted, model, base


def test_a_pass_is_the_one_with_copies_cut_again_and_again():
    accepted, model, _ = by_hand()
    assert len(accepted) >= 2
    found = planned()
    assert {name: int((~mask).sum()) for name, mask in found.masks.items() if not mask.all()} == accepted
    smaller = sc.apply_(copy.deepcopy(MODEL), found)
    with evaluating(model), evaluating(smaller):
        for name, expected in model(*HELD_OUT[0].args).items():
            assert difference(expected, smaller(*HELD_OUT[0].args)[name]) <= 1e-5


def test_units_are_whole_groups_of_tied_layers():
    sites = one_pass().trying.cuts.sites
    assert set(sites) == {STEM, INNER, DOWN}
    makers = {place.parameter for place in sites[STEM].occurrences if place.dim == 0}
    assert {"stem.0.weight", "outer.weight", "stem.1.weight"} <= makers


def test_losses_on_trial_are_those_of_the_masked_model():
    run = one_pass()
    removed = {DOWN: 9, STEM: 7, INNER: 4}
    plan = Plan(dict(run.trying.work.sites), run.trying.cuts.masks(removed))
    pairs = [Batch((pair,)) for pair in HELD_OUT[1].args[0].split(2)]  # as the structure was seen
    outs = [reference(MODEL, plan, analyse(MODEL, pair), pair) for pair in pairs]
    whole = {name: torch.cat([out[name] for out in outs]) for name in outs[0]}
    expected = {name: float(value) for name, value in losses(whole, HELD_OUT[1]).items()}
    alone = one_pass(data=HELD_OUT[1:])
    assert alone.trying.measured(removed) == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(alone.before, rel=0.05)
    assert alone.trying.measured({}) == alone.before


def test_every_step_obeys_its_tolerance_and_all_together_the_product():
    run = one_pass()
    found, visits = run.pruned(), {visit.place: visit for visit in run.visits}
    assert len(found) >= 2
    for one in found:
        visit = visits[one.place]
        assert max(one.values[name] / visit.reference[name] for name in one.values) <= 1 + visit.tolerance
    used = prod(1 + visits[one.place].tolerance for one in found)
    assert used <= 4 * (1 + 1e-6)
    after = run.trying.measured(as_removed(found))
    assert max(after[name] / run.before[name] for name in after) <= used * (1 + 1e-6)


def test_the_order_is_by_flops_and_flips_with_lambda():
    run = one_pass()
    structure = analyse(MODEL, Batch((HELD_OUT[0].args[0][:2],)))
    flops = {}
    for name in (STEM, INNER, DOWN):
        units = structure.sites[name].units
        assert units - CONTRIBUTION.keep(units) == int(0.3 * units)
        flops[name] = structure.flops({}) - structure.flops({name: units - int(0.3 * units)})
    assert len(set(flops.values())) == 3
    descending = sorted(flops, key=flops.get, reverse=True)
    few, many = one_pass(total_tolerance=3.0), one_pass(total_tolerance=3.5)  # 1.5 ** 3 = 3.375
    assert few.factor < 1 < many.factor
    assert few.order() == descending
    assert many.order() == descending[::-1]
    assert one_pass(schedule=False).factor == 1
    assert one_pass(schedule=False).order() == descending
    assert run.order() == descending[::-1]


def test_losses_are_compared_with_themselves():
    def louder(out, batch):
        found = losses(out, batch)
        return {"kind": found["kind"], "mask": 10 * found["mask"]}

    def shifted(out, batch):
        return {name: value + 5 for name, value in losses(out, batch).items()}

    plain = planned()
    assert {n: m.tolist() for n, m in planned(losses=louder).masks.items()} == {
        n: m.tolist() for n, m in plain.masks.items()
    }
    assert planned(losses=shifted).units()[0] < plain.units()[0]


def test_the_sum_of_the_losses_hides_a_task():
    def summed(out, batch):
        found = losses(out, batch)
        return {"sum": found["kind"] + 100 * found["mask"]}

    run = one_pass(losses=summed, tolerance=0.1, total_tolerance=1.2)
    removed = as_removed(run.pruned())
    used = prod(1 + visit.tolerance for visit in run.visits if visit.place in removed)
    each = one_pass()
    after = each.trying.measured(removed)
    assert max(after[name] / each.before[name] for name in after) > used


def test_a_layer_that_is_too_sensitive_stays_whole_and_uses_up_nothing():
    strict = {"tolerance": 0.02, "total_tolerance": 1.05}  # 1.02 ** 3 = 1.061
    run = one_pass(**strict)
    visits = {one.place: one for one in run.visits}
    whole = [one for one in visits.values() if not one.accepted]
    assert whole
    assert len(whole) < 3
    for one in whole:
        assert len(one.levels) == 1
        assert one.values[0][one.limiting] > (1 + one.tolerance) * one.reference[one.limiting]
    done = 0
    for name in run.order():
        assert visits[name].tolerance == pytest.approx(0.02 * run.factor**done)
        done += visits[name].accepted > 0
    plan = planned(**strict)
    assert run.forbidden() == {one.place: one.limiting for one in whole}
    for one in whole:
        assert plan.masks[one.place].all()
        assert plan.facts[one.place][f"limit_{one.limiting}"] == 1
        assert "tolerance" not in plan.facts[one.place]  # it uses up none


def test_narrow_units_have_no_ratios_that_remove_nothing():
    run = one_pass()
    assert run.trying.levels(INNER, settings().ratios()) == list(range(1, 20))
    assert run.trying.levels(STEM, settings().ratios())[:4] == [1, 2, 3, 4]
    assert run.trying.levels(STEM, [0.04]) == []
    assert run.trying.levels(STEM, settings().ratios())[-1] == 22
    assert settings().ratios() == [round(0.05 * step, 2) for step in range(1, 20)]


def test_a_cut_of_everything_leaves_one_filter():
    def careless(out, batch):  # nothing forbids anything
        return {"one": torch.tensor(1.0)}

    assert settings(largest_cut=1.0).ratios()[-1] == 1
    assert one_pass().trying.levels(INNER, [1.0]) == [19]
    plan = planned(losses=careless, largest_cut=1.0)
    assert {name: int(mask.sum()) for name, mask in plan.masks.items()} == {STEM: 1, INNER: 1, DOWN: 1}
    assert one_pass().trying.measured({DOWN: 29, STEM: 23, INNER: 19}).keys() == {"kind", "mask"}


@pytest.mark.parametrize("stops", [True, False])
def test_a_grid_without_a_ratio_is_refused(stops):
    with pytest.raises(SettingsError, match=r"ratio_step=0\.5 is above largest_cut=0\.3"):
        planned(ratio_step=0.5, largest_cut=0.3, stop_at_budget=stops)


def test_later_units_are_ranked_without_what_is_already_gone():
    cuts = one_pass().trying.cuts
    alone, after = cuts.masks({INNER: 3})[INNER], cuts.masks({STEM: 1, INNER: 3})[INNER]
    assert not torch.equal(alone, after)
    weight, stem = MODEL.inner[0].weight.detach().abs(), cuts.masks({STEM: 1})[STEM]
    for mask, norms in ((alone, weight.sum((1, 2, 3))), (after, weight[:, stem].sum((1, 2, 3)))):
        assert set((~mask).nonzero().flatten().tolist()) == set(norms.argsort()[:3].tolist())


def test_losses_are_measured_in_eval_mode_whatever_the_mode_is():
    model = copy.deepcopy(MODEL).train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    found, expected = planned(model=model), planned()
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert found.facts == expected.facts
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, MODEL.state_dict()[name]) for name, value in model.state_dict().items())


def test_only_the_cheapest_share_is_pruned():
    run = one_pass(top=0.67)
    every = run.candidates
    assert len(every) == 3
    total, last = sum(run.before.values()), run.trying.flops({})
    removed = {}
    for one in every:
        removed[one.place] = one.removed
        left, now = run.trying.flops(removed), sum(one.values.values())
        assert one.cost == pytest.approx((now - total) / (last - left))
        total, last = max(total, now), left
    dearest = max(every, key=lambda one: one.cost)
    kept = run.cheapest(every)
    assert [one.place for one in kept] == [one.place for one in every if one is not dearest]
    assert planned(top=0.67).masks[dearest.place].all()
    with pytest.raises(BudgetError, match=r"top=0\.3"):
        planned(top=0.3)


def test_a_unit_that_nothing_limits():
    def careless(out, batch):  # of the convolution that only the kind reads
        return {"mask": losses(out, batch)["mask"].detach()}  # with gradients it would be refused: a task has no loss

    ours, released = one_pass(losses=careless), one_pass(losses=careless, reference=True)
    mine, theirs = as_removed(ours.pruned()), as_removed(released.pruned())
    assert mine[DOWN] == 28  # floor(0.95 * 30)
    assert theirs[DOWN] == 27  # floor(0.90 * 30)
    order = [one.place for one in ours.visits]
    assert order[0] == DOWN
    assert [one.tolerance for one in released.visits][:2] == [0.5, 0.5]
    assert [one.tolerance for one in ours.visits][:2] == pytest.approx([0.5, 0.5 * ours.factor])


def test_the_task_can_be_chosen_first():
    first, worst = one_pass(watch="first"), one_pass()
    for visit in first.visits:
        rises = {name: visit.values[0][name] / visit.reference[name] for name in visit.reference}
        chosen = max(rises, key=rises.get)
        assert visit.limiting in (chosen, None)
    assert sum(one.accepted for one in first.visits) >= sum(one.accepted for one in worst.visits)


def test_a_pass_ends_at_the_budget():
    free = planned()
    kept = next(iter(free.facts.values()))["flops_kept"]
    asked = (1 + kept) / 2
    found = planned(Budget(asked, Quantity.FLOPS), stop_at_budget=True)
    reached = next(iter(found.facts.values()))["flops_kept"]
    assert kept < reached <= asked
    assert not [line for line in found.warnings if "asked for" in line]
    more = planned(Budget(kept / 2, Quantity.FLOPS), stop_at_budget=True)
    assert {n: m.tolist() for n, m in more.masks.items()} == {n: m.tolist() for n, m in free.masks.items()}
    (said,) = [line for line in more.warnings if "asked for" in line]
    assert f"{kept:.4g} of the flops is left" in said
    assert "raise tolerance or total_tolerance, or retrain" in said
    fewer = planned(Budget(kept / 2, Quantity.FLOPS), stop_at_budget=True, top=0.99).warnings
    assert any("raise tolerance, total_tolerance or top, or retrain" in line for line in fewer)
    with pytest.raises(BudgetError, match="out of reach"):
        planned(Budget(1e-4, Quantity.FLOPS), stop_at_budget=True)
    units = planned(Budget(0.1), stop_at_budget=True)
    assert units.units()[0] <= 74 - 7  # floor(0.1 * 74)
    assert planned(Budget(0.0), stop_at_budget=True).sparsity == 0


def test_a_pass_goes_on_until_what_the_filter_leaves_meets_the_budget():
    asked = Budget(0.9, Quantity.FLOPS)
    run = one_pass(budget=asked, stop_at_budget=True, top=0.34)  # one of three units
    (kept,) = run.pruned()
    assert run.trying.met({kept.place: kept.removed})
    first = run.candidates[0]
    assert first.place != kept.place
    assert run.trying.met(as_removed([first, kept]))  # where the scan ended before
    plan = planned(asked, stop_at_budget=True, top=0.34)
    assert [name for name, mask in plan.masks.items() if not mask.all()] == [kept.place]
    assert next(iter(plan.facts.values()))["flops_kept"] <= 0.9
    assert not [line for line in plan.warnings if "asked for" in line]


@pytest.mark.parametrize("stops", [True, False])
def test_a_budget_that_the_filter_misses_is_put_down_to_it(stops):
    plan = planned(Budget(0.7, Quantity.FLOPS), stop_at_budget=stops, top=0.67)
    (said,) = [line for line in plan.warnings if "asked for" in line]
    assert "top=0.67 keeps whole 1 of the 3 units that the tolerances let go" in said
    assert "tolerances allow no more" not in said


def test_losses_that_cannot_be_compared_are_refused():
    with pytest.raises(DataError, match="'mask' is -"):
        planned(losses=lambda out, batch: {"mask": -losses(out, batch)["mask"]})
    with pytest.raises(DataError, match="'zero' is 0"):
        planned(losses=lambda out, batch: {"zero": 0 * out["kind"].sum()})
    small = planned(losses=lambda out, batch: {n: 1e-5 * v for n, v in losses(out, batch).items()})
    assert any("near zero" in line for line in small.warnings)
    with pytest.raises(DataError, match="data"):
        planned(data=None)
    with pytest.raises(SettingsError, match="scope"):
        planned(scope="global")
    with pytest.raises(SettingsError, match="product"):
        planned(total_tolerance=1.4)
    with pytest.raises(ModelError, match="nothing is left"):
        planned(exclude=["*"])
    dense = copy.deepcopy(MODEL)

    def gap(out, batch):
        return {"gap": 1e-6 + (out["mask"] - dense(*batch.args)["mask"]).square().mean().detach()}

    with pytest.raises(BudgetError, match=r"can remove nothing.*multiplies a loss by .*'gap'"):
        planned(losses=gap, exclude=["down"])
    blind = planned(losses=lambda out, batch: {"kind": losses(out, batch)["kind"].detach()})
    assert any("loss 'kind' has no gradient" in line for line in blind.warnings)


def test_the_plan_says_what_was_measured_and_the_model_is_as_it_was():
    before = model_state(MODEL)
    once, again = planned(), planned()
    assert all(torch.equal(value, MODEL.state_dict()[name]) for name, value in before.items())
    assert {n: m.tolist() for n, m in once.masks.items()} == {n: m.tolist() for n, m in again.masks.items()}
    assert once.provenance == again.provenance
    assert once.provenance[0].settings["losses"].endswith("test_pagcp_method:losses")
    for name in (name for name, mask in once.masks.items() if not mask.all()):
        assert {"visited", "tolerance", "flops_saved", "rise_kind", "rise_mask"} <= once.facts[name].keys()
    assert any("lambda" in line for line in once.warnings)
    assert next(iter(once.facts.values()))["lambda"] == pytest.approx(one_pass().factor, abs=1e-6)


def test_batches_can_be_capped():
    assert one_pass(max_batches=1).before == one_pass(data=HELD_OUT[:1]).before != one_pass().before


def test_norms_of_either_kind_and_kept_filters_score_highest():
    plan = sc.plan(MODEL, "pagcp", budget=ALL, data=HELD_OUT, keep_scores=True, losses=losses, norm="l2", **FREE)
    assert plan.scores.keys() == plan.masks.keys()
    for name, mask in plan.masks.items():
        if not mask.all():
            assert plan.scores[name][mask].min() >= plan.scores[name][~mask].max()
    first = one_pass(norm="l2").order()[0]
    dense = MODEL.get_submodule(first.partition(":")[0]).weight.detach().square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(plan.scores[first], dense) == (first != STEM)


# --- rounds ---------------------------------------------------------------------------------------


def classifier():
    return nn.Sequential(
        nn.Conv2d(1, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def dataset():
    batch = images(90, 5, 0.3)
    return Dataset("shapes", DataKind.IMAGE, batch.args[0], batch.targets["kind"])


def fitting(steps=20):
    batch = images(60, 6, 0.3)
    labels = batch.targets["kind"]
    return Fitting(
        dataset(),
        Recipe(steps=steps, batch=30, lr=0.1),
        lambda model: {"accuracy": float((model(*batch.args).argmax(1) == labels).double().mean())},
    )


class Dying:
    """Killed in the middle of the n-th training."""

    def __init__(self, at):
        self.fit, self.steps, self.left = fitting(), fitting().steps, at
        self.known_by = self.fit.known_by

    def __call__(self, model, masks, start, stop):
        self.left -= stop > start
        if not self.left:
            self.fit(model, masks, start, stop // 2)
            raise KeyboardInterrupt
        return self.fit(model, masks, start, stop)


def start():
    torch.manual_seed(0)
    model = classifier()
    fitting(60)(model)
    return model_state(model)


STATE = start()


def held_out():
    batch = images(40, 7, 0.3)
    return {"data": [(batch.args[0], batch.targets["kind"])]}


def study(fit=None, budget=0.2, folder=None, data=held_out, **more):
    asked = {"tolerance": 0.1, "total_tolerance": 1.2, "top": 1.0, "rounds": 4} | more
    extras = {"state": STATE, **data()}
    budget = Budget(budget, Quantity.FLOPS)
    return sc.study(classifier, fit or fitting(), "pagcp", budget=budget, folder=folder, extras=extras, **asked)


def test_rounds_prune_what_is_left_and_retrain_until_the_budget_is_met():
    found = study()
    assert len(found.rows) > 1
    kept = [row["flops_kept"] for row in found.rows]
    assert kept == sorted(kept, reverse=True)
    assert [row["met"] for row in found.rows] == [False] * (len(kept) - 1) + [found.summary["met"]]
    assert found.summary["met"]
    assert kept[-1] <= 0.2
    assert kept[0] > 0.2
    assert all((row["start"], row["stop"]) == (0, 20) for row in found.rows)
    model = classifier()
    model.load_state_dict(found.state)
    sc.apply_(model, found.plan)
    assert sum(p.numel() for p in model.parameters()) == found.rows[-1]["parameters"]
    with evaluating(model):
        assert fitting().figures(model)["accuracy"] == found.rows[-1]["after"]["accuracy"]


def test_rounds_may_reach_what_one_cannot():
    found = study(budget=0.4, largest_cut=0.3)
    assert len(found.rows) > 1
    assert found.rows[0]["flops_kept"] > 0.4 >= found.rows[-1]["flops_kept"] > 0.2
    assert found.summary["met"]
    with pytest.raises(BudgetError, match="out of reach"):
        planned(Budget(0.4, Quantity.FLOPS), largest_cut=0.3, stop_at_budget=True)


def test_rounds_on_the_training_data_warn():
    silent, spoken = (study(budget=0.5, rounds=1, data=data) for data in (held_out, dict))
    for found, expected in ((silent, 0), (spoken, 1)):
        for lines in (found.warnings, found.plan.warnings):
            assert sum("on the training data of fit" in line for line in lines) == expected


def test_a_killed_study_goes_on_to_the_same_bytes(tmp_path):
    straight = study(folder=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        study(Dying(2), folder=tmp_path / "killed")
    again = study(folder=tmp_path / "killed")
    assert again.to_json() == straight.to_json()
    assert all(torch.equal(value, again.state[name]) for name, value in straight.state.items())
    assert all(torch.equal(mask, again.plan.masks[name]) for name, mask in straight.plan.masks.items())


def test_rounds_end_where_nothing_more_goes():
    found = study(budget=0.05, tolerance=0.002, total_tolerance=1.003, rounds=6)
    assert 1 < len(found.rows) < 6
    assert found.rows[-1]["units"] == {}
    assert found.rows[-1]["forbidden"]
    assert set(found.rows[-1]["forbidden"].values()) == {"loss"}
    assert found.rows[-1]["flops_kept"] == found.rows[-2]["flops_kept"]
    assert (found.summary["asked"], found.summary["met"]) == ("flops 0.05", False)
    assert any("nothing more can be removed" in line for line in found.warnings)
    assert len([line for line in found.warnings if "was asked for" in line]) == 1


def test_tolerances_may_grow_with_the_rounds():
    found = study(budget=0.01, tolerance=0.02, total_tolerance=1.03, rounds=2, tolerance_slope=0.3, total_slope=1.0)
    first, second = ([unit["tolerance"] for unit in row["units"].values()] for row in found.rows)
    assert max(first) < 0.1 < max(second)


@pytest.mark.parametrize("several", [dict, lambda out: tuple(out.values())])
def test_a_task_without_a_loss_is_refused_by_name(several):
    class Answering(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = Segmenter()

        def forward(self, x):
            return several(self.inside(x))

    def one_loss(out, batch):
        first = out["kind"] if isinstance(out, dict) else out[0]
        return {"kind": F.cross_entropy(first, batch.targets["kind"])}

    with pytest.raises(SettingsError, match=r"'inside.mask' of Answering is of a task without a loss.*for every task"):
        sc.plan(Answering(), "pagcp", budget=ALL, data=HELD_OUT, losses=one_loss, **FREE)


def test_an_output_of_several_tasks_needs_named_losses():
    with pytest.raises(SettingsError, match="returns kind, mask, and no loss was named for them; give losses="):
        sc.plan(MODEL, "pagcp", budget=ALL, data=HELD_OUT, **FREE)


def test_losses_without_gradients_are_taken_as_they_are():
    def counted(out, batch):
        return {name: value.detach() for name, value in losses(out, batch).items()}

    def half(out, batch):  # of the head of the mask nothing can be told
        found = losses(out, batch)
        return {"kind": found["kind"], "mask": found["mask"].detach()}

    def of_numpy(out, batch):
        return {name: value.numpy().item() for name, value in losses(out, batch).items()}

    expected = planned()
    for way in (counted, half, of_numpy):
        found = planned(losses=way)
        assert all(torch.equal(found.masks[site], mask) for site, mask in expected.masks.items())


def test_losses_may_be_tensors_of_one_element():
    def one_element(out, batch):
        found = losses(out, batch)
        return {"kind": found["kind"][None], "mask": found["mask"]}

    expected, found = planned(), planned(losses=one_element)
    assert all(torch.equal(found.masks[site], mask) for site, mask in expected.masks.items())
