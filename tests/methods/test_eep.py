"""EEP against a block written out by hand, its moves, its refusals, and what becomes of the found matrices."""

import copy
from itertools import pairwise

import pytest
import torch
import transformers as tr
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import BudgetError, DataError, ModelError, SettingsError
from secateur.core.journal import Journal
from secateur.core.method import Batch
from secateur.methods.experts.eep import EEPSettings, coefficients, eep_search, grouped, judged
from secateur.scores.routing import Usage, watching
from secateur.search.held_out import Fitness, halves
from secateur.search.merging import Mixing, Phases, matrix, one_hot, rows_of
from secateur.shrink.experts import Coefficients, check_mapping, mix_
from secateur.shrink.load import load
from secateur.shrink.save import save
from secateur.structure.analysis import analyse
from secateur.structure.experts import find_experts

TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "eos_token_id": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
COMMON = {**TEXT, **HEADS, "num_experts_per_tok": 2, "bos_token_id": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEP = COMMON | LATENT | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DEEP |= {"moe_intermediate_size": 12, "n_shared_experts": 1}
IDS = torch.arange(8 * 9).reshape(8, 9) * 7 % 61 + 3
EXAMPLE = Batch((IDS[:2],))
SHORT = {"initial": 4, "discrete": 8, "total": 16}


@torch.no_grad()
def lively(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def mixtral(**more):
    torch.manual_seed(0)
    return lively(tr.MixtralForCausalLM(tr.MixtralConfig(**COMMON | {"num_local_experts": 6} | more)))


def qwen2():
    torch.manual_seed(0)
    sizes = {"num_experts": 6, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return lively(tr.Qwen2MoeForCausalLM(tr.Qwen2MoeConfig(**COMMON, **sizes, norm_topk_prob=False)))


def deepseek(kind="V3"):
    torch.manual_seed(0)
    config = tr.DeepseekV3Config(**DEEP) if kind == "V3" else tr.DeepseekV2Config(**DEEP, topk_method="greedy")
    return lively((tr.DeepseekV3ForCausalLM if kind == "V3" else tr.DeepseekV2ForCausalLM)(config))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.top_k = 5, 2
        self.router, self.members = nn.Linear(8, 5), nn.ModuleList(Expert() for _ in range(5))

    def forward(self, x):
        shares, places = self.router(x).softmax(-1).topk(self.top_k, -1)
        shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index in range(self.num_experts):
            rows, slot = torch.where(places == index)
            if len(rows):
                out = out.index_add(0, rows, self.members[index](x[rows]) * shares[rows, slot, None])
        return x + out


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Layer(), Layer()]), nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def listed():
    torch.manual_seed(1)
    return Listed().eval()


X = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))


def layers_of(model, example=EXAMPLE):
    return find_experts(model, analyse(model, example), example).layers


def general(layer, kept, seed=0, least=0.0):
    rng = torch.Generator().manual_seed(seed)
    merge, route = torch.randn(kept, layer.count, generator=rng), torch.rand(kept, layer.count, generator=rng) + least
    return Coefficients(merge, route)


# --- the formula ----------------------------------------------------------------------------------


def by_hand(block, x, found, chosen=2, divide=True):
    """Mixtral's block as the paper writes it, in float64."""
    p = F.linear(x, block.gate.weight).double().softmax(-1) @ found.route.double().t()
    best, places = p.topk(chosen, -1)
    shares = best / best.sum(-1, keepdim=True) if divide else best
    gate_up, down = (
        torch.einsum("kn,nab->kab", found.merge.double(), w.double())
        for w in (block.experts.gate_up_proj, block.experts.down_proj)
    )
    out = torch.zeros_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for share, place in zip(shares[row], places[row], strict=True):
            gate, up = (gate_up[place] @ x[row].double()).chunk(2)
            out[row] += share * (down[place] @ (F.silu(gate) * up))
    return out


@torch.no_grad()
def test_a_mixed_block_is_the_paper_s_formula():
    model = mixtral()
    layer, block = layers_of(model)[0], model.model.layers[0].mlp
    found, x = general(layer, 3), torch.randn(20, 16)
    found.route[0, 1] = -0.05  # entries may be negative as long as the chosen sums are not
    expected = by_hand(block, x, found)
    undo = mix_(model, [layer], {layer.name: found})
    torch.testing.assert_close(block(x[None])[0].double(), expected, atol=1e-5, rtol=1e-4)
    for name in ("gate_up_proj", "down_proj"):
        assert getattr(block.experts, name).shape[0] == 3
    undo()
    assert block.experts.gate_up_proj.shape[0] == 6


@torch.no_grad()
def test_merged_weights_are_the_linear_combination():
    model = mixtral()
    layer, experts = layers_of(model)[1], model.model.layers[1].mlp.experts
    before, found = copy.deepcopy(experts.state_dict()), general(layer, 4)
    mix_(model, [layer], {layer.name: found})
    for name, value in before.items():
        expected = torch.einsum("kn,nab->kab", found.merge.double(), value.double())
        torch.testing.assert_close(getattr(experts, name).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [mixtral, qwen2, lambda: deepseek("V2")])
@torch.no_grad()
def test_identity_changes_nothing_and_a_mapped_choice_is_a_sliced_one(make):
    model = make()
    dense, layers = model(IDS).logits, layers_of(model)
    whole = {layer.name: Coefficients(torch.eye(6), torch.eye(6)) for layer in layers}
    undo = mix_(model, layers, whole)
    torch.testing.assert_close(model(IDS).logits, dense, atol=1e-5, rtol=0)
    undo()
    rows = matrix((4, 0, 3), 6)
    choice = {layer.name: Coefficients(rows, rows) for layer in layers}
    undo = mix_(model, layers, choice)
    mapped = model(IDS).logits
    undo()
    undo = mix_(model, layers, choice, mapped=False)
    torch.testing.assert_close(model(IDS).logits, mapped, atol=1e-5, rtol=0)
    undo()
    assert torch.equal(model(IDS).logits, dense)
    assert (mapped - dense).abs().max() > 0.01


@torch.no_grad()
def test_deleting_after_the_softmax_and_dividing_is_deleting_before_it():
    model = mixtral()
    layer, block, x = layers_of(model)[0], model.model.layers[0].mlp, torch.randn(20, 16)
    rows = matrix((1, 2, 5), 6)
    expected = by_hand(block, x, Coefficients(rows, rows))
    mix_(model, [layer], {layer.name: Coefficients(rows, rows)}, mapped=False)
    torch.testing.assert_close(block(x[None])[0].double(), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_lists_of_expert_modules_are_mixed_alike():
    model, example = listed(), Batch((X[:4],))
    layers = layers_of(model, example)
    assert [(layer.name, layer.count, layer.chosen) for layer in layers] == [("layers.0", 5, 2), ("layers.1", 5, 2)]
    found, block = general(layers[0], 3), model.layers[0]
    p = (block.router(X).double().softmax(-1) @ found.route.double().t()).topk(2, -1)

    def mixture(part):
        tensors = [member.get_parameter(part) for member in block.members]
        return torch.stack([sum(m * t for m, t in zip(row, tensors, strict=True)) for row in found.merge])

    up, down, up_bias, down_bias = map(mixture, ("up.weight", "down.weight", "up.bias", "down.bias"))
    each = torch.einsum("kfh,nkh->nkf", down, (torch.einsum("khf,nf->nkh", up, X) + up_bias).relu()) + down_bias
    shares = torch.zeros(len(X), 3).scatter(1, p.indices, (p.values / p.values.sum(1, keepdim=True)).float())
    undo = mix_(model, layers[:1], {"layers.0": found})
    torch.testing.assert_close(block(X), X + (shares[..., None] * each).sum(1), atol=1e-4, rtol=1e-4)
    assert len(block.members) == block.num_experts == 3
    undo()
    assert len(block.members) == block.num_experts == 5


# --- what is found --------------------------------------------------------------------------------


def test_shared_experts_and_dense_layers_are_left_whole_with_a_note():
    model = deepseek()
    found = find_experts(model, analyse(model, EXAMPLE), EXAMPLE)
    assert [layer.name for layer in found.layers] == ["model.layers.1.mlp"]
    assert not any("shared" in name for names in found.layers[0].tensors for name in names)
    notes = " | ".join(found.notes)
    assert "'model.layers.1.mlp.shared_experts' stays whole: every token takes it" in notes
    assert "'model.layers.0' has no router" in notes


def test_experts_that_share_weights_are_left_whole_with_a_note():
    model = mixtral()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    found = find_experts(model, analyse(model, EXAMPLE), EXAMPLE)
    assert found.layers == []
    model = listed()
    model.layers[1].members[0].up.weight = model.layers[1].members[1].up.weight
    found = find_experts(model, analyse(model, Batch((X[:4],))), Batch((X[:4],)))
    assert [layer.name for layer in found.layers] == ["layers.0"]
    assert "share weights" in found.notes[0]


def test_experts_that_all_run_are_no_routed_experts():
    class Averaged(Layer):
        def forward(self, x):
            shares = self.router(x).softmax(-1)
            return x + sum(shares[:, i : i + 1] * member(x) for i, member in enumerate(self.members))

    assert layers_of(nn.Sequential(Averaged(), nn.Linear(8, 3)).eval(), Batch((X[:4],))) == []


def test_a_router_without_a_softmax_cannot_be_mapped_but_folded():
    model = deepseek()
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.gate.*router=fold"):
        check_mapping(model, layers_of(model), EXAMPLE)
    with pytest.raises(ModelError, match="router=fold"):
        sc.plan(model, "eep", 0.5, data=IDS, **SHORT)
    plan = sc.plan(model, "eep", 0.5, data=IDS, router="fold", **SHORT)
    dense = model(IDS).logits
    with sc.masked(model, plan):
        assert model.model.layers[1].mlp.gate.weight.shape[0] == 3
    assert torch.equal(model(IDS).logits, dense)


def test_a_model_without_experts_is_refused():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ModelError, match="no block of experts"):
        sc.plan(net, "eep", 0.5, data=[(X, torch.zeros(40).long())])


def test_usage_counts_tokens_and_shares():
    model = mixtral()
    layer, x = layers_of(model)[0], torch.randn(30, 16)
    usage = Usage(6, 2)
    with torch.no_grad(), watching(model, {layer.gate: usage}):
        model.model.layers[0].mlp(x[None])
    p = F.linear(x, model.model.layers[0].mlp.gate.weight).softmax(-1)
    counts, shares = torch.zeros(6), torch.zeros(6)
    for row in p:
        best = row.argsort(descending=True)[:2]
        counts[best] += 1
        shares[best] += (row[best] / row[best].sum()).detach()
    assert torch.equal(usage.frequency.float(), counts)
    torch.testing.assert_close(usage.activation.float(), shares)
    assert usage.tokens == 30


# --- the moves ------------------------------------------------------------------------------------


def mixing(**more):
    rates = {"change": 0.5, "replace": 0.3, "entry": 0.15, "scale": 0.05, "cross": 0.5, "front": 0.5, "norm": 0.5}
    return Mixing(**{"experts": (8, 8, 6), "kept": (4, 4, 2), **rates, "fold": False, **more})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rows_keep_their_values():
    rows = (2, (0.25, -0.5, 0.0), 0)
    assert rows_of(matrix(rows, 3)) == rows
    assert [one_hot(rows), one_hot((2, 0)), one_hot((1, 1))] == [False, True, False]


def test_first_phase_keeps_rows_distinct_and_both_matrices_equal():
    moves, parents = mixing(), [mixing().start([], rng(seed)) for seed in range(5)]
    for seed in range(200):
        child = moves.pruned(parents, rng(seed))
        assert all(merge == route and one_hot(merge) for merge, route in child)
        assert [len(merge) for merge, _ in child] == [4, 4, 2]


def test_second_phase_lets_both_matrices_drift_apart_and_never_divides_routing():
    moves, parents = mixing(norm=1.0), [mixing().start([], rng(0))]
    merged = [moves.merged(parents, rng(seed)) for seed in range(60)]
    assert any(merge != route for child in merged for merge, route in child)
    assert {tuple(i for i in range(3) if child[i] != parents[0][i]) for child in merged} > {(0,), (1,), (2,)}
    merge_sums = [matrix(merge, n).sum(1) for child in merged for (merge, _), n in zip(child, (8, 8, 6), strict=True)]
    route_sums = [matrix(route, n).sum(1) for child in merged for (_, route), n in zip(child, (8, 8, 6), strict=True)]
    assert all(torch.allclose(sums, torch.ones_like(sums), atol=1e-5) for sums in merge_sums)
    assert any((sums - 1).abs().max() > 0.02 for sums in route_sums)


def test_rows_with_a_sum_near_zero_are_not_divided_by_it():
    near = ((1.0, -1.0, 1e-5),)
    moves = mixing(experts=(3,), kept=(1,), change=1.0, entry=0.0, cross=0.0, norm=1.0)
    ((merge, _),) = moves.merged([((near, near),)], rng())
    assert merge == rows_of(matrix(near, 3))


def test_crossing_takes_rows_from_both_parents():
    parents = [tuple((rows, rows) for rows in ((start, start + 1, start + 2, start + 3),)) for start in (0, 4)]
    moves = mixing(experts=(8,), kept=(4,), change=1.0, entry=0.0, cross=1.0, norm=0.0)
    found = [moves.merged(parents, rng(seed)) for seed in range(50)]
    assert all(row in (i, 4 + i) for ((merge, _),) in found for i, row in enumerate(merge))
    assert any(0 in merge and 7 in merge for ((merge, _),) in found)


def test_folded_routing_stays_one_hot_with_its_experts():
    parents = [mixing().start([], rng(seed)) for seed in range(4)]
    known = {route for parent in parents for _, route in parent}
    for seed in range(100):
        child = mixing(fold=True, change=0.9).merged(parents, rng(seed))
        assert all(one_hot(route) and route in known for _, route in child)


# --- the search -----------------------------------------------------------------------------------


def toy(candidate):
    """Best for experts of high number, and for sums of the merging rows near 1.2."""
    return sum(
        float((matrix(route, 8) @ torch.arange(8.0)).sum()) - 5 * float((matrix(merge, 8).sum(1) - 1.2).abs().sum())
        for merge, route in candidate
    )


TOY = mixing(experts=(8, 8), kept=(3, 3))
PHASES = Phases(initial=10, discrete=60, total=120, parents=10)


def test_the_same_seed_walks_the_same_way_and_never_gets_worse():
    found, pruned = PHASES.run(TOY, toy, 3, Journal().section("a"))
    again, _ = PHASES.run(TOY, toy, 3, Journal().section("a"))
    assert found.to_json() == again.to_json()
    assert found.to_json() != PHASES.run(TOY, toy, 4, Journal().section("a"))[0].to_json()
    assert len(found) == 120  # all stay, none twice
    assert all(after >= before for before, after in pairwise(found.trace()))
    first = list(found)[:60]
    assert all(merge == route and one_hot(merge) for genome in first for merge, route in genome)
    assert pruned.fitness == max(found[genome] for genome in first) < found.best().fitness


def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path):
    expected = PHASES.run(TOY, toy, 3, Journal().section("a"))[0].to_json()
    for stop in (30, 75, 100):
        left = [stop]

        def dying(candidate, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return toy(candidate)

        with pytest.raises(KeyboardInterrupt):
            PHASES.run(TOY, dying, 3, Journal(tmp_path / str(stop)).section("a"))
        calls = []
        section = Journal(tmp_path / str(stop)).section("a")
        found, _ = PHASES.run(TOY, lambda one, calls=calls: calls.append(one) or toy(one), 3, section)
        assert found.to_json() == expected
        assert len(calls) <= 120 - stop + 20  # notes are taken every 20 evaluations


def test_a_small_space_ends_the_first_phase_early():
    moves = mixing(experts=(3,), kept=(2,))
    found, _ = Phases(5, 20, 0, 10).run(moves, lambda one: float(one[0][0][0]), 0, Journal().section("a"))
    assert len(found) == 6  # two experts of three, in either order


def test_shares_that_are_not_positive_are_rejected():
    model = mixtral()
    layers = layers_of(model)
    groups = grouped(layers, [3, 3], 1)
    judge = judged(model, groups, EEPSettings(), lambda _: float(model(IDS).logits.sum()) * 0 + 1)
    good = matrix((0, 1, 2), 6)
    bad = good.clone()
    bad[1:] = -0.1
    with torch.no_grad():
        assert judge(((rows_of(good), rows_of(good)),)) == 1
        assert judge(((rows_of(good), rows_of(bad)),)) == -torch.inf
        assert judge(((rows_of(bad), rows_of(good)),)) == 1  # negative weights are no trouble
    assert model.model.layers[0].mlp.experts.num_experts == 6


def test_groups_are_contiguous_and_share_their_matrices():
    model = mixtral(num_hidden_layers=5)
    layers = layers_of(model)
    groups = grouped(layers, [3] * 5, 2)
    assert [[layer.name for layer in group.layers] for group in groups] == [
        [f"model.layers.{i}.mlp" for i in (0, 1)],
        [f"model.layers.{i}.mlp" for i in (2, 3, 4)],
    ]
    found = coefficients(groups, (((0, 1, 2),) * 2, ((3, 4, 5),) * 2))
    assert found["model.layers.0.mlp"].picks.tolist() == found["model.layers.1.mlp"].picks.tolist() == [0, 1, 2]
    assert found["model.layers.4.mlp"].picks.tolist() == [3, 4, 5]
    with pytest.raises(SettingsError, match="6 groups of 5 layers"):
        grouped(layers, [3] * 5, 6)
    with pytest.raises(SettingsError, match="different numbers"):
        grouped(layers, [3, 2, 3, 3, 3], 2)


def test_the_two_splits_are_apart_and_needed():
    first, second = halves([Batch((IDS,))], 0.5, Fitness.LOSS, rng())
    rows = [{tuple(row) for batch in part.batches for row in batch.args[0].tolist()} for part in (first, second)]
    assert len(rows[0]) == len(rows[1]) == 4
    assert not rows[0] & rows[1]
    model = mixtral()
    with pytest.raises(DataError, match="two samples"):
        sc.plan(model, "eep", 0.5, data=IDS[:1])
    with pytest.raises(SettingsError, match="same function"):
        eep_search(model, first, first, layers_of(model), [3, 3], example=EXAMPLE)


def test_no_fewer_experts_than_a_token_takes():
    model = mixtral()
    with pytest.raises(BudgetError, match="would keep 1 of 6 experts, and a token takes 2"):
        sc.plan(model, "eep", 0.9, data=IDS, **SHORT)
    plan = sc.plan(model, "eep", 0.9, data=IDS, active=1, **SHORT)
    sc.apply_(model, plan)
    mlp = model.model.layers[0].mlp
    assert mlp.experts.gate_up_proj.shape[0] == 1
    assert mlp.gate(torch.randn(3, 16))[2].shape == (3, 1)
    with pytest.raises(BudgetError, match="a token takes 4"):
        sc.plan(mixtral(), "eep", 0.5, data=IDS, active=4, **SHORT)


# --- plans ----------------------------------------------------------------------------------------


def widest(model, **settings):
    """A plan of a search whose best candidate is a mixture, as most are."""
    for seed in range(20):
        plan = sc.plan(model, "eep", 0.5, data=IDS, seed=seed, **{**SHORT, "entry": 0.5, **settings})
        if plan.weights:
            return plan
    raise AssertionError("no mixture was found")


@pytest.mark.parametrize(
    ("make", "settings", "layout"),
    [
        (mixtral, {"merge": False}, "plain"),
        (mixtral, {"merge": False, "active": 1}, "plain"),
        (mixtral, {"router": "fold"}, "plain"),
        (qwen2, {}, "uneven"),
        (lambda: deepseek("V2"), {"active": 1}, "uneven"),
        (deepseek, {"router": "fold"}, "plain"),
    ],
)
@torch.no_grad()
def test_what_was_found_is_applied_saved_and_loaded_again(make, settings, layout, tmp_path):
    model = make()
    dense = model(IDS).logits
    merged = settings.get("merge", True)
    plan = widest(model, **settings) if merged else sc.plan(model, "eep", 0.5, data=IDS, **SHORT, **settings)
    assert torch.equal(model(IDS).logits, dense)
    assert {plan.kept(name) for name in plan.sites} == {3}
    with sc.masked(model, plan):
        under = model(IDS).logits
    assert torch.equal(model(IDS).logits, dense)
    sc.apply_(model, plan)
    assert torch.equal(model(IDS).logits, under)
    plan.save(tmp_path / "plan")
    again = sc.apply_(make(), sc.Plan.load(tmp_path / "plan"))
    assert torch.equal(again(IDS).logits, under)
    save(model, tmp_path / "folder", plan)
    assert torch.equal(load(tmp_path / "folder")(IDS).logits, under)
    plain = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=layout == "uneven")
    assert torch.equal(plain.eval()(IDS).logits, under)


@torch.no_grad()
def test_lists_of_experts_are_saved_and_loaded_again(tmp_path):
    model, data = listed(), [(X, torch.arange(40) % 3)]
    plan = sc.plan(model, "eep", 0.4, data=data, fitness="accuracy", entry=0.5, **SHORT)
    dense = model(X)
    with sc.masked(model, plan):
        under = model(X)
        assert [len(layer.members) for layer in model.layers] == [3, 3]
    assert torch.equal(model(X), dense)
    assert not torch.equal(under, dense)
    sc.apply_(model, plan)
    assert torch.equal(model(X), under)
    save(model, tmp_path / "folder", plan, verify=False)
    assert torch.equal(load(tmp_path / "folder", listed)(X), under)


def test_a_plan_tells_both_splits_and_how_much_was_evaluated():
    plan = sc.plan(qwen2(), "eep", 0.5, data=IDS, **SHORT)
    facts = next(iter(plan.facts.values()))
    assert facts["evaluations"] == 16
    assert facts["search_best"] >= facts["search_pruned"]
    assert {"report_best", "report_pruned"} <= facts.keys()
    assert any("shared_expert" in note for note in plan.warnings)
