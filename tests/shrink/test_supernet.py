"""The supernet: every level from dense weights, what later blocks see, and models put together from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from secateur import zoo
from secateur.core.budget import Budget
from secateur.core.errors import ModelError, OutputError
from secateur.core.journal import Journal
from secateur.core.method import Task
from secateur.data.batches import forward
from secateur.recover.group_obs import GroupOBS, Pace
from secateur.search.levels import LevelBank
from secateur.shrink.structured import StructuredSettings, begin
from secateur.shrink.supernet import Accumulation, Local, Supernet, places_of
from secateur.structure.readers import readers

LEVELS = {"head": {-1: 3, 0: 2, 1: 1}, "neuron": {-1: 160, 0: 128, 1: 96}}


def built(
    accumulation: Accumulation, journal: Journal | None = None, name: str = "pydoc-llama"
) -> tuple[nn.Module, Supernet, Task]:
    model, data = zoo.load_model(name).eval(), zoo.load_data("pydoc", samples=8)
    task = Task(model, Budget(0.5), list(data.calibration.batches(8)), journal=journal or Journal())
    work = begin(task, StructuredSettings(kinds="head,neuron"))
    places = places_of(model, readers(model, work.sites))
    kept = [LEVELS[place.reader.site.kind.value] for place in places]
    folder = task.journal.folder
    bank = LevelBank(None if folder is None else folder / "bank")
    return model, Supernet(places, kept, bank, Local(), accumulation), task


def inputs_of(model: nn.Module, task: Task, module: str) -> Tensor:
    """What a module is fed with, as a matrix."""
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        forward(model, task.batches[0])
    hook.remove()
    return seen[0].flatten(0, -2).double()


def expected(supernet: Supernet, index: int, level: int, inputs: Tensor) -> Tensor:
    place = supernet.places[index]
    pace = Pace(step=1) if place.reader.site.kind.value == "head" else Pace(step=16)
    solver = GroupOBS(place.layer.matrix.float(), inputs.t() @ inputs, place.reader.columns)
    return solver.prune(supernet.kept[index][level], pace).weight


def test_places_go_block_after_block() -> None:
    _, supernet, _ = built(Accumulation.NONE)
    assert [place.block for place in supernet.places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({place.kind for place in supernet.places}) == 2
    assert supernet.lows == (-1,) * 8
    assert supernet.highs == (1,) * 8


@pytest.mark.parametrize("accumulation", Accumulation)
def test_levels_are_made_from_dense_weights_on_what_enters_the_block(accumulation: Accumulation) -> None:
    model, supernet, task = built(accumulation)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    notes = supernet.build(task, "supernet")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    first = inputs_of(model, task, supernet.places[1].reader.module)
    for level in (-1, 0, 1):  # nothing has been pruned before the first block's down_proj is looked at
        torch.testing.assert_close(supernet.weight(1, level), expected(supernet, 1, level, first), rtol=1e-3, atol=1e-4)
    last = 7
    with torch.no_grad():
        for index in range(6):
            shares = {level: kept / supernet.places[index].units for level, kept in supernet.kept[index].items()}
            weights = {level: supernet.weight(index, level) for level in shares}
            mean = sum(shares[level] * weights[level] for level in shares) / sum(shares.values())
            parameter = supernet.places[index].layer.module.weight
            match accumulation:
                case Accumulation.EXPECTATION:
                    parameter.copy_(mean)  # type: ignore[operator]
                case Accumulation.LEVEL0:
                    parameter.copy_(weights[0])  # type: ignore[operator]
    inputs = inputs_of(model, task, supernet.places[last].reader.module)
    found = supernet.weight(last, 0)
    torch.testing.assert_close(found, expected(supernet, last, 0, inputs), rtol=1e-2, atol=1e-3)
    assert notes.facts()[f"{supernet.places[last].name}/0"]["error"] > 0


def test_accumulations_differ() -> None:
    weights = []
    for accumulation in Accumulation:
        _, supernet, task = built(accumulation)
        supernet.build(task, "s")
        weights.append(supernet.weight(7, 0))
    assert not any(torch.allclose(weights[a], weights[b], atol=1e-4) for a, b in [(0, 1), (0, 2), (1, 2)])


def test_masks_say_which_columns_are_zero() -> None:
    _, supernet, task = built(Accumulation.LEVEL0)
    keeps = supernet.build(task, "s").tensors("keep")
    for index, place in enumerate(supernet.places):
        for level, kept in supernet.kept[index].items():
            keep = keeps[f"{place.name}/{level}"]
            assert int(keep.sum()) == kept
            columns = place.reader.columns
            assert not supernet.weight(index, level)[:, columns[~keep].flatten()].any()
            assert supernet.weight(index, level)[:, columns[keep].flatten()].any(0).all()


class TestAssembly:
    def test_candidates_and_the_way_back(self) -> None:
        model, supernet, task = built(Accumulation.NONE)
        supernet.build(task, "s")
        dense = {name: value.clone() for name, value in model.state_dict().items()}
        with supernet.assembled() as assemble:
            for levels, first in [
                ((0,) * 8, 0),
                ((0, 0, 0, 0, 1, -1, 0, 0), 2),
                ((0, 0, 0, 1, 0, -1, 0, 0), 1),
                ((0, 0, 0, 1, 0, -1, 0, 0), 1 << 30),
            ]:
                assert assemble(levels) == first
                for index, level in enumerate(levels):
                    assert torch.equal(supernet.places[index].layer.module.weight, supernet.weight(index, level))
        assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())

    def test_dense_again_after_an_error(self) -> None:
        model, supernet, task = built(Accumulation.NONE)
        supernet.build(task, "s")
        dense = {name: value.clone() for name, value in model.state_dict().items()}

        def fail() -> None:
            with supernet.assembled() as assemble:
                assemble((1,) * 8)
                assert not torch.equal(
                    model.state_dict()[supernet.places[0].reader.layer], dense[supernet.places[0].reader.layer]
                )
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_size_is_known_beforehand_and_the_disk_asked_before_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, supernet, task = built(Accumulation.NONE, Journal(tmp_path))
    supernet.build(task, "s")
    assert 0.98 * supernet.bytes < supernet.bank.bytes <= supernet.bytes
    _, other, other_task = built(Accumulation.NONE, Journal(tmp_path / "other"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="the supernet needs"):
        other.build(other_task, "s")
    assert len(other_task.journal.section("s")) == 0


def test_units_that_no_layer_of_a_block_reads_are_refused() -> None:
    model, data = zoo.load_model("digits-resnet").eval(), zoo.load_data("digits", samples=4)
    task = Task(model, Budget(0.5), list(data.calibration.batches(4)))
    work = begin(task, StructuredSettings(kinds="channel"), lambda site: site.name.startswith("stage1.0"))
    with pytest.raises(ModelError, match="no linear layer with a weight of its own inside a block"):
        places_of(model, readers(model, work.sites))
