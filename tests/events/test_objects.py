"""Results as objects: one for each id, in a folder or a bucket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.errors import BrokerRefused, BrokerUnavailable, MessageTooLarge
from isthmus.events.message import Message, storable
from isthmus.events.places import objects
from isthmus.events.places.objects import ObjectPublisher
from isthmus.registry import BlobStore, FolderStore, RetryPolicy
from support.ports import free_port
from support.s3_server import S3Server, store_at
from support.stores import STORES, make_store

JSON = {"content-type": "application/json"}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return make_store(request.param, request, tmp_path)


def test_each_result_is_an_object_named_by_its_id(store: BlobStore) -> None:
    publisher = ObjectPublisher(store)
    publisher.publish(Message(b"{}", "photos-7", headers=JSON))
    publisher.publish(Message(b"\x00\xff", "photos-8"))
    publisher.publish(Message(b"", "-9", headers={"content-type": "text/plain; charset=utf-8"}))
    assert store.list("") == ["_-9.txt", "photos-7.json", "photos-8.bin"]
    assert store.get("photos-8.bin", max_bytes=9) == b"\x00\xff"
    assert publisher.url == store.url


def test_a_dead_letter_has_its_reason_beside_it(store: BlobStore) -> None:
    headers = {"content-type": "image/jpeg", "x-isthmus-reason": "400: no image", "x-isthmus-attempts": "1"}
    for _ in range(2):
        ObjectPublisher(store).publish(Message(b"\xff", "photos-7", headers=headers))
    assert store.list("") == ["photos-7.jpg", "photos-7.jpg.headers.json"]
    assert json.loads(store.get("photos-7.jpg.headers.json", max_bytes=999)) == headers


def test_a_repetition_changes_nothing(tmp_path: Path) -> None:
    publisher = ObjectPublisher(FolderStore(tmp_path))
    publisher.publish(Message(b"first", "m", headers=JSON))
    publisher.publish(Message(b"second", "m", headers=JSON))
    assert (tmp_path / "m.json").read_bytes() == b"first"


@pytest.mark.parametrize("text", ["../../etc/passwd", ".", "", "é", "a" * 500, "http://x/1"])
def test_every_id_is_a_key(text: str, tmp_path: Path) -> None:
    ObjectPublisher(FolderStore(tmp_path)).publish(Message(b"x", storable(text) or "sha256-empty"))
    assert len(list(tmp_path.glob("*.bin"))) == 1


def test_a_cloudevents_result_is_json(tmp_path: Path) -> None:
    headers = {"content-type": "application/cloudevents+json"}
    ObjectPublisher(FolderStore(tmp_path)).publish(Message(b"{}", "m", headers=headers))
    assert (tmp_path / "m.json").exists()


def test_a_body_beyond_the_bound_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "MAX_BODY_BYTES", 8)
    publisher = ObjectPublisher(FolderStore(tmp_path))
    publisher.publish(Message(bytes(8), "m"))
    with pytest.raises(MessageTooLarge) as refused:
        publisher.publish(Message(bytes(9), "n"))
    assert refused.value.facts == {"bytes": 9, "limit": publisher.max_bytes}


@pytest.mark.parametrize(
    ("open_store", "error"),
    [
        (lambda server: store_at(server.endpoint, secret="wrong", retry_policy=RetryPolicy(1, 5.0)), BrokerRefused),
        (
            lambda _: store_at(f"http://127.0.0.1:{free_port()}", retry_policy=RetryPolicy(1, 2.0)),
            BrokerUnavailable,
        ),
    ],
    ids=["wrong secret", "closed server"],
)
def test_the_stores_failures_are_those_of_a_broker(
    open_store: Callable[[S3Server], BlobStore], error: type[Exception], s3_server: S3Server
) -> None:
    with pytest.raises(error):
        ObjectPublisher(open_store(s3_server)).publish(Message(b"x", "m"))
