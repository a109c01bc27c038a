"""Places of results that a trigger's own source reads are refused at the start."""

from __future__ import annotations

import pytest

from isthmus.errors import ConfigurationMalformed
from isthmus.events.configuration import parse_configuration
from isthmus.events.loops import check_loops


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
    (table("sqs", queue_url=SQS), table("sqs", queue_url=SQS + "/")),
    (table("redis", stream="photos"), table("redis", stream="photos", url="redis://localhost")),
]
APART = [
    (table("nats", subject="photos"), table("nats", subject="results")),
    (table("nats", subject="photos.*"), table("nats", subject="photos.a.b")),
    (table("nats", subject="photos.>"), table("nats", subject="photos")),
    (table("nats", subject="photos"), table("nats", subject="photos", url="nats://cloud:4222")),
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
