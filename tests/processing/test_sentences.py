"""Texts as rows of ids, and rows of different lengths in common runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.artifacts.bundle import Blob, TextEmbedding
from isthmus.errors import ContextTooLong, ModelError, RequestMalformed, RequestTooLarge
from isthmus.processing.sentences import MAX_TEXT_LENGTH, SentenceTokenizer, embed, padded, runs_of
from support.encoders import save_tokenizer

MODEL = TextEmbedding(Blob("sha256:" + "0" * 64, 1), "ids", "mask", "vector", max_tokens=12, pooling="mean", pad=7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentenceTokenizer:
    path = save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    return SentenceTokenizer(path.read_bytes(), MODEL)


def test_a_text_is_not_cut_where_the_tokenizers_file_says_so(tokenizer: SentenceTokenizer) -> None:
    ids = tokenizer.encode("the cat sat on the mat")
    assert (ids[0], ids[-1]) == (2, 3)
    assert len(ids) == 8  # the file cuts at 4
    assert len(tokenizer.encode("the")) == 3  # and pads to as many


def test_texts_and_ids_that_the_model_does_not_take_are_refused(tokenizer: SentenceTokenizer) -> None:
    with pytest.raises(ContextTooLong, match="has 13 tokens; the model takes at most 12") as e:
        tokenizer.encode("the " * 11)
    assert (e.value.facts["prompt_tokens"], e.value.facts["context"]) == (13, 12)
    with pytest.raises(RequestTooLarge):
        tokenizer.encode("x" * (MAX_TEXT_LENGTH + 1))
    for ids, reason in (([], "no tokens"), ([2, 10**6], "token id 1000000"), ([-1, 5], "token id -1")):
        with pytest.raises(RequestMalformed, match=reason):
            tokenizer.check(ids)


def test_bytes_that_are_no_tokenizer_are_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        SentenceTokenizer(b"{}", MODEL)


def test_rows_end_in_padding_without_mask() -> None:
    inputs = padded([[5, 6, 8], [4]], MODEL)
    assert inputs["ids"].tolist() == [[5, 6, 8], [4, 7, 7]]
    assert inputs["mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.int64)}


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=40), st.integers(1, 60))
def test_runs_hold_every_row_once_within_their_bound(rows: list[list[int]], max_tokens: int) -> None:
    runs = list(runs_of(rows, max_tokens))
    assert sorted(i for run in runs for i in run) == list(range(len(rows)))
    for run in runs:
        assert len(run) == 1 or len(run) * max(len(rows[i]) for i in run) <= max_tokens


def test_vectors_come_in_the_order_of_the_rows() -> None:
    shapes = []

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        shapes.append(inputs["ids"].shape)
        return {"vector": (inputs["ids"] * inputs["mask"]).sum(1, keepdims=True).astype(np.float32)}

    rows = [[1] * 3000, [2], [3] * 2000, [4, 4]]
    assert embed(rows, MODEL, run).tolist() == [[3000.0], [2.0], [6000.0], [8.0]]
    assert shapes == [(2, 2), (1, 2000), (1, 3000)]
