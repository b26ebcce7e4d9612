"""Who makes neurons: plain, fused and transposed layers, and what has no such layer."""

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.units import Layout, Occurrence, Site, UnitKind
from secateur.structure.producers import producers


def site(*places: Occurrence) -> dict[str, Site]:
    return {"a:neuron": Site("a:neuron", UnitKind.NEURON, (3,), occurrences=places)}


def model(**parts: nn.Module) -> nn.Module:
    return nn.ModuleDict(parts)


def test_rows_of_every_layer_that_makes_them():
    net = model(gate=nn.Linear(4, 3), up=nn.Linear(4, 3), down=nn.Linear(3, 4))
    places = (Occurrence("gate.weight", 0), Occurrence("gate.bias", 0), Occurrence("up.weight", 0))
    found = producers(net, site(*places, Occurrence("down.weight", 1)))["a:neuron"]
    assert [part.layer for part in found] == ["gate.weight", "up.weight"]
    assert torch.equal(found[1].matrix(net["up"].weight.detach()), net["up"].weight.detach())


@pytest.mark.parametrize(
    "places",
    [
        (Occurrence("both.weight", 0, times=2, period=3),),
        (Occurrence("both.weight", 0), Occurrence("both.weight", 0, offset=3)),
    ],
)
def test_a_fused_layer_counts_once_for_each_part(places):
    net = model(both=nn.Linear(4, 6), down=nn.Linear(3, 4))
    found = producers(net, site(*places, Occurrence("down.weight", 1)))["a:neuron"]
    weight = net["both"].weight.detach()
    assert [part.matrix(weight).tolist() for part in found] == [weight[:3].tolist(), weight[3:].tolist()]


def test_transposed_layers():
    from transformers.pytorch_utils import Conv1D

    net = model(fc=Conv1D(3, 4))
    (found,) = producers(net, site(Occurrence("fc.weight", 1)))["a:neuron"]
    assert found.layout is Layout.TRANSPOSED
    assert torch.equal(found.matrix(net["fc"].weight.detach()), net["fc"].weight.detach().t())


def test_experts_in_one_tensor_and_units_that_nobody_makes_are_refused():
    net = model(down=nn.Linear(3, 4))
    net.register_parameter("experts", nn.Parameter(torch.zeros(2, 3, 4)))
    with pytest.raises(ModelError, match=r"'experts', which is no layer's weight .experts"):
        producers(net, site(Occurrence("experts", 1), Occurrence("down.weight", 1)))
    with pytest.raises(ModelError, match="no linear layer"):
        producers(net, site(Occurrence("down.weight", 1)))
