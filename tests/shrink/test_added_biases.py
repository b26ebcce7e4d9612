"""Biases that a plan adds to layers built without one: put on, taken off, saved, loaded, pruned again."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shrink_models import assert_same_bits, fresh_python, llama, model_inputs, outputs, state
from torch import nn

import secateur as sc
from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.shrink import apply as applying
from secateur.shrink.depth import renumbered

STACK = "model.layers"
BIASES = [f"{STACK}.{i}.{layer}.bias" for i in (0, 2) for layer in ("self_attn.o_proj", "mlp.down_proj")]
IDS = model_inputs("llama")
READ = """
import sys
import torch, transformers
from safetensors.torch import load_file
given = load_file("inputs.safetensors")
expected = given.pop("expected")
model, info = transformers.AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    assert torch.equal(model.eval()(**given).logits, expected)
print(sorted(name for name, _ in model.named_parameters() if name.endswith("_proj.bias")))
"""


def values(names=tuple(BIASES), width=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(width, generator=rng) for name in names}


def cut_plan(model, **settings):
    """Neurons and key/value groups cut, uneven widths, four biases."""
    plan = sc.plan(model, "channel_norm", 0.5, multiple=1, scope="global", **settings)
    plan.weights.update(values())
    return plan


def with_biases_by_hand(model):
    clone = copy.deepcopy(model)
    for name, value in values().items():
        clone.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(value)
    return clone


def test_masked_adds_biases_and_takes_them_away():
    model = llama()
    before, expected = state(model), outputs(with_biases_by_hand(model), IDS)
    plan = Plan(sites={}, masks={}, weights=values())
    with sc.masked(model, plan):
        assert torch.equal(outputs(model, IDS), expected)
        assert set(BIASES) <= model.state_dict().keys()
    assert_same_bits(model, before)
    assert all(model.get_submodule(name.removesuffix(".bias")).bias is None for name in BIASES)
    assert not torch.equal(outputs(model, IDS), expected)


def test_masked_and_applied_agree_with_units_cut_and_copies_keep_the_biases():
    model = llama()
    plan, before = cut_plan(model), state(model)
    with sc.masked(model, plan):
        under = outputs(model, IDS)
    assert_same_bits(model, before)
    sc.apply_(model, plan)
    assert torch.equal(outputs(model, IDS), under)
    for name, value in values().items():
        assert torch.equal(model.get_parameter(name), value)
        assert model.get_parameter(name).requires_grad
    again = copy.deepcopy(model)
    with torch.no_grad():
        for name in BIASES:
            again.get_parameter(name).zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again, IDS), under)


def test_a_failed_cut_leaves_no_bias_behind(monkeypatch):
    model = llama()
    plan, before = cut_plan(model), state(model)

    def broken(*args, **kwargs):
        raise PlanError("by design")

    monkeypatch.setattr(applying, "cut_", broken)
    for put in (lambda: sc.apply_(model, plan), lambda: sc.masked(model, plan).__enter__()):
        with pytest.raises(PlanError, match="by design"):
            put()
        assert_same_bits(model, before)


@pytest.mark.parametrize(
    ("name", "width", "words"),
    [
        ("model.layers.0.input_layernorm.bias", 16, "no such tensor"),
        ("model.layers.9.mlp.down_proj.bias", 16, "no such tensor"),
        ("model.layers.0.mlp.down_proj.scale", 16, "no such tensor"),
        ("model.layers.0.mlp.down_proj.bias", 24, r"\[24\], it is \[16\]"),
        ("model.layers.0.mlp.down_proj.weight", 24, r"\[24\], it is \[16, 24\]"),
    ],
)
def test_values_for_what_is_not_there_are_refused_before_anything_changes(name, width, words):
    model = llama()
    before = state(model)
    plan = Plan(sites={}, masks={}, weights=values([*BIASES, name]) | values([name], width))
    with pytest.raises(PlanError, match=words):
        sc.apply_(model, plan)
    assert_same_bits(model, before)


def test_a_plan_that_cuts_nothing_can_be_applied_twice_but_not_on_other_biases():
    model = llama()
    plan = sc.plan(model, "global_magnitude", 0.5, include=[f"{STACK}.*"])
    plan.weights.update(values())
    applying.stamp(model, plan)
    once = outputs(sc.apply_(model, plan), IDS)
    assert torch.equal(outputs(sc.apply_(model, plan), IDS), once)
    with torch.no_grad():
        model.get_parameter(BIASES[0]).add_(1)
    with pytest.raises(PlanError, match=BIASES[0]):
        sc.apply_(model, plan)


def saved(model, plan, home):
    sc.save(model, home / "out", plan)
    save_file(IDS | {"expected": outputs(model, IDS)}, home / "inputs.safetensors")


@pytest.mark.parametrize("cut", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_saved_biases_come_back_in_a_fresh_process_and_in_ours(tmp_path, monkeypatch, cut):
    monkeypatch.chdir(tmp_path)
    model = llama()
    plan = cut_plan(model) if cut else Plan(sites={}, masks={}, weights=values())
    saved(sc.apply_(model, plan), plan, tmp_path)
    assert json.loads(fresh_python(READ).replace("'", '"')) == sorted(BIASES)
    assert json.loads((tmp_path / "out/secateur/result.json").read_text())["layout"] == "uneven"
    assert_same_bits(sc.load(tmp_path / "out"), state(model))


def test_a_loaded_model_with_added_biases_can_be_pruned_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = cut_plan(model := llama())
    sc.save(sc.apply_(model, plan), tmp_path / "first", plan)
    model = sc.load(tmp_path / "first")
    more = sc.plan(model, "channel_norm", 0.3, multiple=1, kinds="neuron")
    more.weights.update(values([f"{STACK}.1.mlp.down_proj.bias", BIASES[0]], seed=5))
    sc.apply_(model, more)
    sc.save(model, tmp_path / "out", more, source=tmp_path / "first")
    save_file(IDS | {"expected": outputs(model, IDS)}, tmp_path / "inputs.safetensors")
    assert len(json.loads(fresh_python(READ).replace("'", '"'))) == len(BIASES) + 1
    assert_same_bits(sc.load(tmp_path / "out"), state(model))


class Pair(nn.Module):
    """A linear layer without a bias behind one with one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_modules_with_a_factory_get_their_biases_back(tmp_path):
    torch.manual_seed(1)
    model, x = Pair().eval(), torch.randn(4, 6)
    plan = sc.plan(model, "channel_norm", 0.5, multiple=1, example=x)
    plan.weights["second.bias"] = torch.tensor([1.0, 2.0, 3.0])
    sc.apply_(model, plan)
    sc.save(model, tmp_path / "out", plan, factory="test_added_biases:Pair", verify=False)
    again = sc.load(tmp_path / "out", factory=Pair)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.second.bias, plan.weights["second.bias"])
    assert load_file(tmp_path / "out" / "model.safetensors")["second.bias"].tolist() == [1, 2, 3]


# --- units and blocks in one plan -------------------------------------------------------------------


def mixed_plan(model, **settings):
    """The second block goes; in the others units do."""
    kept = torch.tensor([True, False, True, True, True])
    plan = sc.plan(model, "channel_norm", 0.5, multiple=1, exclude=[f"{STACK}.1.*"], **settings)
    plan.sites[STACK], plan.masks[STACK] = Site(STACK, UnitKind.BLOCK, (5,)), kept
    return plan


@pytest.mark.parametrize("layout", ["plain", "uneven"])
def test_units_and_blocks_go_in_one_plan_and_load_again(tmp_path, layout):
    model = llama()
    plan = mixed_plan(model, scope="local" if layout == "plain" else "global")
    with sc.masked(model, plan):
        under = outputs(model, IDS)
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan)
    assert torch.equal(outputs(model, IDS), under)
    assert json.loads((tmp_path / "out/secateur/result.json").read_text())["layout"] == layout
    assert_same_bits(sc.load(tmp_path / "out"), state(model))


def test_names_after_blocks_are_gone():
    plan = mixed_plan(llama())
    assert renumbered("model.layers.0.mlp", plan) == "model.layers.0.mlp"
    assert renumbered("model.layers.1.mlp", plan) is None
    assert renumbered("model.layers.4.mlp.up_proj.weight", plan) == "model.layers.3.mlp.up_proj.weight"
    assert renumbered("model.layers.2", plan) == "model.layers.1"
    assert renumbered("model.norm", plan) == "model.norm"
