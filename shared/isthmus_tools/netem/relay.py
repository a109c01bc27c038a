"""TCP relay of one connection, delayed and shaped, with no more bytes buffered than the emulated link would hold."""

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

from isthmus_tools.netem.shaping import INITIAL_WINDOW, Flow, LinkShape, Shaper, SlowStartWindow

MAX_BUFFERED_BYTES = 128 << 10  # of one direction of a connection, beyond the bandwidth-delay product
SOCKET_BUFFER = 64 << 10  # bytes; the kernel doubles the value
_CATCH_UP_S = 0.05  # a machine that slept longer than this has lost the bandwidth
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER with timeout 0: close sends a reset


class NetworkState(Protocol):
    """Current shape and stalls of a network."""

    shape: LinkShape

    async def wait_unstalled(self) -> bool:
        """Return once the network is not stalled; true if that took waiting."""
        ...


class PreciseSelector(selectors.DefaultSelector):
    """Default selector with a resolution of 0.1 ms: epoll rounds timeouts up to milliseconds, select(2) does not."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0 and isinstance(self, getattr(selectors, "EpollSelector", ())):
            with contextlib.suppress(ValueError):  # a descriptor above FD_SETSIZE: milliseconds then
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
        return list(super().select(timeout))


class PeerReset(Exception):
    """A reset has reached the far end of a relay."""


@dataclass(frozen=True)
class _Transit:
    """Bytes on the emulated wire; `ends` marks the end of the stream or a reset."""

    arrival: float
    data: bytes
    ends: type[PeerReset] | type[EOFError] | None = None


class _OneWayRelay:
    """One direction of a connection: bytes are read, shaped, buffered for their delay, and written."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        shaper: Shaper,
        back: Shaper,
        network: NetworkState,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source, self._sink, self._network, self._back = source, sink, network, back
        self._flow, self._window = Flow(shaper), SlowStartWindow()
        self._on_bytes = on_bytes
        self._transits: deque[_Transit] = deque()
        self._appended, self._delivered = asyncio.Event(), asyncio.Event()
        self.buffered_bytes = 0
        self.ended = False

    async def read(self, opens_at: float) -> None:
        """Read from the source at the shaped rate, from `opens_at` until the end of the stream."""
        due = opens_at
        while True:
            await self._sleep_until(due)
            if await self._network.wait_unstalled() or await self._wait_for_room():
                due = self._loop.time()
            shape, quantum = self._network.shape, self._flow.shaper.direction.quantum
            if shape.slow_start:
                quantum = min(quantum, INITIAL_WINDOW)
            try:
                data, due = await self._receive(quantum, due)
            except OSError:
                self.reset()
                return
            if not data:
                self._append(_Transit(self._flow.arrive(due), b"", EOFError))
                return
            if shape.slow_start:
                due = self._window.may_send(due, len(data), shape.round_trip_s)
                await self._sleep_until(due)
            due, arrival = self._flow.send(due, len(data))
            if shape.slow_start:
                self._window.on_sent(len(data), arrival + self._back.direction.delay_s)
            self._on_bytes(len(data))
            self._append(_Transit(arrival, data))

    async def write(self, reset_opposite: Callable[[], None]) -> None:
        """Write bytes to the sink at their arrival, until the end of the stream has arrived.

        Raises:
            PeerReset: a reset has arrived.
        """
        broken = False  # the sink has failed; bytes in transit are dropped at their arrival
        while True:
            while not self._transits:
                self._appended.clear()
                await self._appended.wait()
            await self._sleep_until(self._transits[0].arrival)
            await self._network.wait_unstalled()
            transit = self._transits[0]
            if transit.ends is PeerReset:
                raise PeerReset
            try:
                if transit.ends is EOFError:
                    self.ended = True
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                if not broken:
                    await self._loop.sock_sendall(self._sink, transit.data)
            except OSError:
                # The reset travels back behind bytes already in transit, e.g. the text of a refusal.
                broken = True
                reset_opposite()
                if self.ended:
                    return
            self._transits.popleft()
            self.buffered_bytes -= len(transit.data)
            self._delivered.set()

    def reset(self) -> None:
        """Send a reset to the far end, behind the bytes in transit.

        Raises:
            PeerReset: the far end is closed already.
        """
        if self.ended:
            raise PeerReset
        self._append(_Transit(self._flow.arrive(self._loop.time()), b"", PeerReset))

    async def _receive(self, quantum: int, due: float) -> tuple[bytes, float]:
        """Bytes of the source, and the time from which they could be sent."""
        try:
            data = self._source.recv(quantum)
            # Bytes that were waiting could be sent at `due`, however late this task wakes.
            return data, max(due, self._loop.time() - _CATCH_UP_S)
        except BlockingIOError:
            return await self._loop.sock_recv(self._source, quantum), self._loop.time()

    async def _wait_for_room(self) -> bool:
        """Wait until the buffer is below its bound; true if that took waiting."""
        waited = False
        while self.buffered_bytes > self._flow.shaper.direction.in_flight + MAX_BUFFERED_BYTES:
            waited = True
            self._delivered.clear()
            await self._delivered.wait()
        return waited

    def _append(self, transit: _Transit) -> None:
        self._transits.append(transit)
        self.buffered_bytes += len(transit.data)
        self._appended.set()

    async def _sleep_until(self, moment: float) -> None:
        while (remaining_s := moment - self._loop.time()) > 0:
            await asyncio.sleep(remaining_s)


class RelayedConnection:
    """A client's connection, the relay's own to the target, and a one-way relay in each direction.

    `on_bytes` receives the numbers of bytes sent up and down.
    """

    def __init__(
        self,
        client: socket.socket,
        network: NetworkState,
        shapers: tuple[Shaper, Shaper],
        on_bytes: Callable[[int, int], None],
    ) -> None:
        self._client = client
        self._network, self._shapers, self._on_bytes = network, shapers, on_bytes
        self.relays: tuple[_OneWayRelay, ...] = ()

    @property
    def buffered_bytes(self) -> int:
        """Bytes read from one end and not yet written to the other."""
        return sum(relay.buffered_bytes for relay in self.relays)

    async def run(self, family: socket.AddressFamily, address: tuple[object, ...]) -> None:
        """Relay until both streams have ended; on cancellation both ends are reset."""
        loop, shape = asyncio.get_running_loop(), self._network.shape
        opens_at = loop.time() + shape.connect_rtts * shape.round_trip_s
        server, clean = socket.socket(family, socket.SOCK_STREAM), False
        try:
            configure(self._client)
            configure(server)
            try:
                await loop.sock_connect(server, address)
            except OSError:
                await asyncio.sleep(opens_at - loop.time())
                return
            await self._relay(server, opens_at, opens_at + (shape.up.delay_s if shape.connect_rtts else 0.0))
            clean = True
        # Both directions may meet a reset, and the task group raises them together.
        except* PeerReset:
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
        up_shaper, down_shaper = self._shapers
        up = _OneWayRelay(self._client, server, up_shaper, down_shaper, self._network, lambda n: self._on_bytes(n, 0))
        down = _OneWayRelay(server, self._client, down_shaper, up_shaper, self._network, lambda n: self._on_bytes(0, n))
        self.relays = (up, down)
        async with asyncio.TaskGroup() as group:
            for work in (up.read(up_at), up.write(down.reset), down.read(down_at), down.write(up.reset)):
                group.create_task(work)


def configure(end: socket.socket) -> None:
    """Make a socket non-blocking, without Nagle's algorithm, and with small kernel buffers."""
    end.setblocking(False)
    bound_buffers(end)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bound_buffers(end: socket.socket) -> None:
    """Bound the kernel's buffers, so that the sender's backpressure comes from the emulated link."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)


def _abort(end: socket.socket) -> None:
    if end.fileno() >= 0:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        end.close()
