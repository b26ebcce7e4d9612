"""Cutting units out of a model: put back bit for bit, checked before it is kept, refused in one sentence."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from shrink_models import assert_same_bits, gpt2, llama, opt, state
from torch import Tensor, nn

import secateur as sc
from secateur.core.errors import DataError, ModelError, PlanError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.units import Occurrence, Site, UnitKind
from secateur.data.batches import run
from secateur.data.running import evaluating
from secateur.shrink.cut import AttributeChange, install, make_cut, removed_indices, set_attributes, structured
from secateur.shrink.reference import reference
from secateur.shrink.verify import cut_, difference, float_tensors
from secateur.structure.analysis import Structure, analyse
from secateur.structure.table import FUNCTIONS

IDS = Batch((torch.randint(2, 48, (2, 7), generator=torch.Generator().manual_seed(0)),))


class Net(nn.Module):
    """Convolutions with a norm, a residual, groups and a linear end."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.group, self.end = nn.GroupNorm(2, 8), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.group(self.point(self.deep(x)))
        return self.end(nn.functional.max_pool2d(x, 3).flatten(1))


IMAGES = Batch((torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)),))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return model


MODELS = {"net": (net, IMAGES), "llama": (llama, IDS), "gpt2": (gpt2, IDS), "opt": (opt, IDS)}


def random_plan(structure: Structure, seed: int = 0) -> Plan:
    rng = torch.Generator().manual_seed(seed)
    masks = {}
    for name, site in structure.sites.items():
        step = structure.multiples.get(name, 1)
        least = max(structure.minimums.get(name, 1), step)
        kept = int(torch.randint(least, site.units + 1, (), generator=rng)) // step * step
        masks[name] = torch.zeros(site.units, dtype=torch.bool)
        masks[name][torch.randperm(site.units, generator=rng)[:kept]] = True
    return Plan({name: structure.sites[name] for name in masks}, masks)


def integers(model: nn.Module) -> dict[tuple[str, str], object]:
    """Everything that describes sizes: attributes of modules and of the config."""
    found: dict[tuple[str, str], object] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, (int, tuple)):
                found[name, attribute] = (type(value), value)
    for attribute, value in vars(getattr(model, "config", object)).items():
        if isinstance(value, (int, str)):
            found["config", attribute] = (type(value), value)
    return found


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    with evaluating(model):
        return float_tensors(run(model, batch))


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_undo_puts_everything_back_bit_for_bit(name, seed):
    make, batch = MODELS[name]
    model = make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    objects = {key: id(value) for key, value in model.named_parameters()}
    before, sizes, dense = state(model), integers(model), outputs(model, batch)
    structure = analyse(model, batch)
    plan = random_plan(structure, seed)
    undo = install(model, make_cut(model, plan, structure))
    assert sum(p.numel() for p in model.parameters()) < sum(value.numel() for value in before.values())
    assert {key: id(value) for key, value in model.named_parameters()} == objects
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    undo()
    assert_same_bits(model, before)
    assert integers(model) == sizes
    assert {key: id(value) for key, value in model.named_parameters()} == objects
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(map(torch.equal, outputs(model, batch), dense))


@pytest.mark.parametrize("name", MODELS)
def test_the_cut_model_gives_what_the_silenced_model_gives(name):
    make, batch = MODELS[name]
    model = make()
    structure = analyse(model, batch)
    for seed in range(4):
        plan = random_plan(structure, seed)
        expected = float_tensors(reference(model, plan, structure, batch))
        undo = install(model, make_cut(model, plan, structure))
        assert max(map(difference, expected, outputs(model, batch))) < 1e-5
        undo()


@pytest.mark.parametrize("name", MODELS)
def test_making_a_cut_does_not_touch_the_model(name):
    make, batch = MODELS[name]
    model = make()
    before, sizes = state(model), integers(model)
    structure = analyse(model, batch)
    plan = random_plan(structure)
    make_cut(model, plan, structure)
    reference(model, plan, structure, batch)
    assert_same_bits(model, before)
    assert integers(model) == sizes


def test_what_is_left_are_the_rows_that_were_kept():
    model = net()
    structure = analyse(model, IMAGES)
    before = state(model)
    name = next(
        name for name, site in structure.sites.items() if any(p.parameter == "first.weight" for p in site.occurrences)
    )
    mask = torch.zeros(structure.sites[name].units, dtype=torch.bool)
    mask[-1] = True
    plan = Plan({name: structure.sites[name]}, {name: mask})
    gone = removed_indices(plan)
    install(model, make_cut(model, plan, structure))
    for parameter, dims in gone.items():
        expected = before[parameter]
        for dim, indices in dims.items():
            keep = [i for i in range(expected.shape[dim]) if i not in indices.tolist()]
            expected = expected.index_select(dim, torch.tensor(keep))
        assert torch.equal(model.state_dict()[parameter], expected)
        assert model.state_dict()[parameter].is_contiguous()


def test_layers_describe_themselves_rightly_after_a_cut():
    model = net()
    structure = analyse(model, IMAGES)
    install(model, make_cut(model, random_plan(structure), structure))
    assert model.first.out_channels == model.first.weight.shape[0] == model.norm.num_features
    assert model.deep.groups == model.deep.in_channels == model.deep.out_channels == model.deep.weight.shape[0]
    assert model.point.in_channels == model.point.weight.shape[1]
    assert model.group.num_channels == model.group.weight.shape[0]
    assert model.end.in_features == model.end.weight.shape[1]
    assert f"in_features={model.end.in_features}" in repr(model)


def test_a_plan_that_keeps_all_changes_nothing():
    model = net()
    structure = analyse(model, IMAGES)
    masks = {name: torch.ones(site.units, dtype=torch.bool) for name, site in structure.sites.items()}
    cut = make_cut(model, Plan(dict(structure.sites), masks), structure)
    assert cut.tensors == {}
    assert cut.attributes == []


def test_cut_models_train_copy_and_compile():
    model = net()
    structure = analyse(model, IMAGES)
    install(model, make_cut(model, random_plan(structure), structure))
    dense = outputs(model, IMAGES)
    twin = copy.deepcopy(model)
    assert all(map(torch.equal, outputs(twin, IMAGES), dense))
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(*IMAGES.args).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()


def test_memory_format_is_kept():
    model = net().to(memory_format=torch.channels_last)
    structure = analyse(model, IMAGES)
    install(model, make_cut(model, random_plan(structure), structure))
    assert model.point.weight.is_contiguous(memory_format=torch.channels_last)


# --- a wrong cut is found -------------------------------------------------------------------------


class Pair(nn.Module):
    """Two branches of one width whose product goes on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.end = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.left(x) * self.right(x))


ROWS = Batch((torch.randn(2, 6, generator=torch.Generator().manual_seed(0)),))


def wrong_occurrences(structure: Structure) -> tuple[Structure, Plan]:
    """What a wrong rule would bring: the left rows go from the wrong end."""
    (name,) = structure.sites
    places = tuple(
        replace(place, offset=place.offset + place.stride * 7, stride=-place.stride)
        if place.parameter.startswith("left")
        else place
        for place in structure.sites[name].occurrences
    )
    structure.sites[name] = replace(structure.sites[name], occurrences=places)
    return structure, Plan(dict(structure.sites), {name: torch.arange(8) < 5})


def test_the_comparison_finds_a_wrong_cut_and_leaves_the_model():
    model = Pair()
    before, sizes = state(model), integers(model)
    structure, plan = wrong_occurrences(analyse(model, ROWS))
    with pytest.raises(
        PlanError, match=r"does not give what the masked model gives \(largest difference .*left as it was"
    ):
        cut_(model, plan, ROWS, structure=structure)
    assert_same_bits(model, before)
    assert integers(model) == sizes
    assert plan.attributes == ()


def test_without_the_comparison_a_wrong_cut_is_kept():
    model = Pair()
    structure, plan = wrong_occurrences(analyse(model, ROWS))
    cut_(model, plan, ROWS, verify=False, structure=structure)
    assert model.left.weight.shape == (5, 6)


def test_a_wrong_rule_is_found(monkeypatch):
    """A function rule that says that sorted units keep their places: the masked and the cut model sort differently."""

    def harmless(observer, call):
        call.out = observer.make(call.args[0].shape, call.args[0])
        observer.set(call.out, observer.dims(call.args[0]))

    class Mixed(Pair):
        def forward(self, x):
            return self.end(torch.cumsum(self.left(x) + 1, -1).flip(-1) * self.right(x))

    model = Mixed()
    assert not analyse(model, ROWS).sites
    monkeypatch.setitem(FUNCTIONS, torch.cumsum, harmless)
    monkeypatch.setitem(FUNCTIONS, torch.Tensor.flip, harmless)
    before = state(model)
    plan = sc.plan(model, "channel_norm", 0.5, example=ROWS)
    with pytest.raises(PlanError, match="does not give what the masked model gives"):
        sc.apply_(model, plan, example=ROWS)
    assert_same_bits(model, before)
    with (
        pytest.raises(PlanError, match="does not give what the masked model gives"),
        sc.masked(model, plan, example=ROWS),
    ):
        pass
    assert_same_bits(model, before)


def test_a_cut_that_does_not_run_is_put_back(monkeypatch):
    model = Pair()
    before = state(model)
    structure = analyse(model, ROWS)
    (name,) = structure.sites
    places = tuple(place for place in structure.sites[name].occurrences if not place.parameter.startswith("right"))
    structure.sites[name] = replace(structure.sites[name], occurrences=places)
    plan = Plan(dict(structure.sites), {name: torch.arange(8) < 5})
    with pytest.raises((PlanError, RuntimeError)):
        cut_(model, plan, ROWS, structure=structure)
    assert_same_bits(model, before)


@pytest.mark.parametrize("verify", [True, False])
def test_numbers_that_are_no_numbers_compare_as_equal(verify):
    model = Pair()
    with torch.no_grad():
        model.end.bias[0] = float("nan")
        model.end.bias[1] = float("inf")
    plan = random_plan(analyse(model, ROWS))
    cut_(model, plan, ROWS, verify=verify)


# --- refusals -------------------------------------------------------------------------------------


def pair_plan(mask: Tensor | None = None) -> tuple[nn.Module, Structure, Plan]:
    model = Pair()
    structure = analyse(model, ROWS)
    (name,) = structure.sites
    plan = Plan(dict(structure.sites), {name: torch.arange(8) < 5 if mask is None else mask})
    return model, structure, plan


def test_an_emptied_site_is_refused():
    model, structure, plan = pair_plan(torch.zeros(8, dtype=torch.bool))
    with pytest.raises(PlanError, match=r"'left:neuron' would lose all of its 8 units; keep at least one"):
        make_cut(model, plan, structure)
    with pytest.raises(PlanError, match="would lose all"):
        sc.apply_(model, plan, example=ROWS)
    assert model.left.weight.shape == (8, 6)


def test_an_unknown_site_is_refused():
    model, structure, _ = pair_plan()
    wrong = Site("middle:neuron", UnitKind.NEURON, (8,), occurrences=(Occurrence("left.weight", 0),))
    plan = Plan({"middle:neuron": wrong}, {"middle:neuron": torch.arange(8) < 5})
    with pytest.raises(
        PlanError, match=r"'middle:neuron' is no site of this model that can be cut; see `secateur inspect`"
    ):
        make_cut(model, plan, structure)


def test_other_occurrences_are_refused():
    model, structure, plan = pair_plan()
    name = "left:neuron"
    plan.sites[name] = replace(plan.sites[name], occurrences=plan.sites[name].occurrences[:1])
    with pytest.raises(PlanError, match=r"'left:neuron' has other occurrences in this model than in the plan"):
        make_cut(model, plan, structure)


def test_a_multiple_that_a_kernel_asks_for_is_refused():
    model, structure, plan = pair_plan()
    structure.multiples["left:neuron"] = 4
    with pytest.raises(PlanError, match=r"'left:neuron' must keep a multiple of 4 units .* not 5"):
        make_cut(model, plan, structure)


def test_a_least_count_of_the_code_is_refused():
    model, structure, plan = pair_plan()
    structure.minimums["left:neuron"] = 6
    with pytest.raises(PlanError, match=r"'left:neuron' must keep at least 6 units"):
        make_cut(model, plan, structure)


def test_another_model_is_refused_by_name():
    plan = sc.plan(net(), "channel_norm", 0.5, example=IMAGES)
    with pytest.raises(
        PlanError, match=r"^the plan cuts 'first\.weight', which this model does not have|another model"
    ):
        sc.apply_(Pair(), plan, example=ROWS)
    other = net()
    with torch.no_grad():
        other.first.weight[0, 0, 0, 0] += 1
    with pytest.raises(PlanError, match=r"made for another model: parameter 'first\.weight' has other values"):
        sc.apply_(other, plan, example=IMAGES)
    sc.apply_(other, plan, other_weights=True, example=IMAGES)
    assert other.first.out_channels < 8


def test_a_missing_attribute_is_named():
    with pytest.raises(PlanError, match=r"the model has no 'left\.heads'"):
        set_attributes(Pair(), [AttributeChange("left", "heads", 3)])
    with pytest.raises(PlanError, match=r"the model has no 'nowhere\.heads'"):
        set_attributes(Pair(), [AttributeChange("nowhere", "heads", 3)])


def test_attributes_are_all_set_or_none():
    model = Pair()
    with pytest.raises(PlanError):
        set_attributes(model, [AttributeChange("left", "in_features", 3), AttributeChange("left", "heads", 3)])
    assert model.left.in_features == 6


def test_items_of_sequences_are_set_by_position():
    model = Pair()
    model.sizes, model.shape = [1, 2, 3], (4, 5)
    undo = set_attributes(model, [AttributeChange("", "sizes", 7, 1), AttributeChange("", "shape", 8, 0)])
    assert (model.sizes, model.shape) == ([1, 7, 3], (8, 5))
    undo()
    assert (model.sizes, model.shape) == ([1, 2, 3], (4, 5))


# --- masked and applied ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_applied_for_a_while(name):
    make, batch = MODELS[name]
    model = make()
    before, sizes = state(model), integers(model)
    plan = sc.plan(model, "channel_norm", 0.5, example=batch, multiple=1)
    with sc.masked(model, plan, example=batch):
        inside, shapes = outputs(model, batch), integers(model)
    assert_same_bits(model, before)
    assert integers(model) == sizes
    sc.apply_(model, plan, example=batch)
    assert all(map(torch.equal, outputs(model, batch), inside))
    assert integers(model) == shapes


def test_an_error_inside_the_block_puts_the_model_back():
    model = net()
    before = state(model)
    plan = sc.plan(model, "channel_norm", 0.5, example=IMAGES)
    with pytest.raises(KeyError), sc.masked(model, plan, example=IMAGES):
        raise KeyError
    assert_same_bits(model, before)


def test_applying_twice_is_refused():
    model = net()
    plan = sc.plan(model, "channel_norm", 0.5, example=IMAGES)
    sc.apply_(model, plan, example=IMAGES)
    after = state(model)
    with pytest.raises(
        PlanError, match=r"made for another model: parameter '.*' is float32\[.*\], planned on float32\[8\]"
    ):
        sc.apply_(model, plan, example=IMAGES)
    assert_same_bits(model, after)


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_saved_and_loaded(name, tmp_path):
    make, batch = MODELS[name]
    model = make()
    plan = sc.plan(model, "channel_norm", 0.5, example=batch, multiple=1, keep_scores=True)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.sites == plan.sites
    assert all(torch.equal(loaded.masks[name], plan.masks[name]) for name in plan.masks)
    assert all(torch.equal(loaded.scores[name], plan.scores[name]) for name in plan.scores)
    assert loaded.example == plan.example
    assert loaded.facts == plan.facts
    sc.apply_(model, loaded)  # the example is made up again from its description
    assert structured(loaded) == list(plan.sites)
    assert loaded.attributes
    loaded.save(tmp_path / "again")
    assert Plan.load(tmp_path / "again").attributes == loaded.attributes


def test_structured_plans_combine():
    model = llama()
    heads = sc.plan(model, "channel_norm", 0.5, example=IDS, kinds="kv_group")
    neurons = sc.plan(model, "channel_norm", 0.5, example=IDS, kinds="neuron", multiple=1)
    both = heads & neurons
    assert set(both.sites) == {*heads.sites, *neurons.sites}
    sc.apply_(model, both)
    assert {part.mlp.gate_proj.out_features for part in model.model.layers} == {12}
    assert {part.self_attn.k_proj.out_features for part in model.model.layers} == {4}


def test_weights_blocks_and_units_in_one_plan():
    model = llama()
    units = sc.plan(model, "channel_norm", 0.5, example=IDS, multiple=1)
    mask = torch.tensor([True, False, True, True, True])
    blocks = Plan({"model.layers": Site("model.layers", UnitKind.BLOCK, (5,))}, {"model.layers": mask})
    dense = state(model)
    with sc.masked(model, units & blocks, example=IDS):
        assert len(model.model.layers) == 4
        assert outputs(model, IDS)
    assert_same_bits(model, dense)


def test_an_example_of_another_length_will_do():
    model = llama()
    plan = sc.plan(model, "channel_norm", 0.5, example=IDS)
    sc.apply_(model, plan, example=Batch((torch.ones(1, 3, dtype=torch.int64),)))


def test_a_model_without_an_example_says_what_is_needed():
    class Two(Pair):
        def forward(self, a, b):
            return super().forward(a + b)

    model = Two()
    batch = Batch((*ROWS.args, *ROWS.args))
    structure = analyse(model, batch)
    plan = random_plan(structure)
    with pytest.raises(DataError, match=r"not clear what Two takes; give example inputs"):
        sc.apply_(model, plan)
    sc.apply_(model, plan, example=batch)


def test_counts_that_do_not_fit_the_code_are_refused():
    class Fixed(Pair):
        def __init__(self):
            super().__init__()
            self.heads = 4

        def forward(self, x):
            return self.end((self.left(x) * self.right(x)).view(-1, self.heads, 2).flatten(1))

    model = Fixed()
    structure = analyse(model, ROWS)
    assert [site.units for site in structure.sites.values()] == [4]
    (name,) = structure.sites
    changes = structure.changes({name: 2})
    assert [(str(change.slot), change.value) for change in changes] == [("Fixed.heads", 2)]
    plan = Plan(dict(structure.sites), {name: torch.tensor([True, False, True, False])})
    sc.apply_(model, plan, example=ROWS)
    assert model.heads == 2
    assert [change["attribute"] for change in plan.attributes][:1] == ["heads"]


def test_a_reference_on_another_batch_is_refused():
    model, structure, plan = pair_plan()
    with pytest.raises(ModelError, match=r"the run takes another way than the observed one at linear"):
        reference(model, plan, structure, Batch((torch.randn(3, 6),)))
