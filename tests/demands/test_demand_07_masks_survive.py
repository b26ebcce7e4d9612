"""Demand 7: masks survive deepcopy, state_dict, torch.save, torch.compile, the optimiser's state and a resume."""

import copy
import io

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import PlanError
from secateur.core.plan import Plan

OPTIMISERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), 0.01, momentum=0.9, centered=True),
}


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def pruned() -> tuple[nn.Module, Plan]:
    model = make()
    plan = sc.plan(model, "random", 0.6)
    return sc.apply_(model, plan), plan


def train(model, optimizer, first: int, last: int) -> None:
    """The steps from first to last; each step's data depend on its number alone."""
    for step in range(first, last):
        rng = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 8, generator=rng), torch.randint(4, (32,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def assert_masked(model: nn.Module, plan: Plan) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in plan.masks.items():
        assert not parameters[name][~mask].any(), name
        assert parameters[name][mask].all(), name


@pytest.mark.parametrize("name", OPTIMISERS)
def test_zeros_stay_zero_for_100_steps(name):
    model, plan = pruned()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = OPTIMISERS[name](model)
    with sc.MaskKeeper(model, plan, optimizer):
        train(model, optimizer, 0, 100)
    assert_masked(model, plan)
    for key, mask in plan.masks.items():
        assert not torch.equal(model.state_dict()[key][mask], before[key][mask])  # the others did learn
        states = [v for v in optimizer.state[dict(model.named_parameters())[key]].values() if v.shape == mask.shape]
        assert states
        assert all(not state[~mask].any() for state in states)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_without_the_keeper_they_do_not(name):
    """The negative control: what the test above would show if the keeper did nothing."""
    model, plan = pruned()
    train(model, OPTIMISERS[name](model), 0, 3)
    with pytest.raises(AssertionError):
        assert_masked(model, plan)


def test_momentum_from_before_pruning_does_not_revive_a_weight():
    model = make()
    optimizer = OPTIMISERS["sgd"](model)
    train(model, optimizer, 0, 5)  # momentum for every weight
    plan = sc.plan(model, "global_magnitude", 0.6)
    sc.apply_(model, plan)
    with sc.MaskKeeper(model, plan, optimizer):
        train(model, optimizer, 5, 6)
        assert_masked(model, plan)


def test_closing_ends_it():
    model, plan = pruned()
    optimizer = OPTIMISERS["sgd"](model)
    sc.MaskKeeper(model, plan, optimizer).close()
    train(model, optimizer, 0, 2)
    with pytest.raises(AssertionError):
        assert_masked(model, plan)


def test_a_keeper_for_another_model_is_refused():
    _, plan = pruned()
    for other in (nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 15))):
        with pytest.raises(PlanError, match=r"0\.weight"):
            sc.MaskKeeper(other, plan, torch.optim.SGD(other.parameters(), 0.1))


def test_state_dict_keys_are_the_dense_model_s():
    model, plan = pruned()
    assert list(model.state_dict()) == list(make().state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]
    fresh = make()
    fresh.load_state_dict(model.state_dict())
    assert_masked(fresh, plan)
    with sc.masked(make(), plan) as inside:
        assert list(inside.state_dict()) == list(make().state_dict())
        assert not inside._forward_hooks
        assert not inside[0]._forward_pre_hooks


def test_deepcopy():
    model, plan = pruned()
    clone = copy.deepcopy(model)
    assert_masked(clone, plan)
    assert clone[0].weight is not model[0].weight
    optimizer = OPTIMISERS["adamw"](clone)
    with sc.MaskKeeper(clone, plan, optimizer):
        train(clone, optimizer, 0, 3)
    assert_masked(clone, plan)
    assert_masked(copy.deepcopy(clone), plan)
    with sc.MaskKeeper(model, plan, OPTIMISERS["sgd"](model)):
        copy.deepcopy(model)  # nothing of the keeper sticks to the model


def test_torch_save_of_the_whole_model_and_of_its_state():
    model, plan = pruned()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_masked(torch.load(file, weights_only=False), plan)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_masked(fresh, plan)


@pytest.mark.parametrize("when", ["before", "after"])
def test_compile(when):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    model = make()
    plan = sc.plan(model, "random", 0.6)
    dense = make().eval()(x)
    if when == "before":  # compiled first, pruned afterwards: the compiled one must see the zeros
        compiled = torch.compile(model.eval(), backend="aot_eager")
        torch.testing.assert_close(compiled(x), dense)
        sc.apply_(model, plan)
    else:
        compiled = torch.compile(sc.apply_(model, plan).eval(), backend="aot_eager")
    expected = sc.apply_(make(), plan).eval()(x)
    assert not torch.allclose(expected, dense)
    torch.testing.assert_close(compiled(x), expected)
    assert_masked(model, plan)
    trained = torch.compile(model.train(), backend="aot_eager")
    optimizer = OPTIMISERS["sgd"](model)
    with sc.MaskKeeper(model, plan, optimizer):
        train(trained, optimizer, 0, 3)
    assert_masked(model, plan)
    torch.compiler.reset()


def test_a_compiled_model_sees_masks_come_and_go():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    model = make().eval()
    plan = sc.plan(model, "random", 0.6)
    compiled = torch.compile(model, backend="aot_eager")
    dense = compiled(x)
    with sc.masked(model, plan):
        inside = compiled(x)
    torch.testing.assert_close(inside, sc.apply_(make(), plan).eval()(x))
    torch.testing.assert_close(compiled(x), dense)
    assert not torch.allclose(inside, dense)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_resuming_gives_the_bits_of_the_undisturbed_run(name, tmp_path):
    whole, plan = pruned()
    optimizer = OPTIMISERS[name](whole)
    with sc.MaskKeeper(whole, plan, optimizer):
        train(whole, optimizer, 0, 40)
    model, plan = pruned()
    optimizer = OPTIMISERS[name](model)
    with sc.MaskKeeper(model, plan, optimizer):
        train(model, optimizer, 0, 17)
    plan.save(tmp_path / "plan")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    # everything anew, as after a crash
    stored = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed = make()
    resumed.load_state_dict(stored["model"])
    optimizer = OPTIMISERS[name](resumed)
    optimizer.load_state_dict(stored["optimizer"])
    plan = Plan.load(tmp_path / "plan")
    with sc.MaskKeeper(resumed, plan, optimizer):
        train(resumed, optimizer, 17, 40)
    assert_masked(resumed, plan)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
