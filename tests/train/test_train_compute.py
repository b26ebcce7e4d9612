"""Planning by compute: the released plans, closed forms against sums, and what must not be confused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import SettingsError
from secateur.train.compute import account, dense_steps, matched_plan, mean_density, plan_compute, plan_steps
from secateur.train.schedules import Constant, Ramp, Rounds, Shape, Window, average_density, between

# compute budget, sparsity -> first event, last event, steps: configurations published with the official code
RELEASED = [
    (10_000, 0.2, (2500, 8100, 11_200)),
    (10_000, 0.4, (2500, 8875, 13_050)),
    (10_000, 0.6, (2500, 10_100, 16_375)),
    (50_000, 0.5, (12_500, 47_200, 72_200)),
    (16_365, 0.6, (4100, 16_600, 26_800)),
]
GRADUAL = [shape for shape in Shape if shape is not Shape.CONSTANT]


@pytest.mark.parametrize(("budget", "sparsity", "expected"), RELEASED)
def test_released_plans_are_met(budget, sparsity, expected):
    plan = plan_compute(budget, sparsity)
    for found, wanted in zip((plan.start, plan.stop, plan.steps), expected, strict=True):
        assert found == pytest.approx(wanted, rel=0.015)
    assert plan.shares == pytest.approx((0.25, 0.5, 0.25), abs=100 / budget)
    assert plan.spent == pytest.approx(budget, abs=50)
    assert plan.start % 100 == plan.stop % 100 == 0


def test_a_plan_by_hand():
    plan = plan_compute(1000, 0.5, every=10)
    g = 0.5 / math.log(2)
    assert plan.steps == round(250 + 500 / g + 500) == 1443
    assert plan.start == 250
    assert abs(plan.stop - (250 + 500 / g)) <= 10
    assert plan.average_density == pytest.approx(1000 / 1443, rel=0.005)


def test_shares_are_of_the_compute_and_not_of_the_steps():
    plan = plan_compute(10_000, 0.8)
    assert plan.shares == pytest.approx((0.25, 0.5, 0.25), abs=0.01)
    assert (plan.steps - plan.stop) / plan.steps == pytest.approx(0.5, abs=0.01)  # the sparse tail is half of all steps


@pytest.mark.parametrize("shape", list(Shape))
@pytest.mark.parametrize("final", [1.0, 0.8, 0.4, 0.05])
def test_closed_mean_densities_are_the_integrals(shape, final):
    parts = 20_000
    summed = math.fsum(between(1.0, final, (k + 0.5) / parts, shape) for k in range(parts)) / parts
    assert mean_density(final, shape) == pytest.approx(summed, rel=1e-6)


def test_cubic_and_geometric_curves_cost_differently():
    assert mean_density(0.6, Shape.GEOMETRIC) == pytest.approx(0.783, abs=5e-4)
    assert mean_density(0.6, Shape.CUBIC) == pytest.approx(0.70)
    assert plan_compute(1000, 0.4, shape=Shape.CUBIC).steps > plan_compute(1000, 0.4).steps + 50


@given(
    st.integers(0, 40),
    st.integers(0, 120),
    st.integers(1, 30),
    st.floats(0.02, 1),
    st.sampled_from(Shape),
    st.booleans(),
)
def test_compute_event_by_event_is_the_sum_over_steps(start, length, every, final, shape, from_first):
    ramp = Ramp(Window(start, start + length, every), 1.0, final, shape, from_first)
    for steps in (0, 1, start, start + length, start + length + 17):
        summed = math.fsum(ramp.density(step) for step in range(steps))
        assert dense_steps(ramp, steps) == pytest.approx(summed, abs=1e-9)


def test_compute_of_any_schedule():
    rounds = Rounds(0.2, 10, 3)
    assert dense_steps(rounds, 25) == pytest.approx(10 + 8 + 5 * 0.64)
    assert dense_steps(rounds, 25) == pytest.approx(25 * average_density(rounds, 25))
    assert dense_steps(Constant(0.3), 10) == pytest.approx(3)
    assert dense_steps(rounds, 0) == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(300, 5000), st.floats(0.05, 0.95), st.integers(1, 20), st.sampled_from(GRADUAL))
def test_any_plan_spends_its_budget_in_the_shares_asked(budget, sparsity, every, shape):
    plan = plan_compute(budget, sparsity, every=every, shape=shape)
    assert plan.spent == pytest.approx(budget, abs=every)
    assert plan.shares == pytest.approx((0.25, 0.5, 0.25), abs=1.5 * every / budget)
    assert plan.stop <= plan.steps
    assert (plan.stop - plan.start) % every == 0
    assert plan_steps(plan.steps, sparsity, every=every, shape=shape).ramp == plan.ramp  # from T the same window


@pytest.mark.parametrize("shape", list(Shape))
def test_other_curves_at_the_same_compute_and_steps(shape):
    chosen = plan_compute(1000, 0.6, every=5)
    other = matched_plan(chosen.steps, chosen.spent, 0.6, first=chosen.start, every=5, shape=shape)
    assert other.steps == chosen.steps
    assert other.spent == pytest.approx(chosen.spent, abs=3)
    assert other.ramp.density(other.steps) == pytest.approx(0.4)
    if shape is Shape.CONSTANT:  # all at once where the average comes out right: t + 0.4 (T - t) = C
        assert other.start == other.stop == pytest.approx((chosen.spent - 0.4 * chosen.steps) / 0.6, abs=0.51)
    elif shape is Shape.CUBIC:  # steep at first, so it must end later
        assert other.stop > chosen.stop


def test_average_is_over_steps_and_not_over_events():
    log = [{"step": 10, "density": 0.5}, {"step": 20, "density": 0.25}]
    cost = account(log, total=1000, steps=100)
    assert cost.average == pytest.approx((10 * 1000 + 10 * 500 + 80 * 250) / 100)
    assert cost.final == 250
    assert cost.dense_steps == pytest.approx(cost.average / 1000 * 100)
    assert cost.flops(7) == pytest.approx(6 * 7 * (10 * 1000 + 10 * 500 + 80 * 250))


def test_an_event_after_the_last_step_costs_nothing_but_counts_in_the_end():
    cost = account([{"step": 50, "density": 0.1}], total=10, steps=50)
    assert (cost.average, cost.final) == (10, 1)
    sparse = account([{"step": 0, "density": 0.2}], total=10, steps=5)
    assert (sparse.average, sparse.final) == (2, 2)
    assert account([], total=10, steps=5).average == 10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_compute(0, 0.5), "at least 1 dense step"),
        (lambda: plan_compute(1000, 1.0), "sparsity must be in"),
        (lambda: plan_compute(1000, 0.5, 0.75, 0.25), "start and stop are shares"),
        (lambda: plan_compute(1000, 0.5, 0.25, 1.5), "start and stop are shares"),
        (lambda: plan_steps(120, 0.5, every=100), "does not fit a training of 120 steps"),
        (lambda: plan_steps(150, 0.5, every=100), "does not fit a training of 150 steps"),
        (lambda: matched_plan(100, 95, 0.6, first=50, every=1), "cannot spend 95 dense steps"),
        (lambda: matched_plan(100, 10, 0.6, first=1, every=1, shape=Shape.CONSTANT), "outside of the training"),
        (lambda: account([], 10, 0), "at least 1 step"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(SettingsError, match=words):
        call()
