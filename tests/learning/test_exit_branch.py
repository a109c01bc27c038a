"""The branch's graph beside numpy: every kind of boundary tensor, confidence, dtype and shape of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isthmus.arrays import DTYPES
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import LearningError, ModelError
from isthmus.processing.classify import softmax
from isthmus.runtime.ort_runner import OrtRunner
from isthmus_tools.graph.exit_branch import BranchWeights, branch_segment
from isthmus_tools.learning.exits.features import MAX_FEATURES, features_of, pools_for
from isthmus_tools.learning.exits.measurement import BranchGraph, BranchRunner

BATCH = "batch"


def branch_of(specs: list[TensorSpec], arrays: dict[str, Any], output: TensorSpec, **options: Any) -> BranchGraph:
    pools = pools_for(specs, {name: array[:1] for name, array in arrays.items()})
    x = features_of(pools, arrays).astype(np.float64)
    rng = np.random.default_rng(0)
    width = x.shape[1]
    weights = BranchWeights(
        x.mean(0),
        1 / np.maximum(x.std(0), 1e-3),
        rng.normal(0, 0.1, (width, 4)),
        rng.normal(0, 1, 4),
        options.pop("statistics", np.array([1.0, 0, 0])),
        options.pop("offset", 0.0),
    )
    tensors = {spec.name: spec for spec in specs}
    graph, segment = branch_segment("c", [tensors[p.tensor] for p in pools], pools, weights, output, **options)
    return BranchGraph(graph, segment, pools, weights)


def run(branch: BranchGraph, arrays: dict[str, Any]) -> dict[str, Any]:
    runner = OrtRunner(branch.graph, branch.segment, providers=("CPUExecutionProvider",), threads=1)
    return runner.run({spec.name: arrays[spec.name] for spec in branch.segment.inputs})


def values(shape: tuple[int, ...], dtype: str = "float32", smooth: int = -1, mean: float = 50) -> Any:
    """Noise around 50, so that means cost digits; neighbours along `smooth` are alike."""
    noise = np.random.default_rng(sum(shape)).normal(0, 1, shape)
    return (mean + np.cumsum(noise, axis=smooth)).astype(DTYPES[dtype])


CASES = {
    "map": ([("h", "float32", (BATCH, 6, 8, 9))], (5, 6, 8, 9), 6 * 49),
    "signed-map": ([("h", "float32", (BATCH, 6, 8, 9))], (5, 6, 8, 9), 2 * 6 * 49),
    "signed-series": ([("h", "float32", (BATCH, 5, "time"))], (5, 5, 40), 2 * 5 * 3),
    "wide-map": ([("h", "float32", (BATCH, 600, 4, 4))], (5, 600, 4, 4), 600),
    "free-map": ([("h", "float32", (BATCH, 6, "height", "width"))], (5, 6, 8, 9), 6),
    "series": ([("h", "float32", (BATCH, 5, 40))], (5, 5, 40), 5 * 9),
    "free-series": ([("h", "float32", (BATCH, 5, "time"))], (5, 5, 40), 5 * 3),
    "vector": ([("h", "float32", (BATCH, 12))], (5, 12), 12),
    "wide-vector": ([("h", "float32", (BATCH, 3000))], (5, 3000), MAX_FEATURES),
    "half": ([("h", "float16", (BATCH, 6, 8, 9))], (5, 6, 8, 9), 6 * 49),
    "single": ([("h", "float32", (1, 6, 8, 9))], (1, 6, 8, 9), 6 * 49),
}


@pytest.mark.parametrize("case", CASES)
def test_graph_and_numpy_agree_on_every_kind_of_tensor(case: str) -> None:
    (declared,), shape, width = CASES[case]
    spec = TensorSpec(*declared)
    arrays = {"h": values(shape, spec.dtype, mean=0 if case.startswith("signed") else 50)}
    branch = branch_of([spec], arrays, TensorSpec("y", "float32", (spec.shape[0], 4)))
    assert sum(pool.width for pool in branch.pools) == features_of(branch.pools, arrays).shape[1] == width
    outputs, (logits, confidences) = run(branch, arrays), branch.reference(arrays)
    np.testing.assert_allclose(outputs[EXIT_SCORES], logits, atol=2e-3)
    np.testing.assert_allclose(outputs[EXIT_CONFIDENCE], confidences, atol=2e-3)


def test_tokens_are_pooled_over_their_axis_with_the_first_apart() -> None:
    tokens = values((5, 30, 8), smooth=1)  # (batch, tokens, width)
    spec = TensorSpec("h", "float32", (BATCH, "tokens", 8))
    branch = branch_of([spec], {"h": tokens}, TensorSpec("y", "float32", (BATCH, 4)))
    features = features_of(branch.pools, {"h": tokens})
    expected = np.concatenate([tokens.mean(1), tokens.max(1), tokens[:, 0]], 1)
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    longer = {"h": values((3, 50, 8), smooth=1)}
    np.testing.assert_allclose(run(branch, longer)[EXIT_SCORES], branch.reference(longer)[0], atol=2e-3)


def test_means_before_a_relu_span_those_behind_it() -> None:
    signed = values((4, 3, 8, 8), mean=0)
    spec = TensorSpec("h", "float32", (BATCH, 3, 8, 8))
    features = [features_of(pools_for([spec], {"h": x[:1]}), {"h": x}) for x in (signed, np.maximum(signed, 0))]
    half = features[0].shape[1] // 2
    np.testing.assert_allclose((features[0][:, :half] + features[0][:, half:]) / 2, features[1], atol=1e-5)


def test_several_tensors_share_the_features_and_whole_numbers_are_left_out() -> None:
    specs = [
        TensorSpec("a", "float32", (BATCH, 40, 6, 6)),
        TensorSpec("mask", "int64", (BATCH, 6)),
        TensorSpec("b", "float32", (BATCH, 9)),
    ]
    arrays = {"a": values((5, 40, 6, 6)), "mask": np.ones((5, 6), np.int64), "b": values((5, 9))}
    branch = branch_of(specs, arrays, TensorSpec("y", "float32", (BATCH, 4)))
    assert [spec.name for spec in branch.segment.inputs] == ["a", "b"]
    assert sum(pool.width for pool in branch.pools) <= MAX_FEATURES
    np.testing.assert_allclose(run(branch, arrays)[EXIT_SCORES], branch.reference(arrays)[0], atol=2e-3)


def test_a_learned_confidence_is_that_of_numpy() -> None:
    arrays = {"h": values((50, 12))}
    spec, output = TensorSpec("h", "float32", (BATCH, 12)), TensorSpec("y", "float32", (BATCH, 4))
    branch = branch_of([spec], arrays, output, statistics=np.array([0.7, 3.0, -2.0]), offset=0.4)
    confidences = run(branch, arrays)[EXIT_CONFIDENCE]
    assert (confidences.dtype, confidences.shape) == (np.float32, (50,))
    np.testing.assert_allclose(confidences, branch.reference(arrays)[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "further"), [("float32", ()), ("float16", (1, 1)), ("float64", (1,))])
def test_scores_have_the_shape_and_dtype_of_the_models_output(dtype: str, further: tuple[int, ...]) -> None:
    arrays = {"h": values((5, 12))}
    spec, output = TensorSpec("h", "float32", (BATCH, 12)), TensorSpec("y", dtype, (BATCH, 4, *further))
    branch = branch_of([spec], arrays, output, probabilities=True)
    scores = run(branch, arrays)[EXIT_SCORES]
    assert (scores.dtype, scores.shape) == (DTYPES[dtype], (5, 4, *further))
    np.testing.assert_allclose(scores.reshape(5, 4), softmax(branch.reference(arrays)[0]), atol=2e-3)


def test_tensors_that_cannot_be_pooled_are_refused() -> None:
    for spec, array in (
        (TensorSpec("h", "int64", (BATCH, 4)), np.ones((1, 4), np.int64)),
        (TensorSpec("h", "float32", (2, BATCH, 4)), np.ones((2, 1, 4), np.float32)),
        (TensorSpec("h", "float32", (BATCH, 2000, 3, 3)), values((1, 2000, 3, 3))),
    ):
        with pytest.raises(LearningError):
            pools_for([spec], {"h": array})


def test_a_graph_that_computes_something_else_is_caught() -> None:
    arrays = {"h": values((5, 12))}
    spec, output = TensorSpec("h", "float32", (BATCH, 12)), TensorSpec("y", "float32", (BATCH, 4))
    right, other = (branch_of([spec], arrays, output, offset=offset) for offset in (0.0, 1.0))
    assert BranchRunner(right)(arrays)[0].shape == (5,)
    with pytest.raises(ModelError, match="what it does not in numpy"):
        BranchRunner(BranchGraph(other.graph, other.segment, right.pools, right.weights))(arrays)
