"""What a norm computes, found by running it."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from secateur.core.errors import ModelError
from secateur.structure.norms import norm_form

WIDTH = 12


def shuffled(norm):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return norm


NORMS = {
    "layer": lambda: nn.LayerNorm(WIDTH, eps=1e-3),
    "layer without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-4),
    "rms with the dtype's eps": lambda: nn.RMSNorm(WIDTH),
    "llama": lambda: LlamaRMSNorm(WIDTH, eps=1e-2),
    "gemma": lambda: GemmaRMSNorm(WIDTH, eps=1e-5),
}


@pytest.mark.parametrize("kind", NORMS)
def test_the_form_computes_what_the_norm_computes(kind):
    norm = shuffled(NORMS[kind]())
    form = norm_form(norm, "norm", WIDTH)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(2)) * 0.05 + 0.02
    torch.testing.assert_close(form(x).float(), norm(x), rtol=1e-5, atol=1e-5)
    assert form.centred == kind.startswith("layer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_recognised(dtype):
    form = norm_form(shuffled(LlamaRMSNorm(WIDTH)).to(dtype), "norm", WIDTH)
    assert not form.centred
    assert form.eps == 1e-6
    assert form.gain.dtype == torch.float64


@pytest.mark.parametrize("norm", [nn.Softmax(-1), nn.GroupNorm(3, WIDTH), nn.Tanh()])
def test_anything_else_is_refused(norm):
    with pytest.raises(ModelError, match=r"model\.norm.*neither a layer norm nor an RMS norm"):
        norm_form(norm, "model.norm", WIDTH)


def test_a_norm_whose_eps_is_hidden_is_refused():
    class Hidden(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.1)

    with pytest.raises(ModelError, match="Hidden"):
        norm_form(Hidden(), "norm", WIDTH)
