"""Calls that are answered later: a bounded queue in memory, workers, and callbacks.

Like OpenFaaS CE's: bodies up to 256,000 bytes, at least one try, and again while the function says 429 or 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from isthmus.local.events import Event, OnEvent
from isthmus.local.fleet import Fleet
from isthmus.local.proxy import split

MAX_BODY_BYTES = 256_000
MAX_WAITING = 256
WORKERS = 4
ATTEMPTS = 5
CALL_TIMEOUT_S = 60.0
_MAX_RESULT_BYTES = 64 << 20
_LONGEST_WAIT_S = 10.0
_DROPPED = frozenset({"x-callback-url", "authorization", "host", "content-length", "transfer-encoding", "connection"})


@dataclass(frozen=True)
class _Call:
    id: str
    function: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    callback: str


class AsyncQueue:
    """POST /async-function/NAME: 202 at once, the call later, its result to X-Callback-Url."""

    def __init__(self, fleet: Fleet, url: str, session: aiohttp.ClientSession, on_event: OnEvent) -> None:
        self._fleet = fleet
        self._url = url
        self._session = session
        self._on_event = on_event
        self._waiting: asyncio.Queue[_Call] = asyncio.Queue(MAX_WAITING)
        self._workers = [asyncio.create_task(self._work(), name=f"queue worker {i}") for i in range(WORKERS)]

    async def handle(self, request: web.Request) -> web.Response:
        """Accept one call."""
        name, rest = split(request.raw_path)
        supervisor = self._fleet.get(name)
        if supervisor is None:
            return web.Response(status=404, text=f"error finding function {name}: it is not deployed here")
        callback = request.headers.get("X-Callback-Url", "")
        if callback and URL(callback).scheme not in ("http", "https"):
            return web.Response(status=400, text="X-Callback-Url must be an http or https URL")
        body = await request.content.read(MAX_BODY_BYTES + 1) if request.body_exists else b""
        while len(body) <= MAX_BODY_BYTES and (more := await request.content.read(MAX_BODY_BYTES + 1 - len(body))):
            body += more
        if len(body) > MAX_BODY_BYTES:
            return web.Response(
                status=413,
                text=f"the queue takes bodies up to {MAX_BODY_BYTES} bytes, as OpenFaaS CE's does; send a reference",
            )
        call_id = request.headers.get("X-Call-Id") or str(uuid.uuid4())
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED} | {"X-Call-Id": call_id}
        try:
            self._waiting.put_nowait(
                _Call(call_id, supervisor.name, rest, headers, body, self._fleet.resolve(callback))
            )
        except asyncio.QueueFull:
            return web.Response(status=429, text="the queue is full", headers={"Retry-After": "1"})
        return web.Response(status=202, headers={"X-Call-Id": call_id, "X-Start-Time": str(time.time_ns())})

    async def close(self) -> None:
        """Stop; calls that wait are lost with the process, as the queue lives in memory."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            call = await self._waiting.get()
            started = time.perf_counter()
            status, headers, body = await self._call(call)
            if call.callback:
                told = {
                    "Content-Type": headers.get("Content-Type", "application/octet-stream"),
                    "X-Call-Id": call.id,
                    "X-Function-Name": call.function,
                    "X-Function-Status": str(status),
                    "X-Duration-Seconds": f"{time.perf_counter() - started:.6f}",
                }
                status, _, _ = await self._post(call.callback, told, body)
            if status >= 400:
                what = "its callback" if call.callback else "the function"
                self._on_event(Event("failed", f"async call {call.id}: {what} answered {status}", call.function))

    async def _call(self, call: _Call) -> tuple[int, Mapping[str, str], bytes]:
        # Through the gateway's own door, so that it is proxied and counted like any other call.
        return await self._post(f"{self._url}/function/{call.function}{call.path}", call.headers, call.body)

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """POST until the answer is not 429, 503 or none, at most ATTEMPTS times."""
        status, answer, got = 502, CIMultiDict[str](), b""
        for attempt in range(ATTEMPTS):
            wait_s = min(_LONGEST_WAIT_S, 0.2 * 2**attempt)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self._session.post(
                    URL(url, encoded=True),
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S),
                ) as reply:
                    status, answer = reply.status, CIMultiDict(reply.headers)
                    got = await _bounded(reply)
                if status not in (429, 503):
                    break
                asked = answer.get("Retry-After", "")
                wait_s = min(_LONGEST_WAIT_S, float(asked)) if asked.isdigit() else wait_s
            if attempt < ATTEMPTS - 1:
                await asyncio.sleep(wait_s)
        return status, answer, got


async def _bounded(reply: aiohttp.ClientResponse) -> bytes:
    pieces, size = [], 0
    async for piece in reply.content.iter_any():
        size += len(piece)
        if size > _MAX_RESULT_BYTES:
            raise aiohttp.ClientPayloadError(f"a result of more than {_MAX_RESULT_BYTES} bytes")
        pieces.append(piece)
    return b"".join(pieces)
