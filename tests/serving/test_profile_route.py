"""The profiling route of a segment function: for those who hold its token, and for nobody where it has none."""

from __future__ import annotations

import base64
import math
import statistics
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flask.testing import FlaskClient

from isthmus.artifacts.device import Device, cpu_name, memory
from isthmus.artifacts.segment_id import WHOLE
from isthmus.serving import create_segment_app
from isthmus.serving.profiling import SECRET
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus_tools.graph.load import read_optimised
from support.bundles import Published, ready, segment_settings
from support.bundles import photos as photos
from support.patience import least

TOKEN = "a-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def client_of(photos: Published, folder: Path, token: str | None = TOKEN, **settings: Any) -> FlaskClient:
    (folder / "secrets").mkdir()
    if token is not None:
        (folder / "secrets" / SECRET).write_text(token + "\n")
    given = {"secrets_dir": str(folder / "secrets")} | settings
    return ready(create_segment_app(segment_settings(photos, folder / "cache", **given)).test_client())


@pytest.fixture
def client(photos: Published, tmp_path: Path) -> FlaskClient:
    return client_of(photos, tmp_path)


def framed(photos: Published, segment: str = WHOLE, **changes: Any) -> bytes:
    return frames.encode(Frame(**{"tensors": photos.inputs, "bundle": photos.digest, "segment": segment} | changes))


@pytest.mark.parametrize("path", ["/profile", "/profile/echo"])
@pytest.mark.parametrize("token", [None, "", " \n"])
def test_a_function_without_the_secret_says_how_to_switch_profiling_on(
    photos: Published, tmp_path: Path, token: str | None, path: str
) -> None:
    answer = client_of(photos, tmp_path, token).post(path, data=framed(photos), headers={"Authorization": "Bearer "})
    assert (answer.status_code, answer.json["type"]) == (403, "ProfilingOff")
    assert answer.json["facts"] == {"secret": SECRET}
    assert f"faas-cli secret create {SECRET}" in answer.json["hint"]


@pytest.mark.parametrize("path", ["/profile", "/profile/echo"])
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer a-toke", "Bearer a-token2", f"Basic {TOKEN}", TOKEN, "Bearer \xe9"],
)
def test_a_wrong_token_is_refused(client: FlaskClient, photos: Published, header: str | None, path: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = client.post(path, data=framed(photos), headers=headers)
    assert (answer.status_code, answer.json["type"]) == (403, "ProfilingRefused")
    assert TOKEN not in answer.get_data(as_text=True)


def test_a_refused_caller_loads_nothing(client: FlaskClient, photos: Published) -> None:
    client.post("/profile", data=framed(photos))
    assert "isthmus_loaded_segments 0.0" in client.get("/metrics").get_data(as_text=True)


def test_an_empty_body_asks_what_device_this_is(client: FlaskClient) -> None:
    device = msgspec.convert(client.post("/profile", headers=BEARER).json["device"], Device)
    assert (device.threads, device.providers) == (1, ("CPUExecutionProvider",))
    assert device.runtime.startswith("onnxruntime ")
    assert device.cpus >= 1
    assert (device.cpu, device.memory_bytes) == (cpu_name(), memory())


def test_an_empty_body_asks_how_fast_the_device_packs(client: FlaskClient) -> None:
    every = {"half/1", "bfloat16/1", "lossless/3", "int8/1", "int4/1", "int8-token/1", "sparse/2"}

    def slowest() -> float:
        codecs = client.post("/profile?codecs=1", headers=BEARER).json["codecs"]
        assert codecs.keys() <= every
        found = [seconds for speed in codecs.values() for seconds in speed.values()]
        assert min(found) > 1e-12
        return max(found) if codecs.keys() == every else math.inf  # a pause may leave no time for some

    assert least(slowest, 1e-5) < 1e-5
    assert "codecs" not in client.post("/profile", headers=BEARER).json


def test_a_segment_is_measured(client: FlaskClient, photos: Published) -> None:
    doc = client.post("/profile?runs=9", data=framed(photos), headers=BEARER).json
    assert (doc["bundle"], doc["segment"], doc["asked"], len(doc["runs_s"])) == (photos.digest, WHOLE, 9, 9)
    assert doc["median_s"] == pytest.approx(statistics.median(doc["runs_s"]))
    assert 0 < min(doc["runs_s"]) <= doc["low_s"] <= doc["median_s"] <= doc["high_s"] <= max(doc["runs_s"])
    assert (doc["input_bytes"], doc["output_bytes"]) == (3 * 8 * 8 * 4, 5 * 4)
    assert doc["decode_s"] > 0
    assert doc["encode_s"] > 0
    assert doc["nodes"] is None
    # Three convolutions of 16 channels over 8 x 8 pixels, two of which are alive at a time.
    assert doc["memory"]["weights_bytes"] == sum(t.length for t in photos.bundle.weights.tensors)
    assert 2 * 16 * 8 * 8 * 4 <= doc["memory"]["activation_bytes"] <= doc["memory"]["arena_bytes"]


def test_nodes_are_those_of_the_graph_that_ran(client: FlaskClient, photos: Published) -> None:
    nodes = client.post("/profile?runs=5&nodes=1", data=framed(photos), headers=BEARER).json["nodes"]
    assert nodes["runs"] == 5
    graph = zlib.decompress(base64.b64decode(nodes["graph"]))
    assert {name for name, _, _ in nodes["kernels"]} == {node.name for node in read_optimised(graph)}
    assert all(seconds > 0 for _, _, seconds in nodes["kernels"])


def test_what_was_observed_leaves_nothing_behind(client: FlaskClient, photos: Published, tmp_path: Path) -> None:
    assert client.post("/profile?nodes=1", data=framed(photos), headers=BEARER).status_code == 200
    assert list((tmp_path / "cache" / "observed").iterdir()) == []
    assert "isthmus_loaded_segments 1.0" in client.get("/metrics").get_data(as_text=True)


def test_a_head_and_a_tail_are_measured_like_the_whole(client: FlaskClient, photos: Published) -> None:
    head = client.post("/profile?runs=3&memory=0", data=framed(photos, "..6"), headers=BEARER).json
    pooled = np.zeros((1, 16, 4, 4), np.float32)
    tail = client.post(
        "/profile?runs=3&memory=0", data=framed(photos, "6..", tensors={"p6": pooled}), headers=BEARER
    ).json
    assert (head["output_bytes"], tail["input_bytes"]) == (pooled.nbytes, pooled.nbytes)
    assert head["memory"] is tail["memory"] is None


def test_it_stops_before_the_deadline_and_says_how_often_it_ran(client: FlaskClient, photos: Published) -> None:
    client.post("/", data=framed(photos))

    def tried(timeout_ms: int) -> Any:
        headers = {**BEARER, "X-Timeout": f"{timeout_ms}ms"}
        return client.post("/profile?runs=500&warmup=0&nodes=1", data=framed(photos), headers=headers)

    # On a busy machine all of the 20 ms may pass before the first run, and on a slow one they always do.
    answers = (tried(20 * 2 ** (n // 10)) for n in range(60))
    docs = (answer.json for answer in answers if answer.status_code == 200)
    doc = next(doc for doc in docs if len(doc["runs_s"]) < 500)
    assert doc["asked"] == 500
    assert len(doc["runs_s"]) >= 1


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("runs=0", "runs"),
        ("runs=501", "runs"),
        ("runs=-1", "runs"),
        ("runs=1e3", "runs"),
        ("runs=\u0663", "runs"),
        ("warmup=51", "warmup"),
        ("nodes=yes", "nodes"),
        ("memory=2", "memory"),
    ],
)
def test_a_query_that_is_none_is_malformed(client: FlaskClient, photos: Published, query: str, parameter: str) -> None:
    answer = client.post(f"/profile?{query}", data=framed(photos), headers=BEARER)
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")
    assert answer.json["facts"] == {"parameter": parameter}


@pytest.mark.parametrize(
    ("changes", "status", "type"),
    [
        ({"bundle": "../../etc"}, 400, "RequestMalformed"),
        ({"bundle": "sha256:" + "0" * 64}, 404, "Missing"),
        ({"segment": "..99"}, 404, "Missing"),
        ({"tensors": {"x": np.zeros((1, 3, 9, 9), np.float32)}}, 400, "ShapeMismatch"),
    ],
)
def test_what_cannot_run_is_refused_as_a_request_would_be(
    client: FlaskClient, photos: Published, changes: dict[str, Any], status: int, type: str
) -> None:
    answer = client.post("/profile", data=framed(photos, **changes), headers=BEARER)
    assert (answer.status_code, answer.json["type"]) == (status, type)


def test_the_memory_bound_holds_for_what_is_observed(photos: Published, tmp_path: Path) -> None:
    weights = sum(t.length for t in photos.bundle.weights.tensors)
    small = client_of(photos, tmp_path, max_loaded_bytes=weights)
    assert small.post("/profile?nodes=1", data=framed(photos), headers=BEARER).status_code == 200
    assert small.post("/", data=framed(photos)).status_code == 200


def test_an_echo_runs_nothing_and_answers_with_so_many_bytes(client: FlaskClient) -> None:
    sent = frames.encode(Frame({"anything": np.zeros(1000, np.uint8)}, request="r-1"))
    answer = client.post("/profile/echo?bytes=5000", data=sent, headers=BEARER)
    assert (answer.status_code, answer.content_type) == (200, frames.CONTENT_TYPE)
    frame = frames.decode(answer.data, max_bytes=2**20)
    assert frame.request == "r-1"
    assert frame.tensors["echo"].shape == (5000,)
    assert "total;dur=" in answer.headers["Server-Timing"]


def test_an_echo_is_bounded(photos: Published, tmp_path: Path) -> None:
    small = client_of(photos, tmp_path, max_request_bytes=1000)
    answer = small.post("/profile/echo?bytes=1001", data=b"", headers=BEARER)
    assert (answer.status_code, answer.json["type"], answer.json["facts"]) == (413, "RequestTooLarge", {"limit": 1000})


def test_the_limit_of_a_container_is_the_devices_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("134217728\n")
    assert memory(tmp_path) == 2**27
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(tmp_path) % 2**28 == 0


def test_a_cpu_without_a_model_name_is_told_by_its_part(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n")
    assert cpu_name(info) == "implementer 0x41 part 0xd0c"
    info.write_text("model name\t: Fast CPU @ 2 GHz\n")
    assert cpu_name(info) == "Fast CPU @ 2 GHz"
