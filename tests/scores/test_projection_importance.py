"""Variable importance in projection against scikit-learn's regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import PLSRegression

from secateur.core.errors import DataError
from secateur.scores.pls import importance_in_projection


def samples(features=9, classes=3, count=60):
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    x = torch.randn(count, features, generator=rng)
    x[:, 0] += 2 * labels
    x[:, 1] -= (labels == 1).float()
    return x, labels


@pytest.mark.parametrize("components", [1, 2, 3])
def test_it_is_the_textbook_formula_of_the_components_that_another_library_finds(components):
    x, labels = samples()
    y = torch.nn.functional.one_hot(labels).double()
    # the labels are centred and not scaled: scale the features here as well as there
    z = ((x - x.mean(0)) / x.std(0)).double().numpy()
    model = PLSRegression(components, scale=False, tol=1e-12, max_iter=5000).fit(z, (y - y.mean(0)).numpy())
    explained = (model.x_scores_**2).sum(0) * (model.y_loadings_**2).sum(0)
    expected = np.sqrt(z.shape[1] * (model.x_weights_**2 @ explained) / explained.sum())
    np.testing.assert_allclose(importance_in_projection(x, labels, components).numpy(), expected, rtol=1e-5)


def test_its_mean_square_is_one_and_what_tells_classes_apart_comes_first():
    x, labels = samples()
    found = importance_in_projection(x, labels)
    assert float(found.square().mean()) == pytest.approx(1)
    assert int(found.argmax()) == 0
    assert torch.allclose(importance_in_projection(x * 1000 + 5, labels), found, rtol=1e-4)


def test_constant_features_score_zero_and_constant_data_or_labels_are_refused():
    x, labels = samples()
    x[:, 4] = 3.0
    assert importance_in_projection(x, labels)[4] == 0
    with pytest.raises(DataError, match="regression"):
        importance_in_projection(torch.ones(20, 4), labels[:20])
    with pytest.raises(DataError, match="regression"):
        importance_in_projection(x, torch.zeros_like(labels))
