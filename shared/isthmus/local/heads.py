"""The heads of HTTP messages as they pass the gateway: read by httptools, written anew for the other side."""

from __future__ import annotations

from collections.abc import Sequence

import httptools

MAX_HEAD_BYTES = 1 << 16
END = b"\r\n\r\n"

Header = tuple[bytes, bytes]

_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
        *(b"proxy-authenticate", b"proxy-authorization"),
    }
)
# What the gateway says anew.
_NOT_SENT = _HOP_BY_HOP | {
    *(b"host", b"expect", b"content-length", b"x-forwarded-host", b"x-forwarded-for", b"x-call-id", b"x-start-time")
}
_NOT_RETURNED = _HOP_BY_HOP | {b"content-length", b"x-duration-seconds"}
_BODILESS = frozenset({204, 304})


class NotHttp(Exception):
    """What came is not HTTP/1, or has a body whose end cannot be told."""


def split_head(data: memoryview) -> tuple[bytes, memoryview] | None:
    """A head with its empty line, and what follows; None where it is not whole yet.

    Raises:
        NotHttp: it exceeds MAX_HEAD_BYTES.
    """
    for most in (4096, MAX_HEAD_BYTES):
        start = bytes(data[:most])
        end = start.find(END) + len(END)
        if end >= len(END):
            return start[:end], data[end:]
        if len(start) < most:
            return None
    raise NotHttp(f"more than {MAX_HEAD_BYTES} bytes of headers")


class _Head:
    """A message's head; where the body is chunked, `feed` reads that too.

    httptools, whose parser is `_parser`, calls the `on_…` methods.
    """

    _parser: httptools.HttpRequestParser | httptools.HttpResponseParser

    def __init__(self) -> None:
        self.version = ""
        self.keep_alive = False
        self.length: int | None = None
        """The body's, where Content-Length says it."""
        self.chunked = False
        self.pieces: list[bytes] = []
        """Of a chunked body, what came since they were taken."""
        self.ended = False
        self.more = False
        """Whether something came after the message's end."""
        self._headers: list[tuple[bytes, bytes, bytes]] = []
        self._values: dict[bytes, bytes] = {}
        self._complete = False

    def feed(self, data: bytes | memoryview) -> None:
        """Read the head, or more of a chunked body.

        Raises:
            NotHttp: that is not what it is.
        """
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the gateway upgrades nothing: the request goes on without
        except httptools.HttpParserError as e:
            raise NotHttp(str(e)) from e
        if self._complete and (self.ended or not self.chunked):
            del self._parser  # it holds this head, which would wait for the garbage collector

    def find(self, name: bytes) -> bytes:
        """The last header of that name, which is in lower case; nothing where there is none."""
        return self._values.get(name, b"")

    def on_message_begin(self) -> None:
        self.more = self.ended

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._complete:  # a trailer is not passed on
            low = name.lower()
            self._headers.append((low, name, value))
            self._values[low] = value

    def on_headers_complete(self) -> None:
        if not self._complete:
            self._complete = True
            self.chunked = self.find(b"transfer-encoding").lower() == b"chunked"
            # Asked later, the parser speaks of the next message.
            self.keep_alive = self._parser.should_keep_alive()
            self.version = self._parser.get_http_version()

    def on_body(self, body: bytes) -> None:
        if not self.ended:
            self.pieces.append(body)

    def on_message_complete(self) -> None:
        self.ended = True

    def _read(self, head: bytes) -> None:
        self.feed(head)
        coding = self.find(b"transfer-encoding")
        if coding and not self.chunked:
            raise NotHttp(f"the transfer coding {coding!r} is not known here")
        if length := self.find(b"content-length"):
            self.length = int(length)  # the parser has seen that it is a number

    def _kept(self, dropped: frozenset[bytes]) -> list[bytes]:
        """The lines of the headers, without `dropped` and without those that Connection names."""
        if connection := self.find(b"connection"):
            dropped |= {part.strip().lower() for part in connection.split(b",")}
        return [name + b": " + value for low, name, value in self._headers if low not in dropped]


class RequestHead(_Head):
    """A request's first line and headers.

    Raises:
        NotHttp: `head`, which ends with its empty line, is none.
    """

    def __init__(self, head: bytes) -> None:
        super().__init__()
        self.target = b""
        parser = self._parser = httptools.HttpRequestParser(self)
        self._read(head)
        self.method: bytes = parser.get_method()

    def on_url(self, url: bytes) -> None:
        if not self._complete:
            self.target += url

    @property
    def expects(self) -> bool:
        """Whether the body is sent only once the gateway says so."""
        return self.find(b"expect").lower() == b"100-continue"

    def forwarded(self, target: bytes, host: bytes, peer: bytes, ours: Sequence[Header]) -> bytes:
        """The head that the function gets: OpenFaaS's headers `ours` in, what is between two neighbours out."""
        lines = [self.method + b" " + target + b" HTTP/1.1", b"Host: " + host]
        lines += self._kept(_NOT_SENT)
        lines += [name + b": " + value for name, value in ours]
        lines += [b"X-Forwarded-Host: " + self.find(b"host"), b"X-Forwarded-For: " + peer]
        if self.chunked:
            lines.append(b"Transfer-Encoding: chunked")
        elif self.length is not None:
            lines.append(b"Content-Length: %d" % self.length)
        return b"\r\n".join(lines) + END


class AnswerHead(_Head):
    """An answer's status and headers.

    Raises:
        NotHttp: `head`, which ends with its empty line, is none.
    """

    def __init__(self, head: bytes) -> None:
        super().__init__()
        self.reason = b""
        parser = self._parser = httptools.HttpResponseParser(self)
        self._read(head)
        self.status: int = parser.get_status_code()

    def on_status(self, reason: bytes) -> None:
        if not self._complete:
            self.reason += reason

    @property
    def interim(self) -> bool:
        """Whether another answer follows."""
        return 100 <= self.status < 200

    def bodiless(self, method: bytes) -> bool:
        """Whether no body follows, whatever the headers say."""
        return method == b"HEAD" or self.status in _BODILESS

    def returned(self, ours: Sequence[Header], *more: bytes) -> bytes:
        """The head that the caller gets: `ours` where the function says nothing of that name, and the lines `more`."""
        lines = [b"HTTP/1.1 %d " % self.status + self.reason, *self._kept(_NOT_RETURNED)]
        lines += [name + b": " + value for name, value in ours if name.lower() not in self._values]
        return b"\r\n".join([*lines, *more]) + END
