"""Similarity of features, damaged images, and what a training costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError
from secateur.core.method import Batch
from secateur.data.dataset import DataKind, Dataset
from secateur.measure import similarity
from secateur.measure.robustness import SEVERITIES, Corruption, corrupted, robustness
from secateur.measure.similarity import last_features, linear_cka
from secateur.measure.training_cost import energy, step_times
from secateur.stats.output_layer import OutputLayer, output_layer


def features(columns, seed=0, rows=40):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_cka_equals_the_alignment_of_centred_kernels():
    x, y = features(5), features(7, 1) + features(5) @ features(7, 2, 5)
    h = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    expected = float((k * l).sum() / (k.norm() * l.norm()))
    assert linear_cka(x, y) == pytest.approx(expected)
    assert 0.2 < expected < 0.99


@pytest.mark.parametrize("columns", [(5, 7), (5, 200), (200, 300)])
def test_both_forms_of_linear_cka_are_equal(columns, monkeypatch):
    x, y = features(columns[0]), features(columns[1], 1)
    x, y = (one - one.mean(0) for one in (x, y + 0.3 * x.mean(1, keepdim=True)))
    monkeypatch.setattr(similarity, "ROWS", 16)  # 40 samples: the last part is smaller
    for a, b in zip(similarity._by_features(x, y), similarity._by_samples(x, y), strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    common, squares = similarity._by_features(x, y)
    assert linear_cka(x, y) == pytest.approx(common / squares**0.5, rel=1e-9)


def test_linear_cka_of_many_features_makes_no_matrix_of_features():
    """400,000 features squared would be 1.2 TB."""
    x = features(400_000, rows=6)
    assert linear_cka(x, 2 * x) == pytest.approx(1)


def test_linear_cka_sees_neither_rotation_nor_scale_nor_shift():
    x = features(6)
    rotation = torch.linalg.qr(features(6, 1, 6)).Q
    assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1)
    assert linear_cka(x, features(6, 5)) < 0.5
    with pytest.raises(DataError, match="same samples"):
        linear_cka(x, x[:-1])
    with pytest.raises(DataError, match="same for every sample"):
        linear_cka(x, torch.ones(40, 2))


def test_last_features_are_what_enters_the_head():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    data = pictures()
    with torch.no_grad():
        assert torch.equal(last_features(model, list(data.batches(7))), model[:3](data.inputs))


class HeadFirst(nn.Module):
    """The head is registered before the layers that run before it; `after` is what happens to its output."""

    def __init__(self, after=lambda x: x):
        super().__init__()
        self.head, self.side, self.body = nn.Linear(8, 3), nn.Linear(8, 2), nn.Linear(16, 8)
        self.after = after

    def forward(self, x):
        hidden = torch.tanh(self.body(x.flatten(1)))
        out = self.head(hidden)
        self.side(hidden)  # runs last, but the output is not its
        return self.after(out)


def test_last_features_enter_the_layer_that_makes_the_output_wherever_it_is_registered():
    model, data = HeadFirst(lambda x: x.squeeze()), pictures()
    with torch.no_grad():
        expected = torch.tanh(model.body(data.inputs.flatten(1)))
    assert torch.equal(last_features(model, list(data.batches(7))), expected)


@pytest.mark.parametrize(
    ("after", "found"),
    [
        (lambda x: x, OutputLayer("head", exact=True)),
        (lambda x: x[:, :2], OutputLayer("head", exact=True)),
        (lambda x: x.log_softmax(1), OutputLayer("side", exact=False)),
    ],
)
def test_the_output_layer_is_the_one_whose_output_is_the_models(after, found):
    model = HeadFirst(after).train()
    assert output_layer(model, Batch((torch.rand(4, 16),))) == found
    assert model.training
    assert not model.head._forward_hooks


def test_a_transformers_model_that_returns_a_copy_names_its_output_layer():
    model = HeadFirst(lambda x: 2 * x)
    model.get_output_embeddings = lambda: model.head
    assert output_layer(model, Batch((torch.rand(4, 16),))) == OutputLayer("head", exact=True)


def test_a_model_without_layers_has_no_output_layer():
    with pytest.raises(ModelError, match="no output layer"):
        output_layer(nn.Flatten(), Batch((torch.rand(4, 2, 8),)))


def pictures(count=30, channels=1, scale=1.0, shift=0.0):
    inputs = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(3))
    return Dataset("pictures", DataKind.IMAGE, inputs * scale + shift, torch.arange(count) % 3)


@pytest.mark.parametrize("corruption", list(Corruption))
def test_damage_grows_with_the_severity_and_stays_in_the_range(corruption):
    data = pictures(channels=3)
    changes = [float((corrupted(data, corruption, s).inputs - data.inputs).abs().mean()) for s in range(1, 6)]
    assert changes == sorted(changes)
    assert changes[0] > 0
    for severity in range(1, 6):
        found = corrupted(data, corruption, severity).inputs
        assert data.inputs.min() <= found.min() <= found.max() <= data.inputs.max()
    assert torch.equal(corrupted(data, corruption, 2, 7).inputs, corrupted(data, corruption, 2, 7).inputs)


@pytest.mark.parametrize("corruption", list(Corruption))
def test_images_in_other_units_are_damaged_alike(corruption):
    one, other = pictures(), pictures(scale=4.0, shift=-2.0)
    found = (corrupted(other, corruption, 3).inputs + 2) / 4
    torch.testing.assert_close(found, corrupted(one, corruption, 3).inputs, atol=1e-5, rtol=0)


def test_damage_is_what_its_name_says():
    data = pictures(count=200)
    lost = corrupted(data, Corruption.CONTRAST, 2).inputs
    torch.testing.assert_close(lost.std((2, 3)), 0.5 * data.inputs.std((2, 3)))
    torch.testing.assert_close(lost.mean((2, 3)), data.inputs.mean((2, 3)))
    grey = Dataset(
        "grey", DataKind.IMAGE, torch.cat([torch.full((500, 1, 4, 4), 0.5), data.inputs * 0, data.inputs * 0 + 1])
    )
    noise = corrupted(grey, Corruption.NOISE, 5).inputs[:500] - 0.5
    assert float(noise.std()) == pytest.approx(0.10, rel=0.05)
    dot = torch.zeros(1, 1, 9, 9)
    dot[0, 0, 4, 4] = 1
    blurred = corrupted(Dataset("dot", DataKind.IMAGE, dot), Corruption.BLUR, 5).inputs[0, 0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-4)
    assert float(blurred[4, 5] / blurred[4, 4]) == pytest.approx(2.718281828**-0.5, rel=1e-4)


def test_accuracies_are_given_for_every_severity_and_text_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = robustness(model, pictures())
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
        ("noise", "blur", "contrast"), SEVERITIES
    )
    assert all(0 <= value <= 100 for values in found.values() for value in values)
    with pytest.raises(DataError, match="no images"):
        corrupted(Dataset("text", DataKind.TEXT, torch.zeros(2, 8, dtype=torch.int64)), Corruption.BLUR, 1)
    with pytest.raises(DataError, match="severities"):
        corrupted(pictures(), Corruption.BLUR, 6)


def test_a_training_step_is_timed_in_train_mode_with_gradients_and_learns_nothing():
    calls = []

    class Watched(nn.Linear):
        def forward(self, x):
            calls.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Watched(16, 3))
    weight = model[1].weight.detach().clone()
    deep = nn.Sequential(nn.Flatten(), *(nn.Linear(16, 16) for _ in range(300)), nn.Linear(16, 3))
    batch = Batch((torch.rand(8, 1, 4, 4),), target=torch.arange(8) % 3)
    found = step_times(
        {"one": model, "deep": deep}, batch, lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9), repeats=5
    )
    assert calls
    assert set(calls) == {(True, True)}
    assert model[1].weight.grad is not None
    assert torch.equal(model[1].weight, weight)
    assert found["deep"] > 2 * found["one"] > 0


def test_energy_is_power_times_time():
    found = energy(7200, 500, 0.4)
    assert found.kwh == pytest.approx(1.0)
    assert found.co2 == pytest.approx(0.4)
