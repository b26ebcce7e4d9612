"""Schedules: densities by hand, ends met exactly, averages by summing."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import SettingsError
from secateur.train.schedules import (
    Constant,
    CosineRate,
    Ramp,
    Rounds,
    Shape,
    Window,
    average_density,
    between,
    checked_window,
    geometric_counts,
    rounds_to,
)

windows = st.builds(
    lambda start, length, every: Window(start, start + length, every),
    st.integers(0, 50),
    st.integers(0, 200),
    st.integers(1, 40),
)


def test_a_window_s_events_by_hand():
    assert Window(100, 500, 200).events == [100, 300, 500]
    assert Window(100, 450, 200).events == [100, 300, 450]  # the last event is never missed
    assert Window(7, 7, 3).events == [7]
    assert Window.share(0.25, 0.75, 1000, 100).events == [200, 300, 400, 500, 600, 700, 800]


@given(windows)
def test_a_window_s_three_views_agree(window):
    fired = [step for step in range(window.stop + 5) if window.fires(step)]
    assert fired == window.events
    assert len(fired) == window.count == window.passed(window.stop + 3)
    for step in range(0, window.stop + 5):
        assert window.passed(step) == sum(event <= step for event in fired)


@pytest.mark.parametrize(("start", "stop", "every"), [(5, 4, 1), (-1, 4, 1), (0, 4, 0)])
def test_impossible_windows_are_refused(start, stop, every):
    with pytest.raises(SettingsError):
        Window(start, stop, every)


def test_a_window_longer_than_training_is_refused():
    assert checked_window(Window(0, 10), 10) == Window(0, 10)
    with pytest.raises(SettingsError, match=r"ends at step 11, but training has 10 steps"):
        checked_window(Window(0, 11), 10)


def test_shapes_by_hand():
    assert between(1.0, 0.2, 0.5, Shape.LINEAR) == pytest.approx(0.6)
    assert between(1.0, 0.2, 0.5, Shape.CUBIC) == pytest.approx(0.2 + 0.8 / 8)
    assert between(1.0, 0.25, 0.5, Shape.GEOMETRIC) == pytest.approx(0.5)
    assert between(1.0, 0.2, 0.5, Shape.COSINE) == pytest.approx(0.6)
    assert between(1.0, 0.2, 0.0, Shape.CONSTANT) == 0.2


@given(windows, st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(list(Shape)), st.booleans())
def test_a_ramp_ends_exactly_and_never_turns_back(window, one, other, shape, from_first):
    initial, final = max(one, other), min(one, other)
    ramp = Ramp(window, initial, final, shape, from_first)
    values = [ramp.density(step) for step in range(window.stop + 3)]
    assert values[-1] == final
    assert values[window.stop] == final
    assert all(value == initial for value in values[: window.start])
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    changes = {step for step in range(1, len(values)) if values[step] != values[step - 1]}
    assert changes <= set(window.events)


def test_a_geometric_ramp_from_its_first_event_is_a_constant_rate():
    ramp = Ramp(Window(20, 100, 20), 1.0, 0.4, Shape.GEOMETRIC, from_first=True)
    rho = 1 - 0.4 ** (1 / 5)
    assert [ramp.density(step) for step in (20, 40, 60, 80, 100)] == pytest.approx(
        [(1 - rho) ** j for j in range(1, 6)]
    )


def test_a_cubic_ramp_starts_at_its_first_event():
    ramp = Ramp(Window(0, 40, 10), 1.0, 0.1)
    assert [ramp.density(step) for step in (0, 10, 20, 30, 40)] == pytest.approx(
        [0.1 + 0.9 * (1 - i / 4) ** 3 for i in range(5)]
    )
    assert ramp.density(9) == ramp.density(0)


def test_averages_are_over_forward_passes():
    assert average_density(Constant(0.3), 7) == pytest.approx(0.3)
    ramp = Ramp(Window(5, 5), 1.0, 0.2, Shape.CONSTANT)  # five dense steps, then five at 0.2
    assert average_density(ramp, 10) == pytest.approx(0.6)
    rounds = Rounds(0.5, 4, 2)
    assert average_density(rounds, 16) == pytest.approx((1 + 0.5 + 0.25 + 0.25) / 4)
    fine = Ramp(Window(0, 10_000), 1.0, 0.4, Shape.GEOMETRIC)
    assert average_density(fine, 10_000) == pytest.approx((1 - 0.4) / -math.log(0.4), rel=1e-3)


def test_a_cosine_rate_spans_the_whole_training():
    rate = CosineRate(0.5, 0.005, 200)
    assert rate.at(0) == 0.5
    assert rate.at(100) == pytest.approx(0.2525)
    assert rate.at(200) == 0.005


def test_rounds_and_counts():
    assert rounds_to(0.8, 0.2) == 1
    assert rounds_to(0.64, 0.2) == 2
    assert rounds_to(0.63, 0.2) == 3
    assert rounds_to(1.0, 0.2) == 0
    assert geometric_counts(100, 0.2, 3) == [100, 80, 64, 52]


@pytest.mark.parametrize("density", [0.0, 1.2, -0.1])
def test_densities_outside_of_their_range_are_refused(density):
    with pytest.raises(SettingsError, match="density must be in"):
        Ramp(Window(0, 1), 1.0, density)
