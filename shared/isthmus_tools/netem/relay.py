"""Moves the bytes of one connection as a link's pacing says, holding no more of them than the link would."""

from __future__ import annotations

import asyncio
import contextlib
import select
import selectors
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from isthmus_tools.netem.pacing import FIRST_WINDOW, Flow, Lane, LinkShape, Window

SPARE_BYTES = 128 << 10  # of one way of a connection, beyond what the link has in flight
SOCKET_BUFFER = 64 << 10  # the kernel doubles it
_CATCH_UP_S = 0.05  # a machine that slept longer than this has lost the bandwidth
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset


class Conditions(Protocol):
    """What holds on a link now."""

    shape: LinkShape

    async def passing(self) -> bool:
        """Return once the link is not stalled; whether it was."""
        ...


class PreciseSelector(selectors.DefaultSelector):
    """The default selector, waking within 0.1 ms: epoll counts milliseconds and rounds them up, select does not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0 and isinstance(self, getattr(selectors, "EpollSelector", ())):
            with contextlib.suppress(ValueError):  # a descriptor beyond what select can take: milliseconds, then
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
        return list(super().select(timeout))


class Reset(Exception):
    """The connection ends without a goodbye."""


@dataclass(frozen=True)
class _Parcel:
    arrival: float
    data: bytes
    ends: type[Reset] | type[EOFError] | None = None


class _Pipe:
    """One way of one connection: read, paced, held while it travels, written."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        lane: Lane,
        back: Lane,
        link: Conditions,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source, self._sink, self._link, self._back = source, sink, link, back
        self._flow, self._window = Flow(lane), Window()
        self._on_bytes = on_bytes
        self._parcels: deque[_Parcel] = deque()
        self._sent, self._taken = asyncio.Event(), asyncio.Event()
        self.held = 0
        self.ended = False

    async def read(self, opens_at: float) -> None:
        """Take bytes in at the link's rate, from `opens_at` on, until the sender ends."""
        due = opens_at
        while True:
            await self._until(due)
            if await self._link.passing() or await self._room():
                due = self._loop.time()
            shape, quantum = self._link.shape, self._flow.lane.way.quantum
            if shape.slow_start:
                quantum = min(quantum, FIRST_WINDOW)
            try:
                data, due = await self._take(quantum, due)
            except OSError:
                self.reset()
                return
            if not data:
                self._put(_Parcel(self._flow.arrive(due), b"", EOFError))
                return
            if shape.slow_start:
                due = self._window.may_send(due, len(data), shape.round_trip_s)
                await self._until(due)
            due, arrival = self._flow.send(due, len(data))
            if shape.slow_start:
                self._window.sent(len(data), arrival + self._back.way.delay_s)
            self._on_bytes(len(data))
            self._put(_Parcel(arrival, data))

    async def write(self, reset_other_way: Callable[[], None]) -> None:
        """Give bytes out when they arrive, until the end has arrived.

        Raises:
            Reset: a reset has arrived.
        """
        broken = False
        while True:
            while not self._parcels:
                self._sent.clear()
                await self._sent.wait()
            await self._until(self._parcels[0].arrival)
            await self._link.passing()
            parcel = self._parcels[0]
            if parcel.ends is Reset:
                raise Reset
            try:
                if parcel.ends is EOFError:
                    self.ended = True
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                if not broken:
                    await self._loop.sock_sendall(self._sink, parcel.data)
            except OSError:
                # The news has to travel back behind what is already under way, such as a refusal's text.
                broken = True
                reset_other_way()
                if self.ended:
                    return
            self._parcels.popleft()
            self.held -= len(parcel.data)
            self._taken.set()

    def reset(self) -> None:
        """Let a reset travel to this pipe's end, behind what is on its way.

        Raises:
            Reset: its end is closed already.
        """
        if self.ended:
            raise Reset
        self._put(_Parcel(self._flow.arrive(self._loop.time()), b"", Reset))

    async def _take(self, quantum: int, due: float) -> tuple[bytes, float]:
        """Bytes, and since when they could go: what had been waiting could at `due`, however late that is noticed."""
        try:
            data = self._source.recv(quantum)
            return data, max(due, self._loop.time() - _CATCH_UP_S)
        except BlockingIOError:
            return await self._loop.sock_recv(self._source, quantum), self._loop.time()

    async def _room(self) -> bool:
        """Return once this pipe holds less than the link and SPARE_BYTES; whether that took waiting."""
        waited = False
        while self.held > self._flow.lane.way.in_flight + SPARE_BYTES:
            waited = True
            self._taken.clear()
            await self._taken.wait()
        return waited

    def _put(self, parcel: _Parcel) -> None:
        self._parcels.append(parcel)
        self.held += len(parcel.data)
        self._sent.set()

    async def _until(self, moment: float) -> None:
        while (left := moment - self._loop.time()) > 0:
            await asyncio.sleep(left)


class Connection:
    """A client, its own connection to the target, and the two pipes between."""

    def __init__(
        self,
        client: socket.socket,
        link: Conditions,
        lanes: tuple[Lane, Lane],
        on_bytes: Callable[[int, int], None],
    ) -> None:
        """`on_bytes` is told how many went up and down."""
        self._client = client
        self._link, self._lanes, self._on_bytes = link, lanes, on_bytes
        self.pipes: tuple[_Pipe, ...] = ()

    @property
    def held(self) -> int:
        """Bytes that were taken from one end and not yet given to the other."""
        return sum(pipe.held for pipe in self.pipes)

    async def run(self, family: socket.AddressFamily, address: tuple[object, ...]) -> None:
        """Relay until both ends are done; cancelled, both are reset."""
        loop, shape = asyncio.get_running_loop(), self._link.shape
        opens_at = loop.time() + shape.connect_rtts * shape.round_trip_s
        server, clean = socket.socket(family, socket.SOCK_STREAM), False
        try:
            tune(self._client)
            tune(server)
            try:
                await loop.sock_connect(server, address)
            except OSError:
                await asyncio.sleep(opens_at - loop.time())
                return
            await self._relay(server, opens_at, opens_at + (shape.up.delay_s if shape.connect_rtts else 0.0))
            clean = True
        except* Reset:
            pass
        finally:
            for end in (self._client, server):
                if clean:
                    end.close()
                else:
                    _abort(end)

    def abort(self) -> None:
        """Reset the client, if it is still connected."""
        _abort(self._client)

    async def _relay(self, server: socket.socket, up_at: float, down_at: float) -> None:
        up_lane, down_lane = self._lanes
        up = _Pipe(self._client, server, up_lane, down_lane, self._link, lambda n: self._on_bytes(n, 0))
        down = _Pipe(server, self._client, down_lane, up_lane, self._link, lambda n: self._on_bytes(0, n))
        self.pipes = (up, down)
        async with asyncio.TaskGroup() as group:
            for work in (up.read(up_at), up.write(down.reset), down.read(down_at), down.write(up.reset)):
                group.create_task(work)


def tune(end: socket.socket) -> None:
    """No waiting to fill packets, and little room in the kernel, so that a sender feels the link and not a buffer."""
    end.setblocking(False)
    bound_buffers(end)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bound_buffers(end: socket.socket) -> None:
    """Set what the kernel holds for it each way."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)


def _abort(end: socket.socket) -> None:
    if end.fileno() >= 0:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        end.close()
