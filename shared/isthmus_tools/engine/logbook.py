"""The last lines that a function printed, and those that come."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

KEPT_LINES = 2000
MAX_LINE_BYTES = 64 * 1024
_WAITING_LINES = 1000


@dataclass(frozen=True)
class Line:
    """One line of one replica."""

    instance: str
    time: datetime
    text: str


class Logbook:
    """Keeps the last lines and passes each new one on: to `on_line`, and to whoever follows."""

    def __init__(self, on_line: Callable[[Line], None] = lambda _: None) -> None:
        self._on_line = on_line
        self._lines: deque[Line] = deque(maxlen=KEPT_LINES)
        self._followers: set[asyncio.Queue[Line | None]] = set()

    def add(self, instance: str, text: str) -> None:
        """Note a line; a follower that is too slow loses it rather than holding the function up."""
        line = Line(instance, datetime.now(UTC), text)
        self._lines.append(line)
        self._on_line(line)
        for queue in self._followers:
            if not queue.full():
                queue.put_nowait(line)

    def lines(self, *, tail: int | None = None, since: datetime | None = None, instance: str = "") -> list[Line]:
        """The lines kept, oldest first: the last `tail` of those not older than `since`."""
        found = [x for x in self._lines if (since is None or x.time >= since) and instance in ("", x.instance)]
        return found if tail is None else found[len(found) - min(tail, len(found)) :]

    def last(self, instance: str) -> str:
        """The last line of one replica, or nothing."""
        return next((x.text for x in reversed(self._lines) if x.instance == instance), "")

    def close(self) -> None:
        """Let go of whoever follows."""
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def follow(self, instance: str = "") -> AsyncIterator[Line]:
        """The lines that are added from now on, until `close`."""
        queue: asyncio.Queue[Line | None] = asyncio.Queue(_WAITING_LINES)
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
    """What a line says: the `message` of one that is a JSON object, else all of it."""
    try:
        doc = json.loads(line)
    except (ValueError, RecursionError):
        return line
    message = doc.get("message") if isinstance(doc, dict) else None
    return message if isinstance(message, str) and message else line


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a process's output; one longer than 64 KiB comes in pieces, so that it never blocks its writer."""
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
