"""The contract of consumers and publishers, with the real server of each broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from isthmus.errors import BrokerRefused, BrokerUnavailable, MessageTooLarge
from isthmus.events.broker import Backlog, Consumer, Delivery, Publisher
from isthmus.events.brokers import mqtt_connection, nats_connection
from isthmus.events.message import Message
from support.brokers import BrokerServer, fetched, published, unique_place
from support.mqtt_server import Mqtt3Server, MqttServer
from support.nats_broker import NatsBroker
from support.patience import LONG_S, eventually
from support.redis_server import RedisServer
from support.sqs_server import SqsFifoServer, SqsServer

SERVERS: dict[str, Callable[[Path], BrokerServer]] = {
    "mqtt": MqttServer,
    "mqtt-3.1.1": Mqtt3Server,
    "nats": NatsBroker,
    "redis": RedisServer,
    "sqs": SqsServer,
    "sqs-fifo": SqsFifoServer,
}


class Bench:
    """A place at a server, and what a test opens there."""

    def __init__(self, server: BrokerServer, stack: ExitStack) -> None:
        self.server, self._stack = server, stack
        self.place = unique_place()
        server.make(self.place)

    def consumer(self, **options: str) -> Consumer:
        consumer = self.server.consumer(self.place, **options)
        self._stack.callback(consumer.close)
        return consumer

    def publisher(self, **options: str) -> Publisher:
        publisher = self.server.publisher(self.place, **options)
        self._stack.callback(publisher.close)
        return publisher

    def pair(self) -> tuple[Consumer, Publisher]:
        """A consumer that has been at the broker, so that messages wait for it, and a publisher."""
        consumer = self.consumer()
        assert self.settled(consumer) == []
        return consumer, self.publisher()

    @staticmethod
    def settled(consumer: Consumer, wait_s: float = 0.0) -> list[object]:
        """What comes once the consumer is connected."""
        deliveries: list[object] = []

        def is_connected() -> bool:
            try:
                deliveries.extend(consumer.fetch(1, wait_s))
            except BrokerUnavailable:
                return False
            return True

        eventually(is_connected)
        return deliveries


@pytest.fixture(scope="session", params=list(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerServer]:
    server = SERVERS[request.param](tmp_path_factory.mktemp(request.param))
    yield server
    server.kill()


@pytest.fixture
def bench(server: BrokerServer) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(server, stack)


@pytest.fixture(params=list(SERVERS))
def mortal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """A bench at a server of its own, for tests that kill it."""
    server = SERVERS[request.param](tmp_path / request.param)
    server.is_shared = False
    with ExitStack() as stack:
        stack.callback(server.kill)
        yield Bench(server, stack)


# Bodies, headers and ids


def test_a_published_message_arrives_and_goes_once_it_is_acknowledged(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    publisher.publish(Message(b"body", "photo-1"))
    [delivery] = fetched(consumer, 1)
    assert (delivery.message.body, delivery.attempt) == (b"body", 1)
    assert bench.place in delivery.message.source
    delivery.ack()
    consumer.close()
    assert bench.settled(bench.consumer(), 0.3) == []


def test_headers_content_type_and_id_travel(bench: Bench) -> None:
    if not bench.server.has_headers:
        pytest.skip("messages have no headers there")
    consumer, publisher = bench.pair()
    headers = {f"x-{n}": f"value {n}; a=b" for n in range(12)}
    publisher.publish(Message(b"body", "photo-1", headers={"content-type": "image/jpeg", **headers}))
    [delivery] = fetched(consumer, 1)
    message = delivery.message
    assert (message.id, message.content_type) == ("photo-1", "image/jpeg")
    assert {name: value for name, value in message.headers.items() if name.startswith("x-")} == headers
    delivery.ack()


@pytest.mark.parametrize(
    "body",
    [b"", bytes(range(256)), b"\n", b"plain text\r\n", "é".encode(), b"\xef\xbb\xbf{}", b"\xff\xfe", b"\x00", b" "],
    ids=repr,
)
def test_a_body_arrives_byte_by_byte(body: bytes, bench: Bench) -> None:
    consumer, publisher = bench.pair()
    publisher.publish(Message(body, "m", headers={"content-type": "application/json"}))
    [delivery] = fetched(consumer, 1)
    assert delivery.message.body == body
    delivery.ack()


def test_a_body_at_the_limit_arrives_and_one_more_byte_is_refused_with_both_numbers(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    publisher.publish(Message(b"x", "before"))  # the limit is the one that the server states
    limit = publisher.max_bytes
    body = bytes(n % 251 for n in range(997)) * (limit // 997 + 1)
    publisher.publish(Message(body[:limit], "m"))
    with pytest.raises(MessageTooLarge) as refused:
        publisher.publish(Message(body[:limit] + b"x", "n"))
    assert refused.value.facts == {"bytes": limit + 1, "limit": limit}
    deliveries = fetched(consumer, 2)
    assert sorted(len(d.message.body) for d in deliveries) == [1, limit]
    assert body[:limit] in [d.message.body for d in deliveries]
    for delivery in deliveries:
        delivery.ack()


def test_a_message_that_is_published_twice_is_stored_once(bench: Bench) -> None:
    if not bench.server.deduplicates:
        pytest.skip("this broker does not deduplicate")
    consumer, publisher = bench.pair()
    for _ in range(2):
        publisher.publish(Message(b"once", "m"))
    bench.publisher().publish(Message(b"once", "m"))
    publisher.publish(Message(b"last", "n"))
    deliveries = fetched(consumer, 2)
    assert sorted(d.message.body for d in deliveries) == [b"last", b"once"]
    for delivery in deliveries:
        delivery.ack()


# Deliveries


def test_a_message_without_an_end_comes_again_with_one_id(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    publisher.publish(Message(b"body", "m"))
    [first] = fetched(consumer, 1)
    consumer.close()
    [second] = fetched(bench.consumer(), 1)
    if bench.server.has_headers:
        assert second.message.id == first.message.id == "m"
    assert second.message.body == first.message.body
    assert second.attempt == (2 if bench.server.counts_deliveries else 1)
    second.ack()


def test_a_message_without_an_end_comes_again_after_a_while(bench: Bench) -> None:
    if bench.server.redelivery_s is None:
        pytest.skip("this broker waits for the end of a connection")
    consumer, publisher = bench.pair()
    publisher.publish(Message(b"body", "m"))
    attempts = []
    for _ in range(2):
        [delivery] = fetched(consumer, 1)
        attempts.append(delivery.attempt)
    assert attempts == [1, 2]
    delivery.ack()


def test_a_retry_comes_after_the_pause_as_a_further_attempt(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    publisher.publish(Message(b"body", "m"))
    [first] = fetched(consumer, 1)
    started = time.monotonic()
    first.retry(0.7)
    [second] = fetched(consumer, 1)
    assert time.monotonic() - started >= 0.7
    assert (second.message.id, second.message.body, second.attempt) == (first.message.id, b"body", 2)
    second.retry(0.0)
    [third] = fetched(consumer, 1)
    assert third.attempt == 3
    third.ack()


def test_other_messages_come_while_one_waits_for_its_retry(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    publisher.publish(Message(b"poison", "m"))
    [delivery] = fetched(consumer, 1)
    delivery.retry(LONG_S)
    publisher.publish(Message(b"next", "n"))
    [following] = fetched(consumer, 1)
    assert following.message.body == b"next"
    following.ack()


def test_a_message_in_work_comes_to_nobody_else(bench: Bench) -> None:
    redelivery_s = bench.server.redelivery_s
    if redelivery_s is None:
        pytest.skip("work may take any time there")
    consumer, publisher = bench.pair()
    assert consumer.extend_every_s < redelivery_s
    other = bench.consumer()
    for _ in range(5):  # a machine that pauses extends too late, which is no failure
        publisher.publish(Message(b"body", unique_place()))
        [delivery] = fetched([consumer, other], 1)
        seen: list[object] = []
        with Extension(delivery) as extension:
            until = time.monotonic() + 1.5 * redelivery_s
            while time.monotonic() < until:
                seen += [*other.fetch(1, 0.1), *consumer.fetch(1, 0.1)]
        delivery.ack()
        if extension.longest_pause_s < redelivery_s / 2:
            assert not seen
            return
    pytest.fail("this machine pauses all the time")


class Extension:
    """Extends a delivery in a thread, as long work does."""

    def __init__(self, delivery: Delivery) -> None:
        self.longest_pause_s = 0.0
        self._delivery, self._end = delivery, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        extended = time.monotonic()
        while not self._end.wait(0.2):
            self._delivery.extend()
            now = time.monotonic()
            self.longest_pause_s, extended = max(self.longest_pause_s, now - extended), now


def test_two_consumers_of_one_name_share_the_messages(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    other = bench.consumer()
    bench.settled(other)
    for n in range(20):
        publisher.publish(Message(b"%d" % n, f"m-{n}"))
    counts, bodies = [0, 0], []
    while len(bodies) < 20:
        for index, source in enumerate((consumer, other)):
            deliveries = source.fetch(1, 0.3)
            counts[index] += len(deliveries)
            bodies += [d.message.body for d in deliveries]
            for delivery in deliveries:
                delivery.ack()
    assert sorted(bodies, key=int) == [b"%d" % n for n in range(20)]
    assert min(counts) > 0


def test_a_consumer_that_was_away_gets_the_messages(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    consumer.close()
    for n in range(3):
        publisher.publish(Message(b"%d" % n, f"m-{n}"))
    deliveries = fetched(bench.consumer(), 3)
    assert sorted(d.message.body for d in deliveries) == [b"0", b"1", b"2"]
    for delivery in deliveries:
        delivery.ack()


def test_threads_may_fetch_and_acknowledge_at_once(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    bodies: list[bytes] = []

    def work() -> None:
        while len(bodies) < 40:
            for delivery in consumer.fetch(3, 0.3):
                bodies.append(delivery.message.body)
                delivery.ack()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(40):
        publisher.publish(Message(b"%d" % n, f"m-{n}"))
    for thread in threads:
        thread.join(LONG_S)
    assert sorted(bodies, key=int) == [b"%d" % n for n in range(40)]


def test_the_backlog_counts_messages_that_wait_or_are_in_work(bench: Bench) -> None:
    consumer, publisher = bench.pair()
    if not bench.server.tells_backlog:
        assert consumer.backlog() == Backlog()
        pytest.skip("this broker does not say")
    assert consumer.backlog().messages == 0
    for n in range(3):
        publisher.publish(Message(b"x", f"m-{n}"))
    [delivery] = fetched(consumer, 1)
    eventually(lambda: consumer.backlog().messages == 3)
    oldest_s = consumer.backlog().oldest_s
    assert oldest_s is None or 0 <= oldest_s < LONG_S
    delivery.ack()
    eventually(lambda: consumer.backlog().messages == 2)


# Failures


def test_wrong_credentials_are_refused(bench: Bench) -> None:
    if not bench.server.checks_passwords:
        pytest.skip("this server takes all credentials")
    for action in (
        lambda: bench.consumer(password="wrong").fetch(1, 5.0),
        lambda: bench.publisher(password="wrong").publish(Message(b"x", "m")),
    ):
        with pytest.raises(BrokerRefused) as refused:
            action()
        assert "wrong" not in str(refused.value)


@contextmanager
def without_patience() -> Iterator[None]:
    """Operations wait for a dead server for a moment alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mqtt_connection, "_CONNECT_S", 0.3)
        patch.setattr(nats_connection, "CONNECT_TIMEOUT_S", 0.3)
        yield


def test_a_server_that_died_is_unavailable_and_comes_back_by_itself(mortal: Bench) -> None:
    consumer, publisher = mortal.pair()
    publisher.publish(Message(b"before", "m"))
    [delivery] = fetched(consumer, 1)
    mortal.server.kill()
    for action in (
        lambda: consumer.fetch(1, 0.5),
        lambda: publisher.publish(Message(b"x", "n")),
        lambda: consumer.backlog(),
    ):
        with without_patience(), pytest.raises(BrokerUnavailable):
            action()
    # None of these raises: the message comes again.
    delivery.extend()
    delivery.ack()
    mortal.server.restart()
    mortal.server.make(mortal.place)
    published(lambda: publisher.publish(Message(b"after", "o")))
    bodies: set[bytes] = set()
    while b"after" not in bodies:
        for each in fetched(consumer, 1):
            bodies.add(each.message.body)
            each.ack()
    assert bodies <= {b"before", b"x", b"after"}


def test_messages_survive_the_death_of_the_server(mortal: Bench) -> None:
    if not mortal.server.keeps_data:
        pytest.skip("this server has its queues in memory")
    consumer, publisher = mortal.pair()
    for n in range(5):
        publisher.publish(Message(b"%d" % n, f"m-{n}"))
    first = fetched(consumer, 1)
    mortal.server.restart()
    bodies = {d.message.body for d in first}
    while len(bodies) < 5:
        for delivery in fetched(consumer, 1):
            bodies.add(delivery.message.body)
            delivery.ack()
    assert bodies == {b"0", b"1", b"2", b"3", b"4"}


def test_a_server_that_is_not_there_at_the_start_is_waited_for(mortal: Bench) -> None:
    mortal.server.kill()
    consumer, publisher = mortal.consumer(), mortal.publisher()
    with without_patience(), pytest.raises(BrokerUnavailable):
        consumer.fetch(1, 0.3)
    with without_patience(), pytest.raises(BrokerUnavailable):
        publisher.publish(Message(b"x", "early"))
    mortal.server.restart()
    mortal.server.make(mortal.place)
    mortal.settled(consumer)
    published(lambda: publisher.publish(Message(b"body", "m")))
    bodies: set[bytes] = set()
    while b"body" not in bodies:
        for delivery in fetched(consumer, 1):
            bodies.add(delivery.message.body)
            delivery.ack()
