"""A request as it comes in: its head read by httptools, its body in one piece of memory."""

from __future__ import annotations

import ctypes
import threading
import time
from functools import lru_cache
from io import RawIOBase
from typing import Any

import httptools
from waitress.buffers import OverflowableBuffer  # type: ignore[import-untyped]
from waitress.parser import (  # type: ignore[import-untyped]
    HTTPRequestParser,
    ParsingError,
    TransferEncodingNotImplemented,
    split_uri,
)
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver  # type: ignore[import-untyped]
from waitress.utilities import BadRequest, Error  # type: ignore[import-untyped]

LARGE = 32 * 1024  # bytes
FIRST_ROOM = 2 * 2**20  # bytes that are made ready for a body before any of it has come
MAX_CHUNK_LINE = 1024  # bytes of a chunk's size with its extensions, which nobody sends
MAX_TRAILER = 2**16  # bytes of the fields after the last chunk, which nobody reads
CHUNK_SLACK = 2**16  # bytes that a chunked body may be over its bound before waitress refuses it
MAX_KNOWN = 128  # bytes of a header's name or a URL that is remembered; most are few and short
HEAD_END = b"\r\n\r\n"

# A bytearray as it is found: filling megabytes with zeros first takes half as long as receiving them.
_unfilled = ctypes.pythonapi.PyByteArray_FromStringAndSize
_unfilled.restype = ctypes.py_object
_unfilled.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]


class TooMany(Error):  # type: ignore[misc]
    """All requests together would take more memory than they may; this one is refused, and may come again."""

    code = 429
    reason = "Too Many Requests"


class TooSlow(Error):  # type: ignore[misc]
    """A request's head and body did not come within the time that answering it may take in all."""

    code = 408
    reason = "Request Timeout"


class MemoryFull(Exception):
    """No memory is left for a body."""


class Memory:
    """What all requests of this process may take in memory together: their bodies, and what reading these takes.

    The app gets it as `isthmus.memory` and counts its share there.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Count so many bytes more, if they fit."""
        with self._lock:
            if self._used + count > self.limit:
                return False
            self._used += count
            return True

    def give(self, count: int) -> None:
        """Count so many bytes less."""
        with self._lock:
            self._used -= count


class Body:
    """A request's body, in one piece of memory that the socket is read into; `length` is its longest.

    waitress collects pieces, and copies each of them twice. No more than twice what has come is made ready, or
    FIRST_ROOM: a length is only a claim. What has come, and as much again, counts in `memory` until `close`, or until
    nothing refers to this object, such as a connection that broke off.
    """

    def __init__(self, length: int, memory: Memory) -> None:
        self._length = length
        self._counted = memory
        self._memory = bytearray()
        self._size = self._taken = 0

    def __len__(self) -> int:
        return self._size

    def room(self) -> memoryview:
        """Where the next bytes belong.

        Raises:
            MemoryFull: all bodies together may take no more; or this one is longer than it may be, or closed.
        """
        if self._size == self._taken:
            more = min(self._length - self._size, max(self._size, LARGE))
            if not more or not self._counted.take(more):
                raise MemoryFull
            self._taken += more
        if self._size == len(self._memory):
            # A new one: the views that were given away hold the old one as it is.
            old, self._memory = self._memory, _unfilled(None, min(self._length, 2 * self._size or FIRST_ROOM))
            self._memory[: self._size] = old
        return memoryview(self._memory)[self._size : self._taken]

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
        self._counted.give(self._taken)
        self._memory = bytearray()
        self._length = self._size = self._taken = 0

    def __del__(self) -> None:
        self.close()


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
    """A head by httptools, which takes a fifth of the time of waitress's expressions; a large body in one place."""

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.monotonic()  # when the first byte had come

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if b"_" in name:
            return  # it would pass for the header with a hyphen
        key = _known_key(name) if len(name) <= MAX_KNOWN else _key(name)
        text = value.strip(b" \t").decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def received(self, data: bytes) -> int:
        try:
            taken: int = super().received(data)
        except MemoryFull:
            self.refuse()
            return len(data)
        if self.chunked and not self.completed:
            # waitress would look at all of these again with every piece that comes.
            for part, limit, what in (
                (self.body_rcv.control_line, MAX_CHUNK_LINE, "a chunk's line is"),
                (self.body_rcv.trailer, MAX_TRAILER, "the trailers are"),
            ):
                if len(part) > limit:
                    self.error, self.completed = BadRequest(f"{what} longer than {limit} bytes"), True
        return taken

    def refuse(self, error: Error | None = None) -> None:
        """Answer with an error; by default with 429: there is no memory for the body."""
        self.error = error or TooMany(
            f"all requests together may take {self.adj.memory.limit} bytes of memory; try again"
        )
        self.completed = True

    def parse_header(self, header_plus: bytes) -> None:
        """Read the head; what does not fit HTTP, or tells two ends of its body, is refused.

        Raises:
            ParsingError, TransferEncodingNotImplemented: which waitress answers.
        """
        self._url = b""
        parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(header_plus if header_plus.endswith(HEAD_END) else header_plus + HEAD_END[:2])
        except httptools.HttpParserUpgrade:
            pass  # nothing is upgraded here
        except httptools.HttpParserError as e:
            raise ParsingError(str(e)) from e
        headers = self.headers
        self.command, self.version = parser.get_method().decode("latin-1"), parser.get_http_version()
        self.request_uri = self._url.decode("latin-1")
        split = _known_uri if len(self._url) <= MAX_KNOWN else split_uri
        try:
            self.proxy_scheme, self.proxy_netloc, self.path, self.query, self.fragment = split(self._url)
        except ValueError as e:  # [ without ]
            raise ParsingError("Bad URI") from e
        self.url_scheme = self.adj.url_scheme
        options = {option.strip() for option in headers.get("CONNECTION", "").lower().split(",")}
        # The one that waitress looks for, alone, as it does.
        headers["CONNECTION"] = connection = next((o for o in ("close", "keep-alive") if o in options), "")
        self.connection_close = connection == "close" if self.version == "1.1" else connection != "keep-alive"
        if coding := headers.pop("TRANSFER_ENCODING", ""):
            if self.version != "1.1" or coding.lower() != "chunked":
                raise TransferEncodingNotImplemented("Transfer-Encoding requested is not supported.")
            self.chunked = True
            self.body_rcv = ChunkedReceiver(Body(self.adj.max_request_body_size + CHUNK_SLACK, self.adj.memory))
        elif length := int(headers.get("CONTENT_LENGTH", "0")):
            self.content_length = length
            large = LARGE <= length < self.adj.max_request_body_size
            self.body_rcv = FixedStreamReceiver(
                length, Body(length, self.adj.memory) if large else OverflowableBuffer(self.adj.inbuf_overflow)
            )
        # waitress would wait for a body that is none, or that it refuses, once it has sent "100 Continue".
        wanted = self.chunked or 0 < self.content_length < self.adj.max_request_body_size
        self.expect_continue = wanted and self.version == "1.1" and headers.get("EXPECT", "").lower() == "100-continue"


def _key(name: bytes) -> str:
    """What waitress calls a header."""
    return name.upper().replace(b"-", b"_").decode("latin-1")


_known_key, _known_uri = lru_cache(256)(_key), lru_cache(64)(split_uri)
