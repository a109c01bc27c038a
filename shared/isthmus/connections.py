"""Kept-alive HTTP connections to one URL, on http.client.

A pool of the larger kind costs as much per request as a whole small frame does, and bounds connecting, sending and
reading in one; here each has its own: connecting by `connect_timeout_s`, the rest by the request's deadline.
"""

from __future__ import annotations

import select
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection, IncompleteRead, RemoteDisconnected
from urllib.parse import urlsplit

from isthmus.context import Deadline

_PIECE = 2**18
_MOST_IDLE = 64


class Unreachable(Exception):
    """No connection could be made."""


class AnswerTooLong(Exception):
    """A good answer exceeded its bound; the rest was not read."""


@dataclass(frozen=True)
class Answer:
    """A response, read to its end or, where its status is not 200, to the bound on errors."""

    status: int
    headers: HTTPMessage
    body: bytes


class Connections:
    """Connections to `url` that wait for the next request; any thread may post, each uses one of its own meanwhile."""

    def __init__(self, url: str, *, connect_timeout_s: float) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_timeout_s = connect_timeout_s
        # A list's append and pop are atomic; the last one used is the likeliest to be alive.
        self._idle: list[HTTPConnection] = []

    def post(
        self, body: bytes, headers: Mapping[str, str], deadline: Deadline, *, most: int, most_of_an_error: int
    ) -> Answer:
        """Send `body` and read the answer, both before the deadline.

        A connection that turns out to have been closed while it was idle is replaced: callers post what may be posted
        twice.

        Units: most and most_of_an_error are bytes of a body with status 200, or with any other; the latter is cut.

        Raises:
            Unreachable: no connection could be made.
            TimeoutError: the deadline passed while sending or reading.
            AnswerTooLong: status 200, and more than `most` bytes.
            HTTPException, OSError: the connection broke, or what came is not HTTP.
        """
        while True:
            connection = self._waiting()
            used = connection is not None
            if connection is None:
                connection = self._connect(deadline)
            try:
                answer, reusable = self._exchange(connection, body, headers, deadline, most, most_of_an_error)
            except (RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                connection.close()
                if not used:
                    raise
                continue
            except BaseException:
                connection.close()
                raise
            if reusable and len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def _exchange(
        self,
        connection: HTTPConnection,
        body: bytes,
        headers: Mapping[str, str],
        deadline: Deadline,
        most: int,
        most_of_an_error: int,
    ) -> tuple[Answer, bool]:
        """One request and its answer; whether the connection can take another."""
        _wait_at_most(connection, deadline)
        connection.request("POST", self._target, body, dict(headers))
        with connection.getresponse() as response:
            limit = most if response.status == 200 else most_of_an_error
            data = b"".join(_pieces(connection, response, deadline, limit))
            whole = response.isclosed() or response.length == 0  # a body that was cut has something left
            return Answer(response.status, response.headers, data), whole and not response.will_close

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    def _waiting(self) -> HTTPConnection | None:
        """An idle connection whose other end has not closed it."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()

    def _connect(self, deadline: Deadline) -> HTTPConnection:
        seconds = max(0.001, min(self._connect_timeout_s, deadline.remaining()))
        connection: HTTPConnection
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port, timeout=seconds)
        else:
            connection = HTTPSConnection(self._host, self._port, timeout=seconds, context=self._tls)
        try:
            connection.connect()
        except OSError as e:
            connection.close()
            raise Unreachable(e.strerror or str(e)) from e
        return connection


def _pieces(connection: HTTPConnection, response: HTTPResponse, deadline: Deadline, limit: int) -> Iterator[bytes]:
    """The body in pieces, so that neither a long nor a dripping answer outlasts its bound."""
    size = 0
    while True:
        # Each read may wait for what is left now, not for what was left when the request began.
        _wait_at_most(connection, deadline)
        if not (piece := response.read1(_PIECE)):
            if response.length:
                raise IncompleteRead(b"", response.length)
            return
        size += len(piece)
        if size > limit:
            if response.status == 200:
                raise AnswerTooLong
            yield piece[: limit - size]
            return
        yield piece


def _wait_at_most(connection: HTTPConnection, deadline: Deadline) -> None:
    left = deadline.remaining()
    if left <= 0:
        raise TimeoutError
    if connection.sock is not None:
        connection.sock.settimeout(left)
