"""Codecs of hidden states: applied by the router's setting, and no token depends on how others were grouped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS, TOKEN_CODECS, Choice
from isthmus.artifacts.fidelity import TOP1, measure_for
from isthmus.context import Context
from isthmus.errors import Missing, SettingsError
from isthmus.pipeline import Route, execute
from isthmus.routing import override_codec
from isthmus.runtime.session_store import SessionStore
from isthmus.wire.frame import Step
from support.decoders import VOCABULARY
from support.published_decoders import PublishedDecoder, chained

CUTS = ("layer_1", "layer_2")


def no_tables(digest: str, tensor: str, codec: str) -> Any:
    raise AssertionError(f"{codec} of {tensor} needs no table")


def coded(decoder: PublishedDecoder, store: SessionStore, codec: str, cuts: Sequence[str] = CUTS) -> Route:
    return override_codec(decoder.route(cuts, *chained(store)), Choice.parse(codec), no_tables, measure_for)


def ids(length: int) -> list[int]:
    return list(map(int, np.random.default_rng(7).integers(1, VOCABULARY, length)))


@pytest.mark.parametrize("codec", [c for c in TOKEN_CODECS if c not in ("raw", "transform/4")])
def test_every_cut_of_a_language_model_is_encoded(
    codec: str, tiny_decoder: PublishedDecoder, store: SessionStore
) -> None:
    route = coded(tiny_decoder, store, codec)
    result = execute(
        route, {"input_ids": np.array([ids(5)])}, Context.from_headers({}, longest_s=60), step=Step("one", 0)
    )
    assert [dict(run.codecs) for run in result.runs] == [{}, {"layer_1": codec}, {"layer_2": codec}]
    assert result.runs[1].payload_bytes < result.runs[1].raw_bytes


def test_next_tokens_do_not_depend_on_how_tokens_were_grouped(
    tiny_decoder: PublishedDecoder, store: SessionStore
) -> None:
    route = coded(tiny_decoder, store, "int8-token/1")
    tokens, found = np.array([ids(60)]), set()
    for number, size in enumerate((60, 7, 1)):
        steps = [
            execute(
                route,
                {"input_ids": tokens[:, start : start + size]},
                Context.from_headers({}, longest_s=60),
                step=Step(f"session {number}", start, reserve=60),
            )
            for start in range(0, 60, size)
        ]
        found.add(tuple(np.concatenate([step.outputs["logits"] for step in steps], axis=1).argmax(axis=-1)[0].tolist()))
    assert len(found) == 1


@pytest.mark.parametrize("codec", [*sorted({*CODEC_IDS} - {*TOKEN_CODECS} - INPUT_CODECS), "transform/4@0.2+0.6:1"])
def test_a_codec_of_whole_tensors_is_refused_for_a_language_model(
    codec: str, tiny_decoder: PublishedDecoder, store: SessionStore
) -> None:
    with pytest.raises(SettingsError, match="int8-token/1") as caught:
        coded(tiny_decoder, store, codec)
    assert caught.value.facts["variable"] == "codec"


def test_a_calibrated_codec_needs_a_language_models_calibration(
    tiny_decoder: PublishedDecoder, store: SessionStore
) -> None:
    with pytest.raises(Missing) as caught:
        coded(tiny_decoder, store, "transform/4@0.8")
    assert caught.value.hint == "calibrate it: isthmus calibrate tiny"


def test_the_prediction_of_a_language_model_is_its_next_token(tiny_decoder: PublishedDecoder) -> None:
    measure = measure_for(tiny_decoder.model.bundle)
    assert (measure.kind, measure.output) == (TOP1, "logits")
