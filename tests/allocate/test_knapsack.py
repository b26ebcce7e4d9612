"""The knapsack against brute force, and the allocation of weights on top of it."""

from fractions import Fraction
from functools import reduce
from math import fsum, inf

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secateur.allocate.amounts import Amounts, allocate, present_cost
from secateur.allocate.knapsack import STATES, Item, knapsack
from secateur.core.errors import BudgetError, NumericsError


def brute(items, budget):
    """The least loss over all combinations that fit; None if none does."""
    costs = reduce(np.add.outer, [np.array([item.costs[d] for d in item.allowed]) for item in items.values()], 0)
    losses = reduce(np.add.outer, [np.array([item.losses[d] for d in item.allowed]) for item in items.values()], 0.0)
    fitting = np.asarray(losses)[np.asarray(costs) <= budget]
    return float(fitting.min()) if fitting.size else None


def fitted(items, choice, budget):
    """The choice is allowed, adds up and fits."""
    assert all(choice.picks[name] in item.allowed for name, item in items.items())
    assert choice.cost == sum(item.costs[choice.picks[name]] for name, item in items.items()) <= budget
    assert choice.loss == fsum(item.losses[choice.picks[name]] for name, item in items.items())
    return True


@st.composite
def problems(draw):
    items = {}
    for name in "abcde"[: draw(st.integers(0, 5))]:
        count = draw(st.integers(1, 5))
        costs = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
        # few different values: ties, and curves that are neither convex nor monotone
        losses = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.25, 9.0, inf]), min_size=count, max_size=count))
        least = draw(st.integers(0, count - 1))
        assume(any(loss < inf for loss in losses[least:]))
        items[name] = Item(costs, losses, least)
    return items, draw(st.integers(0, 120))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_optimum_of_brute_force(problem):
    items, budget = problem
    expected = brute(items, budget)
    if expected is None:
        with pytest.raises(BudgetError, match="reachable range"):
            knapsack(items, budget)
        return
    choice = knapsack(items, budget)
    assert fitted(items, choice, budget)
    assert choice.loss == expected


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
def test_layers_with_random_monotone_curves(seed, share):
    """The note's instances: 5 layers of 38 to 55 weights, 6 amounts."""
    rng = np.random.default_rng(seed)
    items = {}
    for name in "abcde":
        size = int(rng.integers(38, 56))
        losses = np.r_[0.0, np.sort(rng.random(5)) * rng.integers(1, 20)].tolist()
        items[name] = Item([size - d * size // 5 for d in range(6)], losses)
    budget = int(share * sum(item.costs[0] for item in items.values()))
    choice = knapsack(items, budget)
    assert fitted(items, choice, budget)
    assert choice.loss == pytest.approx(brute(items, budget), rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 9))
def test_a_quantum_keeps_the_budget_and_is_best_of_what_it_can_see(problem, quantum):
    items, budget = problem
    assume(items)
    coarse = {
        name: Item([-(-cost // quantum) for cost in item.costs], item.losses, item.least)
        for name, item in items.items()
    }
    expected = brute(coarse, budget // quantum)
    try:
        choice = knapsack(items, budget, quantum)
    except BudgetError:
        assert expected is None
        return
    assert fitted(items, choice, budget)
    assert choice.quantum >= quantum
    if choice.quantum == quantum:
        assert choice.loss == expected
    else:  # all costs share a larger factor, so nothing is rounded
        assert choice.exact
        assert choice.loss == brute(items, budget)


def test_no_items_and_one():
    assert knapsack({}, 5).picks == {}
    item = {"a": Item([9, 4, 1], [0.0, 1.0, 5.0])}
    assert [knapsack(item, budget).picks["a"] for budget in (1, 3, 4, 8, 9, 99)] == [2, 2, 1, 1, 0, 0]


def test_an_item_larger_than_the_budget_takes_what_fits():
    items = {"huge": Item([10**7, 5 * 10**6, 20], [0.0, 0.1, 8.0]), "small": Item([30, 10], [0.0, 1.0])}
    choice = knapsack(items, 40)
    assert choice.picks == {"huge": 2, "small": 1}


def test_ties_take_the_first_candidate():
    items = {"a": Item([5, 3, 1], [1.0, 1.0, 1.0]), "b": Item([4, 4, 0], [2.0, 2.0, 2.0])}
    assert knapsack(items, 100).picks == {"a": 0, "b": 0}
    assert knapsack({"a": Item([5, 3, 1], [1.0, 1.0, 1.0], least=1)}, 100).picks == {"a": 1}


def test_curves_that_defeat_greedy_and_lagrangian_choices():
    """A plateau: the middle candidates lie above the convex hull, yet only they fill the budget."""
    items = {name: Item([10, 5, 0], [0.0, 6.0, 10.0]) for name in "ab"}
    choice = knapsack(items, 15)
    assert (choice.loss, sorted(choice.picks.values())) == (6.0, [0, 1])


def test_common_factors_cost_no_states_and_an_automatic_quantum_bounds_them():
    items = {name: Item([6 * 10**9, 10**9, 0], [0.0, 1.0, 4.0]) for name in "abc"}
    choice = knapsack(items, 8 * 10**9 - 1)
    assert (choice.loss, choice.quantum, choice.exact) == (3.0, 10**9, True)
    odd = {"a": Item([6 * 10**9 + 1, 10**9, 7], [0.0, 1.0, 4.0])}
    choice = knapsack(odd, 3 * 10**9, None)
    assert choice.picks == {"a": 1}
    assert not choice.exact
    assert 3 * 10**9 / choice.quantum <= STATES


def test_what_cannot_be_solved_is_said():
    item = Item([4, 2], [0.0, 1.0])
    with pytest.raises(BudgetError, match="reachable range is 4 to 8"):
        knapsack({"a": item, "b": item}, 3)
    with pytest.raises(BudgetError, match="at a quantum of 3 costs are rounded up"):
        knapsack({"a": Item([4, 2], [0.0, 1.0]), "b": Item([5, 1], [0.0, 1.0])}, 4, quantum=3)
    with pytest.raises(NumericsError, match="'b' is NaN"):
        knapsack({"a": item, "b": Item([1], [float("nan")])}, 9)
    with pytest.raises(BudgetError, match="'a' has no candidate"):
        knapsack({"a": Item([1], [inf])}, 9)
    with pytest.raises(BudgetError, match="one loss and one cost"):
        knapsack({"a": Item([1, 2], [0.0])}, 9)
    with pytest.raises(BudgetError, match="quantum"):
        knapsack({"a": item}, 9, 0)


def amounts(size, distortions, zeros=0, price=1, minimum=0):
    steps = len(distortions) - 1
    removed = [max(d * size // steps, zeros) for d in range(steps + 1)]
    return Amounts(size, size - zeros, removed, distortions, Fraction(price), minimum)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=5),
    share=st.floats(0, 1),
    steps=st.integers(2, 9),
    rnd=st.randoms(use_true_random=False),
)
def test_counts_meet_the_limit_exactly_and_bring_nothing_back(sizes, share, steps, rnd):
    layers = {}
    for i, size in enumerate(sizes):
        zeros = rnd.randint(0, size - 1)
        removed = [max(d * size // steps, zeros) for d in range(steps + 1)]
        curve = [0.0 if gone == zeros else rnd.random() for gone in removed]
        layers[str(i)] = Amounts(size, size - zeros, removed, curve)
    limit = int(share * sum(sizes))
    least = sum(min(layer.kept(layer.last), layer.most) for layer in layers.values())
    if limit < least:
        with pytest.raises(BudgetError):
            allocate(layers, limit)
        return
    counts, choice = allocate(layers, limit)
    assert sum(counts.values()) == min(limit, present_cost(layers))
    assert all(0 <= counts[name] <= layer.most for name, layer in layers.items())
    assert all(counts[name] >= layers[name].kept(d) for name, d in choice.picks.items())


def test_a_whole_layer_is_never_taken():
    layers = {"cheap": amounts(10, [0.0] * 6), "dear": amounts(10, [0.0, 5.0, 6.0, 7.0, 8.0, 9.0])}
    counts, choice = allocate(layers, 10)
    assert choice.picks["cheap"] == 4  # the second to last of 0..5
    assert counts["cheap"] >= 2
    with pytest.raises(BudgetError, match="reachable range is 4 to 20"):
        allocate(layers, 3)


def test_floors_need_not_lie_on_the_grid():
    def layers(minimum):
        gone = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        return {"a": amounts(10, [0.0] * 6, minimum=minimum), "b": amounts(10, gone, zeros=7, minimum=minimum)}

    counts, _ = allocate(layers(5), 8)
    assert counts == {"a": 5, "b": 3}  # b has only 3 left, which is its floor
    with pytest.raises(BudgetError, match="reachable range is 9 to 13"):
        allocate(layers(6), 8)


def test_the_rest_goes_where_the_curve_is_steepest():
    layers = {"flat": amounts(40, [0.0, 0.1, 0.2, 0.3, 9.0]), "steep": amounts(40, [0.0, 3.0, 8.0, 20.0, 90.0])}
    counts, choice = allocate(layers, 57)
    assert choice.cost == 50  # the grid of 10: 10 + 40 or nothing
    assert choice.picks == {"flat": 3, "steep": 0}
    assert counts == {"flat": 17, "steep": 40}  # steep has all it can have
    counts, choice = allocate(layers, 47)
    assert choice.picks == {"flat": 3, "steep": 1}
    assert counts == {"flat": 10, "steep": 37}


def test_prices_count_instead_of_weights():
    layers = {"a": amounts(10, [0.0, 1.0, 2.0, 9.0], price=7), "b": amounts(10, [0.0, 1.5, 2.5, 9.0], price=2)}
    counts, _ = allocate(layers, 60)
    spent = 7 * counts["a"] + 2 * counts["b"]
    assert 53 < spent <= 60
    free = amounts(10, [0.0, 0.5, 1.0, 1.0], price=0)
    assert allocate({**layers, "free": free}, 60)[0]["free"] == 10
