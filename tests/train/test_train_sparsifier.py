"""The engine in users' loops: exact counts, zeros in weights and states, resume, wrappers, bad input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from train_models import OPTIMIZERS, STEPS, Net, attach, batch, leaks, net, one_step, order, train

import secateur as sc
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.plan import Plan
from secateur.core.trees import load_tree, save_tree
from secateur.train.part import Part
from secateur.train.parts import Growth, PruneTo, Regrow, StartSparse
from secateur.train.schedules import CosineRate, Ramp, Window
from secateur.train.sparsifier import Order, Sparsifier

# --- exact counts, exact zeros --------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_zeros_hold_in_weights_and_in_every_state_and_the_target_is_met(name, start):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = attach(model, optimizer, start=start)
    seen = []

    def each(step):
        assert leaks(sparsifier) == 0
        seen.append(sum(sparsifier.masks.kept.values()))

    train(model, optimizer, each=each)
    plan = sparsifier.finish()
    assert seen[-1] == sparsifier.target == int(0.2 * sparsifier.units)
    assert plan.units()[0] == sparsifier.target
    assert seen == sorted(seen, reverse=True)
    nonzero = sum(int((model.get_parameter(name) != 0).sum()) for name in plan.sites)
    assert nonzero <= sparsifier.target
    train(model, optimizer, STEPS, STEPS + 2)  # detached: nothing is enforced any more
    assert sum(int((model.get_parameter(name) != 0).sum()) for name in plan.sites) > sparsifier.target


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.9), st.integers(4, 40), st.integers(1, 6), st.sampled_from(list(Growth)), st.integers(0, 5))
def test_any_schedule_ends_exactly_and_follows_its_formula(density, steps, every, growth, seed):
    model = net(seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    window = Window(0, steps // 2, every)
    ramp = Ramp(window, 1.0, density)
    chain = [PruneTo(ramp), Regrow(CosineRate(0.5, 0.01, steps), Window(0, steps, every), growth)]
    sparsifier = Sparsifier(model, optimizer, chain, order(density, steps, seed=seed))
    total = sparsifier.units
    for step in range(steps):
        one_step(model, optimizer, step)
        kept = sum(sparsifier.masks.kept.values())
        assert abs(kept - ramp.density(step + 1) * total) <= 1.0001
        assert leaks(sparsifier) == 0
        for name, mask in sparsifier.masks.all().items():
            assert int(mask.sum()) == sparsifier.masks.kept[name] >= 1
    assert sum(sparsifier.masks.kept.values()) == Budget(density, Quantity.DENSITY).keep(total)
    sparsifier.finish()


def test_pruning_alone_only_ever_removes():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, optimizer, [PruneTo(Ramp(Window(0, STEPS, 3), 1.0, 0.1))], order(0.1))
    before = sparsifier.masks.all()
    for step in range(STEPS):
        one_step(model, optimizer, step)
        now = sparsifier.masks.all()
        assert not any(bool((now[name] & ~before[name]).any()) for name in now)
        before = now


def test_an_event_keeps_the_largest_of_all_survivors():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, optimizer, [PruneTo(Ramp(Window(3, 3), 1.0, 0.3))], order(0.3))
    for step in range(2):
        one_step(model, optimizer, step)
    one_step(model, optimizer, 2)
    # the event ran after the step; what was removed is zero, so rank what a twin without it has
    twin = net()
    other = torch.optim.SGD(twin.parameters(), 0.1)
    for step in range(3):
        one_step(twin, other, step)
    flat = torch.cat([twin.get_parameter(name).detach().abs().flatten() for name in sparsifier.sites])
    kept = torch.cat([mask.flatten() for mask in sparsifier.masks.all().values()])
    assert flat[kept].min() > flat[~kept].max()


def test_every_layer_keeps_a_weight_and_it_is_said():
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    sparsifier = Sparsifier(
        model, optimizer, [PruneTo(Ramp(Window(1, 1), 1.0, 0.02))], Order("gmp", Budget(0.02, "density"), 2)
    )
    optimizer.zero_grad()
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert sparsifier.masks.kept == {"0.weight": 6, "2.weight": 1}
    assert sparsifier.warnings == ["layer '2.weight' was held at the floor of 1 weights"]


# --- growing --------------------------------------------------------------------------------------


def test_growth_takes_the_largest_gradients_of_all_removed_places():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = Sparsifier(
        model,
        optimizer,
        [StartSparse(0.3), Regrow(CosineRate(0.4, 0.4, 9), Window(4, 4))],
        order(0.3, 9),
    )
    for step in range(3):
        one_step(model, optimizer, step)
    before = sparsifier.masks.all()
    moved = 0
    one_step(model, optimizer, 3)
    after = sparsifier.masks.all()
    for name, parameter in sparsifier.masks.parameters.items():
        gradient = parameter.grad.abs()
        grown = after[name] & ~before[name]
        assert int(after[name].sum()) == int(before[name].sum())
        assert gradient.count_nonzero() > int(before[name].sum())  # gradients are dense
        closed = ~after[name] & ~before[name]
        if grown.any() and closed.any():
            assert gradient[grown].min() >= gradient[closed].max()
        assert (parameter[grown] == 0).all()
        assert (optimizer.state[parameter]["momentum_buffer"][grown] == 0).all()
        moved += int(grown.sum())
    assert moved > 0
    (event,) = [entry for entry in sparsifier.log if entry["what"] == "regrow"]
    assert event["grown"] == moved


@pytest.mark.parametrize("broken", ["nan", "missing"])
def test_an_event_without_usable_gradients_is_refused_and_training_goes_on(broken):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps = iter(range(1, STEPS + 1))

    def spoil(optimizer, args, kwargs):  # registered first, so it comes before the event of its step
        if next(steps) == 4:
            model.head.weight.grad = None if broken == "missing" else torch.full_like(model.head.weight, torch.nan)

    optimizer.register_step_post_hook(spoil)
    sparsifier = attach(model, optimizer, start=0.5, density=0.2)
    train(model, optimizer)
    assert any("head.weight" in sentence and "nothing was regrown" in sentence for sentence in sparsifier.warnings)
    assert 4 not in [entry["step"] for entry in sparsifier.log if entry["what"] == "regrow"]
    assert 8 in [entry["step"] for entry in sparsifier.log if entry["what"] == "regrow"]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    sparsifier.finish()


def test_momentum_growth_remembers_gradients_at_removed_places():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    sparsifier = attach(model, optimizer, start=0.3, density=0.2, growth=Growth.MOMENTUM)
    train(model, optimizer)
    regrow = sparsifier.parts[-1]
    mean, square = regrow.averages["head.weight"]
    removed = ~sparsifier.masks.get("head.weight")
    assert mean[removed].any()
    assert square[removed].any()
    sparsifier.finish()


# --- loops of all sorts ---------------------------------------------------------------------------


def test_accumulation_and_clipping_count_optimiser_steps():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        for half in range(2):
            x, y = batch(2 * step + half)
            (F.cross_entropy(model(x), y) / 2).backward()
        sparsifier.after_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert leaks(sparsifier) == 0
    assert sparsifier.step == STEPS
    assert sparsifier.finish().units()[0] == sparsifier.target


def test_a_step_that_amp_skips_is_no_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=True)
    sparsifier = attach(model, optimizer)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == 5
    assert leaks(sparsifier) == 0


def test_bfloat16_autocast_trains_under_masks():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = attach(model, optimizer)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert leaks(sparsifier) == 0
    assert sparsifier.finish().units()[0] == sparsifier.target


def test_parameter_groups_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(F.relu(self.second(F.relu(self.first(x)))))

    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.SGD(
        [
            {"params": [model.first.weight, *model.head.parameters()], "lr": 0.1},
            {"params": [model.first.bias], "lr": 0.2},
        ],
        momentum=0.9,
    )
    sparsifier = attach(model, optimizer)
    assert sparsifier.units == 36 + 24
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6)), torch.randint(4, (8,))).backward()
        optimizer.step()
    assert sparsifier.finish().units()[0] == sparsifier.target
    assert model.first.weight is model.second.weight


def test_a_compiled_model_keeps_its_masks():
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1, momentum=0.9)
    sparsifier = attach(compiled, optimizer)
    assert set(sparsifier.sites) == {"conv.weight", "twice.weight", "head.weight"}
    twin = net()
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    plain = attach(twin, other)
    train(compiled, optimizer)
    train(twin, other)
    first, second = sparsifier.finish(), plain.finish()
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_average_of_weights_gets_the_masks_too():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = attach(model, optimizer)
    train(model, optimizer, each=lambda step: average.update_parameters(model))
    plan = sparsifier.finish()
    lagging = sum(int((average.module.get_parameter(n)[~plan.masks[n]] != 0).sum()) for n in plan.masks)
    assert lagging > 0  # an average lags behind the masks
    sparsifier.masks.apply_to(average.module)
    assert not any((average.module.get_parameter(n)[~plan.masks[n]] != 0).any() for n in plan.masks)
    with pytest.raises(ModelError, match=r"no parameter 'conv.weight'"):
        sparsifier.masks.apply_to(nn.Linear(2, 2))


def test_model_and_loop_stay_plain():
    model = net()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, optimizer):
        copy.deepcopy(model)
        assert list(model.state_dict()) == keys
        assert not model._forward_hooks


# --- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 4, 7, 13, STEPS - 1])
@pytest.mark.parametrize("growth", list(Growth))
def test_resuming_anywhere_equals_the_straight_run(cut, growth, tmp_path):
    def fresh():
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-2)
        return model, optimizer, attach(model, optimizer, start=0.6, growth=growth)

    model, optimizer, sparsifier = fresh()
    train(model, optimizer)
    straight = sparsifier.finish()

    first, optimizer, sparsifier = fresh()
    train(first, optimizer, 0, cut)
    save_tree({"m": first.state_dict(), "o": optimizer.state_dict(), "s": sparsifier.state_dict()}, tmp_path / "state")
    state = load_tree(tmp_path / "state")
    again, optimizer, sparsifier = fresh()
    again.load_state_dict(state["m"])
    optimizer.load_state_dict(state["o"])
    sparsifier.load_state_dict(state["s"])
    assert leaks(sparsifier) == 0
    train(again, optimizer, cut, STEPS)
    resumed = sparsifier.finish()
    assert all(torch.equal(straight.masks[n], resumed.masks[n]) for n in straight.masks)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_masks_are_stored_as_one_bit_per_weight():
    model = net()
    sparsifier = attach(model, torch.optim.SGD(model.parameters(), 0.1))
    packed = sparsifier.state_dict()["masks"]
    assert sum(mask.numel() * mask.element_size() for mask in packed.values()) <= sparsifier.units / 8 + len(packed)


def test_resuming_with_other_settings_or_another_model_is_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = attach(model, optimizer)
    train(model, optimizer, 0, 6)
    state = sparsifier.state_dict()
    sparsifier.close()
    other = attach(model, optimizer, density=0.3)
    with pytest.raises(SettingsError, match=r"made with budget=.*0\.2"):
        other.load_state_dict(state)
    other.close()
    changed = net(seed=5)
    third = attach(changed, torch.optim.SGD(changed.parameters(), 0.1))
    with pytest.raises(ModelError, match=r"parameter 'conv.weight' is not as it was at the checkpoint"):
        third.load_state_dict(state)


# --- bad input ------------------------------------------------------------------------------------


def test_an_optimiser_that_has_stepped_gets_its_states_masked():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(3):
        one_step(model, optimizer, step)
    sparsifier = attach(model, optimizer, start=0.5)
    assert leaks(sparsifier) == 0
    assert sparsifier.step == 0


def test_frozen_parameters_and_outsiders_are_refused_by_name():
    model = net()
    model.head.weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"'head.weight' is frozen .*exclude"):
        attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    model = net()
    with pytest.raises(ModelError, match=r"'twice.weight' is in no group of the optimizer"):
        attach(model, torch.optim.SGD([*model.conv.parameters(), *model.head.parameters()], 0.1))
    model = net()
    model.head.weight.requires_grad_(False)
    sparsifier = attach(model, torch.optim.SGD(model.parameters(), 0.1), exclude=("head",))
    assert "head.weight" not in sparsifier.sites


def test_schedules_that_do_not_fit_are_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(SettingsError, match="ends at step 30, but training has 24 steps"):
        Sparsifier(model, optimizer, [PruneTo(Ramp(Window(0, 30, 5), 1.0, 0.2))], order())
    with pytest.raises(SettingsError, match="is over before the first optimiser step"):
        Sparsifier(model, optimizer, [PruneTo(Ramp(Window.share(0, 0.75, 24, 100), 1.0, 0.2))], order())
    with pytest.raises(BudgetError, match=r"final density 0.6 is above the initial 0.5"):
        Sparsifier(model, optimizer, [StartSparse(0.5), PruneTo(Ramp(Window(0, 9), 0.5, 0.6))], order(0.6))
    with pytest.raises(SettingsError, match="at least 1 optimiser step"):
        order(steps=0)
    assert not optimizer._optimizer_step_post_hooks


def test_stopping_before_the_target_is_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = attach(model, optimizer)
    train(model, optimizer, 0, 5)
    with pytest.raises(BudgetError, match=r"stopped after 5 of 24 steps"):
        sparsifier.finish()


def test_training_beyond_its_plan_keeps_the_masks_and_says_so():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = attach(model, optimizer)
    train(model, optimizer, 0, STEPS)
    masks = sparsifier.masks.all()
    train(model, optimizer, STEPS, STEPS + 9)
    assert all(torch.equal(mask, sparsifier.masks.get(name)) for name, mask in masks.items())
    assert leaks(sparsifier) == 0
    assert any("went on after the 24 steps" in sentence for sentence in sparsifier.warnings)


class Charging(Part):
    has_penalty = True

    def penalty(self, run):
        return run.masks.parameters["head.weight"].square().sum()


def test_a_forgotten_penalty_is_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, optimizer, [Charging()], order())
    with pytest.raises(ModelError, match=r"loss \+ sparsifier.penalty\(\)"):
        one_step(model, optimizer, 0)
    x, y = batch(0)
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y) + sparsifier.penalty()).backward()
    optimizer.step()
    assert sparsifier.step == 1


# --- the calls ------------------------------------------------------------------------------------


def test_sparsify_refuses_methods_that_do_not_train():
    model = net()
    with pytest.raises(ModelError, match=r"wanda does not act during training; use sc.plan"):
        sc.sparsify(model, torch.optim.SGD(model.parameters(), 0.1), "wanda", 0.5, steps=10)


def test_a_plan_of_training_is_a_plan_like_any_other(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = attach(model, optimizer)
    train(model, optimizer)
    plan = sparsifier.finish()
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.provenance[0].method == "granet"
    assert loaded.provenance[0].budget["steps"] == STEPS
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sc.apply_(model, loaded)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(sc.SecateurError):
        sc.apply_(Net(), loaded)
