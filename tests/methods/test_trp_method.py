"""TRP: what is written into the weights and when, the subgradient, the last cut, and layers that become two."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, NumericsError, SettingsError
from secateur.core.method import Batch
from secateur.core.units import Scheme
from secateur.measure import flops, parameters
from secateur.scores.spectrum import Rule, Spectrum, matrices
from secateur.shrink.factorised import Factorised

SHAPE = (2, 8, 8)


class Net(nn.Module):
    """First convolution, three that are trained, one of each kind that is not."""

    def __init__(self):
        super().__init__()
        self.point0, self.stem = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.one, self.two = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1, bias=False)
        self.deep, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.three, self.head = nn.Conv2d(16, 10, (1, 3)), nn.Linear(10, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(10)])

    def forward(self, x):
        x = self.norm(self.stem(self.point0(x))).relu()
        x = self.norms[1](self.two(self.norms[0](self.one(x)).relu())).relu()
        return self.head(self.norms[2](self.three(self.point(self.deep(x)))).relu().mean((2, 3)))


TRAINED = ["one", "two", "three"]


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def plain_net():
    return net()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)


def loss_of(model, step):
    rng = torch.Generator().manual_seed(300 + step)
    return F.cross_entropy(model(torch.randn(16, *SHAPE, generator=rng)), torch.randint(3, (16,), generator=rng))


def advance(model, optimizer, start, stop):
    """The user's loop."""
    model.train()
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def attached(steps=6, sparsity=0.0, model=None, **settings):
    model = net() if model is None else model
    optimizer = sgd(model)
    return model, optimizer, sc.sparsify(model, optimizer, "trp", sparsity, steps=steps, **settings)


def finished(steps=6, sparsity=0.0, **settings):
    model, optimizer, run = attached(steps, sparsity, **settings)
    advance(model, optimizer, 0, steps)
    return run.finish(), model.eval(), run


def weights(model):
    return {name: model.get_submodule(name).weight.detach().clone() for name in TRAINED}


def rank(weight, scheme="channel"):
    return int(torch.linalg.matrix_rank(matrices(weight.double(), Scheme(scheme)), rtol=1e-5).max())


def near(weight, scheme="channel", share=0.9):
    """The truncated weight and its subgradient, written once more by hand."""
    matrix = matrices(weight.double(), Scheme(scheme))
    both = [torch.zeros_like(matrix), torch.zeros_like(matrix)]
    for i, one in enumerate(matrix):
        u, s, v = torch.linalg.svd(one, full_matrices=False)
        r = next(r for r in range(1, len(s) + 1) if s[:r].square().sum() >= share * s.square().sum())
        both[0][i], both[1][i] = u[:, :r] * s[:r] @ v[:r], u[:, :r] @ v[:r]
    if scheme == "spatial":
        n, c, h, w = weight.shape
        return [one.reshape(c, h, n, w).permute(2, 0, 1, 3).float() for one in both]
    return [one.reshape(weight.shape).float() for one in both]


# --- the training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
def test_a_run_is_the_rule_written_by_hand(scheme):
    """Truncated before steps 0, 2 and 4, subgradients on those alone, momentum as it is, truncated at the end."""
    model, optimizer, run = attached(5, every=2, nuclear=0.01, scheme=scheme)
    other = net().train()
    own = sgd(other)
    for step in range(5):
        added = {}
        if step % 2 == 0:
            for name in TRAINED:
                weight = other.get_submodule(name).weight
                value, added[name] = near(weight.detach(), scheme)
                weight.data.copy_(value)
        for name, value in weights(other).items():
            assert torch.allclose(model.get_submodule(name).weight, value, atol=1e-5), (step, name)
        own.zero_grad()
        loss_of(other, step).backward()
        for name, direction in added.items():
            other.get_submodule(name).weight.grad.add_(0.01 * direction)
        own.step()
        advance(model, optimizer, step, step + 1)
    run.finish()
    for name, value in weights(other).items():
        assert torch.allclose(model.get_submodule(name).weight, near(value, scheme)[0], atol=1e-5), name
    assert torch.allclose(model.stem.weight, other.stem.weight, atol=1e-5)


def test_truncation_is_written_into_the_parameter_before_the_forward_pass():
    model, optimizer, run = attached(4, every=3, energy=0.5, nuclear=0.0)
    before = weights(net())
    found = weights(model)
    for name in TRAINED:
        assert rank(found[name]) < rank(before[name])
    advance(model, optimizer, 0, 1)
    assert rank(model.one.weight) == 16  # a plain step has all parameters
    advance(model, optimizer, 1, 3)
    assert rank(model.one.weight) < 10  # truncated for step 3
    assert rank(model.stem.weight) == 12
    assert run.log[0]["ranks"]["one"] == rank(found["one"])


def test_only_the_nuclear_norm_acts_as_a_control():
    model, optimizer, _ = attached(4, every=1, nuclear=0.3, truncate=False)
    assert all(torch.equal(value, weights(net())[name]) for name, value in weights(model).items())
    other = net().train()
    loss_of(other, 0).backward()
    optimizer.zero_grad()
    model.train()
    loss_of(model, 0).backward()
    optimizer.step()
    expected = other.two.weight.grad + 0.3 * near(other.two.weight.detach())[1]
    torch.testing.assert_close(model.two.weight.grad, expected, atol=1e-5, rtol=1e-4)


def test_the_nuclear_norm_falls_with_its_weight():
    norms = []
    for weight in (0.0, 0.05):
        _, model, _ = finished(20, nuclear=weight, every=1, truncate=False)
        norms.append(sum(float(torch.linalg.svdvals(w.flatten(1)).sum()) for w in weights(model).values()))
    assert norms[1] < 0.9 * norms[0]


def test_layers_and_their_reasons():
    plan, _, _ = finished()
    assert plan.sites.keys() == {f"{name}:rank" for name in TRAINED}
    assert any("'deep': grouped" in warning for warning in plan.warnings)
    assert any("'point0' first: linear layers and 1 x 1" in warning for warning in plan.warnings)
    assert not any("'stem'" in warning for warning in plan.warnings)
    assert "stem:rank" in finished(first=True)[0].sites
    model = net()
    few = sc.sparsify(model, sgd(model), "trp", 0.0, steps=2, exclude=["two"])
    assert few.parts[0].layers.layers.keys() == {"one", "three"}
    assert torch.equal(model.two.weight, net().two.weight)


# --- the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled"])
def test_the_split_network_is_the_trained_one(scheme, tmp_path):
    """Truncated weights are of low rank: split at it, nothing changes."""
    settings = {"energy": 0.4, "rule": "energy", "amount": 1 - 1e-9}
    plan, model, _ = finished(12, scheme=scheme, every=4, **settings)
    x = torch.randn(5, *SHAPE)
    dense = model(x)
    size = parameters(model)
    sc.apply_(model, plan)
    split = [module for module in model.modules() if isinstance(module, Factorised)]
    assert split
    assert {module.scheme for module in split} == {scheme}
    assert parameters(model) < size
    assert (model(x) - dense).abs().max() < 0.01 * dense.std(0).min()  # next to what inputs change
    folder = sc.save(model, tmp_path / "out", plan, factory=f"{__name__}:plain_net")
    assert torch.equal(sc.load(folder, trust_factory=True)(x), model(x))


def test_values_below_the_threshold_go_and_one_always_stays():
    plan, model, _ = finished(6, energy=0.8)
    for name, weight in weights(model).items():
        values = torch.linalg.svdvals(weight.double().flatten(1))
        kept, units = plan.kept(f"{name}:rank"), plan.sites[f"{name}:rank"].units
        assert kept in (int((values >= 0.05).sum()), units)
    plan, _, run = finished(6, amount=1e9)
    assert {plan.kept(name) for name in plan.sites} == {1}
    assert sum("of its energy at rank 1" in warning for warning in plan.warnings) == 3
    assert run.log[-1]["what"] == "ranks"


def test_the_decoupled_rule_is_85_percent_of_the_energy():
    plan, model, _ = finished(6, scheme="decoupled", energy=1.0)
    spectrum = Spectrum.of(model.three.weight, Scheme.DECOUPLED)
    assert plan.kept("three:rank") in (spectrum.rank(Rule.ENERGY, 0.85), 3)
    assert spectrum.rank(Rule.ENERGY, 0.85) > spectrum.rank(Rule.VALUE, 0.5)


def test_a_healthy_end_warns_of_nothing():
    plan, _, _ = finished(6, energy=0.95)
    assert not any("of its energy" in warning for warning in plan.warnings)


@pytest.mark.parametrize("quantity", [Quantity.PARAMETERS, Quantity.FLOPS])
def test_a_budget_decides_instead(quantity):
    model = net()
    optimizer = sgd(model)
    run = sc.sparsify(model, optimizer, "trp", budget=Budget(0.6, quantity), steps=4, example=torch.rand(2, *SHAPE))

    def cost():
        return parameters(model) if quantity is Quantity.PARAMETERS else flops(model, Batch((torch.randn(2, *SHAPE),)))

    dense = cost()
    advance(model, optimizer, 0, 4)
    sc.apply_(model, run.finish())
    assert 0.55 * dense < cost() <= 0.6 * dense


def test_a_sparsity_is_a_share_of_all_parameters():
    plan, model, _ = finished(4, 0.5)
    dense = parameters(model)
    assert 0.45 * dense < parameters(sc.apply_(model, plan)) <= 0.5 * dense


def test_the_official_end():
    """Strided layers stay whole in two schemes, the others are split at any rank, and nothing is truncated at last."""
    for scheme in ("channel", "spatial"):
        plan, _, _ = finished(6, scheme=scheme, reference=True, energy=1.0, amount=1e-6, every=4)
        assert plan.kept("two:rank") == plan.sites["two:rank"].units
    plan, model, _ = finished(6, reference=True, energy=0.5, amount=1e-6, every=4)
    assert rank(model.one.weight) == plan.kept("one:rank") == 16  # plain steps since
    plan, _, _ = finished(6, scheme="decoupled", reference=True)
    assert {addition["module"] for addition in plan.additions} == {"one", "two"}  # the third has full rank
    plan, _, _ = finished(6, scheme="decoupled")
    assert {addition["module"] for addition in plan.additions} < {"one", "two"}


# --- resuming and refusing --------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_is_the_straight_one_bit_for_bit(at):
    """At 2 a truncation has been written and its step is still to come; at 3 none."""
    straight, model, _ = finished(7, every=2, nuclear=0.01)
    first, optimizer, run = attached(7, every=2, nuclear=0.01)
    advance(first, optimizer, 0, at)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), run.state_dict()))
    other = net(9)
    own = sgd(other)
    other.load_state_dict(saved[0])
    own.load_state_dict(saved[1])
    again = sc.sparsify(other, own, "trp", 0.0, steps=7, state=saved[2], every=2, nuclear=0.01)
    advance(other, own, at, 7)
    plan = again.finish()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert plan.document() == straight.document()
    assert all(torch.equal(plan.weights[name], value) for name, value in straight.weights.items())


def test_bad_input_is_refused_before_the_training():
    with pytest.raises(ModelError, match="no layer whose rank could be cut"):
        attached(model=nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(BudgetError, match="out of reach"):
        attached(sparsity=0.99)
    with pytest.raises(SettingsError, match="rule=energy"):
        attached(rule="energy", amount=1.5)
    for name, value in (("every", 0), ("energy", 0.0), ("energy", 1.1), ("nuclear", -1)):
        with pytest.raises(SettingsError, match=name):
            attached(**{name: value})


def test_weights_that_became_nan_are_named():
    model, optimizer, _ = attached(4, every=1, include=["two"])
    with torch.no_grad():
        model.two.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="'two'"):
        advance(model, optimizer, 0, 1)
