"""Consensus gates: which blocks get them, their penalty, what the batch decides, and the static network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import BudgetError, DataError, ModelError
from secateur.core.method import Batch
from secateur.core.units import UnitKind
from secateur.gates.pooled import PooledGate
from secateur.measure.flops import flops
from secateur.methods.channels.consensus import ConsensusSettings
from secateur.train.gated import gateable

GATED = ["1.0", "1.1", "2.1"]


class Residual(nn.Module):
    """f(x) + shortcut, with or without a last ReLU."""

    def __init__(self, inputs, width, stride=1, last=True, shortcut=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, stride, 1)
        self.norm = nn.BatchNorm2d(width)
        self.side = nn.Conv2d(inputs, width, 1, stride) if stride > 1 or inputs != width else nn.Identity()
        self.last, self.shortcut = last, shortcut

    def forward(self, x):
        y = self.norm(self.conv(x)) + (self.side(x) if self.shortcut else 0)
        return F.relu(y) if self.last else y


def network(seed=0):
    """Two stages of two blocks; the second starts with a change of shape."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(Residual(4, 4), Residual(4, 4, last=False)),
        nn.Sequential(Residual(4, 6, stride=2), Residual(6, 6)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def batch(step, size=16):
    rng = torch.Generator().manual_seed(900 + step)
    return torch.randn(size, 1, 6, 6, generator=rng), torch.randint(3, (size,), generator=rng)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)


def attached(steps=8, sparsity=0.0, **settings):
    model = network()
    optimizer = sgd(model)
    return model, optimizer, sc.sparsify(model, optimizer, "consensus", sparsity, steps=steps, **settings)


def train(model, optimizer, run, start, stop):
    model.train()
    for step in range(start, stop):
        x, y = batch(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + run.penalty()).backward()
        optimizer.step()


def force(part, values):
    """Gates that do not look at their input: open or closed for every sample."""
    for name, value in values.items():
        with torch.no_grad():
            part.gates[name].last.weight.zero_()
            part.gates[name].last.bias.fill_(value)


# --- where gates go -------------------------------------------------------------------------------


def blocks_of(model):
    return gateable(model, sc.analyse(model, torch.zeros(2, 1, 6, 6)))


def test_only_blocks_of_one_shape_with_an_identity_shortcut_get_gates():
    assert blocks_of(network()) == GATED  # 2.0 changes the shape; the stage "1" is a sequence of blocks, itself none


def test_a_block_without_shortcut_or_with_a_projection_gets_none():
    model = network()
    model[1][0] = Residual(4, 4, shortcut=False)
    model[1][1].side = nn.Conv2d(4, 4, 1)
    assert blocks_of(model) == ["2.1"]


def test_a_block_inside_of_a_block_is_left_to_the_outer_one():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(Residual(4, 4), Residual(4, 4))

        def forward(self, x):
            return x + self.body(x)

    model = network()
    model[1] = nn.Sequential(Outer(), Residual(4, 4))
    assert blocks_of(model) == ["1.0", "1.1", "2.1"]


def test_a_sequence_of_blocks_in_a_list_is_no_block():
    model = network()
    model[1] = nn.Sequential(nn.Sequential(Residual(4, 4), Residual(4, 4)), Residual(4, 4))
    assert blocks_of(model) == ["1.0.0", "1.0.1", "1.1", "2.1"]


def test_blocks_directly_in_the_model_are_no_list_to_take_them_out_of():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Residual(4, 4), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="inside the model"):
        sc.sparsify(model, sgd(model), "consensus", 0.0, steps=5, example=torch.rand(2, 1, 6, 6))


def test_attaching_leaves_the_model_as_it_was():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    sc.sparsify(model, sgd(model), "consensus", 0.0, steps=5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].training


def test_patterns_inclusion_and_exclusion_choose_among_blocks():
    model = network()
    run = sc.sparsify(model, sgd(model), "consensus", 0.0, steps=5, blocks=("1", "2"), exclude=("1.0",))
    assert list(run.parts[0].gates) == ["1.1", "2.1"]
    model = network()
    run = sc.sparsify(model, sgd(model), "consensus", 0.0, steps=5, include=("2.*",))
    assert list(run.parts[0].gates) == ["2.1"]


def test_a_model_without_such_blocks_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="adds convolutions to its unchanged input"):
        sc.sparsify(model, sgd(model), "consensus", 0.0, steps=5, example=torch.rand(2, 1, 6, 6))


# --- the gate and its penalty -----------------------------------------------------------------------


def test_a_gate_is_binary_per_sample_starts_open_and_gets_gradients():
    gate = PooledGate(4, 1, 16, 1.5, torch.Generator().manual_seed(0))
    g = gate(torch.randn(32, 4, 5, 5))
    assert torch.equal(g, torch.ones(32, 1))
    g.sum().backward()
    assert gate.last.bias.grad.item() != 0
    assert gate.first.weight.grad.abs().sum() > 0


def test_gates_start_by_the_seed_each_on_its_own():
    def first(seed, name):
        model = network()
        run = sc.sparsify(model, sgd(model), "consensus", 0.0, steps=5, seed=seed)
        return run.parts[0].gates[name].first.weight

    assert torch.equal(first(0, "1.0"), first(0, "1.0"))
    assert not torch.equal(first(0, "1.0"), first(1, "1.0"))
    assert not torch.equal(first(0, "1.0"), first(0, "1.1"))


def test_a_closed_gate_passes_the_input_on_for_its_samples_only():
    model, _, run = attached()
    (part,) = run.parts
    block, gate = model[1][0], part.gates["1.0"]
    bare = copy.deepcopy(block)
    bare._forward_hooks.clear()
    with torch.no_grad():  # open iff the first channel's mean is positive
        gate.first.weight.zero_()
        gate.first.weight[0, 0] = 1
        gate.last.weight.fill_(1)
        gate.last.bias.fill_(-0.1)
    x = torch.stack([torch.full((4, 5, 5), value) for value in (3.0, -3.0)])
    block.eval(), bare.eval()
    y = block(x)
    assert torch.equal(y[0], bare(x)[0])
    assert torch.equal(y[1], x[1])
    assert not torch.equal(bare(x)[1], x[1])


@pytest.mark.parametrize(("sparsity", "expected"), [(0.0, 0.5), (0.8, (0.5 - 1 / 3) ** 2)])
def test_half_against_half_costs_a_quarter_whatever_the_confidence(sparsity, expected):
    _, _, run = attached(sparsity=sparsity, activation=0.3, polarisation=1.0, ramp=False)
    half = torch.tensor([1.0] * 8 + [0.0] * 8)[:, None]
    run.parts[0].open = dict.fromkeys(GATED, half)
    assert run.penalty().item() == pytest.approx(0.3 * expected + 1.0 * 0.25, abs=1e-6)


def flops_of(model, name):
    """One convolution of 3 x 3 per block, plus its projection: two operations per weight and position."""
    block = model.get_submodule(name)
    return 2 * block.conv.weight.numel() * (16 if name[0] == "2" else 64)  # of 8 x 8 inputs


@pytest.mark.parametrize("costs", ["equal", "parameters", "flops"])
def test_costs_weigh_the_open_gates(costs):
    model, _, run = attached(costs=costs, polarisation=0.0, example=torch.rand(2, 1, 8, 8))
    sizes = {
        "equal": [1, 1, 1],
        "parameters": [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in GATED],
        "flops": [flops_of(model, name) for name in GATED],
    }[costs]
    run.parts[0].open = {name: torch.full((16, 1), float(name == "2.1")) for name in GATED}
    assert run.penalty().item() == pytest.approx(0.3 * sizes[2] / sum(sizes), rel=1e-6)


def test_the_weight_of_disagreement_rises_from_nothing_to_all_of_it():
    _, _, run = attached(steps=11, activation=0.0, polarisation=2.0)
    found = []
    for run.step in (0, 5, 10):
        run.parts[0].open = dict.fromkeys(GATED, torch.tensor([1.0, 0.0] * 8)[:, None])
        found.append(run.penalty().item())
    assert found == pytest.approx([0.0, 0.25, 0.5])


def test_a_small_batch_is_refused():
    model, _, run = attached()
    model(batch(0, size=15)[0])
    with pytest.raises(DataError, match="got 15; use batches of 16"):
        run.penalty()


def test_a_block_that_did_not_run_is_named():
    model, _, run = attached()
    model[1](model[0](batch(0)[0]))
    with pytest.raises(ModelError, match=r"block '2\.1' did not run"):
        run.penalty()


def test_a_loss_without_the_penalty_is_refused():
    model, optimizer, _ = attached()
    model(batch(0)[0]).sum().backward()
    with pytest.raises(ModelError, match="needs its penalty"):
        optimizer.step()


def test_gates_train_without_weight_decay():
    model, optimizer, run = attached()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]
    assert len(optimizer.param_groups[1]["params"]) == 4 * len(GATED)
    before = copy.deepcopy(run.parts[0].gates["1.0"].state_dict())
    train(model, optimizer, run, 0, 2)
    after = run.parts[0].gates["1.0"].state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


# --- the end ----------------------------------------------------------------------------------------


def finished(values, steps=6, **settings):
    """Trained with forced gates: plan, logits of the gated network on a batch, model, optimiser, sparsifier."""
    model, optimizer, run = attached(steps=steps, **settings)
    train(model, optimizer, run, 0, steps - 1)
    force(run.parts[0], values)
    train(model, optimizer, run, steps - 1, steps)
    model.eval()
    force(run.parts[0], values)
    with torch.no_grad():
        gated = model(batch(77)[0])
    return run.finish(), gated, model, optimizer, run


def test_the_static_network_is_the_gated_one_without_gates_and_with_fewer_blocks():
    plan, gated, model, optimizer, _ = finished({"1.0": 5.0, "1.1": -5.0, "2.1": -5.0})
    assert plan.kinds == (UnitKind.BLOCK,)
    assert plan.masks["1"].tolist() == [True, False]
    assert plan.masks["2"].tolist() == [True, False]
    before = sum(p.numel() for p in model.parameters())
    gone = sum(p.numel() for name in ("1.1", "2.1") for p in model.get_submodule(name).parameters())
    static = sc.apply_(model, plan)
    assert torch.allclose(static(batch(77)[0]), gated, atol=1e-5)
    assert sum(p.numel() for p in static.parameters()) == before - gone
    lost = flops(network(), Batch((torch.zeros(1, 1, 6, 6),))) - flops(static, Batch((torch.zeros(1, 1, 6, 6),)))
    assert lost == 2 * (36 * 4 * 4 * 9 + 9 * 6 * 6 * 9)  # the two convolutions that are gone, and nothing else
    assert len(optimizer.param_groups) == 1
    assert not any(m._forward_hooks for m in static.modules())
    assert not plan.warnings


def test_the_mean_of_gates_decides_over_the_last_part_only():
    _model, _, run = attached(steps=10, tail=0.2)
    (part,) = run.parts
    shares = {"1.0": 9, "1.1": 8, "2.1": 0}  # of 16 samples open: only more than half stays
    for run.step in range(10):
        late = run.step >= 8
        part.open = {n: (torch.arange(16) < (k if late else 16)).float()[:, None] for n, k in shares.items()}
        run.penalty()
    assert {name: rate.tolist() for name, rate in part.rates.items()} == {"1.0": [9 / 16], "1.1": [0.5], "2.1": [0.0]}
    run.step = 10
    plan = run.finish()
    assert plan.masks["1"].tolist() == [True, False]
    assert plan.masks["2"].tolist() == [True, False]
    assert "no consensus: a gate of '1.1' contradicted its majority for 50.0 %" in plan.warnings[0]
    assert plan.facts["1"] == {"open_0": 0.5625, "open_1": 0.5, "agreement": 0.53125}


@pytest.mark.parametrize(("value", "sentence"), [(5.0, "3 of 3 gates are open"), (-5.0, "0 of 3 gates are open")])
def test_nothing_pruned_and_collapse_are_said(value, sentence):
    plan = finished(dict.fromkeys(GATED, value))[0]
    assert sentence in plan.warnings[0]


def test_an_early_end_is_refused():
    model, optimizer, run = attached(steps=8)
    train(model, optimizer, run, 0, 5)
    with pytest.raises(BudgetError, match="5 of 8 steps"):
        run.finish()


def test_closing_everything_is_no_aim():
    with pytest.raises(BudgetError, match="close all gates"):
        attached(sparsity=None, budget=sc.Budget(0, "units"))


def test_a_pattern_is_refused():
    with pytest.raises(BudgetError, match="N:M"):
        attached(sparsity=None, budget=sc.Budget.nm("2:4"))


def test_a_floor_keeps_the_blocks_that_most_samples_opened():
    _, _, run = attached(steps=1, sparsity=None, budget=sc.Budget(0.0, floor=2))
    for name, count in zip(GATED, (3, 5, 0), strict=True):
        run.parts[0].open[name] = (torch.arange(16) < count).float()[:, None]
    run.penalty()
    run.step = 1
    plan = run.finish()
    assert plan.masks["1"].tolist() == [True, True]
    assert plan.masks["2"].tolist() == [True, True]  # 2.0 has no gate and 2.1 is needed for two


def test_the_gates_of_data_are_those_of_eval_mode():
    model, _, run = attached()
    force(run.parts[0], {"1.0": 5.0, "1.1": -5.0, "2.1": 5.0})
    found = run.parts[0].gates_on(model, [Batch((batch(step)[0],)) for step in range(2)])
    assert torch.equal(found, torch.tensor([1.0, 0.0, 1.0]).expand(32, 3))


def test_a_resumed_training_is_the_straight_one_bit_by_bit():
    model, optimizer, run = attached(steps=8, tail=0.7)
    train(model, optimizer, run, 0, 8)
    straight, wanted = run.finish(), model.state_dict()

    model, optimizer, run = attached(steps=8, tail=0.7)
    train(model, optimizer, run, 0, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    again = network(seed=5)
    other = sgd(again)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed = sc.sparsify(again, other, "consensus", 0.0, steps=8, tail=0.7, state=saved[2])
    train(again, other, resumed, 4, 8)
    assert resumed.parts[0].samples == run.parts[0].samples + 4 * 16 == 6 * 16
    assert resumed.finish().facts == straight.facts
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    momentum = [
        optimizer.state[p]["momentum_buffer"] for p in resumed.parts[0].extra.parameters if p in optimizer.state
    ]
    assert not momentum


# --- channels -------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """conv, norm, ReLU, depthwise, norm, ReLU, conv with a bias, norm; identity shortcut."""

    def __init__(self, width, inner, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 1), norm(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return x + self.norm3(self.conv3(y))


def bottlenecks(seed=0, norm=nn.BatchNorm2d):
    """Two blocks with 6 and 8 inner channels."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Sequential(Bottleneck(4, 6, norm), Bottleneck(4, 8)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


NARROW, WIDE = "1.0.conv1:channel", "1.1.conv1:channel"


def with_channels(steps=6, model=None, sparsity=0.0, **settings):
    model = model or bottlenecks()
    optimizer = sgd(model)
    settings = {"mode": "channel", "tail": 1 / steps, **settings}
    return model, optimizer, sc.sparsify(model, optimizer, "consensus", sparsity, steps=steps, **settings)


def hold(part, patterns):
    """Gates of channels that do not look at their input."""
    for name, pattern in patterns.items():
        with torch.no_grad():
            part.gates[name].last.weight.zero_()
            part.gates[name].last.bias.copy_(torch.tensor([5.0 if bit else -5.0 for bit in pattern]))


def cut_with(patterns, steps=4, **settings):
    """Trained with held gates: the plan, logits with gates, the cut model, parameters before."""
    model, optimizer, run = with_channels(steps=steps, **settings)
    hold(run.parts[0], patterns)
    for group in optimizer.param_groups[1:]:
        group["lr"] = 0.0  # so held they stay
    train(model, optimizer, run, 0, steps)
    model.eval()
    with torch.no_grad():
        gated = model(batch(77)[0])
    plan, before = run.finish(), sum(p.numel() for p in model.parameters())
    return plan, gated, sc.apply_(model, plan, example=torch.zeros(2, 1, 6, 6)), before


def test_gates_of_channels_sit_where_the_next_layer_reads():
    model, _, run = with_channels()
    (part,) = run.parts
    assert {one.name: (one.block, one.units, one.readers) for one in part.gated} == {
        NARROW: ("1.0", 6, ("1.0.conv3",)),
        WIDE: ("1.1", 8, ("1.1.conv3",)),
    }
    hold(part, {NARROW: [1, 0, 1, 0, 1, 1]})
    seen = []
    model[1][0].conv3.register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    model(batch(0)[0])
    assert seen[0].abs().sum((0, 2, 3)).gt(0).tolist() == [True, False, True, False, True, True]


def test_closed_channels_are_cut_and_the_logits_stay():
    patterns = {NARROW: [1, 0, 1, 0, 1, 1], WIDE: [0, 0, 0, 1, 1, 1, 0, 1]}
    plan, gated, static, before = cut_with(patterns)
    assert plan.kinds == (UnitKind.CHANNEL,)
    assert {name: mask.tolist() for name, mask in plan.masks.items()} == {
        name: [bool(bit) for bit in pattern] for name, pattern in patterns.items()
    }
    with torch.no_grad():
        assert torch.allclose(static(batch(77)[0]), gated, atol=1e-5)
    each = (4 + 1) + 2 + (9 + 1) + 2 + 4  # a row, norm, depthwise kernel, norm, a column
    assert before - sum(p.numel() for p in static.parameters()) == (2 + 4) * each
    assert [static[1][0].conv2.groups, static[1][1].conv1.out_channels] == [4, 4]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in static.modules())
    assert not plan.warnings


@pytest.mark.parametrize(("floor", "kept"), [(0, 1), (3, 3)])
def test_one_channel_stays_but_says_nothing_where_all_were_closed(floor, kept):
    patterns = {NARROW: [0] * 6, WIDE: [1] * 7 + [0]}
    budget = sc.Budget(0.0, floor=floor)
    plan, gated, static, _ = cut_with(patterns, sparsity=None, budget=budget)
    assert plan.kept(NARROW) == kept
    assert f"'{NARROW}' was held at {kept} of 6 channels, 0 gates were open" in plan.warnings
    with torch.no_grad():
        assert torch.allclose(static(batch(77)[0]), gated, atol=1e-5)


def test_channels_that_a_norm_counts_get_no_gate():
    model = bottlenecks(norm=lambda width: nn.GroupNorm(1, width))
    _, _, run = with_channels(model=model, example=torch.rand(2, 1, 8, 8))
    assert list(run.parts[0].gates) == [WIDE]


def test_excluded_layers_keep_their_channels():
    _, _, run = with_channels(exclude=("1.1.conv3",))
    assert list(run.parts[0].gates) == [NARROW]
    with pytest.raises(ModelError, match="with channels between their layers"):
        attached(mode="channel")  # these blocks have one convolution


@pytest.mark.parametrize("costs", ["equal", "parameters", "flops"])
def test_costs_of_channels(costs):
    _, _, run = with_channels(costs=costs, polarisation=0.0, activation=1.0, example=torch.rand(2, 1, 8, 8))
    run.parts[0].open = {NARROW: torch.zeros(16, 6), WIDE: torch.ones(16, 8)}
    assert run.penalty().item() == pytest.approx(8 / 14, rel=1e-6)  # channels of both blocks cost the same


def test_agreement_of_channels_is_a_mean_over_all_of_them():
    _, _, run = with_channels(activation=0.0, polarisation=2.0, ramp=False)
    split = torch.tensor([1.0, 0.0] * 8)[:, None]
    run.parts[0].open = {NARROW: torch.cat([split.expand(16, 2), torch.ones(16, 4)], 1), WIDE: torch.zeros(16, 8)}
    assert run.penalty().item() == pytest.approx(2 * (2 * 0.25) / 14)


def test_weights_of_the_losses_by_default():
    def weights(aims, **given):
        return ConsensusSettings(**given).weights(aims)

    assert weights(False) == pytest.approx((0.3, 1.0))
    assert weights(False, mode="channel") == pytest.approx((3.0, 10.0))
    assert weights(True) == weights(True, mode="channel") == pytest.approx((10.0, 10.0))
    assert weights(False, activation=0.6) == pytest.approx((0.6, 2.0))
    assert weights(True, activation=0.6, polarisation=0.0) == (0.6, 0.0)
