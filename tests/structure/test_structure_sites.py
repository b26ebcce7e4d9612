import pytest
import stack_models
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.units import Layout
from secateur.structure.sites import weight_layers


class Net(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def test_every_weight_layer_in_module_order_and_nothing_else():
    model = Net(
        embed=nn.Embedding(5, 4),
        conv=nn.Conv2d(3, 4, 3),
        norm=nn.BatchNorm2d(4),
        inner=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
    )
    found = weight_layers(model)
    assert list(found.layers) == list(found.sites) == ["conv.weight", "inner.0.weight", "inner.2.weight"]
    assert found.layers["conv.weight"].module is model.conv
    assert found.sites["conv.weight"].shape == (4, 3, 3, 3)
    assert found.sites["conv.weight"].layout is Layout.CONV
    assert found.skipped == {}


def test_a_model_that_is_a_layer():
    assert list(weight_layers(nn.Linear(2, 2)).layers) == ["weight"]


def test_a_head_tied_to_the_embedding_is_skipped_with_the_reason():
    model = stack_models.llama(tie_word_embeddings=True)
    found = weight_layers(model)
    assert "lm_head.weight" not in found.layers
    assert found.skipped["lm_head.weight"] == "tied to 'model.embed_tokens', which is no layer of the same kind"
    assert "lm_head.weight" in weight_layers(stack_models.llama()).layers


def test_a_tie_to_a_module_outside_of_what_is_asked_for_counts():
    model = Net(embed=nn.Embedding(4, 4), blocks=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    model.blocks[1].weight = model.embed.weight
    found = weight_layers(model, within=["blocks.0", "blocks.1"])
    assert list(found.layers) == ["blocks.0.weight"]
    assert "tied to 'embed'" in found.skipped["blocks.1.weight"]


def test_a_shared_weight_is_listed_once():
    model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    model.c.weight = model.a.weight
    found = weight_layers(model)
    assert list(found.layers) == ["a.weight", "b.weight"]
    assert found.skipped == {"c.weight": "shares its weight with 'a', pruned there"}
    # one module under two names is one layer
    both = Net(x=nn.Linear(2, 2))
    both.y = both.x
    assert list(weight_layers(both).layers) == ["x.weight"]


def test_a_weight_shared_by_layers_that_read_it_differently_is_left_alone():
    model = Net(linear=nn.Linear(4, 4), up=nn.ConvTranspose1d(4, 4, 1), other=nn.Linear(2, 2))
    from transformers.pytorch_utils import Conv1D

    model.gpt = Conv1D(4, 4)
    model.gpt.weight = model.linear.weight
    found = weight_layers(model)
    assert list(found.layers) == ["up.weight", "other.weight"]
    assert "tied to 'gpt'" in found.skipped["linear.weight"]
    assert "tied to 'linear'" in found.skipped["gpt.weight"]


def test_patterns_and_prefixes():
    model = Net(layers=nn.ModuleList([nn.Linear(2, 2) for _ in range(11)]))
    found = weight_layers(model, within=["layers.1"])
    assert list(found.layers) == ["layers.1.weight"]  # and not layers.10
    found = weight_layers(model, wants=lambda name: name != "layers.1.weight", within=["layers.1", "layers.2"])
    assert list(found.layers) == ["layers.2.weight"]
    assert found.skipped == {"layers.1.weight": "left out by the include/exclude patterns"}


def test_experts_fused_in_one_tensor_are_reported():
    model = stack_models.mixtral()
    found = weight_layers(model, within=[f"model.layers.{i}" for i in range(3)])
    fused = [name for name, reason in found.skipped.items() if "no weight of a linear or convolution" in reason]
    assert {name for name in fused if ".0." in name} >= {
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    }
    # together with the layers nothing that is a matrix is passed over in silence
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1 and name.startswith("model.layers.")}
    assert matrices == found.layers.keys() | found.skipped.keys()


def test_attention_s_fused_projection_is_reported():
    model = Net(block=nn.TransformerEncoderLayer(8, 2, 16))
    found = weight_layers(model, within=["block"])
    assert found.skipped == {"block.self_attn.in_proj_weight": "is no weight of a linear or convolution layer"}
    assert "block.linear1.weight" in found.layers


def test_nothing_left_says_why():
    with pytest.raises(ModelError, match="Embedding has no linear or convolution layer to prune"):
        weight_layers(nn.Embedding(2, 2))
    with pytest.raises(ModelError, match=r"2 were skipped, the first is '0\.weight': left out by the include/exclude"):
        weight_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), wants=lambda name: False)


def test_weights_computed_from_others_are_skipped_with_the_reason():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    found = weight_layers(model)
    assert found.layers.keys() == {"1.weight"}
    assert "parametrize" in found.skipped["0.weight"]
