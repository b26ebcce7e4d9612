"""GraNet, GMP, RigL, SET, static: every event against a brute-force oracle, and the traps of the note."""

import copy
from math import ceil, cos, floor, pi

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import api
from secateur.allocate.counts import erk
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.train.part import Part
from secateur.train.sparsifier import Order, Sparsifier

STEPS, EVERY = 60, 5
METHODS = ("granet", "gmp", "rigl", "set", "static")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 20), nn.ReLU(), nn.Linear(20, 5)
    )


NAMES = ("0.weight", "4.weight", "6.weight")
TOTAL = 54 + 1080 + 100


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)


def step_once(model, optimizer, step):
    rng = torch.Generator().manual_seed(step)
    inputs, target = torch.randn(16, 1, 5, 5, generator=rng), torch.randint(5, (16,), generator=rng)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), target).backward()
    optimizer.step()


def attached(method, sparsity=0.9, model=None, optimizer=None, steps=STEPS, seed=0, **settings):
    model = network() if model is None else model
    optimizer = momentum(model) if optimizer is None else optimizer
    if method != "static":
        settings = {"every": EVERY, **settings}
    return model, optimizer, sc.sparsify(model, optimizer, method, sparsity, steps=steps, seed=seed, **settings)


def trained(method, sparsity=0.9, each=None, **more):
    model, optimizer, run = attached(method, sparsity, **more)
    for step in range(run.steps):
        step_once(model, optimizer, step)
        if each is not None:
            each(run)
    return model, run, run.finish()


class Watch(Part):
    """Copies of masks, weights and gradients at its place among the parts."""

    def __init__(self):
        self.seen = {}

    def after_step(self, run):
        self.seen[run.step] = {
            name: (
                run.masks.get(name).numpy().copy(),
                run.weight(name).abs().numpy().copy(),
                run.gradient(name).abs().numpy().copy(),
            )
            for name in run.sites
        }


def watched(method="granet", sparsity=0.9, **settings):
    """A run with eyes before pruning, between pruning and regrowing, and after both."""
    entry, order = api.find_method(method), Order(method, Budget(sparsity), STEPS)
    parts = list(entry.parts(order, entry.configure({"every": EVERY, **settings})))
    eyes = [Watch(), Watch(), Watch()]
    *start, prune, regrow = parts
    model = network()
    optimizer = momentum(model)
    run = Sparsifier(model, optimizer, [*start, eyes[0], prune, eyes[1], regrow, eyes[2]], order)
    for step in range(STEPS):
        step_once(model, optimizer, step)
    run.finish()
    return run, [eye.seen for eye in eyes]


def top(values, count):
    """Indices of the largest, ties to the higher index: a plain sort."""
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[len(values) - count :])


# --- one event ------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_every_event_is_what_a_plain_sort_gives(initial):
    _, (before, between, after) = watched(initial_density=initial)
    assert (after[1].keys()) == set(NAMES)
    events = range(EVERY, STEPS, EVERY)
    returned = 0
    for t in events:
        pooled = np.concatenate([np.where(m, w, -1.0).ravel() for m, w, _ in before[t].values()])
        u = min(1.0, t / (STEPS / 2))
        density = 0.1 + (initial - 0.1) * (1 - u) ** 3
        keep = TOTAL - floor(0.9 * TOTAL) if u == 1 else floor(density * TOTAL + 1e-9)
        chosen = top(pooled, keep)
        place = 0
        for name in NAMES:
            mask, weight, gradient = (part.ravel() for part in between[t][name])
            expected = np.array([place + i in chosen for i in range(mask.size)])
            place += mask.size
            assert (mask == expected).all(), (t, name, "pruning")
            rate = 0.005 + 0.495 * (1 + cos(pi * t / STEPS)) / 2
            leaving = ceil(rate * mask.sum())
            staying = top(np.where(mask, weight, -1.0), int(mask.sum()) - leaving)
            coming = top(np.where([i in staying for i in range(mask.size)], -1.0, gradient), leaving)
            final = np.array([i in staying or i in coming for i in range(mask.size)])
            assert (after[t][name][0].ravel() == final).all(), (t, name, "regrowing")
            # the layer's density stays; 2 (R - r) places changed, r of the leaving having come back at once
            assert after[t][name][0].sum() == mask.sum()
            gone = {i for i in range(mask.size) if mask[i]} - staying
            back = len(gone & coming)
            returned += back
            assert (after[t][name][0].ravel() != mask).sum() == 2 * (leaving - back)
            # gradients at removed places are real, and what has come in is 0
            assert (gradient[~mask] > 0).any()
            assert (after[t][name][1].ravel()[list(coming)] == 0).sum() >= leaving - back
    assert returned > 0  # just removed weights do compete


def test_grown_weights_start_at_zero_with_clean_states():
    for make in (momentum, lambda m: torch.optim.Adam(m.parameters(), 1e-2)):
        model = network()
        optimizer = make(model)
        masks, grown = {}, 0
        run = attached("granet", model=model, optimizer=optimizer)[2]
        for step in range(STEPS):
            masks = {name: run.masks.get(name) for name in NAMES}
            step_once(model, optimizer, step)
            for name in NAMES:
                new = run.masks.get(name) & ~masks[name]
                grown += int(new.sum())
                parameter = model.get_parameter(name)
                assert not parameter.detach()[new].any()
                for value in optimizer.state[parameter].values():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        assert not value[new].any()
        assert grown > 100


def test_no_exchange_after_the_very_last_step_and_the_rate_anneals():
    _, run, _ = trained("granet")
    regrown = [entry for entry in run.log if entry["what"] == "regrow"]
    assert [entry["step"] for entry in regrown] == list(range(EVERY, STEPS, EVERY))
    for entry in regrown:
        assert entry["rate"] == pytest.approx(0.005 + 0.495 * (1 + cos(pi * entry["step"] / STEPS)) / 2, abs=1e-12)
    assert all(entry["grown"] > 0 for entry in regrown)


# --- the whole training -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_density_follows_the_cubic_formula_to_one_weight(method):
    _, run, plan = trained(method, start=10, stop=45)
    pruned = [entry for entry in run.log if entry["what"] == "prune"]
    assert [entry["step"] for entry in pruned] == list(range(15, 50, 5))  # the event at t_0 removes nothing
    for entry in pruned:
        wanted = 0.1 + 0.9 * (1 - (entry["step"] - 10) / 35) ** 3
        assert abs(entry["density"] - wanted) < 1 / TOTAL
        assert sum(entry["kept"].values()) == round(entry["density"] * TOTAL)
    assert plan.units() == (TOTAL - floor(0.9 * TOTAL), TOTAL)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_the_target_is_met_to_the_weight_and_weights_are_zero(method, sparsity):
    model, run, plan = trained(method, sparsity)
    assert plan.units() == (TOTAL - floor(round(sparsity * TOTAL, 6)), TOTAL)
    assert all(not model.get_parameter(name).detach()[~plan.masks[name]].any() for name in NAMES)
    assert run.log or method == "static"


def active_places(method, **settings):
    """Weights that were ever active, the counts after each step, and whether any place came back."""
    ever, counts, grew = {}, [], False

    def each(run):
        nonlocal grew
        now = run.masks.all()
        if counts:
            grew |= any(bool((now[name] & ~last[name]).any()) for name in NAMES)
        last.update(now)
        for name in NAMES:
            ever[name] = ever.get(name, torch.zeros_like(now[name])) | now[name]
        counts.append(sum(int(m.sum()) for m in now.values()))

    last = {}
    trained(method, each=each, **settings)
    return sum(int(m.sum()) for m in ever.values()), counts, grew


def test_gmp_never_brings_a_weight_back_and_granet_does():
    _, counts, grew = active_places("gmp")
    assert not grew
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    _, counts, grew = active_places("granet")
    assert grew
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_fixed_density_starts_on_erk_and_stays_there_in_every_layer(method):
    target = TOTAL - floor(0.9 * TOTAL)
    expected = erk({"0.weight": (6, 1, 3, 3), "4.weight": (20, 54), "6.weight": (5, 20)}, target)
    seen = []
    _, run, _ = trained(method, each=lambda run: seen.append(dict(run.masks.kept)))
    assert run.log[0]["kept"] == expected
    assert all(kept == expected for kept in seen)
    ever, counts, grew = active_places(method)
    assert set(counts) == {target}
    assert (ever > 1.2 * target) == grew == (method != "static")


def test_random_growth_needs_no_gradient_and_follows_the_seed():
    def masks(seed):
        model, optimizer, run = attached("set", seed=seed)
        optimizer.register_step_post_hook(lambda *a: optimizer.zero_grad())
        start = run.masks.all()
        for step in range(EVERY):
            step_once(model, optimizer, step)
        return start, run.masks.all()

    first, again, other = masks(0), masks(0), masks(1)
    assert all(torch.equal(first[1][name], again[1][name]) for name in NAMES)
    assert not all(torch.equal(first[1][name], other[1][name]) for name in NAMES)
    assert not all(torch.equal(first[0][name], first[1][name]) for name in NAMES)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_straight_one(method):
    straight, _, plan = trained(method)
    model, optimizer, run = attached(method)
    for step in range(17):
        step_once(model, optimizer, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    model, optimizer, run = attached(method, model=network(3))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    for step in range(17, STEPS):
        step_once(model, optimizer, step)
    again = run.finish()
    assert all(torch.equal(again.masks[name], plan.masks[name]) for name in NAMES)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), straight.parameters(), strict=True))


# --- granet_uniform ---------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_uniform_keeps_one_density_and_then_a_fifth_of_the_classifier(initial):
    _, run, plan = trained("granet", 0.93, spread="uniform", initial_density=initial)
    sizes = {"0.weight": 54, "4.weight": 1080, "6.weight": 100}
    checked = 0
    for entry in run.log:
        if entry["what"] != "prune":
            continue
        kept, density = entry["kept"], entry["density"]
        classifier = max(0.2, density)
        rest = (density * TOTAL - classifier * 100) / (TOTAL - 100)
        wanted = {"0.weight": rest, "4.weight": rest, "6.weight": classifier}
        assert all(abs(kept[name] - wanted[name] * sizes[name]) <= 1 for name in sizes)
        checked += classifier > density
    assert checked > 1
    assert plan.kept("6.weight") == 20


def test_uniform_without_the_rule_and_with_another_classifier():
    _, _, plan = trained("granet", 0.93, spread="uniform", classifier_density=0)
    assert abs(plan.kept("6.weight") - 0.07 * 100) <= 1
    _, _, plan = trained("granet", 0.93, spread="uniform", classifier="0")
    assert plan.kept("0.weight") in (10, 11)


def test_rounding_never_brings_back_what_layerwise_pruning_removed():
    torch.manual_seed(0)
    layers = [nn.Flatten()] + [nn.Linear(25 if i == 0 else 7, 7) for i in range(6)] + [nn.Linear(7, 5)]
    model = nn.Sequential(*layers)
    optimizer = momentum(model)
    run = sc.sparsify(model, optimizer, "gmp", 0.7, steps=60, every=1, stop=55, spread="uniform")
    last = run.masks.all()
    for step in range(60):
        step_once(model, optimizer, step)
        now = run.masks.all()
        assert not any(bool((now[name] & ~last[name]).any()) for name in now)
        last = now
    run.finish()


# --- what goes wrong ---------------------------------------------------------------------------------


def after_the_step(model, optimizer, change):
    """Changes gradients between the optimizer's step and the event."""
    optimizer.register_step_post_hook(lambda *a: change(model))


def test_a_nan_gradient_refuses_the_event_says_so_and_training_goes_on():
    model = network()
    optimizer, calls = momentum(model), []

    def spoil(model):
        calls.append(1)
        if len(calls) == EVERY:
            model.get_parameter("4.weight").grad[3, 3] = float("nan")

    after_the_step(model, optimizer, spoil)
    run = attached("granet", model=model, optimizer=optimizer)[2]
    for step in range(STEPS):
        step_once(model, optimizer, step)
    plan = run.finish()
    regrown = [entry["step"] for entry in run.log if entry["what"] == "regrow"]
    assert regrown == list(range(2 * EVERY, STEPS, EVERY))
    assert any("'4.weight' is NaN" in warning and f"step {EVERY}" in warning for warning in plan.warnings)
    assert plan.units()[0] == TOTAL - floor(0.9 * TOTAL)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_missing_gradients_refuse_the_event_and_say_so():
    model = network()
    optimizer = momentum(model)
    after_the_step(model, optimizer, lambda model: model.zero_grad())
    run = attached("rigl", model=model, optimizer=optimizer)[2]
    before = run.masks.all()
    for step in range(EVERY):
        step_once(model, optimizer, step)
    assert all(torch.equal(run.masks.get(name), before[name]) for name in NAMES)
    assert any("no gradient" in warning for warning in run.warnings)


def test_masked_gradients_are_noticed_instead_of_growing_by_index():
    model = network()
    optimizer, box = momentum(model), []
    after_the_step(model, optimizer, lambda model: [
        model.get_parameter(name).grad.masked_fill_(~box[0].masks.get(name), 0) for name in NAMES
    ])  # fmt: skip
    run = attached("rigl", model=model, optimizer=optimizer)[2]
    box.append(run)
    before = run.masks.all()
    for step in range(EVERY):
        step_once(model, optimizer, step)
    assert all(torch.equal(run.masks.get(name), before[name]) for name in NAMES)
    assert all(any(name in w and "do not mask gradients" in w for w in run.warnings) for name in NAMES)


def test_a_layer_that_would_be_emptied_is_held_at_one_weight_and_named():
    model = network()
    with torch.no_grad():
        model[6].weight.mul_(1e-9)
        model[6].weight.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)  # magnitudes stay as they are
    _, _, plan = trained("gmp", 0.9, model=model, optimizer=optimizer)
    assert plan.kept("6.weight") == 1
    assert plan.units()[0] == TOTAL - floor(0.9 * TOTAL)
    assert any("'6.weight'" in warning and "floor" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("method", "settings", "error", "words"),
    [
        ("granet", {"initial_density": 0.05}, BudgetError, "above the initial"),
        ("granet", {"start": 30, "stop": 30}, SettingsError, "stop must come after start"),
        ("gmp", {"start": 0.6, "stop": 0.5}, SettingsError, "stop must come after start"),
        ("gmp", {"start": 2, "stop": 12, "every": 11}, SettingsError, "do not fit into the pruning window"),
        ("gmp", {"stop": 100}, SettingsError, "has 60 steps"),
        ("granet", {"rate": 0}, SettingsError, "rate"),
        ("granet", {"spread": "uniform", "classifier": "nothing"}, sc.SecateurError, "nothing"),
        ("rigl", {"every": 60}, SettingsError, "no such event"),
        ("set", {"until": 200}, None, ""),
        ("rigl", {"initial_density": 0.5}, sc.SecateurError, "initial_density"),
    ],
)
def test_what_cannot_work_is_refused_before_training(method, settings, error, words):
    if error is None:
        attached(method, **settings)
        return
    with pytest.raises(error, match=words):
        attached(method, **settings)


def test_a_classifier_that_does_not_fit_is_refused_before_training():
    with pytest.raises(BudgetError, match=r"6\.weight"):
        attached("granet", 0.99, spread="uniform", classifier_density=1.0)


def test_frozen_weights_and_totals_are_refused_in_words():
    model = network()
    model[4].weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"4\.weight.*frozen"):
        attached("granet", model=model)
    model = network()
    with pytest.raises(BudgetError, match="total"):
        sc.sparsify(model, momentum(model), "granet", steps=60, every=5, budget=Budget(200, Quantity.UNITS))


def test_shares_stretch_with_the_training_and_defaults_work():
    for steps in (60, 250):
        model = network()
        optimizer = momentum(model)
        run = sc.sparsify(model, optimizer, "granet", 0.9, steps=steps)
        for step in range(steps):
            step_once(model, optimizer, step)
        run.finish()
        last = max(entry["step"] for entry in run.log if entry["what"] == "prune")
        assert 0.4 * steps <= last <= 0.5 * steps  # the cubic curve's last weights may have gone earlier
