"""Demand 1: any model is pruned rightly or refused by the name of layer and operator, never half-pruned in silence."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import ModelError
from secateur.core.method import Batch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "networks")]

from demand_tools import MOVED, TOLERANCE, gap, total, zeroed

from networks import NETWORKS, output_tensors, warm_up

SOME = ["cifar_resnet20", "unet", "film", "yolo", "lstm_tagger", "fused_vit", "fused_llama", "llama_gqa"]
EXACT = {"multiple": 1, "largest_cut": 1.0}


def outputs(model, batch):
    with torch.no_grad():
        return output_tensors(model(*batch.args, **batch.kwargs))


@pytest.mark.parametrize("method", ["channel_norm", "group_random"])
@pytest.mark.parametrize("name", SOME)
def test_a_cut_model_is_the_zeroed_model_and_as_small_as_asked(name, method):
    network = NETWORKS[name]
    model, batch = warm_up(network.build(), network.inputs), Batch(*network.inputs())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    structure = sc.analyse(model, batch)
    dense, size = outputs(model, batch), total(model)
    plan = sc.plan(model, method, 0.5, example=batch, **EXACT)
    assert plan.warnings == ()
    assert {site: plan.kept(site) for site in plan.sites} == {
        site: found.units - found.units // 2 for site, found in plan.sites.items()
    }
    expected = outputs(zeroed(model, plan), batch)
    assert gap(dense, expected) > MOVED
    promised = structure.parameters({site: plan.kept(site) for site in plan.sites})
    with sc.masked(model, plan, example=batch, verify=False):
        assert gap(expected, outputs(model, batch)) <= TOLERANCE
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    sc.apply_(model, plan, example=batch, verify=False)
    assert gap(expected, outputs(model, batch)) <= TOLERANCE
    assert total(model) == promised < 0.9 * size


def test_the_comparison_would_see_another_cut():
    network = NETWORKS["unet"]
    model, batch = warm_up(network.build(), network.inputs), Batch(*network.inputs())
    one, other = (sc.plan(model, "group_random", 0.5, example=batch, seed=seed, **EXACT) for seed in (0, 1))
    expected = outputs(zeroed(model, one), batch)
    sc.apply_(model, other, example=batch)
    assert gap(expected, outputs(model, batch)) > MOVED


class Between(nn.Module):
    """Two layers, something between them that depends on the subclass, and two layers after it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Linear(6, 16), self.make()
        self.third, self.last = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.last(torch.relu(self.third(self.middle(self.first(x)))))


class Distances(nn.Module):
    """An operator without a rule: every unit's distance to every other."""

    def forward(self, x):
        return torch.cdist(x[..., None], x[..., None]).mean(-1)


class Repeats(nn.Module):
    """As many rounds as a value says."""

    def forward(self, x):
        for _ in range(int(x.abs().sum().item()) % 3 + 1):
            x = torch.tanh(x)
        return x


class WithUnknown(Between):
    make = Distances


class WithValue(Between):
    make = Repeats


def test_an_operator_without_a_rule_is_named_and_what_it_touches_is_left_whole():
    model, x = WithUnknown().eval(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    structure = sc.analyse(model, x)
    assert [(module, operator) for module, operator, _ in structure.unknown] == [("middle", "aten::_cdist_forward")]
    reasons = {(frozen.parameter, frozen.dim): frozen.reason for frozen in structure.frozen}
    assert reasons["first.weight", 0] == "no rule for this operator in 'middle' (_cdist_forward)"
    plan = sc.plan(model, "channel_norm", 0.5, example=x, **EXACT)
    assert list(plan.sites) == ["third:neuron"]
    (warning,) = plan.warnings
    assert warning == "'middle' (aten::_cdist_forward): no rule for this operator; it was left whole"
    expected = outputs(zeroed(model, plan), Batch((x,)))
    sc.apply_(model, plan, example=x, verify=False)
    assert model.first.weight.shape == (16, 6)
    assert model.third.weight.shape == (12, 16)
    assert gap(expected, outputs(model, Batch((x,)))) <= TOLERANCE


def test_a_model_of_which_nothing_can_go_is_refused():
    model = nn.Sequential(nn.Linear(6, 16), Distances())
    with pytest.raises(ModelError, match="nothing is left to cut in Sequential"):
        sc.plan(model, "channel_norm", 0.5, example=torch.randn(4, 6))


def test_control_flow_by_values_is_named_by_layer_and_operator_and_the_cut_follows_it():
    """The number of rounds is computed from activations: every count is the masked model's own."""
    model = WithValue().eval()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    structure = sc.analyse(model, x)
    assert [(module, operator) for module, operator, _ in structure.unknown] == [
        ("middle", "aten::_local_scalar_dense")
    ]
    plan = sc.plan(model, "channel_norm", 0.5, example=x, **EXACT)
    assert plan.warnings == ("'middle' (aten::_local_scalar_dense): a computed number is read; the run goes on with 1",)
    masked = zeroed(model, plan)
    sc.apply_(model, plan, example=x)
    rounds = set()
    for scale in (0.1, 0.5, 1.0, 2.0):
        rounds.add(int((scale * masked.first(x)).abs().sum().item()) % 3)
        assert gap(outputs(masked, Batch((scale * x,))), outputs(model, Batch((scale * x,)))) <= TOLERANCE
    assert len(rounds) > 1  # more than one path was compared


class Fork(Between):
    """One of two layers, by a value computed from weights or by the input."""

    make = nn.Identity

    def __init__(self, by_input):
        super().__init__()
        self.by_input, self.left, self.right = by_input, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        hidden = self.first(x)
        left = (x if self.by_input else hidden).mean() > 0
        return self.last(torch.relu(self.third(self.left(hidden) if left else self.right(hidden))))


def fork(by_input):
    model = Fork(by_input).eval()
    with torch.no_grad():
        model.first.weight.abs_()  # so that the sign of the input decides in both
        model.first.bias.zero_()
    return model, torch.rand(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("by_input", [False, True])
def test_a_branch_not_taken_is_cut_too_or_named(by_input):
    model, x = fork(by_input)
    size = total(model)
    for example, other in ((x, -x), (-x, x)):
        model, _ = fork(by_input)
        try:
            plan = sc.plan(model, "channel_norm", 0.5, example=example, **EXACT)
            sc.apply_(model, plan, example=example)
            said = " ".join(plan.warnings)
        except ModelError as refused:
            said = str(refused)
        if not ("left" in said.split("'") or "right" in said.split("'")):
            assert total(model) < size
            outputs(model, Batch((other,)))
