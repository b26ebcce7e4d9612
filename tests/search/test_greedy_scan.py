"""The greedy scan under several objectives: every step of small cases worked out by hand."""

from math import nan

from secateur.search.greedy import Guard, Watch, scan_greedily

START = {"a": 1.0, "b": 10.0}


def table(values):
    """Objectives by what is taken, as a sorted tuple of (place, level)."""
    asked = []

    def objectives(taken):
        asked.append(dict(taken))
        return dict(zip("ab", values[tuple(taken.items())], strict=True))

    return objectives, asked


def test_levels_rise_until_the_worst_objective_forbids_it_and_stay_for_the_next_place():
    objectives, asked = table(
        {
            (("x", 1),): (1.05, 9.0),
            (("x", 2),): (1.09, 10.5),
            (("x", 3),): (1.0, 11.2),  # b rises by 12 %
            (("x", 2), ("y", 1)): (1.12, 10.9),  # relative to 1.09 and 10.5: 2.8 % and 3.8 %, allowed 5 %
            (("x", 2), ("y", 2)): (1.15, 10.6),  # 5.5 %
        }
    )
    first, second = scan_greedily({"x": [1, 2, 3], "y": [1, 2]}, objectives, Guard(dict(START), 0.1, 0.5))
    assert (first.accepted, first.limiting, first.tolerance, first.reference) == (2, "b", 0.1, START)
    assert first.levels == (1, 2, 3)
    assert first.values[1] == {"a": 1.09, "b": 10.5}
    assert (second.accepted, second.limiting, second.tolerance) == (1, "a", 0.05)
    assert second.reference == {"a": 1.09, "b": 10.5}
    assert len(asked) == 5


def test_the_reference_never_falls():
    objectives, _ = table(
        {
            (("x", 1),): (0.5, 10.0),
            (("x", 2),): (0.5, 90.0),
            (("x", 1), ("y", 1)): (1.05, 10.0),  # 2.1 times 0.5, but only 5 % above the largest so far
        }
    )
    _, second = scan_greedily({"x": [1, 2], "y": [1]}, objectives, Guard(dict(START), 0.1))
    assert second.reference == START
    assert second.accepted == 1


def test_a_place_whose_first_level_is_too_much_stays_whole_and_uses_up_nothing():
    objectives, _ = table({(("x", 1),): (1.2, 10.0), (("y", 1),): (1.1, 10.0), (("y", 2),): (1.1, 12.0)})
    first, second = scan_greedily({"x": [1, 2], "y": [1, 2]}, objectives, Guard(dict(START), 0.1, 0.5))
    assert (first.accepted, first.written, first.limiting) == (0, False, "a")
    assert (second.tolerance, second.reference, second.accepted) == (0.1, START, 1)


def test_the_worst_and_not_the_sum_decides():
    objectives, _ = table({(("x", 1),): (1.5, 10.0)})  # of the sum 4.5 %
    (found,) = scan_greedily({"x": [1]}, objectives, Guard(dict(START), 0.1))
    assert found.accepted == 0


def test_the_objective_that_rises_first_can_be_the_only_one_watched():
    values = {(("x", 1),): (1.05, 10.0), (("x", 2),): (1.08, 99.0), (("x", 3),): (1.2, 10.0)}
    (found,) = scan_greedily({"x": [1, 2, 3]}, table(values)[0], Guard(dict(START), 0.1), watch=Watch.FIRST)
    assert (found.accepted, found.limiting) == (2, "a")
    (found,) = scan_greedily({"x": [1, 2, 3]}, table(values)[0], Guard(dict(START), 0.1))
    assert (found.accepted, found.limiting) == (1, "b")


def test_a_place_that_nothing_limits_is_written_back_or_not():
    values = {(("x", 1),): (1.05, 10.0), (("x", 1), ("y", 1)): (1.15, 10.0), (("y", 1),): (1.15, 10.0)}
    levels = {"x": [1], "y": [1]}
    first, second = scan_greedily(levels, table(values)[0], Guard(dict(START), 0.1, 0.5))
    assert (first.written, second.tolerance, second.accepted) == (True, 0.05, 0)
    first, second = scan_greedily(levels, table(values)[0], Guard(dict(START), 0.1, 0.5), unlimited=False)
    assert (first.accepted, first.written, second.tolerance, second.accepted) == (1, False, 0.1, 0)
    assert second.reference == START


def test_it_ends_with_the_first_level_that_is_enough():
    objectives, asked = table({(("x", 1),): (1.0, 10.0), (("x", 2),): (1.0, 10.0)})
    levels = {"x": [1, 2, 3], "y": [1]}
    (found,) = scan_greedily(levels, objectives, Guard(dict(START), 0.1), enough=lambda taken: taken.get("x") == 2)
    assert (found.accepted, found.written, found.limiting, len(asked)) == (2, True, None, 2)
    assert scan_greedily(levels, objectives, Guard(dict(START), 0.1), enough=lambda taken: True) == []


def test_nan_and_infinity_are_too_much_and_a_place_without_levels_stays():
    values = {(("x", 1),): (nan, 10.0), (("y", 1),): (1.0, float("inf"))}
    found = scan_greedily({"x": [1], "y": [1], "z": []}, table(values)[0], Guard(dict(START), 5.0))
    assert [one.accepted for one in found] == [0, 0, 0]
    assert [one.limiting for one in found] == ["a", "b", None]
