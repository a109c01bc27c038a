"""Fused predictions of a router: who gets one, what responses say, and what guard and canary compare.

The exit's scores are the model's, moved by a class, and the weights leave the exit's alone: a fused prediction is the
next class, and so never the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from msgspec import structs

from isthmus.artifacts.canary import Canary, CanaryRule
from isthmus.artifacts.fusion import Fusion, FusionGain
from isthmus.serving import create_router_app, create_segment_app
from support.bundles import (
    LABELS,
    Published,
    metrics,
    photo,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
)
from support.exits import NEVER, with_exit
from support.patience import eventually
from support.routers import expected_classes, oip_json

FUSION = Fusion(
    cut="6",
    output="logits",
    kind="log_odds",
    output_kind="logits",
    exit_weights=(1.0,),
    model_weights=(0.0,),
    scale=1.0,
    target="labels",
    codec="raw",
    penalty=1.0,
    gain=FusionGain(inputs=500, alone=0.8, fused=0.9, better=60, worse=10, low=0.05, high=0.14),
)


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A model that no request leaves at its exit."""
    folder = tmp_path_factory.mktemp("fused")
    return with_exit(publish_photos(folder), folder, threshold=NEVER, wrong=True)


@pytest.fixture(scope="module")
def fused(unfused: Published) -> Published:
    bundle = structs.replace(unfused.bundle, fusion=FUSION)
    version = unfused.registry.publish(bundle, {})
    return replace(unfused, bundle=bundle, version=version.version, digest=version.digest)


@pytest.fixture(scope="module")
def hops(unfused: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A head and a tail, each a function on a socket of its own."""
    apps = [create_segment_app(segment_settings(unfused, tmp_path_factory.mktemp(n))) for n in ("head", "tail")]
    with served(apps[0]) as head, served(apps[1]) as tail:
        yield head, tail
    for app in apps:
        app.extensions["isthmus"].close()


@pytest.fixture
def router(fused: Published, hops: tuple[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    settings = {"guard_share": 0.0, "model": f"photos:{fused.version}"} | getattr(request, "param", {})
    app = create_router_app(router_settings(fused, tmp_path, hops, **settings))
    yield ready(app.test_client())
    app.extensions["isthmus"].close()


def labels(answer: Any) -> list[str]:
    return [each["label"] for each in answer.json["classes"]]


def own_labels(published: Published, seed: int) -> list[str]:
    return [each["label"] for each in expected_classes(published, photo(seed=seed))]


def moved(names: list[str]) -> list[str]:
    return [LABELS[(LABELS.index(name) + 1) % len(LABELS)] for name in names]


def test_the_router_serves_the_fused_prediction_and_says_so(router: FlaskClient, fused: Published) -> None:
    for seed in range(4):
        answer = router.post("/", data=photo(seed=seed))
        assert answer.status_code == 200, answer.json
        assert labels(answer) == moved(own_labels(fused, seed))
        assert answer.json["route"]["fused"] is True
        assert [s["segment"] for s in answer.json["route"]["segments"]] == ["..6", "6.."]
    infer = f"/v2/models/photos/versions/{fused.version}/infer"
    assert router.post(infer, json=oip_json(fused)).json["parameters"]["fused"] is True


def test_a_caller_who_asks_for_the_full_model_gets_the_tail_alone(router: FlaskClient, fused: Published) -> None:
    answer = router.post("/", data=photo(seed=1), headers={"Isthmus-Exit": "off"})
    assert labels(answer) == own_labels(fused, 1)
    assert "fused" not in answer.json["route"]
    document = oip_json(fused) | {"parameters": {"isthmus.exit": False}}
    infer = f"/v2/models/photos/versions/{fused.version}/infer"
    assert "fused" not in router.post(infer, json=document).json["parameters"]


@pytest.mark.parametrize("router", [{"guard_share": 1.0, "codec": "half/1"}], indirect=True, ids=["half"])
def test_the_guard_compares_what_calibration_measured_and_keeps_the_codec(router: FlaskClient) -> None:
    def checked() -> bool:
        for seed in range(4):
            assert router.post("/", data=photo(seed=seed)).json["route"]["fused"] is True
        return metrics(router)["isthmus_guard_checks_total", ()] >= 8

    eventually(checked)
    found = metrics(router)
    assert found["isthmus_guard_disagreements_total", ()] == found["isthmus_guard_step", ()] == 0


def test_a_canary_with_a_fusion_is_not_rolled_back_for_what_the_fusion_changes(
    unfused: Published, fused: Published, hops: tuple[str, str], tmp_path: Path
) -> None:
    registry, rule = fused.registry, CanaryRule(max_disagreement=0.0, max_errors=1.0, max_latency_ratio=1000)
    registry.move_alias("photos", "prod", unfused.version)
    settings = {"caller_header": "X-Caller", "refresh_s": 0.05, "canary_compared": 1.0, "guard_share": 0.0}
    app = create_router_app(router_settings(fused, tmp_path, hops, **settings))
    client = ready(app.test_client())
    counter = registry.alias("photos", "prod").counter
    canary = Canary(int(fused.version), fused.digest, 0.5, counter + 1, rule)
    registry.move_alias("photos", "prod", unfused.version, canary=canary)

    def compared() -> bool:
        for caller in range(8):
            client.post("/", data=photo(seed=caller), headers={"X-Caller": f"caller {caller}"})
        trials = client.get("/routes").json["canaries"]
        return bool(trials) and trials[-1]["agreed"] + trials[-1]["differed"] >= 8

    eventually(compared)
    (trial,) = client.get("/routes").json["canaries"]
    assert trial["differed"] == 0
    assert registry.alias("photos", "prod").canary is not None
    app.extensions["isthmus"].close()
