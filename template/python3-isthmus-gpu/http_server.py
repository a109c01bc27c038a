"""waitress, without what it costs a function whose bodies are megabytes: its copies, and a thread's cold caches.

Everything that waitress decides, such as what HTTP is and when a connection ends, is left to it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from io import BytesIO, RawIOBase
from queue import SimpleQueue
from typing import Any

from waitress.buffers import ReadOnlyFileBasedBuffer  # type: ignore[import-untyped]
from waitress.channel import ClientDisconnected, HTTPChannel  # type: ignore[import-untyped]
from waitress.parser import HTTPRequestParser  # type: ignore[import-untyped]
from waitress.task import ErrorTask, WSGITask  # type: ignore[import-untyped]

AFTER, TAKES_BUFFERS = "isthmus.after", "isthmus.takes_buffers"
LARGE = 32 * 1024  # bytes
FIRST_ROOM = 2 * 2**20  # bytes that are made ready for a body before any of it has come
MOST_PARTS = 64  # the kernel takes 1,024 at a time


class JsonErrorTask(ErrorTask):  # type: ignore[misc]
    """What waitress refuses by itself (a body over the bound, a malformed request), as the JSON of our errors."""

    def execute(self) -> None:
        error = self.request.error
        kind = "RequestTooLarge" if error.code == 413 else "RequestMalformed"
        body = error_document(f"{error.reason}: {error.body}"[:1000], kind)
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class OneTask(WSGITask):  # type: ignore[misc]
    """An answer of known length, sent in one go with its head: each piece of its own would wake the caller.

    Two keys in `environ` are not WSGI's: AFTER is a list of what the app wants called once its answer has been sent,
    and where TAKES_BUFFERS is true an answer's parts may be memoryviews.
    """

    def __init__(self, channel: Any, request: Any) -> None:
        super().__init__(channel, request)
        self._held: list[Any] = []
        self._after: list[Callable[[], None]] = []

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ[TAKES_BUFFERS] = True
        environ[AFTER] = self._after
        return environ

    def service(self) -> None:
        super().service()
        for call in self._after:
            call()

    def write(self, data: Any) -> None:
        if not self.complete or self.content_length is None or not self.has_body:
            super().write(data)
            return
        if not self.wrote_header:
            self._held.append(self.build_response_header())
            self.wrote_header = True
        if data := data[: self.content_length - self.content_bytes_written]:
            self.content_bytes_written += len(data)
            self._held.append(data)
        if self.content_bytes_written == self.content_length or sum(map(len, self._held)) >= LARGE:
            self._send()

    def finish(self) -> None:
        super().finish()
        if self._held:
            self._send()

    def _send(self) -> None:
        held, self._held = self._held, []
        self.channel.write_parts(held)


class Body:
    """A request's body of known length, in one piece of memory that the socket is read into.

    waitress collects pieces, and copies each of them twice. No more than twice what has come is made ready, or
    FIRST_ROOM: a length is only a claim.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._memory = bytearray(min(length, FIRST_ROOM))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def room(self) -> memoryview:
        """Where the next bytes belong."""
        if self._size == len(self._memory):
            # A new one: the views that were given away hold the old one as it is.
            self._memory = self._memory + bytes(min(self._length - self._size, self._size))
        return memoryview(self._memory)[self._size :]

    def filled(self, count: int) -> None:
        self._size += count

    def append(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            room = self.room()
            count = min(len(room), len(left))
            room[:count] = left[:count]
            self.filled(count)
            left = left[count:]

    def getfile(self) -> RawIOBase:
        return InMemory(memoryview(self._memory)[: self._size].toreadonly())

    def close(self) -> None:
        self._memory = bytearray()


class InMemory(RawIOBase):
    """A body as `wsgi.input`; `getbuffer` gives all of it without a copy, as BytesIO's does."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self._at = 0

    def getbuffer(self) -> memoryview:
        return self._body

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._body[self._at : self._at + len(into)]
        into[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = bytes(self._body[self._at :])
        self._at = len(self._body)
        return data


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """Reads a large body of known length into one place."""

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if not self.chunked and LARGE <= self.content_length < self.adj.max_request_body_size:
            self.body_rcv.buf = Body(self.content_length)


class InPlace(ReadOnlyFileBasedBuffer):  # type: ignore[misc]
    """A body that is sent from where it lies.

    waitress copies a body into a buffer, and what is left of it anew for every piece that the socket takes.
    """

    def __init__(self, body: bytes | memoryview) -> None:
        super().__init__(BytesIO())
        self._left = memoryview(body)
        self.remain = len(body)

    def get(self, numbytes: int = -1, skip: bool = False) -> memoryview:
        piece = self._left if numbytes < 0 else self._left[:numbytes]
        if skip:
            self.skip(len(piece))
        return piece

    def skip(self, numbytes: int, allow_prune: int = 0) -> None:
        self._left = self._left[numbytes:]
        self.remain = len(self._left)


class Channel(HTTPChannel):  # type: ignore[misc]
    error_task_class = JsonErrorTask
    task_class = OneTask
    parser_class = Parser

    def write_soon(self, data: Any) -> int:
        if isinstance(data, bytes | memoryview) and len(data) >= LARGE:
            data = InPlace(data)
        sent: int = super().write_soon(data)
        return sent

    def write_parts(self, parts: list[Any]) -> None:
        """Send what the socket takes now, all parts at once, and leave the rest to the main thread."""
        if not self.connected:
            raise ClientDisconnected
        with self.outbuf_lock:
            if not self.total_outbufs_len and len(parts) <= MOST_PARTS:
                try:
                    sent = self.socket.sendmsg(parts)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self.will_close = True
                    self.server.pull_trigger()
                    raise ClientDisconnected from None
                self.last_activity = time.time()
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = memoryview(parts[0])[sent:]
        for part in parts:
            self.write_soon(part)

    def handle_read(self) -> None:
        receiver = None if self.request is None else self.request.body_rcv
        if receiver is None or not isinstance(receiver.getbuf(), Body):
            super().handle_read()
            return
        body = receiver.getbuf()
        try:
            while receiver.remain > 1:
                # The last byte goes waitress's own way, which begins the task.
                if not (count := self.socket.recv_into(body.room()[: receiver.remain - 1])):
                    self.handle_close()
                    return
                self.last_activity = time.time()
                body.filled(count)
                receiver.remain -= count
                self.request.body_bytes_received += count
            if last := self.socket.recv(self.adj.recv_bytes):
                self.received(last)
            else:
                self.handle_close()
        except BlockingIOError:
            pass  # the rest is not here yet
        except OSError:
            self.handle_close()


class Workers:
    """The threads that answer requests; the one that was busy last gets the next, since its memory is in the caches.

    waitress's own take turns, which makes every request a thread's first in a long time.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Any] = deque()
        self._idle: list[SimpleQueue[Any]] = []
        for i in range(count):
            threading.Thread(target=self._work, name=f"worker {i}", daemon=True).start()

    def add_task(self, task: Any) -> None:
        with self._lock:
            if not self._idle:
                self._waiting.append(task)
                return
            worker = self._idle.pop()
        worker.put(task)

    def shutdown(self) -> None:
        """The process ends all at once."""

    def _work(self) -> None:
        given: SimpleQueue[Any] = SimpleQueue()
        while True:
            with self._lock:
                task = self._waiting.popleft() if self._waiting else None
                if task is None:
                    self._idle.append(given)
            if task is None:
                task = given.get()
            try:
                task.service()
            except BaseException:
                logging.getLogger("waitress").exception("a request could not be answered")


def error_document(message: str, kind: str, **facts: Any) -> bytes:
    """An error as JSON, as the functions' own are."""
    return json.dumps({"error": message, "type": kind, "facts": facts}).encode()
