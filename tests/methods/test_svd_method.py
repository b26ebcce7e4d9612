"""Factorisation after training: budgets, rules, refusals, and results that load again everywhere."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import secateur as sc
from secateur import zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, NumericsError, PlanError, SettingsError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.data.batches import logits_of
from secateur.measure import flops, parameters
from secateur.shrink.factorised import Factorised

TOKENS = torch.arange(3, 27).view(2, 12)
X = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))


def small(seed=0):
    """Convolutions of several kinds and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 24, (3, 5), stride=2, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(20, 10),
    )  # fmt: skip


def plain_small():
    return small()


def causal(config):
    """With weights so large that every layer matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def llama():
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return causal(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **SPECIAL))


def gpt2():
    return causal(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=4, n_positions=32, **SPECIAL))


# --- what comes out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
def test_a_share_of_energy_is_kept_layer_by_layer(scheme):
    model = small()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = sc.plan(model, "svd", 0.0, scheme=scheme, amount=0.3)
    sc.apply_(model, plan)
    split = {name: module for name, module in model.named_modules() if isinstance(module, Factorised)}
    assert split.keys() == {site.removesuffix(":rank") for site, mask in plan.masks.items() if not mask.all()}
    assert "2" in split
    for name, module in split.items():
        lost = (dense[f"{name}.weight"] - module.weight.detach()).square().sum() / dense[
            f"{name}.weight"
        ].square().sum()
        assert plan.facts[f"{name}:rank"]["energy"] == pytest.approx(1 - float(lost), abs=1e-5)
        assert plan.facts[f"{name}:rank"]["energy"] >= 0.3
        assert plan.kept(f"{name}:rank") == module.rank == plan.facts[f"{name}:rank"]["rank"]
    assert split["2"].bias is None
    assert any("'4': grouped" in warning for warning in plan.warnings)


def test_one_rank_less_would_keep_too_little():
    plan = sc.plan(small(), "svd", 0.0, amount=0.6, keep_scores=True)
    for name, score in plan.scores.items():
        if plan.kept(name) < plan.sites[name].units:
            kept = score.cumsum(0) / score.sum()
            assert kept[plan.kept(name) - 2] < 0.6 <= kept[plan.kept(name) - 1] + 1e-6


def test_the_head_can_be_left_out():
    plan = sc.plan(small(), "svd", 0.0, amount=0.5, linear=False)
    assert plan.sites.keys() == {"0:rank", "2:rank"}
    assert any("'5' first: linear layers and 1 x 1" in warning for warning in plan.warnings)
    assert sc.plan(small(), "svd", 0.0, amount=0.5, exclude=["0", "8"]).sites.keys() == {"2:rank", "5:rank"}


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
@pytest.mark.parametrize("quantity", [Quantity.PARAMETERS, Quantity.FLOPS])
def test_budgets_are_met_on_the_measured_model(scheme, quantity):
    model, example = zoo.load_model("digits-resnet"), next(zoo.load_data("digits").evaluation.batches(2))
    plan = sc.plan(model, "svd", budget=Budget(0.5, quantity), scheme=scheme, example=example)
    whole = parameters(model) if quantity is Quantity.PARAMETERS else flops(model, example)
    sc.apply_(model, plan)
    found = parameters(model) if quantity is Quantity.PARAMETERS else flops(model, example)
    step = max(site.cost for site in plan.sites.values()) * (128 if quantity is Quantity.FLOPS else 1)
    assert 0.5 * whole - step < found <= 0.5 * whole  # at 8 x 8 pixels, two samples: weights are used 128 times


class Curious(nn.Module):
    """Looks at a layer's weight beside calling it, as transformers' patch embedding does for its dtype."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(20, 30), nn.Linear(30, 20)

    def forward(self, x):
        return self.b(self.a(x.to(self.a.weight.dtype)).relu())


def test_a_weight_that_others_look_at_costs_its_product():
    torch.manual_seed(0)
    model, example = Curious(), torch.randn(3, 20)
    classes, dense = [type(module) for module in model.modules()], flops(model, Batch((example[:1],)))
    plan = sc.plan(model, "svd", budget=Budget(0.88, Quantity.FLOPS), example=example)
    assert [type(module) for module in model.modules()] == classes
    sc.apply_(model, plan)
    assert isinstance(model.a, Factorised) or isinstance(model.b, Factorised)
    found = flops(model, Batch((example[:1],))) / dense
    assert next(iter(plan.facts.values()))["flops_kept"] == pytest.approx(found, abs=1e-6)
    assert 0.87 <= found <= 0.88


def test_a_budget_in_flops_without_known_inputs_asks_for_an_example():
    plan = sc.plan(small(), "svd", 0.3)  # parameters need none
    assert plan.units(UnitKind.RANK)[0] < plan.units(UnitKind.RANK)[1]
    assert sc.plan(small(), "svd", budget=Budget(0.7, Quantity.FLOPS), example=X).masks


def test_masked_is_undone_and_applying_twice_refused():
    model = small()
    before, keys = model(X), set(model.state_dict())
    plan = sc.plan(model, "svd", 0.4)
    with sc.masked(model, plan):
        under = model(X)
    assert torch.equal(model(X), before)
    assert set(model.state_dict()) == keys
    assert torch.equal(sc.apply_(model, plan)(X), under)
    assert not torch.allclose(under, before)
    with pytest.raises(PlanError):
        sc.apply_(model, plan)


# --- saved and loaded -------------------------------------------------------------------------------


def test_a_folder_with_a_factory_loads_again_twice(tmp_path):
    model = small()
    plan = sc.plan(model, "svd", 0.3)
    first = sc.save(sc.apply_(model, plan), tmp_path / "one", plan, factory=f"{__name__}:plain_small")
    again = sc.load(first, trust_factory=True)
    assert torch.equal(again(X), model(X))
    assert Plan.load(first / "secateur").additions == plan.additions
    more = sc.plan(again, "svd", 0.2)  # factors of factors
    assert any(one["module"].endswith(("first", "second")) for one in more.additions)
    second = sc.save(sc.apply_(again, more), tmp_path / "two", more, source=first, factory=f"{__name__}:plain_small")
    assert torch.equal(sc.load(second, trust_factory=True)(X), again(X))


def logits(model):
    with torch.no_grad():
        return logits_of(model(TOKENS))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_transformers_folder_loads_again_and_carries_code_for_others(make, tmp_path):
    model = make()
    dense = logits(model)
    plan = sc.plan(model, "svd", 0.0, amount=0.7)
    assert plan.additions
    folder = sc.save(sc.apply_(model, plan), tmp_path / "out", plan)
    expected = logits(model)
    assert (expected - dense).abs().max() > 1e-2
    assert torch.equal(logits(sc.load(folder)), expected)
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(logits(other), expected)
    kinds = [type(module) for module in other.modules() if type(module).__name__ == "Factorised"]
    assert len(kinds) == len(plan.additions)
    assert all(kind.__module__.startswith("transformers_modules") for kind in kinds)  # the folder's own copy


def test_a_plan_that_leaves_every_layer_whole_is_a_plan(tmp_path):
    model = small()
    before = model(X)
    plan = sc.plan(model, "svd", 0.0, amount=1.0)
    assert plan.units()[0] == plan.units()[1]
    assert any(warning.startswith("4 layers are not factorised, '0' first: two thinner") for warning in plan.warnings)
    with sc.masked(model, plan):
        assert torch.equal(model(X), before)
    folder = sc.save(sc.apply_(model, plan), tmp_path / "out", plan, factory=f"{__name__}:plain_small")
    assert torch.equal(sc.load(folder, trust_factory=True)(X), before)


def test_factors_give_the_logits_of_their_products_in_both_layouts():
    for make in (llama, gpt2):
        model = make()
        dense = logits(model)
        with sc.masked(model, sc.plan(model, "svd", 0.0, amount=0.7)):
            products = {n: m.weight for n, m in model.named_modules() if isinstance(m, Factorised)}
            assert products
            replaced = {n: p.detach().clone() for n, p in products.items()}
            under = logits(model)
        with torch.no_grad():
            for name, value in replaced.items():
                weight = model.get_submodule(name).weight
                weight.copy_(value if make is llama else value.t())
        torch.testing.assert_close(logits(model), under, rtol=0, atol=1e-4)
        assert (under - dense).abs().max() > 1e-3


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["energy", "sum", "rate"])
def test_more_than_full_rank_is_refused(rule):
    with pytest.raises(SettingsError, match=f"amount=1.5 with rule={rule}"):
        sc.plan(small(), "svd", 0.0, rule=rule, amount=1.5)


def test_sick_weights_and_models_without_layers_are_refused():
    model = small()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"2\.weight"):
        sc.plan(model, "svd", 0.0)
    with pytest.raises(ModelError, match="no layer whose rank could be cut"):
        sc.plan(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "svd", 0.0)


def test_an_amount_out_of_reach_says_what_is_possible():
    with pytest.raises(BudgetError, match=r"allows 0\.\d+ to 1 of the dense parameters"):
        sc.plan(small(), "svd", 0.97)
