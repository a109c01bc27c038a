"""Pass a request on to a replica and its answer back, as OpenFaaS's gateway does.

aiohttp was chosen by measurement: of the libraries tried it adds the least to a hop. docs/local.md has the figures.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from isthmus.local.fleet import NAMESPACE, Fleet
from isthmus.local.metrics import Metrics
from isthmus.local.replica import Replica
from isthmus.local.supervisor import Supervisor

MAX_BODY_BYTES = 512 << 20
UPSTREAM_TIMEOUT_S = 60.0

_WHOLE_BELOW = 256 * 1024  # a shorter answer goes out in one write, with its headers
_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
        *("proxy-authenticate", "proxy-authorization"),
    }
)
_NOT_SENT = _HOP_BY_HOP | {"host", "expect", "content-length"}


class _TooLong(Exception):
    """A body of unknown length went over the bound."""


class Proxy:
    """Any method on /function/NAME[.NAMESPACE][/path]."""

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        timeout_s: float = UPSTREAM_TIMEOUT_S,
    ) -> None:
        self._fleet = fleet
        self._session = session
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=5.0)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request with what a replica of the function answers."""
        started = time.perf_counter()
        name, rest = split(request.raw_path)
        supervisor = self._fleet.get(name)
        if supervisor is None:
            return _plain(404, f"error finding function {name}: it is not deployed here")
        call_id = request.headers.get("X-Call-Id") or str(uuid.uuid4())
        reply = await self._pass_on(request, supervisor, rest, call_id, started)
        supervisor.invocations += 1
        self._metrics.count(f"{supervisor.name}.{NAMESPACE}", reply.status, time.perf_counter() - started)
        return reply

    async def _pass_on(
        self, request: web.Request, supervisor: Supervisor, rest: str, call_id: str, started: float
    ) -> web.StreamResponse:
        ours = {"X-Call-Id": call_id, "X-Start-Time": str(time.time_ns())}
        length = request.content_length
        if length is not None and length > self._max_body_bytes:
            return _plain(413, f"the body has {length} bytes; the gateway takes {self._max_body_bytes}", ours)
        if rest == "/_/health" and supervisor.replicas:  # the watchdog's own; local processes run without one
            return _plain(200, "OK", ours)
        replica = supervisor.pick()
        if replica is None:
            ours |= {"Retry-After": "1", "X-OpenFaaS-Internal": "proxy"}
            return _plain(503, f"No endpoints available for: {supervisor.name}. {supervisor.reason}", ours)
        replica.in_flight += 1
        try:
            upstream = self._session.request(
                request.method,
                _target(replica, rest),
                data=self._body(request),
                headers=_forwarded(request, ours),
                allow_redirects=False,
                timeout=self._timeout,
            )
            async with upstream as answer:
                headers = _backward(answer.headers)
                for key, value in ours.items():
                    headers.setdefault(key, value)
                headers["X-Duration-Seconds"] = f"{time.perf_counter() - started:.6f}"
                return await _send(request, answer, headers)
        except TimeoutError:
            return web.Response(status=502, headers=ours)
        except _TooLong:
            return _plain(413, f"the body has more than the {self._max_body_bytes} bytes that the gateway takes", ours)
        except aiohttp.ClientError:
            ours["X-OpenFaaS-Internal"] = "proxy"
            return _plain(500, f"Can't reach service for: {supervisor.name}.", ours)
        finally:
            replica.in_flight -= 1

    def _body(self, request: web.Request) -> aiohttp.StreamReader | AsyncIterator[bytes] | None:
        if not request.body_exists:
            return None
        return request.content if request.content_length is not None else self._bounded(request.content)

    async def _bounded(self, content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        passed = 0
        async for piece in content.iter_any():
            passed += len(piece)
            if passed > self._max_body_bytes:
                raise _TooLong
            yield piece


def split(raw_path: str) -> tuple[str, str]:
    """A function's name and the rest of a path /function/NAME/rest?query, still quoted.

    The watchdog's /_/ready is the function's own.
    """
    _, _, after = raw_path[1:].partition("/")
    for end, character in enumerate(after):
        if character in "/?":
            return after[:end], after[end:] if character == "/" else "/" + after[end:]
    return after, "/"


def _target(replica: Replica, rest: str) -> URL:
    if rest == "/_/ready":
        rest = replica.deployment.ready_path
    return URL(replica.url + rest, encoded=True)


def _forwarded(request: web.Request, ours: dict[str, str]) -> CIMultiDict[str]:
    named = _named_by_connection(request.headers)
    headers = CIMultiDict(
        (k, v) for k, v in request.headers.items() if (low := k.lower()) not in _NOT_SENT and low not in named
    )
    headers.update(ours)
    headers["X-Forwarded-Host"] = request.host
    headers["X-Forwarded-For"] = request.remote or ""
    length = request.content_length
    if length is not None:
        headers["Content-Length"] = str(length)
    return headers


def _backward(theirs: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    named = _named_by_connection(theirs)
    return CIMultiDict((k, v) for k, v in theirs.items() if (low := k.lower()) not in _HOP_BY_HOP and low not in named)


def _named_by_connection(headers: CIMultiDictProxy[str]) -> frozenset[str]:
    found = headers.get("Connection")
    return frozenset(part.strip().lower() for part in found.split(",")) if found else frozenset()


async def _send(request: web.Request, answer: aiohttp.ClientResponse, headers: CIMultiDict[str]) -> web.StreamResponse:
    length = answer.content_length
    if request.method != "HEAD" and length is not None and length <= _WHOLE_BELOW:
        body = await answer.read()
        headers.pop("Content-Length", None)
        return web.Response(status=answer.status, reason=answer.reason, body=body, headers=headers)
    reply = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
    await reply.prepare(request)
    try:
        async for piece in answer.content.iter_any():
            await reply.write(piece)
    except (aiohttp.ClientError, TimeoutError):
        # The status is out already; a broken connection is the only way left to say that the body is not whole.
        if request.transport is not None:
            request.transport.abort()
    return reply


def _plain(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text, headers=headers)
