"""Greedy removal: the best rest at every step, original indices, ties to the later."""

from math import nan

import pytest

from secateur.search.greedy import remove_greedily


def test_every_round_takes_the_best_given_what_is_gone():
    """Alone, 1 is the cheapest; once it is gone, 0 costs more than 3, which alone cost more than 0."""
    value = {(1,): 9, (0,): 8, (3,): 7, (0, 1): 1, (1, 3): 5}
    found = remove_greedily([3, 0, 1], 2, value.__getitem__)
    assert found.order == (1, 3)
    assert found.rounds == ({0: 8, 1: 9, 3: 7}, {0: 1, 3: 5})


def test_of_equal_ones_the_later_goes():
    assert remove_greedily(range(1, 5), 3, lambda gone: 0.0).order == (4, 3, 2)


def test_nan_is_the_worst_and_nothing_may_be_asked():
    assert remove_greedily([1, 2, 3], 1, lambda gone: nan if gone == (3,) else -9.0).order == (2,)
    assert remove_greedily([1, 2], 1, lambda gone: nan).order == (2,)
    assert remove_greedily([1, 2], 0, lambda gone: pytest.fail("asked")).order == ()


def test_progress_counts_every_evaluation():
    class Counted:
        total = done = 0

        def start(self, stage, total):
            self.total = total

        def advance(self, steps=1):
            self.done += steps

        def finish(self):
            self.finished = True

    counted = Counted()
    remove_greedily(range(5), 3, lambda gone: 0.0, counted)
    assert (counted.total, counted.done, counted.finished) == (5 + 4 + 3, 12, True)
