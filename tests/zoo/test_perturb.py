import copy

import pytest
import torch
from torch import nn

from secateur import zoo
from secateur.core.errors import ModelError
from secateur.data.batches import Batch, forward
from secateur.zoo.perturb import rescale_llama, rescale_mlp
from secateur.zoo.vision import digits_mlp


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["pydoc-llama", "pydoc-llama-gqa"])
def test_llama_keeps_its_function(name, seed):
    model = zoo.load_model(name)
    before = copy.deepcopy(model.state_dict())
    batch = Batch((zoo.load_data("pydoc").evaluation.inputs[:8],))
    rescaled = rescale_llama(model, seed)
    with torch.no_grad():
        want, got = forward(model, batch), forward(rescaled, batch)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
    assert want.std() > 1  # the logits say something, so equality does too
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_llama_s_factors_span_two_decades_and_are_the_seed_s():
    model = zoo.load_model("pydoc-llama")
    first, again, other = (rescale_llama(model, seed).model.layers for seed in (0, 0, 1))
    plain = model.model.layers
    s = first[1].input_layernorm.weight / plain[1].input_layernorm.weight
    assert 0.1 <= s.min() < 0.2
    assert 5 < s.max() <= 10.0001
    assert s.log10().mean().abs() < 0.2
    torch.testing.assert_close(first[1].self_attn.v_proj.weight * s, plain[1].self_attn.v_proj.weight)
    assert torch.equal(first[0].mlp.up_proj.weight, again[0].mlp.up_proj.weight)
    assert not torch.equal(first[0].mlp.up_proj.weight, other[0].mlp.up_proj.weight)
    after = rescale_llama(model, 0).state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, after[key])}
    untouched = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    untouched |= {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(4)}
    assert changed == model.state_dict().keys() - untouched


def test_mlp_keeps_its_function():
    torch.manual_seed(0)
    model = digits_mlp()
    for parameter in model.parameters():  # trivial biases would hide a forgotten factor
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(32, 1, 8, 8)
    rescaled = rescale_mlp(model, 0)
    with torch.no_grad():
        torch.testing.assert_close(rescaled(images), model(images), atol=1e-3, rtol=1e-4)
    t = rescaled[1].bias / model[1].bias
    torch.testing.assert_close(rescaled[1].weight, model[1].weight * t[:, None])
    assert t.min() < 0.2
    assert t.max() > 5
    assert torch.equal(rescaled[5].bias, model[5].bias)


def test_other_shapes_are_refused():
    with pytest.raises(ModelError, match="DigitsResNet has no blocks as Llama's"):
        rescale_llama(zoo.load_model("digits-resnet"), 0)
    with pytest.raises(ModelError, match="layer '1' is Tanh"):
        rescale_mlp(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), 0)
