"""What function-preserving rescalings do to the choices of each method (small-scale checks of the notes)."""

import pytest

from secateur import api, zoo
from secateur.measure import perplexity
from secateur.shrink.apply import masked
from secateur.zoo.perturb import rescale_llama

LAYERS = ("model.layers.*",)


@pytest.fixture(scope="module", params=[0, 1])
def pair(request):
    model = zoo.load_model("pydoc-llama")
    return model, rescale_llama(model, request.param), zoo.load_data("pydoc", seed=request.param).calibration


def changed(pair, method, **settings):
    """Share of the masks' entries that differ between the model and its rescaled twin."""
    plain, rescaled, data = pair
    first, second = (api.plan(m, method, data=data, include=LAYERS, **settings) for m in (plain, rescaled))
    differ = sum(int((first.masks[name] != second.masks[name]).sum()) for name in first.masks)
    return differ / first.units()[1]


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_wanda_chooses_the_same_and_magnitude_does_not(pair, budget):
    assert changed(pair, "wanda", **budget) == 0
    assert changed(pair, "global_magnitude", spread="uniform", **budget) > 0.1


def test_sparsegpt_is_steady_only_where_rows_do_not_compete(pair):
    """Saliencies w^2 / U_ii^2 do not change with the scale of columns; rows that compete feel their scale.

    The damping, a fraction of the mean diagonal, does depend on it, so it is made small here.
    """
    assert changed(pair, "sparsegpt", sparsity=0.5, percdamp=1e-6) > 0.05
    assert changed(pair, "sparsegpt", sparsity=0.5, percdamp=1e-6, compare="row") < 0.01


def test_sparsegpt_2_of_4_keeps_its_quality_and_block_thresholds_do_not(pair):
    plain, rescaled, data = pair
    evaluation = zoo.load_data("pydoc").evaluation

    def worse(**budget):
        found = []
        for model in (plain, rescaled):
            plan = api.plan(model, "sparsegpt", data=data, include=LAYERS, **budget)
            with masked(model, plan):
                found.append(perplexity(model, evaluation).value)
        return found[1] / found[0]

    assert worse(pattern="2:4") < 1.15
    assert worse(sparsity=0.5) > 1.18
