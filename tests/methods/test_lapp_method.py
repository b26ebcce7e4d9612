"""LAPP: masks and thresholds by hand, both gradients, the budget, freezing, resuming, the compact network."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.gates.threshold import LongTail
from secateur.lab.checks import lapp as check
from secateur.lab.train import TrainJob, prepare
from secateur.measure.flops import flops
from secateur.methods.channels.lapp import Lapp, LappSettings
from secateur.shrink.additions import additions_of
from secateur.shrink.branches import branch_of, find_branches
from secateur.shrink.bypass import Bypass

FLOPS = Quantity.FLOPS


class Net(nn.Module):
    """stem, a residual block, a strided wider layer with 12 to 18 filters, one of coprime widths, a grouped one."""

    def __init__(self):
        super().__init__()
        widths = [(1, 8, 1, 1), (8, 12, 1, 1), (12, 8, 1, 1), (8, 18, 2, 1), (18, 7, 1, 1), (7, 7, 1, 7)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, s, 1, groups=g, bias=b == 18) for a, b, s, g in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in widths)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        def layer(index, x):
            return self.norms[index](self.convs[index](x))

        x = layer(0, x).relu()
        x = (x + layer(2, layer(1, x).relu())).relu()
        for index in (3, 4, 5):
            x = layer(index, x).relu()
        return self.head(x.mean((2, 3)))


PRUNED = ["convs.1", "convs.2", "convs.3", "convs.4"]
EXAMPLE = torch.zeros(2, 1, 8, 8)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)


def batch(step, size=16):
    rng = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 1, 8, 8, generator=rng), torch.randint(3, (size,), generator=rng)


def attached(amount=0.6, *, steps=12, model=None, quantity=FLOPS, optimizer=None, **more):
    model = net() if model is None else model
    optimizer = optimizer or sgd(model)
    budget = Budget(amount, quantity, floor=more.pop("floor", 0))
    run = sc.sparsify(
        model,
        optimizer,
        "lapp",
        budget=budget,
        steps=steps,
        **{"rate": 0.3, "phase": 0.8, "example": torch.ones(2, 1, 8, 8), **more},
    )
    return model, optimizer, run


def advance(model, optimizer, run, start, stop):
    model.train()
    for step in range(start, stop):
        x, y = batch(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + run.penalty()).backward()
        optimizer.step()


def trained(amount=0.6, *, steps=12, **more):
    model, optimizer, run = attached(amount, steps=steps, **more)
    advance(model, optimizer, run, 0, steps)
    return model.eval(), optimizer, run


def part_of(run):
    (part,) = run.parts
    assert isinstance(part, Lapp)
    return part


def cost(model, like=None):
    return flops(model, Batch((EXAMPLE,))) / flops(like or Net(), Batch((EXAMPLE,)))


# --- layers -------------------------------------------------------------------------------------------


def test_which_layers_lose_filters_and_what_stands_beside_them():
    model, _, run = attached()
    found = {name: (one.groups, one.kernel) for name, one in part_of(run).branches.items()}
    assert found == {
        "convs.1": (4, (3, 3)),
        "convs.2": (4, (3, 3)),
        "convs.3": (2, (3, 3)),
        "convs.4": (1, (1, 1)),  # coprime: as dear as the layer with its kernel
    }
    assert run.warnings == ["'convs.5' keeps all of its filters: it has groups"]
    assert not any(isinstance(module, Bypass) for module in model.modules())


def test_what_may_be_pruned_is_up_to_the_user():
    _, _, run = attached(0.9, coprime="skip", exclude=("convs.2",), first=True)
    assert list(part_of(run).branches) == ["convs.1", "convs.3"]
    assert any("'convs.4' keeps all of its filters: its 18 inputs and 7" in one for one in run.warnings)
    assert any(
        "'convs.0' keeps all of its filters: its 1 inputs and 8" in one
        for one in attached(coprime="skip", first=True)[2].warnings
    )
    assert "convs.0" in part_of(attached(0.9, first=True)[2]).branches
    assert {one.kernel for one in part_of(attached(kernel="pointwise")[2]).branches.values()} == {(1, 1)}


def test_models_without_such_layers_are_refused():
    with pytest.raises(ModelError, match="no convolution to put a by-pass beside"):
        attached(model=nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)))
    odd = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 7, 3), nn.BatchNorm2d(7))
    with pytest.raises(ModelError, match="padding changes the size"):
        attached(model=odd)


# --- masks, thresholds and both gradients ---------------------------------------------------------------


def test_scores_are_standardised_norms_and_masks_lie_above_the_threshold():
    model, _, run = attached(minimum=2)
    for name, one in part_of(run).thresholds.items():
        conv, norm = part_of(run).layers[name]
        norms = conv.weight.detach().flatten(1).norm(dim=1).double()
        expected = (norms - norms.mean()) / norms.std(correction=0)
        torch.testing.assert_close(one.scores(conv, norm).double(), expected, rtol=1e-4, atol=1e-4)
        one.value.data.fill_(0.1)
        assert torch.equal(one(conv, norm).bool(), expected > 0.1)
        one.value.data.fill_(50.0)
        assert one(conv, norm).nonzero().flatten().tolist() == sorted(expected.argsort(descending=True)[:2].tolist())
    scale = part_of(attached(score="scale")[2]).thresholds["convs.1"]
    model.norms[1].weight.data.copy_(torch.arange(12.0) - 6)
    expected = torch.arange(12.0).sub(6).abs()
    expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(scale.scores(model.convs[1], model.norms[1]), expected)


def test_scores_by_other_norms_and_the_surrogate_s_reach():
    _, _, run = attached(score="l1", reach=1.0)
    part, conv, norm = part_of(run), *part_of(run).layers["convs.1"]
    sums = conv.weight.detach().abs().sum((1, 2, 3))
    expected = (sums - sums.mean()) / sums.std(correction=0)
    torch.testing.assert_close(part.thresholds["convs.1"].scores(conv, norm), expected, rtol=1e-4, atol=1e-4)
    assert part.thresholds["convs.1"].slope(torch.tensor([0.9, 1.1])).tolist() == pytest.approx([0.4, 0])


def test_coprime_layers_whose_by_pass_would_cost_as_much_get_none():
    assert "would cost as much" in branch_of("conv", "norm", nn.Conv2d(18, 7, 1), LappSettings())


def test_thresholds_feel_something_at_the_first_step():
    """The trap of a narrow surrogate: nothing would ever be pruned."""
    model, _, run = attached(start=-2.0)
    x, y = batch(0)
    F.cross_entropy(model.train()(x), y).backward()
    task = {name: one.value.grad.clone() for name, one in part_of(run).thresholds.items()}
    assert all(abs(float(grad)) > 1e-4 for grad in task.values())  # without the constraint
    run.penalty().backward()
    pushed = {name: one.value.grad - task[name] for name, one in part_of(run).thresholds.items()}
    assert all(float(grad) < -1e-3 for grad in pushed.values())  # a step raises them
    dead = attached(surrogate="sigmoid", sharpness=50.0, start=-4.0)[2]
    dead.penalty().backward()
    assert all(abs(float(one.value.grad)) < 1e-3 for one in part_of(dead).thresholds.values())


def test_the_task_gradient_of_a_threshold_is_that_of_the_surrogate():
    """dL/dt = - sum_i slope(s_i - t) dL/dm_i, with dL/dm_i by finite differences of the masked network."""
    model, _, run = attached()
    model.double().eval()
    for bypass in part_of(run).bypasses.values():
        bypass.double().norm.bias.data.uniform_(0.1, 0.2)  # nothing lies exactly at the kink of a ReLU
    x, y = batch(0)
    one, (conv, norm) = part_of(run).thresholds["convs.1"], part_of(run).layers["convs.1"]
    one.value.data.fill_(0.2)
    F.cross_entropy(model(x.double()), y).backward()
    z = one.scores(conv, norm).double() - one.value.detach()
    base = (z > 0).double()
    bypass, differences = part_of(run).bypasses["convs.1"], []

    def loss(mask):
        bypass.mask = None
        del bypass.mask
        object.__setattr__(bypass, "mask", lambda *_: mask)
        with torch.no_grad():
            return F.cross_entropy(model(x.double()), y)

    for i in range(12):
        shift = torch.zeros(12, dtype=torch.float64)
        shift[i] = 1e-7
        differences.append((loss(base + shift) - loss(base - shift)) / 2e-7)
    expected = -(LongTail(3.0)(z) * torch.stack(differences)).sum()
    assert abs(float(expected)) > 1e-4
    torch.testing.assert_close(one.value.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_the_constraint_moves_thresholds_only():
    model, _, run = attached()
    run.penalty().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(one.value.grad is not None for one in part_of(run).thresholds.values())


def test_the_constraint_by_hand_is_one_sided_and_counts_by_passes_against_the_original():
    _, _, run = attached(0.6, weight=2.0)
    part = part_of(run)
    for one in part.thresholds.values():
        one.value.data.fill_(-99.0)
    start = part.costs.total({}) / part.costs.original
    assert start > 1.02  # by-passes are not free, and the original network has none
    assert run.penalty().item() == pytest.approx(2.0 * torch.tensor(start / 0.6).log().item(), rel=1e-5)
    for one in part.thresholds.values():
        one.value.data.fill_(50.0)
    assert part.costs.least(1) / part.costs.original < 0.6
    assert run.penalty().item() == 0


def test_processes_agree_on_gradients_before_thresholds_move():
    model, optimizer, run = attached()
    part, seen = part_of(run), []
    one = part.thresholds["convs.1"]
    part.extra.average = lambda: seen.append((one.value.item(), one.value.grad is not None))
    before = one.value.item()
    advance(model, optimizer, run, 0, 1)
    assert seen == [(before, True)]
    assert one.value.item() != before


def test_thresholds_take_plain_gradient_steps_whatever_the_optimiser():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.5)
    _, _, run = attached(model=model, optimizer=optimizer, rate=0.07)
    thresholds, expected = part_of(run).thresholds, {}
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + run.penalty()).backward()
        expected = {name: one.value.detach() - 0.07 * one.value.grad for name, one in thresholds.items()}
        optimizer.step()
        for name, one in thresholds.items():
            torch.testing.assert_close(one.value.detach(), expected[name], rtol=0, atol=1e-6)
        assert not any(one.value in optimizer.state for one in thresholds.values())


def test_by_passes_train_and_decay_like_the_weights():
    model, optimizer, run = attached()
    branch = part_of(run).bypasses["convs.1"].conv.weight
    before = branch.detach().clone()
    assert optimizer.param_groups[-1]["weight_decay"] == 1e-3
    x, y = batch(0)
    (F.cross_entropy(model(x), y) + run.penalty()).backward()
    expected = before - 0.05 * (branch.grad + 1e-3 * before)
    optimizer.step()
    torch.testing.assert_close(branch.detach(), expected)


def test_the_weight_of_the_constraint_doubles_late_in_the_phase():
    own = LappSettings(phase=0.5)
    assert own.end(600) == 300
    assert [own.pressure(step, 600) for step in (0, 199, 200, 229, 230, 260, 299)] == [3, 3, 6, 6, 12, 24, 48]


# --- the budget and the freezing ---------------------------------------------------------------------------


def test_the_constraint_in_the_loss_has_the_weight_of_its_step():
    _, _, run = attached(0.6, steps=100, phase=1.0)
    early = run.penalty().item()
    run.step = 90
    assert run.penalty().item() == pytest.approx(8 * early)


def test_masks_are_frozen_as_soon_as_the_target_is_met():
    model, optimizer, run = attached(0.6, steps=40)
    part = part_of(run)
    for step in range(40):
        advance(model, optimizer, run, step, step + 1)
        if part.met is not None:
            break
        assert part.costs.total(part.counts) > part.target
    assert part.met == step + 1 < 32
    assert part.costs.total(part.counts) <= part.target
    masks = {name: gate.clone() for name, gate in part.gates().items()}
    values = {name: one.value.detach().clone() for name, one in part.thresholds.items()}
    for one in part.layers.values():
        one[0].weight.data.normal_()  # other scores; the masks stay
    assert run.penalty().item() == 0
    advance(model, optimizer, run, step + 1, 40)
    assert all(torch.equal(gate, masks[name]) for name, gate in part.gates().items())
    assert all(torch.equal(one.value, values[name]) for name, one in part.thresholds.items())
    assert [entry["what"] for entry in run.log].count("freeze") == 1
    assert run.warnings[1:] == []


def test_a_phase_that_ends_too_early_raises_all_thresholds_alike_and_says_so():
    model, optimizer, run = attached(0.4, steps=10, phase=0.3, rate=1e-4)
    part = part_of(run)
    advance(model, optimizer, run, 0, 2)
    assert part.met is None
    advance(model, optimizer, run, 2, 3)
    assert part.met == 3
    assert part.costs.total(part.counts) <= part.target
    warned = run.warnings[-1]
    assert "all thresholds were raised by" in warned
    # the smallest common shift that does it: brute force over all shifts
    margins = {n: o.scores(*part.layers[n]) - o.value.detach() for n, o in part.thresholds.items()}
    for shift in torch.cat(list(margins.values())).sort().values:
        masks = {n: (m > shift) | (m == m.max()) for n, m in margins.items()}
        if part.costs.total({n: int(m.sum()) for n, m in masks.items()}) <= part.target:
            break
    assert all(torch.equal(part.thresholds[n].final, masks[n]) for n in masks)
    assert f"{float(shift):.3g}" in warned


def test_fill_gives_back_what_overshot():
    # so fast that thresholds overshoot far in one step
    _, _, plain = trained(0.6, rate=20.0)
    _, _, filled = trained(0.6, rate=20.0, fill=True)
    low, high = ((part.costs.total(part.counts)) for part in map(part_of, (plain, filled)))
    assert low < high <= part_of(filled).target
    smallest = max(part_of(filled).costs.per_filter.values())
    assert part_of(filled).target - high < smallest


def test_minimum_and_floor_hold():
    for more in ({"minimum": 3}, {"floor": 3}):
        _, _, run = trained(0.7, rate=20.0, **more)
        assert min(part_of(run).counts.values()) == 3


def test_a_target_out_of_reach_names_the_least():
    _, _, run = attached()
    least = part_of(run).costs.least(1) / part_of(run).costs.original
    with pytest.raises(BudgetError, match=rf"are {least:.4g} of the flops; give a share from there to 1"):
        attached(0.1)
    with pytest.raises(BudgetError, match="out of reach"):
        attached(1e9)
    with pytest.raises(BudgetError, match="not milliseconds"):
        attached(0.5, quantity=Quantity.MILLISECONDS)


@pytest.mark.parametrize("normed", [True, False])
def test_parameters_are_counted_with_by_passes(normed):
    model, _, run = trained(0.7, quantity=Quantity.PARAMETERS, normed=normed)
    part = part_of(run)
    sc.apply_(model, run.finish())
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == part.costs.total(part.counts) <= 0.7 * sum(p.numel() for p in Net().parameters())


def test_by_passes_are_never_free_in_what_is_reported():
    """Whatever the budget counts: facts and log have FLOPs."""
    model, optimizer, run = attached(0.5, steps=12, quantity=Quantity.SPARSITY, rate=20.0, fill=True)
    advance(model, optimizer, run, 0, 12)
    part, plan = part_of(run), run.finish()
    frozen = next(entry for entry in run.log if entry["what"] == "freeze")
    assert frozen["flops"] == pytest.approx(cost(sc.apply_(model, plan)))
    assert frozen["bypasses"] > 0.05
    assert all(plan.facts[f"{name}:filter"]["bypass_flops"] > 0 for name in part.branches)


def test_a_sparsity_counts_filters():
    model, optimizer = (model := net()), sgd(model)
    run = sc.sparsify(model, optimizer, "lapp", 0.5, steps=12, rate=20.0, fill=True, phase=0.8)
    advance(model, optimizer, run, 0, 12)
    assert run.finish().units() == (23, 45)


# --- the compact network -------------------------------------------------------------------------------------


OWN = [{}, {"kernel": "pointwise"}, {"normed": False}, {"idle": False, "rate": 20.0}]


@pytest.mark.parametrize("own", [one | {"merge": merge} for one in OWN for merge in (False, True)])
def test_the_compact_network_is_the_masked_one_and_really_smaller(own):
    model, _, run = trained(0.6, **own)
    x, part = batch(50)[0], part_of(run)
    masked = model(x).detach()
    plan = run.finish()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.allclose(model(x), masked, atol=1e-3)  # by-passes came off: the plan has them
    sc.apply_(model, plan)
    torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-5)
    assert cost(model) == pytest.approx(part.costs.total(part.counts) / part.costs.original)
    assert cost(model) <= 0.6
    assert model.convs[1].weight.shape[0] == model.convs[1].out_channels == part.counts["convs.1"]
    with torch.no_grad():
        model.norms[1].bypass.conv.weight.zero_()
    assert not torch.allclose(model(x), masked, atol=1e-3)


def test_merged_by_passes_are_counted_where_they_still_run():
    """Layers that lost nothing are plain again, and the same budget leaves more filters."""
    model, optimizer, run = attached(0.9, steps=6, rate=1e-6, phase=1.0, merge=True)
    part = part_of(run)
    part.thresholds["convs.1"].value.data.fill_(-99)
    assert part.costs.total(part.costs.filters) == pytest.approx(part.costs.original)
    share = part.costs.share({name: torch.ones(count) for name, count in part.costs.filters.items()})
    assert float(share) == pytest.approx(1)
    advance(model.train(), optimizer, run, 0, 6)
    x, model = batch(50)[0], model.eval()
    masked = model(x).detach()
    plan = run.finish()
    assert plan.kept("convs.1:filter") == 12
    assert "convs.1" not in {one["conv"] for one in plan.additions}
    assert plan.facts["convs.1:filter"]["bypass_flops"] == 0
    sc.apply_(model, plan)
    torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-5)
    assert not hasattr(model.norms[1], "bypass")
    assert cost(model) == pytest.approx(part.costs.total(part.counts) / part.costs.original)
    kept = [len(gate) - int(gate.sum()) for gate in part.gates().values()]
    beside = [model.norms[int(name[-1])].bypass.conv.out_channels for name in PRUNED[1:]]
    assert beside == kept[1:]


def test_a_pointwise_by_pass_has_no_place_in_an_even_kernel():
    def even(padding):
        model = net()
        model.convs[1] = nn.Conv2d(8, 12, 2, padding=padding, dilation=2)
        return model

    settings = LappSettings(kernel="pointwise", merge=True)
    found, left = find_branches(even(1), Batch((EXAMPLE,)), lambda name: True, settings)
    assert "convs.1" not in {one.conv for one in found}
    assert "even kernel" in left["convs.1"]
    found, _ = find_branches(even(1), Batch((EXAMPLE,)), lambda name: True, LappSettings(kernel="pointwise"))
    assert "convs.1" in {one.conv for one in found}


def test_layers_that_lost_nothing_stay_as_they_are():
    for idle in (True, False):
        model, optimizer, run = attached(0.9, steps=6, rate=1e-6, phase=1.0, idle=idle)
        part_of(run).thresholds["convs.1"].value.data.fill_(-99)
        advance(model.train(), optimizer, run, 0, 6)
        x, model = batch(50)[0], model.eval()
        masked = model(x).detach()
        plan = run.finish()
        assert plan.kept("convs.1:filter") == 12
        sc.apply_(model, plan)
        torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-5)
        assert hasattr(model.norms[1], "bypass") == idle
        assert model.convs[1].weight.shape == (12, 8, 3, 3)


def test_the_plan_says_what_was_kept_and_what_by_passes_cost():
    model, _, run = trained(0.6)
    part, plan = part_of(run), run.finish()
    dense = copy.deepcopy(model)
    assert list(plan.sites) == [f"{name}:filter" for name in PRUNED]
    for (name, gate), one in zip(part.gates().items(), plan.additions, strict=True):
        kept = gate.bool().nonzero().flatten().tolist()
        assert (one["conv"], one["kept"]) == (name, None if len(kept) == len(gate) else kept)
        facts = plan.facts[f"{name}:filter"]
        assert facts["threshold"] == pytest.approx(float(part.thresholds[name].value.detach()), abs=1e-5)
        assert facts["bypass_flops"] == pytest.approx(part.costs.added[name] / part.costs.original, abs=1e-5)
    frozen = next(entry for entry in run.log if entry["what"] == "freeze")
    assert frozen["bypasses"] == pytest.approx(sum(part.costs.added.values()) / part.costs.original)
    assert frozen["cost"] == pytest.approx(cost(sc.apply_(dense, plan)))
    json.dumps(plan.document())


@pytest.mark.parametrize("merge", [False, True])
def test_plans_and_models_reload_and_a_mask_can_be_taken_off_again(tmp_path, merge):
    model, _, run = trained(0.6, merge=merge)
    x = batch(50)[0]
    masked = model(x).detach()
    run.finish().save(tmp_path / "plan")
    plan = sc.Plan.load(tmp_path / "plan")
    before = copy.deepcopy(model.state_dict())
    with sc.masked(model, plan):
        torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sc.apply_(model, plan)
    sc.save(model, tmp_path / "model", plan, probe=Batch((x,)), verify=False)
    again = sc.load(tmp_path / "model", factory=Net)
    torch.testing.assert_close(again.eval()(x), masked, rtol=0, atol=1e-5)
    assert additions_of(again) == list(plan.additions)
    assert again.convs[3].weight.shape == model.convs[3].weight.shape
    again.train()(x).sum().backward()
    assert again.norms[1].bypass.conv.weight.grad is not None


def test_kept_filters_can_be_pruned_again_and_go_with_their_places(tmp_path):
    model, _, run = trained(0.6)
    x, first = batch(50)[0], run.finish()
    sc.apply_(model, first)
    sc.save(model, tmp_path / "first", first, probe=Batch((x,)), verify=False)
    before = [one["kept"] for one in additions_of(model)]
    plan = sc.plan(model, "channel_norm", 0.3, example=Batch((x,)))
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("convs.3", "convs.4"):
            gone = ~plan.masks[f"{name}:channel"]
            masked.norms[int(name[-1])].weight[gone] = masked.norms[int(name[-1])].bias[gone] = 0
    sc.apply_(model, plan)
    torch.testing.assert_close(model(x), masked(x), rtol=0, atol=1e-6)
    after = [one["kept"] for one in additions_of(model)]
    assert before[:2] == after[:2]
    for old, new, name in zip(before[2:], after[2:], PRUNED[2:], strict=True):
        assert new == [old[i] for i in plan.masks[f"{name}:channel"].nonzero().flatten().tolist()]
        assert len(new) < len(old)
    sc.save(model, tmp_path / "again", plan, source=tmp_path / "first", probe=Batch((x,)), verify=False)
    loaded = sc.load(tmp_path / "again", factory=Net).eval()
    torch.testing.assert_close(loaded(x), model(x))
    assert [one["kept"] for one in additions_of(loaded)] == after


@pytest.mark.parametrize("merge", [False, True])
def test_layers_with_by_passes_are_not_factorised(merge):
    model, _, run = trained(0.6, merge=merge)
    sc.apply_(model, run.finish())
    x = batch(50)[0]
    plan = sc.plan(model, "svd", 0.0, amount=0.3, example=Batch((x,)))
    beside = {one["conv"] for one in additions_of(model)}
    assert beside
    assert not beside & {name.removesuffix(":rank") for name in plan.sites}
    assert any("a by-pass stands beside it" in line for line in plan.warnings)
    sc.apply_(model, plan)
    assert model(x).isfinite().all()
    assert {one["conv"] for one in additions_of(model) if one["kind"] == "bypass"} == beside


def test_merged_channels_say_why_they_cannot_be_pruned_again():
    model, _, run = trained(0.6, merge=True)
    sc.apply_(model, run.finish())
    with pytest.raises(ModelError, match=r"by-passes that are merged into filters \(merge=true\) fix their channels"):
        sc.plan(model, "channel_norm", 0.3, example=Batch((batch(50)[0],)), include=("convs.*",))


# --- other people's loops ------------------------------------------------------------------------------------


def test_a_loop_that_clears_the_model_s_gradients_only_trains_the_same():
    """transformers' Trainer does; by-passes and thresholds are no parameters of the model."""
    found = []
    for owner in (0, 1):
        things = attached(0.6, steps=6, rate=0.1)
        for step in range(6):
            things[owner].zero_grad()
            x, y = batch(step)
            (F.cross_entropy(things[0](x), y) + things[2].penalty()).backward()
            things[1].step()
        found.append(part_of(things[2]).bypasses["convs.1"].conv.weight.detach())
    assert torch.equal(*found)


def test_gradients_of_several_batches_add_up_in_by_passes_too():
    model, optimizer, run = attached(0.6, steps=6)
    grads = []
    for step in range(2):
        x, y = batch(step)
        (F.cross_entropy(model(x), y) + run.penalty()).backward()
        grads.append(part_of(run).bypasses["convs.1"].conv.weight.grad.clone())
    assert not torch.allclose(grads[0], grads[1])
    optimizer.step()
    assert part_of(run).bypasses["convs.1"].conv.weight.grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(fused):
    """A fused optimiser leaves its factor in the gradients until its kernel runs."""
    found = []
    for scaling in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=fused)
        _, _, run = attached(0.6, steps=6, model=model, optimizer=optimizer, rate=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaling)
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y) + run.penalty()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append((part_of(run).thresholds["convs.1"].value.item(), model.convs[1].weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][0] != -2
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_none(fused):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=fused)
    _, _, run = attached(0.6, steps=6, model=model, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = part_of(run).thresholds["convs.1"].value.item()
    for step, factor in enumerate((float("inf"), 1.0)):
        x, y = batch(step)
        model.zero_grad()
        scaler.scale((F.cross_entropy(model(x), y) + run.penalty()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert run.step == step
        assert (part_of(run).thresholds["convs.1"].value.item() == before) == (step == 0)


def test_convolutions_may_be_called_by_keyword():
    class Keyword(Net):
        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = norm(conv(input=x)).relu()
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model, _, run = trained(0.6, model=Keyword())
    x = batch(50)[0]
    masked = model(x).detach()
    torch.testing.assert_close(sc.apply_(model, run.finish())(x), masked, rtol=0, atol=1e-5)


def hooks_on(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_what_is_refused_or_closed_leaves_the_model_and_the_optimiser_as_they_were():
    state = attached(0.6, steps=12)[2].state_dict()
    model, optimizer = net(), None
    optimizer = sgd(model)
    with pytest.raises(SettingsError, match="steps=12, this run has 13"):
        attached(0.6, steps=13, model=model, optimizer=optimizer, state=state)
    assert (hooks_on(model), len(optimizer.param_groups)) == (0, 1)
    with torch.no_grad():
        model.convs[1].weight.add_(1)
    with pytest.raises(ModelError, match="not as it was at the checkpoint"):
        attached(0.6, steps=12, model=model, optimizer=optimizer, state=state)
    assert (hooks_on(model), len(optimizer.param_groups)) == (0, 1)
    with attached(0.6, steps=12, model=model, optimizer=optimizer)[2]:
        assert hooks_on(model)
    assert (hooks_on(model), len(optimizer.param_groups)) == (0, 1)


def test_copies_on_several_devices_are_refused():
    model = net()
    wrapped = nn.DataParallel(model, device_ids=[])
    with pytest.raises(ModelError, match="lapp trains modules of its own beside the model's"):
        sc.sparsify(wrapped, sgd(model), "lapp", budget=Budget(0.6, FLOPS), steps=4, example=EXAMPLE)
    assert hooks_on(model) == 0


def test_the_check_s_uniform_network_has_the_flops_that_are_asked_for():
    share = check.flops_of(check.Net(*check.UNIFORM)) / check.flops_of(check.Net())
    assert 0.98 * check.SHARE > share > 0.95 * check.SHARE


# --- running it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 9])
def test_a_resumed_training_ends_with_the_same_bytes(at):
    more = {"amount": 0.6, "steps": 12, "rate": 0.6}
    model, optimizer, run = attached(**more)
    advance(model, optimizer, run, 0, at)
    assert (part_of(run).met is None) == (at == 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    assert saved[0].keys() == Net().state_dict().keys()
    other = net(seed=9)
    own = sgd(other)
    other.load_state_dict(saved[0])
    own.load_state_dict(saved[1])
    _, _, again = attached(model=other, optimizer=own, state=saved[2], **more)
    straight, plans = trained(**more), []
    advance(other, own, again, at, 12)
    plans = [straight[2].finish(), again.finish()]
    assert plans[0].additions == plans[1].additions
    assert plans[0].weights.keys() == plans[1].weights.keys()
    assert all(torch.equal(value, plans[1].weights[name]) for name, value in plans[0].weights.items())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in straight[0].state_dict().items())
    assert straight[2].log == again.log


def test_no_global_random_number_is_drawn_and_seeds_decide():
    model = net()
    state = torch.get_rng_state()
    first = part_of(attached(model=model)[2]).bypasses
    assert torch.equal(torch.get_rng_state(), state)
    second = part_of(attached(model=net())[2]).bypasses
    third = part_of(attached(model=net(), seed=1)[2]).bypasses
    assert torch.equal(first["convs.1"].conv.weight, second["convs.1"].conv.weight)
    assert not torch.equal(first["convs.1"].conv.weight, third["convs.1"].conv.weight)
    assert first["convs.1"].conv.weight.abs().max() <= (9 * 2) ** -0.5  # torch's own initialisation
    assert first["convs.1"].conv.weight.abs().max() > 0.8 * (9 * 2) ** -0.5


def test_stopping_before_the_masks_are_frozen_is_refused_and_later_is_not():
    model, optimizer, run = attached(0.6, steps=30)
    advance(model, optimizer, run, 0, 2)
    with pytest.raises(BudgetError, match="after 2 of 30 steps, before the target was met or the phase of 24"):
        run.finish()
    advance(model, optimizer, run, 2, 25)
    assert run.finish().additions


def test_a_loss_without_the_constraint_is_refused():
    model, optimizer, _ = attached()
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ModelError, match="needs its penalty"):
        optimizer.step()


def test_filters_come_back_while_thresholds_move():
    """Weight decay shrinks masked filters, others overtake: masks are made anew at every step."""
    _, _, run = attached()
    one, (conv, norm) = part_of(run).thresholds["convs.1"], part_of(run).layers["convs.1"]
    one.value.data.fill_(0.5)
    gone = int((one(conv, norm) == 0).nonzero()[0])
    conv.weight.data[gone] *= 5
    assert one(conv, norm)[gone] == 1


def test_a_copy_in_training_goes_on_by_itself():
    model, _, _ = attached()
    other, x = copy.deepcopy(model).eval(), batch(0)[0]
    model.eval()
    assert torch.equal(other(x), model(x))
    other.convs[1].weight.data.zero_()
    assert not torch.allclose(other(x), model(x))


def test_the_command_trains_saves_and_resumes(tmp_path):
    """`secateur train` on the shipped residual network, as far as its session goes."""
    asked = {
        "model": "zoo:digits-resnet",
        "method": "lapp",
        "sparsity": 0.5,
        "recipe": {"steps": 6, "lr": 0.05, "batch": 16},
        "settings": {"rate": 1.0, "phase": 0.5},
        "evaluate_every": 3,
        "from_scratch": True,
    }
    session, dense = prepare(TrainJob(**asked), tmp_path / "run", Silent())
    session.run(Silent())
    plan = session.finish()
    assert plan.units()[0] <= 0.5 * plan.units()[1]
    model = session.opened.model
    assert len(additions_of(model)) == 14
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    sc.save(model, tmp_path / "model", plan, factory=session.opened.factory, probe=Batch((batch(0)[0],)))
