"""The scaling law: coefficients recovered from made-up runs, sizes of errors, and tables that cannot be fitted."""

from functools import cache

import numpy as np
import pytest

from secateur.core.errors import DataError
from secateur.measure import scaling_law
from secateur.measure.scaling_law import TrainingRun, fit_scaling_law

TRUE = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}  # Hoffmann et al. 2022


def true_loss(n, d):
    return TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]


def made_up(count=60, noise=0.002, seed=0):
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(7.5, 10, count)
    d = n * 10 ** rng.uniform(0.7, 2.3, count)
    losses = true_loss(n, d) * np.exp(noise * rng.standard_normal(count))
    return [TrainingRun(*map(float, row)) for row in zip(n, d, losses, strict=True)]


@cache
def noisy():
    return fit_scaling_law(made_up())


def test_the_law_is_recovered_from_noisy_runs():
    law = noisy()
    assert law.alpha == pytest.approx(TRUE["alpha"], abs=0.03)
    assert law.beta == pytest.approx(TRUE["beta"], abs=0.03)
    assert pytest.approx(TRUE["E"], abs=0.05) == law.E
    for run in made_up(noise=0):
        assert law.predict(run.parameters, run.tokens) == pytest.approx(run.loss, rel=0.005)
    assert law.predict(7e10, 1.4e12) == pytest.approx(true_loss(7e10, 1.4e12), rel=0.01)  # seven times beyond


def test_without_noise_the_coefficients_are_exact():
    law = fit_scaling_law(made_up(30, noise=0))
    for name, value in TRUE.items():
        assert getattr(law, name) == pytest.approx(value, rel=0.02)
    assert max(map(abs, law.residuals)) < 1e-5
    assert law.errors["alpha"] < 1e-3


def test_standard_errors_are_of_the_size_of_the_errors():
    """Over tables drawn anew, (found - true) / standard error has a spread near 1."""
    found = [fit_scaling_law(made_up(20, seed=seed)) for seed in range(1, 5)]
    for name in ("alpha", "beta"):
        scaled = [(getattr(law, name) - TRUE[name]) / law.errors[name] for law in found]
        assert 0.2 < np.sqrt(np.mean(np.square(scaled))) < 2.5


def test_outliers_weigh_little():
    runs = made_up()
    runs[3] = TrainingRun(runs[3].parameters, runs[3].tokens, 2 * runs[3].loss)
    law = fit_scaling_law(runs)
    assert law.residuals[3] == pytest.approx(np.log(2), abs=0.02)
    assert law.alpha == pytest.approx(TRUE["alpha"], abs=0.03)


def test_the_gradient_is_the_difference_quotient():
    rng = np.random.default_rng(0)
    n, d, loss = rng.standard_normal((3, 9))
    theta = np.array([0.2, -0.5, -0.3, 0.4, 0.3])
    _, gradient = scaling_law._objective(theta, n, d, loss)
    for place in range(5):
        step = np.eye(5)[place] * 1e-6
        ends = [scaling_law._objective(theta + sign * step, n, d, loss)[0] for sign in (1, -1)]
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_sparse_and_dense_runs_share_a_law_only_over_average_counts():
    """Sparse runs that obey the law at their average count break it when they are entered with their final one."""
    runs = made_up(16, noise=0.001)
    by_average = fit_scaling_law(runs)
    by_final = fit_scaling_law(
        [TrainingRun(r.parameters * (0.4 if k % 2 else 1), r.tokens, r.loss) for k, r in enumerate(runs)]
    )
    worst = [max(map(abs, law.residuals)) for law in (by_average, by_final)]
    assert worst[0] < 0.005 < 0.02 < worst[1]


def test_same_runs_same_law():
    assert fit_scaling_law(made_up()) == noisy()
    assert noisy().to_json()["alpha"] == noisy().alpha


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (made_up(5), "needs 6 runs or more, got 5"),
        ([TrainingRun(1e8, 1e9 * k, 3.0) for k in range(1, 8)], "same parameters, so alpha"),
        ([TrainingRun(1e8 * k, 1e9, 3.0) for k in range(1, 8)], "same tokens, so beta"),
        ([*made_up(6), TrainingRun(1e8, 1e9, float("nan"))], "run 6 has loss=nan"),
        ([*made_up(6), TrainingRun(0, 1e9, 2.0)], "run 6 has parameters=0"),
    ],
)
def test_tables_that_tell_nothing_are_refused(runs, words):
    with pytest.raises(DataError, match=words):
        fit_scaling_law(runs)
