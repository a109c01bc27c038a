"""Kept-alive HTTP connections to one URL, on bare sockets.

A pool of the larger kind costs as much per request as a whole small frame does, and copies a large one twice. Here a
frame's parts go to the kernel as they lie, and an answer of known length is read into the one place where it stays.
"""

from __future__ import annotations

import select
import socket
import ssl
import weakref
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from isthmus.answers import Answer, BrokenOff, Reader, wait_at_most
from isthmus.context import Deadline
from isthmus.sockets import connect

_MOST_IDLE = 64
_MOST_PARTS = 64
"""More pieces than this are joined before they are sent; the kernel takes 1,024 at a time."""

Buffer = bytes | bytearray | memoryview


class Unreachable(Exception):
    """No connection could be made."""


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
                answer, reusable = Reader(sock, deadline, most, most_of_an_error).read()
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
        timeout_s = max(0.001, min(self._connect_timeout_s, deadline.remaining()))
        try:
            return connect(*self._address, timeout_s=timeout_s, tls=self._tls)
        except OSError as e:
            raise Unreachable(e.strerror or str(e) or "it took too long") from e


def _close(idle: list[socket.socket]) -> None:
    while idle:
        idle.pop().close()


def _send(sock: socket.socket, message: Sequence[Buffer], deadline: Deadline) -> None:
    try:
        if isinstance(sock, ssl.SSLSocket) or len(message) > _MOST_PARTS:
            wait_at_most(sock, deadline)
            sock.sendall(b"".join(message))
            return
        left = [memoryview(part) for part in message if len(part)]
        while left:
            wait_at_most(sock, deadline)
            sent = sock.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]
    except TimeoutError:
        raise
    except OSError as e:
        raise BrokenOff(e.strerror or str(e), unused=True) from e
