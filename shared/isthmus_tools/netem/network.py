"""What holds on a link from moment to moment, and the connections on it. All of it lives in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from isthmus.errors import LocalError
from isthmus_tools.netem.pacing import Lane, LinkShape
from isthmus_tools.netem.relay import Connection, bound_buffers
from isthmus_tools.netem.script import Step

HOST = "127.0.0.1"
_BACKLOG = 1024
_CUTS_EVERY_S = 0.05
_NO_DESCRIPTORS_WAIT_S = 0.1


@dataclass(frozen=True)
class LinkCounters:
    """What went through a link: payload bytes each way, connections in all and open now, bytes held, resets made."""

    bytes_up: int = 0
    bytes_down: int = 0
    connections: int = 0
    open: int = 0
    held_bytes: int = 0
    cuts: int = 0


class Network:
    """A link's shape, its faults, and its connections."""

    def __init__(self, shape: LinkShape, script: Sequence[Step], chance: random.Random) -> None:
        self.shape = shape
        self._script = tuple(script)
        self._chance = chance
        self._lanes = (Lane(shape.up, chance), Lane(shape.down, chance))
        self._open: dict[asyncio.Task[None], Connection] = {}
        self._listener: socket.socket | None = None
        self._stalled_until = -math.inf
        self._resumed = asyncio.Event()
        self._bytes_up = self._bytes_down = self._connections = self._cuts = 0
        self._port = 0

    @contextlib.asynccontextmanager
    async def relaying(
        self, port: int, family: socket.AddressFamily, address: tuple[object, ...]
    ) -> AsyncIterator[int]:
        """Listen and relay to `address` while the block lasts; the port.

        Raises:
            LocalError: the port is taken.
        """
        self._family, self._address = family, address
        with contextlib.ExitStack() as leaving:
            if sys.platform == "linux":  # it keeps the port ours while nothing listens; elsewhere only one may be bound
                port = leaving.enter_context(contextlib.closing(_bind(port))).getsockname()[1]
            self._listen(port)
            works = [asyncio.create_task(self._play()), asyncio.create_task(self._cut_by_chance())]
            try:
                yield self._port
            finally:
                self.refuse(True)
                ending = [*works, *self._open]
                for task in ending:
                    task.cancel()
                await asyncio.gather(*ending, return_exceptions=True)

    async def passing(self) -> bool:
        """Return once the link is not stalled; whether it was."""
        loop, waited = asyncio.get_running_loop(), False
        while (left := self._stalled_until - loop.time()) > 0:
            waited = True
            self._resumed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._resumed.wait(), left)
        return waited

    def counters(self) -> LinkCounters:
        """What went through so far."""
        held = sum(connection.held for connection in self._open.values())
        return LinkCounters(self._bytes_up, self._bytes_down, self._connections, len(self._open), held, self._cuts)

    def set(self, shape: LinkShape) -> None:
        """Be of this shape from now on."""
        self.shape = shape
        for lane, way in zip(self._lanes, (shape.up, shape.down), strict=True):
            lane.way = way

    def cut(self) -> None:
        """Reset every established connection."""
        for task in list(self._open):
            self._cut(task)

    def stall(self, seconds: float) -> None:
        """Let nothing pass for that long from now."""
        self._stalled_until = asyncio.get_running_loop().time() + seconds
        self._resumed.set()

    def refuse(self, refuse: bool) -> None:
        """Refuse new connections, or take them again."""
        if not refuse:
            if self._listener is None:
                self._listen(self._port)
        elif self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def down(self) -> None:
        """Refuse what is new, reset what is established."""
        self.refuse(True)
        self.cut()

    def up(self) -> None:
        """Neither refuse nor stall."""
        self.refuse(False)
        self.stall(0)

    def _listen(self, port: int) -> None:
        self._listener = _bind(port)
        self._port = self._listener.getsockname()[1]
        try:
            self._listener.listen(_BACKLOG)
        except OSError as e:
            self._listener.close()
            raise _taken(port, e) from e
        self._accept_from(self._listener)

    def _accept_from(self, listener: socket.socket) -> None:
        if listener is self._listener:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # out of descriptors: asking again at once would keep this loop busy
            loop.remove_reader(listener)
            loop.call_later(_NO_DESCRIPTORS_WAIT_S, self._accept_from, listener)
            return
        connection = Connection(client, self, self._lanes, self._count)
        task = loop.create_task(connection.run(self._family, self._address))
        self._connections += 1
        self._open[task] = connection
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._open.pop(task).abort()  # a task that was cancelled before it began has closed nothing

    def _count(self, up: int, down: int) -> None:
        self._bytes_up += up
        self._bytes_down += down

    def _cut(self, task: asyncio.Task[None]) -> None:
        self._cuts += 1
        task.cancel()

    async def _cut_by_chance(self) -> None:
        while True:
            await asyncio.sleep(_CUTS_EVERY_S)
            if self.shape.cuts_per_s:
                likely = -math.expm1(-self.shape.cuts_per_s * _CUTS_EVERY_S)
                for task in [t for t in self._open if self._chance.random() < likely]:
                    self._cut(task)

    async def _play(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for step in self._script:
            while (left := began + step.at_s - loop.time()) > 0:
                await asyncio.sleep(left)
            self._apply(step)

    def _apply(self, step: Step) -> None:
        if step.shape:
            self.set(replace(self.shape, **step.shape))
        if step.down is not None:
            (self.down if step.down else self.up)()
        if step.refuse is not None:
            self.refuse(step.refuse)
        if step.stall_s:
            self.stall(step.stall_s)
        if step.cut:
            self.cut()


def _bind(port: int) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound_buffers(bound)  # before listening: the handshake settles the window's scale
        bound.setblocking(False)
        bound.bind((HOST, port))
    except (OSError, OverflowError) as e:
        bound.close()
        raise _taken(port, e) from e
    return bound


def _taken(port: int, error: Exception) -> LocalError:
    return LocalError(
        f"cannot listen on {HOST}:{port}: {getattr(error, 'strerror', None) or error}",
        hint=f"something else listens there (see: ss -ltnp 'sport = :{port}'); choose another with --port",
        port=port,
    )
