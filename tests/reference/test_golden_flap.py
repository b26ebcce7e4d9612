"""FLAP with `reference=True` against what the published code gave on the same inputs (`golden_flap.json`)."""

import json
from pathlib import Path

import flap_recipes as recipes
import pytest
import torch

from secateur import api
from secateur.methods.llm.flap import Released
from secateur.stats.listeners import TokenMoments

GOLDEN = json.loads((Path(__file__).parent / recipes.GOLDEN).read_text())


def test_the_published_recursion_whatever_the_batches():
    expected = {name: torch.tensor(values) for name, values in GOLDEN["single"].items()}
    for sizes in ([7], [1] * 7, [3, 4]):
        stat = Released(12)
        for batch in recipes.inputs().split(sizes):
            stat.update(batch.flatten(0, 1), len(batch))
        torch.testing.assert_close(stat.variance, expected["fluctuation"], rtol=1e-5, atol=0)
        torch.testing.assert_close(stat.mean.float(), expected["mean"], rtol=1e-5, atol=1e-6)
        squares = (stat.deviations + stat.tokens * stat.mean.square()) / stat.samples
        torch.testing.assert_close(squares.float(), expected["square"], rtol=1e-5, atol=0)


def test_it_is_not_the_variance():
    """The published numbers, scaled to a variance, are off: the switch must change something."""
    stat = TokenMoments(12)
    stat.update(recipes.inputs().flatten(0, 1), 7)
    published = torch.tensor(GOLDEN["single"]["fluctuation"]) / 9  # a sum over the nine tokens of a sequence
    assert (published / stat.variance < 0.97).all()
    assert (published / stat.variance > 0.5).all()


def planned(name, **settings):
    metric, structure, ratio, heads = recipes.PLANS[name]
    wanted = {"metric": metric, "structure": structure, "heads": heads, "reference": True} | settings
    return api.plan(recipes.llama(), "flap", ratio, data=recipes.sequences(), **wanted)


@pytest.mark.parametrize("name", recipes.PLANS)
def test_masks_are_the_published_ones(name):
    plan = planned(name)
    for kind, suffix in (("heads", "self_attn:head"), ("neurons", "mlp.gate_proj:neuron")):
        found = [recipes.hexed(plan.masks[f"model.layers.{i}.{suffix}"]) for i in range(recipes.BLOCKS)]
        assert found == GOLDEN["plans"][name][kind]


def test_biases_are_the_published_ones():
    """The published code keeps means in half precision."""
    weights = planned(recipes.WITH_BIASES).weights
    for name, expected in GOLDEN["plans"][recipes.WITH_BIASES]["biases"].items():
        assert (name in weights) == any(expected)
        found = weights[name][: len(expected)] if name in weights else torch.zeros(len(expected))
        assert (found - torch.tensor(expected)).abs().max() <= 2e-3 * max(map(abs, expected))


def test_the_default_weighs_heads_exactly():
    """A head is worth 512 / 3 neurons, which the published code makes 170: other neurons go."""
    name = "wifv-al_am-0.2"
    ours, published = planned(name, reference=False), planned(name)
    assert any(not torch.equal(ours.masks[site], mask) for site, mask in published.masks.items())
