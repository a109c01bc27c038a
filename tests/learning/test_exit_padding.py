"""Exits of sequence classifiers: padded tokens, the masks that mark these, and tensors that are no features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.artifacts.tensors import TensorSpec
from isthmus.errors import ModelError
from isthmus.pipeline import LocalHop, execute, plan_route
from isthmus.registry import FolderStore, Registry
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.session_store import open_store
from isthmus_tools.graph.exit_branch import BranchWeights, branch_segment
from isthmus_tools.learning.exits.features import features_of, pools_for
from isthmus_tools.learning.exits.measurement import BranchGraph, BranchRunner
from isthmus_tools.learning.exits.padding import real_tokens, token_masks
from support.bundles import cache_of, segment_settings
from support.cli import document, isthmus
from support.hop_servers import context
from support.texts import BETWEEN, SMALLEST, TRAINED, publish_texts, texts, write_texts

ROWS, TOKENS, WIDTH = 5, 12, 6
LENGTHS = (3, 12, 7, 1, 10)
REAL = np.arange(TOKENS) < np.array(LENGTHS)[:, None]  # (rows, tokens)
BIAS = np.where(REAL, 0, SMALLEST).astype(np.float32)[:, None, None]
CAUSAL = np.where(np.tril(np.ones((TOKENS, TOKENS), bool)), BIAS, np.float32(SMALLEST))
MASKS: dict[str, tuple[str, Any, Any]] = {
    "whole-numbers": ("int64", REAL.astype(np.int64), REAL),
    "truths-by-head": ("bool", REAL[:, None, None], REAL),
    "floats-behind": ("float32", REAL[..., None].astype(np.float32), REAL),
    "bias": ("float32", BIAS, REAL),
    "causal-bias": ("float32", CAUSAL, REAL),
    "infinite-bias": ("float32", np.where(REAL, 0, -np.inf).astype(np.float32)[:, None, None], REAL),
    "half-bias": ("float16", np.where(REAL, 0, -65504).astype(np.float16)[:, None, None], REAL),
    "padding-before": ("int64", REAL[:, ::-1].astype(np.int64), REAL[:, ::-1]),
}


def spec_of(name: str, dtype: str, array: Any) -> TensorSpec:
    return TensorSpec(name, dtype, ("batch", *array.shape[1:]))


def tokens(seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).standard_normal((ROWS, TOKENS, WIDTH))
    return np.cumsum(noise, axis=1).astype(np.float32)


def branch_of(specs: list[TensorSpec], arrays: dict[str, Any]) -> BranchGraph:
    masks = token_masks(specs, [arrays])
    pools = pools_for(specs, {name: array[:1] for name, array in arrays.items()}, masks)
    rng = np.random.default_rng(0)
    width = features_of(pools, arrays).shape[1]
    weights = BranchWeights(
        rng.normal(0, 1, width), np.ones(width), rng.normal(0, 0.1, (width, 3)), np.zeros(3), np.array([1.0, 0, 0]), 0.0
    )
    declared = {spec.name: spec for spec in specs}
    inputs = [declared[name] for name in dict.fromkeys(name for pool in pools for name in pool.tensors)]
    graph, segment = branch_segment("c", inputs, pools, weights, TensorSpec("y", "float32", ("batch", 3)))
    return BranchGraph(graph, segment, pools, weights)


@pytest.mark.parametrize("is_fixed", [True, False], ids=["cells", "all-tokens"])
@pytest.mark.parametrize("kind", MASKS)
def test_features_are_those_of_real_tokens_in_graph_and_numpy(kind: str, is_fixed: bool) -> None:
    dtype, mask, real = MASKS[kind]
    hidden = TensorSpec("h", "float32", ("batch", TOKENS if is_fixed else "tokens", WIDTH))
    specs = [hidden, spec_of("mask", dtype, mask)]
    arrays = {"h": tokens(), "mask": mask}
    (found,) = token_masks(specs, [arrays])
    np.testing.assert_array_equal(real_tokens(found, mask), real)
    branch = branch_of(specs, arrays)
    assert [pool.tensor for pool in branch.pools] == ["h"]
    assert [spec.name for spec in branch.segment.inputs] == ["h", "mask"]
    # Whatever padded tokens hold, features but for the first token are those of the text.
    other = arrays | {"h": np.where(real[..., None], arrays["h"], 1e6).astype(np.float32)}
    features = [features_of(branch.pools, each) for each in (arrays, other)]
    before_first = branch.pools[0].width - 2 * WIDTH  # values and magnitudes
    np.testing.assert_allclose(features[1][:, :before_first], features[0][:, :before_first], rtol=1e-6)
    if not is_fixed:
        means = np.stack([rows[keep].mean(0) for rows, keep in zip(arrays["h"], real, strict=True)])
        np.testing.assert_allclose(features[0][:, :WIDTH], means, rtol=1e-5, atol=1e-6)
    runner = OrtRunner(branch.graph, branch.segment, providers=("CPUExecutionProvider",), threads=1)
    outputs, (logits, confidences) = runner.run(arrays), branch.reference(arrays)
    np.testing.assert_allclose(outputs[EXIT_SCORES], logits, atol=1e-4)
    np.testing.assert_allclose(outputs[EXIT_CONFIDENCE], confidences, atol=1e-4)


def test_a_text_without_a_token_has_finite_features() -> None:
    specs = [spec_of("h", "float32", tokens()), spec_of("mask", "int64", REAL)]
    branch = branch_of(specs, {"h": tokens(), "mask": REAL.astype(np.int64)})
    arrays = {"h": tokens(), "mask": np.zeros((ROWS, TOKENS), np.int64)}
    assert np.isfinite(features_of(branch.pools, arrays)).all()
    BranchRunner(branch)(arrays)  # compares graph and numpy


def test_other_tensors_are_no_masks() -> None:
    rng = np.random.default_rng(0)
    segments = np.array([[0] * 5 + [1] * 4 + [0] * 3, [0] * 2 + [1] * 6 + [0] * 4])
    cases = {
        "no-padding": np.ones((2, TOKENS), np.int64),
        "segment-ids": segments,
        "one-hot": np.eye(TOKENS, dtype=np.float32)[3:5],
        "activations": np.maximum(tokens()[:2], 0),
        "relative-bias": BIAS[:2] + rng.standard_normal((2, 1, 1, TOKENS)).astype(np.float32),
        "scalars": np.array([0.0, 1.0], np.float32),
    }
    specs = [spec_of(name, str(array.dtype), array) for name, array in cases.items()]
    assert token_masks(specs, [cases]) == []


def test_a_row_that_overflows_is_not_compared_and_the_others_are() -> None:
    hidden = tokens()
    branch = branch_of([spec_of("h", "float32", hidden)], {"h": hidden})
    hidden[2] = np.inf
    _, confidences = BranchRunner(branch)({"h": hidden})
    assert np.flatnonzero(np.isnan(confidences)).tolist() == [2]
    other = replace(branch, weights=replace(branch.weights, offset=1.0))
    with pytest.raises(ModelError, match="what it does not in numpy"):
        BranchRunner(other)({"h": hidden})


SAME = "is the same for all inputs"
LEFT_OUT = {
    "mask": {},
    "relative-bias": {"attention_bias": "has features that are not finite"},
    "fitted-without-padding": {"real": SAME, "attention_bias": SAME},
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_classifier_of_texts_with_the_usual_attention_bias_gets_exits(kind: str, tmp_path: Path) -> None:
    published = publish_texts(tmp_path, relative=kind == "relative-bias")
    data = write_texts(tmp_path / "data", TRAINED + 300, 900)
    training = write_texts(tmp_path / "fit", TRAINED, 600, unpadded=kind == "fitted-without-padding")
    arguments = ("exits", "texts", "--data", data, "--training", training, "--registry", published.folder)
    told = document(isthmus(*arguments, "--limit", "5%", "--cut", BETWEEN, "--threads", 1, "--json"))
    (only,) = told["candidates"]
    assert only["left_out"] == LEFT_OUT[kind]
    assert only["gate"]["bound"] <= 0.05
    version = Registry(FolderStore(published.folder)).resolve("texts")
    (early,) = version.bundle.exits
    # The bias itself is no feature; the mask of floats, which crosses too, is the smaller to read.
    inputs = [spec.name for spec in early.segment.inputs]
    assert inputs == (["h1"] if kind == "fitted-without-padding" else ["h1", "real"])
    served = replace(published, bundle=version.bundle, digest=version.digest)
    store = open_store(cache_of(served, tmp_path), segment_settings(served, tmp_path))
    route = plan_route(served.digest, served.bundle, (LocalHop(store),)).with_exit()
    arrays, _ = texts()
    rows = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(900, 960)]
    results = [execute(route, row, context()) for row in rows]
    store.store.close()
    taken = np.mean([result.exit is not None and result.exit.is_taken for result in results])
    assert taken == pytest.approx(only["exits"]["value"], abs=0.25)
    assert taken > 0
