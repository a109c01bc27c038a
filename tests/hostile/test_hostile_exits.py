"""Exits and fusions against heads that answer wrongly, and forged manifests of exits and variants."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from isthmus.artifacts import bundle as bundles
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.fusion import Fusion, FusionGain
from isthmus.artifacts.gate import EXIT_CONFIDENCE, EXIT_SCORES
from isthmus.context import Context, Deadline
from isthmus.errors import HopRejected, RegistryError
from isthmus.pipeline import LocalHop, Result, execute, plan_route
from isthmus.pipeline.hop import HopReply
from isthmus.runtime.early_exit import stands
from isthmus.runtime.session_store import open_store
from isthmus.wire.frame import Frame
from support.bundles import Published, cache_of, segment_settings
from support.exits import publish_classifier, rows
from support.patience import LONG_S

SURE, UNSURE = [0.9, 0.9], [0.1, 0.9]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_classifier(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def tail(classes: Published, tmp_path_factory: pytest.TempPathFactory) -> LocalHop:
    folder = tmp_path_factory.mktemp("tail")
    return LocalHop(open_store(cache_of(classes, folder), segment_settings(classes, folder)))


class ForgedHead:
    """A head that answers with given tensors."""

    name, encodes = "forged", False

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = {name: np.asarray(values, np.float32) for name, values in tensors.items()}

    def call(self, frame: Frame, context: Context) -> HopReply:
        return HopReply(Frame(self.tensors, frame.bundle, frame.segment, frame.request), 0.0)

    def close(self) -> None:
        """Nothing to close."""


def answered(published: Published, tail: LocalHop, tensors: dict[str, Any], bundle: Bundle | None = None) -> Result:
    """The result of two rows behind a head that answers with `tensors`."""
    route = plan_route(published.digest, bundle or published.bundle, (ForgedHead(tensors), tail)).with_exit()
    return execute(route, rows(2), Context(Deadline.after(LONG_S), "call-1", ""))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_early_predictions_of_other_rows_than_the_requests_are_refused(
    classes: Published, tail: LocalHop, count: int
) -> None:
    early = {EXIT_SCORES: np.zeros((count, 4)), EXIT_CONFIDENCE: np.ones(count)}
    with pytest.raises(HopRejected, match=f"early predictions of {count} rows, and the request has 2"):
        answered(classes, tail, early)
    with pytest.raises(HopRejected):
        answered(classes, tail, {**early, "r1": np.zeros((count, 32))})


def test_scores_of_nan_are_no_early_prediction_however_sure(classes: Published, tail: LocalHop) -> None:
    early = {EXIT_SCORES: np.full((2, 4), np.nan), EXIT_CONFIDENCE: np.array(SURE)}
    assert not stands(early, 0.5)
    with pytest.raises(HopRejected, match="not sure"):
        answered(classes, tail, early)
    result = answered(classes, tail, {**early, "r1": np.ones((2, 32))})
    assert not result.is_early
    assert np.isfinite(result.outputs["logits"]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_fusion_gives_finite_scores_whatever_the_exit_gave(classes: Published, tail: LocalHop, value: float) -> None:
    gain = FusionGain(100, 0.5, 0.6, 20, 10, 0.01, 0.2)
    fusion = Fusion("1", "logits", "log_odds", "logits", (1e6,), (1.0,), 1e6, "labels", "raw", 0.1, gain)
    scores = np.zeros((2, 4), np.float32)
    scores[0, 1] = value
    tensors = {"r1": np.ones((2, 32)), EXIT_SCORES: scores, EXIT_CONFIDENCE: UNSURE}
    result = answered(classes, tail, tensors, structs.replace(classes.bundle, fusion=fusion))
    assert result.unfused is not None
    assert np.isfinite(result.outputs["logits"]).all()


def forged(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> Bundle:
    document = json.loads(bundles.to_json(bundle))
    change(document)
    return bundles.from_json(json.dumps(document).encode())


def of_exit(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["exits"][0]["segment"].update(fields)


def of_gate(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["exits"][0]["gate"].update(fields)


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


SCORES, CONFIDENCE = tensor("exit_scores", "n", 4), tensor("exit_confidence", "n")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (of_exit(id="1..1~x"), "no branch"),
        (of_exit(inputs=[tensor("x", "n", 32)]), "takes other tensors"),
        (of_exit(inputs=[tensor("r1", "n", 31)]), "takes other tensors"),
        (of_exit(outputs=[tensor("exit_scores", "n", 5), CONFIDENCE]), "do not fit 'logits'"),
        (of_exit(outputs=[tensor("exit_scores", "n", 4, dtype="int64"), CONFIDENCE]), "do not fit 'logits'"),
        (of_exit(outputs=[SCORES, tensor("exit_confidence", "n", 1)]), "do not fit 'logits'"),
        (of_exit(outputs=[SCORES, tensor("exit_confidence", "n", dtype="float64")]), "do not fit 'logits'"),
        (of_gate(exiting=2000), "larger counts"),
        (of_gate(failing=900), "larger counts"),
        (of_gate(differing=5000), "larger counts"),
    ],
)
def test_a_forged_exit_is_refused_with_the_manifest(
    classes: Published, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    with pytest.raises(RegistryError, match=fault):
        forged(classes.bundle, change)


@pytest.mark.parametrize(
    "fields",
    [
        {"outputs": [tensor("logits", "n", 4)]},
        {"outputs": [tensor("r1", "n", 31)]},
        {"outputs": []},
        {"inputs": [tensor("x", "n", 31)]},
        {"inputs": [tensor("r1", "n", 32)]},
    ],
    ids=["the model's output", "narrower", "none", "other input", "the cut's tensor"],
)
def test_a_variant_with_other_tensors_than_its_segments_is_refused(classes: Published, fields: dict[str, Any]) -> None:
    def with_variant(**changes: Any) -> Callable[[dict[str, Any]], object]:
        def change(document: dict[str, Any]) -> None:
            segment = next(dict(each) for each in document["segments"] if each["id"] == "..1")
            segment |= {"id": "..1~int8", **changes}
            document["variants"] = [{"segment": segment, "method": "int8", "agreement": 0.9, "inputs": 100}]

        return change

    renamed = forged(classes.bundle, with_variant(outputs=[tensor("r1", "batch", 32)]))
    assert renamed.variants[0].name == "int8"
    with pytest.raises(RegistryError, match="whose tensors are not those of"):
        forged(classes.bundle, with_variant(**fields))


def test_an_exit_at_a_tensor_of_an_exits_name_is_refused(classes: Published) -> None:
    text = bundles.to_json(classes.bundle).decode().replace('"r1"', '"exit_scores"')
    with pytest.raises(RegistryError, match="a tensor has a name of the exit's"):
        bundles.from_json(text.encode())
