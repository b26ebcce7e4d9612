"""AMP: contributions of heads and neurons, counts that meet the budget, and its controls."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from width_models import IDS, TEXT, big_llama, llama, logits, mixtral, opt, padded, seen

import secateur as sc
from secateur.core.errors import BudgetError, DataError, ModelError, SettingsError
from secateur.core.method import Batch, Task
from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.methods.llm.amp import AMPSettings, Rounding, head_scores, kept, removed, rescaled
from secateur.shrink.structured import begin

HEADS, NEURONS = "model.layers.{}.self_attn:head", "model.layers.{}.mlp.gate_proj:neuron"
EVEN = torch.full((2, 3), 1 / 3)


def plan(model, sparsity=0.5, data=TEXT, **settings) -> Plan:
    return sc.plan(model, "amp", sparsity, data=data, keep_scores=True, **settings)


def contributions(model, index, heads, width):
    """||h_n W_n||_1 of every head, token by token, in plain loops over heads."""
    entering = seen(model, f"model.layers.{index}.self_attn.o_proj").reshape(-1, heads * width)
    weight = model.model.layers[index].self_attn.o_proj.weight.detach().double()
    found = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        found.append((entering[:, part] @ weight[:, part].t()).abs().sum(1).mean())
    return torch.stack(found)


def test_scores_on_a_real_decoder():
    model = llama()
    made = plan(model)
    for index in range(3):
        heads = contributions(model, index, 4, 4)
        assert torch.allclose(made.scores[HEADS.format(index)].double(), heads, rtol=1e-5)
        z = seen(model, f"model.layers.{index}.mlp.down_proj").reshape(-1, 24)
        assert torch.allclose(made.scores[NEURONS.format(index)].double(), z.abs().mean(0), rtol=1e-5)
        for name in (HEADS.format(index), NEURONS.format(index)):
            gone = ~made.masks[name]
            assert made.scores[name][gone].max() <= made.scores[name][~gone].min()


def entering(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 5, generator=rng), torch.randn(4, 5, 7, generator=rng)


def test_a_head_is_scored_by_the_product_not_by_its_factors():
    h, W = entering()
    found = head_scores(h, W, EVEN)
    assert torch.allclose(head_scores(10 * h, W / 10, EVEN), found, rtol=1e-5)
    for n in range(4):
        h[:, :, n], W[n] = h[:, :, n] * 2**n, W[n] / 2**n
    assert torch.allclose(head_scores(h, W, EVEN), found, rtol=1e-5)


def test_absolute_values_are_taken_per_token():
    """Opposite tokens would cancel in a sum of the vectors."""
    h, W = entering()
    both = torch.cat([h, -h], 1)
    even = torch.full((2, 6), 1 / 6)
    assert torch.allclose(head_scores(both, W, even), head_scores(h, W, EVEN), rtol=1e-5)


def test_half_precision_does_not_overflow():
    h, W = entering()
    found = head_scores((h * 1e4).half(), W * 100, EVEN)
    assert torch.isfinite(found).all()


@torch.no_grad()
def rescaled_up(model):
    """Other weights, the same function: rows of up times s, columns of down over s."""
    other = copy.deepcopy(model)
    for block in other.model.layers:
        s = 10 ** (2 * torch.rand(24, generator=torch.Generator().manual_seed(3)) - 1)
        block.mlp.up_proj.weight.mul_(s[:, None])
        block.mlp.down_proj.weight.div_(s)
    return other


def test_only_the_projected_score_survives_a_rescaling_of_neurons():
    model = llama()
    other = rescaled_up(model)
    name = NEURONS.format(0)
    plain, moved = (plan(one).scores[name] for one in (model, other))
    assert not torch.allclose(plain, moved, rtol=0.1)
    plain, same = (plan(one, neurons="projected").scores[name] for one in (model, other))
    assert torch.allclose(plain, same, rtol=1e-4)
    z = seen(model, "model.layers.0.mlp.down_proj").reshape(-1, 24).abs().mean(0)
    down = model.model.layers[0].mlp.down_proj.weight.detach().double()
    assert torch.allclose(plain.double(), z * down.abs().sum(0), rtol=1e-4)


def test_every_prompt_weighs_the_same_and_padding_nothing():
    apart, together = padded()
    found, same = (plan(llama(), data=data) for data in (apart, together))
    single = [plan(llama(), data=[batch]) for batch in apart]
    for name in found.sites:
        assert torch.allclose(found.scores[name], same.scores[name], rtol=1e-4)
        mean = (single[0].scores[name] + single[1].scores[name]) / 2
        assert torch.allclose(found.scores[name], mean, rtol=1e-5)
    wrong = Batch(kwargs={"input_ids": IDS[:2], "attention_mask": torch.ones(2, 9, dtype=torch.int64)})
    with pytest.raises((DataError, ModelError)):
        plan(llama(), data=[wrong])


def test_shared_keys_take_the_sum_of_their_heads_and_go_as_a_whole():
    model = llama(heads=4, kv=2)
    made = plan(model)
    name = "model.layers.0.self_attn:kv_group"
    heads = contributions(model, 0, 4, 4)
    assert torch.allclose(made.scores[name].double(), heads.view(2, 2).sum(1), rtol=1e-5)
    assert made.kept(name) == 1
    small = sc.apply_(copy.deepcopy(model), made)
    assert small.model.layers[0].self_attn.q_proj.weight.shape == (8, 16)
    assert small.model.layers[0].self_attn.k_proj.weight.shape == (4, 16)


def site(kind: UnitKind, units: int, cost: int) -> Site:
    return Site(f"a:{kind.value}", kind, (units,), cost=cost)


def layer(heads=32, neurons=11008, hidden=4096, head_dim=128) -> list[Site]:
    return [site(UnitKind.HEAD, heads, 4 * head_dim * hidden), site(UnitKind.NEURON, neurons, 3 * hidden)]


def both(share: float) -> dict[UnitKind, float]:
    return dict.fromkeys(UnitKind, share)


@pytest.mark.parametrize("share", [0.0, 0.07, 0.1, 0.25, 0.3, 0.47, 0.5, 0.61, 0.9])
def test_what_rounding_heads_leaves_over_is_made_up_by_parameters(share):
    sites = layer()
    gone = removed(sites, both(share), Rounding.PARAMETERS)
    assert gone["a:head"] == round(32 * share)
    parameters = sum(gone[one.name] * one.cost for one in sites)
    assert abs(parameters - share * sum(one.parameters for one in sites)) <= sites[1].cost / 2 + 1
    owed = (32 * share - gone["a:head"]) * 4 * 128 / 3
    assert gone["a:neuron"] == round(11008 * share + owed)


def test_published_rounding_adds_heads_to_neurons():
    gone = removed(layer(), both(0.1), Rounding.REFERENCE)
    assert gone == {"a:head": 3, "a:neuron": round(11008 * 0.1 + 0.2)}
    assert removed(layer(), both(0.999), Rounding.REFERENCE)["a:head"] == 31
    plain = removed(layer(), both(0.1), Rounding.NONE)
    assert plain == {"a:head": 3, "a:neuron": 1100}


def test_the_arithmetic_of_llama_2_7b():
    """Ten layers' worth: 10 of 32 heads, 3440 of 11008 neurons, 4 714 663 936 of 6 738 415 616 parameters."""
    model = big_llama(2, 4096, 11008, 32, vocab_size=32000)
    work = begin_on(model, sc.Budget(0.5))
    counts = {name: {32: 22, 11008: 7568}[one.units] for name, one in work.sites.items()}
    block = (work.structure.parameters({}) - 2 * 32000 * 4096 - 4096) // 2
    less = (work.structure.parameters({}) - work.structure.parameters(counts)) // 2
    dense = 2 * 32000 * 4096 + 4096 + 32 * block
    assert dense == 6_738_415_616
    assert dense - 32 * less == 4_714_663_936
    share = 10 * block / (32 * sum(one.parameters for one in layer()))
    assert removed(layer(), both(share), Rounding.REFERENCE) == {"a:head": 10, "a:neuron": 3440}
    assert removed(layer(), both(share), Rounding.PARAMETERS)["a:head"] == 10


def begin_on(model, budget: sc.Budget, **settings):
    """The work on a model that may be on the meta device."""

    class Somewhere:
        device = torch.device("meta")

    task = Task(model, budget, TEXT, residency=Somewhere())
    return begin(task, AMPSettings(**settings))


def test_published_budgets_leave_out_what_cannot_be_pruned():
    model = llama()
    dense = sum(p.numel() for p in model.parameters())
    work = begin_on(model, sc.Budget(0.7, "parameters"))
    inside = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n or "mlp" in n)
    assert rescaled(work) == pytest.approx(0.3 * dense / inside, rel=1e-9)
    layers = [[work.sites[HEADS.format(i)], work.sites[NEURONS.format(i)]] for i in range(3)]
    counts = kept(work, layers, AMPSettings(rounding="reference"))
    assert counts[HEADS.format(0)] == 4 - round(4 * rescaled(work))
    with pytest.raises(BudgetError, match="out of reach"):
        rescaled(begin_on(model, sc.Budget(0.1, "parameters")))


@pytest.mark.parametrize("share", [0.5, 0.7, 0.85])
def test_a_budget_in_parameters_is_met_from_below(share):
    model = llama()
    dense = sum(p.numel() for p in model.parameters())
    made = sc.plan(model, "amp", budget=sc.Budget(share, "parameters"), data=TEXT)
    after = sum(p.numel() for p in sc.apply_(model, made).parameters())
    assert 0 <= share * dense - after <= 3 * (3 * 16)  # a neuron a layer


def test_every_layer_keeps_the_same():
    made = plan(llama(), 0.3)
    assert len({made.kept(HEADS.format(i)) for i in range(3)}) == 1
    assert len({made.kept(NEURONS.format(i)) for i in range(3)}) == 1


def test_single_kinds_and_own_shares():
    heads, neurons = (plan(llama(), kinds=kind) for kind in ("head", "neuron"))
    assert {one.kind for one in heads.sites.values()} == {UnitKind.HEAD}
    assert [neurons.kept(name) for name in neurons.sites] == [12] * 3
    budget = sc.Budget(0.5, per_kind=((UnitKind.HEAD, 0.25),))
    made = sc.plan(llama(), "amp", budget=budget, data=TEXT)
    assert (made.kept(HEADS.format(0)), made.kept(NEURONS.format(0))) == (3, 12)


def test_controls_keep_the_counts_and_turn_the_choice_round():
    made, reverse, chance = (plan(llama(), order=order) for order in ("standard", "reversed", "random"))
    again, other = plan(llama(), order="random"), sc.plan(llama(), "amp", 0.5, data=TEXT, seed=1, order="random")
    for name in made.sites:
        assert made.kept(name) == reverse.kept(name) == chance.kept(name)
        assert torch.equal(reverse.masks[name], ~made.masks[name])  # half goes
        assert torch.equal(again.masks[name], chance.masks[name])
    assert any(not torch.equal(other.masks[name], chance.masks[name]) for name in made.sites)


def test_biases_go_with_heads_and_neurons():
    model = opt()
    made = plan(model)
    name = next(name for name, one in made.sites.items() if one.kind is UnitKind.HEAD)
    bias = model.model.decoder.layers[0].self_attn.q_proj.bias.detach().clone()
    sc.apply_(model, made)
    rows = made.masks[name].repeat_interleave(4)
    assert torch.equal(model.model.decoder.layers[0].self_attn.q_proj.bias, bias[rows])


def test_what_is_refused():
    with pytest.raises(DataError, match="amp needs calibration data"):
        sc.plan(llama(), "amp", 0.5)
    with pytest.raises(SettingsError, match="'scope' has no effect"):
        plan(llama(), scope="global")
    with pytest.raises(ModelError, match="exclude"):
        plan(mixtral())


def test_the_result_is_a_plain_model_with_its_head_size_in_the_config(tmp_path):
    model = llama()
    made = plan(model, 0.5)
    sc.apply_(model, made)
    folder = sc.save(model, tmp_path / "out", made)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (again.config.num_attention_heads, again.config.head_dim, again.config.hidden_size) == (2, 4, 16)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(sc.load(folder)), logits(model))


def test_uneven_widths_save_and_reload(tmp_path):
    model = llama()
    made = plan(model, 0.5, shares="model.layers.1.mlp.gate_proj=0.25")
    sc.apply_(model, made)
    folder = sc.save(model, tmp_path / "out", made)
    assert torch.equal(logits(sc.load(folder)), logits(model))
