"""HRank: ranks by hand, what has no matrix, several places, ties, how many samples are looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import DataError, SettingsError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.methods.channels.hrank import first_samples, ranks

IMAGES = torch.randn(11, 2, 6, 6, generator=torch.Generator().manual_seed(0))
PARTS = [Batch((IMAGES[:8],)), Batch((IMAGES[8:],))]


class Net(nn.Module):
    """A stem and a block on one stream of 8 channels, 10 channels inside of the block; a hidden layer of 6 neurons."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 10, 3, padding=1)
        self.down, self.hidden, self.head = nn.Conv2d(10, 8, 1), nn.Linear(8, 6), nn.Linear(6, 3)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stem = F.relu(self.stem(x))
        inner = F.relu(self.up(stem))
        return stem, inner, F.relu(stem + self.down(inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.maps(x)[2].mean((2, 3)))))


def net() -> Net:
    """Biases that close many pixels: ranks differ."""
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.stem.bias.copy_(-torch.linspace(0, 1.5, 8))
        model.up.bias.copy_(torch.linspace(0.2, -0.25, 10))
        model.hidden.bias.fill_(-0.1)
    return model


def plan(model: nn.Module, sparsity: float = 0.5, **more: object) -> Plan:
    """With everything that could blur a count switched off, and raw scores."""
    plain = {"multiple": 1, "normalise": "none", "keep_scores": True, "data": PARTS} | more
    return sc.plan(model, "hrank", sparsity, **plain)


def by_hand(maps: Tensor) -> Tensor:
    """NumPy's rank of every single map, mean over samples."""
    found = [[np.linalg.matrix_rank(one.numpy()) for one in sample] for sample in maps.detach()]
    return torch.tensor(np.mean(found, 0))


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-6)


def test_scores_are_mean_ranks_and_low_ones_go():
    model = net()
    made, expected = plan(model), by_hand(model.maps(IMAGES)[1])
    assert len(expected.unique()) > 5
    assert close(made.scores["up:channel"], expected)
    gone = (~made.masks["up:channel"]).nonzero().flatten().tolist()
    assert gone == sorted(torch.argsort(expected, stable=True)[:5].tolist())


def test_a_stream_has_the_mean_over_its_places():
    model = net()
    stem, _, out = model.maps(IMAGES)
    assert close(plan(model).scores["stem:channel"], (by_hand(stem) + by_hand(out)) / 2)


def test_a_neurons_rank_is_the_share_of_samples_that_open_it():
    model = net()
    open_ = F.relu(model.hidden(model.maps(IMAGES)[2].mean((2, 3)))) > 0
    expected = open_.double().mean(0)
    assert 0 < expected.mean() < 1
    assert close(plan(model).scores["hidden:neuron"], expected)


@pytest.mark.parametrize("shape", [(50, 1, 1), (50, 1, 7), (50, 4, 1), (50, 4, 4), (50, 3, 5)])
def test_ranks_of_all_shapes(shape):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu()
    maps[:5] = 0
    maps[5:20, -1] = maps[5:20, 0]
    assert ranks(maps).tolist() == [np.linalg.matrix_rank(one.numpy()) for one in maps]


def test_rounding_is_no_rank():
    left, right = (torch.randn(20, *shape, generator=torch.Generator().manual_seed(2)) for shape in ((9, 2), (2, 9)))
    assert set(ranks(left @ right).tolist()) == {2.0}


def test_labels_and_batches_do_not_matter_and_the_first_samples_are_taken():
    model = net()
    whole = plan(model, data=[Batch((IMAGES,), target=torch.zeros(11, dtype=torch.int64))])
    for name, score in plan(model).scores.items():
        assert close(whole.scores[name], score)
    few = plan(model, samples=9).scores["up:channel"]
    assert close(few, by_hand(model.maps(IMAGES[:9])[1]))
    assert not close(few, plan(model).scores["up:channel"])
    assert [batch.samples for batch in first_samples(PARTS, 9)] == [8, 1]
    assert [batch.samples for batch in first_samples(PARTS, 8)] == [8]
    assert [batch.samples for batch in first_samples(PARTS, 500)] == [8, 3]


def test_in_several_steps_the_smaller_model_is_looked_at():
    inner = {"exclude": ("head",)}
    first, both = plan(net(), 0.3, **inner), plan(net(), 0.6, steps=2, **inner)
    smaller, left = sc.apply_(net(), first), first.masks["up:channel"]
    again = by_hand(smaller.maps(IMAGES)[1])
    assert not close(again, first.scores["up:channel"][left])  # what enters has changed
    assert close(both.scores["up:channel"][left], again)
    assert not both.masks["up:channel"][~left].any()
    assert both.kept("up:channel") == 4


class Smooth(nn.Module):
    """Neurons that are never zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(2, 8, 3), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(F.relu(self.conv(x) - 0.5).mean((2, 3)))))


def test_where_ranks_cannot_choose_the_plan_says_so():
    torch.manual_seed(0)
    made = plan(Smooth().eval())
    assert close(made.scores["hidden:neuron"], torch.ones(6))
    (warning,) = made.warnings
    assert "'hidden:neuron': all units have the mean rank 1, which of them go was not chosen by rank" in warning
    assert not plan(net()).warnings


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="hrank needs calibration data"):
        plan(net(), data=None, example=IMAGES)
    with pytest.raises(SettingsError, match="samples"):
        plan(net(), samples=0)
