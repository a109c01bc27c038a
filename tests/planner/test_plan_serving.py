"""The router with a plan in its bundle: what the plan says is what it does, and no other bundle's plan ever serves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.plan import Candidate, Coding, to_json
from isthmus.processing.image import as_jpeg
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import (
    PREPROCESS,
    TOLERANCE,
    Published,
    photo,
    photo_array,
    photos_model,
    publish,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
    until,
)
from support.plans import candidate, plan_for
from support.segments import run_whole


@dataclass(frozen=True)
class Place:
    """The published model, and the two functions that serve it."""

    published: Published
    hops: tuple[str, str]
    folder: Path

    def plan(self, chosen: Candidate) -> str:
        """Publish a plan of that candidate; the reference of the version."""
        plan = plan_for(self.published.bundle, chosen)
        version = publish_plan(self.published.registry, self.published.bundle, {}, plan)
        return f"photos:{version.version}"

    def router(self, model: str, hops: tuple[str, ...] = (), **given: Any) -> FlaskClient:
        settings = router_settings(self.published, self.folder / "router", hops or self.hops, model=model, **given)
        return create_router_app(settings).test_client()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("planned")
    published = publish_photos(folder)
    apps = [create_segment_app(segment_settings(published, folder / name)) for name in ("head", "tail")]
    with served(apps[0]) as head, served(apps[1]) as tail:
        yield Place(published, (head, tail), folder)


def answer(client: FlaskClient, data: bytes) -> Any:
    response = ready(client).post("/", data=data)
    assert response.status_code == 200, response.get_data(as_text=True)
    return json.loads(response.data)


def infer(place: Place, model: str) -> Any:
    published, client = place.published, place.router(model)
    x = published.inputs["x"]
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    name, _, version = model.partition(":")
    response = ready(client).post(f"/v2/models/{name}/versions/{version}/infer", json={"inputs": [tensor]})
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.json


def expected(published: Published, data: bytes) -> float:
    logits = run_whole(published.onnx, [{"x": photo_array(data)}])[0]["logits"][0]
    shares = np.exp(logits - logits.max())
    return float((shares / shares.sum()).max())


def test_edge_only_runs_the_whole_model_on_the_first_hop(place: Place) -> None:
    found = answer(place.router(place.plan(candidate())), photo())
    assert [(s["segment"], s["hop"]) for s in found["route"]["segments"]] == [("..", place.hops[0])]
    assert found["route"]["name"] == "edge-float"
    assert found["classes"][0]["probability"] == pytest.approx(expected(place.published, photo()), abs=TOLERANCE)


def test_cloud_only_sends_the_photo_as_it_came(place: Place) -> None:
    chosen = candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")})
    model, data = place.plan(chosen), photo()
    found = answer(place.router(model), data)
    (stage,) = found["route"]["segments"]
    assert (stage["segment"], stage["hop"], stage["codecs"]) == ("..", place.hops[1], {"x": "photo/1"})
    assert len(data) < stage["sent_bytes"] < len(data) + 1000
    assert found["route"]["input_bytes"] == 3 * 8 * 8 * 4
    assert found["classes"][0]["probability"] == pytest.approx(expected(place.published, data), abs=TOLERANCE)
    assert "preprocess" not in found["timings_ms"]
    tensors = infer(place, model)["parameters"]
    assert (tensors["segments"], tensors["isthmus.route"]) == ("..", "cloud-photo")


def jpeg_plan(quality: float) -> Candidate:
    return candidate("cloud-jpeg", "cloud", input="photo", codecs={"x": Coding("photo/1", quality)})


def test_a_photo_is_resized_and_compressed_at_the_router_as_the_plan_says(place: Place) -> None:
    model, data = place.plan(jpeg_plan(0.85)), photo((200, 120))
    compressed = as_jpeg(data, PREPROCESS, 85, max_pixels=10**6)
    found = answer(place.router(model), data)
    (stage,) = found["route"]["segments"]
    assert (stage["hop"], stage["codecs"]) == (place.hops[1], {"x": "photo/1"})
    assert len(compressed) < stage["sent_bytes"] < len(compressed) + 1000 < len(data)
    small = answer(place.router(place.plan(candidate())), compressed)["classes"]
    assert found["classes"][0]["probability"] == pytest.approx(small[0]["probability"], abs=TOLERANCE)
    assert found["timings_ms"]["preprocess"] > 0
    raw = answer(place.router(model, codec="raw"), data)["route"]
    assert raw["segments"][0]["sent_bytes"] > len(data)
    tensors = infer(place, model)["parameters"]
    assert (tensors["segments"], tensors["isthmus.route"]) == ("..", "cloud-jpeg")


def test_a_photo_that_the_router_cannot_compress_is_the_callers_error(place: Place) -> None:
    response = ready(place.router(place.plan(jpeg_plan(0.95)))).post("/", data=photo()[:60])
    assert (response.status_code, response.json["type"]) == (400, "ImageMalformed")


@pytest.mark.parametrize("spoil", [lambda d: d[:60], lambda d: d[:8] + bytes(500)], ids=["cut off", "nonsense"])
def test_a_photo_that_the_cloud_cannot_read_is_still_the_callers_error(place: Place, spoil: Any) -> None:
    chosen = candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")})
    response = ready(place.router(place.plan(chosen))).post("/", data=spoil(photo()))
    assert (response.status_code, response.json["type"]) == (400, "ImageMalformed")


def test_cloud_only_packs_the_input_as_the_plan_says(place: Place) -> None:
    chosen = candidate("cloud-half", "cloud", codecs={"x": Coding("half/1")})
    (stage,) = answer(place.router(place.plan(chosen)), photo())["route"]["segments"]
    assert (stage["hop"], stage["codecs"]) == (place.hops[1], {"x": "half/1"})


def test_a_split_runs_at_the_plans_cut_and_packs_what_crosses(place: Place) -> None:
    chosen = candidate("split-3-half", "split", cuts=("3",), codecs={"r3": Coding("half/1")})
    found = answer(place.router(place.plan(chosen)), photo())["route"]
    assert found["name"] == "split-3-half"
    assert [(s["segment"], s["hop"]) for s in found["segments"]] == [("..3", place.hops[0]), ("3..", place.hops[1])]
    assert found["segments"][1]["codecs"] == {"r3": "half/1"}
    assert "codecs" not in found["segments"][0]


def test_the_variant_runs_instead_where_the_plan_says_so(place: Place) -> None:
    other = publish(
        place.folder,
        photos_model(place.folder / "photos-int8.onnx", seed=7),
        {},
        registry=place.published.folder,
        partitions=[["6"]],
    )
    chosen = candidate("edge-int8", variant=other.digest)
    found = infer(place, place.plan(chosen))
    assert found["parameters"]["isthmus.route"] == "edge-int8"
    logits = run_whole(other.onnx, [place.published.inputs])[0]["logits"]
    assert np.allclose(found["outputs"][0]["data"], logits.ravel(), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_setting_of_cuts_goes_before_the_plan(place: Place) -> None:
    client = place.router(place.plan(candidate()), cuts="1")
    found = answer(client, photo())["route"]
    assert [s["segment"] for s in found["segments"]] == ["..1", "1.."]
    assert "plan" not in found


def test_a_plan_can_be_turned_off(place: Place) -> None:
    found = answer(place.router(place.plan(candidate()), plan=False), photo())["route"]
    assert [s["segment"] for s in found["segments"]] == ["..6", "6.."]


def test_one_hop_in_this_process_serves_any_plan(place: Place) -> None:
    chosen = candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")})
    found = answer(place.router(place.plan(chosen), ("local",)), photo())
    assert [(s["segment"], s["hop"]) for s in found["route"]["segments"]] == [("..", "local")]
    assert found["classes"][0]["probability"] == pytest.approx(expected(place.published, photo()), abs=TOLERANCE)


def with_a_plan_of(place: Place, data: bytes) -> str:
    """A version whose plan is those bytes, published past the check that `publish_plan` makes."""
    path = place.folder / "plan.json"
    path.write_bytes(data)
    blob = Blob(digest_of(data), len(data))
    bundle = replace(place.published.bundle, plan=blob)
    return f"photos:{place.published.registry.publish(bundle, {blob.digest: path}).version}"


OLDER = {"format": "isthmus.plan/1"}
UNSERVED = ("another bundle's plan", "no plan at all", "another version's plan", "a cut that is not there")


@pytest.mark.parametrize("what", UNSERVED)
def test_a_plan_that_cannot_serve_keeps_the_router_from_being_ready(
    place: Place, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    if what == "another bundle's plan":
        plan = plan_for(replace(place.published.bundle, default_cuts=("3",)), candidate())
        reference, said = with_a_plan_of(place, to_json(plan)), "was made for photos"
    elif what == "no plan at all":
        reference, said = with_a_plan_of(place, b'{"format": "something"}'), "plan.format"
    elif what == "another version's plan":
        older = json.loads(to_json(plan_for(place.published.bundle, candidate()))) | OLDER
        reference, said = with_a_plan_of(place, json.dumps(older).encode()), "isthmus plan photos"
    else:
        reference, said = place.plan(candidate("split-77-raw", "split", cuts=("77",))), "no cut '77'"

    def told() -> list[str]:
        found = [r.facts for r in caplog.records if r.getMessage() == "not ready"]  # type: ignore[attr-defined]
        return [facts["error"] + facts.get("hint", "") for facts in found]

    with caplog.at_level(logging.WARNING, "isthmus"):
        client = place.router(reference, log_level="warning")
        assert until(lambda: said in client.get("/ready").get_data(as_text=True))
        assert until(lambda: any(said in each for each in told()))
    assert client.get("/ready").status_code == 503
    refused = client.post("/", data=photo())
    assert (refused.status_code, refused.json["type"]) == (503, "NotReady")


def test_a_plan_of_another_version_is_told_of_in_the_log_with_what_to_do(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    registry = place.published.registry
    good = place.plan(candidate()).partition(":")[2]
    registry.move_alias("photos", "live", good)
    client = ready(place.router("photos:live", refresh_s=0.0))
    older = json.loads(to_json(plan_for(place.published.bundle, candidate("older")))) | OLDER
    bad = with_a_plan_of(place, json.dumps(older).encode()).partition(":")[2]
    registry.move_alias("photos", "live", bad)

    def told() -> list[Any]:
        answer(client, photo())
        return [r.facts for r in caplog.records if "stays as known" in r.getMessage()]  # type: ignore[attr-defined]

    with caplog.at_level(logging.WARNING, "isthmus"):
        assert until(lambda: bool(told()))
    facts = told()[0]
    assert facts["error"].startswith("in photos: the plan was written by another version")
    assert facts["hint"].startswith("plan again: isthmus plan photos")


def test_a_new_version_whose_plan_is_anothers_leaves_the_old_one_serving(place: Place) -> None:
    registry = place.published.registry
    good = place.plan(candidate()).partition(":")[2]
    registry.move_alias("photos", "live", good)
    client = ready(place.router("photos:live", refresh_s=0.0))
    plan = plan_for(replace(place.published.bundle, default_cuts=("3",)), candidate("other"))
    bad = with_a_plan_of(place, to_json(plan)).partition(":")[2]
    registry.move_alias("photos", "live", bad)
    for _ in range(3):
        found = json.loads(client.post("/", data=photo()).data)
        assert (found["model_version"], found["route"]["name"]) == (good, "edge-float")
    asked = client.get(f"/v2/models/photos/versions/{bad}")
    assert (asked.status_code, asked.json["type"]) == (409, "PlanMismatch")


def test_answers_tell_bytes_over_the_link_for_every_kind_of_plan(place: Place) -> None:
    data = photo()
    coded = {"p6": Coding("half/1")}
    ways = {
        "edge-float": candidate(),
        "cloud-photo": candidate("cloud-photo", "cloud", codecs={"x": Coding("photo/1")}, input="photo"),
        "split-6-half": candidate("split-6-half", "split", cuts=("6",), codecs=coded),
    }
    routes = {name: answer(place.router(place.plan(chosen)), data)["route"] for name, chosen in ways.items()}
    assert (routes["edge-float"]["link_bytes"], routes["edge-float"]["link_raw_bytes"]) == (0, 0)
    whole_photo = routes["cloud-photo"]
    assert whole_photo["link_bytes"] == whole_photo["segments"][0]["sent_bytes"] > len(data)
    assert whole_photo["link_raw_bytes"] == 3 * 8 * 8 * 4
    assert routes["split-6-half"]["link_raw_bytes"] == 16 * 4 * 4 * 4
