"""How far a block moves a hidden state: definitions, zero for nothing, and no NaN at the edges."""

import math

import pytest
import torch

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import token_mask, token_weights
from secateur.scores.blocks import Influence, influence

STATES = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
MOVED = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", ["angular", "cosine", "mse", "mae", "uniform"])
def test_token_by_token(how):
    found = influence(STATES, MOVED, Influence(how))
    pairs = zip(STATES.reshape(-1, 5).double().tolist(), MOVED.reshape(-1, 5).double().tolist(), strict=True)
    for value, (a, b) in zip(found.tolist(), pairs, strict=True):
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.dist(a, [0] * 5) / math.dist(b, [0] * 5)
        expected = {
            "angular": math.acos(cosine) / math.pi,
            "cosine": 1 - cosine,
            "mse": sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 5,
            "mae": sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 5,
            "uniform": 1.0,
        }[how]
        assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("how", ["angular", "cosine", "mse", "mae"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_block_that_does_nothing_has_no_influence(how, scale):
    """A cosine that rounding lifts above 1 must not become NaN."""
    states = (torch.randn(1, 500, 7, generator=torch.Generator().manual_seed(2)) * scale).float()
    assert influence(states, states.clone(), Influence(how)).abs().max() < 1e-7


def test_a_zero_state_counts_as_a_cosine_of_one_half():
    zero = torch.zeros(1, 2, 4)
    assert influence(zero, torch.ones(1, 2, 4), Influence.COSINE).tolist() == [0.5, 0.5]
    assert influence(zero, torch.ones(1, 2, 4), Influence.ANGULAR).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_token_weights_are_means_over_real_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = Batch(kwargs={"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": mask})
    expected = torch.tensor([[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert torch.allclose(token_weights(batch, STATES), expected)
    assert torch.equal(token_mask(batch), mask.bool())
    plain = Batch((torch.zeros(2, 3, dtype=torch.int64),))
    assert token_mask(plain) is None
    assert torch.allclose(token_weights(plain, STATES.reshape(-1, 5)), torch.full((2, 3), 1 / 3))
    with pytest.raises(DataError, match="does not fit"):
        token_weights(batch, STATES[:, :2])
