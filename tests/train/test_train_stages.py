"""Stages that share one training: slices, sizes, one learning-rate curve; a teacher's logits in the loss."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.errors import SettingsError
from secateur.data.dataset import DataKind, Dataset
from secateur.train.distil import Distilling, distillation
from secateur.train.loop import Decay, Fitting, Recipe
from secateur.train.schedules import warm_stable_decay
from secateur.train.stages import Slices, stage_bounds, stage_targets


@pytest.mark.parametrize("slices", Slices)
@pytest.mark.parametrize("stages", [1, 2, 5, 20])
def test_slices_are_disjoint_and_use_everything(slices, stages):
    bounds = stage_bounds(4000, stages, slices)
    assert bounds[0] == 0
    assert bounds[-1] == 4000
    assert bounds == sorted(set(bounds))
    assert len(bounds) == stages + 1


def test_fractions_are_the_papers():
    shares = {
        Slices.LINEAR: [2 * p / (5 * 6) for p in range(1, 6)],
        Slices.CONSTANT: [1 / 5] * 5,
        Slices.COSINE: [math.cos((p - 1) * math.pi / 10) - math.cos(p * math.pi / 10) for p in range(1, 6)],
    }
    for slices, expected in shares.items():
        bounds = stage_bounds(30_000, 5, slices)
        found = [(stop - start) / 30_000 for start, stop in pairwise(bounds)]
        assert found == pytest.approx(expected, abs=1e-4)
        assert sum(expected) == pytest.approx(1)


def test_a_stage_without_a_step_is_refused():
    with pytest.raises(SettingsError, match="stage 1 of 5 would get none of the 10 steps"):
        stage_bounds(10, 5, Slices.LINEAR)


@settings(max_examples=50, deadline=None)
@given(target=st.integers(1, 10**9), gone=st.integers(0, 10**9), stages=st.integers(1, 30))
def test_sizes_fall_in_equal_integer_parts_to_the_target(target, gone, stages):
    found = stage_targets(target + gone, target, stages)
    assert found[-1] == target
    assert found == sorted(found, reverse=True)
    assert all(abs((target + gone - size) * stages - gone * p) < stages for p, size in enumerate(found, 1))


def test_the_curve_rises_stays_and_falls():
    recipe = Recipe(steps=100, lr=2.0, decay=Decay.WSD, warmup=0.05, cooldown=0.1, last=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert set(rates[5:91]) == {2.0}
    assert rates[91:] == pytest.approx([2 - 0.18 * k for k in range(1, 10)])
    assert warm_stable_decay(100, 100, 0.05, 0.1, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup", "cooldown", "expected"), [(0.0, 0.0, [1, 1]), (0.0, 1.0, [1, 0.5])])
def test_the_curve_without_one_of_its_parts(warmup, cooldown, expected):
    assert [warm_stable_decay(step, 2, warmup, cooldown, 0.0) for step in range(2)] == expected


def test_distillation_by_hand():
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, 5, generator=rng), torch.randn(6, 5, generator=rng)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    p, q = (teacher / 2).softmax(-1).double(), (student / 2).softmax(-1).double()
    divergence = sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(6)) / 6
    hard = -sum(float(student[i].log_softmax(-1)[labels[i]]) for i in range(6)) / 6
    for alpha in (0.0, 0.3, 1.0):
        found = distillation(student, teacher, labels, 2.0, alpha)
        assert float(found) == pytest.approx(alpha * 4 * divergence + (1 - alpha) * hard, rel=1e-5)
    assert float(distillation(teacher, teacher, labels, 2.0, 1.0)) == pytest.approx(0, abs=1e-6)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, ids):
        return self.out(self.table(ids))


def tiny(seed: int) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


IDS = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))


def test_the_last_position_has_no_label_and_does_not_count():
    data = Dataset("ids", DataKind.TEXT, IDS)
    student, teacher = tiny(0), tiny(1)
    fit = Distilling(Fitting(data, Recipe(steps=2, batch=4)), teacher, 2.0, 1.0)
    (batch,) = data.batches(12)
    before = fit.loss(student, batch).item()
    logits, aim = student(IDS)[:, :-1].reshape(-1, 7), teacher(IDS)[:, :-1].reshape(-1, 7)
    expected = distillation(logits, aim, IDS[:, 1:].reshape(-1), 2.0, 1.0)
    assert before == pytest.approx(expected.item())


def test_a_teacher_alone_pulls_the_student_and_is_left_as_it_was():
    data = Dataset("ids", DataKind.TEXT, IDS)
    student, teacher = tiny(0), tiny(1)
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    fit = Distilling(Fitting(data, Recipe(steps=60, batch=12, lr=0.1), seed=3), teacher, 2.0, 1.0)
    (batch,) = data.batches(12)
    first = fit.loss(student, batch).item()
    fit(student)
    assert fit.loss(student, batch).item() < 0.5 * first
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    again = fit.reordered(4)
    assert isinstance(again, Distilling)
    assert (again.seed, again.alpha) == (4, 1.0)
