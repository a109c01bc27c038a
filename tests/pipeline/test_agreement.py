"""Agreement of predictions: the top-1 margin, of log-odds and of probabilities."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.artifacts.fidelity import Measure
from isthmus.pipeline.agreement import margin, margin_of


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9))
def test_log_odds_and_probabilities_give_the_same_nats(scores: list[float]) -> None:
    odds = np.array([scores], np.float32)
    shares = np.exp(odds.astype(np.float64))
    shares /= shares.sum()
    top, second = sorted(scores)[:-3:-1]
    assert margin_of(odds) == pytest.approx(top - second, abs=1e-6)
    assert margin_of(shares) == pytest.approx(top - second, abs=1e-6)
    assert margin_of(shares.astype(np.float32)) == pytest.approx(top - second, abs=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32])
def test_every_dtype_of_scores_has_a_margin(dtype: Any) -> None:
    assert margin_of(np.array([[1, 4, 9]], dtype)) == 5


@pytest.mark.parametrize(
    ("scores", "margin"),
    [
        ([[3.0, 1.0], [5.0, 4.5], [0.0, 9.0]], 0.5),
        ([[[[3.0]], [[1.0]]]], 2.0),
        ([[[3.0, 1.0], [5.0, 4.5]]], 0.5),
        ([3.0, 1.0], 2.0),
        ([2.0, 2.0, 1.0], 0.0),
        ([[math.nan, 1.0, 2.0]], 0.0),
        ([[3.0, 1.0], [math.nan, math.nan]], 0.0),
        ([[math.inf, math.inf, 1.0]], 0.0),
        ([[-math.inf, -math.inf]], 0.0),
        ([[math.inf, 1.0]], math.inf),
        ([[0.0, -math.inf]], math.inf),
        ([[1.0, 0.0]], -math.log(1e-12)),
        ([[7.0], [8.0]], math.inf),
        (7.0, math.inf),
        ([], math.inf),
        ([[], []], math.inf),
    ],
)
def test_the_margin_is_that_of_the_least_clear_row(scores: Any, margin: float) -> None:
    assert margin_of(np.array(scores)) == pytest.approx(margin)
    assert margin_of(np.zeros((0, 5))) == math.inf


def test_only_classes_have_a_margin() -> None:
    answer = {"y": np.array([[1.0, 3.0]]), "z": np.array([[1.0, 9.0]])}
    assert margin(Measure("top1", "y"), answer) == 2
    assert margin(Measure("close"), answer) == math.inf
