"""Redaction in a router: what crosses is made of the redacted input alone, and nothing of an input is written down."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from msgspec import structs
from PIL import Image, PngImagePlugin

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.canary import Canary, CanaryRule
from isthmus.artifacts.plan import Coding
from isthmus.artifacts.redaction import FaceBlur, Redaction, Region, TextPattern
from isthmus.errors import ModelError, PlanMalformed
from isthmus.pipeline.continuation import CONTENT_TYPE
from isthmus.pipeline.photos import photo_input
from isthmus.pipeline.route import plan_route
from isthmus.processing.image import as_jpeg, model_input, preprocess
from isthmus.processing.photo_redaction import PhotoRedactor
from isthmus.registry import open_registry
from isthmus.routing.alternatives import alternative_routes
from isthmus.routing.candidates import RouteCandidate
from isthmus.runtime.face_detector import redactor_of
from isthmus.serving import create_router_app, create_segment_app
from isthmus.settings import RegistrySettings
from isthmus.wire import frame as frames
from isthmus_tools.planner.publishing import publish_plan
from support.bundles import (
    PREPROCESS,
    Published,
    publish_photos,
    ready,
    router_settings,
    segment_settings,
    served,
)
from support.face_detectors import fixed_detector
from support.language_router import decoder_router
from support.otlp_receiver import otlp_receiver
from support.patience import eventually
from support.plans import candidate, plan_for
from support.ports import free_port
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder
from support.published_encoders import PublishedEncoder
from support.published_encoders import tiny_encoder as tiny_encoder
from support.routers import INFER, before, oip_json
from support.template_process import log_lines

MARKER = "Marker7Zebra"
MAIL = f"{MARKER}@example.org"
PATTERNS = Redaction(patterns=("email", TextPattern("ticket", "TK-[0-9]+")))
DEFERRED = {"Accept": f"application/json, {CONTENT_TYPE}"}


def marked_photo() -> bytes:
    """A photo whose comment is the marker, with a face where the detector says."""
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", MARKER)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=comment)
    return file.getvalue()


PHOTO = marked_photo()


@dataclass(frozen=True)
class Place:
    """Models that redact photos, the functions that serve them, and the frames that these were sent."""

    published: Published
    hops: tuple[str, str]
    frames: list[tuple[str, bytes]]
    folder: Path

    @property
    def redactor(self) -> PhotoRedactor:
        redactor = redactor_of(self.published.bundle, self.published.registry.blob)
        assert redactor is not None
        return redactor

    def router(self, hops: tuple[str, ...] = (), **given: Any) -> FlaskClient:
        settings = router_settings(self.published, self.folder / "router", hops or self.hops, **given)
        self.frames.clear()
        return ready(create_router_app(settings).test_client())

    def blurred(self) -> bytes:
        """The photo as the redaction leaves it."""
        picture = Image.open(io.BytesIO(PHOTO)).convert("RGB")
        self.redactor.redact(picture)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()


def redacted(published: Published, folder: Path) -> Published:
    """The next version of the photos' model: the middle is a face, the lower tenth a region."""
    path = folder / "faces.onnx"
    path.write_bytes(detector := fixed_detector([[16, 16, 48, 48]], [0.9]))
    blur = FaceBlur(Blob(digest_of(detector), len(detector)))
    redaction = Redaction(faces=blur, regions=(Region(0.0, 0.9, 1.0, 0.1),))
    bundle = structs.replace(published.bundle, redaction=redaction)
    version = published.registry.publish(bundle, {blur.detector.digest: path}, alias="prod")
    return Published(
        published.registry,
        published.folder,
        bundle,
        version.version,
        version.digest,
        published.onnx,
        published.inputs,
    )


def segment_app(published: Published, folder: Path, name: str, sent: list[tuple[str, bytes]]) -> Flask:
    app = create_segment_app(segment_settings(published, folder / name, log_level="debug"))

    def note(environ: dict[str, Any]) -> None:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        sent.append((name, body))

    before(app, note)
    return app


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder, sent = tmp_path_factory.mktemp("redacted"), list[tuple[str, bytes]]()
    published = redacted(publish_photos(folder), folder)
    with ExitStack() as stack:
        apps = [segment_app(published, folder, name, sent) for name in ("head", "tail")]
        head, tail = (stack.enter_context(served(app)) for app in apps)
        yield Place(published, (head, tail), sent, folder)


def input_of(place: Place, photo: bytes) -> Any:
    spec = place.published.bundle.inputs[0]
    return preprocess(photo, PREPROCESS, input=spec, max_pixels=10**6)


def test_the_frames_hold_the_tensors_of_the_blurred_photo(place: Place) -> None:
    response = place.router().post("/", data=PHOTO)
    assert response.status_code == 200, response.text
    assert response.headers["Isthmus-Redacted"] == "faces=1, regions=1"
    assert (response.json["route"]["redacted_faces"], response.json["route"]["redacted_regions"]) == (1, 1)
    (_, body), *_ = place.frames
    sent = frames.decode(body, max_bytes=10**6).tensors["x"]
    np.testing.assert_array_equal(sent, input_of(place, place.blurred()))
    assert np.abs(sent - input_of(place, PHOTO)).max() > 0.1


def test_each_photo_of_a_batch_is_redacted(place: Place) -> None:
    images = [base64.b64encode(PHOTO).decode()] * 2
    response = place.router().post("/", json={"images": images})
    assert response.headers["Isthmus-Redacted"] == "faces=2, regions=2"
    expected = input_of(place, place.blurred())
    heads = [frames.decode(body, max_bytes=10**6).tensors["x"] for name, body in place.frames if name == "head"]
    assert len(heads) == 2
    assert all(np.array_equal(sent, expected) for sent in heads)


@pytest.mark.parametrize(("quality", "codec"), [(1, ""), (0.8, ""), (0.8, "raw")], ids=["as it came", "JPEG", "raw"])
def test_a_route_that_sends_photos_sends_the_redacted_one(place: Place, quality: float, codec: str) -> None:
    chosen = candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1", quality)})
    plan = plan_for(place.published.bundle, chosen)
    version = publish_plan(place.published.registry, place.published.bundle, {}, plan)
    client = place.router(model=f"photos:{version.version}", **({"codec": codec} if codec else {}))
    response = client.post("/", data=PHOTO)
    assert (response.status_code, response.headers["Isthmus-Redacted"]) == (200, "faces=1, regions=1")
    ((name, body),) = place.frames
    assert name == "tail"
    sent_quality = 95 if quality == 1 or codec else 80
    assert as_jpeg(place.blurred(), PREPROCESS, sent_quality, max_pixels=10**6) in body
    assert PHOTO[100:200] not in body
    assert MARKER.encode() not in body


def test_a_bundle_whose_photos_no_jpeg_can_replace_has_no_route_that_sends_photos(place: Place) -> None:
    steps = [{"op": "center_crop", "size": [8, 8]}, *PREPROCESS["steps"][1:]]  # type: ignore[misc]
    steps = [{"op": "resize", "short_side": 4, "interpolation": "bilinear"}, *steps]
    bundle = structs.replace(place.published.bundle, preprocess={**PREPROCESS, "steps": steps})
    hops: Any = (_Hop("edge"), _Hop("cloud"))
    chosen = candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")})
    with pytest.raises(PlanMalformed, match="redacts photos"):
        photo_input(chosen, bundle, hops)
    selected: Any = RouteCandidate(_route_of(bundle, hops))
    assert "photo" not in alternative_routes("sha256:" + "0" * 64, bundle, hops, selected)
    assert photo_input(chosen, structs.replace(bundle, redaction=None), hops) is not None


class _Hop:
    encodes = True

    def __init__(self, name: str) -> None:
        self.name = name


def _route_of(bundle: Any, hops: Any) -> Any:
    return plan_route("sha256:" + "0" * 64, bundle, hops)


def test_no_code_makes_an_input_of_a_photo_without_the_redactor(place: Place) -> None:
    with pytest.raises(ModelError, match="no redactor"):
        model_input(place.published.bundle, PHOTO)
    chosen = candidate("cloud-photo", "cloud", input="photo", codecs={"x": Coding("photo/1")})
    hops: Any = (_Hop("cloud"),)
    photo = photo_input(chosen, place.published.bundle, hops)
    assert photo is not None
    with pytest.raises(ModelError, match="no redactor"):
        photo.encode(PHOTO)


@pytest.mark.parametrize("path", [INFER, "/", "/v2/models/photos/explain"])
def test_tensors_are_refused_where_photos_are_redacted(place: Place, path: str) -> None:
    client = place.router(("local",))
    response = client.post(path, json=oip_json(place.published))
    assert (response.status_code, response.json["type"]) == (415, "MediaUnsupported")
    assert "cannot be redacted" in response.json["error"]


def test_an_explanation_and_the_rest_of_a_request_are_of_the_redacted_photo(place: Place) -> None:
    explained = place.router().post("/explain", data=PHOTO)
    assert (explained.status_code, explained.headers["Isthmus-Redacted"]) == (200, "faces=1, regions=1")
    expected = input_of(place, place.blurred())
    heads = [frames.decode(body, max_bytes=10**6).tensors["x"] for name, body in place.frames if name == "head"]
    assert np.array_equal(heads[0], expected)
    cut_off = place.router(("local", f"http://127.0.0.1:{free_port()}"), hop_attempts=1)
    rest = cut_off.post("/", data=PHOTO, headers=DEFERRED)
    assert (rest.status_code, rest.content_type) == (503, CONTENT_TYPE)
    finished = place.router().post("/continue", data=rest.data)
    assert finished.status_code == 200, finished.text
    assert finished.headers["Isthmus-Redacted"] == "faces=1, regions=1"


def test_a_canary_that_redacts_nothing_is_compared_by_the_redacted_photo(place: Place) -> None:
    registry, tried = place.published.registry, place.published.registry.resolve("photos:1")
    assert tried.bundle.redaction is None
    registry.move_alias("photos", "tried", place.published.version)
    rule = CanaryRule(max_disagreement=1.0, max_errors=1.0, max_latency_ratio=1000)
    # So small a share that this caller never gets it.
    canary = Canary(1, tried.digest, 1e-6, registry.alias("photos", "tried").counter + 1, rule)
    registry.move_alias("photos", "tried", place.published.version, canary=canary)
    client = place.router(model="photos:tried", canary_compared=1.0, refresh_s=0.05)
    expected = input_of(place, place.blurred())

    def heads() -> dict[str, Any]:
        sent = [frames.decode(body, max_bytes=10**6) for name, body in place.frames if name == "head"]
        return {frame.bundle: frame.tensors["x"] for frame in sent if frame.tensors}

    def compared() -> bool:
        assert client.post("/", data=PHOTO).json["model_version"] == place.published.version
        return len(heads()) == 2

    eventually(compared)
    assert all(np.array_equal(sent, expected) for sent in heads().values())
    client.application.extensions["isthmus"].close()


def test_a_detector_that_cannot_be_loaded_serves_nobody(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    blur = FaceBlur(Blob(digest_of(b"no graph"), 8))
    bundle = structs.replace(place.published.bundle, redaction=Redaction(faces=blur))
    version = place.published.registry.publish(bundle, {blur.detector.digest: path})
    response = place.router(("local",)).post(f"/?model=photos:{version.version}", data=PHOTO)
    assert (response.status_code, response.json["type"]) == (502, "RegistryError")


def status_of(response: Any) -> int:
    """The status of a response that was read to its end, as a stream must be."""
    assert response.data is not None
    response.close()
    return int(response.status_code)


def texts_of(value: Any) -> list[str]:
    """The texts in a log line's document, without JSON's escapes."""
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return [str(value)] if values is None else [text for each in values for text in texts_of(each)]


def masked_version(registry: Path, name: str) -> None:
    store = open_registry(RegistrySettings(registry=str(registry)))
    model = store.resolve(name)
    store.publish(structs.replace(model.bundle, redaction=PATTERNS), {}, alias="masked")


def texts_client(encoder: PublishedEncoder, cache: Path) -> FlaskClient:
    masked_version(encoder.registry, "sentences:1")
    settings: Any = {"registry": str(encoder.registry), "model": "sentences:masked"}
    given: Any = encoder
    return decoder_router(given, cache, **settings)


def test_texts_are_masked_before_their_tokens_are_made(tiny_encoder: PublishedEncoder, tmp_path: Path) -> None:
    client = texts_client(tiny_encoder, tmp_path)
    texts = [f"the cat {MAIL} sat", "TK-123 a dog TK-4"]
    response = client.post("/v1/embeddings", json={"input": texts, "encoding_format": "float"})
    assert response.status_code == 200, response.text
    assert response.headers["Isthmus-Redacted"] == "email=1, ticket=2"
    plain = {"model": "sentences:1", "input": ["the cat [EMAIL] sat", "[TICKET] a dog [TICKET]"]}
    expected = client.post("/v1/embeddings", json=plain | {"encoding_format": "float"})
    assert [each["embedding"] for each in response.json["data"]] == [
        each["embedding"] for each in expected.json["data"]
    ]
    assert "Isthmus-Redacted" not in expected.headers
    ids = client.post("/v1/embeddings", json={"input": [[1, 2, 3]]})
    assert (ids.status_code, ids.json["error"]["param"]) == (400, "input")
    tensors = {"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [1]}
    refused = client.post("/v2/models/sentences/versions/2/infer", json={"inputs": [tensors]})
    assert refused.status_code in (400, 415)


def test_prompts_are_masked_before_their_tokens_are_made(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    masked_version(tiny_decoder.registry, "tiny:1")
    client = decoder_router(tiny_decoder, tmp_path, model="tiny:masked")
    sampling = {"max_tokens": 4, "temperature": 0}
    message = {"role": "user", "content": f"mail {MAIL}", "name": "TK-77"}
    chat = client.post("/v1/chat/completions", json={"messages": [message], **sampling})
    assert chat.headers["Isthmus-Redacted"] == "email=1"  # this template writes no names
    by_hand = [{"role": "user", "content": "mail [EMAIL]", "name": "TK-77"}]
    expected = client.post("/v1/chat/completions", json={"model": "tiny:1", "messages": by_hand, **sampling})
    assert chat.json["choices"] == expected.json["choices"]
    assert chat.json["usage"] == expected.json["usage"]
    for prompt in (f"a {MAIL}", [f"a {MAIL}"]):
        text = client.post("/v1/completions", json={"prompt": prompt, "stream": True, **sampling})
        assert (status_of(text), text.headers["Isthmus-Redacted"]) == (200, "email=1")
    ids = client.post("/v1/completions", json={"prompt": [1, 2], **sampling})
    assert (ids.status_code, ids.json["error"]["param"]) == (400, "prompt")


def test_no_input_is_written_to_logs_traces_or_files(
    place: Place,
    tiny_encoder: PublishedEncoder,
    tiny_decoder: PublishedDecoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masked_version(tiny_decoder.registry, "tiny:1")
    base64_photo = base64.b64encode(PHOTO).decode()
    with otlp_receiver() as receiver, log_lines() as log:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        photos = place.router(log_level="debug", guard_share=1.0, codec="int8/1")
        away = place.router(("local", f"http://127.0.0.1:{free_port()}"), log_level="debug", deadline_s=0.5)
        sentences = texts_client(tiny_encoder, tmp_path / "sentences")
        decoder = decoder_router(tiny_decoder, tmp_path / "tiny", model="tiny:masked", log_level="debug")
        statuses = [
            status_of(client.post(path, **request))
            for client in (photos, away)
            for path, request in (
                ("/", {"data": PHOTO}),
                ("/", {"json": {"image": base64_photo}}),
                ("/", {"json": {"images": [base64_photo, MARKER]}}),
                ("/explain", {"data": PHOTO}),
                ("/", {"data": PHOTO[:150]}),
                ("/", {"data": MARKER}),
                ("/", {"data": json.dumps({"image": MARKER + "\u00e9"})}),
                (INFER, {"data": PHOTO}),
                ("/continue", {"data": MARKER}),
            )
        ]
        chat = [{"role": "user", "content": MAIL}]
        for client, path, body in (
            (sentences, "/v1/embeddings", {"input": MAIL}),
            (sentences, "/v1/embeddings", {"input": f"{MARKER} " * 100}),
            (sentences, "/v1/embeddings", {"input": [{"text": MARKER}]}),
            (sentences, "/", {"image": MARKER}),
            (decoder, "/v1/chat/completions", {"messages": chat, "max_tokens": 2}),
            (decoder, "/v1/chat/completions", {"messages": chat, "max_tokens": 2, "stream": True}),
            (decoder, "/v1/chat/completions", {"messages": [{"role": "user", "content": {"t": MARKER}}]}),
            (decoder, "/v1/completions", {"prompt": f"{MARKER} " * 3000}),
            (decoder, "/v1/completions", {"prompt": [MARKER, MARKER]}),
        ):
            statuses.append(status_of(client.post(path, json=body)))
        assert {200, 400, 415, 503} <= set(statuses)
        assert all(status < 600 and status != 500 for status in statuses), statuses
        eventually(lambda: len(receiver.named("isthmus-router")) >= len(statuses))
        # While there is a receiver for their last spans.
        for client in (photos, away, sentences, decoder):
            client.application.extensions["isthmus"].close()
        written = "\n".join(text for line in log.getvalue().splitlines() for text in texts_of(json.loads(line)))
    assert written
    lists = ", ".join(map(str, np.asarray(Image.open(io.BytesIO(PHOTO)))[0, 0]))
    for text in (MARKER, base64_photo[400:440], repr(PHOTO[200:215])[2:-1], PHOTO[200:230].hex(), lists):
        assert text not in written
        assert not any(text.encode() in body for body in receiver.bodies)
    folders = (place.folder, tiny_encoder.registry, tiny_decoder.registry, tmp_path)
    kept = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if MARKER.encode() in (data := path.read_bytes()) or PHOTO[200:230] in data]
