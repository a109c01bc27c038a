"""Asynchronous invocation: a bounded queue in memory, workers, and callbacks.

As in OpenFaaS CE: bodies up to 256,000 bytes, at least one attempt, retries on 429 and 503. A callback carries the
body and the end-to-end headers of the function's response.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from isthmus.errors import RequestMalformed
from isthmus.http.pool import retry_after_seconds
from isthmus_tools.engine.callbacks import CallbackPolicy, PermittedResolver
from isthmus_tools.engine.fleet import Fleet
from isthmus_tools.engine.proxy import HOP_BY_HOP, end_to_end, is_text, split
from isthmus_tools.engine.telemetry import Event, OnEvent

MAX_BODY_BYTES = 256_000  # of OpenFaaS CE
MAX_WAITING = 256  # with bodies of 256 kB: 64 MB of memory
WORKERS = 4
ATTEMPTS = 5  # with back-off, 3 s: a replica restarts in that time
CALL_TIMEOUT_S = 60.0
_MAX_RESULT_BYTES = 64 << 20  # a response is in memory until its callback has been sent
_MAX_WAIT_S = 10.0  # a Retry-After of hours would block a worker
CALLBACK_TIMEOUT_S = 15.0
"""A callback that times out is not retried: few workers serve all calls."""
_NOT_IN_CALLBACKS = HOP_BY_HOP | {"host", "expect", "content-length"}
# Credentials are not kept in the queue.
_NOT_IN_CALLS = _NOT_IN_CALLBACKS | {"x-callback-url", "authorization"}


@dataclass(frozen=True)
class _QueuedCall:
    id: str
    function: str
    path: str
    headers: CIMultiDict[str]
    body: bytes
    callback: URL | None


class AsyncQueue:
    """POST /async-function/NAME: 202 at once, the call later, its response to X-Callback-Url."""

    def __init__(
        self, fleet: Fleet, url: str, session: aiohttp.ClientSession, on_event: OnEvent, policy: CallbackPolicy
    ) -> None:
        self._fleet = fleet
        self._url = url
        self._session = session
        self._on_event = on_event
        self._policy = policy
        self._callbacks = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=WORKERS, resolver=PermittedResolver(policy), use_dns_cache=False),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        )
        self._waiting: asyncio.Queue[_QueuedCall] = asyncio.Queue(MAX_WAITING)
        self._workers = [asyncio.create_task(self._work(), name=f"queue worker {i}") for i in range(WORKERS)]

    async def handle(self, request: web.Request) -> web.Response:
        """Queue a call and respond 202.

        Raises:
            RequestMalformed: X-Callback-Url is no URL or not permitted, or a header is not UTF-8.
        """
        name, rest = split(request.raw_path)
        supervisor = self._fleet.get(name)
        if supervisor is None:
            return web.Response(status=404, text=f"error finding function {name}: it is not deployed here")
        for header, value in request.headers.items():
            if not is_text(value):
                raise RequestMalformed(f"the header {header} is not UTF-8, which the queue keeps headers as")
        callback = request.headers.get("X-Callback-Url", "").strip()
        url = await self._policy.check(callback) if callback else None
        body = await request.content.read(MAX_BODY_BYTES + 1) if request.body_exists else b""
        while len(body) <= MAX_BODY_BYTES and (more := await request.content.read(MAX_BODY_BYTES + 1 - len(body))):
            body += more
        if len(body) > MAX_BODY_BYTES:
            return web.Response(
                status=413,
                text=f"the queue takes bodies up to {MAX_BODY_BYTES} bytes, as OpenFaaS CE's does; send a reference",
            )
        call_id = request.headers.get("X-Call-Id") or str(uuid.uuid4())
        headers = end_to_end(request.headers, _NOT_IN_CALLS)
        headers["X-Call-Id"] = call_id
        try:
            self._waiting.put_nowait(_QueuedCall(call_id, supervisor.name, rest, headers, body, url))
        except asyncio.QueueFull:
            return web.Response(status=429, text="the queue is full", headers={"Retry-After": "1"})
        return web.Response(status=202, headers={"X-Call-Id": call_id, "X-Start-Time": str(time.time_ns())})

    async def close(self) -> None:
        """Stop the workers; queued calls are lost, as the queue lives in memory."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self._callbacks.close()

    async def _work(self) -> None:
        while True:
            call = await self._waiting.get()
            try:
                failure = await self._serve(call)
            except Exception as e:  # a worker survives every call: without workers, queued calls would wait for ever
                failure = f"{type(e).__name__}: {e}"
            if failure:
                self._on_event(Event("failed", f"async call {call.id}: {failure}", call.function))

    async def _serve(self, call: _QueuedCall) -> str:
        """Call the function, then send its response to the callback; the reason of a failure, else empty."""
        started = time.perf_counter()
        # Through the gateway's own listener, so that the call is proxied and counted as others are.
        target = URL(f"{self._url}/function/{call.function}{call.path}", encoded=True)
        result = await _post(self._session, target, call.headers, call.body, timeout_s=CALL_TIMEOUT_S)
        if call.callback is None:
            return f"the function answered {result.status}" if result.status >= 400 else ""
        headers = end_to_end(result.headers, _NOT_IN_CALLBACKS)
        headers.setdefault("Content-Type", "application/octet-stream")
        headers.setdefault("X-Duration-Seconds", f"{time.perf_counter() - started:.6f}")
        headers["X-Call-Id"] = call.id
        headers["X-Function-Name"] = call.function
        headers["X-Function-Status"] = str(result.status)
        delivery = await _post(self._callbacks, call.callback, headers, result.body, timeout_s=CALLBACK_TIMEOUT_S)
        return f"its callback answered {delivery.status}" if delivery.status >= 400 else ""


class _ResultTooLong(Exception):
    """A response above _MAX_RESULT_BYTES."""


class _HttpResponse(NamedTuple):
    """Response to a POST; without a response, 502 without headers."""

    status: int = 502
    headers: CIMultiDict[str] = CIMultiDict()
    body: bytes = b""


async def _post(
    session: aiohttp.ClientSession, url: URL, headers: CIMultiDict[str], body: bytes, *, timeout_s: float
) -> _HttpResponse:
    """POST with retries on 429, 503 and broken connections, at most ATTEMPTS in all; a timeout is not retried.

    Redirects are not followed: a redirect could lead to an address that the policy refuses.
    """
    answer = _HttpResponse()
    for attempt in range(ATTEMPTS):
        wait_s = min(_MAX_WAIT_S, 0.2 * 2**attempt)
        try:
            async with session.post(
                url,
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as reply:
                answer = _HttpResponse(reply.status, CIMultiDict(reply.headers), await _bounded(reply))
        except TimeoutError:
            return answer
        except _ResultTooLong:
            return _HttpResponse()
        except (aiohttp.ClientError, OSError):
            pass
        else:
            if answer.status not in (429, 503):
                return answer
            retry_after_s = retry_after_seconds(answer.headers.get("Retry-After", ""))
            wait_s = wait_s if retry_after_s is None else min(_MAX_WAIT_S, retry_after_s)
        if attempt < ATTEMPTS - 1:
            await asyncio.sleep(wait_s)
    return answer


async def _bounded(reply: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in reply.content.iter_any():
        size += len(piece)
        if size > _MAX_RESULT_BYTES:
            raise _ResultTooLong
        pieces.append(piece)
    return b"".join(pieces)
