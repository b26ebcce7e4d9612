"""MAW: rules by hand, the article's sizes to the last parameter, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from width_models import big_llama, llama, logits, mixtral, opt, phi3

import secateur as sc
from secateur import zoo
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.plan import Plan
from secateur.methods.llm.maw import Rule, pair_scores, row_scores, width_of

NEURONS = "model.layers.{}.mlp.gate_proj:neuron"
# articles' tables: expansion in percent -> width, parameters in millions
LLAMA_1B = {
    "model": {"layers": 16, "hidden": 2048, "inner": 8192, "heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "widths": [8192, 7373, 6554, 5735, 4916, 4096, 3277],
    "millions": [1235.81, 1155.30, 1074.79, 994.28, 913.77, 833.16, 752.65],
}
LLAMA_3B = {
    "model": {"layers": 28, "hidden": 3072, "inner": 8192, "heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    "widths": [8192, 7373, 6554, 5735, 4916, 4096, 3277],
    "millions": [3212.75, 3001.41, 2790.07, 2578.73, 2367.38, 2155.79, 1944.44],
}


def plan(model, sparsity=0.5, **settings) -> Plan:
    return sc.plan(model, "maw", sparsity, keep_scores=True, **settings)


def test_peak_to_peak_is_not_the_largest_absolute_weight():
    row = torch.tensor([[0.5, -0.4, 0.1]])
    assert row_scores(row, Rule.MAW).item() == pytest.approx(0.9)
    assert row_scores(row, Rule.MAX_ABS).item() == pytest.approx(0.5)
    positive = torch.tensor([[0.5, 0.2, 0.3]])
    assert row_scores(positive, Rule.MAW).item() == pytest.approx(0.7)


def by_hand(rows, rule):
    values = [row.double().tolist() for row in rows]
    match rule:
        case "maw":
            return [max(row) + abs(min(row)) for row in values]
        case "max_abs":
            return [max(map(abs, row)) for row in values]
        case "vow":
            means = [sum(row) / len(row) for row in values]
            return [sum((v - m) ** 2 for v in row) / (len(row) - 1) for row, m in zip(values, means, strict=True)]
        case "pon":
            return [sum(map(abs, row)) for row in values]
        case _:
            return [sum(v * v for v in row) ** 0.5 for row in values]


@pytest.mark.parametrize("rule", list(Rule))
def test_rules_on_a_real_decoder(rule):
    model = llama()
    made = plan(model, rule=rule)
    for index in range(3):
        mlp = model.model.layers[index].mlp
        gate, up = (by_hand(part.weight.detach(), rule) for part in (mlp.gate_proj, mlp.up_proj))
        expected = [g * u if rule == "pon" else g + u for g, u in zip(gate, up, strict=True)]
        assert made.scores[NEURONS.format(index)].tolist() == pytest.approx(expected, rel=1e-4)
        order = sorted(range(24), key=lambda m: (expected[m], m))
        gone = (~made.masks[NEURONS.format(index)]).nonzero().flatten().tolist()
        assert gone == sorted(order[:12])


def test_the_name_and_the_code_keep_other_neurons():
    model = zoo.load_model("pydoc-llama")
    named, published = plan(model, 0.2, rule="max_abs"), plan(model, 0.2)
    assert any(not torch.equal(named.masks[name], published.masks[name]) for name in named.sites)


@pytest.mark.parametrize("rule", list(Rule))
def test_scores_are_computed_in_float32(rule):
    """Variances of small weights vanish in half precision, and products of L1 norms overflow."""
    rng = torch.Generator().manual_seed(0)
    small = [(torch.randn(6, 64, generator=rng) * 1e-4).half() for _ in range(2)]
    large = [(torch.randn(6, 64, generator=rng) * 1e3).half() for _ in range(2)]
    found = pair_scores(small, rule)
    assert found.dtype is torch.float32
    assert (found > 0).all()
    assert torch.isfinite(pair_scores(large, rule)).all()
    exact = pair_scores([one.double().float() for one in small], rule)
    assert torch.equal(found, exact)


@pytest.mark.parametrize("article", [LLAMA_1B, LLAMA_3B], ids=["1b", "3b"])
def test_the_articles_sizes(article):
    """Widths by the plan's own rule, parameters by the structure of one layer more and one less."""
    shapes = dict(article["model"])
    layers, hidden = shapes.pop("layers"), shapes["hidden"]
    small = {count: structure_of(count, shapes) for count in (1, 2)}
    for step, (width, millions) in enumerate(zip(article["widths"], article["millions"], strict=True)):
        one, two = (parameters(small[count], width) for count in (1, 2))
        total = one + (layers - 1) * (two - one)
        assert total / 1e6 == pytest.approx(millions, abs=0.006)
        site = small[1].sites[NEURONS.format(0)]
        assert sc.Budget(round(0.1 * step, 1)).keep(site.units) == width
        assert width_of(100 * width / hidden, hidden, site) == width


def structure_of(layers, shapes):
    return sc.analyse(big_llama(layers=layers, vocab_size=128256, tie_word_embeddings=True, **shapes))


def parameters(structure, width):
    return structure.parameters({name: width for name in structure.sites if name.endswith(":neuron")})


def test_an_expansion_rate_says_the_width():
    made = plan(llama(inner=48), 0.0, expansion_rate=240)  # of 16
    assert [made.kept(name) for name in made.sites] == [39] * 3
    assert made.facts[NEURONS.format(0)]["expansion_rate"] == pytest.approx(100 * 39 / 16)
    assert made.facts[NEURONS.format(0)]["neurons_kept"] == pytest.approx(39 / 48, abs=1e-6)
    assert made.facts[NEURONS.format(0)]["parameters_kept"] > 39 / 48
    whole = plan(llama(inner=48), 0.0, expansion_rate=300)
    assert whole.kept(NEURONS.format(0)) == 48


def test_what_is_refused():
    with pytest.raises(BudgetError, match=r"asks for 49 neurons .* which has 48; it can be up to 300"):
        plan(llama(inner=48), 0.0, expansion_rate=301)
    with pytest.raises(BudgetError, match="either expansion_rate"):
        plan(llama(), 0.5, expansion_rate=100)
    with pytest.raises(SettingsError, match="expansion_rate"):
        plan(llama(), 0.0, expansion_rate=-1)
    with pytest.raises(SettingsError, match="'steps' has no effect"):
        plan(llama(), steps=2)
    with pytest.raises(ModelError, match="expert"):
        plan(mixtral())


def test_experts_in_layers_of_their_own_are_refused():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)) for _ in range(2)
            )

        def forward(self, x):
            return x + sum(expert(x) for expert in self.experts)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Pair() for _ in range(2))

        def forward(self, x):
            for block in self.layers:
                x = block(x)
            return x

    with pytest.raises(ModelError, match="2 groups of neurons"):
        sc.plan(Net(), "maw", 0.5, example=torch.randn(2, 3, 6))


def test_fused_gate_and_up_score_as_two_layers():
    model = phi3()
    found = plan(model).scores["model.layers.0.mlp.gate_up_proj:neuron"]
    gate, up = model.model.layers[0].mlp.gate_up_proj.weight.detach().split(24)
    expected = [g + u for g, u in zip(by_hand(gate, "maw"), by_hand(up, "maw"), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_without_a_gate_one_row_decides():
    model = opt()
    made = plan(model)
    name = next(iter(made.sites))
    assert made.scores[name].tolist() == pytest.approx(
        by_hand(model.model.decoder.layers[0].fc1.weight.detach(), "maw")
    )


def test_a_multiple_changes_the_share_in_every_layer_alike():
    made = plan(llama(inner=48), 0.3, multiple=4)
    assert {made.kept(name) for name in made.sites} == {36}  # 34 without


def test_a_budget_in_parameters_is_met():
    model = llama()
    dense = sum(p.numel() for p in model.parameters())
    made = sc.plan(model, "maw", budget=sc.Budget(0.8, "parameters"))
    after = sum(p.numel() for p in sc.apply_(model, made).parameters())
    assert 0 <= 0.8 * dense - after <= 3 * 3 * 16


def test_the_result_loads_without_the_library(tmp_path):
    model = llama()
    made = plan(model, 0.1)
    sc.apply_(model, made)
    folder = sc.save(model, tmp_path / "out", made)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert again.config.intermediate_size == 22
    assert torch.equal(logits(again), logits(model))


def test_uneven_widths_save_and_reload(tmp_path):
    model = llama()
    made = plan(model, 0.5, layout="free", scope="global")
    assert len({made.kept(name) for name in made.sites}) > 1
    sc.apply_(model, made)
    folder = sc.save(model, tmp_path / "out", made)
    assert torch.equal(logits(sc.load(folder)), logits(model))
