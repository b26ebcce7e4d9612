import json
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.errors import OutputError, PlanError
from secateur.core.fingerprint import digests
from secateur.core.plan import Plan, Provenance
from secateur.core.units import Layout, Occurrence, Site, UnitKind

SITES = {
    "a.weight": Site("a.weight", UnitKind.WEIGHT, (3, 5)),
    "b.weight": Site("b.weight", UnitKind.WEIGHT, (2, 3, 3, 3), Layout.CONV),
    "blocks": Site("blocks", UnitKind.BLOCK, (4,), cost=(1, 2, 3, 4), occurrences=(Occurrence("p", 1, 2, 3, 4),)),
}
ORIGIN = Provenance("wanda", {"k": 1}, {"amount": 0.5}, 7, {"class": "Net"}, {"name": "d"}, {"torch": "2"})


def masks_of(seed, names=SITES):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.rand(SITES[name].shape, generator=rng) > 0.5 for name in names}


def plan_of(seed, names=SITES):
    return Plan({name: SITES[name] for name in names}, masks_of(seed, names), provenance=(ORIGIN,))


def full_plan():
    plan = plan_of(3)
    # slices of one tensor and a transposed one: what methods hand over
    flat = torch.arange(24.0)
    plan.weights = {"a.weight": flat[:15].view(5, 3).t(), "other": flat[15:].to(torch.bfloat16)}
    plan.scores = {"a.weight": flat[:15].view(3, 5)}
    plan.planned_on = {"a.weight": "float32[3, 5] 00ff"}
    plan.applied = {"a.weight": "float32[3, 5] 11ff"}
    plan.warnings = ("mind the gap", "ü")
    plan.facts = {"a.weight": {"error": 0.25}}
    return plan


def same(a, b):
    tensors = all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in ((a.masks, b.masks), (a.weights, b.weights), (a.scores, b.scores))
    )
    return tensors and a.document() == b.document()


# --- disk ---------------------------------------------------------------------------------------


def test_a_plan_comes_back_as_it_was(tmp_path):
    plan = full_plan()
    assert plan.save(tmp_path / "p") == tmp_path / "p"
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["plan.json", "plan.safetensors"]
    back = Plan.load(tmp_path / "p")
    assert same(back, plan)
    assert back.sites == plan.sites
    assert list(back.sites) == list(plan.sites)
    assert back.provenance == (ORIGIN,)
    assert back.warnings == plan.warnings
    assert back.facts == plan.facts


def test_equal_plans_are_equal_bytes(tmp_path):
    plan = full_plan()
    plan.save(tmp_path / "one")
    again = full_plan()
    again.masks = dict(reversed(again.masks.items()))  # insertion order of tensors is no content
    again.planned_on = dict(reversed(again.planned_on.items()))
    again.save(tmp_path / "two")
    Plan.load(tmp_path / "one").save(tmp_path / "three")
    for name in ("plan.json", "plan.safetensors"):
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("one", "two", "three")}
        assert len(contents) == 1


def test_a_mask_costs_one_bit_a_weight(tmp_path):
    def size(units):
        site = Site("w", UnitKind.WEIGHT, (units // 8, 8))
        folder = Plan({"w": site}, {"w": torch.ones(units // 8, 8, dtype=torch.bool)}).save(tmp_path / str(units))
        return (folder / "plan.safetensors").stat().st_size

    header = size(8)
    assert size(80_000) - header < 10_000 + 32


def test_an_existing_folder_needs_force(tmp_path):
    plan_of(1).save(tmp_path / "p")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        plan_of(2).save(tmp_path / "p")
    assert same(Plan.load(tmp_path / "p"), plan_of(1))
    plan_of(2).save(tmp_path / "p", force=True)
    assert same(Plan.load(tmp_path / "p"), plan_of(2))


def _edit(key, value):
    def damage(folder):
        path = folder / "plan.json"
        document = json.loads(path.read_text())
        if value is None:
            del document[key]
        else:
            document[key] = value
        path.write_text(json.dumps(document))

    return damage


def _edit_site(key, value):
    def damage(folder):
        sites = json.loads((folder / "plan.json").read_text())["sites"]
        sites[0][key] = value
        _edit("sites", sites)(folder)

    return damage


def _truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _write(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def _drop_a_site(folder):
    _edit("sites", json.loads((folder / "plan.json").read_text())["sites"][1:])(folder)


def _other_tensors(folder):
    from safetensors.torch import save_file

    save_file({"model.embed": torch.zeros(3)}, folder / "plan.safetensors")


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda f: (f / "plan.json").unlink(), r"plan\.json' does not exist"),
        (lambda f: (f / "plan.safetensors").unlink(), r"plan\.safetensors' is missing or damaged"),
        (_truncate("plan.json", 100), r"plan\.json' cannot be read as JSON"),
        (_truncate("plan.json", 0), r"plan\.json' cannot be read as JSON"),
        (_write("plan.json", b"\xff\xfe{}"), r"plan\.json' cannot be read as JSON"),
        (_write("plan.json", b"[1]"), r"plan\.json' is not a plan of format 2"),
        (_write("plan.json", b"{}"), r"plan\.json' is not a plan of format 2"),
        (_edit("format", 3), r"plan\.json' is not a plan of format 2"),
        (_truncate("plan.safetensors", 0), r"plan\.safetensors' is missing or damaged"),
        (_truncate("plan.safetensors", 40), r"plan\.safetensors' is missing or damaged"),
        (_truncate("plan.safetensors", -1), r"plan\.safetensors' is missing or damaged"),
        (_write("plan.safetensors", b"PK\x03\x04" * 50), r"plan\.safetensors' is missing or damaged"),
        (_edit("sites", None), "p' is not a complete plan: KeyError 'sites'"),
        (_edit("facts", None), "p' is not a complete plan: KeyError 'facts'"),
        (_edit("sites", [1]), "p' is not a complete plan"),
        (_edit("provenance", [{"method": "x"}]), "p' is not a complete plan"),
        (_edit_site("kind", "nonsense"), "p' is not a complete plan"),
        (_edit_site("shape", [3, 6]), r"p' is damaged: the mask of 'a\.weight' holds 2 bytes, shape \(3, 6\) needs 3"),
        (_edit_site("shape", [-3, -5]), "p' is not a complete plan"),
        (_edit_site("name", "renamed"), r"p' is damaged: .* disagree about the site 'a\.weight'"),
        (_drop_a_site, r"p' is damaged: .* disagree about the site 'a\.weight'"),
        (_other_tensors, "p' is not a complete plan"),
    ],
)
def test_damaged_folders_name_the_file(tmp_path, damage, names):
    folder = plan_of(1).save(tmp_path / "p")
    damage(folder)
    with pytest.raises(PlanError, match=names) as error:
        Plan.load(folder)
    assert str(tmp_path) in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere/plan\.json' does not exist"):
        Plan.load(tmp_path / "nowhere")


# --- shape and type -----------------------------------------------------------------------------


def test_masks_must_fit_their_sites():
    site = SITES["a.weight"]
    with pytest.raises(PlanError, match=r"'a\.weight' is \[5, 3\], its site \[3, 5\]"):
        Plan({"a.weight": site}, {"a.weight": torch.ones(5, 3, dtype=torch.bool)})
    with pytest.raises(PlanError, match=r"'a\.weight' is torch\.float32, it must be bool"):
        Plan({"a.weight": site}, {"a.weight": torch.ones(3, 5)})
    with pytest.raises(PlanError, match=r"sites and masks differ: .*x"):
        Plan({}, {"x": torch.ones(1, dtype=torch.bool)})


# --- counts -------------------------------------------------------------------------------------


def test_counts_and_table():
    masks = {name: torch.ones(site.shape, dtype=torch.bool) for name, site in SITES.items()}
    masks["a.weight"][0, :4] = False
    masks["blocks"][1] = False
    plan = Plan(dict(SITES), masks, facts={"a.weight": {"error": 0.5}})
    assert plan.units() == (15 - 4 + 54 + 3, 15 + 54 + 4)
    assert plan.units(UnitKind.WEIGHT) == (65, 69)
    assert plan.units(UnitKind.HEAD) == (0, 0)
    assert plan.sparsity == pytest.approx(5 / 73)
    assert plan.kinds == (UnitKind.BLOCK, UnitKind.WEIGHT)
    row = plan.table()[0]
    assert row == {
        "site": "a.weight",
        "kind": "weight",
        "shape": [3, 5],
        "units": 15,
        "kept": 11,
        "sparsity": pytest.approx(4 / 15),
        "error": 0.5,
    }
    assert "keeps 68 of 73 block/weight units in 3 sites" in repr(plan)
    assert Plan({}, {}).sparsity == 0.0


def test_an_empty_site_is_no_division_by_zero():
    plan = Plan({"w": Site("w", UnitKind.WEIGHT, (0, 4))}, {"w": torch.ones(0, 4, dtype=torch.bool)})
    assert plan.table()[0]["sparsity"] == plan.sparsity == 0.0


# --- combining ----------------------------------------------------------------------------------

subsets = st.sets(st.sampled_from(sorted(SITES)), min_size=0).map(sorted)
plans = st.builds(plan_of, st.integers(0, 99), subsets)


def equal_masks(a, b):
    return a.sites == b.sites and all(torch.equal(a.masks[name], b.masks[name]) for name in a.sites)


@settings(deadline=None)
@given(plans, plans, plans)
def test_and_is_commutative_associative_and_idempotent_on_masks(a, b, c):
    assert equal_masks(a & b, b & a)
    assert equal_masks((a & b) & c, a & (b & c))
    assert equal_masks(a & a, a)
    merged = a & b
    for name in {**a.masks, **b.masks}:
        known = [plan.masks[name].tolist() for plan in (a, b) if name in plan.masks]
        flat = [torch.tensor(mask).flatten().tolist() for mask in known]
        assert merged.masks[name].flatten().tolist() == [all(bits) for bits in zip(*flat, strict=True)]


def test_and_leaves_its_operands_alone_and_joins_the_rest():
    a, b = plan_of(1), plan_of(2)
    a.warnings, b.warnings = ("one",), ("two",)
    a.weights = {"a.weight": torch.zeros(3, 5)}
    b.planned_on = {"x": "float32[1] 00"}
    before = {name: mask.clone() for name, mask in a.masks.items()}
    merged = a & b
    merged.masks["a.weight"].zero_()
    assert all(torch.equal(a.masks[name], mask) for name, mask in before.items())
    assert merged.warnings == ("one", "two")
    assert merged.provenance == (ORIGIN, ORIGIN)
    assert merged.planned_on == b.planned_on
    assert list(merged.weights) == ["a.weight"]


def test_combined_plans_share_no_memory_with_their_parts():
    parts = plan_of(1, ["a.weight"]), plan_of(2, ["blocks"])
    kept = [mask.clone() for part in parts for mask in part.masks.values()]
    for mask in (parts[0] & parts[1]).masks.values():
        mask.zero_()
    assert all(map(torch.equal, kept, [parts[0].masks["a.weight"], parts[1].masks["blocks"]]))


def test_and_refuses_what_does_not_combine():
    a, b = plan_of(1), plan_of(2)
    a.weights = b.weights = {"a.weight": torch.zeros(3, 5)}
    with pytest.raises(PlanError, match=r"both plans change the kept weights of 'a\.weight'"):
        _ = a & b
    a, b = plan_of(1), plan_of(2)
    a.planned_on, b.planned_on = {"x": "float32[1] 00"}, {"x": "float32[1] 01"}
    with pytest.raises(PlanError, match="different models"):
        _ = a & b
    other = Plan(
        {"a.weight": Site("a.weight", UnitKind.WEIGHT, (5, 3))}, {"a.weight": torch.ones(5, 3, dtype=torch.bool)}
    )
    for operation in (lambda: plan_of(1) & other, lambda: plan_of(1).diff(other)):
        with pytest.raises(PlanError, match=r"'a\.weight' have shapes \[3, 5\] and \[5, 3\]"):
            operation()


@settings(deadline=None)
@given(plans, plans)
def test_diff_counts(a, b):
    rows = {row["site"]: row for row in a.diff(b)}
    assert rows.keys() == a.masks.keys() | b.masks.keys()
    for name, row in rows.items():
        whole = [True] * SITES[name].units
        mine = a.masks[name].flatten().tolist() if name in a.masks else whole
        theirs = b.masks[name].flatten().tolist() if name in b.masks else whole
        pairs = list(zip(mine, theirs, strict=True))
        assert row["units"] == len(pairs)
        assert row["both"] == pairs.count((True, True))
        assert row["only_first"] == pairs.count((True, False))
        assert row["only_second"] == pairs.count((False, True))
        either = len(pairs) - pairs.count((False, False))
        assert row["overlap"] == (pairs.count((True, True)) / either if either else 1.0)


# --- belongs to a model -------------------------------------------------------------------------


@pytest.fixture
def planned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    site = Site("0.weight", UnitKind.WEIGHT, (3, 5))
    plan = Plan({"0.weight": site}, {"0.weight": torch.rand(3, 5) > 0.5})
    plan.planned_on = digests(dict(model.named_parameters()))
    pruned = {"0.weight": model[0].weight.detach() * plan.masks["0.weight"]}
    plan.applied = digests(pruned)
    return model, plan, pruned


def test_the_model_it_was_planned_on_passes_dense_and_applied(planned):
    model, plan, pruned = planned
    parameters = dict(model.named_parameters())
    plan.check_model(parameters)
    plan.check_model({**parameters, **pruned})


def test_other_models_are_refused_with_the_first_difference(planned):
    model, plan, _ = planned
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    with pytest.raises(PlanError, match=r"'1\.bias' has other values; .*other_weights=True \(--other-weights\)"):
        plan.check_model({**parameters, "1.bias": parameters["1.bias"] + 1})
    with pytest.raises(PlanError, match=r"'1\.bias' is missing"):
        plan.check_model({name: value for name, value in parameters.items() if name != "1.bias"})
    with pytest.raises(PlanError, match=r"'2\.weight' is not in the planned model"):
        plan.check_model({**parameters, "2.weight": torch.zeros(1)})
    with pytest.raises(PlanError, match=r"'1\.bias' is float64\[2\], planned on float32\[2\]"):
        plan.check_model({**parameters, "1.bias": parameters["1.bias"].double()})
    with pytest.raises(PlanError, match=r"masks '0\.weight' \[3, 5\], which is missing in this model"):
        plan.check_model({})
    with pytest.raises(PlanError, match=r"masks '0\.weight' \[3, 5\], which is \[5, 3\] in this model"):
        plan.check_model({**parameters, "0.weight": torch.zeros(5, 3)})


def test_a_retrained_model_passes_only_when_asked_and_without_new_weights(planned):
    model, plan, _ = planned
    retrained = {name: value.detach() + 1 for name, value in model.named_parameters()}
    plan.check_model(retrained, other_weights=True)
    with pytest.raises(PlanError, match=r"planned on float32\[2\]; use the model it was planned on$"):
        plan.check_model({**retrained, "1.bias": torch.zeros(3)}, other_weights=True)
    plan.weights = {"0.weight": torch.zeros(3, 5)}
    with pytest.raises(PlanError, match=r"has other values; use the model it was planned on$"):
        plan.check_model(retrained, other_weights=True)


def test_a_hand_made_plan_only_has_to_fit(planned):
    model, plan, _ = planned
    by_hand = Plan(plan.sites, plan.masks)
    by_hand.check_model({name: value + 1 for name, value in model.named_parameters()})
    with pytest.raises(PlanError, match=r"masks '0\.weight'"):
        by_hand.check_model({"1.weight": torch.zeros(2, 3)})
    assert "hand-made" in repr(by_hand)


def test_many_plans_combine(tmp_path):
    merged = reduce(lambda a, b: a & b, [plan_of(seed) for seed in range(4)])
    merged.save(tmp_path / "p")
    assert same(Plan.load(tmp_path / "p"), merged)
