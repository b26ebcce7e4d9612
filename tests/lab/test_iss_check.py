"""The recipe and the loss of the super-resolution check."""

import pytest
import torch
from torch import nn

from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.lab.checks.iss import NETWORKS, HeldRecipe, check, figures, fitting
from secateur.train.study import Ledger


def test_the_rate_is_held_and_the_whole_schedule_follows():
    recipe = HeldRecipe(steps=30, hold=10, lr=1.0, decay="steps", milestones=(0.5,), factor=0.5)
    assert [recipe.rate(step) for step in (0, 9, 10, 19, 20, 29)] == [1, 1, 1, 1, 0.5, 0.5]
    plain = HeldRecipe(steps=30, lr=1.0, decay="steps", milestones=(0.5,), factor=0.5)
    assert [plain.rate(step) for step in (14, 15)] == [1, 0.5]


def test_the_loss_is_the_mean_absolute_error():
    fit = fitting(0, 4, 2, Silent())
    batch = Batch((torch.tensor([[1.0, -3.0]]),), target=torch.tensor([[0.0, 0.0]]))
    assert fit.loss(nn.Identity(), batch).item() == pytest.approx(2.0)


def test_every_way_to_train_runs_on_the_transformer_too():
    found = figures(NETWORKS["Swin-like"], 0, 2, Silent())
    assert set(found) == {"dense", "soft", "hard", "random", "one-shot", "bicubic"}
    assert all(0 < value < 60 for value in found.values())
    assert found["bicubic"] > found["soft"]  # two steps are no training


def test_the_full_check_compares_both_networks_with_hard_one_shot_and_bicubic():
    ledger = Ledger(None, {})
    figures = {"dense": 33.0, "soft": 31.0, "hard": 29.0, "random": 27.0, "one-shot": 30.5, "bicubic": 30.0}
    for name in NETWORKS:
        ledger.once(f"{name}-seed0", lambda: figures)
    samples = check.full.run(0, Silent(), ledger)
    assert set(samples) == set(check.full.claims)
    assert [samples[f"{claim} Swin-like"].value for claim in ("hard", "one_shot", "bicubic")] == [2, 0.5, 1]
    assert samples["one_shot EDSR-like"].random == -3.5
