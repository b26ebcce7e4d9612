import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError
from secateur.core.method import Batch
from secateur.data.dataset import DataKind, Dataset
from secateur.data.running import resized
from secateur.measure import compare, measure, measure_together


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).train()


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(0)
    return Dataset("d", DataKind.IMAGE, torch.randn(10, 1, 2, 2, generator=rng), torch.randint(3, (10,), generator=rng))


def test_size_alone_needs_no_data(model):
    found = measure(model)
    assert (found.parameters, found.nonzeros, found.weight_bytes) == (67, 67, 268)
    assert (found.flops, found.latency, found.memory, found.quality, found.interval) == (None,) * 5


def test_everything_from_a_data_set(model, images):
    model[1].weight.data[:4] = 0
    found = measure(model, images, seconds=0.001)
    assert found.flops == 2 * (4 * 8 + 8 * 3)
    assert found.effective_flops == 2 * (4 * 4 + 8 * 3)
    assert found.sparsity == pytest.approx(16 / 67)
    assert {size: time.batch_size for size, time in found.latency.items()} == {1: 1, 16: 16}
    assert found.quality.samples == 10
    assert found.quality.value in found.interval
    assert found.memory.peak
    assert model.training


def test_costs_from_a_batch_alone(model):
    found = measure(model, batch=Batch((torch.randn(3, 4),)), batch_sizes=(2,), seconds=0.001)
    assert found.flops == 2 * (4 * 8 + 8 * 3)
    assert list(found.latency) == [2]
    assert found.quality is None


def test_no_batch_sizes_leave_latency_and_memory_out(model, images):
    found = measure(model, images, batch_sizes=())
    assert found.flops
    assert not found.latency
    assert found.memory is None


def test_json_is_plain_and_states_the_convention(model, images):
    with torch.no_grad():
        model[3].bias[0] = torch.nan
    found = measure(model, images, batch_sizes=(1,), seconds=0.001)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["quality"]["value"] == "nan"
    assert data["interval"] is None
    assert "2 FLOPs" in data["flops_convention"]
    assert data["latency"]["1"]["batch_size"] == 1


def test_comparison_by_hand(model, images):
    pruned = copy.deepcopy(model)
    pruned[1].weight.data.zero_()
    found = measure_together({"before": model, "after": pruned}, images, batch_sizes=(1,), seconds=0.001)
    before, after = found["before"], found["after"]
    result = compare(before, after)
    assert result["parameters"].ratio == 1
    assert result["nonzeros"].ratio == 35 / 67
    assert result["effective_flops"].ratio == 24 / 56
    assert result["accuracy"].after == after.quality.value
    assert result["latency_ms_batch_1"].before == before.latency[1].median
    assert result.quality.difference == pytest.approx(after.quality.value - before.quality.value)
    assert json.dumps(result.to_json(), allow_nan=False)


def test_comparison_of_what_only_one_has(model, images):
    result = compare(measure(model), measure(model, images, batch_sizes=()))
    assert result.quality is None
    assert result["flops"].before is None
    assert result["flops"].ratio is None


def test_data_that_does_not_fit(model, images):
    with pytest.raises(ModelError, match=r"\[1, 5\]"):
        measure(model, batch=Batch((torch.randn(2, 5),)))
    with pytest.raises(DataError, match="batch sizes"):
        measure(model, images, batch_sizes=(0,))


def test_resized_repeats_samples_and_leaves_the_rest():
    mask = torch.ones(7, 2)
    batch = Batch(
        (torch.arange(6).view(3, 2),), {"bias": mask, "ids": torch.tensor([4, 5, 6])}, torch.tensor([7, 8, 9])
    )
    found = resized(batch, 5)
    assert found.args[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert found.kwargs["bias"] is mask
    assert found.kwargs["ids"].tolist() == [4, 5, 6, 4, 5]
    assert found.target.tolist() == [7, 8, 9, 7, 8]
    assert resized(batch, 2).args[0].tolist() == [[0, 1], [2, 3]]


def test_import_stays_light():
    heavy = ["scipy", "sklearn", "transformers", "PIL", "onnxruntime", "torch.utils.flop_counter"]
    code = (
        "import sys, torch; before = set(sys.modules); import secateur.measure; "
        f"print(sorted({set(heavy)} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
