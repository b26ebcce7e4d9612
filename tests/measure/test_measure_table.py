import json
import random

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError, PlanError, SettingsError, UnknownNameError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.measure import flops, latency
from secateur.measure.grid import Grid
from secateur.measure.table import LatencyTable
from secateur.measure.timings import Timings, cache_folder
from secateur.measure.widths import preferred_multiple
from secateur.shrink.cut import install, make_cut
from secateur.structure.analysis import analyse


class Block(nn.Module):
    """Everything that has widths of its own: plain, depthwise, grouped and transposed convolutions, linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 40, 1)
        self.grouped = nn.Conv2d(40, 40, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(40, 20, 2, stride=2)
        self.hidden = nn.Linear(20, 70)
        self.head = nn.Linear(70, 5)

    def forward(self, x):
        x = self.second(self.norm(self.depthwise(self.first(x))).relu())
        x = self.up(self.grouped(x).relu()).mean((2, 3))
        return self.head(self.hidden(x).relu())


class Ideal:
    """A machine on which time is `rest` for a model and 1 ms for a million FLOPs; counts what it is asked."""

    def __init__(self, rest=0.0, stop_after=None):
        self.rest, self.stop_after, self.asked, self.groups = rest, stop_after, [], 0

    def __call__(self, work, seconds):
        if self.groups == self.stop_after:
            raise KeyboardInterrupt
        self.groups += 1
        self.asked += list(work)
        return {name: self.time(*item) for name, item in work.items()}

    def time(self, model, batch):
        return (self.rest if isinstance(model, Block) else 0.0) + flops(model, batch) / 1e6


def example():
    torch.manual_seed(0)
    model, batch = Block().eval(), Batch((torch.randn(4, 3, 8, 8),))
    return model, analyse(model, batch), batch


def cut(model, structure, counts):
    masks = {name: torch.arange(structure.sites[name].units) < kept for name, kept in counts.items()}
    plan = Plan(sites={name: structure.sites[name] for name in masks}, masks=masks)
    return install(model, make_cut(model, plan, structure))


def some_counts(structure, seed):
    rng = random.Random(seed)
    return {name: rng.randint(1, site.units) for name, site in structure.sites.items()}


def test_predicts_every_width_where_time_is_proportional_to_work(tmp_path):
    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal())
    assert len(structure.sites) >= 4
    for seed in range(8):
        counts = some_counts(structure, seed)
        undo = cut(model, structure, counts)
        real = flops(model, batch) / 1e6
        undo()
        assert table.milliseconds(counts) == pytest.approx(real, rel=1e-6)


@pytest.mark.parametrize("rest", [0.0, 0.5, 7.0])
def test_dense_and_half_are_met_and_the_fixed_part_stays(tmp_path, rest):
    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal(rest))
    half = {name: max(1, site.units // 2) for name, site in structure.sites.items()}
    assert table.milliseconds({}) == pytest.approx(table.dense)
    assert table.milliseconds(half) == pytest.approx(table.half)
    least = dict.fromkeys(structure.sites, 1)
    assert rest <= table.milliseconds(least) < table.dense
    assert sum(table.layers({}).values()) + rest == pytest.approx(table.dense)


def test_layers_that_take_longer_alone_are_scaled_to_the_model(tmp_path):
    class Slow(Ideal):
        def time(self, model, batch):
            return super().time(model, batch) * (1 if isinstance(model, Block) else 2)

    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Slow())
    assert table.scale == pytest.approx(0.5)
    assert table.milliseconds({}) == pytest.approx(table.dense)


def test_half_is_met_when_layers_gain_less_inside_the_model(tmp_path):
    class Lazy(Ideal):
        def time(self, model, batch):
            return 3 + super().time(model, batch) / 2 if isinstance(model, Block) else super().time(model, batch)

    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Lazy())
    assert table.scale == pytest.approx(0.5)
    assert table.fixed == pytest.approx(3)
    counts = some_counts(structure, 0)
    assert table.milliseconds(counts) == pytest.approx(3 + sum(table.layers(counts).values()))


def test_a_model_that_cannot_be_cut_is_calibrated_by_its_activations(tmp_path, monkeypatch):
    def refuse(*_):
        raise ModelError("no")

    monkeypatch.setattr("secateur.measure.table.make_cut", refuse)
    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal(2.0))
    assert table.half is None
    assert (table.fixed, table.activations) == pytest.approx((0, 2))
    assert table.milliseconds({}) == pytest.approx(table.dense)


def test_removing_more_never_takes_longer(tmp_path):
    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal(0.3))
    for name, site in structure.sites.items():
        times = [table.milliseconds({name: kept}) for kept in range(1, site.units + 1)]
        assert times == sorted(times)


def test_second_build_measures_nothing_and_predicts_the_same(tmp_path):
    model, structure, batch = example()
    first = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal(1.0))
    timer = Ideal(9.0)
    second = LatencyTable.build(model, analyse(model, batch), batch, tmp_path, timer=timer)
    assert first.measured > 20
    assert second.measured == 0
    assert timer.asked == []
    for seed in range(3):
        counts = some_counts(structure, seed)
        assert second.milliseconds(counts) == first.milliseconds(counts)
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


def test_an_interrupted_build_goes_on_where_it_was(tmp_path):
    model, structure, batch = example()
    whole = Ideal()
    expected = LatencyTable.build(model, structure, batch, tmp_path / "whole", timer=whole)
    interrupted = Ideal(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        LatencyTable.build(model, structure, batch, tmp_path / "parts", timer=interrupted)
    rest = Ideal()
    resumed = LatencyTable.build(model, structure, batch, tmp_path / "parts", timer=rest)
    assert sorted(interrupted.asked + rest.asked) == sorted(whole.asked)
    assert len(set(whole.asked)) == len(whole.asked)
    assert expected.path.read_bytes() == resumed.path.read_bytes()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', '{"format": 1, "machine": {}, "times": {}}', "\xff"], ids=range(5)
)
def test_a_damaged_cache_is_measured_again_with_a_warning(tmp_path, content):
    model, structure, batch = example()
    path = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal()).path
    sound = path.read_bytes()
    path.write_text(content, encoding="latin-1")
    with pytest.warns(UserWarning, match="cannot be used"):
        table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal())
    assert table.measured > 20
    assert path.read_bytes() == sound


@pytest.mark.parametrize("value", [0, -1.0, None, "3", True, float("nan")])
def test_values_that_are_no_times_are_refused(tmp_path, value):
    facts = {"cpu": "x"}
    timings = Timings(tmp_path, facts, Ideal())
    timings.path.write_text(json.dumps({"format": 1, "machine": facts, "times": {"a": value}}))
    with pytest.warns(UserWarning, match="something else than times"):
        assert Timings(tmp_path, facts, Ideal()).times == {}


def test_a_cache_that_cannot_be_written_only_warns(tmp_path):
    model, structure, batch = example()
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        table = LatencyTable.build(model, structure, batch, tmp_path / "file" / "below", timer=Ideal())
    assert table.milliseconds({}) == pytest.approx(table.dense)


def test_cache_folder_and_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    model, structure, batch = example()
    before = torch.get_num_threads()
    one = LatencyTable.build(model, structure, batch, timer=Ideal(), threads=1)
    two = LatencyTable.build(model, structure, batch, timer=Ideal(), threads=2)
    assert torch.get_num_threads() == before
    assert one.path.parent == tmp_path / "mine"
    assert one.path != two.path
    monkeypatch.delenv("SECATEUR_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "secateur")


def test_the_model_is_left_as_it_was(tmp_path):
    model, structure, batch = example()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = model.grouped.groups, model.depthwise.groups
    LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal())
    assert model.training
    assert (model.grouped.groups, model.depthwise.groups) == groups
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_curve_holds_what_was_measured(tmp_path):
    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal())
    curve = table.curve("hidden")
    assert (curve[0].inputs, curve[0].outputs, curve[0].rows) == (20, 70, 4)
    assert all(point.milliseconds == pytest.approx(2e-6 * 4 * point.inputs * point.outputs) for point in curve)
    assert {point.groups for point in table.curve("depthwise")} >= {1, 24}
    with pytest.raises(UnknownNameError, match="hidden"):
        table.curve("hiden")


def test_wrong_counts_and_models(tmp_path):
    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal())
    name, site = next(iter(structure.sites.items()))
    for kept in (0, site.units + 1):
        with pytest.raises(PlanError, match=f"1 to {site.units}"):
            table.milliseconds({name: kept})
    with pytest.raises(UnknownNameError):
        table.milliseconds({"nothing": 1})
    with pytest.raises(SettingsError, match="threads"):
        LatencyTable.build(model, structure, batch, tmp_path, threads=0)
    with pytest.raises(ModelError, match="inputs that it expects"):
        LatencyTable.build(model, structure, Batch((torch.ones(2, 5, 8, 8),)), tmp_path)
    with torch.device("meta"):
        empty = Block()
    with pytest.raises(ModelError, match="no weights"):
        LatencyTable.build(empty, structure, batch, tmp_path)
    cut(model, structure, {name: 1})
    with pytest.raises(ModelError, match="analyse this model"):
        LatencyTable.build(model, structure, batch, tmp_path)


class Mixer(nn.Module):
    """The second layer's rows are the first one's channels."""

    def __init__(self):
        super().__init__()
        self.channels = nn.Linear(8, 36)
        self.tokens = nn.Linear(10, 10)
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        y = self.channels(x).transpose(1, 2)
        return self.head(self.tokens(y).mean(-1))


def test_rows_of_a_layer_can_be_another_ones_channels(tmp_path):
    model, batch = Mixer().eval(), Batch((torch.randn(6, 10, 8),))
    structure = analyse(model, batch)
    name = next(name for name, site in structure.sites.items() if site.units == 36)
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal())
    assert table.layers({name: 9})["tokens"] == pytest.approx(table.layers({})["tokens"] / 4)


def test_transposed_linear_layers_and_half_precision(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    model, batch = GPT2LMHeadModel(config).eval().bfloat16(), Batch((torch.randint(50, (2, 8)),))
    structure = analyse(model, batch)
    table = LatencyTable.build(model, structure, batch, tmp_path, timer=Ideal())
    assert {call.kernel.kind for call in table.calls} == {"Conv1D", "Linear"}
    assert {call.kernel.dtype for call in table.calls} == {torch.bfloat16}
    for seed in range(3):
        counts = some_counts(structure, seed)
        undo = cut(model, structure, counts)
        layers = flops(model, batch) / 1e6
        undo()
        assert table.milliseconds(counts) == pytest.approx(layers, rel=0.1)  # products of activations are in the rest


def test_subclasses_and_channels_last(tmp_path):
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(Own(3, 32, 3, bias=False), nn.ReLU(), nn.Conv2d(32, 4, 1)).eval()
    model.to(memory_format=torch.channels_last)
    batch = Batch((torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last),))
    table = LatencyTable.build(model, analyse(model, batch), batch, tmp_path, timer=Ideal())
    assert [call.kernel.kind for call in table.calls] == ["Conv2d", "Conv2d"]
    assert all(call.kernel.channels_last for call in table.calls)
    layer, inputs = table.calls[0].kernel.work((3, 17, 1, 1))
    assert inputs.args[0].is_contiguous(memory_format=torch.channels_last)
    assert layer(inputs.args[0]).shape == (2, 17, 7, 7)


def test_real_times_of_a_tiny_model(tmp_path):
    model, structure, batch = example()
    table = LatencyTable.build(model, structure, batch, tmp_path)
    assert table.milliseconds({}) == pytest.approx(table.dense)
    assert table.dense > 0
    half = {name: max(1, site.units // 2) for name, site in structure.sites.items()}
    undo = cut(model, structure, half)
    real = latency({"half": (model, batch)}, seconds=0.1)["half"].p10
    undo()
    assert table.milliseconds(half) == pytest.approx(real, rel=3)  # only that the unit is right: others use the machine


# --- grids ----------------------------------------------------------------------------------------


def filled(low, full, time):
    grid = Grid(low, full)
    while needed := grid.needed():
        grid.values.update({point: time(*point) for point in needed})
        grid.refine()
    return grid


def test_bilinear_times_need_few_points_and_are_exact():
    def time(i, o):
        return 3 + 0.5 * i + 0.25 * o + 0.125 * i * o

    grid = filled((1, 1), (300, 200), time)
    assert len(grid.values) <= 20
    assert grid.steps == [1, 1]
    for point in ((1, 1), (7, 199), (150, 33), (299, 1), (300, 200)):
        assert grid.at(point) == pytest.approx(time(*point))


@pytest.mark.parametrize(("full", "block"), [(64, 16), (128, 16), (24, 16), (100, 8), (13, 8)])
def test_steps_are_found_and_read_at_their_end(full, block):
    def time(width):
        return 10.0 + -(-width // block) * block

    grid = filled((1,), (full,), time)
    assert grid.steps == [block]
    for width in range(1, full + 1):
        assert grid.at((width,)) == pytest.approx(min(time(width), time(full)), rel=0.06)


def test_bends_draw_lines():
    def time(width):
        return max(100.0, float(width))  # flat, then rising

    grid = filled((1,), (1024,), time)
    assert max(abs(grid.at((width,)) / time(width) - 1) for width in range(1, 1025)) < 0.3
    assert len(grid.values) > len(filled((1,), (1024,), float).values)


def test_widths_outside_the_box_are_read_at_its_edge():
    grid = filled((4,), (64,), float)
    assert grid.at((1,)) == grid.at((4,)) == 4
    assert grid.at((99,)) == 64


def test_a_grid_of_one_point():
    grid = filled((3, 10), (3, 10), lambda i, o: 2.0)
    assert grid.values == {(3, 10): 2.0}
    assert grid.at((3, 10)) == 2


# --- preferred multiples --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("block", [1, 8, 16, 32])  # steps of 2 and 4 of a hundred channels are less than 3 %
def test_preferred_multiple_is_the_block_that_time_rises_in(kind, block):
    def timer(work, seconds):
        def up(width):
            return -(-width // block) * block

        weights = {name: model.weight for name, (model, _) in work.items()}
        return {name: 50.0 + up(weight.shape[0]) * up(weight.shape[1]) for name, weight in weights.items()}

    found = preferred_multiple(kind, 16, timer=timer)
    assert found.multiple == block
    assert found.cost[32] == 1
    assert ("any number" in found.sentence) == (block == 1)


def test_preferred_multiple_refuses_nonsense():
    with pytest.raises(SettingsError, match="conv or linear"):
        preferred_multiple("pool")
    with pytest.raises(SettingsError, match="batch"):
        preferred_multiple("conv", 0)
