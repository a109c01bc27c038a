"""The ridge head beside scikit-learn's, and scores of rows left out beside heads fitted without each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge, RidgeCV

from isthmus_tools.learning.exits.ridge import RidgeSolver
from support.digits import digits


def data(rows: int = 300) -> tuple[Any, Any]:
    """Digits with a constant feature, and one-hot classes."""
    pixels, classes = digits()
    features = np.concatenate([pixels[:rows].reshape(rows, -1), np.full((rows, 1), 3e3, np.float32)], 1)
    return features, np.eye(10, dtype=np.float32)[classes[:rows]]


def standard(features: Any) -> Any:
    deviation = features.std(axis=0, dtype=np.float64)
    return (features - features.mean(axis=0, dtype=np.float64)) / np.where(deviation > 0, deviation, 1)


def test_head_and_penalty_are_those_of_scikit_learn() -> None:
    features, targets = data()
    penalties = (1e-4, 1e-2, 1.0)
    fit = RidgeSolver(features).fit(targets, penalties)
    oracle = RidgeCV(alphas=[p * len(features) for p in penalties]).fit(standard(features), targets)
    assert fit.penalty * len(features) == pytest.approx(oracle.alpha_)
    assert fit.error == pytest.approx(-oracle.best_score_, rel=1e-6)
    np.testing.assert_allclose(fit.head(features), oracle.predict(standard(features)), atol=1e-8)


@pytest.mark.parametrize("rows", [40, 200], ids=["fewer-rows-than-features", "more"])
def test_rows_left_out_score_as_by_heads_without_them(rows: int) -> None:
    features, targets = data(rows)
    penalty = 0.01
    fit = RidgeSolver(features).fit(targets, (penalty,))
    # The standardisation is that of all rows; the fit leaves the row out.
    x = standard(features)
    for row in (0, rows // 2, rows - 1):
        others = np.arange(rows) != row
        without = Ridge(penalty * rows).fit(x[others], targets[others])
        np.testing.assert_allclose(fit.left_out[row], without.predict(x[[row]])[0], atol=1e-5)


def test_batches_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = data()
    whole = RidgeSolver(features).fit(targets)
    monkeypatch.setattr("isthmus_tools.learning.exits.ridge._BATCH", 7)
    parts = RidgeSolver(features).fit(targets)
    np.testing.assert_allclose(parts.head.weights, whole.head.weights, atol=1e-9)
    np.testing.assert_allclose(parts.left_out, whole.left_out, atol=1e-6)
