from fractions import Fraction
from math import floor

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from secateur.allocate.counts import erk, largest_remainder, reference_floor, uniform, with_floor
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError

site_sizes = st.lists(st.integers(1, 300), min_size=1, max_size=8).map(
    lambda s: {f"s{9 - i}": n for i, n in enumerate(s)}
)


@st.composite
def sized(draw):
    sizes = draw(site_sizes)
    return sizes, draw(st.integers(0, sum(sizes.values())))


# --- rounding -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(sized())
def test_rounding_gives_the_exact_total_within_one_of_every_share(case):
    sizes, total = case
    everything = sum(sizes.values())
    shares = {name: Fraction(size * total, everything) for name, size in sizes.items()}
    counts = largest_remainder({name: float(share) for name, share in shares.items()}, total, sizes)
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == total
    assert all(floor(shares[name]) <= counts[name] <= min(floor(shares[name]) + 1, sizes[name]) for name in sizes)
    # Hamilton: who was rounded up had no smaller remainder than who was not; among equals the first
    remainders = [shares[name] - floor(shares[name]) for name in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -remainders[i])
    raised = [i for i, name in enumerate(sizes) if counts[name] > floor(shares[name])]
    if len({*remainders}) == len(remainders) or len({*remainders}) == 1:
        assert sorted(raised) == sorted(order[: len(raised)])


def test_rounding_by_hand():
    limits = {"a": 9, "b": 9, "c": 9}
    assert largest_remainder({"a": 1.2, "b": 2.5, "c": 3.3}, 7, limits) == {"a": 1, "b": 3, "c": 3}
    assert largest_remainder({"a": 0.5, "b": 0.5, "c": 1.0}, 2, limits) == {"a": 1, "b": 0, "c": 1}
    # a site that is full passes its share on; too much is taken from the smallest remainders
    assert largest_remainder({"a": 2.9, "b": 2.0, "c": 2.1}, 7, {"a": 2, "b": 9, "c": 9}) == {"a": 2, "b": 2, "c": 3}
    assert largest_remainder({"a": 2.9, "b": 2.0, "c": 2.1}, 5, limits) == {"a": 2, "b": 1, "c": 2}
    assert largest_remainder({}, 0, {}) == {}


@settings(deadline=None, max_examples=100)
@given(sized(), st.data())
def test_rounding_reaches_any_total_within_the_limits(case, data):
    sizes, total = case
    wanted = {name: data.draw(st.floats(0, 400)) for name in sizes}
    counts = largest_remainder(wanted, total, sizes)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= size for name, size in sizes.items())


@pytest.mark.parametrize("total", [-1, 7])
def test_totals_out_of_reach_are_refused(total):
    with pytest.raises(BudgetError, match=f"cannot keep {total} of 6 units; the reachable range is 0 to 6"):
        largest_remainder({"a": 1.0, "b": 1.0}, total, {"a": 2, "b": 4})


@settings(deadline=None, max_examples=100)
@given(sized())
def test_uniform_is_one_density(case):
    sizes, total = case
    counts = uniform(sizes, total)
    assert sum(counts.values()) == total
    for name, size in sizes.items():
        assert abs(counts[name] - Fraction(size * total, sum(sizes.values()))) < 1


# --- ERK ----------------------------------------------------------------------------------------


def erk_densities(shapes, total):
    """The published rule, layer by layer in exact fractions: clamp at 1, solve again."""
    dense = set()
    sizes = {name: a * b * k for name, (a, b, k) in shapes.items()}
    while True:
        factors = {n: Fraction(sum(shapes[n]), sizes[n]) for n in shapes if n not in dense}
        left = total - sum(sizes[n] for n in dense)
        epsilon = Fraction(left) / sum(factors[n] * sizes[n] for n in factors) if factors else 0
        over = {n for n, factor in factors.items() if epsilon * factor > 1}
        if not over:
            return {n: Fraction(1) if n in dense else epsilon * factors[n] for n in shapes}, epsilon
        dense |= over


shapes_of = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=200)
@given(shapes_of, st.data())
def test_erk_against_the_published_rule(shapes, data):
    shapes = {f"s{9 - i}": shape for i, shape in enumerate(shapes)}
    sizes = {name: a * b * k for name, (a, b, k) in shapes.items()}
    total = data.draw(st.integers(0, sum(sizes.values())))
    densities, _ = erk_densities(shapes, total)
    assume(all(abs(d - 1) > 1e-9 or d == 1 for d in densities.values()))
    counts = erk(shapes, total)
    assert sum(counts.values()) == total
    for name, size in sizes.items():
        assert abs(counts[name] - densities[name] * size) <= 1 + 1e-6


def test_erk_by_hand():
    # factors 200/10000 and 20/100: the small layer is ten times as dense
    shapes = {"large": (100, 100), "small": (10, 10)}
    assert erk(shapes, 110) == {"large": 100, "small": 10}
    assert erk(shapes, 550) == {"large": 500, "small": 50}
    # at 1100 the small one is full; from there on everything goes to the large one
    assert erk(shapes, 1100) == {"large": 1000, "small": 100}
    assert erk(shapes, 2000) == {"large": 1900, "small": 100}
    assert erk(shapes, 10100) == {"large": 10000, "small": 100}
    assert erk(shapes, 0) == {"large": 0, "small": 0}
    # a kernel counts: (3 + 2 + 3 + 3) / 54 against 11 / 30
    assert erk({"conv": (3, 2, 3, 3), "linear": (5, 6)}, 22) == {"conv": 11, "linear": 11}


# --- floors -------------------------------------------------------------------------------------


@st.composite
def floored(draw):
    sizes = draw(site_sizes)
    counts = {name: draw(st.integers(0, size)) for name, size in sizes.items()}
    return counts, sizes, draw(st.integers(0, 60))


@settings(deadline=None, max_examples=300)
@given(floored())
@example(({"a": 0, "b": 300}, {"a": 50, "b": 300}, 60))
@example(({"a": 0, "b": 0, "c": 9}, {"a": 3, "b": 3, "c": 9}, 3))
def test_floors_keep_the_exact_total(case):
    counts, sizes, minimum = case
    floors = {name: min(minimum, size) for name, size in sizes.items()}
    total = sum(counts.values())
    if sum(floors.values()) > total:
        with pytest.raises(BudgetError, match=f"needs {sum(floors.values())} kept units, the budget keeps {total}"):
            with_floor(counts, sizes, minimum)
        return
    found = with_floor(counts, sizes, minimum)
    assert list(found) == list(sizes)
    assert sum(found.values()) == total
    assert all(floors[name] <= found[name] <= sizes[name] for name in sizes)
    if all(counts[name] >= floors[name] for name in sizes):
        assert found == counts
    # who was above the floor pays, by one common factor: nobody gains, and ratios stay up to rounding
    above = [name for name in sizes if counts[name] > floors[name]]
    assert all(found[name] <= counts[name] for name in above)
    paying = [name for name in above if found[name] > floors[name] + 1]
    if paying:
        low = max(Fraction(found[name] - 1, counts[name]) for name in paying)
        high = min(Fraction(found[name] + 1, counts[name]) for name in paying)
        assert low <= high


def test_floors_by_hand():
    sizes = {"a": 1000, "b": 1000, "c": 5}
    assert with_floor({"a": 300, "b": 100, "c": 0}, sizes, 20) == {"a": 296, "b": 99, "c": 5}
    # the second only gives what it has above its floor
    assert with_floor({"a": 300, "b": 21, "c": 0}, {"a": 1000, "b": 1000, "c": 1000}, 20) == {
        "a": 281,
        "b": 20,
        "c": 20,
    }
    assert with_floor({"a": 3, "b": 3}, {"a": 5, "b": 5}, 0) == {"a": 3, "b": 3}


def test_floors_do_not_change_what_was_passed():
    counts = {"a": 10, "b": 0}
    with_floor(counts, {"a": 10, "b": 10}, 2)
    same = with_floor(counts, {"a": 10, "b": 10}, 0)
    same["a"] = 99
    assert counts == {"a": 10, "b": 0}


@settings(deadline=None, max_examples=200)
@given(site_sizes, st.integers(1, 60), st.integers(1, 10**6))
@example({"a": 70, "b": 30}, 30, 1)
@example({"a": 10}, 9, 1)
def test_the_sparsity_that_an_error_names_is_feasible_and_nearly_the_largest(sizes, minimum, factor):
    sizes = {name: size * factor for name, size in sizes.items()}
    everything = sum(sizes.values())
    needed = sum(min(minimum, size) for size in sizes.values())
    with pytest.raises(BudgetError, match="the highest sparsity with this floor is") as error:
        with_floor(dict.fromkeys(sizes, 0), sizes, minimum)
    highest = float(str(error.value).rpartition(" ")[2])
    kept = Budget(highest).keep(everything)
    assert kept >= needed
    found = with_floor(uniform(sizes, kept), sizes, minimum)
    assert sum(found.values()) == kept
    beyond = highest + 2e-6
    assert beyond >= 1 or everything - floor(Fraction(str(beyond)) * everything) <= needed


# --- the published refinement -------------------------------------------------------------------

WORKED = {"a": 20_000, "b": 60_000, "c": 500}


def test_the_worked_example_of_the_note():
    found = {"a": 0.94, "b": 0.9945, "c": 0.99}
    refined = reference_floor(WORKED, found, 0.98, 100)
    assert {name: round(value, 6) for name, value in refined.items()} == {"a": 0.940240, "b": 0.994753, "c": 0.8}
    kept = {name: (1 - refined[name]) * size for name, size in WORKED.items()}
    assert [round(value) for value in kept.values()] == [1195, 315, 100]
    assert sum(WORKED[name] * value for name, value in refined.items()) / 80_500 == pytest.approx(0.98, abs=5e-7)
    assert found == {"a": 0.94, "b": 0.9945, "c": 0.99}


def test_without_a_clamp_the_refinement_only_scales():
    refined = reference_floor(WORKED, {"a": 0.94, "b": 0.9945, "c": 0.99}, 0.98, 0)
    assert [round(value, 6) for value in refined.values()] == [0.939107, 0.993555, 0.989060]


def test_layers_below_the_minimum_stay_dense():
    refined = reference_floor({"a": 1000, "tiny": 5}, {"a": 0.9, "tiny": 0.6}, 0.9, 10)
    assert refined["tiny"] == 0.0
    assert refined["a"] == pytest.approx(0.9 * 1005 / 1000)


@pytest.mark.parametrize(
    ("sizes", "found", "target", "minimum", "highest"),
    [
        ({"a": 1000, "b": 1000}, {"a": 0.99, "b": 0.99}, 0.99, 20, 0.98),  # all clamped: loops for ever
        ({"a": 1000, "b": 10}, {"a": 0.995, "b": 0.5}, 0.99, 11, 0.979208),  # one dense, one clamped
    ],
)
def test_what_would_loop_for_ever_is_refused_with_the_highest_sparsity(sizes, found, target, minimum, highest):
    with pytest.raises(BudgetError, match=f"cannot be reached; the highest is {highest}"):
        reference_floor(sizes, found, target, minimum)
    fits = (1 - highest) * sum(sizes.values())
    assert sum(min(minimum, size) for size in sizes.values()) == pytest.approx(fits, abs=0.01)


def test_nothing_pruned_is_no_division_by_zero():
    with pytest.raises(BudgetError, match="cannot be reached; the highest is 0"):
        reference_floor({"a": 5, "b": 5}, {"a": 0.5, "b": 0.5}, 0.5, 10)
