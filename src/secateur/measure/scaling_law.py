"""Scaling laws: the loss of a training from its parameter count and its tokens, L = E + A / N^alpha + B / D^beta.

With N the average number of active weights over the training's steps, one law holds for dense and for gradually
pruned runs (Jin et al. 2025). Fitted as Hoffmann et al. 2022 do it: Huber loss of the log residuals, L-BFGS from a
grid of starts. Say with the coefficients which weights N counts: laws over all parameters and over linear
layers alone do not transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import DataError

Array = NDArray[np.float64]

DELTA = 1e-3  # where the Huber loss of a log residual turns linear
FEWEST = 6  # runs: one more than there are coefficients
BOOTSTRAPS = 100
STARTS = 16  # of the grid, the best ones
EXPONENTS = (0.1, 0.3, 0.6, 1.0)  # starts of alpha and beta
PORTIONS = (0.05, 0.3)  # starts of the share of the loss that each reducible term makes at a typical run


@dataclass(frozen=True)
class TrainingRun:
    """One finished training: parameters (average count if pruned), training tokens seen, loss in nats."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta.

    Attributes:
        E, A, alpha, B, beta: the coefficients.
        errors: standard error of each, by name; of A and B that of their logarithm (`log_A`, `log_B`).
        residuals: log(observed / predicted) of every run fitted.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    errors: dict[str, float]
    residuals: tuple[float, ...]

    def predict(self, parameters: float, tokens: float) -> float:
        """The loss of a run."""
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def fit_scaling_law(runs: Sequence[TrainingRun], seed: int = 0) -> ScalingLaw:
    """The law that fits the runs best; standard errors from a residual bootstrap.

    Args:
        runs: dense and sparse ones together.
        seed: of the bootstrap.

    Raises:
        DataError: fewer than 6 runs, a single parameter count or token count, or a value that is not positive.
    """
    _check(runs)
    n, d, loss = (np.log([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss"))
    shift = n.mean(), d.mean()  # centred logs: exponents and factors hardly depend on each other then
    x = n - shift[0], d - shift[1]
    starts = sorted(_starts(loss), key=lambda start: _objective(start, *x, loss)[0])[:STARTS]
    best = min((_minimise(start, *x, loss) for start in starts), key=lambda found: found[1])[0]
    residuals = loss - _log_loss(best, *x)
    spread = _bootstrap(best, x, residuals, seed)
    fits = np.array([_named(theta, shift) for theta in spread])
    e, log_a, alpha, log_b, beta = _named(best, shift)
    names = ("E", "log_A", "alpha", "log_B", "beta")
    errors = dict(zip(names, fits.std(axis=0, ddof=1).tolist(), strict=True))
    return ScalingLaw(e, float(np.exp(log_a)), alpha, float(np.exp(log_b)), beta, errors, tuple(residuals.tolist()))


def _check(runs: Sequence[TrainingRun]) -> None:
    if len(runs) < FEWEST:
        raise DataError(f"a scaling law has 5 coefficients and needs {FEWEST} runs or more, got {len(runs)}")
    for place, run in enumerate(runs):
        for name in ("parameters", "tokens", "loss"):
            value = getattr(run, name)
            if not (isfinite(value) and value > 0):
                raise DataError(f"run {place} has {name}={value}; a scaling law needs positive numbers")
    for name, exponent in (("parameters", "alpha"), ("tokens", "beta")):
        if len({getattr(run, name) for run in runs}) < 2:
            raise DataError(f"all runs have the same {name}, so {exponent} cannot be told; vary them")


def _log_loss(theta: Array, n: Array, d: Array) -> Array:
    """Log of the law at centred log N and log D; theta is log E, log of both terms at the centre, alpha, beta."""
    return np.asarray(np.logaddexp.reduce(_terms(theta, n, d)), dtype=float)


def _terms(theta: Array, n: Array, d: Array) -> Array:
    e, a, b, alpha, beta = theta
    return np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])


def _objective(theta: Array, n: Array, d: Array, log_loss: Array) -> tuple[float, Array]:
    """Sum of the Huber losses in units of delta squared, and its gradient."""
    terms = _terms(theta, n, d)
    predicted = np.logaddexp.reduce(terms)
    error = (predicted - log_loss) / DELTA
    huber = np.where(np.abs(error) <= 1, error**2 / 2, np.abs(error) - 0.5)
    slope = np.clip(error, -1, 1) / DELTA * np.exp(terms - predicted)  # [3 terms, runs]
    gradient = np.array([*slope.sum(axis=1), -(slope[1] * n).sum(), -(slope[2] * d).sum()])
    return float(huber.sum()), gradient


def _starts(log_loss: Array) -> list[Array]:
    middle = float(log_loss.mean())
    return [
        np.array([middle + np.log(1 - p - q), middle + np.log(p), middle + np.log(q), alpha, beta])
        for p, q, alpha, beta in product(PORTIONS, PORTIONS, EXPONENTS, EXPONENTS)
    ]


def _minimise(start: Array, n: Array, d: Array, log_loss: Array) -> tuple[Array, float]:
    from scipy.optimize import minimize

    # an exponent below 0 would let the loss rise with size; E may fade out, but not below e^-20 nats
    bounds = [(-20, 20)] * 3 + [(0, 5)] * 2
    found = minimize(_objective, start, (n, d, log_loss), "L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": 500})
    return np.asarray(found.x, dtype=float), float(found.fun)


def _bootstrap(best: Array, x: tuple[Array, Array], residuals: Array, seed: int) -> list[Array]:
    """Fits to the fitted values with residuals drawn anew, widened for the 5 coefficients they were fitted with."""
    rng = np.random.default_rng(seed)
    fitted, widened = _log_loss(best, *x), residuals * sqrt(len(residuals) / (len(residuals) - 5))
    drawn = rng.choice(widened, size=(BOOTSTRAPS, len(residuals)))
    return [_minimise(best, *x, fitted + noise)[0] for noise in drawn]


def _named(theta: Array, shift: tuple[Any, Any]) -> tuple[float, float, float, float, float]:
    """E, log A, alpha, log B, beta in the user's units."""
    e, a, b, alpha, beta = map(float, theta)
    return float(np.exp(e)), a + alpha * float(shift[0]), alpha, b + beta * float(shift[1]), beta
