"""`isthmus send`: files to a real queue, by reference where the queue would refuse them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from isthmus.events.brokers.nats import NatsConsumer, NatsPublisher
from isthmus.events.claims import ClaimStore, parse_claim
from isthmus.events.message import Message
from isthmus.registry import FolderStore
from support.brokers import fetched
from support.bundles import photo
from support.cli import document, isthmus
from support.nats_server import NatsServer
from support.nats_server import nats_server as nats_server


@pytest.fixture
def queue(nats_server: NatsServer, tmp_path: Path) -> Iterator[tuple[Path, NatsConsumer]]:
    """A configuration with an object store, and a consumer of its source."""
    place = nats_server.place(f"photos-{tmp_path.name.replace('_', '-')}")
    configuration = tmp_path / "trigger.toml"
    configuration.write_text(
        f'[source]\nkind = "nats"\nurl = "{place.url}"\nsubject = "{place.subject}"\nstream = "{place.stream}"\n'
        f'[claims]\nurl = "{tmp_path / "claims"}"\nmax_bytes = "24MiB"\n'
    )
    consumer = NatsConsumer(place, "")
    yield configuration, consumer
    consumer.close()


def test_files_of_a_folder_arrive_with_type_and_headers(queue: tuple[Path, NatsConsumer], tmp_path: Path) -> None:
    configuration, consumer = queue
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / ("ä 2.jpg" if i == 2 else f"{i}.jpg")).write_bytes(photo(seed=i))
    (tmp_path / "photos" / ".hidden").write_bytes(b"1")
    sent = document(isthmus("send", configuration, tmp_path / "photos", "-H", "Camera=3", "--json"))
    assert [Path(each["file"]).name for each in sent["sent"]] == ["0.jpg", "1.jpg", "ä 2.jpg"]
    deliveries = fetched(consumer, 3)
    assert [d.message.body for d in deliveries] == [photo(seed=i) for i in range(3)]
    assert {d.message.content_type for d in deliveries} == {"image/jpeg"}
    assert {d.message.headers["camera"] for d in deliveries} == {"3"}
    assert [d.message.headers["x-isthmus-file"] for d in deliveries] == ["0.jpg", "1.jpg", "%C3%A4%202.jpg"]
    assert [d.message.id for d in deliveries] == [each["id"] for each in sent["sent"]]


def test_a_file_that_is_sent_again_has_the_same_id(queue: tuple[Path, NatsConsumer], tmp_path: Path) -> None:
    configuration, consumer = queue
    (tmp_path / "a.jpg").write_bytes(photo(seed=1))
    first = document(isthmus("send", configuration, tmp_path / "a.jpg", "--json"))
    again = document(isthmus("send", configuration, tmp_path / "a.jpg", "--json"))
    assert first["sent"][0]["id"] == again["sent"][0]["id"]
    # JetStream itself drops the repetition within its window.
    assert len(fetched(consumer, 1)) == 1
    assert not consumer.fetch(1, 0.1)


def test_files_sent_before_the_first_start_leave_the_source_its_wildcard(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    subject = f"cameras-{tmp_path.name.replace('_', '-')}"
    (tmp_path / "trigger.toml").write_text(
        f'[source]\nkind = "nats"\nurl = "{nats_server.url}"\nsubject = "{subject}.*"\n'
    )
    (tmp_path / "a.jpg").write_bytes(photo())
    document(isthmus("send", tmp_path / "trigger.toml", tmp_path / "a.jpg", "--json"))
    with (
        closing(NatsConsumer(nats_server.place(f"{subject}.*"), "")) as consumer,
        closing(NatsPublisher(nats_server.place(f"{subject}.north"), makes_stream=False)) as camera,
    ):
        camera.publish(Message(b"1", "north"))
        assert [d.message.source for d in fetched(consumer, 2)] == [f"{subject}.file", f"{subject}.north"]


@pytest.mark.parametrize("size", [3_200_000, 20 * 10**6])
def test_a_body_over_the_brokers_limit_goes_by_reference(
    queue: tuple[Path, NatsConsumer], tmp_path: Path, size: int
) -> None:
    configuration, consumer = queue
    (tmp_path / "activation.bin").write_bytes(bytes(range(256)) * (size // 256))
    sent = document(isthmus("send", configuration, tmp_path / "activation.bin", "--json"))
    assert sent["sent"][0]["by_claim"]
    (delivery,) = fetched(consumer, 1)
    claim = parse_claim(delivery.message.body)
    store = ClaimStore(FolderStore(str(tmp_path / "claims")), max_bytes=2**30, keep_s=60)
    assert store.redeem(claim) == (tmp_path / "activation.bin").read_bytes()


def test_a_file_too_large_for_the_store_is_refused_with_both_numbers_and_others_go(
    queue: tuple[Path, NatsConsumer], tmp_path: Path
) -> None:
    configuration, consumer = queue
    with (tmp_path / "large.bin").open("wb") as f:
        f.truncate(25 * 2**20)
    (tmp_path / "small.bin").write_bytes(b"1")
    result = isthmus("send", configuration, tmp_path / "large.bin", tmp_path / "gone", tmp_path / "small.bin", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    large, gone = told["failed"]
    assert (large["type"], large["facts"]) == ("MessageTooLarge", {"bytes": 25 * 2**20, "limit": 24 * 2**20})
    assert gone["type"] == "RequestMalformed"
    assert [d.message.body for d in fetched(consumer, 1)] == [b"1"]


def test_a_device_is_not_read_to_its_end_and_a_name_of_any_bytes_is_sent(
    queue: tuple[Path, NatsConsumer], tmp_path: Path
) -> None:
    configuration, consumer = queue
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.bin"))
    odd.write_bytes(b"1")
    result = isthmus("send", configuration, "/dev/zero", odd, "--json")
    told = json.loads(result.stdout)
    assert [(each["file"], each["type"]) for each in told["failed"]] == [("/dev/zero", "MessageTooLarge")]
    assert [d.message.body for d in fetched(consumer, 1)] == [b"1"]


def test_a_broker_that_is_away_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.events.brokers.nats_connection.CONNECT_TIMEOUT_S", 1.0)
    (tmp_path / "trigger.toml").write_text('[source]\nkind = "nats"\nurl = "nats://127.0.0.1:1"\nsubject = "a"\n')
    (tmp_path / "a").write_bytes(b"1")
    result = isthmus("send", tmp_path / "trigger.toml", tmp_path / "a")
    assert result.exit_code == 1
    assert "nats://127.0.0.1:1" in result.output


def test_a_header_that_is_none_is_refused(tmp_path: Path) -> None:
    result = isthmus("send", tmp_path / "trigger.toml", tmp_path, "-H", "camera")
    assert result.exit_code == 1
    assert "NAME=VALUE" in result.output
