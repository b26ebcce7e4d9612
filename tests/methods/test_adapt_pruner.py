"""Adapt-Pruner against a loop by hand on zeroed weights, its traps, and Adapt-Accel around a caller's training."""

from __future__ import annotations

import copy
from itertools import pairwise
from math import ceil

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.method import Batch, Task
from secateur.core.seeding import generator
from secateur.core.units import UnitKind
from secateur.data.calibration import fresh
from secateur.data.dataset import DataKind, Dataset
from secateur.methods.llm import adapt_pruner
from secateur.methods.llm.adapt_pruner import AdaptPrunerSettings, adaptive
from secateur.train.distil import Distilling
from secateur.train.loop import Fitting, Recipe
from secateur.train.snapshot import model_state, put_back

HEADS, KV, WIDTH, INNER, LAYERS = 4, 2, 4, 20, 3
IDS = torch.randint(0, 40, (24, 12), generator=torch.Generator().manual_seed(2))
DATA = Dataset("ids", DataKind.TEXT, IDS)
PREFIX = "model.layers."
HEAD_COST = 16 * 2 * (WIDTH + WIDTH * HEADS // KV)  # parameters of a key/value head: the dearest unit


def llama(kv: int = KV, layers: int = LAYERS, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=kv,
        head_dim=WIDTH,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def plan(model, sparsity=0.4, **more):
    return sc.plan(model, "adapt_pruner", sparsity, data=DATA, **({"length": 8, "iterations": 10} | more))


def quiet(model, layer=1, gain=0.01):
    """The layer writes hardly anything."""
    block = model.model.layers[layer]
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(gain)
        block.mlp.down_proj.weight.mul_(gain)
    return model


def kept(made, kind="neuron"):
    return [made.kept(name) for name in made.sites if name.endswith(kind)]


# --- the loop by hand -----------------------------------------------------------------------------


class ByHand:
    """The paper's loop with plain tensors: removed units are zeroed in place, nothing is ever cut."""

    def __init__(self, model, iterations, amplitude):
        self.model, self.b, self.amplitude = model, 1 / iterations, amplitude
        self.names = [f"{PREFIX}{i}.{part}" for i in range(LAYERS) for part in ("attention", "mlp")]
        self.masks = {n: torch.ones(KV if "att" in n else INNER, dtype=torch.bool) for n in self.names}
        self.shares = dict.fromkeys(self.names, 0.0)

    def iterate(self, index):
        batches = fresh(list(DATA.batches(8)), 12, 8, 16, generator(0, "adapt_pruner", "samples", f"plan/{index}"))
        v = self.importance(batches)
        scores = self.scores(batches)
        for i, name in enumerate(self.names):
            self.shares[name] = min(max(self.shares[name] + self.b - self.amplitude * v[i // 2], 0), 0.99)
            units, width = (KV, WIDTH) if "att" in name else (INNER, 1)
            features = int(units * width * (1 - self.shares[name]) + 1e-9)
            remove = int(self.masks[name].sum()) - max(1, ceil(features / width))
            lowest = scores[name].masked_fill(~self.masks[name], torch.inf).argsort(stable=True)
            self.masks[name][lowest[: max(0, remove)]] = False
        self.zero()

    def importance(self, batches):
        states = []
        hooks = [
            layer.register_forward_hook(lambda _, args, out: states.append((args[0], out)))
            for layer in self.model.model.layers
        ]
        with torch.no_grad():
            for batch in batches:
                self.model(batch.args[0], use_cache=False)
        for hook in hooks:
            hook.remove()
        totals = []
        for layer in range(LAYERS):
            cosines = [F.cosine_similarity(a.double(), b.double(), dim=-1).flatten() for a, b in states[layer::LAYERS]]
            totals.append(-float(torch.cat(cosines).mean()))
        centred = [total - sum(totals) / LAYERS for total in totals]
        return [value / max(map(abs, centred)) for value in centred]

    def scores(self, batches):
        ids = torch.cat([batch.args[0] for batch in batches])
        logits = self.model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        names, weights = zip(*self.model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
        self.terms = {name: (w * gradients[name]).detach().abs() for name, w in zip(names, weights, strict=True)}
        return {name: self.of_heads(name) if "att" in name else self.of_neurons(name) for name in self.names}

    def of_neurons(self, name):
        part = self.part(name, "mlp")
        return part["gate_proj"].sum(1) + part["up_proj"].sum(1) + part["down_proj"].sum(0)

    def of_heads(self, name):
        part, repeats = self.part(name, "self_attn"), HEADS // KV
        found = (part["k_proj"] + part["v_proj"]).sum(1).view(KV, WIDTH).sum(1)
        for h in range(HEADS):
            rows = slice(h * WIDTH, (h + 1) * WIDTH)
            found[h // repeats] += part["q_proj"][rows].sum() + part["o_proj"][:, rows].sum()
        return found

    def part(self, name, module):
        stem = f"{name.rpartition('.')[0]}.{module}."
        return {key[len(stem) : -7]: value for key, value in self.terms.items() if key.startswith(stem)}

    @torch.no_grad()
    def zero(self):
        for i, layer in enumerate(self.model.model.layers):
            heads = self.masks[f"{PREFIX}{i}.attention"].repeat_interleave(WIDTH)
            neurons = self.masks[f"{PREFIX}{i}.mlp"]
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[~heads] = 0
            queries = heads.view(KV, WIDTH).repeat_interleave(HEADS // KV, 0).flatten()
            layer.self_attn.q_proj.weight[~queries] = 0
            layer.self_attn.o_proj.weight[:, ~queries] = 0
            layer.mlp.gate_proj.weight[~neurons] = 0
            layer.mlp.up_proj.weight[~neurons] = 0
            layer.mlp.down_proj.weight[:, ~neurons] = 0


@pytest.mark.parametrize(("amplitude", "steps"), [(0.04, 4), (0.1, 6)])
def test_the_loop_by_hand_on_zeroed_weights(amplitude, steps):
    """Layers and groups are estimated again on the model as cut, on fresh samples; widths are the first ones."""
    oracle = ByHand(llama(), 10, amplitude)
    for index in range(steps):
        oracle.iterate(index)
    left = sum(int(mask.sum()) for mask in oracle.masks.values())
    budget = sc.Budget(left / (LAYERS * (KV + INNER)), "density")
    made = plan(llama(), None, budget=budget, amplitude=amplitude)
    for i in range(LAYERS):
        for part, site in (("attention", "self_attn:kv_group"), ("mlp", "mlp.gate_proj:neuron")):
            found = made.masks[f"{PREFIX}{i}.{site}"]
            assert torch.equal(found, oracle.masks[f"{PREFIX}{i}.{part}"]), (i, part)
            facts = made.facts[f"{PREFIX}{i}.{site}"]
            assert facts["share"] == pytest.approx(oracle.shares[f"{PREFIX}{i}.{part}"], abs=1e-4)


def test_everything_is_estimated_on_the_model_as_cut(monkeypatch):
    seen, real = [], adapt_pruner.block_changes

    def spy(model, blocks, batches, distance, progress):
        seen.append((sum(p.numel() for p in model.parameters()), torch.cat([b.args[0] for b in batches]), list(blocks)))
        return real(model, blocks, batches, distance, progress)

    monkeypatch.setattr(adapt_pruner, "block_changes", spy)
    plan(llama(), 0.4)
    sizes = [size for size, _, _ in seen]
    assert len(sizes) == 4
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(not torch.equal(a[1], b[1]) for a, b in pairwise(seen))
    assert seen[0][1].shape == (12, 8)  # half of the samples, cut to 8 tokens
    assert seen[0][2] == [f"{PREFIX}{i}" for i in range(LAYERS)]  # whole layers, not attention and MLP apart


# --- allocation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_a_layer_that_does_nothing_loses_most(distance):
    settings = {"kinds": "neuron", "distance": distance, "amplitude": 0.04}
    counts = kept(plan(quiet(llama()), **settings))
    assert counts[1] < min(counts[0], counts[2])


@pytest.mark.parametrize(("distance", "inverted"), [("cosine", False), ("euclidean", True), ("manhattan", True)])
def test_the_released_sign_inverts_distances_only(distance, inverted):
    settings = {"kinds": "neuron", "distance": distance, "amplitude": 0.04, "reference": True}
    counts = kept(plan(quiet(llama()), **settings))
    assert (counts[1] > max(counts[0], counts[2])) is inverted


def test_without_amplitude_all_layers_lose_the_same():
    counts = kept(plan(quiet(llama()), 0.4, kinds="neuron", amplitude=0.0))
    assert counts == [12, 12, 12]


def test_equally_important_layers_lose_the_same_and_it_is_said():
    model = llama()
    for layer in range(LAYERS):
        quiet(model, layer, 0.0)
    made = plan(model, 0.4, kinds="neuron")
    assert kept(made) == [12, 12, 12]
    assert any("equally important" in line for line in made.warnings)


def test_only_blocks_in_the_range_are_pruned_and_compared():
    made = plan(llama(layers=4), 0.4, first=1, last=3)
    assert {name.split(".")[2] for name in made.sites} == {"1", "2"}
    v = [made.facts[f"{PREFIX}{i}.mlp.gate_proj:neuron"]["importance"] for i in (1, 2)]
    assert sorted(v) == pytest.approx([-1, 1])
    with pytest.raises(BudgetError, match=r"first=3 and last=3 name no block"):
        plan(llama(), first=3)


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.95, 0.7, 0.45])
def test_the_parameter_target_is_met_from_below_and_was_not_before(share, monkeypatch):
    counts, real = [], adapt_pruner.Adaptive.toward

    def spy(self, start, before, goals, scored):
        found = real(self, start, before, goals, scored)
        counts.append((goals[0].cost(before), goals[0].cost(found), goals[0].target))
        return found

    monkeypatch.setattr(adapt_pruner.Adaptive, "toward", spy)
    model = llama()
    dense = sum(p.numel() for p in model.parameters())
    made = plan(model, None, budget=sc.Budget(share, "parameters"))
    small = sum(p.numel() for p in sc.apply_(model, made).parameters())
    assert all(before > target for before, _, target in counts)
    assert counts[-1][1] == small <= share * dense
    assert small > share * dense - HEAD_COST  # the nearest that whole units allow


def test_a_target_below_what_cannot_be_pruned_is_refused_with_the_range():
    with pytest.raises(BudgetError, match=r"out of reach: the modules that may be cut allow \d+ to \d+"):
        plan(llama(), None, budget=sc.Budget(0.2, "parameters"))


def test_too_few_iterations_for_the_budget_say_so():
    with pytest.raises(BudgetError, match=r"after all iterations .* raise total \(now 0\.3\)"):
        plan(llama(), 0.5, total=0.3, amplitude=0.0)


def test_each_kind_may_have_its_own_share():
    budget = sc.Budget(0.5, per_kind=((UnitKind.KV_GROUP, 0.5), (UnitKind.NEURON, 0.25)))
    made = plan(llama(), None, budget=budget)
    assert sum(kept(made, "kv_group")) == 3
    assert sum(kept(made)) == 45


def test_widths_keep_multiples():
    counts = kept(plan(llama(), 0.5, kinds="neuron", multiple=2, amplitude=0.04))
    assert all(count % 2 == 0 for count in counts)
    assert len(set(counts)) > 1


def test_latencies_and_streams_are_refused():
    with pytest.raises(SettingsError, match="not a latency"):
        plan(llama(), None, budget=sc.Budget(0.5, "milliseconds"))
    streamed = Task(llama(), sc.Budget(0.5), [Batch((IDS,))], residency=object())
    with pytest.raises(SettingsError, match="load the whole model into memory"):
        adaptive(streamed, AdaptPrunerSettings())


def test_models_without_blocks_are_refused():
    with pytest.raises(ModelError, match="no list of blocks"):
        sc.plan(torch.nn.Linear(3, 3), "adapt_pruner", 0.5, data=torch.rand(4, 3))


# --- warnings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"iterations": 3}, "units in one iteration; take more iterations"),
        ({"amplitude": 0.2}, "amplitude 0.2 is above total / iterations = 0.1"),
        ({"length": 64}, "calibration windows have 12 tokens, fewer than length=64"),
    ],
)
def test_what_will_not_work_as_meant_is_said(settings, sentence):
    assert any(sentence in line for line in plan(llama(), 0.4, **settings).warnings)
    usual = plan(llama(), 0.4).warnings
    assert not any(sentence in line for line in usual)


# --- groups ---------------------------------------------------------------------------------------


def test_two_key_heads_with_two_query_heads_each_go_as_a_whole():
    model = llama()
    made = plan(model, 0.6, kinds="kv_group", amplitude=0.0)
    sc.apply_(model, made)
    for i, layer in enumerate(model.model.layers):
        attention, units = layer.self_attn, made.kept(f"{PREFIX}{i}.self_attn:kv_group")
        assert attention.k_proj.out_features == attention.v_proj.out_features == units * WIDTH
        assert attention.q_proj.out_features == attention.o_proj.in_features == units * WIDTH * HEADS // KV
        assert attention.num_key_value_groups == HEADS // KV
    assert sum(kept(made, "kv_group")) == 3


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_heads_count_in_features_of_the_keys(kv):
    for name, site in adaptive(Task(llama(kv), sc.Budget(0.5)), AdaptPrunerSettings()).work.sites.items():
        assert adapt_pruner.width_of(site) == (1 if name.endswith("neuron") else WIDTH)


def test_layers_of_different_width_generate_and_reload(tmp_path):
    model = quiet(llama())
    made = plan(model, 0.5, amplitude=0.04)
    sc.apply_(model, made)
    assert len({layer.mlp.gate_proj.out_features for layer in model.model.layers}) > 1
    cached = model.generate(IDS[:2, :4], max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(IDS[:2, :4], max_new_tokens=6, do_sample=False, use_cache=False))
    again = sc.load(sc.save(model, tmp_path / "out", made))
    assert torch.equal(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.parametrize(("score", "power"), [("l1", 1), ("l2", 2)])
def test_norms_by_hand(score, power):
    model = llama()
    made = plan(model, 0.05, kinds="neuron", score=score, iterations=2, keep_scores=True)
    mlp = model.model.layers[1].mlp
    expected = sum(w.weight.detach().abs().pow(power).sum(1) for w in (mlp.gate_proj, mlp.up_proj))
    expected = expected + mlp.down_proj.weight.detach().abs().pow(power).sum(0)
    assert torch.allclose(made.scores[f"{PREFIX}1.mlp.gate_proj:neuron"], expected, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"reduce": "vectorize"}, {"salience": "param_second"}, {"salience": "param_mix"}])
def test_other_taylor_scores_decide_otherwise(settings):
    usual, other = (plan(llama(), 0.4, kinds="neuron", keep_scores=True, **more) for more in ({}, settings))
    assert any(not torch.equal(usual.scores[name], other.scores[name]) for name in usual.sites)


def test_random_groups_follow_the_seed():
    first, again, other = (plan(llama(), 0.4, score="random", seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.masks[name], again.masks[name]) for name in first.masks)
    assert any(not torch.equal(first.masks[name], other.masks[name]) for name in first.masks)


# --- Adapt-Accel ----------------------------------------------------------------------------------

STEPS = 12
STATE = model_state(llama())


def make():
    return llama(seed=5)


def loss_of(model):
    logits = model(IDS, use_cache=False).logits
    return {"loss": float(F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))}


def fitting(steps=STEPS, batch=1, **more):
    recipe = Recipe(steps=steps, batch=batch, lr=1e-2, optimizer="adamw", decay="wsd", warmup=0.2, clip=1.0)
    return Fitting(DATA, recipe, loss_of, seed=1, **more)


class Spy:
    """The caller's own fit: remembers sizes, steps and the network, dies in the n-th training."""

    def __init__(self, dies_at=0):
        self.fit, self.steps, self.calls, self.dies_at = fitting(), STEPS, [], dies_at

    def __call__(self, model, masks, start, stop):
        assert not masks
        if start < stop:
            self.calls.append((start, stop, sum(p.numel() for p in model.parameters()), model))
            if len(self.calls) == self.dies_at:
                self.fit(model, masks, start, (start + stop) // 2)
                raise KeyboardInterrupt
        return self.fit(model, masks, start, stop)


def study(fit=None, budget=None, extras=None, **more):
    budget = budget or sc.Budget(0.7, "parameters")
    settings = {"stages": 3, "length": 8, "iterations": 12} | more
    extras = {"state": STATE, "calibration": DATA} | (extras or {})
    return sc.study(make, fit or Spy(), "adapt_pruner", budget=budget, metric="loss", extras=extras, **settings)


def test_stages_share_one_training_and_shrink_in_equal_parts():
    fit = Spy()
    found = study(fit)
    dense = sum(p.numel() for p in make().parameters())
    target = int(0.7 * dense)
    assert [(start, stop) for start, stop, _, _ in fit.calls] == [(0, 2), (2, 6), (6, 12)]
    for stage, row in enumerate(found.rows, 1):
        goal = dense - (dense - target) * stage // 3
        assert goal - HEAD_COST < row["parameters"] <= goal
        assert row["parameters"] == fit.calls[stage - 1][2]
        assert {"loss"} <= row["before"].keys()
    assert found.summary["parameters"] == found.rows[-1]["parameters"]
    assert found.summary["loss"] == found.rows[-1]["after"]["loss"]


def test_weights_and_plan_are_the_trained_network():
    fit = Spy()
    found = study(fit)
    trained = fit.calls[-1][3]
    dense = make()
    put_back(dense, found.state)
    whole = dense(IDS, use_cache=False).logits
    small = sc.apply_(dense, found.plan)
    assert sum(p.numel() for p in small.parameters()) == fit.calls[-1][2]
    assert torch.allclose(small(IDS, use_cache=False).logits, trained.eval()(IDS, use_cache=False).logits, atol=1e-6)
    assert torch.allclose(whole, small(IDS, use_cache=False).logits, atol=1e-5)  # zeros stand where units are gone
    assert any(not torch.equal(p, STATE[name]) for name, p in small.named_parameters() if p.shape == STATE[name].shape)


def test_every_stage_starts_from_what_the_last_one_trained(monkeypatch):
    entered, left, real = [], [], Fitting.__call__

    def spy(self, model, masks, start, stop):
        entered.append(model.model.embed_tokens.weight.detach().clone())
        found = real(self, model, masks, start, stop)
        left.append(model.model.embed_tokens.weight.detach().clone())
        return found

    monkeypatch.setattr(Fitting, "__call__", spy)
    study(fitting(), stages=2)
    assert torch.equal(entered[0], STATE["model.embed_tokens.weight"])
    assert all(torch.equal(before, after) for before, after in zip(entered[1:], left[:-1], strict=True))
    assert not torch.equal(entered[-1], entered[0])


def test_the_rate_goes_on_and_the_optimiser_starts_anew(monkeypatch):
    seen, real = [], Fitting.advance

    def spy(self, model, optimizer, step, penalty=None):
        fresh_one = not optimizer.state
        found = real(self, model, optimizer, step, penalty)
        seen.append((step, optimizer.param_groups[0]["lr"], fresh_one))
        return found

    monkeypatch.setattr(Fitting, "advance", spy)
    fit = fitting()
    study(fit)
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [rate for _, rate, _ in seen] == [fit.recipe.rate(step) for step in range(STEPS)]
    assert [step for step, _, new in seen if new] == [0, 2, 6]
    assert seen[6][1] == fit.recipe.lr > seen[0][1]  # no second warm-up


@pytest.mark.parametrize("dies_at", [1, 3])
def test_a_killed_study_ends_with_the_same_bytes(dies_at, tmp_path):
    straight = study()
    folder = {"folder": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        study(Spy(dies_at), **folder)
    fit = Spy()
    again = study(fit, **folder)
    assert len(fit.calls) == 3 - dies_at + 1
    assert again.rows == straight.rows
    assert all(torch.equal(value, again.state[name]) for name, value in straight.state.items())
    for name, made in (("a", straight), ("b", again)):
        made.plan.save(tmp_path / name)
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_of_other_weights_is_refused(tmp_path):
    study(folder=tmp_path / "run", stages=1)
    with pytest.raises(SettingsError, match="other weights of this network"):
        study(folder=tmp_path / "run", stages=1, extras={"state": model_state(llama(seed=9))})


def test_what_is_gone_stays_gone_and_heads_keep_their_groups():
    found = study(budget=sc.Budget(0.5))
    widths = [row["widths"] for row in found.rows]
    assert all(a[name] >= b[name] for a, b in pairwise(widths) for name in a)
    total = LAYERS * (KV + INNER)
    assert [sum(row.values()) for row in widths] == [total - (total - total // 2) * p // 3 for p in range(1, 4)]
    for name, mask in found.plan.masks.items():
        if name.endswith("neuron"):
            weight = found.state[name.partition(":")[0] + ".weight"]
            assert not weight[~mask].any()
            assert weight[mask].any(1).all()


def test_a_teacher_stays_the_dense_model(monkeypatch):
    teachers, real = [], Distilling.loss

    def spy(self, model, batch):
        teachers.append(self.teacher)
        return real(self, model, batch)

    monkeypatch.setattr(Distilling, "loss", spy)
    plain = study(fitting())
    assert not teachers
    taught = study(fitting(), alpha=0.5, temperature=2.0)
    assert len(teachers) == STEPS
    assert all(torch.equal(value, teachers[-1].state_dict()[name]) for name, value in STATE.items())
    assert taught.summary["loss"] != plain.summary["loss"]
    with pytest.raises(SettingsError, match="must bring its own teacher"):
        study(Spy(), alpha=0.5)


def test_what_is_missing_or_does_not_fit_is_said():
    with pytest.raises(SettingsError, match=r"needs data to prune on: extras="):
        study(Spy(), extras={"calibration": None})
    with pytest.raises(SettingsError, match="one training of 12 steps"):
        study(fitting(), steps=9)
    with pytest.raises(SettingsError, match="stage 1 of 3 would get none"):
        study(fitting(steps=4), stages=3)
    assert not study(fitting(), stages=1).warnings
    assert any("meet the data 2 times" in line for line in study(fitting(batch=4), stages=1).warnings)


def test_a_fit_that_reshapes_the_network_is_refused():
    class Reshaping(Spy):
        def __call__(self, model, masks, start, stop):
            if start < stop:
                mlp = model.model.layers[0].mlp
                mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight[:-1])
            return {"loss": 0.0}

    with pytest.raises(ModelError, match=r"fit changed the shape of 'model\.layers\.0\.mlp\.gate_proj\.weight'"):
        study(Reshaping(), stages=1)


def test_pruning_leaves_the_callers_model_alone():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    sc.study(lambda: copy.deepcopy(model), fitting(), "adapt_pruner", 0.3, metric="loss", stages=2, length=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
