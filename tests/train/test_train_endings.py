"""What a training came to, from figures at its end and in between."""

from math import inf, isnan, sqrt

import pytest

from secateur.train.endings import endings

METRICS = {
    "accuracy@10": 0.5, "accuracy@20": 0.9, "accuracy@30": 0.9, "accuracy": 0.7,
    "loss@10": 3.0, "loss@20": 1.0, "loss@30": 2.0, "loss": 5.0,
    "train_loss": 0.25,
}  # fmt: skip


def test_last_mean_best_and_spread():
    found = endings(METRICS, "accuracy", 40, tail=3)
    assert found["last"] == {"accuracy": 0.7, "loss": 5.0, "train_loss": 0.25}
    assert found["mean"] == pytest.approx({"accuracy": 2.5 / 3, "loss": 8 / 3, "train_loss": 0.25})
    assert found["best"] == {"accuracy": 0.9, "loss": 1.0, "train_loss": 0.25}  # the first of equals
    assert found["std"]["loss"] == pytest.approx(sqrt(((1 - 8 / 3) ** 2 + (2 - 8 / 3) ** 2 + (5 - 8 / 3) ** 2) / 3))
    assert found["std"]["train_loss"] == 0


def test_a_loss_is_best_where_it_is_least():
    assert endings(METRICS | {"loss@30": 0.5}, "loss", 40)["best"]["accuracy"] == 0.9
    assert endings(METRICS | {"loss": 0.5}, "loss", 40)["best"]["accuracy"] == 0.7


def test_the_tail_counts_from_the_end_by_steps_and_not_by_letters():
    metrics = {"loss@9": 1.0, "loss@10": 2.0, "loss@100": 3.0, "loss": 4.0}
    assert endings(metrics, "loss", 200, tail=2)["mean"] == {"loss": 3.5}
    assert endings(metrics, "loss", 200, tail=9)["mean"] == {"loss": 2.5}


def test_an_evaluation_at_the_last_step_counts_once():
    assert endings({"loss@20": 1.0, "loss@40": 3.0, "loss": 3.0}, "loss", 40)["mean"] == {"loss": 2.0}


def test_without_evaluations_in_between_all_are_the_end():
    found = endings({"accuracy": 0.0, "loss": inf}, "accuracy", 40)
    assert found["last"] == found["mean"] == found["best"] == {"accuracy": 0.0, "loss": inf}
    assert isnan(found["std"]["loss"])
