"""BiP: the implicit gradient, the alternation, exact masks, and the traps of its note."""

import copy
from itertools import pairwise
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import BudgetError, ModelError
from secateur.core.trees import load_tree, save_tree
from secateur.methods.weights.bip import BipSettings, implicit_gradient, score_gradient

NAMES = ("0.weight", "3.weight", "7.weight")


def network(seed=0):
    """Two convolutions, a norm, a classifier: 54 + 216 + 24 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 6),
    )


def batch(step):
    rng = torch.Generator().manual_seed(500 + step)
    return torch.randn(8, 1, 5, 5, generator=rng), torch.randint(6, (8,), generator=rng)


def one_step(model, optimizer, step):
    x, y = batch(step)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def train(model, optimizer, start, stop):
    model.train()
    for step in range(start, stop):
        one_step(model, optimizer, step)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-2)


def attached(sparsity=0.7, steps=20, model=None, **more):
    model = network() if model is None else model
    optimizer = sgd(model)
    return model, optimizer, sc.sparsify(model, optimizer, "bip", sparsity, steps=steps, **more)


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict()["state"])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma_inverse", [0.0, 1e-4, 0.5])
def test_the_implicit_gradient_needs_only_the_gradient_of_the_product(gamma_inverse):
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 7, generator=rng, dtype=torch.float64)
    theta[0, 0] = 0.0  # nothing may be divided by it
    mask = torch.rand(5, 7, generator=rng) > 0.5
    mask[0, 0] = True
    head, x = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((3, 5), (9, 7)))
    z = (theta * mask).requires_grad_()
    F.cross_entropy(torch.tanh(x @ z.T) @ head.T, torch.arange(9) % 3).backward()
    found = implicit_gradient(theta, mask, z.grad, gamma_inverse)
    for place in [(0, 0), (1, 2), (4, 6)]:
        t, m, g = theta[place].item(), float(mask[place]), z.grad[place].item()
        assert found[place].item() == pytest.approx((t - gamma_inverse * m * g) * g, abs=1e-12)
    assert found[~mask].ne(0).all()  # hidden entries are told that they are missed
    correction = found - theta * z.grad
    assert (correction[mask] <= 0).all()
    assert not correction[~mask].any()


def test_it_is_the_derivative_of_the_lower_optimum_when_the_curvature_is_small():
    h, gamma = 1e-3, 1.0
    a = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    m = torch.tensor([1.0, 1.0, 0.7], dtype=torch.float64)

    def theta(m):  # argmin of h/2 |m theta - a|^2 + gamma/2 |theta|^2
        return h * m * a / (h * m * m + gamma)

    def loss(m):
        return h / 2 * (m * theta(m) - a).square()

    eps = 1e-5
    expected = (loss(m + eps) - loss(m - eps)) / (2 * eps)
    g = h * (m * theta(m) - a)
    torch.testing.assert_close(implicit_gradient(theta(m), m, g, 1 / gamma), expected, rtol=1e-2, atol=0)
    plain = implicit_gradient(theta(m), m, g, 0.0)
    assert (plain / expected - 1).abs().min() > 0.3  # half of it is the correction


def test_the_official_correction_squares_the_score_gradient():
    theta, g = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 0.5])
    mask, scores = torch.tensor([True, False]), torch.tensor([-1.0, 4.0])
    ours = score_gradient(theta, mask, g, scores, BipSettings(gamma_inverse=0.1))
    assert ours.tolist() == pytest.approx([-(2 - 0.05) * 0.5, -1.5])
    official = score_gradient(theta, mask, g, scores, BipSettings(gamma_inverse=0.1, reference=True))
    assert official.tolist() == pytest.approx([-1 - 0.1 * 1, -1.5 - 0.1 * 2.25])
    hydra = score_gradient(theta, mask, g, scores, BipSettings(gamma_inverse=0.1, variant="hydra"))
    assert hydra.tolist() == pytest.approx([-1.0, -1.5])


# --- one step of each -----------------------------------------------------------------------------


def test_both_kinds_of_step_equal_a_computation_by_hand():
    model, optimizer, sparsifier = attached(gamma_inverse=0.3, mask_lr=0.5)
    part = sparsifier.parts[0]
    twin = {name: value.detach().clone() for name, value in network().named_parameters()}
    buffers = dict(network().named_buffers())
    scores = {name: twin[name].clone() for name in NAMES}
    masks = {name: part.masks[name].clone() for name in NAMES}
    momentum, own = {name: torch.zeros_like(v) for name, v in twin.items()}, dict.fromkeys(NAMES, 0)
    for step in range(6):
        z = {name: (v * masks[name] if name in NAMES else v).clone().requires_grad_() for name, v in twin.items()}
        x, y = batch(step)
        F.cross_entropy(functional_call(model, {**z, **buffers}, (x,)), y).backward()
        if step % 2 == 0:
            for name, v in twin.items():
                gradient = z[name].grad * masks[name] if name in NAMES else z[name].grad
                momentum[name] = 0.9 * momentum[name] + gradient + 1e-2 * v
                twin[name] = v - 0.1 * momentum[name]
        else:
            for name in NAMES:
                gradient = implicit_gradient(twin[name], masks[name], z[name].grad, 0.3) * scores[name].sign()
                own[name] = 0.9 * own[name] + gradient + 1e-4 * scores[name]
                scores[name] = scores[name] - 0.5 * own[name]
            flat = torch.cat([scores[name].abs().flatten() for name in NAMES])
            cut = flat.sort().values[floor(0.7 * len(flat)) - 1]
            masks = {name: scores[name].abs() > cut for name in NAMES}
        one_step(model, optimizer, step)
        for name, v in twin.items():
            shown = v * masks[name] if name in NAMES else v
            torch.testing.assert_close(model.get_parameter(name).detach(), shown, rtol=1e-4, atol=1e-6)
        for name in NAMES:
            torch.testing.assert_close(part.theta[name], twin[name], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(part.scores[name].detach(), scores[name], rtol=1e-4, atol=1e-6)
            assert torch.equal(part.masks[name], masks[name])


def test_nothing_but_scores_moves_while_scores_move():
    model, optimizer, sparsifier = attached()
    part = sparsifier.parts[0]
    for step in range(8):
        theta = {name: value.clone() for name, value in part.theta.items()}
        scores = {name: value.detach().clone() for name, value in part.scores.items()}
        others = {n: v.clone() for n, v in model.state_dict().items() if n not in NAMES}
        states = state_of(optimizer)
        one_step(model, optimizer, step)
        now = {n: v for n, v in model.state_dict().items() if n not in NAMES}
        moved = [not torch.equal(value, part.scores[name]) for name, value in scores.items()]
        if step % 2 == 0:
            assert not any(moved)
            assert not same(theta.values(), part.theta.values())
            assert now["1.num_batches_tracked"] == others["1.num_batches_tracked"] + 1
            assert not torch.equal(now["1.running_mean"], others["1.running_mean"])
        else:
            assert all(moved)
            assert same(theta.values(), part.theta.values())
            assert same(others.values(), now.values())
            assert all(
                same(s.values(), n.values()) for s, n in zip(states.values(), state_of(optimizer).values(), strict=True)
            )


def test_scores_have_a_memory_of_their_own():
    model, optimizer, sparsifier = attached()
    part = sparsifier.parts[0]
    for name in NAMES:
        pointers = {t.data_ptr() for t in (part.theta[name], part.scores[name], model.get_parameter(name))}
        assert len(pointers) == 3
        assert torch.equal(part.scores[name].detach(), part.theta[name])  # the start is magnitude pruning
    train(model, optimizer, 0, 10)
    for name in NAMES:
        assert not torch.equal(part.scores[name].detach(), part.theta[name])


def test_hidden_weights_decay_and_can_come_back():
    model, optimizer, sparsifier = attached(mask_lr=2.0)
    part = sparsifier.parts[0]
    hidden = {name: ~mask for name, mask in part.masks.items()}
    before = {name: value.clone() for name, value in part.theta.items()}
    one_step(model, optimizer, 0)
    for name in NAMES:
        torch.testing.assert_close(part.theta[name][hidden[name]], before[name][hidden[name]] * (1 - 0.1 * 1e-2))
    train(model, optimizer, 1, 20)
    plan = sparsifier.finish()
    assert sum(int((plan.masks[name] & hidden[name]).sum()) for name in NAMES) > 0


def test_several_steps_of_weights_before_each_of_scores():
    model, optimizer, sparsifier = attached(lower=3)
    part = sparsifier.parts[0]
    moved = []
    for step in range(8):
        scores = part.scores["7.weight"].detach().clone()
        one_step(model, optimizer, step)
        moved.append(not torch.equal(scores, part.scores["7.weight"]))
    assert moved == [False, False, False, True] * 2


def test_the_rate_of_the_scores_drops_at_half_and_at_three_quarters():
    rate = BipSettings(mask_lr=0.2).schedule(100).rate
    assert [rate(step) for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    cosine = BipSettings(variant="hydra").schedule(100).rate
    assert [cosine(step) for step in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0.0])


# --- counts ---------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 950), st.integers(1, 9), st.integers(0, 1000))
def test_the_count_is_exact_over_all_layers_at_every_step(permille, steps, seed):
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sc.sparsify(model, optimizer, "bip", permille / 1000, steps=steps)
    keep = 294 - permille * 294 // 1000
    for step in range(steps):
        assert sum(int(mask.sum()) for mask in sparsifier.decision().masks.values()) == keep
        removed = sum(int((model.get_parameter(name) == 0).sum()) for name in NAMES)
        assert removed == 294 - keep  # the model holds the product, ready to be evaluated
        one_step(model, optimizer, step)
    plan = sparsifier.finish()
    assert plan.units() == (keep, 294)
    assert all(not model.get_parameter(name).detach()[~plan.masks[name]].any() for name in NAMES)


def test_the_ranking_is_global_and_of_absolute_scores():
    model = network()
    with torch.no_grad():
        model[3].weight.copy_(-1 - torch.rand(4, 6, 3, 3))  # all negative and larger than everything else
    _, _, sparsifier = attached(0.5, model=model)
    masks = sparsifier.decision().masks
    assert int(masks["3.weight"].sum()) == 147 - sum(int(masks[n].sum()) for n in ("0.weight", "7.weight"))
    assert int(masks["3.weight"].sum()) == 145  # one for each of the other layers


@pytest.mark.parametrize(("granularity", "dim"), [("filter", 0), ("channel", 1)])
def test_whole_filters_or_channels_of_convolutions(granularity, dim):
    model, optimizer, sparsifier = attached(0.5, granularity=granularity, mask_lr=1.0)
    train(model, optimizer, 0, 20)
    plan = sparsifier.finish()
    assert set(plan.masks) == {"0.weight", "3.weight"}
    for mask in plan.masks.values():
        units = mask.transpose(0, dim).flatten(1)
        assert (units.all(1) | ~units.any(1)).all()
    first = plan.masks["0.weight"].transpose(0, dim).flatten(1).any(1)
    second = plan.masks["3.weight"].transpose(0, dim).flatten(1).any(1)
    assert (int(first.sum()), int(second.sum())) == ((3, 2) if granularity == "filter" else (1, 3))
    assert (model[7].weight != 0).all()


def test_the_first_filters_are_those_of_the_largest_norm():
    _, _, sparsifier = attached(0.5, granularity="filter")
    norms = network()[0].weight.detach().flatten(1).norm(dim=1)
    chosen = sparsifier.decision().masks["0.weight"].flatten(1).all(1)
    assert set(chosen.nonzero().flatten().tolist()) == set(norms.topk(3).indices.tolist())


def test_a_transposed_convolution_has_its_filters_in_the_second_dimension():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    optimizer = sgd(model)
    masks = sc.sparsify(model, optimizer, "bip", 0.5, steps=4, granularity="filter").decision().masks
    assert masks["0.weight"].all(0).flatten(1).all(1).sum() == 2


def test_at_least_one_filter_stays_and_that_is_said():
    model, optimizer, sparsifier = attached(0.95, granularity="filter")
    train(model, optimizer, 0, 20)
    plan = sparsifier.finish()
    assert [int(m.flatten(1).any(1).sum()) for m in plan.masks.values()] == [1, 1]
    _, _, sparser = attached(0.99, granularity="filter", model=nn.Sequential(nn.Conv2d(1, 400, 1)))
    assert int(sparser.decision().masks["0.weight"].sum()) == 4  # no floor needed, none mentioned
    assert not sparser.warnings


def test_keeping_everything_is_dense_training():
    model, optimizer, sparsifier = attached(0.0)
    train(model, optimizer, 0, 20)
    plan = sparsifier.finish()
    twin = network()
    train(twin, sgd(twin), 0, 20)
    assert same(model.state_dict().values(), twin.state_dict().values())
    assert plan.units() == (294, 294)


# --- HYDRA, reports -------------------------------------------------------------------------------


def test_hydra_leaves_every_weight_as_it_was():
    model, optimizer, sparsifier = attached(variant="hydra", mask_lr=1.0)
    start = sparsifier.decision().masks
    train(model, optimizer, 0, 20)
    plan = sparsifier.finish()
    dense = network()
    for name, parameter in model.named_parameters():
        expected = dense.get_parameter(name).detach()
        assert torch.equal(parameter.detach(), expected * plan.masks[name] if name in NAMES else expected)
    assert any(not torch.equal(plan.masks[name], start[name]) for name in NAMES)


def test_flips_are_reported_and_add_up():
    model, optimizer, sparsifier = attached(mask_lr=1.0, report=4)
    shown = [sparsifier.decision().masks]
    for step in range(20):
        one_step(model, optimizer, step)
        if (step + 1) % 4 == 0:
            shown.append(sparsifier.decision().masks)
    entries = [entry for entry in sparsifier.log if entry["what"] == "bip"]
    expected = [sum(int((a[n] ^ b[n]).sum()) for n in NAMES) for a, b in pairwise(shown)]
    assert [entry["flips"] for entry in entries] == expected
    assert sum(expected) > 0
    assert all(entry["density"] == pytest.approx(89 / 294) for entry in entries)


@pytest.mark.parametrize(("mask_lr", "word"), [(1e-9, "never changed"), (1e3, "lower mask_lr"), (0.3, None)])
def test_masks_that_never_or_always_change_are_said(mask_lr, word):
    model, optimizer, sparsifier = attached(mask_lr=mask_lr, mask_decay=0.0, report=20)
    train(model, optimizer, 0, 20)
    warnings = sparsifier.finish().warnings
    assert any(word in sentence for sentence in warnings) if word else not warnings


# --- resuming, bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 9, 19])
@pytest.mark.parametrize("more", [{}, {"granularity": "filter"}, {"variant": "hydra"}, {"lower": 2}], ids=str)
def test_resuming_anywhere_equals_the_straight_run(cut, more, tmp_path):
    straight, optimizer, sparsifier = attached(mask_lr=1.0, report=5, **more)
    train(straight, optimizer, 0, 20)
    plan, log = sparsifier.finish(), sparsifier.log
    first, optimizer, sparsifier = attached(mask_lr=1.0, report=5, **more)
    train(first, optimizer, 0, cut)
    save_tree({"m": first.state_dict(), "o": optimizer.state_dict(), "s": sparsifier.state_dict()}, tmp_path / "state")
    state = load_tree(tmp_path / "state")
    again, optimizer, sparsifier = attached(mask_lr=1.0, report=5, **more)
    again.load_state_dict(state["m"])
    optimizer.load_state_dict(state["o"])
    sparsifier.load_state_dict(state["s"])
    train(again, optimizer, cut, 20)
    resumed = sparsifier.finish()
    assert all(torch.equal(plan.masks[name], resumed.masks[name]) for name in plan.masks)
    assert same(straight.state_dict().values(), again.state_dict().values())
    assert sparsifier.log == log


def test_masks_stay_after_the_last_planned_step():
    model, optimizer, sparsifier = attached(mask_lr=1.0)
    train(model, optimizer, 0, 20)
    masks = sparsifier.masks.all()
    train(model, optimizer, 20, 26)
    assert all(not model.get_parameter(n).detach()[~m].any() for n, m in masks.items())
    assert all(torch.equal(sparsifier.finish().masks[n], m) for n, m in masks.items())


def test_stopping_early_is_refused():
    model, optimizer, sparsifier = attached()
    train(model, optimizer, 0, 7)
    with pytest.raises(BudgetError, match="after 7 of 20 steps"):
        sparsifier.finish()


def test_filters_of_a_network_without_convolutions_are_refused():
    with pytest.raises(ModelError, match="needs convolutions"):
        attached(model=nn.Sequential(nn.Linear(4, 4)), granularity="filter")
