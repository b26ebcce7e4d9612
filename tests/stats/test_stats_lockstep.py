import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.stats.lockstep import current, lockstep, wait


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=4).map(sorted), max_size=4))
def test_a_point_is_released_once_all_have_come_to_it(stops):
    """Runs pass points in one order; with `min` as rule each point is decided once, after all that need it."""
    log = []

    def run_of(index):
        def run():
            for point in dict.fromkeys(stops[index]):
                log.append(("came", index, point))
                wait(point)
                log.append(("went", index, point))
            return index * 10

        return run

    def release(points):
        log.append(("release", min(points)))
        return min(points)

    assert lockstep([run_of(index) for index in range(len(stops))], release) == [10 * i for i in range(len(stops))]
    released = [entry[1] for entry in log if entry[0] == "release"]
    assert released == sorted(set().union(*stops))
    for index, points in enumerate(stops):
        for point in points:
            at = log.index(("release", point))
            assert log.index(("came", index, point)) < at < log.index(("went", index, point))


def test_every_run_has_its_own_identity():
    def run():
        before = current()
        wait("x")
        return before, current()

    first, second = lockstep([run, run], lambda points: points.pop())
    assert first[0] is first[1]
    assert second[0] is second[1]
    assert first[0] is not second[0]


@pytest.mark.parametrize("where", ["first", "second", "release"])
def test_errors_come_out_and_the_others_clean_up(where):
    log = []

    def run_of(name):
        def run():
            try:
                wait("x")
                if name == where:
                    raise KeyError(name)
                wait("y")
            finally:
                log.append(name)

        return run

    def release(points):
        if where == "release":
            raise KeyError("release")
        return min(points)

    with pytest.raises(KeyError, match=where):
        lockstep([run_of("first"), run_of("second")], release)
    assert sorted(log) == ["first", "second"]
