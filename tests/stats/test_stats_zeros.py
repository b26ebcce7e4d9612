"""Zero rates: against counting by hand, every way to write a rectifier, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import DataError, ModelError
from secateur.core.method import Batch
from secateur.data.batches import as_batches
from secateur.stats.zeros import ZeroRate, overall, zero_rates


def fixed(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    return layer


def test_static_dynamic_and_total_by_hand() -> None:
    # neurons: on for both samples, on for the first only, pruned and off, pruned but on by its bias
    layer = fixed([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [0.0, 0.0, 0.0, 1.0])
    (rate,) = zero_rates(nn.Sequential(layer, nn.ReLU()), as_batches(torch.tensor([[1.0, 1.0], [-1.0, 2.0]]))).values()
    assert (rate.neurons, rate.static, rate.dynamic, rate.total) == (4, 0.25, 0.125, 0.375)
    assert rate.to_json() == {"neurons": 4, "static": 0.25, "dynamic": 0.125, "total": 0.375}


def test_batches_do_not_matter_and_samples_weigh_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.ReLU())
    images = torch.randn(11, 1, 8, 8)
    whole = zero_rates(model, [Batch((images,))])
    parts = zero_rates(model, [Batch((images[:8],)), Batch((images[8:],))])
    assert whole == parts
    out = model[1](model[0](images))  # right after the ReLU, not after the pooling; every position is a neuron
    dead = out == 0
    assert whole["1"].neurons == 4 * 6 * 6
    assert whole["1"].total == pytest.approx(float(dead.double().mean()))
    assert whole["1"].static == pytest.approx(float(dead.all(0).double().mean()))


class Written(nn.Module):
    """The same rectifier in every notation, one module used twice, and one in place before a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for call in (F.relu, torch.relu, Tensor.relu, Tensor.relu_, torch.relu_, F.relu6):
            x = call(x * 1.0) - 0.1
        return self.act(self.act(self.first(x)) - 0.1) + x


def test_every_notation_is_seen_once_under_the_module_that_calls_it() -> None:
    torch.manual_seed(0)
    model = Written()
    found = zero_rates(model, [Batch((torch.randn(5, 3),))])
    assert list(found) == ["model", *(f"model#{k}" for k in range(2, 7)), "act", "act#2"]
    assert all(rate.neurons == 3 for rate in found.values())


def test_the_model_is_left_as_it_was_and_measured_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.ReLU()).train()
    inputs = torch.rand(20, 4) + 1
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    (rate,) = zero_rates(model, as_batches(inputs)).values()
    assert rate.total == 0  # dropout would have zeroed half of them
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_hooks_go_even_when_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(RuntimeError):
        zero_rates(model, [Batch((torch.randn(2, 3),))])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_smooth_rectifiers_are_refused_or_counted_by_the_stated_surrogate() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU()), torch.randn(40, 3)
    with pytest.raises(ModelError, match="surrogate"):
        zero_rates(model, as_batches(inputs))
    found = zero_rates(model, as_batches(inputs), surrogate=True)
    assert found["1"].total == pytest.approx(float((model[0](inputs) <= 0).double().mean()))
    assert set(found) == {"1", "3"}


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ModelError, match="no ReLU"):
        zero_rates(nn.Linear(2, 2), as_batches(torch.ones(2, 2)))
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU())
    with pytest.raises(DataError, match="one size"):
        zero_rates(model, [Batch((torch.ones(2, 1, 4),)), Batch((torch.ones(2, 1, 5),))])
    with pytest.raises(DataError, match="at least one sample"):
        zero_rates(model, [])


def test_a_fused_encoder_layer_is_counted() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # in eval mode torch would fuse it
    found = zero_rates(layer, [Batch((torch.randn(3, 5, 8),))])
    assert [rate.neurons for rate in found.values()] == [5 * 16]
    assert 0.2 < next(iter(found.values())).total < 0.8


def test_overall_weighs_by_neurons() -> None:
    both = overall({"a": ZeroRate(10, 0.1, 0.2), "b": ZeroRate(30, 0.3, 0.4)})
    assert (both.neurons, both.static, both.dynamic) == (40, pytest.approx(0.25), pytest.approx(0.35))
