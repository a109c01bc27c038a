"""A trigger over a queue in this process, lists as places, and scripted replies of the router."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from isthmus.events import deferral, draining, limits, trigger
from isthmus.events.calls import Calls
from isthmus.events.claims import ClaimStore
from isthmus.events.configuration import TriggerConfiguration, parse_configuration
from isthmus.events.message import Message
from isthmus.events.publishing import ResultPlace
from isthmus.events.route import Outcome, RouterReply
from isthmus.events.spool import EventSpool
from isthmus.events.stores.sqlite import SqliteRecords
from isthmus.events.trigger import Trigger, TriggerParts
from support.patience import LONG_S
from support.queue_broker import MessageList, QueueBroker

DONE = RouterReply(Outcome.DONE, 200, "application/json", b"{}")
FAILED = RouterReply(Outcome.FAILED, 500, reason="the model failed", document={"error": "the model failed"})
REFUSED = RouterReply(Outcome.REFUSED, 400, reason="no photo", document={"error": "no photo"})
BUSY = RouterReply(Outcome.BUSY, 429, reason="busy", retry_after_s=0.01)
AWAY = RouterReply(Outcome.AWAY, reason="cannot be reached")
UNCLEAR = RouterReply(Outcome.UNCLEAR, 504, reason="too late")
Answer = Callable[[Message], RouterReply]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(limits, "_MAX_PAUSE_S", 0.02)
    monkeypatch.setattr(trigger, "_FETCH_S", 0.02)
    monkeypatch.setattr(deferral, "FIRST_PROBE_S", 0.02)
    monkeypatch.setattr(deferral, "MAX_PROBE_S", 0.1)
    monkeypatch.setattr(draining, "_LOOK_S", 0.02)


class ScriptedRoute:
    """Replies by message; the messages that it was called with, in order of their beginnings."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.called = answer, []  # type: ignore[var-annotated]
        self.parallel = self.most_parallel = 0
        self._lock = threading.Lock()

    def call(self, message: Message, wait_s: int | None = None) -> RouterReply:
        with self._lock:
            self.called.append(message.id)
            self.parallel += 1
            self.most_parallel = max(self.parallel, self.most_parallel)
        try:
            return self.answer(message)
        finally:
            with self._lock:
                self.parallel -= 1


class Setup:
    """A trigger's counterparts, and triggers over them."""

    def __init__(self, records: SqliteRecords) -> None:
        self.broker, self.results, self.dead = QueueBroker(), MessageList(), MessageList("dead")
        self.places = [ResultPlace("results", self.results)]
        self.dead_letters: ResultPlace | None = ResultPlace("dead", self.dead)
        self.calls = Calls(records, keep_s=3600, scope="t")
        self.claims: ClaimStore | None = None
        self.route = ScriptedRoute(lambda message: DONE)

    def trigger(self, **options: Any) -> Trigger:
        configured = configuration(**options)
        table = configured.spool
        parts = TriggerParts(
            consumer=self.broker,
            results=self.places,
            dead_letters=self.dead_letters,
            claims=self.claims,
            calls=self.calls,
            route=self.route,
            spool=None if table is None else EventSpool(table.folder, table.max_bytes),
        )
        return Trigger(configured, parts, "t")

    @contextmanager
    def running(self, **options: Any) -> Iterator[Trigger]:
        running = self.trigger(**options)
        running.start()
        try:
            yield running
        finally:
            running.stop(LONG_S)
        running.check()

    def drain(self, *messages: Message, **options: Any) -> Trigger:
        """Send the messages and run a trigger until nothing is left."""
        self.broker.send(*messages)
        with self.running(**options) as running:
            until(running.is_empty)
        return running


def configuration(
    *, concurrency: int = 4, attempts: int = 3, retry_after: str = "10ms", spool: str = "", **options: Any
) -> TriggerConfiguration:
    lines = "".join(f"{name} = {value!r}\n" for name, value in options.items())
    return parse_configuration(
        f"max_attempts = {attempts}\nretry_after = '{retry_after}'\n{lines}"
        f"[source]\nkind = 'nats'\nsubject = 'photos'\n[router]\nconcurrency = {concurrency}\n{spool}",
        {},
    )


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def messages(count: int, **fields: Any) -> list[Message]:
    return [Message(b"photo", f"m{i}", "photos", **fields) for i in range(count)]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    records = SqliteRecords(tmp_path / "records.sqlite")
    yield Setup(records)
    records.close()
