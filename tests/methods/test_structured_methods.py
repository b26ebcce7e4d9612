"""Methods on channels, neurons and heads: scores by hand, gradients by brute force, settings that do what they say."""

from __future__ import annotations

import copy
from itertools import pairwise
from math import floor

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError, UnknownNameError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.units import UnitKind

METHODS = ["channel_norm", "group_random", "group_taylor", "llm_pruner"]
IMAGES = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(1))
DATA = [Batch((IMAGES[:8],), target=LABELS[:8]), Batch((IMAGES[8:],), target=LABELS[8:])]
IDS = torch.randint(0, 40, (6, 8), generator=torch.Generator().manual_seed(2))
TEXT = [Batch((IDS[:4],)), Batch((IDS[4:],))]


class Net(nn.Module):
    """conv - norm - conv - linear; the second convolution has no norm."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.end = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.norm(self.a(x)).relu()).relu()
        return self.end(F.max_pool2d(x, 3).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.randn(8))
        model.norm.running_mean.copy_(torch.randn(8))
    return model


def llama(heads: int = 4, kv: int = 2, head_dim: int = 4, layers: int = 3, inner: int = 12) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=4 * heads,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def plan(model: nn.Module, method: str, sparsity: float | None = 0.5, **more: object) -> Plan:
    """With everything that could blur a count switched off, and raw scores."""
    data = TEXT if isinstance(model, LlamaForCausalLM) else DATA
    plain = {"multiple": 1, "normalise": "none", "keep_scores": True} | more
    return sc.plan(model, method, sparsity, data=data, **plain)


def rows(weight: Tensor, power: int) -> Tensor:
    return weight.detach().double().abs().pow(power).flatten(1).sum(1)


def columns(weight: Tensor, power: int) -> Tensor:
    return rows(weight.transpose(0, 1), power)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-7)


def lowest_gone(made: Plan, name: str, expected: Tensor) -> bool:
    """Whether the removed units are those with the lowest expected scores."""
    count = int((~made.masks[name]).sum())
    gone = (~made.masks[name]).nonzero().flatten().tolist()
    return sorted(torch.argsort(expected, stable=True)[:count].tolist()) == gone


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
def test_norms_of_producers_are_the_papers_filters(norm, power):
    model = net()
    made = plan(model, "channel_norm", norm=norm, members="producers")
    for name, layer in (("a:channel", model.a), ("b:channel", model.b)):
        expected = rows(layer.weight, power).pow(1 / power)
        assert close(made.scores[name], expected)
        assert lowest_gone(made, name, expected)


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("combine", ["mean", "sum", "max", "prod"])
def test_norms_of_all_members_by_hand(norm, power, combine):
    """Rows of the layer that makes a channel, columns of the layer that reads it; biases and norms have no say."""
    model = net()
    made = plan(model, "channel_norm", norm=norm, combine=combine)
    parts = {
        "a:channel": [rows(model.a.weight, power), columns(model.b.weight, power)],
        "b:channel": [rows(model.b.weight, power), rows(model.end.weight.t().reshape(6, -1), power)],
    }
    how = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "prod": torch.prod}[combine]
    for name, members in parts.items():
        assert close(made.scores[name], how(torch.stack(members), 0).pow(1 / power))


def test_batch_norm_scales():
    model = net()
    made = plan(model, "channel_norm", norm="bn", include=("a",))
    assert close(made.scores["a:channel"], model.norm.weight.abs())
    assert lowest_gone(made, "a:channel", model.norm.weight.detach().abs())


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("normalise", ["none", "mean", "max", "standard"])
def test_sites_without_a_norm_are_left_whole(normalise, scope):
    """They take no part in the share: 0.3 of the 8 channels that have a norm is 2, of all 14 it would be 4."""
    made = plan(net(), "channel_norm", norm="bn", normalise=normalise, scope=scope, sparsity=0.3)
    assert made.kept("b:channel") == 6
    assert made.kept("a:channel") == 6


def test_heads_are_scored_with_all_their_rows_and_columns():
    model = llama(4, 4)
    made = plan(model, "channel_norm", norm="l1", combine="sum", kinds="head")
    part = model.model.layers[1].self_attn
    expected = sum(rows(one.weight, 1).view(4, 4).sum(1) for one in (part.q_proj, part.k_proj, part.v_proj))
    expected = expected + columns(part.o_proj.weight, 1).view(4, 4).sum(1)
    assert close(made.scores["model.layers.1.self_attn:head"], expected)


def test_norms_need_no_data():
    made = sc.plan(net(), "channel_norm", 0.5, multiple=1, example=IMAGES[:2])
    assert made.provenance[0].data == {}
    assert made.kept("a:channel") == 4


# --- Taylor ---------------------------------------------------------------------------------------


ALL = slice(None)


def image_gradients(model: nn.Module, some: slice = ALL) -> dict[str, Tensor]:
    """dL/dw of the mean loss over all or some samples, in double precision, in one go."""
    twin = copy.deepcopy(model).double()
    F.cross_entropy(twin(IMAGES[some].double()), LABELS[some]).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def unit_terms(model: nn.Module, layer: str, some: slice = ALL) -> Tensor:
    """w * dL/dw of the weights and the bias of every output of a layer, `[out, weights + 1]`."""
    module, found = model.get_submodule(layer), image_gradients(model, some)
    weight = (module.weight.double() * found[f"{layer}.weight"]).flatten(1)
    bias = (module.bias.double() * found[f"{layer}.bias"])[:, None]
    return torch.cat([weight, bias], 1).detach()


@pytest.mark.parametrize("layer", ["a", "b"])
def test_absolute_taylor_scores_are_of_the_mean_loss(layer):
    made = plan(net(), "group_taylor", form="absolute")
    expected = unit_terms(net(), layer).abs().sum(1)
    assert torch.allclose(made.scores[f"{layer}:channel"].double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("samples", "starts"), [(1, range(12)), (4, (0, 4, 8)), (3, (0, 3, 6, 8, 11))])
@pytest.mark.parametrize("layer", ["a", "b"])
def test_squared_taylor_scores_are_means_over_samples(layer, samples, starts):
    """The mean of (sum of w g)^2 over parts of so many samples; no part goes over the end of a batch."""
    made = plan(net(), "group_taylor", samples=samples)
    parts = [slice(a, min(b, a + samples)) for a, b in pairwise((*starts, 12))]
    squares = [unit_terms(net(), layer, part).sum(1).square() for part in parts]
    expected = torch.stack(squares).mean(0)
    assert torch.allclose(made.scores[f"{layer}:channel"].double(), expected, rtol=1e-3, atol=1e-9)


def test_taylor_with_all_members_adds_the_readers():
    model = net()
    made = plan(model, "group_taylor", form="absolute", members="all")
    found = image_gradients(model)
    terms = {name: (p.double() * found[name]).abs().detach() for name, p in model.named_parameters()}
    expected = terms["a.weight"].flatten(1).sum(1) + terms["a.bias"] + terms["b.weight"].sum((0, 2, 3))
    assert torch.allclose(made.scores["a:channel"].double(), expected, rtol=1e-3, atol=1e-9)


def test_the_gradient_is_that_of_silencing_the_unit():
    """(sum of w g) is the slope of a sample's loss when the unit's layer output is scaled: by finite differences."""
    model = net().double()
    data = [Batch((batch.args[0].double(),), target=batch.target) for batch in DATA]
    made = sc.plan(model, "group_taylor", 0.5, data=data, multiple=1, normalise="none", keep_scores=True)

    def losses(channel: int, scale: float) -> Tensor:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.b.weight[channel] *= scale
            twin.b.bias[channel] *= scale
            return F.cross_entropy(twin(IMAGES.double()), LABELS, reduction="none")

    step = 1e-4
    for channel in range(6):
        slopes = (losses(channel, 1 + step) - losses(channel, 1 - step)) / (2 * step)
        expected = float(slopes.square().mean())
        assert float(made.scores["b:channel"][channel]) == pytest.approx(expected, rel=2e-2, abs=1e-9)


def test_how_the_data_is_batched_does_not_matter():
    model = net()
    whole = sc.plan(model, "group_taylor", 0.5, data=[Batch((IMAGES,), target=LABELS)], multiple=1, keep_scores=True)
    parts = sc.plan(model, "group_taylor", 0.5, data=DATA, multiple=1, keep_scores=True)
    for name in whole.sites:
        assert torch.allclose(whole.scores[name], parts.scores[name], rtol=1e-3)
        assert torch.equal(whole.masks[name], parts.masks[name])


def test_data_and_labels_are_asked_for():
    with pytest.raises(DataError, match="group_taylor needs calibration data"):
        sc.plan(net(), "group_taylor", 0.5)
    with pytest.raises(DataError, match="the data has no labels and is not text; give data with labels"):
        sc.plan(net(), "group_taylor", 0.5, data=IMAGES)


# --- LLM-Pruner -----------------------------------------------------------------------------------


def text_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of the mean next-token loss over all sequences."""
    twin = copy.deepcopy(model).double()
    logits = twin(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def terms_of(model: nn.Module, salience: str) -> dict[str, Tensor]:
    """The salience of every single weight."""
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    first = {name: weights[name] * gradient for name, gradient in text_gradients(model, IDS).items()}
    singles = [text_gradients(model, IDS[i : i + 1]) for i in range(len(IDS))]
    second = {name: weights[name] ** 2 * sum(one[name] ** 2 for one in singles) / len(singles) for name in weights}
    mix = {name: first[name] - second[name] / 2 for name in weights}
    return {"param_first": first, "param_second": second, "param_mix": mix}[salience]


def reduced(terms: Tensor, dim: int, reduce: str) -> Tensor:
    return terms.abs().sum(1 - dim) if reduce == "element" else terms.sum(1 - dim).abs()


@pytest.mark.parametrize("reduce", ["element", "vectorize"])
@pytest.mark.parametrize("salience", ["param_first", "param_second", "param_mix"])
def test_saliences_by_hand(salience, reduce):
    model = llama()
    made = plan(model, "llm_pruner", salience=salience, reduce=reduce)
    terms = terms_of(model, salience)
    prefix = "model.layers.1.mlp"
    expected = sum(
        reduced(terms[f"{prefix}.{part}.weight"], dim, reduce)
        for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
    )
    name = f"{prefix}.gate_proj:neuron"
    assert torch.allclose(made.scores[name].double(), expected, rtol=1e-3, atol=1e-9)
    assert lowest_gone(made, name, expected)


@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (6, 2), (6, 3), (4, 4)])
def test_query_head_h_belongs_to_key_head_h_over_repeats(heads, kv):
    model = llama(heads, kv)
    made = plan(model, "llm_pruner")
    terms = terms_of(model, "param_first")
    prefix, repeats = "model.layers.1.self_attn", heads // kv
    expected = torch.zeros(kv, dtype=torch.float64)
    for head in range(heads):
        rows_ = slice(head * 4, head * 4 + 4)
        expected[head // repeats] += terms[f"{prefix}.q_proj.weight"][rows_].abs().sum()
        expected[head // repeats] += terms[f"{prefix}.o_proj.weight"][:, rows_].abs().sum()
    for group in range(kv):
        rows_ = slice(group * 4, group * 4 + 4)
        for part in ("k_proj", "v_proj"):
            expected[group] += terms[f"{prefix}.{part}.weight"][rows_].abs().sum()
    name = f"{prefix}:{'kv_group' if repeats > 1 else 'head'}"
    assert torch.allclose(made.scores[name].double(), expected, rtol=1e-3)
    assert lowest_gone(made, name, expected)


@pytest.mark.parametrize(("combine", "how"), [("max", torch.amax), ("mean", torch.mean), ("prod", torch.prod)])
def test_a_groups_matrices_are_combined(combine, how):
    model = llama()
    made = plan(model, "llm_pruner", combine=combine)
    terms = terms_of(model, "param_first")
    prefix = "model.layers.1.mlp"
    parts = [
        reduced(terms[f"{prefix}.{part}.weight"], dim, "element")
        for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
    ]
    assert torch.allclose(made.scores[f"{prefix}.gate_proj:neuron"].double(), how(torch.stack(parts), 0), rtol=1e-3)


@pytest.mark.parametrize("kinds", ["auto", "head", "kv_group", "neuron"])
def test_coupled_rows_and_columns_cannot_be_torn_apart(kinds):
    """Whatever goes, the model still runs: every projection of a block agrees with its neighbours."""
    model = llama()
    sc.apply_(model, plan(model, "llm_pruner", kinds=kinds))
    for layer in model.model.layers:
        part, mlp = layer.self_attn, layer.mlp
        assert part.k_proj.out_features == part.v_proj.out_features
        assert part.q_proj.out_features == part.o_proj.in_features
        assert part.q_proj.out_features % part.k_proj.out_features == 0
        assert mlp.gate_proj.out_features == mlp.up_proj.out_features == mlp.down_proj.in_features
    assert model(IDS, use_cache=False).logits.shape == (6, 8, 40)


def pruned_blocks(made: Plan) -> set[int]:
    return {int(name.split(".")[2]) for name in made.sites}


@pytest.mark.parametrize(
    ("layers", "settings", "expected"),
    [
        (3, {}, {0, 1, 2}),
        (10, {}, set(range(1, 9))),
        (4, {"first": 1, "last": 3}, {1, 2}),
        (4, {"first": 3}, {3}),
        (4, {"last": 1}, {0}),
    ],
)
def test_only_blocks_in_the_range_are_pruned(layers, settings, expected):
    assert pruned_blocks(plan(llama(layers=layers), "llm_pruner", **settings)) == expected


def test_the_papers_blocks_are_the_default_of_32():
    """Blocks 4 to 29 of 32 in the published scripts; here the first tenth and the last sixteenth stay."""
    from secateur.methods.llm.llm_pruner import LLMPrunerSettings, in_blocks

    with torch.device("meta"):
        model = llama(layers=32)
    blocks = in_blocks(model, LLMPrunerSettings())
    assert (blocks[0], blocks[-1]) == ("model.layers.3", "model.layers.29")


@pytest.mark.parametrize("settings", [{"first": 3}, {"first": 2, "last": 2}, {"last": 4}])
def test_an_empty_range_is_refused(settings):
    with pytest.raises(BudgetError, match=r"name no block of 'model\.layers', which has 3"):
        plan(llama(), "llm_pruner", **settings)


def test_models_without_blocks_are_refused():
    with pytest.raises(ModelError, match="Net has no list of blocks"):
        plan(net(), "llm_pruner")


def test_parameters_after_a_cut_are_what_the_paper_counts():
    """B3's check on a small config: a share of heads and neurons of every pruned block, nothing else."""
    model = llama(4, 4, layers=4)
    dense = sum(parameter.numel() for parameter in model.parameters())
    made = plan(model, "llm_pruner", 0.25, first=1, last=3)
    sc.apply_(model, made)
    heads, neurons = floor(0.25 * 4), floor(0.25 * 12)
    gone = 2 * (heads * 4 * 4 * 16 + neurons * 3 * 16)
    assert sum(parameter.numel() for parameter in model.parameters()) == dense - gone
    assert [layer.mlp.gate_proj.out_features for layer in model.model.layers] == [12, 9, 9, 12]
    assert [layer.self_attn.q_proj.out_features for layer in model.model.layers] == [16, 12, 12, 16]
    assert made.facts[next(iter(made.sites))]["parameters_kept"] == pytest.approx(1 - gone / dense, abs=1e-6)


# --- what all of them share -----------------------------------------------------------------------


def on(method: str) -> nn.Module:
    return llama() if method == "llm_pruner" else net()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_plan_and_the_model_is_left(method):
    model = on(method).train()
    before = copy.deepcopy(model.state_dict())
    first, second = plan(model, method, seed=3), plan(model, method, seed=3)
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in first.scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_random_scores_depend_on_the_seed_and_the_site_alone():
    first, second = plan(net(), "group_random", seed=0), plan(net(), "group_random", seed=1)
    assert not torch.equal(first.scores["a:channel"], second.scores["a:channel"])
    alone = plan(net(), "group_random", seed=0, include=("b",))
    assert torch.equal(alone.scores["b:channel"], first.scores["b:channel"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_every_site_loses_the_exact_share(method, sparsity):
    made = plan(on(method), method, sparsity)
    for name, site in made.sites.items():
        assert made.kept(name) == max(1, site.units - floor(sparsity * site.units))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [2, 3])
def test_several_steps_end_at_the_same_counts(method, steps):
    model = on(method)
    before = copy.deepcopy(model.state_dict())
    once, often = plan(model, method), plan(model, method, steps=steps)
    assert [often.kept(name) for name in often.sites] == [once.kept(name) for name in once.sites]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_steps_score_the_smaller_model_again():
    """After the first step only what is left of `b`'s readers counts: by hand for two steps."""
    model = net()
    made = plan(model, "channel_norm", norm="l1", combine="sum", steps=2)
    first = plan(model, "channel_norm", 0.25, norm="l1", combine="sum")
    a, b = first.masks["a:channel"], first.masks["b:channel"]
    expected = rows(model.a.weight, 1) + columns(model.b.weight[b], 1)
    assert close(made.scores["a:channel"][a], expected[a])
    assert bool((made.scores["a:channel"][~a] == -torch.inf).all())
    assert lowest_gone(made, "a:channel", torch.where(a, expected, -torch.inf))


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_sites_that_come_down_to_one_unit_count_on_in_a_common_ranking(steps):
    """Of 16 units half go, whatever step the first site was down to its last in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[1:] *= 1e-4
        model[2].weight[:, 1:] *= 1e-4
    given = {"scope": "global", "normalise": "max", "largest_cut": 1.0, "multiple": 1, "steps": steps}
    for share, left in ((0.5, [1, 7]), (0.9, [1, 1])):
        made = sc.plan(model, "channel_norm", share, example=torch.randn(2, 4), **given)
        assert [int(mask.sum()) for mask in made.masks.values()] == left


def test_own_shares_of_all_sites_leave_nothing_to_rank():
    made = plan(net(), "channel_norm", shares="*=0.25", scope="global")
    assert [int(mask.sum()) for mask in made.masks.values()] == [6, 5]


def test_shares_are_for_the_layers_that_make_the_units():
    made = plan(net(), "channel_norm", shares="a=0.25,b=0")
    assert (made.kept("a:channel"), made.kept("b:channel")) == (6, 6)


def test_own_shares_of_single_sites():
    made = plan(net(), "channel_norm", shares="a:channel=0.25,b:channel=0")
    assert (made.kept("a:channel"), made.kept("b:channel")) == (6, 6)
    made = plan(llama(), "channel_norm", shares="model.layers.0.*=0")
    assert {made.kept(name) == site.units for name, site in made.sites.items() if ".0." in name} == {True}
    assert {made.kept(name) == site.units for name, site in made.sites.items() if ".1." in name} == {False}


def test_own_shares_are_read_as_decimals():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 3))
    made = sc.plan(model, "channel_norm", 0.5, example=torch.randn(2, 4), multiple=1, shares="0=0.29")
    assert made.kept("0:neuron") == 71


@pytest.mark.parametrize("shares", ["a", "a=", "a=much", "a=1", "a=-0.1", "a=nan"])
def test_malformed_shares_are_refused(shares):
    with pytest.raises(SettingsError, match=r"shares: '.*' is not of the form pattern=share with a share in \[0, 1\)"):
        plan(net(), "channel_norm", shares=shares)


def test_shares_of_layers_that_do_not_exist_are_refused():
    with pytest.raises(SettingsError, match="nowhere"):
        plan(net(), "channel_norm", shares="nowhere=0.5")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("auto", {UnitKind.KV_GROUP, UnitKind.NEURON}),
        ("neuron", {UnitKind.NEURON}),
        ("head", {UnitKind.HEAD}),
        ("head, neuron", {UnitKind.HEAD, UnitKind.NEURON}),
        ("head_dim", {UnitKind.HEAD_DIM}),
        ("embedding", {UnitKind.EMBEDDING}),
    ],
)
def test_kinds(kinds, expected):
    model = llama()
    made = plan(model, "channel_norm", kinds=kinds)
    assert set(made.kinds) == expected
    sc.apply_(model, made)


def test_kinds_that_do_not_exist_are_refused():
    with pytest.raises(UnknownNameError, match=r"unknown kind of unit 'chanel'; did you mean channel"):
        plan(net(), "channel_norm", kinds="chanel")
    with pytest.raises(ModelError, match=r"nothing is left to cut in Net: kinds of unit found: channel; see"):
        plan(net(), "channel_norm", kinds="expert")


def test_patterns_choose_layers():
    model = llama()
    assert pruned_blocks(plan(model, "channel_norm", include=("model.layers.1",))) == {1}
    assert pruned_blocks(plan(model, "channel_norm", exclude=("model.layers.1",))) == {0, 2}
    assert pruned_blocks(plan(model, "channel_norm", exclude=("*.mlp", "model.layers.0.*"))) == {1, 2}
    assert set(plan(model, "channel_norm", exclude=("*.self_attn",)).kinds) == {UnitKind.NEURON}
    assert set(plan(model, "channel_norm", include=("*.mlp",)).kinds) == {UnitKind.NEURON}


def test_a_layer_that_is_excluded_keeps_its_shape_on_both_sides():
    """`b` reads what `a` makes: excluding `b` keeps both ends."""
    model = net()
    made = plan(model, "channel_norm", exclude=("end",))
    assert list(made.sites) == ["a:channel"]
    with pytest.raises(ModelError, match="nothing is left to cut in Net"):
        plan(model, "channel_norm", exclude=("b",))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantity", ["parameters", "flops"])
def test_budgets_in_what_it_costs(method, quantity):
    model = llama(inner=96)
    dense = sum(parameter.numel() for parameter in model.parameters())
    made = plan(model, method, None, budget=sc.Budget(0.8, quantity))
    facts = made.facts[next(iter(made.sites))]
    kept = facts["flops_kept" if quantity == "flops" else "parameters_kept"]
    assert 0.79 <= kept <= 0.8 + 1e-6
    sc.apply_(model, made)
    assert sum(parameter.numel() for parameter in model.parameters()) / dense == pytest.approx(
        facts["parameters_kept"], abs=1e-6
    )


@pytest.mark.parametrize("method", METHODS)
def test_budgets_in_bytes_are_those_of_the_file(method):
    model = llama(inner=96)
    dense = len(save(model.state_dict()))
    sc.apply_(model, plan(model, method, None, budget=sc.Budget(0.8, "bytes")))
    assert len(save(model.state_dict())) / dense == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_budgets_out_of_reach_give_the_range(method):
    with pytest.raises(BudgetError, match=r"is out of reach: the sites that may be cut allow .* to 1 of the dense"):
        plan(llama(), method, None, budget=sc.Budget(0.01, "parameters"))


@pytest.mark.parametrize("budget", [sc.Budget(1, "flops"), sc.Budget(1, "parameters"), sc.Budget(0)])
def test_a_budget_that_asks_for_nothing_removes_nothing(budget):
    made = plan(net(), "channel_norm", None, budget=budget)
    assert made.sparsity == 0
    assert not made.warnings


@pytest.mark.parametrize("quantity", ["units"])
def test_numbers_of_units_are_refused(quantity):
    with pytest.raises(BudgetError, match="structured methods take a sparsity, or a budget in parameters"):
        plan(net(), "channel_norm", None, budget=sc.Budget(5, quantity))


def test_amounts_for_single_kinds():
    kinds = ((UnitKind.NEURON, 0.25), (UnitKind.HEAD, 0.5))
    made = plan(llama(4, 4), "channel_norm", None, budget=sc.Budget(0.75, per_kind=kinds))
    shares = {site.kind: 1 - made.kept(name) / site.units for name, site in made.sites.items()}
    assert shares == {UnitKind.HEAD: 0.5, UnitKind.NEURON: 0.25}


def wide_and_narrow() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_floor_holds_and_a_site_that_it_holds_back_is_named():
    given = {"example": torch.randn(2, 4), "multiple": 1}
    made = sc.plan(wide_and_narrow(), "channel_norm", budget=sc.Budget(0.5, floor=6), **given)
    assert (made.kept("0:neuron"), made.kept("2:neuron")) == (32, 6)
    (said,) = made.warnings
    assert said.startswith("1 of 2 sites cannot lose what sparsity 0.5 asks, '2:neuron' first: every site keeps 6 ")
    assert not sc.plan(wide_and_narrow(), "channel_norm", 0.5, **given).warnings
    both = sc.plan(wide_and_narrow(), "channel_norm", budget=sc.Budget(0.5, floor=6), scope="global", **given)
    assert both.units() == (36, 72)  # others go instead
    assert not both.warnings


@pytest.mark.parametrize(
    ("amount", "words", "more"),
    [
        (0.95, r"sparsity 0.95 is out of reach: of 72 units that may be cut, at most 64 \(0.8889\) can go", {}),
        (0.95, r"every site keeps 1 unit and 0.1 of its units \(largest_cut=0.9\)", {"steps": 3}),
        (0.9, r"at most 36 \(0.5\)", {"largest_cut": 0.5, "scope": "global"}),
        (sc.Budget(0.5, per_kind=((UnitKind.NEURON, 0.95),)), r"sparsity 0\.95 is out of reach", {}),
        (
            sc.Budget(0.8, floor=40),
            r"of 72 units that may be cut, at most 24 .* every site keeps 40 units \(--minimum\)$",
            {"largest_cut": 1.0},
        ),
    ],
)
def test_a_sparsity_that_floors_do_not_allow_is_refused(amount, words, more):
    budget = amount if isinstance(amount, sc.Budget) else sc.Budget(amount)
    with pytest.raises(BudgetError, match=words):
        sc.plan(wide_and_narrow(), "channel_norm", budget=budget, example=torch.randn(2, 4), **more)


def test_the_largest_cut_itself_can_be_asked_for():
    given = {"example": torch.randn(2, 4), "multiple": 1, "largest_cut": 0.5}
    assert sc.plan(wide_and_narrow(), "channel_norm", 0.5, **given).units() == (36, 72)


def test_a_density_of_single_kinds_is_reached_in_steps():
    kinds = ((UnitKind.NEURON, 0.5), (UnitKind.HEAD, 0.75))
    budget = sc.Budget(0.8, "density", per_kind=kinds)
    one, more = (plan(llama(4, 4), "channel_norm", None, budget=budget, steps=steps) for steps in (1, 4))
    assert [more.kept(name) for name in more.sites] == [one.kept(name) for name in one.sites]


def grouped(groups: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, padding=1, groups=groups), nn.ReLU(),
        nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["local", "global"])
def test_groups_may_come_down_to_one_before_the_last_step(scope):
    """The convolution is no grouped one any more then, and its site stands for the channels of the last group."""
    example = torch.randn(2, 3, 8, 8)
    given = {"multiple": 1, "example": example, "scope": scope, "steps": 4, "largest_cut": 1.0}
    model = grouped()
    made = sc.plan(model, "channel_norm", 0.85, **given)
    for name, site in made.sites.items():
        assert 1 <= made.kept(name) <= site.units
    kept, total = made.units()
    if scope == "global":
        assert total - kept == floor(0.85 * total)
    sc.apply_(model, made)
    assert model[2].groups == made.kept("0:channel") == 1
    assert model(example).shape == (2, 4)


def test_only_the_last_step_is_held_to_one_percent():
    """Whole blocks of widths: what lies between may be far from any share on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    given = {"example": torch.randn(2, 4), "multiple": 1, "largest_cut": 1.0}
    reached = set()
    for steps in (1, 2, 3, 5):
        made = sc.plan(model, "channel_norm", budget=sc.Budget(28 / 60, "parameters"), steps=steps, **given)
        reached.add(next(iter(made.facts.values()))["parameters_kept"])
    assert all(27.4 / 60 < share <= 28 / 60 + 1e-6 for share in reached)
    with pytest.raises(BudgetError, match=r"parameters 0.5 cannot be met within 1%.*; ask for another amount$"):
        sc.plan(model, "channel_norm", budget=sc.Budget(0.5, "parameters"), steps=3, **given)
    with pytest.raises(BudgetError, match=r"parameters 0.01 is out of reach"):
        sc.plan(model, "channel_norm", budget=sc.Budget(0.01, "parameters"), steps=3, **given)


def test_widths_are_multiples_where_layers_are_wide():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 20), nn.ReLU(), nn.Linear(20, 3))
    made = sc.plan(model, "channel_norm", 0.37, example=torch.randn(2, 4))
    assert made.kept("0:neuron") == 64
    assert made.kept("2:neuron") == 14  # 13, as a multiple of 2: 20 is twice 8 and no more


def test_uniform_layouts_keep_equal_numbers_in_every_block():
    made = plan(llama(inner=24), "channel_norm", scope="global", layout="uniform", normalise="mean")
    for kind in made.kinds:
        assert len({made.kept(name) for name, site in made.sites.items() if site.kind is kind}) == 1


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_wider_scopes_remove_the_share_of_all_units(scope):
    made = plan(llama(inner=24), "channel_norm", 0.25, scope=scope, kinds="neuron")
    kept, total = made.units()
    assert total - kept == floor(0.25 * total)


def test_nan_scores_are_refused_by_name():
    model = net()
    with torch.no_grad():
        model.b.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layer 'b\.weight' has NaN"):
        plan(model, "channel_norm")


@pytest.mark.parametrize("method", METHODS)
def test_meta_models_are_refused(method):
    with torch.device("meta"):
        model = on(method)
    with pytest.raises(ModelError, match="weights are on the meta device, and scores need their values"):
        plan(model, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_formats(method, dtype):
    model = on(method).to(dtype)
    data = TEXT if method == "llm_pruner" else [Batch((b.args[0].to(dtype),), target=b.target) for b in DATA]
    made = sc.plan(model, method, 0.5, data=data, multiple=1)
    sc.apply_(model, made)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("method", ["channel_norm", "group_taylor", "group_random"])
def test_operators_without_a_rule_are_warned_of(method):
    class Odd(Net):
        def forward(self, x):
            x = self.b(self.norm(self.a(x)).relu())
            return self.end(F.max_pool2d(torch.fft.fft(x, dim=1).real, 3).flatten(1))

    torch.manual_seed(0)
    made = plan(Odd().eval(), method)
    assert list(made.sites) == ["a:channel"]
    assert any("_fft_" in warning and "it was left whole" in warning for warning in made.warnings)
