"""The segment app: a frame in, a frame out, and every refusal as JSON that says why."""

from __future__ import annotations

import gzip
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3
from flask.testing import FlaskClient
from onnx import helper

from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import SettingsError
from isthmus.serving import create_segment_app
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.graph.extract import bake
from support.bundles import (
    TOLERANCE,
    Published,
    cache_of,
    framed,
    metrics,
    publish,
    publish_photos,
    ready,
    save,
    segment_settings,
    served,
    until,
    value,
    weight,
)
from support.bundles import photos as photos
from support.patience import LONG_S, eventually

TRACE = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"


@pytest.fixture
def client(photos: Published, tmp_path: Path) -> FlaskClient:
    return ready(create_segment_app(segment_settings(photos, tmp_path / "cache")).test_client())


def test_a_frame_goes_in_and_a_frame_comes_out(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/", data=framed(photos, request="r-7"))
    assert (answer.status_code, answer.content_type) == (200, frames.CONTENT_TYPE)
    frame = frames.decode(answer.data, max_bytes=2**20)
    assert (frame.bundle, frame.segment, frame.request) == (photos.digest, WHOLE, "r-7")
    np.testing.assert_allclose(frame.tensors["logits"], photos.whole["logits"], rtol=TOLERANCE, atol=TOLERANCE)


def test_server_timing_holds_every_stage(client: FlaskClient, photos: Published) -> None:
    header = client.post("/", data=framed(photos)).headers["Server-Timing"]
    entries = [part.strip().split(";dur=") for part in header.split(",")]
    assert [name for name, _ in entries] == ["queue", "decode", "load", "wait", "run", "encode", "total"]
    assert all(float(ms) >= 0 for _, ms in entries)
    assert float(entries[-1][1]) >= sum(float(ms) for _, ms in entries[:-1]) * 0.99


def test_the_requests_identity_comes_back(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/", data=framed(photos), headers={"X-Call-Id": "call-9", "traceparent": TRACE})
    assert (answer.headers["X-Call-Id"], answer.headers["traceparent"]) == ("call-9", TRACE)


@pytest.mark.parametrize("call_id", ["", "with space", "x" * 129, "caf\u00e9"])
def test_a_call_id_that_is_no_token_is_made_anew(client: FlaskClient, photos: Published, call_id: str) -> None:
    answer = client.post("/", data=framed(photos), headers={"X-Call-Id": call_id})
    assert len(answer.headers["X-Call-Id"]) == 36


GOOD = frames.encode(Frame({"x": np.zeros(2, "float32")}, "sha256:" + "0" * 64, ".."))


@pytest.mark.parametrize(
    ("body", "status", "type", "rule"),
    [
        (b"", 400, "FrameMalformed", "magic"),
        (b"GIF89a", 400, "FrameMalformed", "magic"),
        (GOOD[:7] + b"\x09" + GOOD[8:], 400, "FrameMalformed", "version"),
        (GOOD[:-1], 400, "FrameMalformed", "truncated"),
        (GOOD + b"\0", 400, "FrameMalformed", "trailing"),
        (GOOD[:8] + b"\xff" * 8 + GOOD[16:], 413, "FrameTooLarge", "header"),
        (GOOD.replace(b"[2]", b"[9]"), 400, "FrameMalformed", "payload"),
        (GOOD.replace(b"float32", b"complex"), 400, "FrameMalformed", "dtype"),
        (GOOD.replace(b'"raw"', b'"zip"'), 400, "FrameMalformed", "codec"),
    ],
)
def test_a_bad_frame_is_refused_by_the_rule_it_breaks(
    client: FlaskClient, body: bytes, status: int, type: str, rule: str
) -> None:
    answer = client.post("/", data=body)
    assert (answer.status_code, answer.json["type"], answer.json["facts"]["rule"]) == (status, type, rule)


def test_a_body_over_the_bound_is_refused_unread(photos: Published, tmp_path: Path) -> None:
    small = create_segment_app(segment_settings(photos, tmp_path, max_request_bytes=1000)).test_client()
    answer = small.post("/", data=bytes(1001))
    assert (answer.status_code, answer.json["type"], answer.json["facts"]) == (413, "RequestTooLarge", {"limit": 1000})


def test_a_frame_that_names_no_digest_is_malformed(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/", data=framed(photos, bundle="../../etc/passwd"))
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")


def test_an_unknown_segment_is_missing_and_names_those_that_exist(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/", data=framed(photos, "..99"))
    assert (answer.status_code, answer.json["type"]) == (404, "Missing")
    assert answer.json["facts"]["exists"] == sorted(photos.bundle.segments)
    assert "isthmus cut" in answer.json["hint"]


def test_an_exit_that_the_bundle_does_not_have_is_missing_before_anything_runs(
    client: FlaskClient, photos: Published
) -> None:
    answer = client.post("/", data=framed(photos, "..6", exit=0.5))
    assert (answer.status_code, answer.json["type"]) == (404, "Missing")
    assert "6..6" in answer.json["error"]


def test_an_unknown_bundle_is_missing_and_names_the_registry(client: FlaskClient, photos: Published) -> None:
    digest = "sha256:" + "0" * 64
    answer = client.post("/", data=framed(photos, bundle=digest))
    assert (answer.status_code, answer.json["type"]) == (404, "Missing")
    assert digest[7:] in answer.json["error"]
    assert str(photos.folder) in answer.get_data(as_text=True)


def test_a_wrong_tensor_is_refused_with_expected_and_got(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/", data=framed(photos, tensors={"x": np.zeros((1, 3, 8, 8), "float64")}))
    assert (answer.status_code, answer.json["type"]) == (400, "ShapeMismatch")
    assert answer.json["facts"] == {
        "tensor": "x",
        "expected": "float32[1, 3, 8, 8]",
        "got": "float64[1, 3, 8, 8]",
    }


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "//ready", 404),
        ("GET", "/", 405),
        ("DELETE", "/ready", 405),
        ("POST", "/metrics", 405),
    ],
)
def test_wrong_paths_and_methods_answer_json(client: FlaskClient, method: str, path: str, status: int) -> None:
    # With a base, the client does not take //ready for a host.
    answer = client.open(path, method=method, base_url="http://localhost")
    assert (answer.status_code, answer.content_type) == (status, "application/json")
    assert answer.json.keys() >= {"error", "type", "facts"}
    if status == 404:
        paths = ["/", "/load", "/metrics", "/profile", "/profile/echo", "/ready", "/sessions/end"]
        assert answer.json["facts"]["exists"] == paths
    else:
        assert ("POST" if path == "/" else "GET") in answer.headers["Allow"]


def test_it_is_not_ready_until_its_model_is_published(photos: Published, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    settings = segment_settings(photos, tmp_path / "cache", registry=str(folder), preload=("photos@head",))
    client = create_segment_app(settings).test_client()
    assert until(lambda: "photos" in client.get("/ready").json["error"])
    for answer in (client.get("/ready"), client.post("/", data=framed(photos, "..6"))):
        assert (answer.status_code, answer.json["type"]) == (503, "NotReady")
        assert answer.headers["Retry-After"] == "1"
    assert metrics(client)["isthmus_ready", ()] == 0
    publish_photos(tmp_path / "late", registry=folder)
    ready(client)
    assert metrics(client)["isthmus_ready", ()] == 1
    assert metrics(client)["isthmus_loaded_segments", ()] == 1
    assert client.post("/", data=framed(photos, "..6")).status_code == 200


def test_counters_move(client: FlaskClient, photos: Published) -> None:
    body = framed(photos)
    length = len(client.post("/", data=body).data)
    client.post("/", data=b"no frame")
    client.get("/nowhere-" + "x" * 50)
    found = metrics(client)
    assert found["isthmus_requests_total", (("code", "200"), ("endpoint", "run"))] == 1
    assert found["isthmus_requests_total", (("code", "400"), ("endpoint", "run"))] == 1
    assert found["isthmus_requests_total", (("code", "404"), ("endpoint", "none"))] == 1
    assert found["isthmus_received_bytes_total", ()] == len(body) + len(b"no frame")
    assert found["isthmus_sent_bytes_total", ()] > length
    assert found["isthmus_request_seconds_count", (("endpoint", "run"),)] == 2
    assert found["isthmus_stage_seconds_count", (("stage", "run"),)] == 1
    assert found["isthmus_requests_in_flight", ()] == 0
    assert found["isthmus_loaded_segments", ()] == 1
    assert found["isthmus_loaded_bytes", ()] == sum(t.length for t in photos.bundle.weights.tensors)


def test_what_callers_send_never_becomes_a_label(client: FlaskClient, photos: Published) -> None:
    def traffic(marked: str) -> set[Any]:
        client.post("/", data=framed(photos))
        client.post("/", data=framed(photos, f"..{marked}", request=marked), headers={"X-Call-Id": marked})
        client.open(f"/{marked}", method="BREW" + marked)
        metrics(client)
        return set(metrics(client))

    assert traffic("one") == traffic("two")


def test_metrics_answer_in_the_format_that_is_asked_for(client: FlaskClient) -> None:
    assert client.get("/metrics").content_type.startswith("text/plain")
    open_metrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert open_metrics.content_type.startswith("application/openmetrics-text")
    assert open_metrics.data.endswith(b"# EOF\n")


def hold_runs(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Runs wait for the second event; the first says that one is under way."""
    from isthmus.runtime.ort_runner import OrtRunner

    inside, leave = threading.Event(), threading.Event()
    original = OrtRunner.run

    def held(self: OrtRunner, arrays: Any) -> dict[str, Any]:
        inside.set()
        leave.wait(LONG_S)
        return original(self, arrays)

    monkeypatch.setattr(OrtRunner, "run", held)
    return inside, leave


def test_one_request_too_many_is_told_when_to_come_back(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path, max_concurrency=1, max_queued=0))
    client = ready(app.test_client())
    inside, leave = hold_runs(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(app.test_client().post, "/", data=framed(photos))
        assert inside.wait(LONG_S)
        refused = client.post("/", data=framed(photos))
        assert (refused.status_code, refused.json["type"]) == (429, "Overloaded")
        assert refused.headers["Retry-After"] == "1"
        assert client.get("/ready").status_code == 200, "a busy function is a ready one"
        assert metrics(client)["isthmus_requests_in_flight", ()] == 1
        leave.set()
        assert first.result(LONG_S).status_code == 200
    assert client.post("/", data=framed(photos)).status_code == 200


def test_x_timeout_shortens_the_deadline(photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.runtime.store.cpu_limit", lambda: 1)
    app = create_segment_app(segment_settings(photos, tmp_path))
    client = ready(app.test_client())
    client.post("/", data=framed(photos))
    inside, leave = hold_runs(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(app.test_client().post, "/", data=framed(photos))
        assert inside.wait(LONG_S)
        start = time.monotonic()
        late = client.post("/", data=framed(photos), headers={"X-Timeout": "150ms"})
        took = time.monotonic() - start
        leave.set()
        assert first.result(LONG_S).status_code == 200
    assert (late.status_code, late.json["type"]) == (504, "DeadlineExceeded")
    assert 0.1 <= took < LONG_S / 2  # X-Timeout less its margin


def test_an_x_timeout_that_is_no_duration_is_refused(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/", data=framed(photos), headers={"X-Timeout": "soon"})
    assert (answer.status_code, answer.json["facts"]) == (400, {"header": "X-Timeout"})


def test_a_known_segment_is_served_while_the_registry_is_gone(tmp_path: Path) -> None:
    mine = publish_photos(tmp_path / "mine")
    client = ready(create_segment_app(segment_settings(mine, tmp_path / "cache", preload=("photos",))).test_client())
    mine.folder.rename(tmp_path / "gone")
    assert client.post("/", data=framed(mine)).status_code == 200
    assert client.post("/", data=framed(mine, "..6")).status_code in (404, 503)


def test_an_unexpected_error_tells_the_caller_nothing_but_an_id(
    client: FlaskClient, photos: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret /home/somebody")

    monkeypatch.setattr("isthmus.runtime.store.SegmentStore.run", broken)
    answer = client.post("/", data=framed(photos), headers={"X-Call-Id": "call-3"})
    assert answer.status_code == 500
    assert answer.json["facts"] == {"call_id": "call-3"}
    assert answer.json["type"] == "InternalError"
    for told in (b"secret", b"Traceback", b"ZeroDivision", b".py"):
        assert told not in answer.data


def test_facts_that_json_has_no_form_for_do_not_break_the_error(
    client: FlaskClient, photos: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.errors import NotReady

    def refuse(*_: object) -> None:
        raise NotReady("later", path=Path("/x"), count=np.int64(3), retry_after_s=2.4)

    monkeypatch.setattr("isthmus.runtime.store.SegmentStore.run", refuse)
    answer = client.post("/", data=framed(photos))
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "3", "whole seconds, never too early"
    assert answer.json["facts"]["path"] == "/x"


def test_a_baked_segment_needs_no_registry_and_serves_no_other(photos: Published, tmp_path: Path) -> None:
    manifest = photos.registry.manifest(photos.digest)
    with cache_of(photos, tmp_path / "cache").locate(photos.digest, "6..") as located:
        bake(located, manifest, tmp_path / "baked")
    settings = segment_settings(photos, tmp_path / "none", registry="", segment_dir=str(tmp_path / "baked"))
    client = ready(create_segment_app(settings).test_client())
    assert metrics(client)["isthmus_loaded_segments", ()] == 1, "loaded before it is ready"
    pooled = np.random.default_rng(5).standard_normal((1, 16, 4, 4)).astype(np.float32)
    body = framed(photos, "6..", tensors={"p6": pooled})
    given = frames.decode(client.post("/", data=body).data, max_bytes=2**20).tensors["logits"]
    unbaked = ready(create_segment_app(segment_settings(photos, tmp_path / "cache")).test_client())
    expected = frames.decode(unbaked.post("/", data=body).data, max_bytes=2**20).tensors["logits"]
    np.testing.assert_allclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE)
    answer = client.post("/", data=framed(photos, "..6"))
    assert (answer.status_code, answer.json["type"]) == (404, "Missing")
    assert answer.json["facts"]["exists"] == ["6.."]
    answer = client.post("/", data=framed(photos, "6..", bundle="sha256:" + "1" * 64))
    assert (answer.status_code, answer.json["facts"]["has"]) == (409, [photos.digest])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({"preload": ("@head",)}, "preload"),
        ({"preload": ("m@",)}, "preload"),
        ({"preload": ("m@middle",)}, "preload"),
        ({"providers": ("NoSuchProvider",)}, "providers"),
        ({"registry": "ftp://somewhere"}, "registry"),
        ({"segment_dir": "/nowhere/at/all"}, "segment_dir"),
        ({"cache_dir": "/proc/no/cache"}, "cache_dir"),
    ],
)
def test_wrong_settings_stop_the_factory_and_name_the_variable(
    photos: Published, tmp_path: Path, given: dict[str, Any], variable: str
) -> None:
    with pytest.raises(SettingsError) as e:
        create_segment_app(segment_settings(photos, tmp_path, **given))
    assert e.value.facts["variable"] == variable


def test_chunked_bodies_arrive_and_a_body_without_a_length_is_none(photos: Published, tmp_path: Path) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path / "cache"))
    ready(app.test_client())
    body = framed(photos)
    with served(app) as url, urllib3.PoolManager() as pool:
        pieces = (body[i : i + 500] for i in range(0, len(body), 500))
        assert pool.request("POST", url, body=pieces, retries=False).status == 200
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=LONG_S) as bare:
            bare.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert bare.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_compressed_body_that_does_not_say_so_is_not_taken_for_a_frame(
    client: FlaskClient, photos: Published
) -> None:
    answer = client.post("/", data=gzip.compress(framed(photos)))
    assert (answer.status_code, answer.json["facts"]["rule"]) == (400, "magic")
    assert client.post("/", data=gzip.compress(framed(photos)), headers={"Content-Encoding": "gzip"}).status_code == 200


def test_two_hundred_requests_at_sixteen_at_once_are_all_answered_right(photos: Published, tmp_path: Path) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path / "cache"))
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(20)]
    runner = ready(app.test_client())
    expected = [
        frames.decode(runner.post("/", data=framed(photos, tensors={"x": x})).data, max_bytes=2**20).tensors["logits"]
        for x in inputs
    ]

    with served(app) as url, urllib3.PoolManager(maxsize=16, block=True) as pool, ThreadPoolExecutor(16) as threads:

        def ask(i: int) -> float:
            body = framed(photos, tensors={"x": inputs[i % 20]}, request=str(i))
            answer = pool.request("POST", url, body=body, retries=False)
            assert answer.status == 200, answer.data
            frame = frames.decode(answer.data, max_bytes=2**20)
            assert frame.request == str(i)
            return float(np.abs(frame.tensors["logits"] - expected[i % 20]).max())

        assert max(threads.map(ask, range(200))) <= TOLERANCE
    assert metrics(runner)["isthmus_requests_in_flight", ()] == 0


def test_requests_of_a_batch_report_it_and_get_their_own_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole function: the trial is a client's traffic, then runs are shared, and metrics count these."""
    monkeypatch.setattr("isthmus.runtime.store.cpu_limit", lambda: 1)
    # On a machine shared with others a gain cannot be counted on.
    monkeypatch.setattr("isthmus.runtime.batching.MAX_SHARE", 1000.0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [value("x", "n", 512)], [value("y", "n", 256)], [weight("w", 512, 256)])
    published = publish(tmp_path, path, {}, partitions=[])
    settings = segment_settings(published, tmp_path / "cache", max_concurrency=32, adaptive_concurrency=False)
    app = create_segment_app(settings)
    client = ready(app.test_client())
    rng = np.random.default_rng(2)
    rows = [rng.standard_normal((1, 512)).astype(np.float32) for _ in range(24)]
    bodies = [bytes(frames.encode(Frame({"x": row}, published.digest, WHOLE, "r"))) for row in rows]

    def ask(body: bytes) -> tuple[Any, str]:
        answer = app.test_client().post("/", data=body)
        assert answer.status_code == 200, answer.text
        return frames.decode(answer.data, max_bytes=2**20).tensors["y"], answer.headers["Server-Timing"]

    alone = [ask(body)[0] for body in bodies]
    with ThreadPoolExecutor(12) as pool:

        def shared_runs() -> bool:
            answers = list(pool.map(ask, bodies))
            for (got, _), expected in zip(answers, alone, strict=True):
                np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
            return any(re.search(r'run;desc="batch-of-[248]";dur=', timing) for _, timing in answers)

        eventually(shared_runs)
    found = metrics(client)
    assert found["isthmus_batch_trials_total", (("outcome", "pays"),)] == 1
    assert sum(n for (name, _), n in found.items() if name == "isthmus_batches_total") > 0
    assert found["isthmus_batch_fallbacks_total", ()] == 0
