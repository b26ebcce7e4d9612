from decimal import ROUND_FLOOR, Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.budget import Budget, Pattern, Quantity
from secateur.core.errors import BudgetError
from secateur.core.units import UnitKind


@pytest.mark.parametrize(
    ("sparsity", "units", "removed"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in floats
        (0.07 * 100 / 100, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.57, 100, 57),
        (0.1 + 0.2, 10, 3),  # 0.30000000000000004
        (1 - 0.9, 100, 10),  # 0.09999999999999998
        (1 / 3, 300, 100),  # 0.3333333333333333
        (2 / 3, 3, 2),
        (1 / 7, 7 * 10**6, 10**6),
        (0.5, 7, 3),  # rounded down: never more removed than asked for
        (0.999, 10, 9),
        (0.0, 10, 0),
        (1e-05, 100_000, 1),
        (0, 5, 0),
        (0.5, 0, 0),
        (0.123456789, 10**9, 123456789),
    ],
)
def test_sparsity_is_the_fraction_that_was_typed(sparsity, units, removed):
    assert Budget(sparsity).keep(units) == units - removed


@settings(deadline=None)
@given(st.integers(0, 999_999), st.integers(0, 10**7))
def test_decimals_are_floored_exactly(millionths, units):
    text = f"0.{millionths:06d}"
    removed = int((Decimal(text) * units).to_integral_value(ROUND_FLOOR))
    assert Budget(float(text)).keep(units) == units - removed
    if millionths:
        assert Budget(float(text), Quantity.DENSITY).keep(units) == removed


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(0, 10**6))
def test_more_sparsity_never_keeps_more(one, other, units):
    low, high = sorted((one, other))
    assert 0 <= Budget(high).keep(units) <= Budget(low).keep(units) <= units


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10**6))
def test_the_count_is_within_one_of_the_real_number(sparsity, units):
    removed = units - Budget(sparsity).keep(units)
    assert removed - 1e-6 <= sparsity * units < removed + 1 + 1e-6


def test_the_other_counted_quantities():
    assert Budget(0.29, Quantity.DENSITY).keep(100) == 29
    assert Budget(1, Quantity.DENSITY).keep(7) == 7
    assert Budget(5, Quantity.UNITS).keep(7) == 5
    assert Budget(100, Quantity.PARAMETERS).keep(7, cost=30) == 3
    with pytest.raises(BudgetError, match="cannot keep 8 of 7 units; the reachable range is 0 to 7"):
        Budget(8, Quantity.UNITS).keep(7)
    with pytest.raises(BudgetError, match="cannot keep 4 of 3 units"):
        Budget(120, Quantity.PARAMETERS).keep(3, cost=30)


@pytest.mark.parametrize("quantity", [Quantity.FLOPS, Quantity.BYTES, Quantity.MILLISECONDS])
def test_quantities_that_need_a_cost_model_are_refused_with_what_works(quantity):
    with pytest.raises(BudgetError, match=f"{quantity} needs .*cost model.*density, parameters, sparsity, units"):
        Budget(0.5, quantity).keep(10)


@pytest.mark.parametrize(
    ("amount", "quantity", "says"),
    [
        (1, Quantity.SPARSITY, r"sparsity must be in \[0, 1\), got 1"),
        (-0.1, Quantity.SPARSITY, r"got -0\.1"),
        (50, Quantity.SPARSITY, r"got 50; 0\.5 removes half"),
        (float("nan"), Quantity.SPARSITY, "finite number, got nan"),
        (float("inf"), Quantity.UNITS, "units must be a finite number"),
        (0, Quantity.DENSITY, r"density must be in \(0, 1\]"),
        (1.01, Quantity.DENSITY, r"density must be in \(0, 1\]"),
        (0, Quantity.FLOPS, "flops must be above 0"),
        (-1, Quantity.UNITS, "units must not be negative"),
        (-1, Quantity.BYTES, "bytes must be above 0"),
    ],
)
def test_amounts_out_of_range(amount, quantity, says):
    with pytest.raises(BudgetError, match=says):
        Budget(amount, quantity)


def test_a_bad_amount_for_one_kind_and_a_negative_floor():
    with pytest.raises(BudgetError, match=r"\[0, 1\), got 2"):
        Budget(0.5, per_kind=((UnitKind.HEAD, 2.0),))
    with pytest.raises(BudgetError, match="floor must be 0 or more units per site, got -1"):
        Budget(0.5, floor=-1)


def test_amounts_per_kind():
    budget = Budget(0.5, floor=3, per_kind=((UnitKind.HEAD, 0.25), (UnitKind.NEURON, 0.75)))
    assert budget.of(UnitKind.HEAD) == Budget(0.25, floor=3)
    assert budget.of(UnitKind.NEURON) == Budget(0.75, floor=3)
    assert budget.of(UnitKind.WEIGHT) == Budget(0.5, floor=3)


def test_pattern_text():
    assert Pattern.parse("2:4") == Pattern(keep=2, of=4)
    assert Pattern.parse(" 1 : 16 ") == Pattern(keep=1, of=16)
    assert str(Pattern(3, 8)) == "3:8"


@pytest.mark.parametrize("text", ["", "2", ":", "2:", ":4", "2-4", "2:4:8", "a:b", "-2:4", "2.0:4", "²:4"])
def test_pattern_text_of_another_form(text):
    with pytest.raises(BudgetError, match="is not of the form KEEP:OF, for example 2:4"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_impossible_patterns(text):
    with pytest.raises(BudgetError, match=f"pattern {text} is not possible"):
        Pattern.parse(text)


@settings(deadline=None)
@given(st.integers(2, 64), st.data(), st.integers(1, 100))
def test_the_budget_of_a_pattern_keeps_its_share(of, data, groups):
    keep = data.draw(st.integers(1, of - 1))
    budget = Budget.nm(f"{keep}:{of}")
    assert budget.pattern == Pattern(keep, of)
    assert budget.keep(of * groups) == keep * groups


def test_words_and_plain_data():
    budget = Budget(0.5, floor=2, per_kind=((UnitKind.HEAD, 0.25),))
    assert str(budget) == "sparsity 0.5"
    assert str(Budget.nm("1:4")) == "sparsity 0.75 as 1:4 (keep 1 of 4)"
    assert budget.to_json() == {
        "amount": 0.5,
        "quantity": "sparsity",
        "floor": 2,
        "pattern": None,
        "per_kind": {"head": 0.25},
    }
    assert Budget.nm("1:4").to_json()["pattern"] == "1:4"


@pytest.mark.parametrize(
    ("budget", "removes"),
    [
        (Budget(0.0), False),
        (Budget(0.1), True),
        (Budget(1.0, Quantity.DENSITY), False),
        (Budget(0.5, Quantity.DENSITY), True),
        (Budget(1, Quantity.FLOPS), False),
        (Budget(0.99, Quantity.PARAMETERS), True),
        (Budget(1000, Quantity.PARAMETERS), True),
    ],
)
def test_whether_anything_is_asked_to_go(budget, removes):
    assert budget.removes is removes
