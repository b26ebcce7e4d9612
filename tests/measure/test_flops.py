import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.measure import count, effective_flops, flops

dims = st.integers(1, 9)


@settings(deadline=None, max_examples=25)
@given(batch=dims, inputs=dims, outputs=dims, bias=st.booleans(), seed=st.integers(0, 99))
def test_linear_is_two_multiply_adds_and_scales_with_nonzeros(batch, inputs, outputs, bias, seed):
    model = nn.Linear(inputs, outputs, bias=bias)
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) > 0.5
    model.weight.data = mask.float()
    found = count(model, Batch((torch.ones(batch, inputs),)))
    assert found.total == 2 * batch * inputs * outputs
    assert found.effective == 2 * batch * int(mask.sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    model = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    batch = Batch((torch.ones(2, 4, 8, 8),))
    dense = 2 * 2 * (4 * 4) * 6 * (4 // groups) * 9  # multiply-adds x2, images, pixels, out, in, kernel
    model.weight.data.fill_(1.0)
    assert flops(model, batch) == effective_flops(model, batch) == dense
    model.weight.data[:, :, 0] = 0  # a third of every kernel
    assert flops(model, batch) == dense
    assert effective_flops(model, batch) == dense * 2 // 3


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # (batch, heads, tokens, dim)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_the_full_square(causal):
    tokens = 5
    expected = 2 * 3 * tokens * 8 * 24 + 2 * (2 * 3 * 2 * tokens * tokens * 4)
    assert flops(Attention(causal), Batch((torch.randn(3, tokens, 8),))) == expected


def test_zeros_spare_the_projections_and_not_the_attention_itself():
    model = Attention(causal=False)
    model.qkv.weight.data.zero_()
    assert effective_flops(model, Batch((torch.randn(3, 5, 8),))) == 2 * (2 * 3 * 2 * 5 * 5 * 4)


def test_fused_encoder_layers_of_torch_are_seen():
    tokens, width, hidden = 5, 8, 16
    model = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    model.linear1.weight.data.zero_()
    found = count(model, Batch((torch.randn(3, tokens, width),)))
    feed_forward = 2 * 3 * tokens * width * hidden
    attention = 2 * 3 * tokens * 4 * width * width + 2 * 2 * 3 * tokens * tokens * width
    assert found.total == attention + 2 * feed_forward
    assert found.effective == attention + feed_forward
    assert torch.backends.mha.get_fastpath_enabled()


def test_lstm():
    model = nn.LSTM(8, 4, batch_first=True)
    for weight in (model.weight_ih_l0, model.weight_hh_l0):
        weight.data.fill_(1.0)
    batch = Batch((torch.randn(2, 5, 8),))
    assert flops(model, batch) == effective_flops(model, batch) == 2 * 2 * 5 * (16 * 8 + 16 * 4)
    model.weight_hh_l0.data.zero_()
    assert effective_flops(model, batch) == 2 * 2 * 5 * 16 * 8


@pytest.mark.parametrize("experts", [0, 4])
def test_llama_and_mixtral_closed_form(experts):
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    tokens = 16
    attention = 2 * tokens * (2 * 32 * 32 + 2 * 32 * 16) + 2 * 2 * 4 * tokens * tokens * 8
    feed_forward, head = 2 * tokens * 3 * 32 * 64, 2 * tokens * 32 * 128
    if experts:
        model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=2))
        block = attention + 2 * feed_forward + 2 * tokens * 32 * experts
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
        block = attention + feed_forward
    found = count(model, Batch((torch.zeros(1, tokens, dtype=torch.int64),)))
    assert found.total == 2 * block + head
    if not experts:
        model.lm_head.weight.data[64:] = 0
        assert effective_flops(model, Batch((torch.zeros(1, tokens, dtype=torch.int64),))) == 2 * block + head // 2


class Halved(nn.Module):
    def forward(self, weight):
        return weight * torch.tensor([1.0, 0.0])


def test_parametrised_and_functionally_used_weights():
    model = nn.Linear(2, 4, bias=False)
    parametrize.register_parametrization(model, "weight", Halved())
    assert count(model, Batch((torch.ones(3, 2),))).effective == 2 * 3 * 4

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(4))

        def forward(self, x):
            return x @ self.matrix

    assert count(Direct(), Batch((torch.ones(3, 4),))).effective == 2 * 3 * 4


def test_zeros_in_activations_spare_nothing():
    model = nn.Linear(4, 4)
    assert effective_flops(model, Batch((torch.zeros(3, 4),))) == 2 * 3 * 16


def test_modes_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    before = model[2].running_mean.clone()
    flops(model, Batch((torch.randn(4, 2),)))
    assert [module.training for module in model] == [True, False, True]
    assert torch.equal(model[2].running_mean, before)


def test_data_that_does_not_fit_is_one_sentence():
    with pytest.raises(ModelError, match=r"Linear cannot be run on inputs of shape \[3, 5\]"):
        flops(nn.Linear(4, 4), Batch((torch.ones(3, 5),)))
