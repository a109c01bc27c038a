"""Persistent HTTP connections to a URL: the standard library's `http.client` over sockets with a deadline.

A socket's own timeout holds for each read or send alone, so a peer that drips single bytes would exceed any bound. Here
`http.client` gets a socket on which each read and send waits at most for the rest of the whole exchange. Redirects
are not followed, and no proxy is read from the environment.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import select
import socket
import ssl
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from isthmus.context import Abandonment, Deadline
from isthmus.http.addresses import Address
from isthmus.http.sockets import AddressRefused, connect
from isthmus.http.tls import TlsProblem, TlsTrust, problem_of

MAX_IDLE = 64
# Status line and headers, 1xx responses included; http.client alone takes 100 lines of 64 KiB each.
MAX_HEAD_BYTES = 2**16
MAX_INFORMATIONAL = 8
# Larger parts and bodies bypass the buffers and are not copied.
_BUFFER_BYTES = 2**14
_PIECE_BYTES = 2**16
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~"
_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
# A day, which also replaces longer times.
MAX_RETRY_AFTER_S = 86_400.0

Buffer = bytes | bytearray | memoryview


def is_url(text: str) -> bool:
    """Whether a request can be sent there: http or https, a host, a port, and no character that a head escapes."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def stage_seconds(header: str, stage: str) -> float:
    """Seconds that `stage` took; 0.0 where the header does not say so as `NAME;dur=MILLISECONDS`."""
    return stages_of(header).get(stage, 0.0)


def stages_of(header: str) -> dict[str, float]:
    """Seconds of every stage that a Server-Timing header gives as `NAME;dur=MILLISECONDS`; the first of a name counts.

    Source: W3C Server Timing.
    """
    stages: dict[str, float] = {}
    for metric in header.split(","):
        name, *parameters = (part.strip() for part in metric.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "dur" and _NUMBER.fullmatch(value := value.strip().strip('"')):
                stages.setdefault(name, float(value) / 1000)
                break
    return stages


def retry_after_seconds(header: str) -> float | None:
    """Seconds that `Retry-After` asks for; None where the header is missing, a date, or no number of seconds.

    Source: RFC 9110, 10.2.3.
    """
    text = header.strip()
    if not (text.isascii() and text.isdigit()):
        return None
    return min(MAX_RETRY_AFTER_S, float(text[-9:] if not text[:-9].strip("0") else "9" * 9))


class Unreachable(Exception):
    """No connection could be made."""


class TlsFailed(Unreachable):
    """The two sides do not trust each other's certificates: the handshake failed, or ended in an alert."""

    def __init__(self, problem: TlsProblem) -> None:
        super().__init__(problem.text)
        self.problem = problem


class ResponseTooLong(Exception):
    """A response with status 200 exceeded its bound; the rest was not read."""


class BrokenOff(Exception):
    """The connection ended, or the peer does not speak HTTP."""


class ErrorStatus(Exception):
    """A stream's response has another status than 200; `response` is the whole response."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class ExchangeTimes(NamedTuple):
    """A request and its response on the connection, as this side's monotonic clock saw them.

    Units: seconds and bytes. `connect_s` is the time of a new connection's handshakes, 0 on an idle one. `first_byte_s`
    and `whole_s` count from the first byte sent to the first and the last byte received; `rest_bytes` came after the
    first read, so between the two.
    """

    connect_s: float = 0.0
    first_byte_s: float = 0.0
    whole_s: float = 0.0
    rest_bytes: int = 0


NO_TIMES = ExchangeTimes()


@dataclass(frozen=True)
class Response:
    """A response, read to its end or, where its status is not 200, to its bound; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray
    times: ExchangeTimes = NO_TIMES


class ConnectionPool:
    """Connections to `url`, kept alive between requests; any thread may post, each on a connection of its own.

    With `permits`, connections are made to addresses for which it is true alone. An https URL has the system's CAs and
    no client certificate, unless `trust` says otherwise.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float,
        permits: Callable[[Address], bool] | None = None,
        trust: TlsTrust | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._tls = (trust or TlsTrust()) if parts.scheme == "https" else None
        self._address = (parts.hostname or "", parts.port or (443 if self._tls else 80))
        self._path, self._query = parts.path.rstrip("/"), parts.query
        self._host = parts.netloc.rpartition("@")[2]
        self._connect_timeout_s, self._permits = connect_timeout_s, permits
        # A list's append and pop are atomic; the connection used last is the likeliest to be alive.
        self._idle: list[socket.socket] = []
        weakref.finalize(self, _close, self._idle)

    def post(
        self,
        body: Sequence[Buffer],
        headers: Mapping[str, str],
        deadline: Deadline,
        *,
        max_bytes: int,
        max_error_bytes: int,
        path: str = "",
        query: str = "",
        method: str = "POST",
        abandonment: Abandonment | None = None,
    ) -> Response:
        """Send `body`, in parts, to `path` below the URL and read the response, both before the deadline.

        An idle connection that the peer closed is replaced: requests must be safe to send twice. `abandonment` ends
        the request by closing its connection.

        Units: max_bytes bounds the body of a response with status 200; any other body is cut at max_error_bytes.

        Raises:
            AddressRefused: the host has no permitted address.
            Unreachable: no connection could be made.
            TlsFailed: that, since one side does not trust the other.
            TimeoutError: the deadline passed while sending or reading.
            ResponseTooLong: status 200, and more than max_bytes.
            BrokenOff: the connection broke, or the response is not HTTP.
            ValueError: a header with a line break.
        """
        target = self._target(path, query)
        headers = {"Host": self._host, "Content-Length": str(sum(map(len, body))), **headers}
        if any("\r" in value or "\n" in value for value in headers.values()):  # http.client lets folded lines pass
            raise ValueError("a header's value has a line break")
        while True:
            idle = self._take_idle()
            began = time.monotonic()
            sock = idle or self._connect(deadline)
            timed = _DeadlineSocket(sock, deadline)
            connect_s = 0.0 if idle else timed.began - began
            keeps = False
            try:
                with _abandoned_by(abandonment, sock):
                    response, keeps = _exchange(timed, (method, target), headers, body, (max_bytes, max_error_bytes))
                return replace(response, times=timed.times(connect_s))
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as e:
                if idle is None or timed.received or (abandonment is not None and abandonment.is_abandoned):
                    raise _failure(e) from e
                # Else the peer closed the idle connection; the next is tried.
            finally:
                if keeps and len(self._idle) < MAX_IDLE:
                    self._idle.append(sock)
                else:
                    sock.close()

    def lines(
        self,
        body: bytes,
        headers: Mapping[str, str],
        deadline: Deadline,
        *,
        max_line_bytes: int,
        max_error_bytes: int,
        path: str,
    ) -> Iterator[bytes]:
        """POST `body` to `path` below the URL, and the lines of the response as they come.

        The connection is the stream's own, and ends with it: a peer sees that nobody reads any more.

        Raises:
            ErrorStatus: the response's status is not 200.
            ResponseTooLong: a line of more than max_line_bytes.
            Further errors as `post`.
        """
        headers = {"Host": self._host, "Content-Length": str(len(body)), **headers}
        sock = self._connect(deadline)
        try:
            timed = _DeadlineSocket(sock, deadline)
            response, _ = _send(timed, ("POST", self._target(path, "")), headers, (body,))
            if response.status != 200:
                content = _read_body(response, max_error_bytes, max_error_bytes)
                raise ErrorStatus(Response(response.status, _lower(response), content))
            while line := response.readline(max_line_bytes + 1):
                if len(line) > max_line_bytes:
                    raise ResponseTooLong
                yield line
            if response.length:
                raise BrokenOff("the connection ended early")
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as e:
            raise _failure(e) from e
        finally:
            sock.close()

    def get_status(self, path: str, deadline: Deadline) -> int:
        """The status of GET `path` below the URL, over a connection of its own; idle ones may be dead ends.

        Raises:
            As `post`.
        """
        sock = self._connect(deadline)
        try:
            timed, bounds = _DeadlineSocket(sock, deadline), (MAX_HEAD_BYTES, MAX_HEAD_BYTES)
            response, _ = _exchange(timed, ("GET", self._target(path, "")), {"Host": self._host}, (), bounds)
            return response.status
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as e:
            raise _failure(e) from e
        finally:
            sock.close()

    def close(self) -> None:
        """Close the idle connections."""
        _close(self._idle)

    def _target(self, path: str, query: str) -> str:
        target = quote(self._path + path or "/", safe=_PATH_CHARACTERS)
        if query := query or self._query:
            target += "?" + quote(query, safe=_PATH_CHARACTERS + "?")
        return target

    def _take_idle(self) -> socket.socket | None:
        """An idle connection that the peer has neither closed nor written to."""
        while True:
            try:
                sock = self._idle.pop()
            except IndexError:
                return None
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            # A connection of replaced certificates is not used again: its peer may be one that nobody trusts any more.
            is_current = self._tls is None or (isinstance(sock, ssl.SSLSocket) and sock.context is self._tls.context())
            if is_current and not poll.poll(0):
                return sock
            sock.close()

    def _connect(self, deadline: Deadline) -> socket.socket:
        timeout_s = max(0.001, min(self._connect_timeout_s, deadline.remaining()))
        try:
            tls = self._tls.context() if self._tls is not None else None
            return connect(*self._address, timeout_s=timeout_s, tls=tls, permits=self._permits)
        except AddressRefused:
            raise
        except OSError as e:
            if problem := problem_of(e):
                raise TlsFailed(problem) from e
            raise Unreachable(e.strerror or str(e) or "it took too long") from e


@contextlib.contextmanager
def _abandoned_by(abandonment: Abandonment | None, sock: socket.socket) -> Iterator[None]:
    """During the block `abandonment` ends the use of the socket: reads in other threads return at once."""
    if abandonment is None:
        yield
        return

    def end() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not a TLS socket's own, which changes what it reads

    with abandonment.ended_by(end):
        yield


def _close(idle: list[socket.socket]) -> None:
    while idle:
        idle.pop().close()


class _DeadlineSocket(io.RawIOBase):
    """A socket for http.client during an exchange: reads and sends end with the deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline
        self._waiting = bytearray()
        self.received, self.reads_head = 0, True
        self.began, self._first_read = time.monotonic(), (0.0, 0)

    def times(self, connect_s: float) -> ExchangeTimes:
        """The times of the exchange, which ends now."""
        first_at, first_bytes = self._first_read
        ended = time.monotonic()
        return ExchangeTimes(connect_s, first_at - self.began, ended - self.began, self.received - first_bytes)

    def sendall(self, data: Buffer) -> None:
        # A small part waits for the next: head and body of a small request share a packet.
        if len(self._waiting) + len(data) > _BUFFER_BYTES:
            self.send_waiting()
        if len(data) > _BUFFER_BYTES:
            self._send(data)
        else:
            self._waiting += data

    def send_waiting(self) -> None:
        data, self._waiting = self._waiting, bytearray()
        self._send(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.reads_head and self.received >= MAX_HEAD_BYTES + _BUFFER_BYTES:
            raise http.client.HTTPException(f"more than {MAX_HEAD_BYTES} bytes of headers")
        count = self._ready().recv_into(buffer)
        if not self.received:
            self._first_read = (time.monotonic(), count)
        self.received += count
        return count

    def close(self) -> None:
        """No-op: http.client closes the socket before reading a body that ends with the connection."""

    def _send(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[self._ready().send(view) :]

    def _ready(self) -> socket.socket:
        if (left_s := self._deadline.remaining()) <= 0:
            raise TimeoutError
        self._sock.settimeout(left_s)
        return self._sock


class _FinalResponse(http.client.HTTPResponse):
    """The response after any 1xx responses; http.client itself skips 100 alone (RFC 9110, 15.2)."""

    def begin(self) -> None:
        for _ in range(MAX_INFORMATIONAL + 1):
            super().begin()
            if self.status >= 200:
                return
            if self.status == 101:
                break
            self.headers = self.msg = None  # type: ignore[assignment]
        raise http.client.HTTPException(f"{self.status} came in place of a response")


def _failure(error: OSError | http.client.HTTPException) -> TlsFailed | BrokenOff:
    # In TLS 1.3 the server judges the client's certificate after the client's handshake has ended.
    if isinstance(error, OSError) and (problem := problem_of(error)):
        return TlsFailed(problem)
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return BrokenOff(reason[:200])


def _exchange(
    sock: _DeadlineSocket,
    line: tuple[str, str],
    headers: Mapping[str, str],
    body: Sequence[Buffer],
    bounds: tuple[int, int],
) -> tuple[Response, bool]:
    """The response, and whether the connection can take another request.

    `line` is the method and the target; `bounds` are as in `_read_body`.
    """
    response, is_sent = _send(sock, line, headers, body)
    content = _read_body(response, *bounds)
    keeps = is_sent and response.isclosed() and not response.will_close
    return Response(response.status, _lower(response), content), keeps


def _send(
    sock: _DeadlineSocket, line: tuple[str, str], headers: Mapping[str, str], body: Sequence[Buffer]
) -> tuple[http.client.HTTPResponse, bool]:
    """The response up to its body, and whether the whole request was sent."""
    connection = http.client.HTTPConnection("unused")  # the socket is connected, and Host is among the headers
    connection.sock, connection.response_class = sock, _FinalResponse
    connection.putrequest(*line, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    is_sent = False
    # A peer that refuses a large body responds and closes while the body is being sent; the response is there to read.
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection.endheaders(body)
        sock.send_waiting()
        is_sent = True
    response = connection.getresponse()
    if response.headers.get_payload():  # lines that are no headers are a payload to the header parser
        raise http.client.HTTPException("malformed headers")
    sock.reads_head = False
    return response, is_sent


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def _read_body(response: http.client.HTTPResponse, max_bytes: int, max_error_bytes: int) -> bytes | bytearray:
    is_good, length = response.status == 200, response.length
    limit = max_bytes if is_good else max_error_bytes
    if length is not None and length <= limit:
        whole = response.read(length)  # a single allocation, not filled with zeros first
        if len(whole) < length:
            raise http.client.HTTPException(f"the connection ended after {len(whole)} of {length} bytes")
        return whole
    if is_good and length is not None:
        raise ResponseTooLong
    content, piece = bytearray(), bytearray(_PIECE_BYTES)
    # By readinto: read() takes a chunk's size at its word, and -1 is everything until the connection ends.
    while len(content) <= limit and (count := response.readinto(piece)):
        content += memoryview(piece)[:count]
    if len(content) <= limit:
        if response.length:
            raise http.client.HTTPException("the connection ended early")
    elif is_good:
        raise ResponseTooLong
    del content[limit:]
    return content
