"""Sockets in the event loop, without asyncio's transports: those copy what a proxy only passes on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Callable

KEPT_IDLE_S = 30.0
"""A function's server closes an idle connection after 120 s; one that is about to be closed must not be used."""

_MOST_IDLE = 64
_RESET = struct.pack("ii", 1, 0)
Buffer = bytes | bytearray | memoryview
Address = tuple[str, int]


def nothing() -> None:
    """What is called where nobody listens."""


class Wire:
    """A connected or connecting socket; `on_readable` is called while it has something to read, its end included.

    What fails while sending is dropped: whoever reads from it learns that it has ended.
    """

    __slots__ = ("_connecting", "_loop", "_out", "_reading", "on_drained", "on_readable", "sock", "used_at")

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, *, connecting: bool = False) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.on_readable: Callable[[], None] = nothing
        self.on_drained: Callable[[], None] = nothing
        self.used_at = 0.0
        self._loop = loop
        self._out = bytearray()
        self._reading = False
        self._connecting = connecting
        if connecting:
            loop.add_writer(sock, self._writable)
        else:
            self.resume()

    @property
    def backlog(self) -> int:
        """Bytes that were sent and that the kernel has not taken yet."""
        return len(self._out)

    @property
    def connecting(self) -> bool:
        """Whether it is still being connected."""
        return self._connecting

    def send(self, *parts: Buffer) -> None:
        """Send `parts` in order; what the kernel does not take is copied and follows, then `on_drained` is called."""
        if self._connecting or self._out:
            for part in parts:
                self._out += part
            return
        try:
            sent = self.sock.sendmsg(parts)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                self._out += memoryview(part)[sent:]
                sent = 0
        if self._out:
            self._loop.add_writer(self.sock, self._writable)

    def receive(self, into: Buffer) -> int:
        """How many bytes came; 0 where no more will, -1 where none are here yet."""
        try:
            return self.sock.recv_into(into)
        except (BlockingIOError, InterruptedError):
            return -1
        except OSError:
            return 0

    def waits(self) -> bool:
        """Whether nothing came that is not read yet, the end included."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def pause(self) -> None:
        """Call `on_readable` no more."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self.sock)

    def resume(self) -> None:
        """Call `on_readable` again."""
        if not self._reading and self.sock.fileno() >= 0:
            self._reading = True
            self._loop.add_reader(self.sock, self._readable)

    def when_writable(self, then: Callable[[], None]) -> None:
        """Call `then` once, when the kernel takes bytes again."""

        def writable() -> None:
            self._loop.remove_writer(self.sock)
            then()

        self._loop.add_writer(self.sock, writable)

    def finish(self) -> None:
        """Tell the other side, once it has everything, that nothing more comes."""
        if self._out:
            self.on_drained = self.finish
            return
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End the connection now."""
        if self.sock.fileno() >= 0:
            self.detach().close()

    def abort(self) -> None:
        """End the connection such that the other side sees that something is missing."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close()

    def detach(self) -> socket.socket:
        """Its socket, from now on somebody else's."""
        self.pause()
        self._loop.remove_writer(self.sock)
        self._out.clear()
        self.on_readable = self.on_drained = nothing
        return self.sock

    def _readable(self) -> None:
        self.on_readable()

    def _writable(self) -> None:
        if self._connecting:
            self._connecting = False
            self.resume()  # a refused connection reads as ended
        try:
            if self._out:
                del self._out[: self.sock.send(self._out)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._out.clear()
        if not self._out:
            self._loop.remove_writer(self.sock)
            drained, self.on_drained = self.on_drained, nothing
            drained()


class Pool:
    """Kept-alive wires to functions, by address."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: dict[Address, list[Wire]] = {}

    def take(self, address: Address) -> Wire:
        """A wire to `address` that waits for a request; it may still be connecting.

        Raises:
            OSError: it cannot be made.
        """
        idle = self._idle.get(address)
        while idle:
            wire = idle.pop()
            if time.monotonic() - wire.used_at < KEPT_IDLE_S and wire.waits():
                return wire
            wire.close()
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connecting = False
            try:
                sock.connect(address)
            except BlockingIOError:
                connecting = True
            return Wire(self._loop, sock, connecting=connecting)
        except OSError:
            sock.close()
            raise

    def put(self, address: Address, wire: Wire) -> None:
        """Keep `wire`, whose last answer is complete, for another request."""
        idle = self._idle.setdefault(address, [])
        if wire.backlog or len(idle) >= _MOST_IDLE:
            wire.close()
            return
        wire.used_at = time.monotonic()
        wire.resume()
        wire.on_drained = nothing

        def ended() -> None:
            # Nothing was asked: this is its end, or something that nobody wants.
            with contextlib.suppress(ValueError):
                idle.remove(wire)
            if not idle:
                self._idle.pop(address, None)
            wire.close()

        wire.on_readable = ended
        idle.append(wire)

    def close(self) -> None:
        """Close all of them."""
        for idle in list(self._idle.values()):
            for wire in list(idle):
                wire.close()
        self._idle.clear()
