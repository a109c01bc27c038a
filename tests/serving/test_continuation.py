"""Requests that are finished later: the tail is away, the caller keeps what is left, and gets the whole's response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient

from isthmus.pipeline.continuation import CONTENT_TYPE, MAGIC
from isthmus.serving import create_router_app
from support.bundles import Published, framed, photo, ready, router_settings
from support.bundles import photos as photos
from support.ports import free_port
from support.routers import INFER, expected_classes, local_router, oip_json
from support.routers import chain as chain
from support.routers import client as client
from support.routers import cut_off as cut_off

CAT = photo(seed=1)
UNKNOWN = {"name": "y", "codec": "int8/1", "dtype": "float32", "shape": [1], "payload": b""}
ACCEPTS = {"Accept": f"application/json, {CONTENT_TYPE}", "Prefer": "wait=5"}


@pytest.fixture(scope="module")
def codec_client(photos: Published, chain: Any, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    """A router with the same codec, and a tail."""
    settings = router_settings(photos, tmp_path_factory.mktemp("codec"), ("local", chain.hops[1]), codec="int8/1")
    return ready(create_router_app(settings).test_client())


def continuation(cut_off: FlaskClient, path: str = "/", **request: Any) -> bytes:
    answer = cut_off.post(path, headers=ACCEPTS | request.pop("headers", {}), **request)
    assert (answer.status_code, answer.content_type) == (503, CONTENT_TYPE), answer.text
    assert int(answer.headers["Retry-After"]) >= 1
    return bytes(answer.data)


def test_a_photo_is_finished_by_the_tail_alone(cut_off: FlaskClient, codec_client: FlaskClient) -> None:
    body = continuation(cut_off, "/?top_k=2", data=CAT)
    answer = codec_client.post("/continue", data=body)
    whole = codec_client.post("/?top_k=2", data=CAT)
    assert answer.status_code == whole.status_code == 200, answer.text
    # The same bytes cross the link as in one go, so the prediction is the same to the last bit.
    assert answer.json["classes"] == whole.json["classes"]
    assert len(answer.json["classes"]) == 2
    assert [run["segment"] for run in answer.json["route"]["segments"]] == ["6.."]
    later = whole.json["route"]["segments"][1]
    finished = answer.json["route"]["segments"][0]
    assert finished["codecs"] == later["codecs"]
    assert abs(finished["sent_bytes"] - later["sent_bytes"]) <= 64
    for size in ("photo_bytes", "input_bytes"):
        assert answer.json["route"][size] == whole.json["route"][size]


def test_a_continuation_is_about_as_small_as_the_frame(cut_off: FlaskClient, codec_client: FlaskClient) -> None:
    sent = codec_client.post("/", data=CAT).json["route"]["segments"][1]["sent_bytes"]
    assert len(continuation(cut_off, data=CAT)) < sent + 1024


def test_tensors_are_finished_as_they_were_asked_for(
    cut_off: FlaskClient, codec_client: FlaskClient, photos: Published
) -> None:
    document = oip_json(photos) | {"id": "mine"}
    answer = codec_client.post("/continue", data=continuation(cut_off, INFER, json=document))
    whole = codec_client.post(INFER, json=document)
    assert answer.status_code == whole.status_code == 200, answer.text
    assert (answer.json["id"], answer.json["outputs"]) == ("mine", whole.json["outputs"])


def test_a_caller_that_takes_no_continuation_gets_an_error(cut_off: FlaskClient) -> None:
    answer = cut_off.post("/", data=CAT)
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")


def test_a_batch_is_not_continued(cut_off: FlaskClient) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="images"; filename="f"\r\n\r\n%s\r\n--b--\r\n' % CAT
    answer = cut_off.post("/", data=body, headers=ACCEPTS)
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")


def test_the_wait_for_the_tail_is_the_callers(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With retries until the deadline of 20 s, a wait of a second still ends in a continuation."""
    hops = ("local", f"http://127.0.0.1:{free_port()}")
    patient = ready(create_router_app(router_settings(photos, tmp_path_factory.mktemp("c"), hops)).test_client())
    answer = patient.post("/", data=CAT, headers=ACCEPTS | {"Prefer": "respond-async, wait=1"})
    assert (answer.status_code, answer.content_type) == (503, CONTENT_TYPE), answer.text
    total = next(s for s in answer.headers["Server-Timing"].split(", ") if s.startswith("total"))
    assert float(total.partition("dur=")[2]) < 15_000


@pytest.mark.parametrize("wait", ["soon", "1.5", "-1", ""])
def test_a_wait_that_is_no_number_is_refused(cut_off: FlaskClient, wait: str) -> None:
    answer = cut_off.post("/", data=CAT, headers=ACCEPTS | {"Prefer": f"wait={wait}"})
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed"), answer.text


def changed(body: bytes, **fields: Any) -> bytes:
    document = msgspec.msgpack.decode(body[len(MAGIC) :])
    return MAGIC + msgspec.msgpack.encode(document | fields)


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"format": "isthmus.continuation/2"}, 400, "RequestMalformed"),
        ({"more": 1}, 400, "RequestMalformed"),
        ({"segments": []}, 400, "RequestMalformed"),
        ({"segments": ["999.."]}, 404, "Missing"),
        ({"model": "other"}, 404, "Missing"),
        ({"digest": "sha256:" + "0" * 64}, 409, "PlanMismatch"),
        ({"frame": b"no frame"}, 400, "FrameMalformed"),
        ({"encoded": []}, 400, "ShapeMismatch"),
        (
            {"encoded": [{"name": "y", "codec": "int8/1", "dtype": "float32", "shape": [1], "payload": b""}]},
            400,
            "Shape",
        ),
        ({"encoded": [{"name": "y", "codec": "int8/1", "dtype": "x", "shape": [1], "payload": b""}]}, 400, "Request"),
        ({"notes": {"top_k": -1}}, 400, "RequestMalformed"),
        ({"notes": {"outputs": [["logits"]]}}, 400, "RequestMalformed"),
    ],
)
def test_a_changed_continuation_is_refused(
    cut_off: FlaskClient, codec_client: FlaskClient, fields: dict[str, Any], status: int, error: str
) -> None:
    answer = codec_client.post("/continue", data=changed(continuation(cut_off, data=CAT), **fields))
    assert answer.status_code == status, answer.text
    assert answer.json["type"].startswith(error)


@pytest.mark.parametrize("notes", [{"outputs": [[]] * 1025}, {"outputs": [["logits", True, True]]}, {"id": "x" * 513}])
def test_notes_are_refused_by_their_lengths(cut_off: FlaskClient, codec_client: FlaskClient, notes: Any) -> None:
    """Before they are built: a list of empty lists takes 80 times its bytes."""
    answer = codec_client.post("/continue", data=changed(continuation(cut_off, data=CAT), notes=notes))
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed"), answer.text
    assert "of length <=" in answer.json["error"]


def test_a_name_that_no_redaction_counts_gets_into_no_header(cut_off: FlaskClient, codec_client: FlaskClient) -> None:
    notes = {"redacted_faces": 2, "redacted_x\r\nSet-Cookie: a": 1, "redacted_\u2603": 1}
    answer = codec_client.post("/continue", data=changed(continuation(cut_off, data=CAT), notes=notes))
    assert (answer.status_code, answer.headers["Isthmus-Redacted"]) == (200, "faces=2"), answer.text


@pytest.mark.parametrize("segments", [["..6"], ["..1", "1.."], ["6..", "6.."], [".."] * 2, ["..", "6.."]])
def test_segments_that_do_not_lead_to_the_models_end_are_refused(
    cut_off: FlaskClient, codec_client: FlaskClient, photos: Published, segments: list[str]
) -> None:
    """Of all tensors that any of them takes; a segment that is named a thousand times does not run so often."""
    body = continuation(cut_off, data=CAT)
    frame = framed(photos, segments[0])
    answer = codec_client.post("/continue", data=changed(body, segments=segments, frame=frame, encoded=[]))
    expected = 200 if segments == ["..1", "1.."] else 400
    assert answer.status_code == expected, answer.text


def test_decoding_in_the_routers_own_process_is_within_its_memory(
    cut_off: FlaskClient, client: FlaskClient, photos: Published, tmp_path: Path
) -> None:
    body = continuation(cut_off, data=CAT)
    # Of a request, the body and payloads as copies: 4 tensors of 1,024 bytes more are beyond the bound.
    router = local_router(photos, tmp_path, max_working_bytes=2 * len(body) + 1023, max_request_bytes=len(body))
    answer = router.post("/continue", data=body)
    assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge"), answer.text


def test_a_truncated_continuation_is_refused(cut_off: FlaskClient, codec_client: FlaskClient) -> None:
    body = continuation(cut_off, data=CAT)
    for length in (0, 4, len(MAGIC), 100, len(body) - 1):
        answer = codec_client.post("/continue", data=body[:length])
        assert answer.status_code == 400, answer.text


def test_a_codec_payload_that_does_not_decode_is_no_fault_of_the_router(
    cut_off: FlaskClient, codec_client: FlaskClient
) -> None:
    body = continuation(cut_off, data=CAT)
    (entry,) = msgspec.msgpack.decode(body[len(MAGIC) :])["encoded"]
    answer = codec_client.post("/continue", data=changed(body, encoded=[entry | {"payload": b"?"}]))
    assert answer.status_code in (400, 502), answer.text
    assert codec_client.post("/continue", data=body).status_code == 200


def test_classes_of_a_continuation_are_the_models(cut_off: FlaskClient, client: FlaskClient, photos: Published) -> None:
    answer = client.post("/continue", data=continuation(cut_off, data=CAT))
    assert answer.status_code == 200, answer.text
    expected = expected_classes(photos, CAT)
    assert [c["index"] for c in answer.json["classes"]][:1] == [c["index"] for c in expected][:1]


def test_a_caller_that_knows_the_link_to_be_away_gets_its_continuation_at_once(
    photos: Published, chain: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The first hop has the whole deadline, the tail a single try; where the tail is there it is used."""
    hops = (chain.hops[0], f"http://127.0.0.1:{free_port()}")
    away = ready(create_router_app(router_settings(photos, tmp_path_factory.mktemp("c"), hops)).test_client())
    answer = away.post("/", data=CAT, headers=ACCEPTS | {"Prefer": "wait=0"})
    assert (answer.status_code, answer.content_type) == (503, CONTENT_TYPE), answer.text
    assert chain.client.post("/", data=CAT, headers=ACCEPTS | {"Prefer": "wait=5"}).status_code == 200
