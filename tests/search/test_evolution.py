"""The parts of evolutionary search: archives, distinct offspring, stages, elitism, resumption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import SettingsError
from secateur.core.journal import Journal
from secateur.core.seeding import generator
from secateur.search.evolution import Archive, Evolution, Stage, distinct, json_tensor, json_value, select
from secateur.search.moves import Flips, Levels


def _constant(value: float, genome: object) -> float:
    return value


class TestArchive:
    def test_a_candidate_is_evaluated_once(self) -> None:
        archive: Archive[tuple[int, ...]] = Archive()
        asked = []

        def fitness(genome: tuple[int, ...]) -> float:
            asked.append(genome)
            return float(sum(genome))

        assert [archive.evaluate(one, fitness) for one in [(1, 2), (0, 1), (1, 2)]] == [3, 1, 3]
        assert asked == [(1, 2), (0, 1)]

    def test_best_first_either_way_and_nan_last(self) -> None:
        values = {"a": 2.0, "b": math.nan, "c": 1.0, "d": 2.0}
        for maximise, expected in [(False, "cadb"), (True, "adcb")]:
            archive: Archive[str] = Archive(maximise=maximise)
            for name in values:
                archive.evaluate(name, values.__getitem__)
            assert "".join(one.genome for one in archive.ranked()) == expected
            assert archive.best().genome == expected[0]

    def test_equals_are_shuffled_among_themselves_only(self) -> None:
        archive: Archive[int] = Archive()
        for number in range(40):
            archive.evaluate(number, lambda genome: float(genome // 20))
        orders = [[one.genome for one in archive.ranked(generator(seed, "ties"))] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        assert {tuple(sorted(order[:20])) for order in orders} == {tuple(range(20))}

    def test_trace_never_gets_worse(self) -> None:
        archive: Archive[int] = Archive(maximise=True)
        for number, value in enumerate([math.nan, 0.2, 0.1, 0.5]):
            archive.evaluate(number, partial(_constant, value))
        trace = archive.trace()
        assert math.isnan(trace[0])
        assert trace[1:] == [0.2, 0.2, 0.5]

    def test_comes_back_from_disk_bit_for_bit(self, tmp_path: Path) -> None:
        genome = ((1, 0.1 + 0.2), ("x", (2, -3)))
        archive: Archive[tuple[object, ...]] = Archive(maximise=True)
        for one, value in [(genome, 1 / 3), ((), -math.inf)]:
            archive.evaluate(one, partial(_constant, value))
        archive.keep(Journal(tmp_path).section("search"), "step")
        again: Archive[tuple[object, ...]] | None = Archive.kept(Journal(tmp_path).section("search"), "step")
        assert again is not None
        assert list(again) == [genome, ()]
        assert again[genome] == 1 / 3
        assert again.maximise
        assert Archive.kept(Journal(tmp_path).section("search"), "other") is None


@given(st.recursive(st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_json_tensors_come_back(value: object) -> None:
    assert json_value(json_tensor(value)) == value


class TestDistinct:
    def test_only_new_ones(self) -> None:
        proposals = iter([1, 1, None, 2, 3, 2, 4])
        assert distinct(lambda: next(proposals), 3, known={2}) == [1, 3, 4]

    def test_a_space_that_is_used_up_ends(self) -> None:
        assert distinct(lambda: 7, 5, tries=10) == [7]


class TestSelect:
    def test_stages_narrow_down_and_the_elite_meets_only_the_last(self) -> None:
        asked: list[list[int]] = []

        def fitness(stage: int, candidates: Sequence[int]) -> list[float]:
            asked.append(list(candidates))
            return [abs(one - (30 if stage == 0 else 20)) for one in candidates]

        found = select([10, 25, 35, 60], [Stage(1, 2), Stage(2, 1)], fitness, elite=21)
        assert asked == [[10, 25, 35, 60], [25, 35, 21]]
        assert [(one.genome, one.fitness) for one in found] == [(21, 1)]

    def test_the_elite_is_not_entered_twice(self) -> None:
        found = select([1, 2], [Stage(1, 5)], lambda stage, those: [float(one) for one in those], elite=2)
        assert [one.genome for one in found] == [1, 2]


TARGET: Levels = (3, -2, 0, -1, 1, -1)


def _distance(generation: int, stage: int, candidates: Sequence[Levels]) -> list[float]:
    return [float(sum((a - b) ** 2 for a, b in zip(one, TARGET, strict=True))) for one in candidates]


FLIPS = Flips((-4,) * 6, (4,) * 6, "aabbaa")
START: Levels = (0,) * 6


def _breed(generation: int, parent: Levels) -> list[Levels]:
    rng = generator(0, "offspring", str(generation))
    return distinct(lambda: FLIPS.propose(parent, rng), 12, {parent})


EVOLUTION = Evolution(12, 12, (Stage(1, 6), Stage(2, 2)))


class TestEvolution:
    def test_finds_the_nearest_candidate_of_the_same_budget(self) -> None:
        history = EVOLUTION.run(START, _breed, _distance, Journal().section("s"))
        values = [one.best.fitness for one in history]
        assert values == sorted(values, reverse=True)
        # both kinds add up to 0, their targets to 1 and -1: each is off by 1 somewhere
        assert values[-1] == 2
        assert history[0].evaluated == 12 + 7  # six survivors and the parent

    def test_a_killed_run_ends_the_same(self, tmp_path: Path) -> None:
        whole = EVOLUTION.run(START, _breed, _distance, Journal().section("s"))

        class KilledError(Exception):
            pass

        def killed(generation: int, stage: int, candidates: Sequence[Levels]) -> list[float]:
            if (generation, stage) == (5, 1):
                raise KilledError
            return _distance(generation, stage, candidates)

        with pytest.raises(KilledError):
            EVOLUTION.run(START, _breed, killed, Journal(tmp_path).section("s"))
        run = []

        def counted(generation: int, stage: int, candidates: Sequence[Levels]) -> list[float]:
            run.append(generation)
            return _distance(generation, stage, candidates)

        assert EVOLUTION.run(START, _breed, counted, Journal(tmp_path).section("s")) == whole
        assert min(run) == 5

    def test_no_survivors_are_refused(self) -> None:
        with pytest.raises(SettingsError, match="survivors"):
            Evolution(1, 1, (Stage(1, 0),))


class TestFlips:
    @given(st.integers(0, 10**6))
    def test_kinds_keep_their_sums_and_places_their_bounds(self, seed: int) -> None:
        flips = Flips((-1, -2, 0, -1, -3), (1, 0, 2, 1, 3), (0, 1, 0, 1, 0))
        rng = generator(seed, "moves")
        levels: Levels = (0,) * 5
        for _ in range(5):
            levels = flips.propose(levels, rng) or levels
            assert levels[0] + levels[2] + levels[4] == 0 == levels[1] + levels[3]
            assert all(low <= one <= high for low, one, high in zip(flips.lows, levels, flips.highs, strict=True))

    def test_number_of_flips_is_the_smaller_of_two_draws(self) -> None:
        places = 2000  # so many that flips hardly ever meet
        flips = Flips((-9,) * places, (9,) * places, (0,) * places)
        moved = []
        for seed in range(300):
            found = flips.propose((0,) * places, generator(seed, "count"))
            assert found is not None
            moved.append(sum(map(abs, found)) // 2)
        shares = [moved.count(number) / len(moved) for number in (1, 2, 3, 4)]
        assert shares == pytest.approx([7 / 16, 5 / 16, 3 / 16, 1 / 16], abs=0.08)

    def test_limits(self) -> None:
        free = Flips((-9,) * 4, (9,) * 4, (0,) * 4)
        near = Flips((-9,) * 4, (9,) * 4, (0,) * 4, largest_level=1, largest_total=2)
        rng = generator(0, "limits")
        drawn = [near.propose((0,) * 4, rng) for _ in range(200)]
        kept = [one for one in drawn if one is not None]
        assert kept
        assert max(sum(map(abs, one)) for one in kept) == 2
        assert max(max(map(abs, one)) for one in kept) == 1
        assert max(sum(map(abs, free.propose((0,) * 4, rng) or ())) for _ in range(200)) > 2

    def test_nowhere_to_go_is_no_endless_loop(self) -> None:
        assert Flips((0, 0), (9, 9), (0, 0)).propose((0, 0), generator(0, "x")) is None
        assert Flips((-1, 0), (0, 1), (0, 1)).propose((0, 0), generator(0, "x")) is None  # other kinds do not count

    def test_lengths_must_agree(self) -> None:
        with pytest.raises(SettingsError, match="2 lowest levels"):
            Flips((0, 0), (1,), (0, 0))


def test_draws_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _breed(0, START)
    assert torch.equal(before, torch.get_rng_state())
