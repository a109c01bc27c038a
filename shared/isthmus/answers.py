"""An HTTP answer as it is read from a socket: httptools for its head, a body of known length into its one place."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import httptools

from isthmus.context import Deadline

_FIRST_PIECE = 2**14
"""Read with a head: what follows it is copied twice."""
_PIECE = 2**16
_MOST_HEAD_BYTES = 2**16
_MAX_INFORMATIONAL = 8
_HTTP, _HEAD_END = b"HTTP/", b"\r\n\r\n"

# A bytearray as it is found: filling megabytes with zeros first takes half as long as receiving them.
_unfilled = ctypes.pythonapi.PyByteArray_FromStringAndSize
_unfilled.restype = ctypes.py_object
_unfilled.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]


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


class _Message:
    """One answer as httptools reads it: it calls the `on_…` methods."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.size = 0
        self.is_whole = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)
        self.size += len(body)

    def on_message_complete(self) -> None:
        self.is_whole = True


class Reader:
    """Reads one answer."""

    def __init__(self, sock: socket.socket, deadline: Deadline, most: int, most_of_an_error: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._most = most
        self._most_of_an_error = most_of_an_error
        self._begin()

    def read(self) -> tuple[Answer, bool]:
        """The answer, and whether the connection can take another request."""
        head, first = self._head()
        self._feed(head)
        informational = 0
        while (status := self._parser.get_status_code()) < 200:
            # 100 Continue and 103 Early Hints come before the response itself (RFC 9110, 15.2).
            informational += 1
            if status == 101 or informational > _MAX_INFORMATIONAL:
                raise BrokenOff(f"it answered {status} {informational} times before a response")
            self._begin()
            head, first = self._head(first)
            self._feed(head)
        message = self._message
        length, limit = self._length(), self._most if status == 200 else self._most_of_an_error
        if status == 200 and length > limit:
            raise AnswerTooLong
        if not message.is_whole and limit >= length >= 0 and len(first) <= length:
            body = first if len(first) == length else self._rest(first, length)
            return Answer(status, message.headers, body), self._keeps()
        piece = first
        while True:
            if piece:
                self._feed(piece)
            if message.size > limit:
                if status == 200:
                    raise AnswerTooLong
                return Answer(status, message.headers, b"".join(message.pieces)[:limit]), False
            if message.is_whole:
                return Answer(status, message.headers, b"".join(message.pieces)), self._keeps()
            if not (piece := self._receive(_PIECE)):
                break
        if length >= 0 or "transfer-encoding" in message.headers:
            raise BrokenOff("the connection ended early")
        return Answer(status, message.headers, b"".join(message.pieces)), False

    def _begin(self) -> None:
        self._message = _Message()
        self._parser = httptools.HttpResponseParser(self._message)

    def _head(self, data: bytes = b"") -> tuple[bytes, bytes]:
        """The answer's head, of which `data` has come already, and what came with it."""
        while True:
            head, end, first = data.partition(_HEAD_END)
            if end:
                return head + end, first
            if not (piece := self._receive(_FIRST_PIECE, unused=not data)):
                raise BrokenOff("the connection ended early", unused=not data)
            data += piece
            if not data.startswith(_HTTP[: len(data)]):
                raise BrokenOff("what it said is not HTTP")
            if len(data) > _MOST_HEAD_BYTES:
                raise BrokenOff(f"more than {_MOST_HEAD_BYTES} bytes of headers")

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            raise BrokenOff(f"what it said is not HTTP: {e}") from e

    def _length(self) -> int:
        """What Content-Length says; -1 where the end is told otherwise."""
        text = self._message.headers.get("content-length", "")
        is_stated = text.isascii() and text.isdigit() and "transfer-encoding" not in self._message.headers
        return int(text[:20]) if is_stated else -1

    def _keeps(self) -> bool:
        """Whether the connection stays open after this answer."""
        said = self._message.headers.get("connection", "").lower()
        return "close" not in said if self._parser.get_http_version() == "1.1" else "keep-alive" in said

    def _rest(self, first: bytes, length: int) -> bytearray:
        """The whole body of known length: what has come, and the rest read into its place."""
        whole: bytearray = _unfilled(None, length)
        view = memoryview(whole)
        at = len(first)
        view[:at] = first
        while at < length:
            wait_at_most(self._sock, self._deadline)
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

    def _receive(self, most: int, *, unused: bool = False) -> bytes:
        wait_at_most(self._sock, self._deadline)
        try:
            return self._sock.recv(most)
        except TimeoutError:
            raise
        except OSError as e:
            raise BrokenOff(e.strerror or str(e), unused=unused) from e


def wait_at_most(sock: socket.socket, deadline: Deadline) -> None:
    """Let the next call on `sock` wait for what is left now, not for what was left when the request began."""
    left = deadline.remaining()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
