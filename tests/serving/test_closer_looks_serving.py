"""Closer looks in a router: as settings and plans name them, as answers tell of them, and as the guard checks them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from msgspec.structs import replace

from isthmus.artifacts import plan as plans_of
from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.choice import Choice, Look
from isthmus.artifacts.fidelity import TOP1, Measure
from isthmus.codecs import Encoding
from isthmus.errors import SettingsError
from isthmus.pipeline import LocalHop, LookPolicy, Route, plan_route
from isthmus.routing.codec_override import override_codec
from isthmus.routing.guard import Guard, Sample
from isthmus.serving import create_router_app
from isthmus.serving.metrics import FunctionMetrics
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import Published, metrics, pair_model, photo, publish, ready, router_settings, until
from support.hops import Echo
from support.patience import LONG_S
from support.plans import candidate, plan_for
from support.served_looks import CALIBRATED, COARSE, FINE, PLAIN, Gate, answers, looks, refuses, slowly
from support.served_looks import head as head
from support.served_looks import known as known
from support.served_looks import new_tail as new_tail
from support.served_looks import photos as photos
from support.served_looks import tail as tail
from support.served_looks import tail_of_all as tail_of_all

# The router


Routers = Callable[..., FlaskClient]
INFER = "/v2/models/photos/infer"
LOOKS = "transform/4@0.2+0.4:1000+0.6:1000"


@pytest.fixture
def router(photos: Published, tail: Gate, tmp_path: Path) -> Routers:
    def start(codec: str = "", **given: Any) -> FlaskClient:
        settings = router_settings(photos, tmp_path, ("local", tail.url), codec=codec, guard_share=0.0, **given)
        client = ready(create_router_app(settings).test_client())
        tail.then()
        return client

    return start


def ask(client: FlaskClient, seed: int = 0, **headers: str) -> Any:
    answer = client.post("/", data=photo(seed=seed), headers=headers)
    assert answer.status_code == 200, answer.json
    return answer


def outcomes(client: FlaskClient) -> dict[str, float]:
    name = "isthmus_looked_answers_total"
    return {labels[0][1]: count for (found, labels), count in metrics(client).items() if found == name}


def counted(client: FlaskClient, what: str) -> float:
    return metrics(client)[f"isthmus_{what}_total", ()]


@pytest.mark.parametrize("codec", [LOOKS, "sparse/2@0.2+0.4:1000+0.9:1000"])
def test_answers_timings_and_metrics_tell_of_closer_looks(router: Routers, photos: Published, codec: str) -> None:
    client = router(codec)
    answer = ask(client)
    route = answer.json["route"]
    assert (route["looks"], route["looks_ended"]) == (2, "last")
    assert [s["segment"] for s in route["segments"]] == ["..6", "6..", "6..", "6.."]
    stages = [part.strip().partition(";")[0] for part in answer.headers["Server-Timing"].split(",")]
    hops = [name for name in stages if name.startswith(("hop", "again"))]
    again = [f"again{i}{part}" for i in range(2) for part in ("", "-run", "-pack")]
    assert hops == ["hop0", "hop0-run", "hop1", "hop1-run", "hop1-pack", *again]
    assert answer.json["timings_ms"]["again0"] > 0
    assert (outcomes(client), counted(client, "closer_looks")) == ({"last": 1}, 2)
    x = photos.inputs["x"]
    inputs = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    told = client.post(INFER, json={"inputs": [inputs]}).json["parameters"]
    assert (told["looks"], told["looks_ended"], told["segments"]) == (2, "last", "..6,6..,6..,6..")
    assert (outcomes(client), counted(client, "closer_looks")) == ({"last": 2}, 4)
    sent = metrics(client)["isthmus_hop_sent_bytes_total", (("hop", route["segments"][1]["hop"]),)]
    assert sent >= sum(s["sent_bytes"] for s in route["segments"])


def test_each_outcome_is_counted(router: Routers, tail: Gate) -> None:
    client = router(LOOKS)
    tail.then(answers, refuses)
    assert ask(client).json["route"]["looks_ended"] == "failed"
    tail.then(slowly)
    assert ask(client, **{"X-Timeout": "2300ms"}).json["route"]["looks_ended"] == "late"
    assert (outcomes(client), counted(client, "closer_looks")) == ({"failed": 1, "late": 1}, 0)
    tail.then(answers, answers, refuses)
    assert ask(client).json["route"]["looks"] == 1
    assert (outcomes(client), counted(client, "closer_looks")) == ({"failed": 2, "late": 1}, 1)
    sure = router("transform/4@0.2+0.4:0.000000001")
    assert ask(sure).json["route"]["looks_ended"] == "sure"
    assert outcomes(sure) == {"sure": 1}


def test_why_a_look_failed_is_logged_and_counted_as_other_failed_calls_are(
    router: Routers, tail: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    client = router(LOOKS, log_level="warning")
    tail.then(answers, answers, refuses)
    with caplog.at_level(logging.WARNING, "isthmus"):
        assert ask(client).json["route"]["looks_ended"] == "failed"
    (facts,) = [r.facts for r in caplog.records if "closer look failed" in r.getMessage()]  # type: ignore[attr-defined]
    assert (facts["hop"], facts["type"]) == (tail.url, "HopUnavailable")
    assert "503" in facts["error"]
    assert metrics(client)["isthmus_hop_errors_total", (("error", "HopUnavailable"), ("hop", tail.url))] == 1


def test_tensors_that_closer_looks_send_more_of_count_once(router: Routers, tail: Gate) -> None:
    looking, plain = router(LOOKS), router("transform/4@0.2")
    hop = (("hop", tail.url),)
    told = [(ask(client).json["route"], metrics(client)) for client in (looking, plain)]
    assert [route.get("looks") for route, _ in told] == [2, None]
    assert len({route["link_raw_bytes"] for route, _ in told}) == 1
    tensors, sent = (
        [found[f"isthmus_hop_{what}_bytes_total", hop] for _, found in told] for what in ("tensor", "sent")
    )
    assert tensors[0] == tensors[1] > 0
    assert sent[0] > sent[1]


def test_answers_are_those_of_the_quality_that_answered(router: Routers) -> None:
    once = [router(f"transform/4@{quality}") for quality in (0.2, 0.4, 0.6)]
    looking = router("transform/4@0.2+0.4:60+0.6:20")
    seen = set()
    for seed in range(40):
        route = (found := ask(looking, seed).json)["route"]
        expected = ask(once[route["looks"]], seed).json
        assert "looks" not in expected["route"]
        assert [c["label"] for c in found["classes"]] == [c["label"] for c in expected["classes"]]
        scores = [[c["probability"] for c in answer["classes"]] for answer in (found, expected)]
        assert np.allclose(*scores, atol=1e-4)
        seen.add((route["looks"], route["looks_ended"]))
    assert seen == {(0, "sure"), (1, "sure"), (2, "last")}


def test_a_plans_closer_looks_are_taken_and_codec_raw_switches_them_off(
    photos: Published, tail: Gate, tmp_path: Path
) -> None:
    looked = plans_of.CloserLooks.of("logits", (Look(FINE, 900.0), Look(0.6, 900.0)), (0.5, 0.25))
    codecs = {"p6": plans_of.Coding(CALIBRATED, COARSE)}
    chosen = candidate("split-6-t", "split", cuts=("6",), codecs=codecs, looks=looked)
    version = publish_plan(photos.registry, photos.bundle, {}, plan_for(photos.bundle, chosen))
    hops = ("local", tail.url)

    def answer(**given: Any) -> Any:
        settings = router_settings(photos, tmp_path, hops, model=f"photos:{version.version}", **given)
        return ask(ready(create_router_app(settings).test_client())).json["route"]

    found = answer()
    assert (found["name"], found["looks"], found["looks_ended"]) == ("split-6-t", 2, "last")
    assert [s["codecs"] for s in found["segments"][1:]] == [{"p6": CALIBRATED}] * 3
    raw = answer(codec="raw")
    assert "looks" not in raw
    assert ["codecs" in s for s in raw["segments"]] == [False, False]


@pytest.mark.parametrize(
    "codec",
    [
        "sparse/2@0.4+0.3:1",
        "sparse/2@0.4+0.8",
        "sparse/2@0.4+0.8:0",
        "int8/1+0.8:0.2",
        "transform/4@0.2+0.4:1+0.4:1",
        "transform/4@0+0.1:1+0.2:1+0.3:1+0.4:1+0.5:1",
    ],
)
def test_a_setting_that_is_no_closer_look_stops_the_start(photos: Published, tmp_path: Path, codec: str) -> None:
    with pytest.raises(SettingsError, match=r"the setting codec: .*quality") as e:
        create_router_app(router_settings(photos, tmp_path, ("local",), codec=codec))
    assert e.value.facts["variable"] == "codec"


def test_answers_that_are_no_classes_are_refused_and_the_router_says_what_to_do(tmp_path: Path) -> None:
    pair = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {}, partitions=[["1"]])
    settings = router_settings(pair, tmp_path / "cache", ("local",), codec="sparse/2@0.4+0.8:0.2")
    client = create_router_app(settings).test_client()
    assert until(lambda: "closer looks" in client.get("/ready").get_data(as_text=True))
    said = client.get("/ready")
    assert said.status_code == 503
    assert "which pair does not answer: set codec to sparse/2@0.4, or" in said.json["error"]
    settings = router_settings(pair, tmp_path / "cache", ("local",), codec="sparse/2@0.4")
    assert ready(create_router_app(settings).test_client())


def test_a_new_version_whose_fidelity_another_version_wrote_leaves_the_old_one_serving(
    photos: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = photos.registry
    registry.move_alias("photos", "live", photos.version)
    settings = router_settings(
        photos, tmp_path, ("local",), model="photos:live", codec="sparse/2@0.2+0.4:1000", refresh_s=0.0, guard_share=0.0
    )
    client = ready(create_router_app(settings).test_client())
    data = b'{"format": "isthmus.fidelity/1"}'
    blob = Blob(digest_of(data), len(data))
    (tmp_path / "fidelity").write_bytes(data)
    files = {blob.digest: tmp_path / "fidelity"}
    registry.publish(replace(photos.bundle, fidelity=blob), files, alias="live")

    def told() -> list[Any]:
        assert ask(client).json["model_version"] == photos.version
        return [r.facts for r in caplog.records if "stays as known" in r.getMessage()]  # type: ignore[attr-defined]

    with caplog.at_level(logging.WARNING, "isthmus"):
        assert until(lambda: bool(told()))
    assert "isthmus calibrate photos" in told()[0]["hint"]


def test_a_measure_of_what_is_no_output_is_refused_too(photos: Published, head: LocalHop) -> None:
    route = plan_route(photos.digest, photos.bundle, (head,))
    for measure in (Measure(TOP1, "nothing"), Measure("close")):
        with pytest.raises(SettingsError, match="does not answer") as e:
            override_codec(route, Choice.parse("sparse/2@0.4+0.8:0.2"), lambda *_: None, lambda _, m=measure: m)  # type: ignore[misc]
        assert e.value.facts["variable"] == "codec"


# The guard


def sample(photos: Published, hop: Any, wanted: LookPolicy | None, answer: Any, step: int = 0) -> Sample:
    whole = photos.bundle.segment("..")
    encodings = ({"x": Encoding(PLAIN, COARSE)},)
    route = Route(photos.digest, photos.bundle, (whole,), (hop,), encodings, wanted)
    return Sample(route, photos.inputs, {}, {"logits": answer}, step)


def test_the_guards_steps_drop_the_closer_looks_and_its_notes_name_them(photos: Published) -> None:
    right, wrong = np.eye(5, dtype=np.float32)[None, 0], np.eye(5, dtype=np.float32)[None, 1]
    hop = Echo({"logits": right})
    guard = Guard(1.0, lambda _: None, FunctionMetrics(), logging.getLogger("isthmus.guard-test"), deadline_s=LONG_S)
    wanted = looks(0.25, 0.4, 0.9)
    route = sample(photos, hop, wanted, right).route
    assert guard.apply_fallback(route)[0] == route
    found = []
    for step in range(6):
        for _ in range(2):
            guard.check(sample(photos, hop, wanted, wrong, step))
        taken, fallback = guard.apply_fallback(route)
        assert taken.looks is None
        assert fallback.notes["guard_instead_of"] == "sparse/2@0.2+0.4:0.25+0.9:0.25"
        packing = taken.encodings[0].get("x")
        found.append((fallback.notes["guard_codec"], packing and (packing.codec, packing.quality)))
    assert found == [
        ("sparse/2@0.9", ("sparse/2", 0.9)),
        ("sparse/2@0.95", ("sparse/2", 0.95)),
        ("sparse/2@1", ("sparse/2", 1.0)),
        ("int8/1", ("int8/1", 1.0)),
        ("half/1", ("half/1", 1.0)),
        ("raw", None),
    ]
    for other in (None, looks(0.3, 0.4, 0.9), looks(0.25, 0.9), looks(0.25, 0.4, 0.8)):
        assert guard.apply_fallback(sample(photos, hop, other, right).route)[1].level == 0, (
            "other routes stand where they stood"
        )


def test_the_guard_compares_the_answer_that_was_given_with_the_raw_one(
    photos: Published, tail: Gate, tmp_path: Path
) -> None:
    """Of a coarse quality that loses answers and closer looks that take every one of them back."""
    hops = ("local", tail.url)
    settings = router_settings(photos, tmp_path, hops, codec="sparse/2@0+0.5:1000+1:1000", guard_share=1.0)
    client = ready(create_router_app(settings).test_client())
    seeds = iter(range(100_000))

    def checked() -> bool:
        assert ask(client, next(seeds)).json["route"]["looks"] == 2
        return metrics(client)["isthmus_guard_checks_total", ()] >= 10

    assert until(checked)
    assert metrics(client)["isthmus_guard_disagreements_total", ()] == 0
    assert metrics(client)["isthmus_guard_step", ()] == 0
