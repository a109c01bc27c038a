"""The router: hops that fail, versions that come and go, what it counts, and settings that it refuses."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient

from isthmus.errors import SettingsError
from isthmus.serving import create_router_app, create_segment_app
from support.bundles import (
    Published,
    metrics,
    photo,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
    until,
)
from support.bundles import photos as photos
from support.patience import LONG_S, least
from support.routers import INFER, Chain, assert_classes, before, expected_classes, local_router, oip_json
from support.routers import chain as chain
from support.routers import client as client

# Hops that fail


def test_a_tail_that_is_down_is_named_within_the_deadline(chain: Chain, photos: Published, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        down = f"http://127.0.0.1:{s.getsockname()[1]}/"
    settings = router_settings(photos, tmp_path, (chain.hops[0], down), hop_attempts=1)
    client = ready(create_router_app(settings).test_client())
    answer = client.post("/", data=photo(), headers={"X-Timeout": "30s"})
    assert (answer.status_code, answer.json["type"]) == (503, "HopUnavailable")
    assert answer.json["facts"]["hop"] == down
    assert answer.headers["Retry-After"] == "1"
    assert metrics(client)["isthmus_hop_errors_total", (("error", "HopUnavailable"), ("hop", down))] == 1


def test_a_tail_that_hangs_is_given_up_at_the_deadline(chain: Chain, photos: Published, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        hung = f"http://127.0.0.1:{s.getsockname()[1]}/"
        client = ready(create_router_app(router_settings(photos, tmp_path, (chain.hops[0], hung))).test_client())

        def given_up() -> float:
            start = time.monotonic()
            answer = client.post("/", data=photo(), headers={"X-Timeout": "400ms"})
            took = time.monotonic() - start
            assert answer.status_code == 504
            # A pause before that hop is called uses the time up elsewhere.
            is_right = (answer.json["type"], answer.json["facts"].get("hop")) == ("HopTimeout", hung)
            return took if is_right else math.inf

        assert 0.35 <= least(given_up, 1.0) < 1.0  # X-Timeout less its margin


@pytest.mark.parametrize(
    ("status", "headers", "body", "type", "code", "retry_after"),
    [
        (429, {"Retry-After": "3600"}, b"", "HopBusy", 429, "3600"),
        (503, {"Retry-After": "77"}, b"", "HopUnavailable", 503, "77"),
        (404, {}, b"error finding function", "HopUnavailable", 503, "1"),
        (500, {}, b'{"error": "bad", "type": "RunFailed", "facts": {}}', "HopRejected", 502, None),
        (400, {}, b"x" * 2**20, "HopRejected", 502, None),
        (200, {}, b"<html>", "HopRejected", 502, None),
    ],
)
def test_what_a_hop_answers_is_told_shortly_and_truly(
    photos: Published,
    tmp_path: Path,
    status: int,
    headers: dict[str, str],
    body: bytes,
    type: str,
    code: int,
    retry_after: str | None,
) -> None:
    stub = Flask("stub")
    stub.post("/")(lambda: Response(body, status, headers))
    with served(stub) as url:
        client = ready(create_router_app(router_settings(photos, tmp_path, (url,), hop_attempts=1)).test_client())
        answer = client.post("/", data=photo(), headers={"X-Timeout": "30s"})
    assert (answer.status_code, answer.json["type"]) == (code, type)
    assert answer.json["facts"]["hop"] == url
    assert answer.headers.get("Retry-After") == retry_after
    assert len(answer.data) < 2000


def test_a_hop_that_is_still_loading_is_waited_for(photos: Published, tmp_path: Path) -> None:
    app = create_segment_app(segment_settings(photos, tmp_path / "hop"))
    answers = iter([Response(status=503, headers={"Retry-After": "1"})])
    before(app, lambda environ: next(answers, None) if environ["REQUEST_METHOD"] == "POST" else None)
    with served(app) as url:
        client = ready(create_router_app(router_settings(photos, tmp_path, (url,))).test_client())
        assert client.post("/", data=photo()).status_code == 200
    assert next(answers, None) is None


# What the router knows


def test_it_is_not_ready_until_its_model_is_published(photos: Published, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    settings = router_settings(photos, tmp_path / "cache", ("local",), registry=str(folder))
    client = create_router_app(settings).test_client()
    assert until(lambda: "photos" in client.get("/ready").json["error"])
    for answer in (
        client.get("/ready"),
        client.get("/v2/health/ready"),
        client.get("/v2/models/photos/ready"),
        client.post("/", data=photo()),
    ):
        assert (answer.status_code, answer.json["type"], answer.headers["Retry-After"]) == (503, "NotReady", "1")
    assert client.get("/v2/health/live").status_code == 200
    publish_photos(tmp_path / "late", registry=folder)
    assert ready(client).post("/", data=photo()).status_code == 200


def test_a_registry_that_goes_away_takes_nothing_with_it(tmp_path: Path) -> None:
    mine = publish_photos(tmp_path / "mine")
    client = local_router(mine, tmp_path / "cache", refresh_s=0.0)
    assert client.post("/", data=photo()).status_code == 200
    shutil.rmtree(mine.folder)
    for emptied in (False, True):
        if emptied:
            mine.folder.mkdir()  # a share that is not mounted
        for _ in range(3):
            assert client.post("/", data=photo()).status_code == 200
            assert client.get("/v2/models/photos").json["versions"] == ["1"]


def test_an_alias_that_moves_brings_the_new_version_after_refresh_s(tmp_path: Path) -> None:
    first = publish_photos(tmp_path / "first")
    quick = local_router(first, tmp_path / "cache", refresh_s=0.1)
    slow = local_router(first, tmp_path / "cache2", refresh_s=3600.0)
    assert quick.post("/", data=photo()).json["model_version"] == "1"
    second = publish_photos(tmp_path / "second", seed=1, registry=first.folder)
    assert second.version == "2"
    first.registry.move_alias("photos", "prod", "2")
    assert until(lambda: quick.post("/", data=photo()).json["model_version"] == "2")
    answer = quick.post("/", data=photo()).json
    assert_classes(answer["classes"], expected_classes(second, photo()))
    assert quick.post("/?model=photos:1", data=photo()).json["model_version"] == "1"
    assert quick.get("/v2/models/photos").json["versions"] == ["1", "2"]
    assert slow.post("/", data=photo()).json["model_version"] == "1"


def test_a_registry_that_hangs_delays_no_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = publish_photos(tmp_path / "mine")
    client = local_router(mine, tmp_path / "cache", refresh_s=0.0)
    assert client.post("/", data=photo()).status_code == 200
    gate = threading.Event()
    monkeypatch.setattr("isthmus.registry.Registry.resolve", lambda *_: gate.wait(LONG_S) and None)
    try:
        start = time.monotonic()
        for _ in range(5):
            assert client.post("/", data=photo()).status_code == 200
        assert time.monotonic() - start < LONG_S / 2
    finally:
        gate.set()


def test_the_cuts_setting_chooses_the_partition(photos: Published, tmp_path: Path) -> None:
    client = local_router(photos, tmp_path, cuts="3/4")
    doc = client.post("/", data=photo()).json
    assert [s["segment"] for s in doc["route"]["segments"]] == ["..3", "3..4", "4.."]
    assert_classes(doc["classes"], expected_classes(photos, photo()))


def test_a_local_hop_is_measured_and_gauged(photos: Published, tmp_path: Path) -> None:
    client = local_router(photos, tmp_path, preload=("photos@head", "photos@tail"))
    assert metrics(client)["isthmus_loaded_segments", ()] == 2, "preloads are in memory before it is ready"
    client.post("/", data=photo())
    found = metrics(client)
    assert found["isthmus_loaded_bytes", ()] == sum(t.length for t in photos.bundle.weights.tensors)
    assert found["isthmus_stage_seconds_count", (("stage", "hop1-run"),)] == 1


def test_counters_move_and_hops_are_labels(chain: Chain, photos: Published) -> None:
    def value(name: str, **labels: str) -> float:
        return metrics(chain.client).get((name, tuple(sorted(labels.items()))), 0.0)

    head, tail = chain.hops
    before = {hop: value("isthmus_hop_sent_bytes_total", hop=hop) for hop in chain.hops}
    answered = value("isthmus_requests_total", endpoint="answer", code="200")
    doc = chain.client.post("/", data=photo()).json
    for hop, stage in zip(chain.hops, doc["route"]["segments"], strict=True):
        assert value("isthmus_hop_sent_bytes_total", hop=hop) - before[hop] == stage["sent_bytes"] > 0
    assert value("isthmus_hop_received_bytes_total", hop=head) > value("isthmus_hop_received_bytes_total", hop=tail) > 0
    assert value("isthmus_requests_total", endpoint="answer", code="200") == answered + 1
    chain.client.post(INFER, json=oip_json(photos))
    assert value("isthmus_requests_total", endpoint="infer", code="200") >= 1


def test_what_callers_send_never_becomes_a_label(client: FlaskClient, photos: Published) -> None:
    def traffic(marked: str) -> set[Any]:
        client.post(f"/?model={marked}", data=photo())
        client.post(f"/v2/models/{marked}/versions/{marked}/infer", json=oip_json(photos))
        client.get(f"/v2/models/{marked}")
        client.get(f"/{marked}")
        metrics(client)
        return set(metrics(client))

    assert traffic("one") == traffic("two")


def test_one_request_too_many_is_told_when_to_come_back(photos: Published, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        hung = f"http://127.0.0.1:{s.getsockname()[1]}/"
        app = create_router_app(
            router_settings(photos, tmp_path, (hung,), max_concurrency=1, max_queued=0, hop_attempts=1)
        )
        client = ready(app.test_client())
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(app.test_client().post, "/", data=photo())
            assert until(lambda: metrics(client)["isthmus_requests_in_flight", ()] == 1)
            refused = client.post("/", data=photo())
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            s.settimeout(LONG_S)
            while not first.done():  # a load ahead has a connection as well
                s.accept()[0].close()
            assert first.result(LONG_S).status_code == 503
        assert metrics(client)["isthmus_requests_in_flight", ()] == 0


def test_errors_never_hold_a_stack_trace(
    chain: Chain, photos: Published, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr("isthmus.processing.image.preprocess", broken)
    answer = chain.client.post("/", data=photo())
    assert (answer.status_code, answer.json["type"]) == (500, "InternalError")
    assert not any(told in answer.data for told in (b"secret", b"Traceback", b"KeyError", b".py"))


@pytest.mark.parametrize(
    ("given", "variable"),
    [
        ({"hops": ()}, "hops"),
        ({"hops": ("cloud-tail",)}, "hops"),
        ({"hops": ("http://",)}, "hops"),
        ({"hops": ("http://tail:99999/",)}, "hops"),
        ({"hops": ("http://user:secret@tail/",)}, "hops"),
        ({"preload": ("@",)}, "preload"),
        ({"registry": "", "segment_dir": "/baked"}, "registry"),
        ({"registry": "ftp://bucket"}, "registry"),
        ({"providers": ("NoSuchProvider",)}, "providers"),
    ],
)
def test_wrong_settings_stop_the_factory_and_name_the_variable(
    photos: Published, tmp_path: Path, given: dict[str, Any], variable: str
) -> None:
    settings = router_settings(photos, tmp_path, **{"hops": ("local",)} | given)
    with pytest.raises(SettingsError) as e:
        create_router_app(settings)
    assert e.value.facts["variable"] == variable


def test_a_segment_id_cannot_end_a_header() -> None:
    from isthmus.serving.request import Timings

    timings = Timings()
    timings.add("hop0", 0.001, 'a"\r\nX-Evil: 1')
    assert timings.header().startswith('hop0;desc="a___X-Evil__1";dur=1.000, total;dur=')


def test_a_router_with_remote_hops_never_loads_the_runtime(photos: Published, tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from isthmus.serving import create_router_app
        from isthmus.settings import RouterSettings
        create_router_app(RouterSettings.from_env(os.environ))
        sys.exit(sorted({"onnxruntime", "onnx", "boto3", "torch"} & sys.modules.keys()) or 0)"""
    env = {"registry": str(photos.folder), "cache_dir": str(tmp_path), "model": "photos", "hops": "http://tail/"}
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **env, "log_level": "error"}, check=True)
