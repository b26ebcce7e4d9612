"""FLAP: what its formulas say on cases worked by hand, exact replacement of constant channels, budgets, refusals."""

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
from secateur.allocate.weighted import evenly_gone, lowest_gone, weighted_counts
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, PlanError, SettingsError
from secateur.core.journal import Journal
from secateur.core.method import Task
from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.data.batches import as_batches, forward
from secateur.methods.llm.flap import FLAPSettings, metric_of, plan, unit_scores
from secateur.recover.bias import compensate
from secateur.stats.listeners import TokenMoments

HEAD, NEURON = "self_attn:head", "mlp.gate_proj:neuron"


@cache
def data():
    return zoo.load_data("pydoc", samples=8)


def llama():
    return zoo.load_model("pydoc-llama")


def planned(model=None, share=0.4, **settings):
    return sc.plan(model or llama(), "flap", share, data=data().calibration, **settings)


# --- the formulas ------------------------------------------------------------------------------------


def moments(x):
    stat = TokenMoments(x.shape[1])
    stat.update(x, 2)  # two sequences
    return stat


def test_metrics_against_their_definitions():
    rng = torch.Generator().manual_seed(0)
    x, W = torch.randn(10, 4, generator=rng) + 3, torch.randn(5, 4, generator=rng)
    columns = torch.tensor([2, 0, 1, 3])
    W, x_sorted = W[:, columns], x[:, columns]
    expected = {
        "ifv": x_sorted.var(0),
        "wifv": x_sorted.var(0) * W.square().sum(0),
        "wifn": (W.abs() * (x_sorted.square().sum(0) / 2).sqrt()).mean(0),
        "wanda_sp": (W.abs() * (x_sorted.square().sum(0) / 2).sqrt()).mean(0),
        "mag_sp": W.square().sum(0).sqrt(),
    }
    for metric, values in expected.items():
        found = metric_of(W, moments(x), columns, FLAPSettings(metric=metric).metric)
        torch.testing.assert_close(found.float(), values, rtol=1e-5, atol=1e-6)


def test_heads_are_squared_standardised_and_averaged_neurons_are_not_squared():
    """Traps: the sum instead of the mean after standardisation; the square after it."""
    vector = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    heads, neurons = Site("a:head", UnitKind.HEAD, (2,)), Site("b:neuron", UnitKind.NEURON, (4,))
    squared = torch.tensor([1.0, 4.0, 9.0, 36.0], dtype=torch.float64)  # mean 12.5, unbiased std 15.93
    z = (squared - 12.5) / (((11.5**2 + 8.5**2 + 3.5**2 + 23.5**2) / 3) ** 0.5)
    torch.testing.assert_close(unit_scores(vector, heads, FLAPSettings()), torch.stack([z[:2].mean(), z[2:].mean()]))
    plain = (vector - 3) / ((4 + 1 + 0 + 9) / 3) ** 0.5
    torch.testing.assert_close(unit_scores(vector, neurons, FLAPSettings()), plain)
    local = FLAPSettings(structure="ul_um")
    assert unit_scores(vector, heads, local).tolist() == [5.0, 45.0]
    assert unit_scores(vector, neurons, local).tolist() == vector.tolist()
    assert unit_scores(vector, heads, FLAPSettings(metric="wanda_sp")).tolist() == [3.0, 9.0]
    assert not unit_scores(torch.ones(4).double(), neurons, FLAPSettings()).any()  # nothing differs: no NaN


def counted_by_hand(scores, weights, density):
    """The rule in plain Python: kept weight as it grows, up to the unit at which it comes nearest."""
    units = sorted(((v, name) for name, vector in scores.items() for v in vector.tolist()), key=lambda u: -u[0])
    total, grown, distances = sum(weights[name] for _, name in units), 0.0, []
    for _, name in units:
        grown += weights[name]
        distances.append(abs(grown - density * total))
    kept = units[: distances.index(min(distances))]
    return {name: sum(owner == name for _, owner in kept) for name in scores}


@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(1, 200))
def test_threshold_by_weight_against_plain_python(seed, density, head):
    rng = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(n, generator=rng) for name, n in (("h0", 4), ("n0", 30), ("h1", 4), ("n1", 20))}
    weights = {name: head if name.startswith("h") else 1.0 for name in scores}
    found = weighted_counts(scores, weights, density, dict.fromkeys(scores, 0))
    assert found == counted_by_hand(scores, weights, density)
    total, kept = 50 + 8 * head, sum(weights[name] * count for name, count in found.items())
    assert abs(kept - density * total) <= 1.5 * head  # half a unit from the nearest sum, and the unit there goes too


def test_ties_and_least_counts_are_exact():
    scores = {"a": torch.zeros(4), "b": torch.zeros(4)}
    assert weighted_counts(scores, {"a": 1, "b": 1}, 0.5, {"a": 0, "b": 0}) == {"a": 0, "b": 3}
    assert weighted_counts(scores, {"a": 1, "b": 1}, 0.5, {"a": 2, "b": 1}) == {"a": 2, "b": 1}
    assert weighted_counts(scores, {"a": 1, "b": 1}, 1.0, {"a": 0, "b": 0}) == {"a": 4, "b": 4}
    falling = {"a": torch.tensor([4.0, 3.0, 2.0]), "b": torch.tensor([1.0, 0.5, 0.0])}
    assert lowest_gone(falling, 4, {"a": 1, "b": 1}) == {"a": 1, "b": 1}
    assert lowest_gone(falling, 2, {"a": 1, "b": 1}) == {"a": 3, "b": 1}
    assert lowest_gone(falling, 3, {"a": 1, "b": 1}) == {"a": 2, "b": 1}  # b would be empty
    assert lowest_gone(falling, 0, {"a": 1, "b": 1}) == {"a": 3, "b": 3}
    assert evenly_gone(falling, 3, {"a": 1, "b": 1}) == {"a": 2, "b": 2}
    assert evenly_gone(falling, 9, {"a": 1, "b": 1}) == {"a": 1, "b": 1}


# --- biases ------------------------------------------------------------------------------------------


def small(constant_from=3, heads=2, kv=2):
    """A Llama in which every neuron from `constant_from` on, and the last head, give the same whatever the data."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, attention_bias=True, mlp_bias=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        for block in model.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[constant_from:] = 0
            block.self_attn.v_proj.weight[8:] = 0  # the second head's values are its bias
    return model


IDS = torch.randint(20, (6, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("with_biases", [True, False])
def test_constant_channels_are_replaced_exactly(with_biases):
    """The trap of inverted masks, kept means and lost old biases: outputs must not change at all."""
    model = small()
    if not with_biases:
        for block in model.model.layers:
            block.self_attn.o_proj.bias = block.mlp.down_proj.bias = None
    dense = forward(model, as_batches(IDS)[0])
    made = sc.plan(model, "flap", 0.5, data=IDS, structure="ul_um")
    gone = {name: (~mask).nonzero().flatten().tolist() for name, mask in made.masks.items()}
    assert gone == {f"model.layers.{i}.{s}": [1] if s == HEAD else [3, 4, 5, 6] for i in (0, 1) for s in (HEAD, NEURON)}
    with sc.masked(model, made):
        torch.testing.assert_close(forward(model, as_batches(IDS)[0]), dense, rtol=1e-5, atol=1e-5)
    bare = sc.plan(model, "flap", 0.5, data=IDS, structure="ul_um", bias=False)
    assert not bare.weights
    with sc.masked(model, bare):
        assert (forward(model, as_batches(IDS)[0]) - dense).abs().max() > 0.1


def test_bias_is_what_removed_channels_gave_on_average():
    """Brute force: inputs of the dense model, the weight's removed columns, one after the other."""
    model = llama()
    made = planned(model)
    seen = {}
    hooks = [
        part.register_forward_hook(lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0].double()))
        for name, part in model.named_modules()
        if name.endswith(("o_proj", "down_proj"))
    ]
    for batch in as_batches(data().calibration):
        forward(model, batch)
    for hook in hooks:
        hook.remove()
    checked = 0
    for name, inputs in seen.items():
        site, width = (HEAD, 24) if name.endswith("o_proj") else (NEURON, 1)
        gone = ~made.masks[f"{name.rpartition('.')[0].rpartition('.')[0]}.{site}"].repeat_interleave(width)
        mean = torch.cat([x.flatten(0, 1) for x in inputs]).mean(0)
        expected = model.get_parameter(f"{name}.weight").double()[:, gone] @ mean[gone]
        assert (f"{name}.bias" in made.weights) == bool(gone.any())
        if gone.any():
            torch.testing.assert_close(made.weights[f"{name}.bias"].double(), expected, rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked == made.facts[next(iter(made.sites))]["compensated"] > 3


def test_the_bias_is_not_added_a_second_time():
    made = planned()
    with pytest.raises(PlanError, match="already"):
        compensate(made, llama(), data().calibration)


# --- budgets -----------------------------------------------------------------------------------------


def test_weights_of_units_are_their_parameters():
    """Multi-head Llama: 4 d_head / 3 neurons; with shared keys a group is worth its query heads and one key head."""
    sites = planned().sites
    assert sites[f"model.layers.0.{HEAD}"].cost / sites[f"model.layers.0.{NEURON}"].cost == 4 * 24 / 3
    grouped = planned(zoo.load_model("pydoc-llama-gqa")).sites
    group = next(site for name, site in grouped.items() if name.endswith("kv_group"))
    queries = 96 // group.units  # rows of q, and of o's columns, that go with a group
    assert group.cost == 96 * (2 * queries + 2 * 24)


@pytest.mark.parametrize("model", ["pydoc-llama", "pydoc-llama-gqa"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 0.6])
def test_weighted_total_is_met_within_one_head(model, share):
    made = planned(zoo.load_model(model), share)
    costs = {name: site.parameters / site.units for name, site in made.sites.items()}
    gone = sum(costs[name] * int((~mask).sum()) for name, mask in made.masks.items())
    total = sum(site.parameters for site in made.sites.values())
    assert -0.5 * max(costs.values()) <= gone - share * total <= 1.5 * max(costs.values())
    assert made.facts[next(iter(made.sites))]["weight_removed"] == pytest.approx(gone / total, abs=1e-6)
    assert len({made.kept(name) for name in made.sites if name.endswith("neuron")}) > 1  # widths differ


def test_no_layer_is_emptied():
    made = planned(share=0.93)
    assert min(made.kept(name) for name in made.sites) == 1


def test_structures_with_own_heads_count_exactly():
    over_all, in_each = (planned(structure=s, heads=4, share=0.4) for s in ("al_mm", "ul_mm"))
    for made in (over_all, in_each):
        heads = {n: int((~m).sum()) for n, m in made.masks.items() if n.endswith("head")}
        neurons = {n: int((~m).sum()) for n, m in made.masks.items() if n.endswith("neuron")}
        assert sum(heads.values()) == 4
        due = 0.4 * (16 * 32 + 1024) - 4 * 32  # in neurons
        assert 0 <= due - sum(neurons.values()) < (1 if made is over_all else 4)
    assert set(heads.values()) == {1}
    assert len(set(neurons.values())) == 1


def test_uniform_shares_and_own_shares_of_kinds():
    made = planned(structure="ul_um", share=0.3)
    assert [made.kept(name) for name in made.sites] == [3, 180] * 4
    own = Budget(0.5, per_kind=((UnitKind.HEAD, 0.25),))
    made = planned(structure="ul_um", share=None, budget=own)
    assert [made.kept(name) for name in made.sites] == [3, 128] * 4


@pytest.mark.parametrize("structure", ["al_am", "ul_um", "al_mm"])
def test_a_budget_in_parameters_is_met_from_below(structure):
    model, heads = llama(), 2 if structure == "al_mm" else None
    dense = sum(p.numel() for p in model.parameters())
    budget = Budget(0.7, Quantity.PARAMETERS)
    made = planned(model, None, budget=budget, structure=structure, heads=heads, bias=False)
    left = sum(p.numel() for p in sc.apply_(copy.deepcopy(model), made).parameters())
    assert 0 <= 0.7 - left / dense < 0.03


def test_settings_for_single_sites_and_widths():
    made = planned(multiple=16, shares="model.layers.0.*=0")
    kept = {name: made.kept(name) for name in made.sites}
    assert kept[f"model.layers.0.{NEURON}"] == 256
    assert kept[f"model.layers.0.{HEAD}"] == 4
    assert all(count % 16 == 0 for name, count in kept.items() if name.endswith("neuron"))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"heads": 3}, SettingsError, "al_mm or ul_mm"),
        ({"structure": "al_mm"}, SettingsError, "heads=N"),
        ({"structure": "al_mm", "heads": 16}, BudgetError, "heads=16 of 16"),
        ({"layout": "uniform"}, SettingsError, "ul_um"),
        ({"metric": "wanda_sp", "structure": "al_am"}, SettingsError, "layer by layer"),
        ({"scope": "global"}, SettingsError, "scope"),
        ({"steps": 2}, SettingsError, "steps"),
        ({"share": None, "budget": Budget(0.5, per_kind=((UnitKind.HEAD, 0.2),))}, BudgetError, "ul_um"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, error, words):
    with pytest.raises(error, match=words):
        planned(**settings)


# --- baselines, journal ------------------------------------------------------------------------------


def test_baselines_see_the_blocks_as_pruned():
    """The second block's inputs come from a first block without its units; FLAP's come from the dense one."""
    model = llama()
    made = planned(model, 0.5, metric="wanda_sp", keep_scores=True)
    assert not made.weights
    assert [made.kept(name) for name in made.sites] == [2, 128] * 4
    first = {name: mask for name, mask in made.masks.items() if ".0." in name}
    whole = planned(model, 0.5, metric="wifn", structure="ul_um", keep_scores=True)
    name = f"model.layers.1.{NEURON}"
    assert not torch.allclose(made.scores[name], whole.scores[name])
    with sc.masked(model, Plan({site: made.sites[site] for site in first}, first)):
        again = planned(model, 0.5, metric="wifn", structure="ul_um", keep_scores=True)
    torch.testing.assert_close(made.scores[name], again.scores[name], rtol=1e-4, atol=1e-6)


def test_magnitude_needs_no_look_at_the_data():
    made = planned(share=0.5, metric="mag_sp", keep_scores=True)
    weight = dict(llama().named_parameters())["model.layers.2.mlp.down_proj.weight"]
    torch.testing.assert_close(made.scores[f"model.layers.2.{NEURON}"], weight.detach().norm(dim=0))


def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    task = Task(llama(), Budget(0.4), as_batches(data().calibration), journal=Journal(tmp_path / "a"))
    with torch.no_grad():
        whole = plan(task, FLAPSettings())
        visited = []
        monkeypatch.setattr(TokenMoments, "__init__", stopping(TokenMoments.__init__, visited))
        with pytest.raises(KeyboardInterrupt):
            plan(replace(task, journal=Journal(tmp_path / "b")), FLAPSettings())
        monkeypatch.undo()
        again = plan(replace(task, journal=Journal(tmp_path / "b")), FLAPSettings())
    assert all(torch.equal(again.masks[name], mask) for name, mask in whole.masks.items())
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())
    assert set(again.weights) == set(whole.weights)


def stopping(real, visited):
    """A constructor that ends the run in the third block."""

    def init(self, features):
        visited.append(features)
        if len(visited) > 4:
            raise KeyboardInterrupt
        real(self, features)

    return init


def test_excluded_parts_stay_whole():
    made = planned(exclude=["*self_attn*", "model.layers.3.*"])
    assert list(made.sites) == [f"model.layers.{i}.{NEURON}" for i in range(3)]
    assert all(name.endswith("down_proj.bias") for name in made.weights)
