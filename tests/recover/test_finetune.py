"""Fine-tuning under masks, keeping masks in the user's own loop, and batch-norm statistics."""

import copy

import pytest
import torch
from torch import nn

from secateur import api
from secateur.core.errors import ModelError, NumericsError, PlanError, UnknownNameError
from secateur.core.plan import Plan
from secateur.core.progress import Silent
from secateur.data.dataset import DataKind, Dataset
from secateur.recover import Request, find
from secateur.shrink.apply import apply_
from secateur.train.keep import MaskKeeper
from secateur.train.loop import Recipe


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def dataset(samples=90, features=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, features, generator=rng)
    return Dataset("made", DataKind.IMAGE, inputs, inputs[:, :3].argmax(1))


def pruned(seed=0, sparsity=0.6):
    model = network(seed)
    plan = api.plan(model, "global_magnitude", sparsity)
    return apply_(model, plan), plan


def request(model, plan, seed=0, data=None):
    return Request(model, plan, data or dataset(), seed, Silent())


def finetune(model, plan, seed=0, data=None, **settings):
    entry = find("finetune")
    return entry.run(request(model, plan, seed, data), entry.configure(settings))


def removed_entries(model, plan):
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name][~mask] for name, mask in plan.masks.items()])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True, weight_decay=0.01),
}


def train(model, optimizer, steps, start=0, schedule=None, check=None):
    """The user's own loop: any order of data, no call of ours in it."""
    data = dataset()
    for step in range(start, start + steps):
        batch = torch.arange(8) + 8 * (step % 10)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs[batch]), data.targets[batch]).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        if check:
            check()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_after_every_step_in_weights_and_in_every_state(name):
    model, plan = pruned()
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model.parameters())
    states = set()

    def check():
        assert not removed_entries(model, plan).any()
        for layer, mask in plan.masks.items():
            state = optimizer.state[dict(model.named_parameters())[layer]]
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    states.add(key)
                    assert not value[~mask].any(), key
                    assert value[mask].any(), key

    with MaskKeeper(model, plan, optimizer):
        train(model, optimizer, 100, check=check)
    expected = {
        "adamw": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
    }
    assert states == expected.get(name, {"momentum_buffer"})
    for layer, mask in plan.masks.items():
        assert (model.state_dict()[layer] != before[layer])[mask].float().mean() > 0.9
    train(model, optimizer, 1)
    assert removed_entries(model, plan).any()  # nothing keeps them after the block: the test can fail


def test_a_keeper_starts_by_writing_the_zeros():
    model, plan = network(), pruned()[1]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, 2)
    keeper = MaskKeeper(model, plan, optimizer)
    assert not removed_entries(model, plan).any()
    weight = model[0].weight
    assert not optimizer.state[weight]["momentum_buffer"][~plan.masks["0.weight"]].any()
    keeper.close()


def test_a_keeper_refuses_another_model():
    model, plan = pruned()
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    for wrong in (other, nn.Linear(6, 16)):
        with pytest.raises(PlanError, match=r"'0\.weight'"):
            MaskKeeper(wrong, plan, torch.optim.SGD(wrong.parameters(), 0.1))
    assert model is not other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_the_straight_one(name, tmp_path):
    def start():
        model, plan = pruned()
        model.eval()  # no dropout: its draws are the user's affair
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, plan, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)

    straight, plan, optimizer, schedule = start()
    with MaskKeeper(straight, plan, optimizer):
        train(straight, optimizer, 30, schedule=schedule)
    first, plan, optimizer, schedule = start()
    with MaskKeeper(first, plan, optimizer):
        train(first, optimizer, 13, schedule=schedule)
    torch.save([part.state_dict() for part in (first, optimizer, schedule)], tmp_path / "checkpoint.pt")
    second, _, optimizer, schedule = start()
    for part, state in zip((second, optimizer, schedule), torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    with MaskKeeper(second, plan, optimizer):
        train(second, optimizer, 17, start=13, schedule=schedule)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not torch.equal(straight[0].weight, first[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_finetune_keeps_the_masks_and_learns(optimizer):
    model, plan = pruned(sparsity=0.5)
    figures = finetune(
        model,
        plan,
        steps=100,
        lr={"sgd": 0.1, "adamw": 0.02}[optimizer],
        optimizer=optimizer,
        weight_decay=0.01,
        batch=30,
    )
    assert not removed_entries(model, plan).any()
    assert figures["steps"] == 100
    assert figures["last_loss"] < 0.7 * figures["first_loss"]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_finetune_is_its_seed_s():
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model, plan = pruned()
        torch.manual_seed(noise)  # the global state must not matter, dropout included
        finetune(model, plan, seed=seed, steps=10)
        results.append(model.state_dict())
    first, again, other = results
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_dropout_is_the_seed_s_too():
    """All samples are alike, so that the order of the data says nothing."""
    data = Dataset("alike", DataKind.IMAGE, torch.ones(8, 6), torch.zeros(8, dtype=torch.int64))
    results = []
    for seed in (0, 0, 1):
        model, plan = pruned(sparsity=0.3)
        finetune(model, plan, seed=seed, data=data, steps=3)
        results.append(model[3].weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_finetune_leaves_the_global_generator_alone():
    model, plan = pruned()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    finetune(model, plan, steps=3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("samples", [5, 64, 70])
def test_finetune_takes_data_of_any_size(samples):
    model, plan = pruned()
    assert finetune(model, plan, data=dataset(samples), steps=7)["steps"] == 7


def test_a_broken_loss_is_refused_with_its_step():
    model, plan = pruned()
    data = dataset()
    broken = Dataset("broken", DataKind.IMAGE, data.inputs.clone(), data.targets)
    broken.inputs[:] = torch.nan
    with pytest.raises(NumericsError, match="loss is nan at fine-tuning step 0"):
        finetune(model, plan, data=broken, steps=3)
    assert torch.isfinite(model[0].weight).all()
    with pytest.raises(NumericsError, match=r"step [1-9]"):
        finetune(model, plan, steps=50, lr=1e25, optimizer="sgd")


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    values = [Recipe(steps=100, lr=1.0, warmup=0.1).rate(step) for step in range(100)]
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1
    assert values[55] == pytest.approx(0.5, abs=1e-9)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0 < values[99] < 0.001
    assert Recipe(lr=1.0).rate(0) == 1


def test_unknown_recoveries_and_settings_get_hints():
    with pytest.raises(UnknownNameError, match="did you mean finetune"):
        find("finetun")
    with pytest.raises(UnknownNameError, match="did you mean steps"):
        find("finetune").configure({"step": 3})


# --- batch norm -----------------------------------------------------------------------------------


def normed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def images(samples=48):
    rng = torch.Generator().manual_seed(1)
    return Dataset("images", DataKind.IMAGE, torch.randn(samples, 2, 8, 8, generator=rng) * 3 + 1)


def reestimate(model, data, **settings):
    entry = find("batchnorm")
    return entry.run(request(model, Plan({}, {}), data=data), entry.configure(settings))


def statistics_of(chunks):
    """Averages over batches of the mean and of the unbiased variance, float64."""
    values = [chunk.double().transpose(0, 1).flatten(1) for chunk in chunks]
    mean = torch.stack([value.mean(1) for value in values]).mean(0)
    return mean, torch.stack([value.var(1, unbiased=True) for value in values]).mean(0)


def test_statistics_are_the_exact_averages():
    model, data = normed(), images()
    with torch.no_grad():
        model[1].running_mean.fill_(100)  # stale statistics must leave no trace
    weights = copy.deepcopy(dict(model.named_parameters()))
    model.eval()
    figures = reestimate(model, data, batches=3, batch=16)
    order = data.sample(48, 0)
    with torch.no_grad():
        first = [model[0](chunk) for chunk in order.inputs.split(16)]
        second = []
        for chunk in first:  # later norms see the batch's own normalisation, and no dropout
            mean, var = chunk.mean((0, 2, 3), keepdim=True), chunk.var((0, 2, 3), unbiased=False, keepdim=True)
            scaled = (chunk - mean) / (var + 1e-5).sqrt()
            second.append(model[4](torch.relu(scaled)))
    for norm, chunks in ((model[1], first), (model[5], second)):
        mean, var = statistics_of(chunks)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-4, atol=1e-5)
    assert figures == {"norms": 2.0, "samples": 48.0}
    assert [model[1].momentum, model[5].momentum] == [0.3, 0.1]
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_statistics_follow_the_seed_and_the_number_of_batches():
    model, data = normed(), images()
    reestimate(model, data, batches=1, batch=16)
    few = model[1].running_mean.clone()
    reestimate(model, data, batches=3, batch=16)
    assert not torch.equal(few, model[1].running_mean)
    reestimate(model, data, batches=1, batch=16)
    assert torch.equal(few, model[1].running_mean)


def test_a_last_batch_of_one_sample_is_left_out():
    model, data = normed(), images(17)
    reestimate(model, data, batches=2, batch=16)
    assert int(model[1].num_batches_tracked) == 1


def test_models_without_batch_norm_are_refused():
    for model in (network(), nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False))):
        with pytest.raises(ModelError, match="no batch norm"):
            reestimate(model, dataset())


def test_a_failed_re_estimation_leaves_the_model_s_settings():
    model = normed()
    with pytest.raises(ModelError, match="shape"):
        reestimate(model, Dataset("flat", DataKind.IMAGE, torch.randn(8, 5)))
    assert [model[1].momentum, model[5].momentum] == [0.3, 0.1]
