"""Experts that share one tensor: each is pruned by the tokens that come to it."""

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import secateur as sc
from secateur.core.select import keep_top

BASE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "mixtral": (tf.MixtralForCausalLM, lambda: tf.MixtralConfig(**BASE, intermediate_size=48, num_local_experts=4)),
    "qwen3": (
        tf.Qwen3MoeForCausalLM,
        lambda: tf.Qwen3MoeConfig(
            **BASE, intermediate_size=48, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2, head_dim=8
        ),
    ),
}


def build(name):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    return kind(config()).eval()


def batches(count=12):
    return list(torch.randint(1, 96, (count, 24), generator=torch.Generator().manual_seed(1)).split(4))


def moments(model, block, data):
    """Sum of squares of every expert's inputs over all tokens, and how many tokens it saw, by running the block's code.

    Written out once more: which tokens each expert gets, its activation, its products.
    """
    experts = model.model.layers[block].mlp.experts
    found = {}

    def watch(module, args):
        states, index, _ = args
        states = states.reshape(-1, states.shape[-1])
        for e in range(module.num_experts):
            tokens = states[(index == e).any(-1)]
            gate, up = F.linear(tokens, module.gate_up_proj[e]).chunk(2, -1)
            inner = F.silu(gate) * up
            for kind, value in (("gate_up_proj", tokens), ("down_proj", inner)):
                total = found.get((kind, e), 0)
                found[kind, e] = total + value.double().square().sum(0)

    handle = experts.register_forward_pre_hook(watch)
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_expert_is_pruned_by_its_own_tokens(name):
    model, data = build(name), batches()
    plan = sc.plan(model, "wanda", 0.5, data=data, include=["model.layers.0.mlp.experts*"])
    assert set(plan.sites) == {f"model.layers.0.mlp.experts.{kind}" for kind in ("gate_up_proj", "down_proj")}
    expected = moments(model, 0, data)
    experts = model.model.layers[0].mlp.experts
    for kind in ("gate_up_proj", "down_proj"):
        mask = plan.masks[f"model.layers.0.mlp.experts.{kind}"]
        for e in range(4):
            weight = getattr(experts, kind)[e].detach()
            scores = weight.abs() * expected[kind, e].sqrt().float()
            keep = keep_top(scores, weight.shape[1] // 2)
            assert (mask[e] == keep).float().mean() > 0.999  # sums in another order
    shared = weight.abs() * sum(expected["down_proj", e] for e in range(4)).sqrt().float()
    assert not torch.equal(mask[3], keep_top(shared, weight.shape[1] // 2))  # not by everybody's


@pytest.mark.parametrize("settings", [{}, {"sequencing": "projection"}])
def test_the_next_block_sees_pruned_experts(settings):
    model, data = build("mixtral"), batches()
    plan = sc.plan(model, "wanda", 0.7, data=data, include=["model.layers*experts*"], **settings)
    first = {name: mask for name, mask in plan.masks.items() if ".0." in name}
    before = {name: model.get_parameter(name).detach().clone() for name in first}
    with torch.no_grad():
        for name, mask in first.items():
            model.get_parameter(name).mul_(mask)
    again = sc.plan(model, "wanda", 0.7, data=data, include=["model.layers.1*experts*"], **settings)
    for name, mask in again.masks.items():
        assert (mask == plan.masks[name]).float().mean() > 0.999
    with torch.no_grad():
        for name, value in before.items():
            model.get_parameter(name).copy_(value)
    dense = sc.plan(model, "wanda", 0.7, data=data, include=["model.layers.1*experts*"], **settings)
    assert any((dense.masks[name] != mask).float().mean() > 0.001 for name, mask in again.masks.items())


def test_one_pass_uses_what_was_decided_for_the_expert_before_its_second_matrix():
    model, data = build("mixtral"), batches()
    names = [f"model.layers.0.mlp.experts.{kind}" for kind in ("gate_up_proj", "down_proj")]
    plan = sc.plan(model, "wanda", 0.7, data=data, include=names, sequencing="projection")
    with torch.no_grad():
        model.get_parameter(names[0]).mul_(plan.masks[names[0]])
    expected = moments(model, 0, data)
    for e in range(4):
        weight = model.get_parameter(names[1])[e].detach()
        keep = keep_top(weight.abs() * expected["down_proj", e].sqrt().float(), 48 - int(48 * 0.7))
        assert (plan.masks[names[1]][e] == keep).float().mean() > 0.995


def test_the_model_and_its_way_to_run_experts_are_left_alone():
    model, data = build("mixtral"), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    way = model.config._experts_implementation
    linear = F.linear
    sc.plan(model, "sparsegpt", 0.5, data=data, include=["model.layers*"])
    assert F.linear is linear
    assert model.config._experts_implementation == way
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_of_four_in_every_expert():
    model, data = build("mixtral"), batches()
    plan = sc.plan(model, "sparsegpt", pattern="2:4", data=data, include=["model.layers*"])
    for name in plan.sites:
        assert plan.masks[name].view(-1, 4).sum(1).eq(2).all()
    sc.apply_(model, plan)
    assert (model.model.layers[1].mlp.experts.down_proj == 0).float().mean() == 0.5


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named():
    model, data = build("mixtral"), batches()
    with torch.no_grad():  # a bias the router does not have: the last expert is never among the best
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[:3] = model.model.layers[0].mlp.gate.weight[:3].abs()
        model.model.layers[0].post_attention_layernorm.weight.zero_()
    one = [torch.full((1, 4), 5)]
    plan = sc.plan(model, "wanda", 0.5, data=one, include=["model.layers.0.mlp.experts*"])
    named = [sentence for sentence in plan.warnings if "experts.down_proj[" in sentence]
    assert named
    assert all("pruned by magnitude" in sentence for sentence in named)
    index = int(named[0].partition("down_proj[")[2][0])
    weight = model.model.layers[0].mlp.experts.down_proj[index].detach()
    assert torch.equal(plan.masks["model.layers.0.mlp.experts.down_proj"][index], keep_top(weight.abs(), 24))
    del data


def test_code_that_multiplies_in_another_way_is_left_whole_and_named():
    config = tf.GptOssConfig(**BASE, intermediate_size=48, num_local_experts=4, head_dim=8)
    model = tf.GptOssForCausalLM(config).eval()
    for settings in ({}, {"sequencing": "projection"}):
        plan = sc.plan(model, "wanda", 0.5, data=batches(), include=["model.layers*"], **settings)
        assert not any("experts" in name for name in plan.sites)
        assert sum("does not multiply with one matrix per expert" in sentence for sentence in plan.warnings) == 4
        assert not any("pruned by magnitude" in sentence for sentence in plan.warnings)


def test_experts_in_small_groups_give_the_same(monkeypatch):
    model, data = build("mixtral"), batches()
    whole = sc.plan(model, "sparsegpt", 0.5, data=data, include=["model.layers*"])
    monkeypatch.setattr("secateur.stats.layerwise.AT_ONCE", 1)  # one matrix of one expert at a time
    single = sc.plan(model, "sparsegpt", 0.5, data=data, include=["model.layers*"])
    assert all(torch.equal(whole.masks[name], single.masks[name]) for name in whole.masks)
    assert all(torch.equal(whole.weights[name], single.weights[name]) for name in whole.weights)
