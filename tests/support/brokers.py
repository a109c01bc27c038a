"""Real brokers on this machine, each behind one interface, to be killed and restarted by tests."""

from __future__ import annotations

import subprocess
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from isthmus.errors import BrokerUnavailable
from isthmus.events.broker import Consumer, Delivery, Publisher
from support.patience import until
from support.ports import free_port
from support.s3_server import listens

USER, PASSWORD = "isthmus", "right-password"


class BrokerServer(ABC):
    """A server process with a store in `folder`, and consumers and publishers at it."""

    redelivery_s: float | None = 2.0
    """After which time a delivery without an end comes again; None where only a new connection brings it."""
    counts_deliveries = True
    has_headers = True
    deduplicates = True
    keeps_data = True
    """Whether messages survive the death of the server."""
    tells_backlog = True
    checks_passwords = True
    is_shared = True
    """Whether a test has several consumers of a place; mosquitto 2.0 forgets shared subscriptions when it restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        for _ in range(5):  # a port that is free may be somebody else's before it is taken
            self.port = free_port()
            if self._start():
                return
        raise RuntimeError(f"{type(self).__name__} did not start: {self.log()}")

    @abstractmethod
    def command(self) -> Sequence[str]:
        """The server's command line."""

    @abstractmethod
    def consumer(self, place: str, *, password: str = PASSWORD) -> Consumer:
        """A new consumer of a place; consumers of one place share its messages."""

    @abstractmethod
    def publisher(self, place: str, *, password: str = PASSWORD) -> Publisher:
        """A new publisher to a place."""

    def make(self, place: str) -> None:  # noqa: B027 - most brokers need nothing
        """Make a place where brokers do not make it by themselves."""

    def kill(self) -> None:
        """End the server as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End the server in order, with all its data on the disk."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill it where it runs, and start it on the same port with the data that it had."""
        self.kill()
        if not self._start():
            raise RuntimeError(f"{type(self).__name__} did not start again: {self.log()}")

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def _start(self) -> bool:
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder)
        self._process = process
        if until(lambda: process.poll() is not None or listens(self.port)) and process.poll() is None:
            return True
        self.kill()
        return False


def unique_place() -> str:
    """A name that no other test uses, and every broker takes."""
    return f"t-{uuid.uuid4().hex}"


def fetched(consumers: Consumer | Sequence[Consumer], count: int) -> list[Delivery]:
    """`count` deliveries, over outages of the broker, each consumer asked in turn."""
    sources = consumers if isinstance(consumers, Sequence) else [consumers]
    deliveries: list[Delivery] = []

    def is_enough() -> bool:
        for consumer in sources:
            try:
                deliveries.extend(consumer.fetch(max(1, count - len(deliveries)), 0.3))
            except BrokerUnavailable:
                continue
        return len(deliveries) >= count

    assert until(is_enough), f"{len(deliveries)} of {count} messages came"
    return deliveries


def published(publish: Callable[[], None]) -> None:
    """Publish, over outages of the broker."""

    def is_published() -> bool:
        try:
            publish()
        except BrokerUnavailable:
            return False
        return True

    assert until(is_published), "the broker did not come back"
