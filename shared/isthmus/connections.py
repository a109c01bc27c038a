"""Kept-alive HTTP connections to one URL: sockets, with httptools to read what comes.

A pool of the larger kind costs as much per request as a whole small frame does, and copies a large one twice. Here a
frame's parts go to the kernel as they lie, and an answer of known length is read into the one place where it stays.
"""

from __future__ import annotations

import select
import socket
import ssl
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

from isthmus.context import Deadline

_FIRST_PIECE = 2**14
"""Read with a head: what follows it is copied twice."""
_PIECE = 2**16
_MOST_HEAD_BYTES = 2**16
_MOST_IDLE = 64
_MOST_PARTS = 64
"""More pieces than this are joined before they are sent; the kernel takes 1,024 at a time."""

Buffer = bytes | bytearray | memoryview


class Unreachable(Exception):
    """No connection could be made."""


class AnswerTooLong(Exception):
    """A good answer exceeded its bound; the rest was not read."""


class BrokenOff(Exception):
    """The connection ended, or what came is not HTTP; `unused` says that not a byte of an answer had come."""

    def __init__(self, message: str, *, unused: bool = False) -> None:
        super().__init__(message)
        self.unused = unused


@dataclass(frozen=True)
class Answer:
    """A response, read to its end or, where its status is not 200, to its bound; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray


class Connections:
    """Connections to `url` that wait for the next request; any thread may post, each uses one of its own meanwhile."""

    def __init__(self, url: str, *, connect_timeout_s: float) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname or "", parts.port or (443 if self._tls else 80))
        self._path, self._query = parts.path.rstrip("/"), parts.query
        self._host = parts.netloc
        self._connect_timeout_s = connect_timeout_s
        # A list's append and pop are atomic; the last one used is the likeliest to be alive.
        self._idle: list[socket.socket] = []
        weakref.finalize(self, _close, self._idle)

    def post(
        self,
        body: Sequence[Buffer],
        headers: Mapping[str, str],
        deadline: Deadline,
        *,
        most: int,
        most_of_an_error: int,
        path: str = "",
        query: str = "",
    ) -> Answer:
        """Send `body`, in parts, to `path` below the URL and read the answer, both before the deadline.

        A connection that turns out to have been closed while it was idle is replaced: callers post what may be posted
        twice.

        Units: most and most_of_an_error are bytes of a body with status 200, or with any other; the latter is cut.

        Raises:
            Unreachable: no connection could be made.
            TimeoutError: the deadline passed while sending or reading.
            AnswerTooLong: status 200, and more than `most` bytes.
            BrokenOff: the connection broke, or what came is not HTTP.
        """
        wanted = query or self._query
        target = (self._path + path or "/") + (f"?{wanted}" if wanted else "")
        lines = [f"POST {target} HTTP/1.1", f"Host: {self._host}", f"Content-Length: {sum(map(len, body))}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        message = [("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"), *body]
        while True:
            sock = self._waiting()
            used = sock is not None
            if sock is None:
                sock = self._connect(deadline)
            try:
                _send(sock, message, deadline)
                answer, reusable = _Reader(sock, deadline, most, most_of_an_error).read()
            except BrokenOff as e:
                sock.close()
                if used and e.unused:
                    continue
                raise
            except BaseException:
                sock.close()
                raise
            if reusable and len(self._idle) < _MOST_IDLE:
                self._idle.append(sock)
            else:
                sock.close()
            return answer

    def close(self) -> None:
        """Close what is idle."""
        _close(self._idle)

    def _waiting(self) -> socket.socket | None:
        """An idle connection whose other end has not closed it."""
        while True:
            try:
                sock = self._idle.pop()
            except IndexError:
                return None
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(0):
                return sock
            sock.close()

    def _connect(self, deadline: Deadline) -> socket.socket:
        seconds = max(0.001, min(self._connect_timeout_s, deadline.remaining()))
        try:
            sock = socket.create_connection(self._address, timeout=seconds)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                return self._tls.wrap_socket(sock, server_hostname=self._address[0])
        except OSError as e:
            raise Unreachable(e.strerror or str(e)) from e
        return sock


def _close(idle: list[socket.socket]) -> None:
    while idle:
        idle.pop().close()


def _send(sock: socket.socket, message: Sequence[Buffer], deadline: Deadline) -> None:
    try:
        if isinstance(sock, ssl.SSLSocket) or len(message) > _MOST_PARTS:
            _wait_at_most(sock, deadline)
            sock.sendall(b"".join(message))
            return
        left = [memoryview(part) for part in message if len(part)]
        while left:
            _wait_at_most(sock, deadline)
            sent = sock.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]
    except TimeoutError:
        raise
    except OSError as e:
        raise BrokenOff(e.strerror or str(e), unused=True) from e


class _Reader:
    """Reads one answer; httptools calls its `on_…` methods."""

    def __init__(self, sock: socket.socket, deadline: Deadline, most: int, most_of_an_error: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._most = most
        self._most_of_an_error = most_of_an_error
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0
        self._has_head = self._is_whole = self._keep = False

    def read(self) -> tuple[Answer, bool]:
        """The answer, and whether the connection can take another request."""
        received = 0
        while not self._is_whole:
            if not (piece := self._receive(received == 0)):
                break
            received += len(piece)
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserError as e:
                raise BrokenOff(f"what it said is not HTTP: {e}") from e
            if not self._has_head:
                if received > _MOST_HEAD_BYTES:
                    raise BrokenOff(f"more than {_MOST_HEAD_BYTES} bytes of headers")
                continue
            limit = self._limit()
            if self._size > limit:
                return self._answer(b"".join(self._body)[:limit]), False
            if not self._is_whole and limit >= self._length() >= 0:
                return self._answer(self._rest(self._length())), self._keep
        if not self._is_whole and (not self._has_head or self._length() >= 0 or "transfer-encoding" in self._headers):
            raise BrokenOff("the connection ended early", unused=received == 0)
        return self._answer(b"".join(self._body)), self._is_whole and self._keep

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._has_head = True
        # Asked later, the parser speaks of the next message.
        self._keep = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        self._is_whole = True

    def _limit(self) -> int:
        """The bound on this answer's body.

        Raises:
            AnswerTooLong: a good answer is known to exceed it.
        """
        if self._parser.get_status_code() != 200:
            return self._most_of_an_error
        if max(self._size, self._length()) > self._most:
            raise AnswerTooLong
        return self._most

    def _length(self) -> int:
        """What Content-Length says; -1 where the end is told otherwise."""
        text = self._headers.get("content-length", "")
        return int(text) if text.isdigit() and "transfer-encoding" not in self._headers else -1

    def _rest(self, length: int) -> bytearray:
        """The whole body of known length: what has come, and the rest read into its place."""
        whole = bytearray(length)
        view = memoryview(whole)
        at = 0
        for piece in self._body:
            view[at : at + len(piece)] = piece
            at += len(piece)
        while at < length:
            _wait_at_most(self._sock, self._deadline)
            try:
                count = self._sock.recv_into(view[at:])
            except TimeoutError:
                raise
            except OSError as e:
                raise BrokenOff(e.strerror or str(e)) from e
            if not count:
                raise BrokenOff(f"the connection ended after {at} of {length} bytes")
            at += count
        return whole

    def _receive(self, first: bool) -> bytes:
        _wait_at_most(self._sock, self._deadline)
        try:
            return self._sock.recv(_PIECE if self._has_head else _FIRST_PIECE)
        except TimeoutError:
            raise
        except OSError as e:
            raise BrokenOff(e.strerror or str(e), unused=first) from e

    def _answer(self, body: bytes | bytearray) -> Answer:
        return Answer(self._parser.get_status_code(), self._headers, body)


def _wait_at_most(sock: socket.socket, deadline: Deadline) -> None:
    """Let the next call on `sock` wait for what is left now, not for what was left when the request began."""
    left = deadline.remaining()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
