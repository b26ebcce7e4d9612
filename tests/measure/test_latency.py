import pytest
import torch
from torch import nn

from secateur.core.errors import SettingsError
from secateur.core.method import Batch
from secateur.measure import latency


class Clock:
    """Stands still unless work moves it on."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, *seconds):
        """A callable that takes the given times in turn, the last one for ever."""
        left = list(seconds)

        def run():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_percentiles_by_hand():
    clock = Clock()
    steps = [number / 1000 for number in range(11)]
    found = latency({"a": clock.work("a", *steps)}, repeats=11, warmup=0, clock=clock)["a"]
    assert (found.p10, found.median, found.p90) == pytest.approx((1, 5, 9))
    assert found.repeats == 11
    assert found.throughput == pytest.approx(200)
    assert (found.dtype, found.device, found.batch_size) == (None, None, None)


def test_warm_up_is_not_counted():
    clock = Clock()
    found = latency({"a": clock.work("a", 9.0, 9.0, 0.001)}, repeats=4, warmup=2, clock=clock)["a"]
    assert len(clock.calls) == 6
    assert found.p90 == pytest.approx(1)
    assert found.warmup == 2


def test_every_round_calls_each_once_and_orders_vary():
    clock = Clock()
    latency({name: clock.work(name, 0.001) for name in "abc"}, repeats=30, warmup=0, clock=clock)
    rounds = [clock.calls[start : start + 3] for start in range(0, 90, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {"a", "b", "c"}


@pytest.mark.parametrize(("cost", "rounds"), [(0.125, 16), (1.0, 10), (0.0, 10_000)])
def test_goes_on_for_the_time_asked_but_never_under_the_minimum(cost, rounds):
    clock = Clock()
    found = latency({"a": clock.work("a", cost), "b": clock.work("b", cost)}, seconds=2, warmup=0, clock=clock)
    assert found["a"].repeats == found["b"].repeats == rounds


def test_a_quick_candidate_does_not_keep_a_slow_one_running():
    clock = Clock()
    found = latency({"quick": clock.work("q", 0.001), "slow": clock.work("s", 1.0)}, seconds=0.5, warmup=0, clock=clock)
    assert found["quick"].repeats == found["slow"].repeats == 10


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_inference_mode_enabled(), tuple(x.shape)))
        return x * self.weight


def test_models_run_in_eval_and_inference_mode_and_are_put_back():
    model = Spy().train()
    found = latency({"m": (model, Batch((torch.ones(4, 2),)))}, repeats=2, warmup=1)["m"]
    assert model.seen == [(False, True, (4, 2))] * 3
    assert model.training
    assert (found.batch_size, found.dtype, found.device) == (4, "float32", "cpu")
    assert found.threads == torch.get_num_threads()
    assert found.throughput == pytest.approx(4000 / found.median)


def test_mode_is_put_back_when_the_model_fails():
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        latency({"m": (model, Batch((torch.ones(4, 3),)))}, repeats=1)
    assert model.training


def test_language_models_build_no_cache():
    class Config:
        use_cache = True

    class Model(nn.Module):
        config = Config()

        def forward(self, x, use_cache=None):
            asked.append(use_cache)
            return x

    asked = []
    latency({"m": (Model(), Batch((torch.ones(1, 2),)))}, repeats=1, warmup=0)
    assert asked == [False]


def test_progress_is_told_every_round():
    events = []

    class Bar:
        def start(self, stage, total):
            events.append((stage, total))

        def advance(self, steps=1):
            events.append(steps)

        def finish(self):
            events.append("finish")

    latency({"a": lambda: None}, repeats=3, progress=Bar())
    assert events == [("latency", 3), 1, 1, 1, "finish"]


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"minimum": 0}, {"warmup": -1}])
def test_senseless_settings(settings):
    with pytest.raises(SettingsError):
        latency({"a": lambda: None}, **settings)
    with pytest.raises(SettingsError):
        latency({})
