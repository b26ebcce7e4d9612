"""Controls of tickets, distances between networks, and what is said about them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_models import net

from secateur.core.budget import Budget
from secateur.core.errors import ModelError, NumericsError, SettingsError
from secateur.train.controls import Shuffle, reinitialised, shuffled
from secateur.train.distance import angle, barrier, interpolated, kept_vector, l2_distance
from secateur.train.snapshot import model_state
from secateur.train.study import Study
from secateur.train.tickets import dead_layers, early_stop, gain

MASKS = {
    "a": torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.2,
    "b": torch.rand(30, 20, generator=torch.Generator().manual_seed(1)) < 0.6,
    "c": torch.ones(5, 4, dtype=torch.bool),
}
TOTAL = sum(int(mask.sum()) for mask in MASKS.values())


def job(make=net, seed=0):
    return Study(make=make, fit=None, steps=1, budget=Budget(0.5), seed=seed)


# --- controls ---------------------------------------------------------------------------------------


def fresh():
    from train_models import Net

    return Net()


def test_another_draw_of_the_same_constructor():
    study = job(fresh)
    state, again, other = reinitialised(study), reinitialised(study), reinitialised(study, draw=1)
    original = model_state(study.model())
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    for name in study.sites(study.model()):
        assert not torch.equal(state[name], original[name])
        assert not torch.equal(state[name], other[name])
        # the same distribution: torch's uniform initialisation has the bound 1 / sqrt(fan in)
        assert state[name].abs().max() <= original[name][0].numel() ** -0.5
    assert torch.equal(state["norm.running_mean"], torch.zeros(6))


def test_a_constructor_that_ignores_the_seed_is_refused():
    with pytest.raises(SettingsError, match=r"'conv\.weight'.*make\(\)"):
        reinitialised(job(net))  # `net` seeds torch itself


@pytest.mark.parametrize("how", list(Shuffle))
def test_shuffled_masks_keep_what_they_promise(how):
    found = shuffled(MASKS, 3, how, whole=("c",))
    counts = {name: int(mask.sum()) for name, mask in found.items()}
    assert counts["c"] == 20
    assert sum(counts.values()) == TOTAL
    own = {name: int(mask.sum()) for name, mask in MASKS.items()}
    if how is Shuffle.LAYER:
        assert counts == own
    elif how is Shuffle.EVEN:
        assert abs(counts["a"] / 1200 - counts["b"] / 600) <= 1 / 600
    else:
        assert counts != own
        assert abs(counts["a"] / 1200 - counts["b"] / 600) < 0.1
    share = float((found["a"] & MASKS["a"]).sum()) / counts["a"]
    assert share < 0.5  # other places: chance is 0.2, or the density of a
    again, other, drawn = shuffled(MASKS, 3, how), shuffled(MASKS, 4, how), shuffled(MASKS, 3, how, draw=1)
    assert torch.equal(again["b"], shuffled(MASKS, 3, how)["b"])
    assert not torch.equal(again["b"], other["b"])
    assert not torch.equal(again["b"], drawn["b"])


# --- distances --------------------------------------------------------------------------------------

ONE = {"w": torch.tensor([[3.0, 4.0], [5.0, 0.0]]), "b": torch.tensor([9.0])}
OTHER = {"w": torch.tensor([[0.0, 0.0], [7.0, 8.0]]), "b": torch.tensor([1.0])}
KEEP = {"w": torch.tensor([[True, True], [False, False]])}


def test_distance_and_angle_look_at_kept_weights_only():
    assert kept_vector(ONE, KEEP).tolist() == [3, 4]
    assert l2_distance(ONE, OTHER, KEEP) == 5
    turned = {"w": torch.tensor([[-4.0, 3.0], [100.0, 100.0]])}
    assert angle(ONE, turned, KEEP) == pytest.approx(90)
    assert angle(ONE, {"w": -ONE["w"]}, KEEP) == pytest.approx(180)
    assert angle(ONE, {"w": 7 * ONE["w"]}, KEEP) == pytest.approx(0, abs=1e-12)
    with pytest.raises(NumericsError, match="zero"):
        angle(ONE, OTHER, KEEP)
    with pytest.raises(ModelError, match="'w'"):
        l2_distance(ONE, {}, KEEP)


@given(st.floats(1e-9, math.pi - 1e-6))
def test_angles_of_any_size_are_exact(turn):
    # the arc cosine of the inner product would return 0 for everything below 1e-8
    u = {"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}
    v = {"w": torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)}
    masks = {"w": torch.ones(2, dtype=torch.bool)}
    assert angle(u, v, masks) == pytest.approx(math.degrees(turn), rel=1e-6)


def test_interpolation_leaves_counters_alone():
    one = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}
    other = {"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(9)}
    found = interpolated(one, other, 0.25)
    assert found["w"].tolist() == [1, 2]
    assert found["n"] == 3
    assert found["n"] is not one["n"]
    with pytest.raises(ModelError, match="architecture"):
        interpolated(one, {"w": one["w"]})


def test_barrier_of_a_double_well_and_of_a_bowl():
    one, other = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}

    def well(state):
        return float((state["w"] ** 2 - 1) ** 2)

    assert barrier(one, other, well) == pytest.approx(1)
    assert barrier(one, other, lambda state: float(state["w"] ** 2)) == pytest.approx(-1)
    far = {"w": torch.tensor([3.0])}  # off the middle the highest place is at w = 0, a quarter of the way
    assert barrier(one, far, lambda s: float(s["w"] == 0), shares=(0.25, 0.5)) == 1
    assert barrier(one, far, lambda s: float(s["w"] == 0)) == 0


def test_running_statistics_are_taken_anew_between_the_ends_or_refused():
    one = {"w": torch.zeros(1), "norm.running_mean": torch.zeros(1)}
    other = {"w": torch.ones(1), "norm.running_mean": torch.full((1,), 10.0)}
    seen = []

    def error(state):
        seen.append(float(state["norm.running_mean"]))
        return 0.0

    def anew(state):
        return state | {"norm.running_mean": torch.full((1,), -1.0)}

    with pytest.raises(SettingsError, match="running_mean"):
        barrier(one, other, error)
    barrier(one, other, error, anew)
    assert sorted(seen) == [-1, 0, 10]


# --- words ------------------------------------------------------------------------------------------


def test_early_stopping_takes_the_first_best_step():
    loss = {"loss@10": 0.5, "loss@20": 0.2, "loss@30": 0.2, "loss": 0.4, "accuracy@10": 9.0}
    assert early_stop(loss, "loss", 40) == 20
    assert early_stop(loss | {"loss": 0.1}, "loss", 40) == 40
    assert early_stop({"accuracy@5": 80.0, "accuracy@100": 90.0, "accuracy": 89.0}, "accuracy", 200) == 100
    assert early_stop({"accuracy": 89.0}, "accuracy", 200) is None


def test_gain_has_the_sign_of_better():
    assert gain({"accuracy": 3.0}, {"accuracy": 1.0}, "accuracy") == 2
    assert gain({"test_loss": 3.0}, {"test_loss": 1.0}, "test_loss") == -2
    with pytest.raises(SettingsError, match="'bleu'"):
        gain({"accuracy": 3.0}, {"accuracy": 1.0}, "bleu")


def test_a_layer_without_weights_is_reported():
    assert dead_layers({"a": torch.zeros(3, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool)}) == [
        "'a' has no weight left: nothing passes"
    ]
