"""Places of results that a trigger's own source reads are refused at the start."""

from __future__ import annotations

import pytest

from isthmus.errors import ConfigurationMalformed
from isthmus.events import loops
from isthmus.events.assembly import trigger_name
from isthmus.events.configuration import parse_configuration
from isthmus.events.loops import check_loops

HOSTS = {"localhost": "127.0.0.1", "broker": "10.1.2.3", "broker.lan": "10.1.2.3", "me": "127.0.1.1"}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that knows two names of one broker, and one of this machine."""

    def resolve(host: str, port: int, *, timeout_s: float) -> list[tuple[object, ...]]:
        if (address := HOSTS.get(host, host)) and address[0].isdigit():
            return [(0, 0, 0, "", (address, port))]
        raise OSError("unknown")

    monkeypatch.setattr(loops, "resolve", resolve)


def table(kind: str, **fields: str) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in {"kind": kind, **fields}.items())


def check(source: str, place: str, name: str = "[[results]]") -> None:
    check_loops(parse_configuration(f"[source]\n{source}\n{name}\n{place}\n", {}))


SQS = "http://127.0.0.1:5000/123/photos"
LOOPS = [
    (table("nats", subject="photos"), table("nats", subject="photos")),
    (table("nats", subject="photos.*"), table("nats", subject="photos.done")),
    (table("nats", subject="photos.>"), table("nats", subject="photos.a.b")),
    (table("nats", subject=">"), table("nats", subject="results")),
    (table("nats", subject="*.done"), table("nats", subject="photos.done")),
    (
        table("nats", subject="a", url="nats://localhost:4222"),
        table("nats", subject="a", url="nats://other,nats://user:key@127.0.0.1"),
    ),
    (table("mqtt", topic="cameras/+/photo"), table("mqtt", topic="cameras/1/photo")),
    (table("mqtt", topic="cameras/#"), table("mqtt", topic="cameras/1/result")),
    (table("mqtt", topic="cameras/#"), table("mqtt", topic="cameras")),
    (table("mqtt", topic="$share/group/cameras/#"), table("mqtt", topic="cameras/result")),
    (table("mqtt", topic="#", group="g"), table("mqtt", topic="results")),
    (
        table("mqtt", topic="#", url="mqtt://broker:1883"),
        table("mqtt", topic="results", url="mqtt://broker.lan"),
    ),
    (table("nats", subject="a", url="nats://me"), table("nats", subject="a", url="nats://0.0.0.0:4222")),
    (table("redis", stream="a", url="redis://10.1.2.3"), table("redis", stream="a", url="redis://broker:6379/0")),
    (table("sqs", queue_url=SQS), table("sqs", queue_url=SQS + "/")),
    (
        table("sqs", queue_url="http://a/123/photos", endpoint="http://127.0.0.1:5000"),
        table("sqs", queue_url="http://b/123/photos", endpoint="http://me:5000"),
    ),
    (table("redis", stream="photos"), table("redis", stream="photos", url="redis://localhost")),
]
APART = [
    (table("nats", subject="photos"), table("nats", subject="results")),
    (table("nats", subject="photos.*"), table("nats", subject="photos.a.b")),
    (table("nats", subject="photos.>"), table("nats", subject="photos")),
    (table("nats", subject="photos"), table("nats", subject="photos", url="nats://cloud:4222")),
    (table("nats", subject="a", url="nats://broker:4223"), table("nats", subject="a", url="nats://broker.lan")),
    (table("nats", subject="photos"), table("mqtt", topic="photos")),
    (table("mqtt", topic="cameras/+"), table("mqtt", topic="cameras/1/result")),
    (table("mqtt", topic="#"), table("mqtt", topic="$results/1")),
    (table("sqs", queue_url=SQS), table("sqs", queue_url=SQS + "-results")),
    (table("redis", stream="photos"), table("redis", stream="photos", url="redis://127.0.0.1/1")),
    (table("redis", stream="photos"), table("objects", url="results")),
]


@pytest.mark.parametrize("name", ["[[results]]", "[dead_letters]"])
@pytest.mark.parametrize(("source", "place"), LOOPS)
def test_a_place_that_the_source_reads_is_refused(source: str, place: str, name: str) -> None:
    with pytest.raises(ConfigurationMalformed, match=r"(results\[0\]|dead_letters) is a loop"):
        check(source, place, name)


@pytest.mark.parametrize(("source", "place"), APART)
def test_a_place_that_the_source_does_not_read_is_accepted(source: str, place: str) -> None:
    check(source, place)


def test_the_same_place_twice_is_refused() -> None:
    place = "[[results]]\n" + table("nats", subject="results")
    with pytest.raises(ConfigurationMalformed, match=r"results\[1\] is the same place as results\[0\]"):
        check_loops(parse_configuration(f"[source]\n{table('nats', subject='photos')}\n{place}\n{place}", {}))


SAME_WORK = [
    (table("nats", subject="a", ack_wait="30s"), table("nats", subject="a", ack_wait="60s")),
    (table("mqtt", topic="a", group="g", client_id="1"), table("mqtt", topic="a", group="g", client_id="2")),
    (
        table("redis", stream="a", url="redis://u:old@h/0"),
        table("redis", stream="a", url="redis://u:new@h/0", claim_after="1s"),
    ),
]
OTHER_WORK = [
    (table("nats", subject="a"), table("nats", subject="b")),
    (table("nats", subject="a"), table("nats", subject="a", durable="other")),
    (table("mqtt", topic="a", client_id="1"), table("mqtt", topic="a", client_id="2")),
    (table("redis", stream="a"), table("redis", stream="a", group="other")),
    (table("sqs", queue_url=SQS), table("sqs", queue_url=SQS + "2")),
]


def name_of(source: str) -> str:
    return trigger_name(parse_configuration(f"[source]\n{source}", {}))


@pytest.mark.parametrize(("one", "other"), SAME_WORK)
def test_triggers_that_share_messages_have_one_name(one: str, other: str) -> None:
    assert name_of(one) == name_of(other)


@pytest.mark.parametrize(("one", "other"), OTHER_WORK)
def test_triggers_that_each_get_a_message_have_two_names(one: str, other: str) -> None:
    assert name_of(one) != name_of(other)
