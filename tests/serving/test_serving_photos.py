"""Photos through a router and real sockets: they are classified as by the whole model, and what is none is refused."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import urllib3
from flask.testing import FlaskClient
from PIL import Image

from isthmus.errors import RequestMalformed
from isthmus.oip import messages as oip
from isthmus.processing.media import PhotoForm, from_base64, looks_like_form, read_form
from support.bundles import Published, free_model, photo, publish, served
from support.bundles import photos as photos
from support.paths import ROOT
from support.patience import peak_of
from support.routers import Chain, assert_classes, expected_classes, local_router
from support.routers import chain as chain
from support.routers import client as client

TRACE = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP"])
def test_a_photo_is_classified_as_the_whole_model_does(client: FlaskClient, photos: Published, format: str) -> None:
    data = photo(format=format)
    answer = client.post("/", data=data)
    assert answer.status_code == 200
    doc = answer.json
    assert_classes(doc["classes"], expected_classes(photos, data))
    assert (doc["model_name"], doc["model_version"]) == ("photos", "1")
    assert doc["route"]["photo_bytes"] == len(data)
    assert doc["route"]["input_bytes"] == 3 * 8 * 8 * 4
    assert doc["route"]["link_raw_bytes"] == 16 * 4 * 4 * 4
    assert [s["segment"] for s in doc["route"]["segments"]] == ["..6", "6.."]


def test_a_photo_in_json_gives_the_same(client: FlaskClient, photos: Published) -> None:
    data = photo(seed=4)
    answer = client.post("/", json={"image": base64.b64encode(data).decode(), "top_k": 2})
    assert_classes(answer.json["classes"], expected_classes(photos, data, 2))
    assert_classes(client.post("/?top_k=5", data=data).json["classes"], expected_classes(photos, data, 5))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: f"data:image/png;base64,{text}",
        lambda text: f"data:image/png;base64,{quote(text, safe='')}",
        lambda text: f"data:image/png;name=cat.png;BASE64,{text}",
        lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\n",
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.replace("+", "-").replace("/", "_").rstrip("=") + "\n",
        lambda text: f" \n data:image/png; base64, {text} ",
        lambda text: "\n    ".join(text[i : i + 76] for i in range(0, len(text), 76)),
    ],
    ids=[
        "data url",
        "data url in percent",
        "data url with parameters",
        "lines",
        "no padding",
        "url-safe",
        "all of it",
        "spaces around it",
        "indented lines",
    ],
)
def test_base64_that_can_mean_only_one_photo_is_taken(
    client: FlaskClient, photos: Published, wrap: Callable[[str], str]
) -> None:
    # A length that needs padding, and letters that the alphabets write differently; zeros after a PNG's end are none's.
    seeds = (photo(seed=seed) for seed in range(99))
    data = next(d for d in seeds if {"+", "/"} <= set(base64.b64encode(d).decode()))
    data += b"\0" * ((1 - len(data)) % 3)
    text = base64.b64encode(data).decode()
    assert text.endswith("==")
    answer = client.post("/", json={"image": wrap(text)})
    assert answer.status_code == 200, answer.text
    assert_classes(answer.json["classes"], expected_classes(photos, data))


def test_a_data_url_of_escapes_takes_no_more_memory_than_its_text() -> None:
    text = "data:;base64," + "%41" * 2**18
    bound = 6 * len(text)  # 90 times, when every escape was unquoted

    def refuse() -> None:
        with pytest.raises(RequestMalformed, match="letter 1 is '%'"):
            from_base64(text)

    assert peak_of(refuse, bound) < bound


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (7, "it is a number, not text"),
        (None, "it is null, not text"),
        (["/9j/"], "it is a list, not text"),
        ("data:image/png,%89PNG", "a data: URL without ;base64"),
        ("iVBO Rw0K", "it holds spaces"),
        ("iVBORw0é", "character 8 is 'é'"),
        ("iVBO*w0K", "letter 5 is '*'"),
        ("iV=BORw0", "letter 3 is an = before the end"),
        ("iVBO-w0/", "it mixes the plain alphabet"),
        ("iVBOR", "it has 5 letters"),
        ("iVBORw0K===", "more than two ="),
    ],
)
def test_what_is_wrong_with_base64_is_told(client: FlaskClient, image: object, said: str) -> None:
    answer = client.post("/", json={"image": image})
    assert (answer.status_code, answer.json["type"]) == (400, "RequestMalformed")
    assert said in answer.json["error"]
    assert answer.json["facts"] == {"parameter": "image"}


def form(*parts: tuple[str, bytes], boundary: str = "----WebKitFormBoundary7MA4YWxk") -> bytes:
    """A multipart/form-data body of parts, each a disposition's parameters and its content."""
    body = b""
    for disposition, content in parts:
        head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def test_a_photo_in_a_form_is_taken_with_its_fields(client: FlaskClient, photos: Published) -> None:
    data = photo(seed=4)
    file = ('name="upload"; filename="cat.png"', data)
    # What a body is, its bytes say, so a connector that drops the header changes nothing.
    for headers in ({}, {"Content-Type": "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxk"}):
        answer = client.post("/", data=form(('name="top_k"', b"2"), file), headers=headers)
        assert answer.status_code == 200, answer.text
        assert_classes(answer.json["classes"], expected_classes(photos, data, 2))
    assert len(client.post("/?top_k=3", data=form(file)).json["classes"]) == 3
    assert client.post("/", data=form(file)).json["route"]["photo_bytes"] == len(data)


FILE = ('name="f"; filename="f.png"', photo())


def test_a_form_may_hold_a_photo_of_any_size(client: FlaskClient) -> None:
    data = random.Random(0).randbytes(3 * 300 * 300)
    image = io.BytesIO()
    Image.frombytes("RGB", (300, 300), data).save(image, "PNG")
    file = ('name="f"; filename="f.png"', image.getvalue())
    assert len(file[1]) > 2**18
    answer = client.post("/", data=form(file, ('name="top_k"', b"2")))
    assert answer.status_code == 200, answer.text
    assert answer.json["classes"] == client.post("/?top_k=2", data=file[1]).json["classes"]
    # Any bytes of a file may look like its boundary's beginning.
    for content in (b"\r\n" * 2**17, b"\r\n------WebKit" * 2**15, b"--" * 2**17):
        assert read_form(form(('name="f"; filename="f"', content))).photos == (content,)


def test_a_file_that_was_not_chosen_in_a_form_is_none() -> None:
    assert read_form(form(('name="other"; filename=""', b""), FILE)) == PhotoForm((FILE[1],), {})
    assert read_form(form(('name="f"; filename=""', FILE[1]))) == PhotoForm((FILE[1],), {})


def test_a_photo_where_tensors_are_taken_is_told_where_to_go(client: FlaskClient) -> None:
    for body in (photo(), form(FILE)):
        answer = client.post("/v2/models/photos/infer", data=body)
        assert (answer.status_code, answer.json["type"]) == (415, "MediaUnsupported")
        assert answer.json["hint"] == "POST a photo to /?model=photos"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.replace(b"\r\nContent-Disposition", b"\r\nX-Part: 1\r\ncontent-disposition"),
        lambda body: b"\r\n" + body,
        lambda body: body.replace(b"WebKitFormBoundary7MA4YWxk", b"a boundary: of (RFC) 2046"),
        lambda body: body.replace(b"\r\n", b"\n"),
    ],
    ids=["another header first", "an empty line first", "odd boundary", "line feeds"],
)
def test_odd_forms_that_are_forms_are_taken(change: Callable[[bytes], bytes]) -> None:
    body = change(form(('name="f"; filename="f"', b"content"), ('name="top_k"', b"3")))
    assert looks_like_form(body)
    assert read_form(body) == PhotoForm((b"content",), {"top_k": "3"})


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (form(('name="image"', b"text")), 400, "the form has 0 files (its fields: image)"),
        (form(FILE, ('name="model"', b"other")), 400, "the form has the fields model"),
        (form(FILE, ("x", b"nameless")), 400, "beside the photo it may have top_k"),
        (form(FILE, ('name="top_k"', b"many")), 400, "top_k is 'many'"),
        (form(FILE, ('name="note"', b"x" * 2**15)), 413, "bytes beside its file, at its field 'note'"),
        (form(*[FILE] * 33), 413, "the request has 33 photos; at most 32 are taken"),
        (form(*[FILE] * 49), 413, "more than 48 parts"),
        (form(FILE)[:-40], 400, "the form cannot be read"),
        (form(('name="f"; filename="f.txt"', b"hello")), 415, "it looks like text"),
        (form(('name="f"; filename="f.png"', b"")), 400, "the form's file is empty"),
        (b"--only a line", 415, "a form (multipart/form-data) that is not one"),
    ],
)
def test_what_is_wrong_with_a_form_is_told(client: FlaskClient, body: bytes, status: int, said: str) -> None:
    answer = client.post("/", data=body)
    assert answer.status_code == status, answer.text
    assert said in answer.json["error"]


def test_server_timing_holds_every_stage(client: FlaskClient) -> None:
    header = client.post("/", data=photo()).headers["Server-Timing"]
    names = [part.strip().split(";")[0] for part in header.split(",")]
    assert names == ["queue", "preprocess", "hop0", "hop0-run", "hop1", "hop1-run", "postprocess", "total"]
    assert 'hop0;desc="..6";dur=' in header
    assert 'hop1-run;desc="6..";dur=' in header


def test_the_requests_identity_comes_back_and_goes_on_to_every_hop(client: FlaskClient, chain: Chain) -> None:
    sent = {
        "X-Call-Id": "call-9",
        "traceparent": TRACE,
        "tracestate": "a=1,b=2",
        "X-Timeout": "9s",
        "Authorization": "Bearer secret",
        "X-Callback-Url": "http://evil/",
    }
    answer = client.post("/", data=photo(), headers=sent)
    assert (answer.headers["X-Call-Id"], answer.headers["traceparent"]) == ("call-9", TRACE)
    assert answer.json["id"] == "call-9"
    assert len(chain.seen) == 2
    for headers in chain.seen:
        assert headers["X-Call-Id"] == "call-9"
        assert headers["Traceparent"] == TRACE
        assert headers["Tracestate"] == "a=1,b=2"
        assert headers["X-Timeout"].endswith("ms")
        assert 0 < int(headers["X-Timeout"][:-2]) <= 9000
        assert not headers.keys() & {"Authorization", "X-Callback-Url"}


def test_a_trace_that_is_none_is_begun_anew(client: FlaskClient, chain: Chain) -> None:
    client.post("/", data=photo(), headers={"traceparent": TRACE + "-more", "tracestate": "a=1"})
    assert chain.seen[0]["Traceparent"] == chain.seen[1]["Traceparent"] != TRACE
    assert "Tracestate" not in chain.seen[0]


def test_a_long_tracestate_loses_whole_members(client: FlaskClient, chain: Chain) -> None:
    members = [f"vendor{i}=" + "v" * 40 for i in range(20)]
    client.post("/", data=photo(), headers={"traceparent": TRACE, "tracestate": ",".join(members)})
    kept = chain.seen[0]["Tracestate"].split(",")
    assert kept == members[: len(kept)]
    assert len(kept) == 10


BOMB = io.BytesIO()
Image.new("1", (9000, 9000)).save(BOMB, "PNG")


@pytest.mark.parametrize(
    ("body", "status", "type"),
    [
        (b"", 400, "ImageMalformed"),
        (b"<!doctype html><title>login</title>", 415, "MediaUnsupported"),
        (b"\x00\x01\x02\x03", 415, "MediaUnsupported"),
        (b"hello", 415, "MediaUnsupported"),
        (b"[1, 2]", 415, "MediaUnsupported"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, 400, "ImageMalformed"),
        (photo()[:-40], 400, "ImageMalformed"),
        (BOMB.getvalue(), 413, "RequestTooLarge"),
        (b'{"image": "%%%"}', 400, "RequestMalformed"),
        (b'{"image": 7}', 400, "RequestMalformed"),
        (b'{"image": ""}', 400, "ImageMalformed"),
        (b'{"picture": ""}', 400, "RequestMalformed"),
        (b'{"image": ', 400, "RequestMalformed"),
        (b'{"inputs": 3}', 400, "RequestMalformed"),
        (b'{"a":' * 5000, 400, "RequestMalformed"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_what_is_no_photo_is_refused_with_what_it_is(
    client: FlaskClient, chain: Chain, body: bytes, status: int, type: str
) -> None:
    answer = client.post("/", data=body)
    assert (answer.status_code, answer.json["type"]) == (status, type), answer.json
    assert not chain.seen
    assert len(answer.data) < 4000


@pytest.mark.parametrize("top_k", ["0", "-1", "many", "1.5", "9" * 9])
def test_a_top_k_that_is_no_count_is_refused(client: FlaskClient, top_k: str) -> None:
    answer = client.post(f"/?top_k={top_k}", data=photo())
    assert (answer.status_code, answer.json["facts"]) == (400, {"parameter": "top_k"})


def test_a_model_for_tensors_says_so_when_a_photo_comes(photos: Published, tmp_path: Path) -> None:
    folder = tmp_path / "free"
    folder.mkdir()
    free = publish(folder, free_model(folder / "free.onnx"), {}, partitions=[["1"]])
    answer = local_router(free, tmp_path / "cache").post("/", data=photo())
    assert (answer.status_code, answer.json["facts"]) == (415, {"accepted": ["Open Inference Protocol"]})
    assert "/v2/models/free/infer" in answer.json["error"]


def test_two_hundred_requests_at_sixteen_at_once_are_all_answered_right(chain: Chain, photos: Published) -> None:
    data = [photo(seed=i) for i in range(10)]
    expected = [expected_classes(photos, one) for one in data]
    with served(chain.router) as url, urllib3.PoolManager(maxsize=16, block=True) as pool, ThreadPoolExecutor(16) as t:

        def ask(i: int) -> str:
            answer = pool.request("POST", url, body=data[i % 10], headers={"X-Call-Id": f"c{i}"}, retries=False)
            assert answer.status == 200, answer.data
            doc = json.loads(answer.data)
            assert_classes(doc["classes"], expected[i % 10])
            return str(doc["id"])

        assert sorted(t.map(ask, range(200))) == sorted(f"c{i}" for i in range(200))


def test_the_answer_documented_for_the_photo_endpoint_is_the_one_given(client: FlaskClient) -> None:
    doc = client.post("/", data=photo()).json
    text = (ROOT / "docs" / "reference" / "api.md").read_text()
    shown = json.loads(text.partition("The response:\n\n```json\n")[2].partition("```")[0])
    assert doc.keys() == shown.keys()
    assert doc["route"].keys() == shown["route"].keys()
    assert doc["route"]["segments"][0].keys() == shown["route"]["segments"][0].keys()
    assert doc["classes"][0].keys() == shown["classes"][0].keys()
    assert oip.HEADER_LENGTH in text
