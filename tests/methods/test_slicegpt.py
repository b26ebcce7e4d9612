"""SliceGPT: its traps, its counts, and that a sliced model is an ordinary model."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import secateur as sc
from secateur import zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, OutputError, PlanError, SettingsError
from secateur.core.journal import Journal
from secateur.core.method import Task
from secateur.core.plan import Plan
from secateur.data.batches import as_batches, logits_of
from secateur.data.running import evaluating
from secateur.measure import parameters
from secateur.methods.llm.slicegpt import SliceGPTSettings, method
from secateur.recover.bias import compensate

TOKENS = torch.randint(3, 40, (6, 11), generator=torch.Generator().manual_seed(0))
PLAIN = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = PLAIN | {"intermediate_size": 48, "num_key_value_heads": 2}
MODELS = {
    "Llama": GATED,
    "Mistral": GATED,
    "Qwen2": GATED | {"tie_word_embeddings": True},
    "Gemma": GATED | {"head_dim": 8},
    "OPT": PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "GPT2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
}


def make(name, **settings):
    """A small model with weights so large that every block matters."""
    import transformers

    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(**MODELS.get(name, {}) | special | settings)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def data():
    """Tokens, and a mask that hides the ends of some sequences."""
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = mask[4, 3:] = 0
    return [{"input_ids": TOKENS[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2, 4)]


def ends(name):
    """GPT-2's code views its last state as wide as the first one."""
    return {"slice_head": True} if name == "GPT2" else {}


def sliced(name, sparsity=0.25, **settings):
    model = make(name)
    plan = sc.plan(model, "slicegpt", sparsity, data=data(), **ends(name) | settings)
    return sc.apply_(model, plan), plan


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return logits_of(model(tokens))


# --- what is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "GPT2"])
def test_slicing_nothing_keeps_the_logits(name, slice_head):
    model, plan = sliced(name, 0.0, slice_head=slice_head)
    assert plan.sparsity == 0
    torch.testing.assert_close(logits(model), logits(make(name)), rtol=0, atol=1e-4)
    assert model.state_dict().keys() != make(name).state_dict().keys()  # it was rotated all the same


@pytest.mark.parametrize("name", MODELS)
def test_a_sliced_model_is_the_dense_one_confined_to_the_axes(name):
    """Verified in the method itself: spoil one weight afterwards and see that the comparison would have told."""
    model, plan = sliced(name)
    assert (logits(model) - logits(make(name))).abs().max() > 1e-2
    journal, task, settings = run_again(name)
    again = planned_again(task, settings)
    for key, value in plan.weights.items():
        assert torch.equal(again.weights[key], value), key
    assert len(journal.section("slicegpt")) == 2


def planned_again(task, settings):
    with evaluating(task.model):
        return method.run(task, settings)


def run_again(name, journal=None):
    model = make(name)
    batches = as_batches(data())
    journal = journal or Journal()
    task = Task(model=model, budget=Budget(0.25), batches=batches, example=batches[0], journal=journal)
    return journal, task, SliceGPTSettings(**ends(name))


def test_what_is_not_recognised_is_refused_instead_of_sliced():
    """A reader of the stream that no norm feeds: the comparison after the walk finds it."""
    model = make("Llama")
    block = model.model.layers[1]
    block.register_forward_hook(lambda module, args, output: output + 0.1 * args[0].abs().mean(-1, keepdim=True))
    with pytest.raises(ModelError, match="block"):
        sc.plan(model, "slicegpt", 0.25, data=data())


def test_the_verification_finds_a_use_of_the_stream_beside_the_norms(monkeypatch):
    import secateur.methods.llm.slicegpt as module

    def spoilt(*args):
        found = reading(*args)
        return {name: value * 1.01 for name, value in found.items()}

    reading = module.reading
    monkeypatch.setattr(module, "reading", spoilt)
    with pytest.raises(ModelError, match="not recognised"):
        sc.plan(make("Llama"), "slicegpt", 0.25, data=data())


def test_padding_does_not_turn_the_axes():
    """Other tokens behind the mask, the same plan."""
    other = [dict(batch) for batch in data()]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(data(), other, strict=True))
    one, two = (sc.plan(make("OPT"), "slicegpt", 0.25, data=batches) for batches in (data(), other))
    for name, value in one.weights.items():
        assert torch.allclose(value, two.weights[name], atol=1e-5), name
    plain = sc.plan(make("OPT"), "slicegpt", 0.25, data=TOKENS)
    assert any(not torch.allclose(value, plain.weights[name], atol=1e-3) for name, value in one.weights.items())


def test_later_blocks_see_what_the_sliced_ones_give():
    """Dense inputs would give other axes from the second addition on."""
    narrow = sc.plan(make("Llama"), "slicegpt", 0.5, data=data())
    whole = sc.plan(make("Llama"), "slicegpt", 0.0, data=data())
    first, later = "model.embed_tokens.weight", "model.layers.1.mlp.gate_proj.weight"
    torch.testing.assert_close(narrow.weights[first].abs(), whole.weights[first][:, :16].abs(), rtol=0, atol=1e-5)
    assert (narrow.weights[later].abs() - whole.weights[later][:, :16].abs()).abs().max() > 1e-2


def test_turning_the_kept_axes_changes_weights_but_no_output():
    pca, plan = sliced("Llama")
    turned, other = sliced("Llama", orientation="random")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert (plan.weights[name] - other.weights[name]).abs().max() > 0.01
    torch.testing.assert_close(logits(turned), logits(pca), rtol=0, atol=1e-4)


def test_random_axes_are_another_control_for_every_seed():
    plans = [sc.plan(make("Llama"), "slicegpt", 0.25, data=data(), seed=seed, axes="random") for seed in (0, 0, 1)]
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(plans[0].weights[name], plans[1].weights[name])
    assert not torch.allclose(plans[0].weights[name], plans[2].weights[name])


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "multiple", "width"), [(0.25, 8, 24), (0.3, 8, 16), (0.3, 1, 23), (0.01, 8, 32), (0.0, 5, 32)]
)
def test_widths_are_rounded_down(sparsity, multiple, width):
    if width == 32 and sparsity:
        width = 32  # floor(0.01 * 32) removes nothing
        with pytest.raises(BudgetError, match="removes nothing"):
            sc.plan(make("Llama"), "slicegpt", sparsity, data=data(), multiple=multiple)
        return
    plan = sc.plan(make("Llama"), "slicegpt", sparsity, data=data(), multiple=multiple)
    (mask,) = plan.masks.values()
    assert mask.tolist() == [True] * width + [False] * (32 - width)


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "GPT2"])
def test_announced_parameters_are_the_sliced_models(name, slice_head):
    model, plan = sliced(name, slice_head=slice_head)
    (facts,) = plan.facts.values()
    assert facts["parameters"] == parameters(model) == sum(value.numel() for value in model.state_dict().values())
    assert facts["parameters_kept"] > 0.75 or slice_head  # shortcuts: less is saved than was sliced
    tied = make(name).config.tie_word_embeddings
    assert any("tied" in warning for warning in plan.warnings) == tied


def test_a_budget_in_parameters_counts_shortcuts():
    dense = parameters(make("Llama"))
    budget = Budget(0.8, Quantity.PARAMETERS)
    model = make("Llama")
    plan = sc.plan(model, "slicegpt", budget=budget, data=data(), multiple=1)
    width = plan.kept(next(iter(plan.sites)))
    assert parameters(sc.apply_(model, plan)) <= 0.8 * dense
    one_more = sc.plan(make("Llama"), "slicegpt", budget=Budget(width + 1, Quantity.UNITS), data=data(), multiple=1)
    (facts,) = one_more.facts.values()
    assert facts["parameters"] > 0.8 * dense


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(0.9), "at least 8 must stay"),
        (Budget(0.01, Quantity.PARAMETERS), "parameters, shortcuts included"),
        (Budget(0.5, Quantity.FLOPS), "budget in parameters"),
        (Budget(0.5, floor=20), "at least 20 must stay"),
    ],
)
def test_budgets_out_of_reach_are_refused(budget, words):
    with pytest.raises(BudgetError, match=words):
        sc.plan(make("Llama"), "slicegpt", budget=budget, data=data())


def test_parts_of_the_stream_cannot_be_left_out():
    with pytest.raises(SettingsError, match="cannot be excluded"):
        sc.plan(make("Llama"), "slicegpt", 0.25, data=data(), exclude=["model.layers.1.mlp*"])


def test_a_stream_of_weights_is_refused():
    _, task, settings = run_again("Llama")
    with pytest.raises(SettingsError, match="in memory"):
        method.run(replace(task, residency=object()), settings)


def test_gpt2_is_told_to_slice_its_head():
    with pytest.raises(ModelError, match="slice_head=true"):
        sc.plan(make("GPT2"), "slicegpt", 0.25, data=data())


# --- an ordinary model afterwards -------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_load_again_and_carry_code_for_others(name, tmp_path):
    model, plan = sliced(name)
    folder = sc.save(model, tmp_path / "out", plan)
    expected = logits(model)
    assert torch.equal(logits(sc.load(folder)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)), expected)
    assert plan.additions == Plan.load(folder / "secateur").additions


def test_a_fresh_process_without_secateur_gives_the_same_logits(tmp_path):
    model, plan = sliced("Llama")
    folder = sc.save(model, tmp_path / "out", plan)
    code = f"""
import sys, torch
sys.modules["secateur"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
tokens = torch.tensor({TOKENS.tolist()})
with torch.no_grad():
    torch.save(model(tokens).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_plain_from_pretrained_does_not_load_it_by_mistake(tmp_path):
    model, plan = sliced("Llama")
    folder = sc.save(model, tmp_path / "out", plan)
    with pytest.raises(RuntimeError, match="mismatch"):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_folder_whose_card_lost_a_shortcut_is_refused(tmp_path):
    model, plan = sliced("Llama")
    del model.model.layers[0].mlp.shortcut
    with pytest.raises(OutputError, match="reload"):
        sc.save(model, tmp_path / "out", plan)


def test_generation_with_and_without_a_cache_agree():
    model, _ = sliced("Llama")
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(TOKENS[:2], use_cache=use, **given) for use in (True, False))
    assert torch.equal(cached, plain)


def test_masked_is_undone_and_applying_twice_refused():
    model = make("Qwen2")
    before, state = logits(model), copy.deepcopy(model.state_dict())
    plan = sc.plan(model, "slicegpt", 0.25, data=data())
    with sc.masked(model, plan):
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    sc.apply_(model, plan)
    with pytest.raises(PlanError, match="applied already"):
        sc.apply_(model, plan)


def test_plans_that_rotate_stand_alone():
    model = make("Llama")
    plan = sc.plan(model, "slicegpt", 0.25, data=data())
    other = sc.plan(model, "wanda", 0.5, data=data())
    with pytest.raises(PlanError, match=r"adds modules to a model .*goes with no other"):
        _ = plan & other
    with pytest.raises(PlanError, match="adds modules to the model"):
        compensate(plan, model, data())


def test_a_sliced_model_can_be_pruned_further_saved_and_loaded(tmp_path):
    model, _ = sliced("Llama")
    sc.apply_(model, sc.plan(model, "wanda", 0.5, data=data()))
    plan = sc.plan(model, "channel_norm", 0.5, kinds="neuron")
    sc.apply_(model, plan)
    assert model.model.layers[0].mlp.down_proj.in_features == 24
    folder = sc.save(model, tmp_path / "out", plan)
    assert torch.equal(logits(sc.load(folder)), logits(model))


def test_a_killed_walk_goes_on_where_it_stopped(tmp_path):
    whole = planned_again(*run_again("Llama")[1:])
    journal, task, settings = run_again("Llama", Journal(tmp_path))
    task.model.model.layers[1].mlp.register_forward_hook(strike_at(5))  # the walk has come to the last block
    with pytest.raises(KeyboardInterrupt):
        planned_again(task, settings)
    assert list(journal.section("slicegpt")) == ["model.layers.0"]
    again = planned_again(*run_again("Llama", Journal(tmp_path))[1:])
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())


def strike_at(call):
    """A hook that ends the run at its `call`-th call."""
    count = iter(range(1, 100))

    def hook(module, args, output):
        if next(count) == call:
            raise KeyboardInterrupt

    return hook


def test_the_shipped_llama_loses_little_on_principal_axes():
    model, splits = zoo.load_model("pydoc-llama"), zoo.load_data("pydoc", samples=16)
    pca, chance = (sc.plan(model, "slicegpt", 0.25, data=splits.calibration, axes=axes) for axes in ("pca", "random"))
    dense = sc.measure.perplexity(model, splits.evaluation).value
    with sc.masked(model, pca):
        assert sc.measure.perplexity(model, splits.evaluation).value < 1.1 * dense
    with sc.masked(model, chance):
        assert sc.measure.perplexity(model, splits.evaluation).value > 5 * dense
