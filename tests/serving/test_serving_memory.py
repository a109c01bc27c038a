"""What requests take in memory together, and bodies that travel compressed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Response
from flask.testing import FlaskClient

from isthmus.admission import MemoryBudget, Reservation, Turns
from isthmus.codecs import Encoding, encode_tensor
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RequestTooLarge
from isthmus.oip import messages as oip
from isthmus.runtime.store import SegmentStore
from isthmus.serving import create_router_app, create_segment_app
from isthmus.serving.content_coding import MIN_BYTES, compress
from isthmus.wire import frame as frames
from isthmus.wire.frame import Frame
from isthmus.wire.json_bounds import parsed_bytes
from support.bundles import Published, ready, router_settings, segment_settings
from support.bundles import photos as photos
from support.patience import LONG_S, peak_of

COUNT = 30_000


@pytest.fixture(scope="module")
def client(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    cache = tmp_path_factory.mktemp("cache")
    settings = router_settings(photos, cache, ["local"], max_request_bytes=2**20, max_working_bytes=2**23)
    return ready(create_router_app(settings).test_client())


@pytest.fixture
def memory() -> Iterator[MemoryBudget]:
    """One that is given back all that was taken."""
    counted = MemoryBudget(1000)
    yield counted
    assert counted.used == 0


def infer(**more: Any) -> bytes:
    x = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [0.5] * 192}
    return json.dumps({"inputs": [x], **more}).encode()


def test_what_two_requests_take_is_counted_together(memory: MemoryBudget) -> None:
    one, other = Reservation(memory), Reservation(memory)
    one.hold(600)
    with pytest.raises(Overloaded) as e:
        other.hold(500)
    assert e.value.facts == {"limit": 1000, "retry_after_s": 1}
    other.hold(400)
    with pytest.raises(RequestTooLarge) as large:
        other.hold(601)
    assert large.value.facts == {"limit": 1000}
    one.close()
    one.close()
    with other.scope():
        other.hold(600)
    assert memory.used == 400
    other.close()


JSON_KINDS = {
    "lists": b"[" + b"[]," * COUNT + b"0]",
    "nested lists": b"[" + b"[[]]," * COUNT + b"0]",
    "objects": b"[" + b"{}," * COUNT + b"0]",
    "objects of one": b"[" + b'{"":{}},' * COUNT + b"0]",
    "numbers": json.dumps([i / 7 for i in range(COUNT)]).encode(),
    "large integers": json.dumps([2**63 + i for i in range(COUNT)]).encode(),
    "texts": json.dumps([f"{i}" for i in range(COUNT)]).encode(),
    "wide texts": json.dumps(["\U0001f600"] * COUNT, ensure_ascii=False).encode(),
    "one wide text": b'"' + b"a" * COUNT + "\U0001f600".encode() + b'"',
    "keys": json.dumps({f"{i}": i + 0.5 for i in range(COUNT)}).encode(),
    "depth": b"[" * 900 + b"]" * 900,
}


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_parsing_json_takes_no_more_than_it_is_counted_for(kind: str) -> None:
    text = b'{"a":' + JSON_KINDS[kind] + b"}"
    bound = parsed_bytes(text)
    assert peak_of(lambda: oip.read_document(text), bound) < bound


@pytest.mark.parametrize("path", ["/", "/v2/models/photos/infer"])
def test_json_that_parses_to_more_than_requests_may_take_is_refused_unparsed(
    client: FlaskClient, photos: Published, path: str
) -> None:
    bomb = b'{"inputs":[' + b"[]," * 300_000 + b"[]]}"
    assert len(bomb) < 2**20

    def refuse() -> None:
        answer = client.post(path.replace("photos", photos.name), data=bomb)
        assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge")
        assert answer.json["facts"]["limit"] == 2**23

    assert peak_of(refuse, 2**22) < 2**22
    assert client.post("/", data=infer()).status_code == 200


def test_what_is_refused_or_fails_holds_no_memory(client: FlaskClient, photos: Published) -> None:
    large = infer(parameters={"a": "b" * 900_000})
    for _ in range(12):
        assert client.post("/", data=large).status_code == 200
        assert client.post("/", data=large[:-1]).status_code == 400
        assert client.post("/nowhere", data=large).status_code == 404
        assert client.post("/?model=nobody", data=large).status_code == 404


def test_the_bodies_of_all_requests_are_counted_together(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryBudget(4_000_000)
    monkeypatch.setattr("isthmus.serving.app.MemoryBudget", lambda limit: memory)
    client = ready(create_router_app(router_settings(photos, tmp_path, ["local"])).test_client())
    assert client.post("/", data=infer()).status_code == 200
    assert memory.used == 0
    memory.reserve(4_000_000)
    answer = client.post("/", data=infer())
    assert (answer.status_code, answer.json["type"], answer.headers["Retry-After"]) == (429, "Overloaded", "1")
    assert memory.used == 4_000_000


def test_a_turn_is_waited_for_until_the_deadline() -> None:
    turns = Turns(1)
    with turns.one(Deadline.after(LONG_S)), pytest.raises(DeadlineExceeded), turns.one(Deadline.after(0.01)):
        pass
    with pytest.raises(DeadlineExceeded), turns.one(Deadline.after(0)):
        pass
    with turns.one(Deadline.after(LONG_S)):
        pass


def test_decoded_tensors_are_counted_and_their_working_memory_only_meanwhile(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    run = SegmentStore.run

    def counted(*given: Any) -> Any:
        held.append(memory.used)
        return run(*given)

    monkeypatch.setattr(SegmentStore, "run", counted)
    memory = MemoryBudget(0)
    monkeypatch.setattr("isthmus.serving.app.MemoryBudget", lambda limit: memory)
    client = ready(create_segment_app(segment_settings(photos, tmp_path / "cache")).test_client())
    encoded = encode_tensor(np.zeros((1, 16, 8, 8), "float32"), Encoding("int8/1"))
    data = frames.encode(Frame({}, photos.digest, "1..", encoded={"r1": encoded}))  # type: ignore[dict-item]
    memory.limit = len(data) + 4 * 1024 - 1
    for _ in range(2):
        answer = client.post("/", data=data)
        assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge")
    memory.limit += 4 * 1024 + 1
    assert not held
    assert client.post("/", data=data).status_code == 200
    assert (memory.used, held) == (0, [len(data) + 4 * 1024])


def test_numbers_of_a_response_take_little_more_than_its_text() -> None:
    array = np.random.default_rng(0).normal(size=(1, 50_000))
    request = oip.InferRequest({}, (oip.OutputRequest("a"),))
    bound = oip.response_bytes({"a": array}, request) + 2**20  # what is written at once

    def build() -> None:
        body = oip.build_response({"a": array}, request, model_name="m", model_version="1").body
        assert body.endswith(b"]}]}")

    assert oip.response_bytes({"a": array}, request) <= 50 * array.size
    assert peak_of(build, bound) < bound
    text = oip.build_response({"a": array}, request, model_name="m", model_version="1").body
    assert np.array_equal(json.loads(text)["outputs"][0]["data"], array[0])


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


CODINGS = {
    "gzip": gzip.compress,
    "GZIP": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    " deflate": raw_deflate,
    "identity": bytes,
}


@pytest.mark.parametrize("coding", CODINGS)
def test_a_request_may_be_compressed(client: FlaskClient, coding: str) -> None:
    headers = {"Content-Encoding": coding}
    body = infer(id="r" * 200)
    answer = client.post("/", data=CODINGS[coding](body), headers=headers)
    assert (answer.status_code, answer.json["id"]) == (200, "r" * 200)
    tensor = np.full((1, 3, 8, 8), 0.5, "float32").tobytes()
    about = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": 768}}
    text = json.dumps({"inputs": [about]}).encode()
    again = client.post(
        "/",
        data=CODINGS[coding](text + tensor),
        headers={**headers, "Inference-Header-Content-Length": str(len(text))},
    )
    assert again.json["outputs"] == answer.json["outputs"]


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "deflate,gzip", "chunked", "\u00e9" * 300])
def test_another_content_encoding_is_answered_with_those_that_are_offered(client: FlaskClient, coding: str) -> None:
    answer = client.post("/", data=infer(), headers={"Content-Encoding": coding})
    assert (answer.status_code, answer.json["type"]) == (415, "EncodingUnsupported")
    assert answer.json["facts"] == {"accepted": ["gzip", "deflate"]}
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"


GZIPPED = gzip.compress(b"{}" * 5000)
NOT_OF_ITS_CODING = {
    "gzip": [infer(), GZIPPED[:-1], GZIPPED[:20], GZIPPED + b"x", GZIPPED + bytes(9), b"", GZIPPED[:30] + b"\0" * 20],
    "deflate": [infer(), zlib.compress(infer())[:-1], zlib.compress(infer()) + b"\0", raw_deflate(infer())[:-1], b""],
}


@pytest.mark.parametrize("coding", NOT_OF_ITS_CODING)
def test_a_body_that_is_not_of_its_coding_is_malformed(client: FlaskClient, coding: str) -> None:
    for body in NOT_OF_ITS_CODING[coding]:
        answer = client.post("/", data=body, headers={"Content-Encoding": coding})
        assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed"), body
        assert answer.json["facts"] == {"header": "Content-Encoding"}


def test_a_gzip_body_may_be_several_one_after_the_other(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    body, headers = infer(), {"Content-Encoding": "gzip"}
    parts = b"".join(gzip.compress(body[at : at + 100]) for at in range(0, len(body), 100))
    assert client.post("/", data=parts, headers=headers).json == client.post("/", data=body).json
    monkeypatch.setattr("isthmus.serving.content_coding.MAX_MEMBERS", 3)
    assert client.post("/", data=parts, headers=headers).status_code == 400


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_that_unpacks_to_more_than_the_bound_is_refused_at_the_bound(client: FlaskClient, coding: str) -> None:
    bomb = CODINGS[coding](bytes(50 * 2**20))
    assert len(bomb) < 2**20

    def refuse() -> None:
        answer = client.post("/", data=bomb, headers={"Content-Encoding": coding})
        assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge")
        assert answer.json["facts"] == {"limit": 2**20}

    assert peak_of(refuse, 2**22) < 2**22


@pytest.mark.parametrize(
    ("accepts", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("GZip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=0, deflate;q=0.1", "deflate"),
        ("gzip;q=0.5, identity", ""),
        ("*", "gzip"),
        ("*;q=0", ""),
        ("gzip;q=0", ""),
        ("br", ""),
        ("identity", ""),
        ("", ""),
        (";;q=x,,", ""),
    ],
)
def test_large_json_is_compressed_where_accept_encoding_asks(client: FlaskClient, accepts: str, coding: str) -> None:
    headers = {"Accept-Encoding": accepts} if accepts else {}
    answer = client.post("/", data=infer(id="r" * 250), headers=headers)
    assert "Content-Encoding" not in answer.headers  # it is short
    large = client.get("/metrics", headers=headers)
    assert len(client.get("/metrics").data) > MIN_BYTES
    assert (large.headers.get("Content-Encoding", ""), large.headers["Vary"]) == (coding, "Accept-Encoding")
    assert large.headers["Content-Length"] == str(len(large.data))
    unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress, "": bytes}[coding]
    assert b"isthmus_requests" in unpack(large.data)


def test_large_errors_are_compressed_and_frames_are_not(client: FlaskClient, photos: Published, tmp_path: Path) -> None:
    headers = {"Accept-Encoding": "gzip"}
    answer = client.post("/", data=json.dumps({f"{i}" * 300: 0 for i in range(20)}), headers=headers)
    assert answer.status_code == 400
    assert (answer.headers["Content-Encoding"], answer.headers["Vary"]) == ("gzip", "Accept-Encoding")
    assert answer.headers["Content-Length"] == str(len(answer.data))
    assert len(json.loads(gzip.decompress(answer.data))["facts"]["got"]) == 20
    segment = ready(create_segment_app(segment_settings(photos, tmp_path / "cache")).test_client())
    frame = Frame({"x": np.zeros((1, 3, 8, 8), "float32")}, photos.digest, "..1")
    reply = segment.post("/", data=frames.encode(frame), headers=headers)
    assert (reply.status_code, "Content-Encoding" in reply.headers, "Vary" in reply.headers) == (200, False, False)


def test_what_would_take_seconds_to_compress_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.serving.content_coding.MAX_BYTES", 5000)
    for size, coding in ((MIN_BYTES - 1, None), (MIN_BYTES, "gzip"), (5000, "gzip"), (5001, None)):
        response = Response(b"1" * size, mimetype="application/json")
        compress(response, "gzip")
        assert response.headers.get("Content-Encoding") == coding
        assert (response.data if coding is None else gzip.decompress(response.data)) == b"1" * size
