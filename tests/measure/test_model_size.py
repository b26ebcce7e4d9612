import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError
from secateur.measure import nonzeros, parameters, sparsity, weight_bytes


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(100), persistent=False)


def test_parameters_and_bytes_by_hand():
    model = nn.Linear(3, 2)
    assert parameters(model) == 3 * 2 + 2
    assert weight_bytes(model) == 8 * 4
    assert weight_bytes(model.bfloat16()) == 8 * 2


def test_tied_weights_and_buffers():
    model = Tied()
    assert parameters(model) == 21
    assert nonzeros(model) == 21
    assert weight_bytes(model) == 21 * 4 + 4 * 8  # the scratch buffer is not saved


def test_nonzeros_and_sparsity_by_hand():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.0, -0.0], [torch.nan, 1e-30]])
    assert nonzeros(model) == 2
    assert sparsity(model) == 0.5


def test_a_model_without_parameters():
    model = nn.ReLU()
    assert (parameters(model), nonzeros(model), sparsity(model), weight_bytes(model)) == (0, 0, 0.0, 0)


def test_meta_weights_are_refused_by_name():
    with pytest.raises(ModelError, match=r"'0\.weight'.*meta"):
        nonzeros(nn.Sequential(nn.Linear(2, 2, device="meta")))
