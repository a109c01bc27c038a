"""Messages as connectors and object stores send them: CloudEvents in both modes, notifications bare and wrapped."""

from __future__ import annotations

import base64
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from isthmus.events.claims import Claim, ClaimStore
from isthmus.events.s3_notification import WrittenObject, read_notification
from isthmus.registry import FolderStore
from isthmus.serving import create_router_app
from support.bundles import Published, photo, ready, router_settings
from support.bundles import photos as photos
from support.patience import LONG_S
from support.routers import assert_classes, expected_classes, local_router
from support.routers import chain as chain
from support.routers import client as client
from support.s3_server import BUCKET, KEY_ID, SECRET, S3Server, store_at, unique_prefix
from support.s3_server import s3_server as s3_server

CAT = photo(seed=1)
BINARY = {"ce-specversion": "1.0", "ce-type": "photo", "ce-source": "/cameras/3", "ce-id": "17"}
STRUCTURED = {"specversion": "1.0", "type": "photo", "source": "/cameras/3", "id": "17"}


def record(key: str, *, bucket: str = BUCKET, name: str = "ObjectCreated:Put", **item: Any) -> dict[str, Any]:
    return {
        "eventSource": "aws:s3",
        "eventName": name,
        "s3": {"bucket": {"name": bucket}, "object": {"key": key, **item}},
    }


def bare(*records: dict[str, Any]) -> dict[str, Any]:
    return {"Records": list(records)}


def sns(document: dict[str, Any]) -> dict[str, Any]:
    return {"Type": "Notification", "TopicArn": "arn:aws:sns:x:1:t", "Message": json.dumps(document)}


def sqs(document: dict[str, Any]) -> dict[str, Any]:
    return {"Records": [{"eventSource": "aws:sqs", "body": json.dumps(document)}]}


def lambda_sns(document: dict[str, Any]) -> dict[str, Any]:
    return {"Records": [{"EventSource": "aws:sns", "Sns": {"Message": json.dumps(document)}}]}


def minio(document: dict[str, Any]) -> dict[str, Any]:
    return {"EventName": "s3:ObjectCreated:Put", "Key": f"{BUCKET}/cat.jpg", **document}


def event_bridge(bucket: str, key: str) -> dict[str, Any]:
    detail = {"bucket": {"name": bucket}, "object": {"key": key, "size": 10}}
    return {"source": "aws.s3", "detail-type": "Object Created", "detail": detail}


def test_an_event_in_binary_mode_is_answered_by_an_event(client: FlaskClient, photos: Published) -> None:
    answer = client.post("/?top_k=2", data=CAT, headers=BINARY | {"Content-Type": "image/jpeg", "X-Call-Id": "call-1"})
    assert answer.status_code == 200, answer.text
    assert_classes(answer.json["classes"], expected_classes(photos, CAT, 2))
    event = {name.lower(): value for name, value in answer.headers if name.lower().startswith("ce-")}
    assert event.pop("ce-time").endswith("Z")
    assert event == {
        "ce-specversion": "1.0",
        "ce-type": "io.isthmus.prediction",
        "ce-source": "/models/photos/versions/1",
        "ce-id": "call-1",
        "ce-subject": "17",
    }


@pytest.mark.parametrize(
    "data",
    [
        {"data_base64": base64.b64encode(CAT).decode()},
        {"data": {"image": base64.b64encode(CAT).decode()}},
        {"data": json.dumps({"image": base64.b64encode(CAT).decode()})},
    ],
    ids=["base64", "JSON", "text of JSON"],
)
def test_an_event_in_structured_mode_holds_the_request(
    client: FlaskClient, photos: Published, data: dict[str, Any]
) -> None:
    answer = client.post("/", json=STRUCTURED | data)
    assert answer.status_code == 200, answer.text
    assert_classes(answer.json["classes"], expected_classes(photos, CAT))
    assert answer.headers["ce-subject"] == "17"


def test_a_request_without_an_envelope_is_answered_without_one(client: FlaskClient) -> None:
    answer = client.post("/", data=CAT, headers={"X-Topic": "photos", "X-Connector": "mqtt-connector"})
    assert answer.status_code == 200
    assert not [name for name, _ in answer.headers if name.lower().startswith("ce-")]


@pytest.mark.parametrize("missing", ["id", "source", "type", "specversion"])
def test_an_event_without_a_required_attribute_is_refused_by_its_name(client: FlaskClient, missing: str) -> None:
    headers = {name: value for name, value in BINARY.items() if name != f"ce-{missing}"}
    answer = client.post("/", data=CAT, headers=headers)
    assert (answer.status_code, answer.json["type"]) == (400, "EventMalformed"), answer.text
    assert answer.json["facts"]["attribute"] == missing


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"id": ""}, "has no id"),
        ({"specversion": "0.3"}, "'0.3'; 1.0 is taken"),
        ({"type": 5}, "'type' must be"),
        ({"time": "yesterday"}, "isoformat"),
        ({"data_base64": "*"}, "no base64"),
        ({"id": "a\nb", "data": 1}, "not printable"),
        ({}, "has no data"),
        ({"data": STRUCTURED | {"data": 1}}, "neither inputs"),
        ({"data": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_malformed_event_is_the_callers_fault(client: FlaskClient, document: Any, error: str) -> None:
    answer = client.post("/", json=STRUCTURED | document)
    assert answer.status_code == 400, answer.text
    assert error in answer.json["error"]


def test_events_in_batched_mode_are_refused(client: FlaskClient) -> None:
    answer = client.post("/", data=b"[]", content_type="application/cloudevents-batch+json; charset=utf-8")
    assert (answer.status_code, answer.json["type"]) == (415, "MediaUnsupported")
    assert "each event in a request of its own" in answer.json["hint"]


@pytest.mark.parametrize("wrap", [bare, sns, sqs, lambda_sns, minio], ids=lambda wrap: wrap.__name__)
def test_wrapped_notifications_name_the_same_object(wrap: Any) -> None:
    inner = bare(record("a+b%C3%A9.jpg", size=7))
    notification = read_notification(wrap(inner) if wrap is not bare else inner)
    assert notification is not None
    assert notification.objects == (WrittenObject(BUCKET, "a bé.jpg", 7),)
    twice = read_notification(sqs(sns(inner)))
    assert twice is not None
    assert twice.objects == notification.objects


def test_event_bridge_writes_keys_as_they_are() -> None:
    notification = read_notification(event_bridge("b", "a+b%20c.jpg"))
    assert notification is not None
    assert notification.objects == (WrittenObject("b", "a+b%20c.jpg", 10),)


@pytest.mark.parametrize(
    "document", [{"Records": []}, {"Records": [{"a": 1}]}, {"Records": 5}, {"image": "x"}, sns({})]
)
def test_other_documents_are_no_notifications(document: Any) -> None:
    assert read_notification(document) is None


def test_a_notification_wrapped_without_end_is_none() -> None:
    document = bare(record("a.jpg"))
    for _ in range(8):
        document = sns(document)
    assert read_notification(document) is None


def secrets_in(folder: Path) -> Path:
    (folder / "s3-access-key-id").write_text(KEY_ID)
    (folder / "s3-secret-access-key").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A router that may read the bucket, and the prefix of photos there."""
    prefix = unique_prefix()
    store_at(s3_server.endpoint, prefix).put("cat.jpg", CAT)
    store_at(s3_server.endpoint, prefix).put("text.jpg", b"no photo")
    store_at(s3_server.endpoint, prefix).put("large.png", photo((28, 28)))
    secrets = secrets_in(tmp_path_factory.mktemp("secrets"))
    settings = router_settings(
        photos,
        tmp_path_factory.mktemp("cache"),
        ("local",),
        event_buckets=(BUCKET,),
        s3_endpoint=s3_server.endpoint,
        secrets_dir=str(secrets),
    )
    return ready(create_router_app(settings).test_client()), prefix


def test_the_objects_of_a_notification_are_predicted(bucket: Any, photos: Published) -> None:
    client, prefix = bucket
    removal = record(f"{prefix}/old.jpg", name="ObjectRemoved:Delete")
    named = [f"{prefix}/cat.jpg", f"{prefix}/text.jpg", f"{prefix}/gone.jpg"]
    answer = client.post("/", json=sns(bare(*map(record, named), removal)))
    assert answer.status_code == 200, answer.text
    first, text, gone = answer.json["predictions"]
    assert first["object"] == f"s3://{BUCKET}/{prefix}/cat.jpg"
    assert_classes(first["classes"], expected_classes(photos, CAT))
    assert (text["type"], gone["type"]) == ("MediaUnsupported", "Missing")
    assert answer.json["ignored"] == ["ObjectRemoved:Delete"]


def test_a_notification_of_one_object_that_is_gone_is_a_404(bucket: Any) -> None:
    client, prefix = bucket
    answer = client.post("/", json=bare(record(f"{prefix}/gone.jpg")))
    assert (answer.status_code, answer.json["type"]) == (404, "Missing"), answer.text


def test_a_notification_larger_than_it_said_is_not_read_to_its_end(bucket: Any) -> None:
    client, prefix = bucket
    answer = client.post("/", json=bare(record(f"{prefix}/cat.jpg", size=len(CAT) - 1)))
    assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge"), answer.text


def test_a_bucket_that_the_setting_does_not_name_is_refused(bucket: Any) -> None:
    client, _ = bucket
    answer = client.post("/", json=bare(record("cat.jpg", bucket="secrets")))
    assert (answer.status_code, answer.json["type"]) == (403, "BucketRefused"), answer.text
    assert "event_buckets" in answer.json["hint"]


def test_a_test_event_is_answered_so_that_it_does_not_come_again(client: FlaskClient) -> None:
    answer = client.post("/", json={"Service": "Amazon S3", "Event": "s3:TestEvent"})
    assert answer.status_code == 200, answer.text
    assert (answer.json["predictions"], answer.json["ignored"]) == ([], ["s3:TestEvent"])


def test_a_notification_without_a_key_is_the_callers_fault(client: FlaskClient) -> None:
    answer = client.post("/", json={"Records": [{"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}}}]})
    assert (answer.status_code, answer.json["type"]) == (400, "EventMalformed"), answer.text


@pytest.mark.parametrize("name", ["\ud800", ["x"], "a\nb"])
def test_a_name_of_an_event_that_is_no_text_is_not_repeated(client: FlaskClient, name: Any) -> None:
    documents = [bare(record("a", name=name)), event_bridge("b", "k") | {"detail-type": name}]
    for document in documents:
        answer = client.post("/", json=document)
        assert (answer.status_code, answer.json["ignored"]) == (200, [""]), answer.text


@pytest.mark.parametrize("key", ["a/../../other/k", "..", "%2E%2E/other/k", "a/./b", "\ud800", "é" * 513, "%41" * 1025])
def test_a_key_that_servers_would_read_otherwise_is_refused(bucket: Any, key: str) -> None:
    client, _ = bucket
    answer = client.post("/", json=bare(record(key)))
    assert (answer.status_code, answer.json["type"]) == (400, "EventMalformed"), answer.text


def test_a_key_of_any_script_is_read(bucket: Any) -> None:
    """Names of screenshots hold narrow spaces."""
    client, _ = bucket
    for document in (bare(record("6.00%E2%80%AFPM+..é.png")), event_bridge(BUCKET, "6.00\u202fPM ..é.png")):
        answer = client.post("/", json=document)
        assert (answer.status_code, answer.json["type"]) == (404, "Missing"), answer.text


def test_objects_without_a_stated_size_take_the_memory_that_they_have(bucket: Any) -> None:
    client, prefix = bucket
    answer = client.post("/", json=bare(*[record(f"{prefix}/cat.jpg")] * 12))
    assert answer.status_code == 200, answer.text
    assert [prediction.get("type") for prediction in answer.json["predictions"]] == [None] * 12


def test_all_objects_together_are_within_a_requests_size(
    bucket: Any, s3_server: S3Server, photos: Published, tmp_path: Path
) -> None:
    router = local_router(
        photos,
        tmp_path / "cache",
        event_buckets=(BUCKET,),
        s3_endpoint=s3_server.endpoint,
        secrets_dir=str(secrets_in(tmp_path)),
        max_request_bytes=4096,
    )
    answer = router.post("/", json=bare(*[record(f"{bucket[1]}/large.png", size=2500)] * 2))
    assert answer.status_code == 200, answer.text
    assert [prediction.get("type") for prediction in answer.json["predictions"]] == [None, "RequestTooLarge"]


def test_bodies_of_claim_checks_count_as_memory_while_they_are_read(
    photos: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "claims").mkdir()
    bounds = {"max_request_bytes": 2**20, "max_working_bytes": 2**21}
    router = local_router(photos, tmp_path / "cache", claims=str(folder), **bounds)
    reading, go = threading.Barrier(3), threading.Event()

    def redeem(store: ClaimStore, claim: Claim) -> bytes:
        reading.wait(LONG_S)
        go.wait(LONG_S)
        return CAT

    monkeypatch.setattr(ClaimStore, "redeem", redeem)
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(router.post, "/", data=Claim(c * 64, 10**6, 2**40).encode()) for c in "ab"]
        reading.wait(LONG_S)
        third = router.post("/", data=Claim("c" * 64, 10**6, 2**40).encode(), headers={"X-Timeout": "1s"})
        go.set()
        assert (third.status_code, third.json["type"]) == (429, "Overloaded"), third.text
        assert [each.result().status_code for each in first] == [200, 200]


def test_a_notification_of_many_objects_is_refused(bucket: Any) -> None:
    client, _ = bucket
    answer = client.post("/", json=bare(*[record("cat.jpg")] * 33))
    assert (answer.status_code, answer.json["type"]) == (413, "RequestTooLarge"), answer.text


@pytest.fixture(scope="module")
def claiming(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A router that redeems claims of a folder, and the store of that folder."""
    folder = tmp_path_factory.mktemp("claims")
    settings = router_settings(photos, tmp_path_factory.mktemp("cache"), ("local",), claims=str(folder))
    store = ClaimStore(FolderStore(str(folder)), max_bytes=2**30, keep_s=3600)
    return ready(create_router_app(settings).test_client()), store


def test_a_claim_check_is_answered_as_its_body_is(claiming: Any, photos: Published) -> None:
    client, store = claiming
    answer = client.post("/", data=store.deposit(CAT).encode(), headers=BINARY)
    assert answer.status_code == 200, answer.text
    assert_classes(answer.json["classes"], expected_classes(photos, CAT))
    assert answer.headers["ce-subject"] == "17"


def test_a_claim_check_without_its_object_is_gone(claiming: Any) -> None:
    client, _ = claiming
    answer = client.post("/", data=Claim("a" * 64, 10, 2**40).encode())
    assert (answer.status_code, answer.json["type"]) == (410, "ClaimExpired"), answer.text


def test_the_place_of_large_bodies_is_a_detail(photos: Published, tmp_path: Path) -> None:
    (folder := tmp_path / "inner-place").mkdir()
    router = local_router(photos, tmp_path / "cache", claims=str(folder), expose_details=False)
    answer = router.post("/", data=Claim("a" * 64, 10, 2**40).encode())
    assert (answer.status_code, answer.json["type"]) == (410, "ClaimExpired"), answer.text
    assert "inner-place" not in answer.text


def test_a_store_of_large_bodies_that_is_not_mounted_is_no_claim_that_is_gone(
    photos: Published, tmp_path: Path
) -> None:
    router = local_router(photos, tmp_path / "cache", claims=str(tmp_path / "share"))
    answer = router.post("/", data=Claim("a" * 64, 10, 2**40).encode())
    assert (answer.status_code, answer.json["type"]) == (503, "ResultStoreUnavailable"), answer.text


def test_a_server_of_objects_that_does_not_answer_is_waited_for_until_the_deadline(
    photos: Published, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        router = local_router(
            photos,
            tmp_path / "cache",
            event_buckets=(BUCKET,),
            claims=f"s3://{BUCKET}/claims",
            s3_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}",
            secrets_dir=str(secrets_in(tmp_path)),
            registry_timeout_s=5.0,
        )
        for body in (json.dumps(bare(record("cat.jpg"))).encode(), Claim("a" * 64, 10, 2**40).encode()):
            answer = router.post("/", data=body, headers={"X-Timeout": "200ms"})
            assert (answer.status_code, answer.json["type"]) == (504, "DeadlineExceeded"), answer.text


def test_a_bucket_that_is_not_there_is_no_missing_photo(s3_server: S3Server, photos: Published, tmp_path: Path) -> None:
    router = local_router(
        photos,
        tmp_path / "cache",
        event_buckets=("no-such-bucket",),
        s3_endpoint=s3_server.endpoint,
        secrets_dir=str(secrets_in(tmp_path)),
    )
    answer = router.post("/", json=bare(*[record("cat.jpg", bucket="no-such-bucket")] * 2))
    assert (answer.status_code, answer.json["type"]) == (503, "RegistryMissing"), answer.text


def test_a_claim_check_of_more_than_a_request_may_hold_is_refused(claiming: Any) -> None:
    client, _ = claiming
    answer = client.post("/", data=Claim("a" * 64, 2**31, 2**40).encode())
    assert answer.status_code in (413, 429), answer.text


def test_a_claim_check_of_a_claim_check_is_refused(claiming: Any) -> None:
    client, store = claiming
    answer = client.post("/", data=store.deposit(store.deposit(CAT).encode()).encode())
    assert (answer.status_code, answer.json["type"]) == (400, "EventMalformed"), answer.text


def test_a_router_without_a_store_says_how_to_name_it(client: FlaskClient) -> None:
    answer = client.post("/", data=Claim("a" * 64, 10, 2**40).encode())
    assert (answer.status_code, answer.json["type"]) == (400, "EventMalformed"), answer.text
    assert "setting claims" in answer.json["hint"]
