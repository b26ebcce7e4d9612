"""The geometric sequence of tolerances: known values, the product it must have, what has no solution."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocate.tolerances import tolerance_factor
from secateur.core.errors import SettingsError


@pytest.mark.parametrize(
    ("first", "places", "product", "expected"),
    [
        (0.06, 60, 6, 0.97379),
        (0.05, 50, 5, 0.98142),
        (0.06, 20, 6, 1.04486),
        (0.05, 12, 2, 1.03103),
        (0.1, 10, 2, 0.92403),
        (0.6, 4, 4, 0.76483),
    ],
)
def test_known_values(first, places, product, expected):
    assert tolerance_factor(first, places, product) == pytest.approx(expected, abs=1e-5)


def test_two_places_by_hand():
    """(1 + 1/2) (1 + x/2) = 3 gives x = 2."""
    assert tolerance_factor(0.5, 2, 3.0) == pytest.approx(2, abs=1e-11)


@given(st.floats(1e-4, 2), st.integers(2, 80), st.floats(1.001, 20))
def test_the_product_is_the_one_asked_for(first, places, times):
    product = (1 + first) * times
    factor = tolerance_factor(first, places, product)
    assert prod(1 + first * factor**place for place in range(places)) == pytest.approx(product, rel=1e-9)
    assert (factor > 1) == (product > (1 + first) ** places)


def test_many_small_tolerances_do_not_overflow():
    assert 1 < tolerance_factor(1e-6, 3000, 6.0) < 1.01


def test_one_place_has_nothing_to_multiply():
    assert tolerance_factor(0.1, 1, 5.0) == 1


@pytest.mark.parametrize(("first", "product"), [(0, 2), (-0.1, 2), (0.1, 1), (0.1, 1.1), (0.1, float("nan"))])
def test_what_has_no_solution_is_refused(first, product):
    with pytest.raises(SettingsError, match="tolerance"):
        tolerance_factor(first, 5, product)
