"""Variable importance in projection: what each feature does in a partial-least-squares regression of the labels."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import DataError


def importance_in_projection(features: Tensor, labels: Tensor, components: int = 2) -> Tensor:
    """VIP of every feature, float64 `[features]`; its mean square is 1 (Wold et al. 1993).

    sqrt(d sum_a SS_a w_ja^2 / sum_a SS_a), w_a the unit weights of component a and SS_a what it explains of the
    labels' variance. Features are standardised, a constant one scores 0; the labels are one column per class.

    Args:
        features: `[samples, features]`.
        labels: class indices `[samples]`.
        components: of the regression; fewer where nothing is left to explain.

    Raises:
        DataError: one class only, or no feature varies with the classes.
    """
    x = _centred(features.double())
    spread = x.std(0)
    x = torch.where(spread > 0, x / spread.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
    y = _centred(torch.nn.functional.one_hot(labels - labels.min()).double())
    weights, explained = [], []
    for _ in range(components):
        cross = x.T @ y
        if float(cross.abs().max()) <= 1e-10 * len(x):
            break
        w = torch.linalg.svd(cross, full_matrices=False).U[:, 0]
        t = x @ w
        q = y.T @ t / (t @ t)
        weights.append(w)
        explained.append((t @ t) * (q @ q))
        x = x - torch.outer(t, x.T @ t / (t @ t))
        y = y - torch.outer(t, q)
    if not weights:
        raise DataError("no feature varies with the labels, so a regression cannot tell blocks apart; give more data")
    share = torch.stack(explained) / torch.stack(explained).sum()
    return (x.shape[1] * (torch.stack(weights, 1).square() @ share)).sqrt()


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(0)
