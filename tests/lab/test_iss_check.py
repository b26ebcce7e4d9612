"""The recipe and the loss of the super-resolution check."""

import pytest
import torch
from torch import nn

from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.lab.checks.iss import HeldRecipe, fitting


def test_the_rate_is_held_and_the_whole_schedule_follows():
    recipe = HeldRecipe(steps=30, hold=10, lr=1.0, decay="steps", milestones=(0.5,), factor=0.5)
    assert [recipe.rate(step) for step in (0, 9, 10, 19, 20, 29)] == [1, 1, 1, 1, 0.5, 0.5]
    plain = HeldRecipe(steps=30, lr=1.0, decay="steps", milestones=(0.5,), factor=0.5)
    assert [plain.rate(step) for step in (14, 15)] == [1, 0.5]


def test_the_loss_is_the_mean_absolute_error():
    fit = fitting(0, 4, 2, Silent())
    batch = Batch((torch.tensor([[1.0, -3.0]]),), target=torch.tensor([[0.0, 0.0]]))
    assert fit.loss(nn.Identity(), batch).item() == pytest.approx(2.0)
