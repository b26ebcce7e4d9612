"""Whole models: shared keys and values, rotary pairs, fused projections, tied tables, and the arithmetic of cost."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from secateur.core.errors import ModelError, PlanError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.data.batches import run
from secateur.data.running import evaluating
from secateur.shrink.cut import install, make_cut
from secateur.shrink.reference import reference
from secateur.shrink.verify import difference, float_tensors
from secateur.structure.analysis import Structure, analyse

IDS = Batch((torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0)),))
SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
LAYER = "model.layers.0.self_attn"


def counts_of(masks):
    """Kept units by site."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def strong(model: nn.Module) -> nn.Module:
    """Weights so large that every unit shows in the output."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.2)
    return model.eval()


def llama(heads: int = 4, kv: int = 2, head_dim: int = 6, attention: str = "sdpa", **more: object) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        intermediate_size=20,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        max_position_embeddings=16,
        attn_implementation=attention,
        **more,
    )
    return strong(LlamaForCausalLM(config))


def phi3() -> nn.Module:
    sizes = {"intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 16}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return strong(Phi3ForCausalLM(Phi3Config(**SIZES, **sizes, **ends)))


def opt() -> nn.Module:
    sizes = {"ffn_dim": 20, "num_attention_heads": 4, "max_position_embeddings": 16, "word_embed_proj_dim": 24}
    return strong(OPTForCausalLM(OPTConfig(**SIZES, **sizes)))


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=16, pad_token_id=0)
    return strong(GPT2LMHeadModel(config))


def plan_of(structure: Structure, seed: int = 0, kinds: tuple[UnitKind, ...] = tuple(UnitKind)) -> Plan:
    """Random masks of random sizes over the sites of some kinds."""
    rng = torch.Generator().manual_seed(seed)
    masks = {}
    for name, site in structure.sites.items():
        if site.kind in kinds:
            masks[name] = torch.zeros(site.units, dtype=torch.bool)
            least = structure.minimums.get(name, 1)
            kept = int(torch.randint(least, site.units + 1, (), generator=rng))
            masks[name][torch.randperm(site.units, generator=rng)[:kept]] = True
    return Plan({name: structure.sites[name] for name in masks}, masks)


def check(model: nn.Module, structure: Structure, plan: Plan, batch: Batch = IDS) -> None:
    """The cut model gives what the silenced model gives."""
    expected = reference(model, plan, structure, batch)
    undo = install(model, make_cut(model, plan, structure))
    with evaluating(model):
        found = run(model, batch)
    undo()
    for a, b in zip(float_tensors(expected), float_tensors(found), strict=True):
        assert difference(a, b) < 1e-5


def owned(structure: Structure, site: str, parameter: str) -> list[list[int]]:
    """The indices of every unit of a site in one parameter."""
    places = [
        one.indices(structure.sites[site].units)
        for one in structure.sites[site].occurrences
        if one.parameter == parameter
    ]
    return [sorted(row) for row in torch.cat(places, 1).tolist()]


# --- shared keys and values -----------------------------------------------------------------------

SHARED = [(4, 4, 6), (4, 2, 6), (4, 1, 6), (6, 3, 4), (6, 2, 4), (8, 2, 2), (2, 1, 8)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "kv", "head_dim"), SHARED)
def test_key_value_groups_go_as_a_whole(heads, kv, head_dim, attention):
    model = llama(heads, kv, head_dim, attention)
    structure = analyse(model, IDS)
    repeats = heads // kv
    kinds = {site.kind for name, site in structure.sites.items() if name.startswith(LAYER)}
    if kv > 1:
        name = f"{LAYER}:kv_group" if repeats > 1 else f"{LAYER}:head"
        assert structure.sites[name].units == kv
        width = repeats * head_dim
        rows = [list(range(g * width, (g + 1) * width)) for g in range(kv)]
        shared = [list(range(g * head_dim, (g + 1) * head_dim)) for g in range(kv)]
        assert owned(structure, name, f"{LAYER}.q_proj.weight") == rows
        assert owned(structure, name, f"{LAYER}.o_proj.weight") == rows
        assert owned(structure, name, f"{LAYER}.k_proj.weight") == shared
        assert owned(structure, name, f"{LAYER}.v_proj.weight") == shared
    else:
        assert UnitKind.KV_GROUP not in kinds
    for seed in range(3):
        check(model, structure, plan_of(structure, seed))
        check(model, structure, plan_of(structure, seed, (UnitKind.KV_GROUP, UnitKind.HEAD)))


@pytest.mark.parametrize(("heads", "kv", "head_dim"), [(4, 2, 6), (4, 1, 6), (6, 2, 4)])
def test_query_positions_go_from_every_group_alike(heads, kv, head_dim):
    """What is left of sharing: the i-th query head of every key/value head."""
    structure = analyse(llama(heads, kv, head_dim), IDS)
    name = f"{LAYER}:head"
    repeats = heads // kv
    assert structure.sites[name].units == repeats
    assert owned(structure, name, f"{LAYER}.q_proj.weight") == [
        [(g * repeats + i) * head_dim + d for g in range(kv) for d in range(head_dim)] for i in range(repeats)
    ]
    assert {place.parameter for place in structure.sites[name].occurrences} == {
        f"{LAYER}.q_proj.weight",
        f"{LAYER}.o_proj.weight",
    }


@pytest.mark.parametrize(("heads", "kv", "head_dim"), SHARED)
def test_rotary_pairs_are_never_split(heads, kv, head_dim):
    """Dimension d of a query turns with d + head_dim / 2: if one goes from queries or keys, both do."""
    structure = analyse(llama(heads, kv, head_dim), IDS)
    for name, site in structure.sites.items():
        for parameter in (f"{LAYER}.q_proj.weight", f"{LAYER}.k_proj.weight"):
            if any(place.parameter == parameter and place.dim == 0 for place in site.occurrences):
                for unit in owned(structure, name, parameter):
                    within = {(index // head_dim, index % head_dim) for index in unit}
                    assert {(h, (d + head_dim // 2) % head_dim) for h, d in within} == within


def test_head_dimensions_go_as_pairs_from_all_layers():
    """All layers turn with one table of angles, and values are read with the same `head_dim`."""
    structure = analyse(llama(4, 2, 6), IDS)
    (name,) = (name for name, site in structure.sites.items() if site.kind is UnitKind.HEAD_DIM)
    assert structure.sites[name].units == 3
    for layer in range(2):
        for part, heads in (("q", 4), ("k", 2), ("v", 2)):
            found = owned(structure, name, f"model.layers.{layer}.self_attn.{part}_proj.weight")
            assert found[1] == [h * 6 + d for h in range(heads) for d in (1, 4)]


def test_counts_that_the_code_reads_are_changed():
    model = llama(4, 2, 6, "eager")
    structure = analyse(model, IDS)
    assert structure.changes({}) == []
    model = opt()
    structure = analyse(model, IDS)
    name = next(name for name, site in structure.sites.items() if site.kind is UnitKind.HEAD)
    changes = {str(change.slot): change.value for change in structure.changes({name: 2})}
    assert changes
    assert set(changes.values()) == {2}


class Asks(nn.Module):
    """Another way for narrow layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return self.down(x.relu() if x.shape[1] > 2 else x)


def test_branches_of_the_code_give_a_least_count():
    model, batch = strong(Asks()), Batch((torch.randn(2, 6),))
    structure = analyse(model, batch)
    assert structure.minimums == {"up:neuron": 3}
    with pytest.raises(ModelError, match="these counts cannot be cut: the size itself is computed with"):
        structure.changes({"up:neuron": 2})
    for kept in range(3, 8):
        check(model, structure, Plan(dict(structure.sites), {"up:neuron": torch.arange(8) < kept}), batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "kv"), [(4, 1), (6, 2)])
def test_one_query_position_may_be_left(heads, kv, attention):
    """Without repeats the eager code takes another way, `if n_rep == 1`, to the same end."""
    model = llama(heads, kv, 6, attention)
    structure = analyse(model, IDS)
    name = f"{LAYER}:head"
    assert name not in structure.minimums
    for kept in range(heads // kv):
        mask = torch.arange(heads // kv) == kept
        check(model, structure, Plan({name: structure.sites[name]}, {name: mask}))


@pytest.mark.parametrize(("heads", "kv"), [(4, 1), (6, 2)])
def test_padded_batches_run_after_query_positions_are_cut(heads, kv):
    """With a padding mask transformers repeats keys by `num_key_value_groups`; without one torch counts itself."""
    model = llama(heads, kv)
    structure = analyse(model, IDS)
    name = f"{LAYER}:head"
    mask = torch.arange(structure.sites[name].units) > 0
    install(model, make_cut(model, Plan({name: structure.sites[name]}, {name: mask}), structure))
    run(model, IDS)
    padded = torch.ones_like(IDS.args[0])
    padded[0, :3] = 0
    run(model, Batch(IDS.args, {"attention_mask": padded}))


def test_layers_may_keep_different_numbers():
    model = llama(4, 2, 6)
    structure = analyse(model, IDS)
    masks = {
        f"{LAYER}:kv_group": torch.tensor([False, True]),
        "model.layers.1.self_attn:head": torch.tensor([True, False]),
        "model.layers.1.mlp.gate_proj:neuron": torch.arange(20) < 3,
    }
    check(model, structure, Plan({name: structure.sites[name] for name in masks}, masks))


# --- other families -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [phi3, opt, gpt2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_decoders(make, seed):
    model = make()
    structure = analyse(model, IDS)
    check(model, structure, plan_of(structure, seed))


def test_a_fused_projection_is_cut_in_three_places():
    """Phi-3: rows of q, k and v one after the other in one weight; gate and up likewise."""
    structure = analyse(phi3(), IDS)
    (name,) = (name for name, site in structure.sites.items() if site.kind is UnitKind.KV_GROUP)
    assert owned(structure, name, f"{LAYER}.qkv_proj.weight") == [
        [*range(12), *range(24, 28), *range(32, 36)],
        [*range(12, 24), *range(28, 32), *range(36, 40)],
    ]
    name = "model.layers.0.mlp.gate_up_proj"
    assert owned(structure, f"{name}:neuron", f"{name}.weight")[1] == [1, 21]


def test_transposed_layers_of_gpt2():
    structure = analyse(gpt2(), IDS)
    heads = structure.sites["transformer.h.0.attn:head"]
    assert heads.units == 4
    assert {(p.parameter.split(".", 3)[-1], p.dim) for p in heads.occurrences} == {
        ("attn.c_attn.weight", 1),
        ("attn.c_attn.bias", 0),
        ("attn.c_proj.weight", 0),
    }


@pytest.mark.parametrize("make", [lambda: llama(tie_word_embeddings=True), opt, gpt2])
def test_tied_tables_are_one_parameter(make):
    model = make()
    structure = analyse(model, IDS)
    aliases = structure.observation.aliases
    tied = [name for name, first in aliases.items() if name != first]
    assert tied == ["lm_head.weight"]
    assert "lm_head.weight" not in structure.observation.parameters
    check(model, structure, plan_of(structure, 1))
    plan = plan_of(structure, 1)
    undo = install(model, make_cut(model, plan, structure))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    undo()


# --- the arithmetic -------------------------------------------------------------------------------


def counted_flops(model: nn.Module) -> float:
    """As torch counts them; it does not know the fused attention of CPUs, so attention is run by hand."""
    fused = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with evaluating(model), FlopCounterMode(display=False) as counter:
        run(model, IDS)
    model.set_attn_implementation(fused)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(attention="eager"), phi3, opt, gpt2], ids=["llama", "eager", "phi3", "opt", "gpt2"]
)
def test_promised_costs_are_recounts(make):
    model = make()
    structure = analyse(model, IDS)
    assert structure.parameters({}) == sum(parameter.numel() for parameter in model.parameters())
    assert structure.flops({}) == pytest.approx(counted_flops(model), rel=1e-6)
    shared = any(site.kind is UnitKind.KV_GROUP for site in structure.sites.values())
    kinds = set(UnitKind) - {UnitKind.HEAD} if shared else set(UnitKind)  # fused and by hand agree in the sharing only
    for seed in range(3):
        plan = plan_of(structure, seed, tuple(kinds))
        counts = counts_of(plan.masks)
        undo = install(model, make_cut(model, plan, structure))
        assert structure.parameters(counts) == sum(parameter.numel() for parameter in model.parameters())
        assert structure.flops(counts) == pytest.approx(counted_flops(model), rel=1e-6)
        undo()
        assert structure.parameters({}) == sum(parameter.numel() for parameter in model.parameters())


def test_convolution_flops_are_recounts():
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.ConvTranspose2d(12, 6, 2, 2),
        nn.Conv2d(6, 3, 3),
    )
    batch = Batch((torch.randn(2, 2, 16, 16),))
    structure = analyse(model, batch)
    counts = {name: site.units // 2 for name, site in structure.sites.items()}
    for chosen in ({}, counts):
        masks = {name: torch.arange(structure.sites[name].units) < kept for name, kept in chosen.items()}
        undo = install(model, make_cut(model, Plan({n: structure.sites[n] for n in masks}, masks), structure))
        with evaluating(model), FlopCounterMode(display=False) as counter:
            run(model, batch)
        undo()
        assert structure.flops(chosen) == counter.get_total_flops()


def test_costs_fall_with_every_unit():
    structure = analyse(llama(), IDS)
    for name, site in structure.sites.items():
        costs = [(structure.parameters({name: k}), structure.flops({name: k})) for k in range(1, site.units + 1)]
        assert costs == sorted(costs)
        assert len({parameters for parameters, _ in costs}) == site.units


def test_shares_of_a_site_of_one_unit_are_not_offered():
    structure = analyse(llama(), IDS)
    assert all(site.units > 1 for site in structure.sites.values())


# --- without weights ------------------------------------------------------------------------------


def test_llama_3_8b_is_analysed_without_weights():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    start = time.perf_counter()
    structure = analyse(model, Batch((torch.zeros(1, 16, dtype=torch.int64),)))
    assert time.perf_counter() - start < 60
    assert structure.unknown == []
    assert structure.parameters({}) == 8_030_261_248
    kinds = {kind: [site for site in structure.sites.values() if site.kind is kind] for kind in UnitKind}
    assert [site.units for site in kinds[UnitKind.KV_GROUP]] == [8] * 32
    assert [site.units for site in kinds[UnitKind.NEURON]] == [14336] * 32
    assert {site.cost for site in kinds[UnitKind.KV_GROUP]} == {4096 * 128 * (4 + 1 + 1 + 4)}
    assert {site.cost for site in kinds[UnitKind.NEURON]} == {3 * 4096}
    assert [site.units for site in kinds[UnitKind.EMBEDDING]] == [4096]
    quarter = {site.name: 6 for site in kinds[UnitKind.KV_GROUP]}
    assert structure.parameters(quarter) == 8_030_261_248 - 32 * 2 * 4096 * 128 * 10


def test_a_meta_model_has_the_structure_of_a_real_one():
    with torch.device("meta"):
        bare = LlamaForCausalLM(llama().config)
    mine, theirs = analyse(bare, IDS), analyse(llama(), IDS)
    assert mine.sites == theirs.sites
    assert mine.frozen == theirs.frozen
    assert (mine.parameters({}), mine.flops({})) == (theirs.parameters({}), theirs.flops({}))


def test_analysing_twice_gives_the_same():
    model = llama()
    first, second = analyse(model, IDS), analyse(model, IDS)
    assert first.sites == second.sites
    assert first.frozen == second.frozen


def test_the_length_of_the_example_does_not_matter():
    model = llama()
    longer = Batch((torch.zeros(1, 11, dtype=torch.int64),))
    assert analyse(model, IDS).sites == analyse(model, longer).sites


# --- refusals -------------------------------------------------------------------------------------


def test_counts_that_the_code_cannot_follow_are_refused():
    model = llama()
    structure = analyse(model, IDS)
    with pytest.raises(KeyError):
        structure.changes({"nowhere": 3})
    everything = {name: site.units for name, site in structure.sites.items()}
    assert structure.changes(everything) == []


def test_a_site_that_the_model_does_not_have_is_refused():
    model = llama()
    structure = analyse(model, IDS)
    with pytest.raises(PlanError, match=r"'elsewhere:neuron' is no site of this model that can be cut; see"):
        make_cut(
            model,
            Plan(
                {"elsewhere:neuron": Site("elsewhere:neuron", UnitKind.NEURON, (3,))},
                {"elsewhere:neuron": torch.tensor([True, False, True])},
            ),
            structure,
        )


def test_wrong_inputs_name_the_model_and_the_place():
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM cannot be observed.* 'model\.embed_tokens' \(embedding\)"):
        analyse(llama(), Batch((torch.randn(2, 5),)))
