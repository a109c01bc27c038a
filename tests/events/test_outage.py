"""The link to the cloud is cut under load: a real router with a head, a tail behind an emulated network, real NATS."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isthmus.events.assembly import open_trigger
from isthmus.events.brokers.nats import NatsConsumer, NatsPublisher
from isthmus.events.configuration import read_configuration
from isthmus.events.message import Message
from isthmus.events.trigger import Trigger
from isthmus.serving import create_segment_app
from isthmus.settings import RegistrySettings
from isthmus_tools.netem import NetworkEmulator
from support.bundles import Published, photo, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.nats_server import NatsServer, unique_subject
from support.nats_server import nats_server as nats_server
from support.patience import LONG_S, eventually
from support.routers import assert_classes, expected_classes, served_router
from support.trigger_files import configuration_file, trigger_process

PHOTOS = [photo(seed=i) for i in range(8)]


@dataclass
class Edge:
    """A router with a head of its own, and the network to its tail."""

    url: str
    link: NetworkEmulator
    expected: list[Any]


@pytest.fixture(scope="module")
def edge(photos: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    tail = create_segment_app(segment_settings(photos, tmp_path_factory.mktemp("tail")))
    with served(tail) as tail_url, NetworkEmulator(tail_url) as link:
        settings = router_settings(photos, tmp_path_factory.mktemp("router"), ("local", link.url))
        with served_router(settings) as url:
            yield Edge(url, link, [expected_classes(photos, data) for data in PHOTOS])


@pytest.fixture(autouse=True)
def link_is_up(edge: Edge) -> Iterator[None]:
    yield
    edge.link.up()


class Stage:
    """A subject of photos and one of results, and a trigger's file between them."""

    def __init__(self, server: NatsServer, edge: Edge, folder: Path, **options: Any) -> None:
        self.edge, self._count = edge, 0
        self.source, self.results, self.dead = (server.place(unique_subject(), ack_wait=2) for _ in range(3))
        with closing(NatsConsumer(self.source)):
            """The stream is made by its consumer."""
        self._collectors = [NatsConsumer(place) for place in (self.results, self.dead)]
        nats = {"kind": "nats", "url": server.url}
        spool = {"folder": str(folder / "spool"), "wait": "1s", **options.pop("spool", {})}
        self.file = configuration_file(
            folder,
            {**nats, "subject": self.source.subject, "ack_wait": "2s"},
            {**nats, "subject": self.results.subject},
            dead_letters={**nats, "subject": self.dead.subject},
            router={"url": edge.url, "concurrency": 4, "timeout": "3s"},
            spool=spool,
            **options,
        )

    def send(self, count: int, **headers: str) -> None:
        with closing(NatsPublisher(self.source)) as publisher:
            for i in range(self._count, self._count + count):
                data = PHOTOS[i % len(PHOTOS)]
                publisher.publish(Message(data, f"m{i}", headers={"content-type": "image/png", **headers}))
        self._count += count

    @contextmanager
    def running(self) -> Iterator[Trigger]:
        trigger = open_trigger(read_configuration(self.file, {}), RegistrySettings(registry="."))
        trigger.start()
        try:
            yield trigger
        finally:
            trigger.stop()
        trigger.check()

    def collected(self) -> list[Message]:
        """All results, which must be one of each message and right; no dead letters."""
        sets = []
        for collector in self._collectors:
            messages: list[Message] = []
            while deliveries := collector.fetch(100, 0.3):
                messages += [delivery.message for delivery in deliveries]
                for delivery in deliveries:
                    delivery.ack()
            sets.append(messages)
        results, dead = sets
        assert dead == []
        assert Counter(m.id for m in results) == Counter(f"m{i}" for i in range(self._count))
        for message in results:
            number = int(message.id[1:])
            assert_classes(json.loads(message.body)["classes"], self.edge.expected[number % len(PHOTOS)])
        return results

    def close(self) -> None:
        for collector in self._collectors:
            collector.close()


@pytest.fixture
def staged(nats_server: NatsServer, edge: Edge, tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(Stage(nats_server, edge, tmp_path, **options)))


def entries(trigger: Trigger) -> int:
    status = trigger.status().spool
    assert status
    return status.entries


@pytest.mark.parametrize("way", ["cut", "silent"])
def test_a_cut_link_loses_nothing_and_changes_no_prediction(staged: Callable[..., Stage], edge: Edge, way: str) -> None:
    """In order, though messages are sent before, while and after the link is away."""
    stage = staged(order_by="source")
    load = threading.Thread(target=lambda: [stage.send(10) for _ in range(6)])
    with stage.running() as trigger:
        stage.send(10)
        eventually(lambda: trigger.status().counts["done"] >= 5)
        load.start()
        edge.link.down() if way == "cut" else edge.link.stall(3600)
        eventually(lambda: entries(trigger) >= 3)
        edge.link.up()
        load.join()
        eventually(trigger.is_empty)
        counts = trigger.status().counts
    assert counts["spooled"] == counts["drained"] >= 3
    assert [message.id for message in stage.collected()] == [f"m{i}" for i in range(70)]


def test_a_bounded_spool_leaves_the_rest_with_the_broker(staged: Callable[..., Stage], edge: Edge) -> None:
    stage = staged(spool={"max_bytes": "1MiB"})
    edge.link.down()
    with stage.running() as trigger:
        stage.send(400, note="large" * 600)
        eventually(lambda: "spool" in trigger.status().away)
        spool = trigger.status().spool
        assert spool
        assert spool.bytes <= spool.max_bytes
        assert trigger.status().counts["spooled"] < 400
        edge.link.up()
        eventually(trigger.is_empty)
    stage.collected()


class Process:
    """`isthmus trigger` as a process, and the latest line of its status."""

    def __init__(self, file: Path, *options: str) -> None:
        self._process = trigger_process(
            file, "--json", "--every", "100ms", *options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.status: dict[str, Any] = {}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as stdout:
            for line in stdout:
                self.status = json.loads(line)

    def until(self, count: str, number: int) -> None:
        eventually(lambda: self.status.get(count, 0) >= number)

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def wait(self) -> int:
        code = self._process.wait(LONG_S)
        self._reader.join()
        return code


def test_kills_while_spooling_and_while_draining_leave_one_result_each(
    staged: Callable[..., Stage], edge: Edge
) -> None:
    stage, rng = staged(max_attempts=20), random.Random(5)
    stage.send(60)
    edge.link.down()
    for _ in range(2):
        process = Process(stage.file)
        process.until("spooled", rng.randint(3, 12))
        process.kill()
    process = Process(stage.file)
    process.until("spooled", 5)
    edge.link.up()
    process.until("drained", rng.randint(2, 6))
    process.kill()
    stage.send(5)
    process = Process(stage.file)
    process.until("drained", 1)
    process.kill()
    process = Process(stage.file, "--until-empty")
    assert process.wait() == 0
    assert process.status["spool"]["entries"] == 0
    stage.collected()
