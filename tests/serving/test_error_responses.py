"""What anybody who calls a function learns from its errors, and what only its log and who runs it learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from isthmus.context import Context
from isthmus.errors import HTTP_STATUS, IsthmusError, Missing, NotReady, ShapeMismatch, ValueRefused
from isthmus.pipeline import HttpHop
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.error_responses import error_document
from isthmus.wire.frame import Frame
from isthmus.wire.frame import encode as frame_of
from support.bundles import Published, metrics, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.patience import LONG_S
from support.ports import free_port

SECRET = "http://tail.internal:8080/function/secret-tail"
ABOUT_THE_REQUEST = {
    "RequestMalformed",
    "RequestTooLarge",
    "ContextTooLong",
    "CallerUnknown",
    "NotGranted",
    "CallerUnauthenticated",
    "CallerForbidden",
    "CallerLimited",
    "MediaUnsupported",
    "EncodingUnsupported",
    "ImageMalformed",
    "ProfilingOff",
    "ProfilingRefused",
    "FrameTooLarge",
    "FrameMalformed",
    "ShapeMismatch",
    "StateMissing",
    "BundleMismatch",
    "ValueRefused",
    "Overloaded",
    "NotConfigured",
    "DeadlineExceeded",
    "EventMalformed",
    "BucketRefused",
    "MessageTooLarge",
    "ClaimExpired",
    "CallUnknown",
    "SpoolFull",
    "MemoryInUse",
}


@pytest.mark.parametrize("kind", HTTP_STATUS, ids=lambda kind: kind.__name__)
def test_only_errors_about_the_request_tell_their_details(kind: type[IsthmusError]) -> None:
    error = kind(f"{SECRET} failed", hint=f"look at {SECRET}", expected=SECRET, retry_after_s=2)
    assert error_document(error, expose_details=True) == {
        "error": f"{SECRET} failed",
        "type": kind.__name__,
        "facts": {"expected": SECRET, "retry_after_s": 2},
        "hint": f"look at {SECRET}",
    }
    told = error_document(error, expose_details=False)
    assert (told["type"], told["facts"]["retry_after_s"]) == (kind.__name__, 2)
    assert (SECRET in json.dumps(told)) is (kind.__name__ in ABOUT_THE_REQUEST)
    assert told["error"]


@pytest.mark.parametrize("kind", [ShapeMismatch, ValueRefused])
def test_an_error_of_a_hop_about_the_request_names_no_hop(kind: type[IsthmusError]) -> None:
    error = kind("x is too wide", tensor="x", hop=SECRET, status=400, error={"error": SECRET})
    assert error_document(error, expose_details=False)["facts"] == {"tensor": "x"}


@pytest.fixture
def closed(photos: Published, tmp_path: Path) -> FlaskClient:
    """A router that shows no details, and whose second hop is not there."""
    hops = ["local", f"http://127.0.0.1:{free_port()}/function/secret-tail"]
    settings = router_settings(photos, tmp_path, hops, expose_details=False, hop_attempts=1, log_level="info")
    return ready(create_router_app(settings).test_client())


def test_a_model_that_is_not_there_tells_nothing_of_the_registry(
    closed: FlaskClient, photos: Published, caplog: pytest.LogCaptureFixture
) -> None:
    for answer in (closed.get("/v2/models/nobody"), closed.post("/?model=nobody", data=photo())):
        assert answer.status_code == 404
        assert answer.json == {"error": Missing.public_message, "type": "Missing", "facts": {"kind": "model"}}
    line = [r for r in caplog.records if "there is no model 'nobody'" in r.getMessage()][-1]
    facts = line.__dict__["facts"]
    assert (facts["registry"], facts["exists"]) == (str(photos.folder), [photos.name])
    assert facts["call_id"] == answer.headers["X-Call-Id"]


def test_a_hop_that_fails_is_named_in_the_log_alone(closed: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    answer = closed.post("/", data=photo(), headers={"X-Timeout": "3s"})
    assert answer.status_code in (503, 504)
    assert "secret-tail" not in answer.get_data(as_text=True)
    assert "127.0.0.1" not in answer.get_data(as_text=True)
    assert any("secret-tail" in str(r.__dict__.get("facts")) for r in caplog.records)
    assert "secret-tail" not in closed.get("/metrics").get_data(as_text=True)
    errors = [labels for (name, labels) in metrics(closed) if name == "isthmus_hop_errors_total"]
    assert errors == [(("error", answer.json["type"]), ("hop", "hop1"))]


def test_why_a_function_is_not_ready_is_in_its_log_alone(photos: Published, tmp_path: Path) -> None:
    settings = router_settings(photos, tmp_path, ["local"], model="nobody", expose_details=False)
    client = create_router_app(settings).test_client()
    for answer in (client.get("/ready"), client.get("/v2/health/ready"), client.post("/", data=photo())):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json == {"error": NotReady.public_message, "type": "NotReady", "facts": {"retry_after_s": 1}}


def test_responses_name_hops_by_their_number_unless_details_are_shown(photos: Published, tmp_path: Path) -> None:
    with served(create_segment_app(segment_settings(photos, tmp_path / "cache"))) as url:
        for exposed, name in ((False, "hop1"), (True, url)):
            hops = ["local", url]
            settings = router_settings(photos, tmp_path / str(exposed), hops, expose_details=exposed)
            client = ready(create_router_app(settings).test_client())
            answer = client.post("/", data=photo())
            assert [stage["hop"] for stage in answer.json["route"]["segments"]] == ["local", name]
            assert metrics(client)["isthmus_hop_received_bytes_total", (("hop", name),)] > 0
            assert (url in client.get("/metrics").get_data(as_text=True)) is exposed
            assert (url in answer.get_data(as_text=True)) is exposed


@pytest.mark.parametrize("exposed", [False, True])
def test_functions_understand_each_others_errors_whatever_they_show(
    photos: Published, tmp_path: Path, exposed: bool
) -> None:
    settings = segment_settings(photos, tmp_path, expose_details=exposed)
    app = create_segment_app(settings)
    ready(app.test_client())
    with served(app) as url:
        hop = HttpHop(url, attempts=1, connect_timeout_s=LONG_S, max_reply_bytes=2**20)
        context = Context.from_headers({}, longest_s=LONG_S)
        with pytest.raises(ShapeMismatch, match="missing x"):
            hop.call(Frame({}, photos.digest, ".."), context)
        with pytest.raises(IsthmusError) as e:
            hop.call(Frame({}, photos.digest, "..nowhere"), context)
        assert e.value.facts["error"]["type"] == "Missing"
        hop.close()
    answer = app.test_client().post("/", data=frame_of(Frame({}, photos.digest, "..nowhere")))
    assert ("exists" in answer.json["facts"]) is exposed
