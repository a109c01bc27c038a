"""Telemetry of the engine: events, log lines of functions, invocation metrics."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MAX_LINES = 2000
"""Lines of a function's log in memory, over all its replicas."""
MAX_LINE_BYTES = 64 * 1024  # as in of-watchdog, which stops reading at a longer line
_MAX_UNREAD_LINES = 1000  # a follower over a slow connection must not grow the engine

_log = logging.getLogger(__name__)

EventKind = Literal[
    "listening", "login", "page", "nats", "deployed", "idle", "starting", "ready", "exited", "stopped", "failed", "log"
]


@dataclass(frozen=True)
class Event:
    """An event of the engine; `function` and `replica` are empty for events of the engine itself.

    `pid` is the replica's process in an event `ready`, else 0.
    """

    kind: EventKind
    text: str
    function: str = ""
    replica: str = ""
    pid: int = 0


OnEvent: TypeAlias = Callable[[Event], None]


def shielded(on_event: OnEvent) -> OnEvent:
    """Wrap a callback so that its exceptions are logged: workers and log readers must survive them."""

    def call(event: Event) -> None:
        try:
            on_event(event)
        except Exception:
            _log.exception("an event was not told")

    return call


def ignore_event(event: Event) -> None:
    """No-op default callback."""


@dataclass(frozen=True)
class LogLine:
    """A line of a replica's output."""

    instance: str
    time: datetime
    text: str


class LogBuffer:
    """Ring buffer of a function's last lines; new lines go to `on_line` and to followers."""

    def __init__(self, on_line: Callable[[LogLine], None] = lambda _: None) -> None:
        self._on_line = on_line
        self._lines: deque[LogLine] = deque(maxlen=MAX_LINES)
        self._followers: set[asyncio.Queue[LogLine | None]] = set()

    def add(self, instance: str, text: str) -> None:
        """Append a line; a follower with a full queue loses the line, as waiting would stop the function."""
        line = LogLine(instance, datetime.now(UTC), text)
        self._lines.append(line)
        self._on_line(line)
        for queue in self._followers:
            if not queue.full():
                queue.put_nowait(line)

    def lines(self, *, tail: int | None = None, since: datetime | None = None, instance: str = "") -> list[LogLine]:
        """The last `tail` lines not older than `since`, oldest first."""
        lines = [x for x in self._lines if (since is None or x.time >= since) and instance in ("", x.instance)]
        return lines if tail is None else lines[len(lines) - min(tail, len(lines)) :]

    def last(self, instance: str) -> str:
        """The last line of a replica, or an empty text."""
        return next((x.text for x in reversed(self._lines) if x.instance == instance), "")

    def close(self) -> None:
        """End all followers."""
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def follow(self, instance: str = "") -> AsyncIterator[LogLine]:
        """New lines, until `close`."""
        queue: asyncio.Queue[LogLine | None] = asyncio.Queue(_MAX_UNREAD_LINES)
        self._followers.add(queue)
        try:
            while True:
                line = await queue.get()
                if line is None:
                    return
                if instance in ("", line.instance):
                    yield line
        finally:
            self._followers.discard(queue)


def message_of(line: str) -> str:
    """The `message` of a line that is a JSON object, else the whole line."""
    try:
        doc = json.loads(line)
    except (ValueError, RecursionError):
        return line
    message = doc.get("message") if isinstance(doc, dict) else None
    return message if isinstance(message, str) and message else line


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of a process's output; a line above MAX_LINE_BYTES comes in pieces, so that its writer never blocks."""
    rest = b""
    while chunk := await stream.read(MAX_LINE_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
        if len(rest) > MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


class InvocationMetrics:
    """The gateway's Prometheus metrics, under OpenFaaS's names."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ["function_name", "code"]
        self._calls = Counter("gateway_function_invocation", "Calls to functions.", labels, registry=self._registry)
        self._seconds = Histogram(
            "gateway_functions_seconds",
            "Time that a function took to answer.",
            labels,
            registry=self._registry,
        )
        # Label look-up costs more than counting; functions and statuses are few.
        self._labelled = lru_cache(256)(lambda *names: (self._calls.labels(*names), self._seconds.labels(*names)))
        self._replicas = Gauge(
            "gateway_service_count", "Replicas of a function.", ["function_name"], registry=self._registry
        )

    def count(self, function: str, status: int, seconds: float) -> None:
        """Count a response of `function`, NAME.NAMESPACE."""
        calls, times = self._labelled(function, str(status))
        calls.inc()
        times.observe(seconds)

    def expose(self, replicas: dict[str, int]) -> bytes:
        """All metrics in Prometheus's text format."""
        self._replicas.clear()
        for function, number in replicas.items():
            self._replicas.labels(function).set(number)
        return generate_latest(self._registry)
