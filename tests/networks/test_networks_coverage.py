import covering
import pytest
import torch
from covering import MOSTLY_FROZEN, REFUSED, SHRUNK, Verdict, cover, prune_and_compare, without_place
from network_tools import Network, tensors
from torch import nn

from networks import NETWORKS, available
from secateur.core.errors import ModelError
from secateur.core.units import Site, UnitKind
from secateur.structure.analysis import Structure
from secateur.structure.observe import Observation

FAST_FAMILIES = ("hand-written", "transformers", "diffusers")
FAST = [
    *(
        "convnext_tiny",
        "densenet121",
        "mobilenet_v3_small",
        "mvit_v2_s",
        "resnet18",
        "squeezenet1_0",
        "swin_t",
        "vit_b_16",
    ),
    *("crossvit_tiny_240", "levit_128s", "nf_resnet26", "pvt_v2_b0", "swinv2_cr_tiny_224", "vit_tiny_patch16_224"),
]
"""Of torchvision and timm; the slow tests take all of them."""


def check(name):
    if not available(NETWORKS[name]):
        pytest.skip(f"needs {NETWORKS[name].family}: make networks")
    found = cover(NETWORKS[name])
    if name in REFUSED:
        assert (found.verdict, found.reason) == (Verdict.REFUSED, REFUSED[name])
        return
    assert found.verdict is Verdict.RIGHT, found.reason
    assert found.unknown == ()
    assert (found.left >= SHRUNK) == (name in MOSTLY_FROZEN)


@pytest.mark.parametrize("name", [n for n, one in NETWORKS.items() if one.family in FAST_FAMILIES] + FAST)
def test_a_cut_network_is_the_masked_network_and_smaller(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_cut_network_is_the_masked_network_and_smaller(name):
    check(name)


def test_exceptions_are_made_for_networks_of_the_list_only():
    assert {*MOSTLY_FROZEN, *REFUSED} <= set(NETWORKS)


def test_a_cut_of_other_units_is_wrong(monkeypatch):
    reference, random_plan = covering.reference, covering.random_plan
    monkeypatch.setattr(
        covering, "reference", lambda model, plan, found, batch: reference(model, random_plan(found, 1), found, batch)
    )
    found = cover(NETWORKS["unet"])
    assert found.verdict is Verdict.WRONG
    assert "off by" in found.reason


@pytest.mark.parametrize(
    ("gap", "moved", "after", "reason"),
    [
        (0.0, 1.0, 10, ""),
        (1e-4, 1.0, 10, "off by 0.0001"),
        (float("nan"), 1.0, 10, "off by nan"),
        (0.0, 1.0, 11, "11 parameters are left where 10 were promised"),
        (0.0, 0.0, 10, "proves nothing"),
        (0.0, float("nan"), 10, "proves nothing"),
    ],
)
def test_all_that_was_promised_is_checked(gap, moved, after, reason):
    found = covering.what_is_wrong(gap, moved, after, promised=10)
    assert reason in found
    assert bool(found) == bool(reason)


class Refused(nn.Module):
    """Nothing that can be observed."""

    def forward(self, x):
        raise ModelError("the layer 'x' is unheard of; name another")


def test_an_error_that_says_why_is_a_refusal():
    found = cover(Network("refused", "hand-written", Refused, tensors((4,))))
    assert (found.verdict, found.reason) == (Verdict.REFUSED, "the layer 'x' is unheard of; name another")


def test_any_other_error_is_wrong_and_says_where():
    def build():
        raise KeyError("x")

    found = cover(Network("broken", "hand-written", build, tensors((4,))))
    assert found.verdict is Verdict.WRONG
    assert found.reason.startswith("KeyError in test_networks_coverage.py:")


def test_what_is_known_of_a_network_is_counted():
    found = prune_and_compare(NETWORKS["cifar_resnet20"])
    assert sum(found.sites.values()) > 0
    assert set(found.sites) == {"channel"}
    assert found.frozen["it is an output of the model"] == 1
    assert 0 < found.left < SHRUNK
    assert found.gap <= covering.TOLERANCE < covering.MOVED <= found.moved
    assert found.seconds > 0


def test_units_go_within_the_least_and_the_multiples_that_the_code_asks_for():
    sites = {name: Site(name, UnitKind.CHANNEL, (10,)) for name in ("a", "b", "c")}
    structure = Structure(Observation(), sites=sites, multiples={"b": 4}, minimums={"c": 9})
    plan = covering.random_plan(structure)
    assert {name: int(mask.sum()) for name, mask in plan.masks.items()} == {"a": 7, "b": 4, "c": 9}
    assert torch.equal(plan.masks["a"], covering.random_plan(structure).masks["a"])


def test_reasons_are_counted_without_their_places():
    assert without_place("must match a fixed size in 'a.b' (div)") == "must match a fixed size (div)"
    assert without_place("'a.weight' takes no part in the run") == "the parameter takes no part in the run"
    assert without_place("its units come from the buffer 'a.b'") == "its units come from a buffer"
    assert without_place("'a.heads' is the size of several things") == "one attribute is the size of several things"
