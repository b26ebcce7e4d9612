"""Experts as units: a cut network is the dense one whose router never chooses what was removed."""

import copy
from unittest import mock

import pytest
import torch
import transformers as tr
from torch import nn
from torch.nn import functional as F

from secateur.core.errors import PlanError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.shrink.load import load
from secateur.shrink.save import save
from secateur.shrink.verify import cut_
from secateur.structure.analysis import analyse

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SIX = {**TEXT, **HEADS, "num_experts_per_tok": 2, "bos_token_id": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEP = SIX | LATENT | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DEEP |= {"num_key_value_heads": 4, "moe_intermediate_size": 24, "n_shared_experts": 1}
FAMILIES = {
    "mixtral": lambda **more: tr.MixtralForCausalLM(tr.MixtralConfig(**SIX | {"num_local_experts": 6} | more)),
    "qwen2": lambda: tr.Qwen2MoeForCausalLM(
        tr.Qwen2MoeConfig(**SIX, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    ),
    "qwen3": lambda: tr.Qwen3MoeForCausalLM(
        tr.Qwen3MoeConfig(**SIX, num_experts=6, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True)
    ),
    "olmoe": lambda: tr.OlmoeForCausalLM(tr.OlmoeConfig(**SIX, num_experts=6)),
    "deepseek_v2": lambda: tr.DeepseekV2ForCausalLM(tr.DeepseekV2Config(**DEEP, topk_method="greedy")),
    "deepseek_v3": lambda **more: tr.DeepseekV3ForCausalLM(tr.DeepseekV3Config(**DEEP | more)),
}
IDS = torch.arange(4 * 17).reshape(4, 17) * 7 % 61 + 3
BATCH = Batch((IDS[:2],))


@torch.no_grad()
def build(name, **more):
    """A network whose routers prefer some experts, with biases of the choice where it has them."""
    torch.manual_seed(0)
    model = FAMILIES[name](**more)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    for key, buffer in model.named_buffers():
        if "correction" in key:
            buffer.normal_(std=0.3)
    return model.eval()


def expert_sites(structure):
    return {name: site for name, site in structure.sites.items() if site.kind is UnitKind.EXPERT}


def random_plan(structure, kept):
    """`kept` experts of every layer, or as many as the list says."""
    sites, masks = expert_sites(structure), {}
    rng = torch.Generator().manual_seed(1)
    for index, (name, site) in enumerate(sites.items()):
        masks[name] = torch.zeros(site.units, dtype=torch.bool)
        masks[name][torch.randperm(site.units, generator=rng)[: kept[index] if isinstance(kept, list) else kept]] = True
    return Plan(sites, masks)


@torch.no_grad()
def never_chosen(model, plan):
    """Logits of the dense network with minus infinity for removed experts where the router scores them."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    linear, marks = F.linear, {}
    for name, site in plan.sites.items():
        gone = (~plan.masks[name]).nonzero().flatten()
        for place in site.occurrences:
            if place.parameter.endswith("gate.weight"):
                marks[tensors[place.parameter].data_ptr()] = gone
            if place.parameter.endswith("e_score_correction_bias"):
                tensors[place.parameter][gone] = -torch.inf
    assert len(marks) == len(plan.sites)

    def scored(x, weight, bias=None):
        out, gone = linear(x, weight, bias), marks.get(weight.data_ptr())
        return out if gone is None else out.index_fill(-1, gone, -torch.inf)

    with mock.patch.object(F, "linear", scored):
        return model(IDS).logits


@pytest.mark.parametrize("kept", [3, 2, [3, 4]])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cut_experts_are_experts_that_are_never_chosen(name, kept, tmp_path):
    model = build(name)
    dense, structure = model(IDS).logits, analyse(model, BATCH)
    plan = random_plan(structure, kept)
    expected = never_chosen(copy.deepcopy(model), plan)
    assert {structure.minimums.get(site) for site in plan.sites} == {2}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut_(model, plan, BATCH)()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    cut_(model, plan, BATCH)
    found = model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - dense).abs().max() > 0.1
    save(model, tmp_path / "folder", plan)
    assert torch.equal(load(tmp_path / "folder")(IDS).logits, found)
    if not (isinstance(kept, list) and len(plan.sites) > 1):
        assert torch.equal(tr.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")(IDS).logits, found)


def test_the_units_are_router_rows_and_matrices_and_nothing_shared():
    structure = analyse(build("deepseek_v3"), BATCH)
    (name, site), mlp = *expert_sites(structure).items(), "model.layers.1.mlp"
    assert name == f"{mlp}:expert"  # the first layer is dense and has no router
    assert {(place.parameter, place.dim) for place in site.occurrences} == {
        (f"{mlp}.gate.weight", 0),
        (f"{mlp}.gate.e_score_correction_bias", 0),
        (f"{mlp}.experts.gate_up_proj", 0),
        (f"{mlp}.experts.down_proj", 0),
    }
    assert site.cost == 32 + 3 * 24 * 32


def test_routers_and_experts_know_how_many_there_are():
    model = build("mixtral")
    cut_(model, random_plan(analyse(model, BATCH), 3), BATCH)
    mlp = model.model.layers[0].mlp
    assert (mlp.gate.num_experts, mlp.experts.num_experts, mlp.gate.top_k) == (3, 3, 2)


def test_fewer_experts_than_a_token_takes_are_refused():
    model = build("mixtral")
    with pytest.raises(PlanError, match="at least 2"):
        cut_(model, random_plan(analyse(model, BATCH), 1), BATCH)


@pytest.mark.parametrize(("chosen", "least"), [(1, 1), (4, 4), (5, 5)])
def test_as_many_stay_as_a_token_takes(chosen, least):
    model = build("mixtral", num_experts_per_tok=chosen)
    structure = analyse(model, BATCH)
    assert [structure.minimums.get(name, 1) for name in expert_sites(structure)] == [least, least]
    plan = random_plan(structure, least)
    expected = never_chosen(copy.deepcopy(model), plan)
    cut_(model, plan, BATCH)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)


def test_experts_multiplied_as_a_batch_are_found_too():
    model = build("mixtral")
    model.set_experts_implementation("batched_mm")
    plan = random_plan(analyse(model, BATCH), 3)
    assert len(plan.sites) == 2
    expected = never_chosen(copy.deepcopy(model), plan)
    cut_(model, plan, BATCH)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)


def reasons(model, batch=BATCH):
    structure = analyse(model, batch)
    assert not expert_sites(structure)
    return " ".join(entry.reason for entry in structure.frozen if "gate" in entry.parameter)


def test_experts_chosen_in_groups_stay_and_say_why():
    assert "(topk)" in reasons(build("deepseek_v3", n_group=2))


def test_experts_that_all_take_part_stay_and_say_why():
    assert "all units are chosen" in reasons(build("mixtral", num_experts_per_tok=6))


def test_experts_run_one_by_one_stay_and_say_why():
    model = build("mixtral")
    model.set_experts_implementation("eager")
    assert "model.layers.0.mlp.experts" in reasons(model)


class Routed(nn.Module):
    """Linear experts by a router, looked up in some way."""

    def __init__(self, way):
        super().__init__()
        self.way, self.count = way, 5
        self.gate, self.experts = nn.Linear(6, 5), nn.Parameter(torch.randn(5, 6, 4))
        self.bias = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        shares, numbers = self.gate(x).softmax(-1).topk(2, -1)
        return self.way(self, x, shares, numbers)


def by_number(net, x, shares, numbers):
    each = torch.einsum("nd,nkde->nke", x, net.experts[numbers]) + net.bias[numbers]
    return (each * shares[..., None]).sum(1)


def by_one_hot(net, x, shares, numbers):
    share = (F.one_hot(numbers, net.count) * shares[..., None]).sum(1)
    return torch.einsum("nd,ne,edf->nf", x, share, net.experts)


def by_scatter(net, x, shares, numbers):
    share = torch.zeros(x.shape[0], net.count).scatter(1, numbers, shares)
    return torch.einsum("nd,ne,edf->nf", x, share, net.experts) + share @ net.bias


WAYS = {"by number": by_number, "one-hot": by_one_hot, "scatter": by_scatter}


@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_handwritten_experts_are_found_however_they_are_looked_up(name):
    torch.manual_seed(0)
    model, x = Routed(WAYS[name]).eval(), torch.randn(9, 6)
    structure = analyse(model, Batch((x,)))
    (site,) = [site for site in structure.sites.values() if ("gate.weight", 0) in places(site)]
    assert ("experts", 0) in places(site)
    mask = torch.tensor([True, False, True, True, False])
    dense = copy.deepcopy(model)
    dense.gate.bias[~mask] = -torch.inf
    expected = dense(x)
    cut_(model, Plan({site.name: site}, {site.name: mask}), Batch((x,)))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


def places(site):
    return {(place.parameter, place.dim) for place in site.occurrences}


LEAKS = {
    "arithmetic": lambda net, x, shares, numbers: net.experts[numbers + 0][:, 0, 0],
    "comparison": lambda net, x, shares, numbers: sum(
        x @ net.experts[i] * (shares * (numbers == i)).sum(1, keepdim=True) for i in range(5)
    ),
    "a list": lambda net, x, shares, numbers: torch.stack([x[0] @ net.experts[row[0]] for row in numbers.tolist()]),
    "an integer": lambda net, x, shares, numbers: x @ net.experts[int(numbers[0, 0])],
    "other bins": lambda net, x, shares, numbers: (
        by_number(net, x, shares, numbers) * torch.histc(numbers.float(), 7, 0, 6).sum()
    ),
    "output": lambda net, x, shares, numbers: (by_number(net, x, shares, numbers), numbers),
}


@pytest.mark.parametrize("name", LEAKS)
def test_numbers_that_get_out_keep_the_experts_whole(name):
    torch.manual_seed(0)
    structure = analyse(Routed(LEAKS[name]).eval(), Batch((torch.randn(9, 6),)))
    assert not [site for site in structure.sites.values() if ("gate.weight", 0) in places(site)]
