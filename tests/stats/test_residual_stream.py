"""How decoders read and write their residual stream."""

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.stats.residual import find_residual

TOKENS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
PLAIN = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = PLAIN | {"intermediate_size": 24}
SHARED = {"num_key_value_heads": 2}


def make(name, **settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{name}{suffix}")(config).eval()


def test_a_llama_is_read_as_its_code_says():
    model = make("Llama", **GATED)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_residual(model, Batch((TOKENS,)))
    attention, mlp = found.branches[1]
    assert attention.norm == "model.layers.1.input_layernorm"
    assert attention.readers == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    assert (attention.host, attention.writer) == ("model.layers.1.self_attn", "model.layers.1.self_attn.o_proj")
    assert mlp.norm == "model.layers.1.post_attention_layernorm"
    assert mlp.readers == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    assert (mlp.host, mlp.writer) == ("model.layers.1.mlp", "model.layers.1.mlp.down_proj")
    assert (found.tables, found.norm, found.heads) == (("model.embed_tokens",), "model.norm", ("lm_head",))
    assert found.width == 16
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_opt_adds_what_a_bare_layer_gives_and_has_two_tables():
    model = make("OPT", **PLAIN, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)
    found = find_residual(model, Batch((TOKENS,)))
    assert found.branches[0][1].host == found.branches[0][1].writer == "model.decoder.layers.0.fc2"
    assert found.tables == ("model.decoder.embed_tokens", "model.decoder.embed_positions")


def test_dropout_between_layer_and_stream_is_passed_by():
    model = make("GPTNeoX", **GATED, use_parallel_residual=False)
    assert find_residual(model, Batch((TOKENS,))).branches[0][0].host == "gpt_neox.layers.0.attention"


REFUSED = {
    "parallel": (lambda: make("Phi", **GATED), "parallel"),
    "post-norm": (
        lambda: make("OPT", **PLAIN, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False),
        "no pre-norm block",
    ),
    "norms behind the layers": (lambda: make("Gemma2", **GATED, **SHARED, head_dim=8), "no linear layer writes"),
    "experts": (lambda: make("Mixtral", **GATED, **SHARED, num_local_experts=2), "no linear layer reads"),
    "scaled branches": (lambda: make("Granite", **GATED, residual_multiplier=0.5), "no second norm"),
    "a norm on the embeddings": (lambda: make("Bloom", vocab_size=40, hidden_size=16, n_layer=2, n_head=2), "tables"),
    "no head": (lambda: make("Llama", **GATED).model, "head"),
    "no blocks": (lambda: nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40)), "no list of blocks"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_networks_are_refused_with_the_reason(kind):
    build, reason = REFUSED[kind]
    with pytest.raises(ModelError, match=reason) as error:
        find_residual(build(), Batch((TOKENS,)))
    assert "block" in str(error.value)
