"""Reverse proxy of the local gateway: a function call goes to a replica, and its response back, as in OpenFaaS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, MultiMapping
from yarl import URL

from isthmus_tools.engine.fleet import NAMESPACE
from isthmus_tools.engine.replica import INTERNAL_HEADER, REFUSAL_HEADERS, TIMEOUT_HEADERS, Replica
from isthmus_tools.engine.supervisor import Supervisor
from isthmus_tools.engine.telemetry import InvocationMetrics

MAX_BODY_BYTES = 512 << 20  # bodies are streamed, so memory does not bound them
MAX_HEADER_BYTES = 1 << 16
"""Bound of a header and of the request line; aiohttp's default is 8,190, OpenFaaS's gateway takes 1 MB."""
UPSTREAM_TIMEOUT_S = 60.0  # default of OpenFaaS

_READ_BYTES = 1 << 20  # aiohttp pauses reading above twice this; its default is 64 KiB
# Below the template's IDLE_S: a connection that its server is about to close must not be reused.
_KEEP_IDLE_S = 10.0
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)  # the proxied request has its own
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with timeout 0
_PROXY = {INTERNAL_HEADER: "proxy"}
HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    }
)
# aiohttp writes Host and has handled Expect; the gateway sets the rest.
_NOT_FORWARDED = HOP_BY_HOP | {"host", "expect", "x-forwarded-host", "x-forwarded-for", "x-call-id", "x-start-time"}
_NOT_RETURNED = HOP_BY_HOP | {"content-length", "x-duration-seconds"}


def open_session() -> aiohttp.ClientSession:
    """HTTP client for the functions: keep-alive connections, bodies and headers unchanged."""
    return aiohttp.ClientSession(
        # No limit of connections: the watchdog's bound on concurrent calls is a function's own.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_IDLE_S),
        # A cookie that a function sets for one caller must not be sent for another.
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        read_bufsize=_READ_BYTES,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
    )


class ReverseProxy:
    """Any method on /function/NAME[.NAMESPACE][/path]; `find` looks a function up by NAME[.NAMESPACE].

    Units: max_body_bytes bounds a request's body, timeout_s a call.
    """

    def __init__(
        self,
        find: Callable[[str], Supervisor | None],
        metrics: InvocationMetrics,
        session: aiohttp.ClientSession,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        timeout_s: float = UPSTREAM_TIMEOUT_S,
    ) -> None:
        self.session = session
        self.max_body_bytes = max_body_bytes
        self.timeout_s = timeout_s
        self._find = find
        self._metrics = metrics

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Relay a call to a replica of the function, or respond with the reason of a failure."""
        name, target = split(request.rel_url.raw_path_qs)
        supervisor = self._find(name)
        if supervisor is None:
            return web.Response(status=404, text=f"error finding function {name}: it is not deployed here")
        started = time.perf_counter()
        response = await _ProxiedRequest(self, request, supervisor).respond(target)
        supervisor.invocations += 1
        self._metrics.count(f"{supervisor.name}.{NAMESPACE}", response.status, time.perf_counter() - started)
        return response


class _ProxiedRequest:
    """A call of a function, from its headers to the last byte of the response."""

    def __init__(self, proxy: ReverseProxy, request: web.Request, supervisor: Supervisor) -> None:
        self._proxy = proxy
        self._request = request
        self._supervisor = supervisor
        self._started = time.perf_counter()
        call_id = request.headers.get("X-Call-Id") or str(uuid.uuid4())
        self._added_headers = {"X-Call-Id": call_id, "X-Start-Time": str(time.time_ns())}
        self._response: web.StreamResponse | None = None
        """The function's response, once its headers are being sent to the caller."""

    async def respond(self, target: str) -> web.StreamResponse:
        """Choose a replica and relay the call."""
        length, supervisor = self._request.content_length or 0, self._supervisor
        if length > self._proxy.max_body_bytes:
            return self._too_large(f"the body has {length} bytes; the gateway takes {self._proxy.max_body_bytes}")
        if reason := _unforwardable(self._request):
            return self._close_after(self._refuse(400, reason))
        if target == "/_/health" and supervisor.replicas:  # answered by the watchdog, which local processes lack
            return self._refuse(200, "OK")
        if (replica := supervisor.pick()) is None:
            details = f" {supervisor.reason}" if supervisor.exposes_details else ""
            text = f"No endpoints available for: {supervisor.name}.{details}"
            return self._refuse(503, text, {"Retry-After": "1", **_PROXY})
        watchdog = replica.deployment.watchdog
        if watchdog.refuses(replica.in_flight):
            return self._refuse(429, watchdog.refusal, REFUSAL_HEADERS)
        return await self._relay_in_time(replica, replica.deployment.ready_path if target == "/_/ready" else target)

    async def _relay_in_time(self, replica: Replica, target: str) -> web.StreamResponse:
        timeout_s, status, headers = self._proxy.timeout_s, 502, dict[str, str]()  # the gateway's upstream_timeout
        limit_s = replica.deployment.watchdog.timeout_s(self._request.headers.get("X-Timeout", ""))
        # A function with a longer limit than the gateway's default stands behind a gateway that is set up for it.
        if 0 < limit_s < timeout_s or limit_s > UPSTREAM_TIMEOUT_S:
            timeout_s, status, headers = limit_s, 504, TIMEOUT_HEADERS
        replica.in_flight += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await self._relay(replica, target)
        except TimeoutError:
            return self._fail(status, "", headers | self._duration())
        finally:
            replica.in_flight -= 1

    async def _relay(self, replica: Replica, target: str) -> web.StreamResponse:
        """Stream both bodies concurrently, with backpressure."""
        request = self._request
        body = _RequestBody(request.content, self._proxy.max_body_bytes) if request.body_exists else None
        try:
            async with self._proxy.session.request(
                request.method,
                URL(replica.url + target, encoded=True),
                headers=self._forwarded_headers(),
                data=body,
                allow_redirects=False,
                timeout=_NO_TIMEOUT,
            ) as upstream:
                self._response = response = self._begin_response(upstream)
                await response.prepare(request)
                async for piece in upstream.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except (aiohttp.ClientError, OSError) as e:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the caller hung up") from e
            if body is not None and body.too_large and self._response is None:
                return self._too_large(f"the body has more than the {body.max_bytes} bytes that the gateway takes")
            return self._fail(500, f"Can't reach service for: {self._supervisor.name}.", _PROXY)

    def _forwarded_headers(self) -> CIMultiDict[str]:
        headers = end_to_end(self._request.headers, _NOT_FORWARDED)
        headers.update(self._added_headers)
        headers["X-Forwarded-Host"] = self._request.headers.get("Host", "")
        headers["X-Forwarded-For"] = self._request.remote or ""
        return headers

    def _begin_response(self, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        if upstream.status < 200 or _has_unknown_coding(upstream.headers):
            raise aiohttp.ClientPayloadError("a response that cannot be relayed")
        headers = end_to_end(upstream.headers, _NOT_RETURNED)
        for name, value in self._added_headers.items():
            headers.setdefault(name, value)
        headers.update(self._duration())
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
        response.content_length = upstream.content_length
        # After an early response the rest of the request's body is not read.
        return response if self._request.content.is_eof() else self._close_after(response)

    def _fail(self, status: int, text: str, headers: Mapping[str, str]) -> web.StreamResponse:
        """Respond in place of the function, or break off a response that has begun."""
        if self._response is None or not self._response.prepared:
            return self._refuse(status, text, headers)
        if (transport := self._request.transport) is not None:
            # A reset: for a response delimited by its connection, a plain close would look complete.
            with contextlib.suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()
        return self._response

    def _refuse(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> web.Response:
        """A response of the gateway itself."""
        return web.Response(status=status, text=text or None, headers={**self._added_headers, **(headers or {})})

    def _too_large(self, text: str) -> web.StreamResponse:
        return self._close_after(self._refuse(413, text))

    def _close_after(self, response: web.StreamResponse) -> web.StreamResponse:
        response.force_close()
        return response

    def _duration(self) -> dict[str, str]:
        return {"X-Duration-Seconds": f"{time.perf_counter() - self._started:.6f}"}


class _RequestBody:
    """Relay of a request's body; a body above the bound is broken off, so that the function never sees its end."""

    def __init__(self, content: aiohttp.StreamReader, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.too_large = False
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._content.iter_any():
            size += len(piece)
            self.too_large = size > self.max_bytes
            if self.too_large:
                raise ValueError(f"more than {self.max_bytes} bytes")
            yield piece


def _unforwardable(request: web.Request) -> str:
    """Reason why a request cannot be forwarded unchanged, else empty."""
    if request.method == "CONNECT":
        return "the gateway opens no tunnels"
    if _has_unknown_coding(request.headers):
        return "the only transfer coding known here is chunked"
    not_text = [name for name, value in request.headers.items() if not is_text(value)]
    return f"the header {not_text[0]} is not UTF-8" if not_text else ""


def _has_unknown_coding(headers: Mapping[str, str]) -> bool:
    """Whether the body has a transfer coding beside chunked, left undecoded by aiohttp."""
    return headers.get("Transfer-Encoding", "chunked").strip().lower() != "chunked"


def split(raw_path: str) -> tuple[str, str]:
    """Name and remaining target of a quoted path /function/NAME/rest?query."""
    _, _, after = raw_path[1:].partition("/")
    for end, character in enumerate(after):
        if character in "/?":
            return after[:end], after[end:] if character == "/" else "/" + after[end:]
    return after, "/"


def end_to_end(headers: MultiMapping[str], dropped: Collection[str]) -> CIMultiDict[str]:
    """Headers without `dropped`, those listed in Connection, and values that are not UTF-8."""
    listed = {part.strip().lower() for part in ",".join(headers.getall("Connection", [])).split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in dropped and name.lower() not in listed and is_text(value)
    )


def is_text(value: str) -> bool:
    """Whether a header's value is UTF-8; aiohttp decodes other bytes to lone surrogates that cannot be sent."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
