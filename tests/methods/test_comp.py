"""COMP: the worked budget, blocks measured on the shortened model, units after them, factors against brute force."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

import secateur as sc
from secateur import zoo
from secateur.allocate.coarse_fine import Part, cut_share, even_counts, nearest, whole_blocks
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.journal import Journal
from secateur.core.method import Task
from secateur.core.units import UnitKind
from secateur.data.batches import as_batches, forward
from secateur.methods.llm import comp
from secateur.methods.llm.comp import COMPSettings, Goal, plan
from secateur.scores.condition import Condition, conditions, of_units
from secateur.shrink.depth import remove_blocks_
from secateur.structure.stacks import main_stack
from secateur.zoo.perturb import rescale_llama

STACK, HEAD, NEURON = "model.layers", "self_attn:head", "mlp.gate_proj:neuron"
ALL, BLOCK = 467_808, 110_784  # parameters of the shipped Llama and of one of its blocks
NEURONS = {"depth_share": 0, "kinds": "neuron"}


@cache
def data():
    return zoo.load_data("pydoc", samples=10)


def llama():
    return zoo.load_model("pydoc-llama")


def planned(share=0.4, model=None, **settings):
    return sc.plan(model or llama(), "comp", share, data=data().calibration, **settings)


# --- the budget --------------------------------------------------------------------------------------


def test_the_worked_budget_of_llama_2_7b():
    """20 %, half of it by whole blocks: 3 of 32 go, then c = 0.1262, 4 heads and 1395 neurons of every other."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, intermediate_size=11008))
    goal = Goal.of(Task(model, Budget(0.2)), main_stack(model))
    assert (goal.total, set(goal.blocks)) == (6_738_415_616, {202_383_360})
    count = whole_blocks(goal.removed, 0.5, goal.blocks, goal.total)
    assert count == 3
    left = goal.after(range(count))
    block = {"heads": Part(32, 4 * 128 * 4096, True), "neurons": Part(11008, 3 * 4096, False)}
    assert sum(part.parameters for part in block.values()) == 202_375_168
    blocks = [{f"{i}.{name}": part for name, part in block.items()} for i in range(32 - count)]
    share = cut_share(left, blocks)
    assert share == pytest.approx(0.1262, abs=5e-5)
    kept = even_counts(share, blocks)
    assert {kept[f"{i}.heads"] for i in range(29)} == {32 - 4}
    assert {kept[f"{i}.neurons"] for i in range(29)} == {11008 - 1395}
    gone = sum((part.units - kept[name]) * part.cost for parts in blocks for name, part in parts.items())
    assert goal.total - count * goal.blocks[0] - gone == 5_390_884_864


def test_numbers_of_blocks():
    assert [whole_blocks(p, 0.5, [100] * 32, 4000) for p in (0.0, 0.02, 0.04, 0.2, 0.5)] == [0, 0, 1, 3, 8]
    assert whole_blocks(0.4, 1.0, [100] * 4, 450) == 1  # 1.6 would be 2, which is more than 0.4 of the model
    assert [nearest(x) for x in (0.49, 0.5, 1.5, 2.5, -0.5)] == [0, 1, 2, 3, 0]


@given(st.floats(0, 0.9), st.integers(1, 40), st.integers(50, 900), st.floats(1, 300))
def test_neurons_make_up_for_what_heads_miss(share, heads, neurons, cost):
    parts = {"h": Part(heads, cost, True), "n": Part(neurons, 3.0, False)}
    try:
        kept = even_counts(share, [parts])
    except BudgetError:
        return
    gone = (heads - kept["h"]) * cost + (neurons - kept["n"]) * 3.0
    due = share * (heads * cost + neurons * 3.0)
    assert kept["h"] >= 1
    assert abs(heads - kept["h"] - share * heads) <= 0.5 + 1e-6 or kept["h"] == 1
    if kept["n"] < neurons:
        assert abs(gone - due) <= 1.5 + 1e-6


def test_a_block_is_never_emptied():
    parts = [{"h": Part(4, 32, True), "n": Part(100, 1, False)}]
    with pytest.raises(BudgetError, match="a block would be empty"):
        cut_share(228, parts)
    with pytest.raises(BudgetError, match="'n' would lose all"):
        even_counts(0.998, parts)
    assert cut_share(-5, parts) == 0
    with pytest.raises(BudgetError, match="lower the sparsity"):
        planned(0.93)


@pytest.mark.parametrize("model", ["pydoc-llama", "pydoc-llama-gqa"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.4, 0.6])
def test_the_whole_model_has_the_parameters_that_were_asked_for(model, share):
    dense = zoo.load_model(model)
    total = sum(p.numel() for p in dense.parameters())
    made = planned(share, dense, tuning=False)
    left = sum(p.numel() for p in sc.apply_(copy.deepcopy(dense), made).parameters())
    assert abs(left / total - (1 - share)) * total <= 4 * 0.5 * 3 * 96  # half a neuron in every block
    assert made.facts[next(iter(made.sites))]["parameters_kept"] == pytest.approx(left / total, abs=1e-6)
    gone = 0 if share < 0.25 else 1
    assert (STACK in made.sites) == bool(gone)


def test_budgets_in_parameters_and_others():
    by_share, by_amount = (
        planned(0.4, tuning=False),
        planned(None, budget=Budget(0.6, Quantity.PARAMETERS), tuning=False),
    )
    assert all(torch.equal(by_share.masks[name], mask) for name, mask in by_amount.masks.items())
    for budget in (Budget(0.5, Quantity.FLOPS), Budget(0.5, per_kind=((UnitKind.HEAD, 0.2),))):
        with pytest.raises(BudgetError, match="fraction of all parameters"):
            planned(None, budget=budget)
    with pytest.raises(BudgetError, match="more than the 467808"):
        planned(None, budget=Budget(10**6, Quantity.PARAMETERS))


# --- coarse ------------------------------------------------------------------------------------------


def influence_by_hand(model):
    """1 - cosine between what enters and leaves every block."""
    found, handles = {}, []
    for index, block in enumerate(model.model.layers):

        def hook(_, args, output, index=index):
            angle = torch.cosine_similarity(args[0].detach().double(), output.detach().double(), dim=-1)
            found.setdefault(index, []).append(1 - angle.flatten())

        handles.append(block.register_forward_hook(hook))
    for batch in as_batches(data().calibration):
        forward(model, batch)
    for handle in handles:
        handle.remove()
    return {index: float(torch.cat(values).mean()) for index, values in found.items()}


def test_blocks_are_measured_again_on_the_shortened_model():
    made = planned(0.5, depth_share=1.0, tuning=False)
    facts = made.facts[STACK]
    assert [facts["removed_0"], facts["removed_1"]] == [1, 2]
    model = llama()
    first = influence_by_hand(model)
    remove_blocks_(model, STACK, [True, False, True, True])
    second = influence_by_hand(model)
    assert {i: facts[f"influence_0_{i}"] for i in range(4)} == pytest.approx(first, abs=1e-6)
    assert {i: facts[f"influence_1_{i}"] for i in (0, 2, 3)} == pytest.approx(
        dict(zip((0, 2, 3), second.values(), strict=True)), abs=1e-6
    )
    assert abs(second[1] - first[2]) > 1e-3  # neighbours change
    at_once = planned(0.5, depth_share=1.0, tuning=False, iterative=False)
    assert "influence_1_0" not in at_once.facts[STACK]
    assert at_once.kept(STACK) == 2


def test_first_and_last_block_are_protected_and_excluded_ones_stay():
    with pytest.raises(BudgetError, match="3 whole blocks should go and 2 may"):
        planned(0.75, depth_share=1.0)
    assert planned(0.75, depth_share=1.0, protect=False, tuning=False).kept(STACK) == 1
    made = planned(0.3, exclude=["model.layers.1"], tuning=False)
    assert made.masks[STACK].tolist() == [True, True, False, True]
    assert not any(name.startswith("model.layers.1.") for name in made.sites)


# --- fine --------------------------------------------------------------------------------------------


def test_condition_numbers_against_their_definitions():
    rng = torch.Generator().manual_seed(0)
    x, W = torch.randn(20, 6, generator=rng).double(), torch.randn(4, 6, generator=rng).double()
    y = x @ W.t()
    squares, energy = x.square().sum(0), y.square().sum()
    mask = conditions(W, squares, energy, Condition.MASK)
    z = torch.ones(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: (x * z) @ W.t(), z)  # (20, 4, 6)
    torch.testing.assert_close(mask, jacobian.square().sum((0, 1)).sqrt() / y.norm())
    spectral = conditions(W, squares, energy, Condition.SPECTRAL)
    torch.testing.assert_close(spectral, torch.linalg.cond(W) * x.norm(dim=0) / x.norm())
    torch.testing.assert_close(of_units(mask, 3), torch.stack([mask[:3].norm(), mask[3:].norm()]))
    singular = torch.ones(4, 6).double()
    assert (conditions(singular, squares, energy, Condition.SPECTRAL) <= 1.001e6).all()
    assert not conditions(W, torch.zeros(6), torch.zeros(()), Condition.MASK).any()


@cache
def with_blocks():
    return planned(0.45)


def test_units_are_measured_and_tuned_after_blocks_are_gone():
    """The same as on a model whose block was taken out by hand, name by name."""
    made = with_blocks()
    assert made.masks[STACK].tolist() == [True, False, True, True]
    short = llama()
    remove_blocks_(short, STACK, [True, False, True, True])
    goal = 0.45 * ALL - BLOCK
    again = planned(goal / (ALL - BLOCK), short, depth_share=0)
    assert len(again.sites) == len(made.sites) - 1
    new = {0: 0, 2: 1, 3: 2}
    for old, now in new.items():
        for suffix in (HEAD, NEURON):
            assert torch.equal(made.masks[f"{STACK}.{old}.{suffix}"], again.masks[f"{STACK}.{now}.{suffix}"])
        for layer in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            names = f"{STACK}.{old}.{layer}", f"{STACK}.{now}.{layer}"
            assert (names[0] in made.weights) == (names[1] in again.weights)
            if names[0] in made.weights:
                torch.testing.assert_close(made.weights[names[0]], again.weights[names[1]], rtol=1e-5, atol=1e-6)
    dense = planned(0.45, tuning=False, depth_share=0).masks
    assert any(not torch.equal(dense[name], mask) for name, mask in made.masks.items() if name != STACK)


def test_nothing_in_a_removed_block_is_listed():
    made = with_blocks()
    assert not any(name.startswith(f"{STACK}.1.") for name in (*made.sites, *made.weights))


def inputs_of(model, layer):
    """What enters a layer, one row per token, sequence by sequence."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    for batch in as_batches(data().calibration):
        forward(model, batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("targets", ["dense", "pruned"])
def test_factors_fit_the_pruned_inputs_to_the_targets(targets):
    """Brute force in the second block: columns of every kept neuron on the pruned chain, by plain least squares."""
    model, layer = llama(), "model.layers.1.mlp.down_proj"
    made = planned(0.3, **NEURONS, targets=targets, damping=0.0)
    keep = made.masks[f"{STACK}.1.{NEURON}"]
    weight = model.get_parameter(f"{layer}.weight").detach().double()
    dense = inputs_of(model, layer)
    first = {name: mask for name, mask in made.masks.items() if ".0." in name}
    before = replace(made, sites={n: made.sites[n] for n in first}, masks=first, attributes=())
    before.weights = {name: value for name, value in made.weights.items() if ".0." in name}
    with sc.masked(model, before, verify=False):
        pruned = inputs_of(model, layer)
    assert (pruned - dense).abs().max() > 0.01
    y = (dense if targets == "dense" else pruned) @ weight.t()
    fitted = torch.arange(len(dense)) % 5 != 4  # every fifth sequence is held out
    rows, wanted = pruned[fitted].flatten(0, 1)[:, keep], y[fitted].flatten(0, 1)
    kept = weight[:, keep]
    gram, cross = (rows.t() @ rows) * (kept.t() @ kept), (rows * (wanted @ kept)).sum(0)
    residual = wanted - (rows * (m := torch.linalg.lstsq(gram, cross).solution)) @ kept.t()
    assert ((rows * (residual @ kept)).sum(0)).abs().max() < 1e-5 * cross.abs().max()  # no gradient is left
    facts = made.facts[f"{STACK}.1.{NEURON}"]
    assert facts["accepted"]
    folded = made.weights[f"{layer}.weight"].double()[:, keep]
    torch.testing.assert_close(folded, kept * m, rtol=1e-3, atol=1e-4)
    assert facts["error_after"] < facts["error_before"]


def test_heads_get_one_factor_each():
    made = planned(0.3, depth_share=0, kinds="head", damping=1e-3)
    checked = 0
    for index in range(4):
        name = f"{STACK}.{index}.self_attn.o_proj.weight"
        keep = made.masks[f"{STACK}.{index}.{HEAD}"]
        if name in made.weights:
            ratio = (made.weights[name] / llama().get_parameter(name).detach()).view(96, 4, 24)
            for head in keep.nonzero().flatten():
                torch.testing.assert_close(ratio[:, head], ratio[0, head, 0].expand(96, 24), rtol=1e-4, atol=0)
            assert not ratio[:, ~keep].any()
            checked += 1
    assert checked


def test_scores_and_kept_units_do_not_change_under_rescaling():
    plain, scaled = (planned(0.3, model, **NEURONS) for model in (llama(), rescale_llama(llama(), 0)))
    for name, mask in plain.masks.items():
        assert torch.equal(mask, scaled.masks[name])
        facts = plain.facts[name]
        assert scaled.facts[name]["condition_kept"] == pytest.approx(facts["condition_kept"], rel=1e-4)


def test_a_ranking_over_layers_keeps_as_many_of_every_kind():
    local, everywhere = (planned(0.4, tuning=False, scope=scope, condition="spectral") for scope in ("local", "global"))
    for suffix in (HEAD, NEURON):
        sums = [sum(m.kept(n) for n in m.sites if n.endswith(suffix)) for m in (local, everywhere)]
        assert sums[0] == sums[1]
    assert len({everywhere.kept(n) for n in everywhere.sites if n.endswith(NEURON)}) > 1
    assert len({local.kept(n) for n in local.sites if n.endswith(NEURON)}) == 1


def test_facts_tell_what_must_be_reported():
    made = with_blocks()
    for name, site in made.sites.items():
        facts = made.facts[name]
        if site.kind is not UnitKind.BLOCK:
            assert {
                "condition_kept",
                "error_before",
                "error_after",
                "accepted",
                "factor_min",
                "factor_max",
            } <= facts.keys()
            assert facts["error_after"] <= facts["error_before"] + 1e-9 or not facts["accepted"]
    assert "flops_kept" not in made.facts[next(iter(made.sites))]


# --- the result --------------------------------------------------------------------------------------


def test_the_shortened_model_generates_with_its_cache_and_loads_plainly(tmp_path):
    """Cache slots are renumbered; even widths are what a config can say."""
    made, model = with_blocks(), llama()
    sc.save(sc.apply_(model, made), tmp_path / "out", made, source=zoo.folder("pydoc-llama"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(40, 60)[None]
    told = [
        m.generate(ids, max_new_tokens=8, do_sample=False, use_cache=c) for m in (model, again) for c in (True, False)
    ]
    assert all(torch.equal(told[0], other) for other in told[1:])
    assert [block.self_attn.layer_idx for block in again.model.layers] == [0, 1, 2]


def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    task = Task(llama(), Budget(0.45), as_batches(data().calibration), journal=Journal(tmp_path / "a"))
    monkeypatch.setattr(comp, "MaskTuning", real := comp.MaskTuning)
    calls = []

    class Stops(real):
        def __init__(self, *args):
            calls.append(args)
            if len(calls) > 3:
                raise KeyboardInterrupt
            super().__init__(*args)

    with torch.no_grad():
        whole = plan(task, COMPSettings())
        monkeypatch.setattr(comp, "MaskTuning", Stops)
        with pytest.raises(KeyboardInterrupt):
            plan(replace(task, journal=Journal(tmp_path / "b", spill=True)), COMPSettings())
        monkeypatch.setattr(comp, "MaskTuning", real)
        again = plan(replace(task, journal=Journal(tmp_path / "b", spill=True)), COMPSettings())
    assert not any(block._forward_hooks for block in task.model.model.layers)
    assert all(torch.equal(again.masks[name], mask) for name, mask in whole.masks.items())
    assert set(again.weights) == set(whole.weights)
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    assert whole.facts == again.facts


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"steps": 2}, SettingsError, "steps"),
        ({"shares": "x=0.1"}, SettingsError, "shares"),
        ({"scope": "global", "layout": "uniform"}, SettingsError, "different widths"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, error, words):
    with pytest.raises(error, match=words):
        planned(**settings)
