"""Meta pruning on a user's way: meta-training, the folder, unseen networks, in training and at once; kills, errors."""

import copy
import json

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import BudgetError, ModelError, OutputError, SettingsError
from secateur.core.method import Batch
from secateur.core.seeding import seeded
from secateur.data.dataset import DataKind, Dataset
from secateur.data.running import logits
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


def train(model, folder, stop=STEPS, state=None, optimizer_state=None):
    fit = fitting()
    optimizer = fit.recipe.make_optimizer(model)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    run = sc.sparsify(
        model, optimizer, "metapruning", 0.0, steps=STEPS, state=state,
        metanetwork=folder, speedup=1.6, parts=10, example=torch.rand(2, 1, 8, 8),
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
    assert run.finish().warnings == (f"fine-tuned for 2 of {STEPS} steps before the cut",)


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
    with pytest.raises(SettingsError, match="needs training="):
        studied(tmp_path / "net", fit=fitting().__call__, steps=STEPS)
