"""Pruning plasticity: rows by hand, masks against brute force, killed runs, bad input."""

from math import ceil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import NumericsError, SettingsError
from secateur.data.dataset import DataKind, Dataset
from secateur.methods.weights.plasticity import Regeneration, regenerated
from secateur.train.loop import Decay, Fitting, Recipe
from secateur.train.snapshot import model_state, put_back

STEPS = 20
NAMES = ("0.weight", "2.weight")
EVERYTHING = ("none", "restore", "exchange")


def make():
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def dataset():
    rng = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    return Dataset("tiny", DataKind.IMAGE, torch.rand(60, 12, generator=rng) + F.one_hot(targets, 12), targets)


def fitting(evaluate=None):
    (batch,) = dataset().batches(60)

    def figures(model):
        value = model(batch.args[0])
        return {
            "accuracy": float((value.argmax(1) == batch.target).double().mean()),
            "loss": float(F.cross_entropy(value, batch.target)),
        }

    return Fitting(dataset(), Recipe(steps=STEPS, batch=20, lr=0.2, decay=Decay.STEPS), evaluate or figures)


class Spy:
    """The caller's own fit, not a `Fitting`: remembers its calls, dies in the n-th."""

    def __init__(self, dies_at=0):
        self.fit, self.steps, self.calls, self.dies_at = fitting(), STEPS, [], dies_at

    def __call__(self, model, masks, start, stop):
        begun = model_state(model)
        self.calls.append((begun, dict(masks), start, stop))
        if len(self.calls) == self.dies_at:
            self.fit(model, masks, start, (start + stop) // 2)
            raise KeyboardInterrupt
        return self.fit(model, masks, start, stop)


def loss_of(spy):
    return {"loss": lambda model, step: spy.fit.loss(model, spy.fit.stream.at(step))}


def study(fit, sparsity=0.8, **more):
    settings = {"moments": (0.25, 10), "recovery": 0.2, "regenerate": EVERYTHING, "seed": 3} | more
    return sc.study(make, fit, "plasticity", sparsity, **settings)


def test_rows_are_what_the_same_trainings_give_by_hand():
    found = study(fitting(), rates=(0.5,), regenerate=("none",))
    assert [(row["step"], row["sparsity"]) for row in found.rows] == [(5, 0.5), (5, 0.8), (10, 0.5), (10, 0.8)]
    for row in found.rows:
        fit, k = fitting(), row["step"]
        torch.manual_seed(3)
        model = make()
        before = fit(model, {}, 0, k)["accuracy"]
        weights = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in NAMES])
        gone = weights.sort().values[int(row["sparsity"] * 150) - 1]
        masks = {name: model.get_parameter(name).detach().abs() > gone for name in NAMES}
        with torch.no_grad():
            for name, keep in masks.items():
                model.get_parameter(name).mul_(keep)
        after = fit(model, masks, k, k + 4)["accuracy"]
        assert (row["before"], row["after"]) == (before, after)
        assert row["plasticity"] == after - before
        assert row["density"] == pytest.approx(1 - row["sparsity"])
    mean = sum(row["plasticity"] for row in found.rows[:2]) / 2
    assert found.summary["plasticity at 5, none"] == pytest.approx(mean)


def test_regeneration_is_by_the_gradient_of_that_moment_and_comes_back_at_zero():
    spy = Spy()
    found = study(spy, moments=(5,), extras=loss_of(spy))
    dense, *after = spy.calls
    assert (dense[2], dense[3]) == (0, 5)
    assert all((start, stop) == (5, 9) for _, _, start, stop in after)
    torch.manual_seed(3)
    model = make()
    spy.fit(model, {}, 0, 5)
    state = model_state(model)
    gradient = torch.autograd.grad(
        spy.fit.loss(model, spy.fit.stream.at(5)), [model.get_parameter(name) for name in NAMES]
    )
    plain, restored, exchanged = ((begun, masks) for begun, masks, _, _ in after)
    for name, grad in zip(NAMES, gradient, strict=True):
        survivors = plain[1][name]
        assert bool(restored[1][name].all())
        # exchange: the half with the larger |w| stays, then the largest |gradient| among all else
        kept = int(survivors.sum())
        leaving = ceil(0.5 * kept)
        weight = state[name].abs().flatten()
        ranked = sorted((i for i in range(weight.numel()) if survivors.flatten()[i]), key=lambda i: weight[i])
        staying = set(map(int, ranked[leaving:]))
        open_places = [i for i in range(weight.numel()) if i not in staying]
        coming = set(sorted(open_places, key=lambda i: grad.abs().flatten()[i])[-leaving:])
        assert set(exchanged[1][name].flatten().nonzero().flatten().tolist()) == staying | coming
        for begun, masks in (plain, restored, exchanged):
            assert not begun[name][~survivors].any()  # what comes back is 0, also where the mask is open
            stays = survivors & masks[name]
            assert torch.equal(begun[name][stays], state[name][stays])
    assert [row["density"] for row in found.rows] == pytest.approx([0.2, 1.0, 0.2])


def test_a_moment_does_not_depend_on_the_other_moments():
    both, alone = study(fitting()), study(fitting(), moments=(10,))
    assert [row for row in both.rows if row["step"] == 10] == alone.rows


@pytest.mark.parametrize("dies_at", [1, 2, 5])
def test_a_killed_study_goes_on_to_the_same_rows(dies_at, tmp_path):
    straight = Spy()
    expected = study(straight, extras=loss_of(straight))
    dying = Spy(dies_at)
    with pytest.raises(KeyboardInterrupt):
        study(dying, extras=loss_of(dying), folder=tmp_path)
    again = Spy()
    found = study(again, extras=loss_of(again), folder=tmp_path)
    assert found.to_json() == expected.to_json()
    assert len(again.calls) == len(straight.calls) - (dies_at - 1)


def test_for_a_loss_less_is_better():
    more = {"moments": (10,), "regenerate": ("none",)}
    row = study(fitting(), metric="loss", **more).rows[0]
    assert row["plasticity"] == row["before"] - row["after"]
    assert row["before"] != row["after"]


def test_spread_and_floor():
    spy = Spy()
    study(spy, regenerate=("none",), spread="uniform", moments=(5,))
    assert [int(mask.sum()) for mask in spy.calls[1][1].values()] == [24, 6]
    spy = Spy()
    study(spy, 0.99, regenerate=("none",), moments=(5,))
    assert all(mask.any() for mask in spy.calls[1][1].values())


def test_a_layer_that_kept_everything_stays_as_it_is():
    mask = torch.ones(3, 4, dtype=torch.bool)
    for mode in Regeneration:
        assert torch.equal(regenerated(mask, torch.randn(3, 4), torch.rand(3, 4), mode, 0.5), mask)


def test_the_model_s_state_comes_back_bit_by_bit():
    model = make()
    state = model_state(model)
    fitting()(model, {}, 0, 3)
    put_back(model, state)
    assert all(torch.equal(value, state[name]) for name, value in model_state(model).items())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"moments": (0.9,)}, "does not fit a training of 20 steps"),
        ({"moments": (0.0,)}, "does not fit"),
        ({"recovery": 30}, "does not fit"),
        ({"regenerate": ("gradient",)}, "regenerate"),
    ],
)
def test_what_cannot_work_is_refused(more, words):
    with pytest.raises(SettingsError, match=words):
        study(fitting(), **more)


def test_regeneration_needs_a_loss_and_finite_gradients():
    with pytest.raises(SettingsError, match="loss"):
        study(Spy())
    spy = Spy()
    study(spy, regenerate=("none",))  # plain pruning needs none
    with pytest.raises(NumericsError, match=r"'0\.weight' at step 5"):
        study(spy, extras={"loss": lambda model, step: model[0].weight.sum() * float("nan") + model[2].weight.sum()})
