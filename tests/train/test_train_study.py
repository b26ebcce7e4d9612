"""Procedures: rounds over the caller's fit, killed anywhere and run again; the ledger; snapshots."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_models import batch, net, one_step

from secateur.core.budget import Budget
from secateur.core.errors import ModelError, NumericsError, PlanError, SettingsError
from secateur.core.select import keep_global
from secateur.core.trees import flatten, load_tree, rebuild, save_tree
from secateur.data.dataset import DataKind, Dataset
from secateur.train.keep import MaskKeeper
from secateur.train.loop import Fitting, Recipe, Stream
from secateur.train.snapshot import Snapshot, Store, model_state, put_back
from secateur.train.study import Ledger, RewindSettings, RewindTo, Rounds, Study, masked_state


def data(samples=50, seed=0):
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 1, 5, 5, generator=rng)
    return Dataset("made", DataKind.IMAGE, inputs, inputs.flatten(1)[:, :4].argmax(1))


def fitting(steps=12, **recipe):
    given = {"batch": 10, "lr": 0.05, "momentum": 0.0, "decay": "steps"} | recipe
    return Fitting(data(), Recipe(steps=steps, **given), lambda model: {"accuracy": float(model.head.weight.sum())})


def study(fit=None, ledger=None, steps=12):
    fit = fit or fitting(steps)
    return Study(make=net, fit=fit, steps=steps, budget=Budget(0.8), ledger=ledger or Ledger(None, {}))


def pruned(level, keep_share):
    scores = {name: level.after[name].abs().masked_fill(~mask, -1) for name, mask in level.masks.items()}
    return keep_global(scores, int(keep_share * sum(score.numel() for score in scores.values())))


def rounds(job, settings, count=3):
    runner = Rounds(job, settings)
    levels = [runner.first()]
    for index in range(1, count):
        levels.append(runner.next(levels[-1], pruned(levels[-1], 0.7**index)))
    return levels


# --- rounds ---------------------------------------------------------------------------------------


def test_survivors_go_back_bit_for_bit():
    job = study()
    initial = model_state(job.model())
    for level in rounds(job, RewindSettings()):
        for name, value in level.before.items():
            expected = initial[name].masked_fill(~level.masks[name], 0) if name in level.masks else initial[name]
            assert torch.equal(value, expected), name  # batch-norm statistics and biases included
        for name, keep in level.masks.items():
            assert (level.after[name][~keep] == 0).all()
    assert rounds(job, RewindSettings())[-1].density == pytest.approx(0.49, abs=0.01)


def test_rewinding_to_a_step_starts_there_and_trains_the_rest():
    asked = []
    fit = fitting()

    def watched(model, masks, start, stop):
        asked.append((start, stop, bool(masks)))
        return fit(model, masks, start, stop)

    job = study(watched)
    levels = rounds(job, RewindSettings(rewind="step", k=4))
    assert asked == [(0, 4, False), (4, 12, True), (4, 12, True), (4, 12, True)]
    trunk = net()
    fit(trunk, {}, 0, 4)
    assert torch.equal(levels[0].before["conv.weight"], trunk.conv.weight)
    assert not torch.equal(levels[0].before["conv.weight"], net().conv.weight)


def test_learning_rate_rewinding_keeps_the_trained_weights():
    job = study()
    first, second, _ = rounds(job, RewindSettings(rewind="lr", k=4))
    expected = masked_state(first.after, second.masks)
    assert all(torch.equal(second.before[name], value) for name, value in expected.items())
    assert Rounds(job, RewindSettings(rewind="none")).start == 0


def test_without_pruning_and_momentum_a_rewound_run_is_the_straight_one():
    fit = fitting()
    straight = net()
    fit(straight, {}, 0, 12)
    runner = Rounds(study(fit), RewindSettings(rewind="step", k=5))
    for name, value in runner.first().after.items():
        assert torch.allclose(value.float(), straight.state_dict()[name].float(), atol=1e-6), name


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4])
def test_a_killed_procedure_goes_on_and_ends_with_the_same(dies_at, tmp_path):
    settings = RewindSettings(rewind="step", k=3)
    straight = rounds(study(), settings)
    calls = []
    fit = fitting()

    def dying(model, masks, start, stop):
        calls.append(start)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return fit(model, masks, start, stop)

    with pytest.raises(KeyboardInterrupt):
        rounds(study(dying, Ledger(tmp_path / "run", {"a": 1})), settings)
    again = rounds(study(dying, Ledger(tmp_path / "run", {"a": 1})), settings)
    assert len(calls) == 5  # four trainings, one of them twice
    for one, other in zip(straight, again, strict=True):
        assert one.metrics == other.metrics
        assert all(torch.equal(one.after[name], other.after[name]) for name in one.after)
        assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)


def test_a_fit_that_forgets_the_masks_is_refused():
    def careless(model, masks, start, stop):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        one_step(model, optimizer, 0)
        return {"accuracy": 1.0}

    job = study(careless)
    runner = Rounds(job, RewindSettings())
    first = runner.first()
    with pytest.raises(ModelError, match=r"fit left removed weights of 'conv.weight' non-zero"):
        runner.next(first, pruned(first, 0.5))


def test_masks_must_shrink_and_k_must_fit():
    job = study()
    runner = Rounds(job, RewindSettings())
    first = runner.first()
    second = runner.next(first, pruned(first, 0.5))
    with pytest.raises(ModelError, match="round 2 would bring back removed weights"):
        runner.next(second, first.masks)
    with pytest.raises(SettingsError, match="cannot rewind to step 13 of a training of 12"):
        Rounds(job, RewindSettings(rewind="step", k=13))
    with pytest.raises(SettingsError, match="rewind=init is step 0"):
        Rounds(job, RewindSettings(k=3))
    assert list(RewindTo) == ["init", "step", "lr", "none"]


# --- the ledger and what it stores ----------------------------------------------------------------


def test_a_ledger_refuses_another_order(tmp_path):
    Ledger(tmp_path / "run", {"seed": 0, "rate": 0.2}).begin()
    with pytest.raises(SettingsError, match=r"holds a run with rate=0.2, this one has 0.3"):
        Ledger(tmp_path / "run", {"seed": 0, "rate": 0.3})


def test_trees_come_back_as_they_were(tmp_path):
    tree = {"a": [torch.arange(3), (1, 2.5, None)], 7: {"x": True}, (1, 2): "word", "empty": {}}
    save_tree(tree, tmp_path / "t")
    found = load_tree(tmp_path / "t")
    assert torch.equal(found["a"][0], tree["a"][0])
    assert found["a"][1] == (1, 2.5, None)
    assert found[7] == {"x": True}
    assert found[1, 2] == "word"
    data, tensors = flatten(tree)
    assert rebuild(data, tensors)["empty"] == {}
    with pytest.raises(TypeError, match="cannot store a Linear"):
        flatten({"model": nn.Linear(1, 1)})


@pytest.mark.parametrize("harm", ["cut", "gone", "words"])
def test_damaged_results_are_named(harm, tmp_path):
    save_tree({"a": torch.ones(100)}, tmp_path / "t")
    tensors, document = tmp_path / "t" / "state.safetensors", tmp_path / "t" / "state.json"
    if harm == "cut":
        tensors.write_bytes(tensors.read_bytes()[:50])
    elif harm == "gone":
        tensors.unlink()
    else:
        document.write_text("{")
    with pytest.raises(PlanError, match=r"state\.(safetensors|json)'"):
        load_tree(tmp_path / "t")


# --- snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_snapshot_restores_everything(on_disk, tmp_path):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    store = Store(tmp_path if on_disk else None)

    def advance(steps):
        for step in steps:
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x + 0.01 * torch.randn(x.shape)), y).backward()  # global randomness
            optimizer.step()
            scheduler.step()

    advance(range(4))
    store.put(Snapshot.take(model, 4, position={"epoch": 1}, optimizer=optimizer, scheduler=scheduler))
    advance(range(4, 8))
    straight, rate = model_state(model), optimizer.param_groups[0]["lr"]
    torch.manual_seed(999)
    found = store.get(4)
    found.restore(model, optimizer=optimizer, scheduler=scheduler)
    assert found.position == {"epoch": 1}
    advance(range(4, 8))
    assert optimizer.param_groups[0]["lr"] == rate
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in straight.items())
    with pytest.raises(PlanError, match=r"no snapshot of step 5; there are \[4\]"):
        store.get(5)
    with pytest.raises(PlanError, match="holds no state of the scaler"):
        found.restore(model, scaler=scheduler)


def test_a_snapshot_is_a_copy():
    model = net()
    state = model_state(model)
    one_step(model, torch.optim.SGD(model.parameters(), 0.1), 0)
    assert not torch.equal(state["conv.weight"], model.conv.weight)
    assert not torch.equal(state["norm.running_mean"], model.norm.running_mean)
    put_back(model, state)
    assert torch.equal(state["norm.running_mean"], model.norm.running_mean)


# --- the loop -------------------------------------------------------------------------------------


def test_every_epoch_has_each_sample_once_in_a_new_order():
    stream = Stream(data(53), 10, seed=1)
    assert stream.per_epoch == 5
    first = torch.cat([stream.at(step).args[0] for step in range(5)])
    second = torch.cat([stream.at(step).args[0] for step in range(5, 10)])
    assert len(torch.unique(first.flatten(1), dim=0)) == 50
    assert not torch.equal(first, second)
    assert torch.equal(stream.at(3).args[0], Stream(data(53), 10, seed=1).at(3).args[0])
    assert not torch.equal(stream.at(3).args[0], Stream(data(53), 10, seed=2).at(3).args[0])


def test_augmentation_depends_on_the_step_only():
    def noisy(x, rng):
        return x + torch.randn(x.shape, generator=rng)

    stream = Stream(data(), 10, 0, noisy)
    assert torch.equal(stream.at(7).args[0], Stream(data(), 10, 0, noisy).at(7).args[0])
    assert not torch.equal(stream.at(7).args[0], Stream(data(), 10, 0).at(7).args[0])


def test_rates_by_hand():
    steps = Recipe(steps=100, lr=1.0, decay="steps")
    assert [steps.rate(t) for t in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = Recipe(steps=100, lr=1.0, last=0.1)
    assert [cosine.rate(t) for t in (0, 50, 100)] == pytest.approx([1, 0.55, 0.1])
    assert Recipe(steps=100, lr=0.3, decay="constant").rate(77) == 0.3


def test_training_in_pieces_is_training_at_once():
    """With plain SGD nothing but weights carries over; dropout and data depend on the step's number."""
    whole, pieces = net(), net()
    fit = fitting()
    fit(whole, {}, 0, 12)
    for start in (0, 5, 6):
        fit(pieces, {}, start, {0: 5, 5: 6, 6: 12}[start])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), pieces.parameters(), strict=True))


def test_figures_along_the_way():
    fit = Fitting(data(), Recipe(steps=6, batch=10), lambda model: {"accuracy": 1.0}, also_at=(2, 6))
    assert set(fit(net())) == {"accuracy@2", "accuracy@6", "accuracy", "first_loss", "train_loss"}
    with pytest.raises(SettingsError, match="cannot train from step 3 to 9 of a recipe of 6"):
        fit(net(), {}, 3, 9)


def test_label_smoothing_is_torch_s():
    fit = fitting(smoothing=0.1)
    model = net().eval()
    x = fit.stream.at(0)
    expected = F.cross_entropy(model(x.args[0]), x.target, label_smoothing=0.1)
    assert torch.allclose(fit.loss(model, x), expected)


def test_a_loss_that_explodes_is_refused_with_its_step():
    with pytest.raises(NumericsError, match=r"at training step \d+; lower lr"):
        fitting(lr=1e30)(net(), {}, 0, 12)


def test_a_keeper_takes_masks_alone():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    keep = torch.rand(model.head.weight.shape) > 0.5
    with MaskKeeper(model, {"head.weight": keep}, optimizer):
        one_step(model, optimizer, 0)
        assert (model.head.weight[~keep] == 0).all()
        assert (model.head.weight[keep] != 0).any()
    with pytest.raises(PlanError, match="no parameter 'nose'"):
        MaskKeeper(model, {"nose": keep}, optimizer)
