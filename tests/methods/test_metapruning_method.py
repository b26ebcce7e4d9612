"""Meta pruning on a user's way: meta-training, the folder, unseen networks, in training and at once; kills, errors."""

import copy
import json

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import BudgetError, ModelError, OutputError, SettingsError
from secateur.core.method import Batch, Task
from secateur.core.seeding import seeded
from secateur.data.dataset import DataKind, Dataset
from secateur.data.running import logits
from secateur.methods.channels.metapruning import MetaPruningSettings, found_in, pruned
from secateur.structure.analysis import analyse
from secateur.structure.graph import graph_of
from secateur.train.loop import Fitting, Recipe
from secateur.train.metanetwork import Metanetwork, Shape
from secateur.train.snapshot import model_state
from secateur.zoo.vision import ResidualBlock

SMALL = {"layers": 1, "width": 4, "node_ratio": 0.05, "edge_ratio": 0.05, "epochs": 2, "parts": 6, "batch": 30}
STEPS = 6


def make(width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        ResidualBlock(width, 2 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3),
    )  # fmt: skip


def dataset():
    rng = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    return Dataset("tiny", DataKind.IMAGE, torch.randn(60, 1, 8, 8, generator=rng) + targets.view(-1, 1, 1, 1), targets)


DATA = dataset()
(EVERYTHING,) = DATA.batches(60)
IMAGES = Batch((DATA.inputs[:2],))


def accuracy(model):
    return {"accuracy": float((logits(model, EVERYTHING).argmax(1) == EVERYTHING.target).double().mean())}


def fitting():
    return Fitting(DATA, Recipe(steps=STEPS, batch=20, lr=0.05), accuracy)


def trained(seed=5, width=6):
    with seeded(seed):
        model = make(width)
    fitting()(model)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A metanetwork that was never trained: its weights are what it is."""
    torch.manual_seed(0)
    net = Metanetwork(Shape(node=8, edges=(9,), layers=1, width=4, node_ratio=0.2, edge_ratio=0.2))
    return str(net.save(tmp_path_factory.mktemp("nets") / "net", {}))


def studied(place, *, fit=None, kept=None, models=None, **settings):
    extras = {} if models is None else {"models": models}
    given = SMALL | {"models": 3, "held_out": 0.34, "metanetwork": str(place)} | settings
    return sc.study(make, fit or fitting(), "metapruning", 0.3, folder=kept, extras=extras, **given)


# --- at once ----------------------------------------------------------------------------------------


def eased(model, folder):
    found = Metanetwork.load(folder).changed(graph_of(model, IMAGES), model.state_dict())
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict() | found)
    return other


def test_new_weights_and_the_cut_come_in_one_plan(folder):
    model = trained()
    before = model_state(model)
    plan = sc.plan(model, "metapruning", 0.3, example=IMAGES, metanetwork=folder, parts=5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wanted = eased(model, folder)
    assert plan.weights.keys() == dict(model.named_parameters()).keys(), "running statistics are not among them"
    assert all(torch.equal(plan.weights[name], p) for name, p in wanted.named_parameters())
    alone = copy.deepcopy(plan)
    alone.weights, alone.planned_on = {}, {}
    with torch.no_grad():
        expected = sc.apply_(wanted, alone)(DATA.inputs)
        assert torch.allclose(sc.apply_(model, plan)(DATA.inputs), expected, atol=1e-6)
    assert not torch.allclose(trained()(DATA.inputs), expected, atol=1e-3)


def test_the_smallest_coupled_norms_go_in_one_ranking(folder):
    model = trained()
    plan = sc.plan(model, "metapruning", 0.3, example=IMAGES, metanetwork=folder, parts=1)
    weights, ranked = plan.weights, []
    for name, site in analyse(model, IMAGES).sites.items():
        own = [p for p in site.occurrences if p.parameter.endswith("weight")]
        sums = [[weights[p.parameter].select(p.dim, k).square().sum() for p in own] for k in range(site.units)]
        score = torch.tensor(sums).mean(1)
        ranked += [(float(s), name, k) for k, s in enumerate(score / score.max())]
    gone = {(name, k) for _, name, k in sorted(ranked)[: int(0.3 * len(ranked))]}
    assert gone == {(name, k) for name, mask in plan.masks.items() for k in range(len(mask)) if not mask[k]}


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    """A metanetwork that adds nothing."""
    net = Metanetwork(Shape(node=8, edges=(9,), layers=1, width=4, node_ratio=0.0, edge_ratio=0.0))
    return str(net.save(tmp_path_factory.mktemp("nets") / "net", {}))


def dominated():
    """The block's inner channels but the first have next to no weight."""
    model = trained()
    block = model[3]
    with torch.no_grad():
        for tensor in (block.conv1.weight[1:], block.norm1.weight[1:], block.conv2.weight[:, 1:]):
            tensor.mul_(1e-3)
    return model


def one_by_one(model, count):
    """The smallest unit of what is left goes, norms without its slices, one unit staying in every site."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight")}
    sites = analyse(model, IMAGES).sites
    left = {name: list(range(site.units)) for name, site in sites.items()}
    for _ in range(count):
        norms = {}
        for name, site in sites.items():
            own = [p for p in site.occurrences if p.parameter in tensors]
            one = {k: sum(float(tensors[p.parameter].select(p.dim, k).square().sum()) for p in own) for k in left[name]}
            norms |= {(name, k): value / max(one.values()) for k, value in one.items() if len(one) > 1}
        name, k = min(norms, key=norms.get)
        left[name].remove(k)
        for place in sites[name].occurrences:
            if place.parameter in tensors:
                tensors[place.parameter].select(place.dim, k).zero_()
    return left


@pytest.mark.parametrize("model", [trained, dominated])
def test_what_is_left_is_scored_again_after_every_part(nothing, model):
    units = sum(site.units for site in analyse(model(), IMAGES).sites.values())
    for count in (units // 3, units // 2, units - 3):
        plan = sc.plan(
            model(), "metapruning", count / units, example=IMAGES, metanetwork=nothing, parts=count, normalise="max"
        )
        assert {name: mask.nonzero().flatten().tolist() for name, mask in plan.masks.items()} == one_by_one(
            model(), count
        )


@pytest.mark.parametrize("parts", [1, 2, 10, 200])
def test_a_sparsity_is_met_exactly_where_sites_come_down_to_one_unit(nothing, parts):
    plan = sc.plan(dominated(), "metapruning", 0.5, example=IMAGES, metanetwork=nothing, parts=parts)
    kept, units = plan.units()
    assert units - kept == units // 2
    assert min(int(mask.sum()) for mask in plan.masks.values()) == 1
    least = sc.plan(trained(), "metapruning", 0.9, example=IMAGES, metanetwork=nothing, parts=parts)
    assert {int(mask.sum()) for mask in least.masks.values()} == {1}
    with pytest.raises(BudgetError, match=r"of 30 units that may be cut, at most 27 \(0.9\) can go"):
        sc.plan(trained(), "metapruning", 0.99, example=IMAGES, metanetwork=nothing, parts=parts)


def test_the_first_part_that_is_enough_is_the_last():
    """Ten filters in two parts: after the first, five are left, and enough."""
    model = nn.Sequential(nn.Conv2d(1, 10, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3))
    for parts, left in ((2, 5), (10, 6), (1, 1)):
        settings = MetaPruningSettings(parts=parts)
        plan = pruned(found_in(Task(model, sc.Budget(0.65, "parameters"), example=IMAGES), settings), settings)
        assert [int(mask.sum()) for mask in plan.masks.values()] == [left]


def test_shares_that_leave_nothing_to_rank_are_met_or_refused(nothing):
    given = {"example": IMAGES, "metanetwork": nothing, "parts": 5}
    plan = sc.plan(trained(), "metapruning", 0.4, shares="*=0.5", **given)
    assert all(int(mask.sum()) == len(mask) // 2 for mask in plan.masks.values())
    with pytest.raises(BudgetError, match="out of reach"):
        sc.plan(trained(), "metapruning", 0.0, shares="*=0", speedup=8.0, **given)


def test_excluded_layers_keep_their_weights(folder):
    model = trained()
    plan = sc.plan(model, "metapruning", 0.2, example=IMAGES, metanetwork=folder, parts=3, exclude=("0*",))
    assert "0.weight" not in plan.weights
    assert "3.conv1.weight" in plan.weights
    model[0].weight.requires_grad_(False)
    train(model, folder, stop=2, exclude=("0*",))
    assert torch.equal(model[0].weight, trained()[0].weight)
    assert not torch.equal(model[3].conv1.weight, trained()[3].conv1.weight)


def test_a_speedup_counts_from_the_original(folder):
    model = trained(width=8)
    dense = analyse(model, IMAGES).flops({})
    rows = {}
    for already in (1.0, 1.5):
        cut = copy.deepcopy(model)
        plan = sc.plan(
            cut, "metapruning", 0.0, example=IMAGES, metanetwork=folder, speedup=2.0, already=already, parts=20
        )
        kept = analyse(sc.apply_(cut, plan), IMAGES).flops({}) / dense
        rows[already] = kept
        facts = next(iter(plan.facts.values()))
        assert kept <= already / 2
        assert facts["speedup"] == pytest.approx(already / kept, rel=1e-3)
        assert facts["speedup"] < 2.6, "the first part that is enough is the last"
    assert rows[1.5] > rows[1.0]


def test_any_width_of_the_family_will_do(folder):
    for width in (4, 9):
        assert sc.plan(trained(width=width), "metapruning", 0.25, example=IMAGES, metanetwork=folder, parts=2).weights


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sparsity": 0.5, "speedup": 2.0}, SettingsError, "speedup=2 says what stays, and so does sparsity 0.5"),
        ({"sparsity": 0.5, "already": 2.0}, SettingsError, "already=... is divided out of speedup"),
        ({"sparsity": 0.0, "speedup": 2.0, "already": 2.0}, BudgetError, "no more than the 2 that the network has"),
        (
            {"sparsity": 0.0, "speedup": 500.0},
            BudgetError,
            "flops 0.002 is out of reach: the sites that may be cut allow",
        ),
        ({"sparsity": 0.5, "metanetwork": ""}, SettingsError, "give metanetwork=FOLDER"),
        ({"sparsity": 0.5, "steps": 3}, SettingsError, "the setting 'steps' has no effect"),
        ({"budget": sc.Budget(0.5, "milliseconds")}, BudgetError, "this method stops by FLOPs"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(folder, given, error, message):
    with pytest.raises(error, match=message) as found:
        sc.plan(trained(), "metapruning", example=IMAGES, **({"metanetwork": folder} | given))
    assert "\n" not in str(found.value)


def test_other_networks_are_refused(folder):
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="'1' computes group_norm"):
        sc.plan(other, "metapruning", 0.3, example=IMAGES, metanetwork=folder)


# --- in training --------------------------------------------------------------------------------------


def train(model, folder, stop=STEPS, state=None, optimizer_state=None, **more):
    fit = fitting()
    optimizer = fit.recipe.make_optimizer(model)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    run = sc.sparsify(
        model, optimizer, "metapruning", 0.0, steps=STEPS, state=state,
        metanetwork=folder, speedup=1.6, parts=10, example=torch.rand(2, 1, 8, 8), **more,
    )  # fmt: skip
    model.train()
    for step in range(run.step, stop):
        fit.advance(model, optimizer, step)
    return run, optimizer


def test_training_starts_from_the_new_weights_and_ends_with_the_cut(folder):
    model, wanted = trained(), eased(trained(), folder)
    run, _ = train(model, folder, stop=0)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())
    model = trained()
    run, _ = train(model, folder)
    plan = run.finish()
    tuned = model_state(model)
    assert any(not torch.equal(tuned[name], value) for name, value in wanted.state_dict().items())
    assert 0 < plan.sparsity < 1
    assert not run.on_target
    dense = analyse(model, IMAGES).flops({})
    sc.apply_(model.eval(), plan)
    assert analyse(model, IMAGES).flops({}) <= dense / 1.6


def test_a_resumed_training_does_not_change_weights_again(folder):
    whole = trained()
    straight = train(whole, folder)[0].finish()
    model = trained()
    run, optimizer = train(model, folder, stop=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    again = make()
    again.load_state_dict(saved[0])
    resumed = train(again, folder, state=saved[2], optimizer_state=saved[1])[0].finish()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(mask, straight.masks[name]) for name, mask in resumed.masks.items())


def test_a_shorter_training_is_said(folder):
    run, _ = train(trained(), folder, stop=2)
    assert f"fine-tuned for 2 of {STEPS} steps before the cut" in run.finish().warnings


# --- meta-training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    place = tmp_path_factory.mktemp("study") / "net"
    return place, studied(place, tried=(1, 2))


def test_the_study_saves_what_is_best_on_held_out_networks(study):
    place, found = study
    assert [(row["epoch"], row["network"]) for row in found.rows] == [(0, 2), (1, 2), (2, 2)]
    best = max(found.rows[1:], key=lambda row: row["pruned"])
    assert found.summary["with"]["pruned"] == best["pruned"]
    assert found.summary["without"]["changed"] == found.rows[0]["dense"]
    about = json.loads((place / "metanetwork.json").read_text())["about"]
    assert about["epoch"] == found.summary["epoch"]
    assert about["training"][-1] == found.summary["training"]
    assert len(about["training"]) == 2
    assert all(epoch["task"] > 0 and epoch["sparse"] > 0 for epoch in about["training"])
    net = Metanetwork.load(place)
    assert (net.shape.layers, net.shape.width, net.family.edges) == (1, 4, (9,))
    unseen = trained(seed=77, width=5)
    assert sc.plan(unseen, "metapruning", 0.2, example=IMAGES, metanetwork=str(place), parts=2).weights


def test_its_plan_cuts_the_held_out_network(study):
    _, found = study
    model = make()
    model.load_state_dict(found.state)
    cut = sc.apply_(model.eval(), found.plan)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in make().parameters())
    row = next(row for row in found.rows if row["epoch"] == found.summary["epoch"])
    assert accuracy(cut)["accuracy"] == pytest.approx(row["pruned"])


class Dying:
    """Killed in its n-th call that trains."""

    def __init__(self, at):
        self.left, self.fit, self.steps, self.data = at, fitting(), STEPS, DATA
        self.known_by = self.fit.known_by

    def __call__(self, model, masks, start, stop):
        self.left -= stop > start
        if not self.left:
            raise KeyboardInterrupt
        return self.fit(model, masks, start, stop)


@pytest.mark.parametrize("at", [2, 5])  # in the second data model, in the second trial
def test_a_killed_study_goes_on_to_the_same_bytes(tmp_path, study, at):
    place, straight = study
    with pytest.raises(KeyboardInterrupt):
        studied(tmp_path / "net", fit=Dying(at), kept=tmp_path / "kept", tried=(1, 2))
    again = studied(tmp_path / "net", kept=tmp_path / "kept", tried=(1, 2))
    assert again.rows == straight.rows
    one, other = ((folder / "metanetwork.safetensors").read_bytes() for folder in (place, tmp_path / "net"))
    assert one == other


def test_given_networks_are_used_and_left_alone(tmp_path):
    models = [trained(seed) for seed in range(3)]
    before = [model_state(model) for model in models]
    found = studied(tmp_path / "net", models=models, kept=tmp_path / "kept", epochs=1)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert found.rows[0]["dense"] == accuracy(models[2])["accuracy"]
    with pytest.raises(SettingsError, match="a study of other networks"):
        studied(tmp_path / "net", models=models[::-1], kept=tmp_path / "kept", epochs=1)


def test_every_held_out_network_is_tuned_alike_with_and_without_a_metanetwork(tmp_path):
    """The baseline has the same fine-tuning A."""
    calls, fit = [], fitting()

    def counted(model, masks, start, stop):
        calls.extend([(start, stop)] if stop > start else [])
        return fit(model, masks, start, stop)

    counted.steps, counted.data = STEPS, DATA
    studied(tmp_path / "net", fit=counted, models=[trained(seed) for seed in range(3)], tried=(1, 2), tune=0.5)
    assert calls == [(STEPS // 2, STEPS)] * 3


def test_networks_of_low_precision_can_be_studied(tmp_path):
    low = torch.bfloat16
    data = Dataset("tiny", DataKind.IMAGE, DATA.inputs.to(low), DATA.targets)
    fit = Fitting(data, Recipe(steps=STEPS, batch=20, lr=0.05), lambda model: {"accuracy": 1.0})
    found = studied(tmp_path / "net", fit=fit, models=[trained(seed).to(low) for seed in range(3)], epochs=1)
    assert found.summary["training"]["task"] > 0
    assert {value.dtype for value in found.state.values() if value.is_floating_point()} == {low}


def test_what_cannot_be_studied_is_said_before_training(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        studied(tmp_path / "there", fit=Dying(1))
    with pytest.raises(SettingsError, match="tried=3 must be epochs from 1 to 2"):
        studied(tmp_path / "net", fit=Dying(1), tried=(3,))
    with pytest.raises(SettingsError, match="give metanetwork=FOLDER"):
        studied("", fit=Dying(1))
    with pytest.raises(SettingsError, match="two networks at least"):
        studied(tmp_path / "net", fit=Dying(1), models=[trained()])
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ModelError, match="train one metanetwork for each kind"):
        studied(tmp_path / "net", fit=Dying(1), models=[trained(), plain, trained()])
    with pytest.raises(ModelError, match="train one metanetwork for each kind"):
        studied(tmp_path / "net", fit=Dying(1), kept=tmp_path / "held", models=[trained(), trained(), plain])
    assert not list((tmp_path / "held").glob("epoch-*")), "nor is anything learnt"
    with pytest.raises(BudgetError, match="out of reach"):
        sc.study(
            make, Dying(1), "metapruning", 0.0, folder=tmp_path / "fast", extras={"models": [trained(), trained()]},
            **SMALL, metanetwork=str(tmp_path / "net"), speedup=500.0,
        )  # fmt: skip
    assert not list((tmp_path / "fast").glob("epoch-*"))
    with pytest.raises(SettingsError, match="needs training="):
        studied(tmp_path / "net", fit=fitting().__call__, steps=STEPS)
