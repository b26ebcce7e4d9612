"""Adaptive shares: the update by hand, whole heads, a last step that is exact."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.adaptive import Goal, centred, kept_at, last_step, moved_shares

FINITE = st.floats(-1e3, 1e3)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(FINITE, min_size=2, max_size=9))
def test_importance_has_mean_0_and_largest_magnitude_1(values):
    found = centred({str(i): value for i, value in enumerate(values)})
    if max(values) - min(values) <= 1e-9 * max(map(abs, values)):
        return
    assert sum(found.values()) == pytest.approx(0, abs=1e-9 * len(values))
    assert max(map(abs, found.values())) == pytest.approx(1)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [found[str(i)] for i in order] == sorted(found.values())


def test_importance_by_hand():
    assert centred({"a": 1.0, "b": 2.0, "c": 6.0}) == {"a": -2 / 3, "b": -1 / 3, "c": 1.0}


@pytest.mark.parametrize("value", [0.0, 0.3, -7.1])
def test_equal_importance_is_0_and_not_a_division_by_zero(value):
    assert centred(dict.fromkeys("abc", value)) == dict.fromkeys("abc", 0.0)


def test_shares_move_by_the_formula_and_stay_inside():
    shares = {"low": 0.01, "high": 0.98, "usual": 0.3}
    v = {"low": 1.0, "high": -1.0, "usual": -0.5}
    found = moved_shares(shares, 0.02, 0.04, v, 0.99)
    assert found == pytest.approx({"low": 0.0, "high": 0.99, "usual": 0.34})


def test_important_modules_lose_less():
    found = moved_shares({"a": 0.0, "b": 0.0}, 0.05, 0.02, {"a": 1.0, "b": -1.0}, 0.99)
    assert found["a"] < 0.05 < found["b"]


@pytest.mark.parametrize(
    ("units", "share", "width", "kept"),
    [
        (172, 0.4, 1, 103),  # int(103.2)
        (100, 0.1, 1, 90),
        (10, 0.7, 1, 3),  # 10 * (1 - 0.7) is 3.0000000000000004 or 2.9999999999999996
        (4, 0.4, 24, 3),  # 38 of 96 features go: one whole head
        (4, 0.5, 24, 2),
        (4, 0.49, 24, 2),  # int(48.96): 48 features go
        (4, 0.47, 24, 3),
        (2, 0.3, 8, 2),  # 4 of 16: no whole head
        (7, 0.0, 5, 7),
    ],
)
def test_whole_units_go_for_features(units, share, width, kept):
    removed = (units * width - int(units * width * (1 - share) + 1e-9)) // width
    assert kept_at(units, share, width) == kept == units - removed


def test_a_share_that_was_added_up_counts_as_the_decimal():
    share = sum([0.1] * 3)  # 0.30000000000000004
    assert kept_at(10, share) == 7


COUNTS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(pairs=COUNTS, part=st.floats(0, 1))
def test_the_last_step_is_exact_in_units(pairs, part):
    before = {str(i): count for i, (count, _) in enumerate(pairs)}
    after = {str(i): max(1, count - gone) for i, (count, gone) in enumerate(pairs)}
    most, least = sum(before.values()), sum(after.values())
    if most == least:
        return
    target = least + int(part * (most - 1 - least))
    goal = Goal(tuple(before), lambda counts: sum(counts.values()), target)
    found = last_step(before, after, goal, dict.fromkeys(before, 1))
    assert sum(found.values()) == target
    assert all(after[name] <= found[name] <= before[name] for name in before)


def test_every_site_goes_the_same_part_of_its_way():
    before, after = {"a": 100, "b": 100, "c": 50}, {"a": 80, "b": 60, "c": 50}
    goal = Goal(("a", "b", "c"), lambda counts: sum(counts.values()), 220)
    assert last_step(before, after, goal, dict.fromkeys(before, 1)) == {"a": 90, "b": 80, "c": 50}


def test_what_is_given_back_is_shared():
    before, after = dict.fromkeys("abcd", 100), dict.fromkeys("abcd", 80)
    goal = Goal(tuple("abcd"), lambda counts: sum(counts.values()), 363)
    assert list(last_step(before, after, goal, dict.fromkeys("abcd", 1)).values()) == [91, 91, 91, 90]


def test_no_unit_more_would_fit_the_cost():
    price = {"a": 7, "b": 3}

    def cost(counts):
        return sum(price[name] * count for name, count in counts.items())

    before, after = {"a": 20, "b": 30}, {"a": 10, "b": 10}
    for target in range(cost(after), cost(before)):
        found = last_step(before, after, Goal(("a", "b"), cost, target), {"a": 1, "b": 1})
        assert cost(found) <= target
        assert all(cost(found | {n: found[n] + 1}) > target for n in found if found[n] < before[n])


def test_multiples_hold():
    before, after = {"a": 172, "b": 64}, {"a": 120, "b": 32}
    goal = Goal(("a", "b"), lambda counts: sum(counts.values()), 200)
    found = last_step(before, after, goal, {"a": 8, "b": 8})
    assert all(count % 8 == 0 or count == before[name] for name, count in found.items())
    assert 192 < sum(found.values()) <= 200
