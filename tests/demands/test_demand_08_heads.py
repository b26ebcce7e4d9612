"""Demand 8: shared or latent keys and values, fused projections, rotary positions: whole groups or a refusal."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers as tr

import secateur as sc
from secateur.core.errors import ModelError

sys.path.append(str(Path(__file__).parent))

from demand_tools import MOVED, TOLERANCE, gap, total, zeroed

VOCABULARY = 40
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
ENDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 64}
COMMON = {"vocab_size": VOCABULARY, **SIZES, **ENDS}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = [(4, 4, 6), (4, 2, 6), (4, 1, 6), (6, 3, 4), (6, 2, 4), (8, 2, 2), (2, 1, 8), (8, 4, 6), (12, 4, 4)]


def llama(heads, groups, head_dim):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head_dim}
    return strong(tr.LlamaForCausalLM(tr.LlamaConfig(**COMMON, **sizes)))


def opt():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "ffn_dim": 20, "num_attention_heads": 4}
    places = {"max_position_embeddings": 64, "word_embed_proj_dim": 24}
    return strong(tr.OPTForCausalLM(tr.OPTConfig(vocab_size=VOCABULARY, **sizes, **places, **ENDS)))


def phi3():
    return strong(tr.Phi3ForCausalLM(tr.Phi3Config(**COMMON, num_attention_heads=6, num_key_value_heads=2)))


def gpt2():
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return strong(tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=VOCABULARY, **sizes, **ENDS)))


def deepseek():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1}
    return strong(tr.DeepseekV3ForCausalLM(tr.DeepseekV3Config(**COMMON, **heads, **LATENT, **EXPERTS)))


FAMILIES = {"opt": opt, "phi3": phi3, "gpt2": gpt2, "deepseek_v3": deepseek}
EVERY = {f"llama {h}/{g}x{d}": lambda h=h, g=g, d=d: llama(h, g, d) for h, g, d in SHARED} | FAMILIES


def strong(model):
    """In eval mode, with weights so large that every unit shows in the output."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS, mask=None):
    return model(ids, attention_mask=mask, use_cache=False).logits


def without_cache(model, ids, steps):
    """The likeliest token each time, everything computed again."""
    for _ in range(steps):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def generated(model, ids, steps, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, eos_token_id=None)


def pruned(model, sparsity=0.5, **settings):
    """The plan; the model is cut after it was compared with the library's masked model."""
    plan = sc.plan(model, "group_random", sparsity, example=IDS, **{"multiple": 1} | settings)
    sc.apply_(model, plan, example=IDS)
    return plan


@pytest.mark.parametrize("settings", [{}, {"kinds": "head,kv_group"}, {"scope": "global"}], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_cut_decoder_is_the_zeroed_one_and_generates_with_its_cache(name, settings):
    model = EVERY[name]()
    dense, size = logits(model), total(model)
    plan = sc.plan(model, "group_random", 0.5, example=IDS, multiple=1, **settings)
    with sc.masked(model, plan, example=IDS) as masked:
        inside = logits(masked)
    if not any("_a_proj" in site for site in plan.sites):  # a norm counts the latent's units
        assert gap([logits(zeroed(model, plan))], [inside]) <= TOLERANCE
    assert torch.equal(logits(model), dense)
    sc.apply_(model, plan, example=IDS)
    assert gap([inside], [logits(model)]) == 0
    assert gap([dense], [inside]) > MOVED
    assert total(model) < size
    assert torch.equal(generated(model, IDS, 8), without_cache(model, IDS, 8))


@pytest.mark.parametrize(("heads", "groups", "head_dim"), SHARED)
@pytest.mark.parametrize("settings", [{}, {"kinds": "head,kv_group,head_dim,neuron"}], ids=str)
def test_what_is_left_is_grouped_attention_again(heads, groups, head_dim, settings):
    model = llama(heads, groups, head_dim)
    pruned(model, **settings)
    for layer in model.model.layers:
        part = layer.self_attn
        rows = {name: getattr(part, f"{name}_proj").weight.shape[0] for name in "qkv"}
        width = part.head_dim
        assert width % 2 == 0
        assert rows["k"] == rows["v"]
        assert rows["k"] % width == rows["q"] % width == 0
        assert (rows["q"] // width) % (rows["k"] // width) == 0
        assert part.o_proj.weight.shape[1] == rows["q"]
        assert width == 2 * len(model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("heads", "groups", "head_dim"), [shape for shape in SHARED if shape[0] > shape[1] > 1])
def test_by_default_whole_groups_go_and_others_keep_their_heads(heads, groups, head_dim):
    model = llama(heads, groups, head_dim)
    plan = pruned(model)
    assert set(plan.kinds) == {"kv_group", "neuron"}
    for site in plan.sites.values():
        if site.kind == "kv_group":
            kept = plan.kept(site.name)
            attention = model.get_submodule(site.name.partition(":")[0])
            assert kept == groups - groups // 2
            assert attention.k_proj.weight.shape[0] == kept * head_dim
            assert attention.q_proj.weight.shape[0] == kept * head_dim * (heads // groups)


@pytest.mark.parametrize(("heads", "groups", "head_dim"), [shape for shape in SHARED if shape[2] > 2])
def test_head_dimensions_go_in_rotary_pairs(heads, groups, head_dim):
    model = llama(heads, groups, head_dim)
    fresh = copy.deepcopy(model)
    plan = pruned(model, kinds="head_dim")
    (name,) = plan.sites
    kept = plan.masks[name].nonzero().flatten().tolist()
    both = [*kept, *(unit + head_dim // 2 for unit in kept)]
    for layer, before in zip(model.model.layers, fresh.model.layers, strict=True):
        assert layer.self_attn.head_dim == 2 * len(kept)
        rows = [head * head_dim + unit for head in range(heads) for unit in both]
        assert torch.equal(layer.self_attn.q_proj.weight, before.self_attn.q_proj.weight[rows])
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq[kept])
    assert total(model) < total(fresh)
    assert torch.equal(generated(model, IDS, 6), without_cache(model, IDS, 6))


def test_a_head_of_one_rotary_pair_is_refused_with_what_there_is():
    model = llama(8, 2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"nothing is left to cut .* kinds of unit found: embedding, head, kv_group"):
        sc.plan(model, "group_random", 0.5, example=IDS, kinds="head_dim")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_fused_projections_lose_the_same_heads_from_all_parts():
    model = phi3()
    fresh = copy.deepcopy(model)
    plan = pruned(model, kinds="kv_group")
    (name,) = plan.sites
    (group,) = plan.masks[name].nonzero().flatten().tolist()
    rows = torch.cat([torch.arange(24), torch.arange(48, 56), torch.arange(64, 72)])  # 3 x 8 of q, then k, then v
    rows += group * torch.tensor([24] * 24 + [8] * 16)
    for layer, before in zip(model.model.layers, fresh.model.layers, strict=True):
        assert torch.equal(layer.self_attn.qkv_proj.weight, before.self_attn.qkv_proj.weight[rows])


def test_latent_attention_keeps_what_all_heads_share():
    """The rotary key has no heads: it belongs to all of them, and each head loses its own part of both inputs."""
    model = deepseek()
    fresh = copy.deepcopy(model)
    plan = pruned(model, kinds="head")
    for site in plan.sites.values():
        assert site.kind == "head"
        layer, before = (one.get_submodule(site.name.partition(":")[0]) for one in (model, fresh))
        kept = plan.masks[site.name].nonzero().flatten()
        assert torch.equal(layer.kv_a_proj_with_mqa.weight, before.kv_a_proj_with_mqa.weight)
        assert torch.equal(layer.q_b_proj.weight.view(2, 24, 32), before.q_b_proj.weight.view(4, 24, 32)[kept])
        assert torch.equal(layer.kv_b_proj.weight.view(2, 32, 16), before.kv_b_proj.weight.view(4, 32, 16)[kept])


# --- padded batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EVERY if name != "deepseek_v3"])
def test_a_padded_batch_gives_what_each_text_alone_gives(name):
    model = EVERY[name]()
    pruned(model)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    ids = IDS.masked_fill(mask == 0, 0)
    both = generated(model, ids, 5, mask)
    alone = without_cache(model, IDS[:1, 3:], 5), without_cache(model, IDS[1:], 5)
    assert torch.equal(both[0, 3:], alone[0][0])
    assert torch.equal(both[1], alone[1][0])
