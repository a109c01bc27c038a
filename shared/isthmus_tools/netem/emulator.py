"""Network emulator in user space: a TCP relay on this machine with the bandwidth, delay and faults of a network."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import math
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar
from urllib.parse import urlsplit

from isthmus.errors import LocalError
from isthmus.loop_thread import LoopThread
from isthmus_tools.netem.relay import PreciseSelector, RelayedConnection, bound_buffers
from isthmus_tools.netem.script import ScriptStep
from isthmus_tools.netem.shaping import LinkShape, Shaper

HOST = "127.0.0.1"
_BACKLOG = 1024
_RANDOM_CUT_INTERVAL_S = 0.05  # resolution of the exponential distribution of cuts
_NO_DESCRIPTORS_WAIT_S = 0.1  # for other connections to close
_T = TypeVar("_T")


@dataclass(frozen=True)
class LinkCounters:
    """Totals of a network: payload bytes by direction, connections in all and open, bytes buffered, resets."""

    bytes_up: int = 0
    bytes_down: int = 0
    connections: int = 0
    open: int = 0
    held_bytes: int = 0
    cuts: int = 0


class NetworkEmulator(LoopThread[int]):
    """An emulated network between clients on this machine and `target`, in a thread of its own; a context manager.

    `target` is HOST:PORT or an http URL. The emulator listens on 127.0.0.1 alone; port 0 takes a free port. `script`
    changes the network from its start on; `seed` makes jitter and random cuts reproducible. Threads of the same process
    that compute in Python delay the emulator: `isthmus link` is a process of its own.

    Raises:
        LocalError: `target` is no address.
    """

    def __init__(
        self,
        target: str,
        shape: LinkShape | None = None,
        *,
        port: int = 0,
        script: Sequence[ScriptStep] = (),
        seed: int = 0,
    ) -> None:
        self._family, self._address = _resolve(target)
        self._requested_port = port
        self._network = _EmulatedNetwork(shape or LinkShape(), script, random.Random(seed))  # noqa: S311
        self._port = 0
        super().__init__("link", self._relaying, lambda: asyncio.SelectorEventLoop(PreciseSelector()))

    def start(self) -> Self:
        """Take the port; once only.

        Raises:
            LocalError: the port is taken, or the emulator has been started before.
        """
        if self._thread is not None or self._stop_event is not None:
            raise LocalError("a link starts once")
        return super().start()

    @property
    def port(self) -> int:
        """Port of the listener."""
        return self._port

    @property
    def url(self) -> str:
        """URL of the listener, for a target that speaks HTTP."""
        return f"http://{HOST}:{self._port}"

    @property
    def shape(self) -> LinkShape:
        """Current shape."""
        return self._network.shape

    @property
    def counters(self) -> LinkCounters:
        """Totals so far; they remain after `stop`."""
        return self._network.counters() if self._thread is None else self._in_loop(self._network.counters)

    def set(self, shape: LinkShape) -> None:
        """Change the shape; bytes in transit keep their arrival."""
        self._in_loop(lambda: self._network.set(shape))

    def cut(self) -> None:
        """Reset every established connection."""
        self._in_loop(self._network.cut)

    def refuse(self, refuse: bool = True) -> None:
        """Refuse new connections, or accept them again; established connections live on."""
        self._in_loop(lambda: self._network.refuse(refuse))

    def stall(self, seconds: float) -> None:
        """Deliver nothing for `seconds`: bytes in transit wait, new connections stay silent."""
        self._in_loop(lambda: self._network.stall(seconds))

    def down(self) -> None:
        """Reset established connections and refuse new connections."""
        self._in_loop(self._network.down)

    def up(self) -> None:
        """End refusals and stalls."""
        self._in_loop(self._network.up)

    def _in_loop(self, call: Callable[[], _T]) -> _T:
        """Call in the emulator's thread, and return the result."""
        if self._thread is None or self._loop is None:
            raise LocalError("the link does not run")
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(call())
            # Every exception: the caller would wait for its result for good.
            except BaseException as e:
                future.set_exception(e)

        self._loop.call_soon_threadsafe(run)
        return future.result()

    @contextlib.asynccontextmanager
    async def _relaying(self) -> AsyncIterator[int]:
        async with self._network.relaying(self._requested_port, self._family, self._address) as self._port:
            # A relay to its own listener would accept its own connections without end.
            if self._address[:2] == (HOST, self._port):
                raise LocalError(f"the link would lead to itself: it listens on {HOST}:{self._port}", port=self._port)
            yield self._port


class _EmulatedNetwork:
    """Shape, faults and connections of a network; all of it runs in a single event loop."""

    def __init__(self, shape: LinkShape, script: Sequence[ScriptStep], rng: random.Random) -> None:
        self.shape = shape
        self._script = tuple(script)
        self._rng = rng
        self._shapers = (Shaper(shape.up, rng), Shaper(shape.down, rng))
        self._open: dict[asyncio.Task[None], RelayedConnection] = {}
        self._listener: socket.socket | None = None
        self._stalled_until = -math.inf
        self._stall_changed = asyncio.Event()
        self._bytes_up = self._bytes_down = self._connections = self._cuts = 0
        self._port = 0

    @contextlib.asynccontextmanager
    async def relaying(
        self, port: int, family: socket.AddressFamily, address: tuple[object, ...]
    ) -> AsyncIterator[int]:
        """Listen and relay to `address` within the block; yields the port.

        Raises:
            LocalError: the port is taken.
        """
        self._family, self._address = family, address
        with contextlib.ExitStack() as stack:
            # A bound socket reserves the port while connections are refused; only Linux allows a second one.
            if sys.platform == "linux":
                port = stack.enter_context(contextlib.closing(_bind(port))).getsockname()[1]
            self._listen(port)
            tasks = [asyncio.create_task(self._run_script()), asyncio.create_task(self._cut_at_random())]
            try:
                yield self._port
            finally:
                self.refuse(True)
                tasks += self._open
                for task in tasks:
                    task.cancel()
                # Cancelled tasks raise here, and their cancellation is no error of the block.
                await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_unstalled(self) -> bool:
        """See `NetworkState`."""
        loop, waited = asyncio.get_running_loop(), False
        while (remaining_s := self._stalled_until - loop.time()) > 0:
            waited = True
            self._stall_changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stall_changed.wait(), remaining_s)
        return waited

    def counters(self) -> LinkCounters:
        buffered = sum(connection.buffered_bytes for connection in self._open.values())
        return LinkCounters(self._bytes_up, self._bytes_down, self._connections, len(self._open), buffered, self._cuts)

    def set(self, shape: LinkShape) -> None:
        self.shape = shape
        for shaper, direction in zip(self._shapers, (shape.up, shape.down), strict=True):
            shaper.direction = direction

    def cut(self) -> None:
        for task in list(self._open):
            self._cut(task)

    def stall(self, seconds: float) -> None:
        self._stalled_until = asyncio.get_running_loop().time() + seconds
        self._stall_changed.set()

    def refuse(self, refuse: bool) -> None:
        if not refuse:
            if self._listener is None:
                self._listen(self._port)
        elif self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def down(self) -> None:
        self.refuse(True)
        self.cut()

    def up(self) -> None:
        self.refuse(False)
        self.stall(0)

    def _listen(self, port: int) -> None:
        self._listener = _bind(port)
        self._port = self._listener.getsockname()[1]
        try:
            self._listener.listen(_BACKLOG)
        except OSError as e:
            self._listener.close()
            raise _port_taken(port, e) from e
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
        except OSError:  # out of descriptors: retrying at once would keep this loop busy
            loop.remove_reader(listener)
            loop.call_later(_NO_DESCRIPTORS_WAIT_S, self._accept_from, listener)
            return
        connection = RelayedConnection(client, self, self._shapers, self._count)
        task = loop.create_task(connection.run(self._family, self._address))
        self._connections += 1
        self._open[task] = connection
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._open.pop(task).abort()  # a task cancelled before its first step has closed nothing

    def _count(self, up: int, down: int) -> None:
        self._bytes_up += up
        self._bytes_down += down

    def _cut(self, task: asyncio.Task[None]) -> None:
        self._cuts += 1
        task.cancel()

    async def _cut_at_random(self) -> None:
        while True:
            await asyncio.sleep(_RANDOM_CUT_INTERVAL_S)
            if self.shape.cuts_per_s:
                probability = -math.expm1(-self.shape.cuts_per_s * _RANDOM_CUT_INTERVAL_S)  # of a Poisson process
                for task in [t for t in self._open if self._rng.random() < probability]:
                    self._cut(task)

    async def _run_script(self) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        for step in self._script:
            while (remaining_s := start + step.at_s - loop.time()) > 0:
                await asyncio.sleep(remaining_s)
            self._apply(step)

    def _apply(self, step: ScriptStep) -> None:
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


def _resolve(target: str) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    if "://" not in target:
        target = f"//{target}"
    try:
        parts = urlsplit(target)
        host, port = parts.hostname, parts.port or (80 if parts.scheme == "http" else None)
    except ValueError:
        host = port = None
    if not host or port is None or parts.scheme not in ("", "http"):
        raise LocalError(
            f"{target.removeprefix('//')!r} is no address to link to", hint="it is HOST:PORT, such as 127.0.0.1:8080"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise LocalError(f"{host} is not known: {e.strerror or e}") from e
    return family, address


def _bind(port: int) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound_buffers(bound)  # before listening: the handshake settles the window scale
        bound.setblocking(False)
        bound.bind((HOST, port))
    except (OSError, OverflowError) as e:
        bound.close()
        raise _port_taken(port, e) from e
    return bound


def _port_taken(port: int, error: Exception) -> LocalError:
    return LocalError(
        f"cannot listen on {HOST}:{port}: {getattr(error, 'strerror', None) or error}",
        hint=f"something else listens there (see: ss -ltnp 'sport = :{port}'); choose another with --port",
        port=port,
    )
