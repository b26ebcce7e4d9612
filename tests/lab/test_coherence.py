"""Coherence: the same counts three ways, and a verdict that a wrong criterion fails."""

from __future__ import annotations

import copy

import pytest
import torch

import secateur as sc
from secateur import zoo
from secateur.core.errors import SettingsError
from secateur.lab.coherence import Coherence, chosen, coherence
from secateur.measure import quality
from secateur.shrink.apply import masked


@pytest.fixture(scope="module")
def digits():
    model = zoo.load_model("digits-mlp")
    data = zoo.load_data("digits").evaluation
    return model, data, sc.plan(model, "global_magnitude", 0.9, keep_scores=True, spread="uniform")


def test_magnitude_is_coherent_and_its_opposite_is_not(digits):
    model, data, plan = digits
    before = copy.deepcopy(model.state_dict())
    found = coherence(model, plan, data)
    assert found.holds
    assert found.higher_is_better
    with masked(model, plan):
        assert found.standard == quality(model, data).value
    plan = copy.deepcopy(plan)
    plan.scores = {name: -score for name, score in plan.scores.items()}
    turned = coherence(model, plan, data)
    assert not turned.holds
    assert (turned.standard, turned.reversed) == (found.reversed, found.standard)
    assert turned.random == found.random
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_choices_keep_as_many_units_in_every_site(digits):
    _, _, plan = digits
    for scores in (plan.scores, {name: -score for name, score in plan.scores.items()}):
        other = chosen(plan, scores)
        assert {name: other.kept(name) for name in other.sites} == {name: plan.kept(name) for name in plan.sites}
    assert all(torch.equal(chosen(plan, plan.scores).masks[name], mask) for name, mask in plan.masks.items())


def test_draws_follow_the_seed(digits):
    model, data, plan = digits
    first, again, other = (coherence(model, plan, data, draws=2, seed=seed).random for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 2


def test_the_verdict():
    better = Coherence("accuracy", True, 0.9, (0.5, 0.7), 0.1)
    assert better.chance == pytest.approx(0.6)
    assert better.holds
    assert "the order holds" in str(better)
    assert not Coherence("perplexity", False, 0.9, (0.5,), 0.1).holds
    assert Coherence("perplexity", False, 4.0, (5.0,), 6.0).holds
    assert not Coherence("perplexity", False, 4.0, (4.0,), 6.0).holds
    assert not Coherence("accuracy", True, float("nan"), (0.5,), 0.1).holds
    assert better.to_json()["holds"] is True


def test_what_is_refused(digits):
    model, data, plan = digits
    with pytest.raises(SettingsError, match="keep_scores=True"):
        coherence(model, sc.plan(model, "global_magnitude", 0.5), data)
    with pytest.raises(SettingsError, match="draws"):
        coherence(model, plan, data, draws=0)
    changed = copy.deepcopy(plan)
    changed.weights = {"1.weight": torch.zeros(1)}
    with pytest.raises(SettingsError, match="changes kept weights"):
        coherence(model, changed, data)
