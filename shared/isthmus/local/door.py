"""The gateway's listener: function calls go to the proxy, all else to aiohttp.

Function calls are what a gateway spends its time on; aiohttp, which has the rest, takes two to four times as long over
them. docs/local.md has the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate

from aiohttp import web

from isthmus.local.flow import FIRST_BYTES
from isthmus.local.heads import Header, NotHttp, RequestHead, split_head
from isthmus.local.wire import Wire, nothing

FUNCTION = b"/function/"
IDLE_S = 75.0
LINGER_S = 5.0
"""How long a caller may take to hear an answer that closes the connection, before it is closed on this side too."""

_SWEEP_S = 5.0
_NO_DESCRIPTORS_WAIT_S = 0.1
_log = logging.getLogger(__name__)


class Door:
    """Accepts on `listener` until `close`; `handle` gets a function call's head and what came with it."""

    def __init__(
        self,
        listener: socket.socket,
        server: web.Server,
        handle: Callable[[Caller, RequestHead, memoryview], None],
    ) -> None:
        listener.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.server = server
        self.handle = handle
        self.closing = False
        # One for all: what is read into it has left, or been copied, before anything else is read.
        self.scratch = memoryview(bytearray(FIRST_BYTES))
        self.callers: set[Caller] = set()
        self._listener = listener
        self._handing_over: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)
        self.loop.add_reader(listener, self._accept)

    async def close(self, drain_s: float) -> None:
        """Take no more calls, and wait at most `drain_s` seconds for those under way."""
        self.closing = True
        self._sweeper.cancel()
        self.loop.remove_reader(self._listener)
        for caller in [c for c in self.callers if not c.busy]:
            caller.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self.callers:
                    self._idle.clear()
                    await self._idle.wait()
        for caller in list(self.callers):
            caller.close()
        await asyncio.gather(*self._handing_over, return_exceptions=True)

    def left(self, caller: Caller) -> None:
        """Forget a caller whose connection is closed, or somebody else's."""
        self.callers.discard(caller)
        self._idle.set()

    def hand_over(self, sock: socket.socket, said: bytes) -> None:
        """Let aiohttp serve a connection on which `said` has come."""
        task = self.loop.create_task(self._hand_over(sock, said))
        self._handing_over.add(task)
        task.add_done_callback(self._handing_over.discard)

    async def _hand_over(self, sock: socket.socket, said: bytes) -> None:
        with contextlib.suppress(OSError):
            await self.loop.connect_accepted_socket(lambda: _First(self.server(), said), sock)

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as e:
                # As a rule there are no descriptors left; the next ones are waited for.
                _log.warning("cannot accept a connection: %s", e.strerror)
                self.loop.remove_reader(self._listener)
                self.loop.call_later(_NO_DESCRIPTORS_WAIT_S, self._accept_again)
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.callers.add(Caller(self, sock, str(peer[0]).encode("ascii", "replace")))

    def _accept_again(self) -> None:
        if not self.closing:
            self.loop.add_reader(self._listener, self._accept)

    def _sweep(self) -> None:
        now = time.monotonic()
        for caller in [c for c in self.callers if c.until is not None and c.until < now]:
            caller.close()
        self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)


class Caller:
    """A connection to the gateway, between and during its calls."""

    def __init__(self, door: Door, sock: socket.socket, peer: bytes) -> None:
        self.peer = peer
        self.wire = Wire(door.loop, sock)
        self.stop: Callable[[], None] = nothing
        """Gives up the call under way."""
        self.until: float | None = None
        """When the connection is closed if nothing happens until then; None during a call."""
        self._door = door
        self._ahead = bytearray()
        self._head: RequestHead | None = None
        self._await_call()

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self.until is None

    def answer(self, status: int, text: str, headers: Sequence[Header] = ()) -> None:
        """Answer by the gateway itself, and close the connection: nobody reads what is left of the request."""
        body = text.encode("utf-8", "replace")
        lines = [b"HTTP/1.1 %d " % status + http.HTTPStatus(status).phrase.encode()]
        lines += [name + b": " + value for name, value in headers]
        lines += [b"Date: " + formatdate(usegmt=True).encode(), b"Connection: close"]
        lines += [b"Content-Type: text/plain; charset=utf-8"] if body else []
        lines += [b"Content-Length: %d" % len(body), b"", b""]
        bodiless = self._head is not None and self._head.method == b"HEAD"
        self.wire.send(b"\r\n".join(lines), b"" if bodiless else body)
        self._linger()

    def answered(self, keep: bool, ahead: bytearray) -> None:
        """The call has its whole answer; `ahead` came after it."""
        if self._door.closing and self.wire.backlog:
            self.stop, self.wire.on_drained = nothing, self.close
            return
        if self._door.closing:
            self.close()
            return
        if not keep:
            self._linger()
            return
        self._ahead = ahead
        self._await_call()
        if ahead:
            self._door.loop.call_soon(self._look)

    def abort(self) -> None:
        """Break off an answer: its status is out already, and nothing else says that it is not whole."""
        self.wire.abort()
        self._leave()

    def close(self) -> None:
        """End the connection, and the call under way with it."""
        stop, self.stop = self.stop, nothing
        stop()
        self.wire.close()
        self._leave()

    def _await_call(self) -> None:
        self.stop = self.wire.on_drained = nothing
        self.until = time.monotonic() + IDLE_S
        self.wire.on_readable = self._read
        self.wire.resume()

    def _linger(self) -> None:
        """A connection closed with something unread is reset, and the caller might not see its answer."""
        self.stop = nothing
        self.until = time.monotonic() + LINGER_S
        self.wire.on_readable = self._drop
        self.wire.resume()
        self.wire.finish()

    def _drop(self) -> None:
        if self.wire.receive(self._door.scratch) == 0:
            self.close()

    def _read(self) -> None:
        count = self.wire.receive(self._door.scratch)
        if count == 0:
            self.close()
        elif count > 0 and self._ahead:
            self._ahead += self._door.scratch[:count]
            self._look()
        elif count > 0:
            self._find_call(self._door.scratch[:count])

    def _look(self) -> None:
        ahead, self._ahead = self._ahead, bytearray()
        if ahead and not self.busy:
            self._find_call(memoryview(ahead))

    def _find_call(self, data: memoryview) -> None:
        try:
            found = split_head(data)
            if found is None:
                self._ahead = bytearray(data)
                return
            head, first = found
            if not head.partition(b" ")[2].startswith(FUNCTION):
                sock = self.wire.detach()
                self._leave()
                self._door.hand_over(sock, bytes(data))
                return
            self._head = RequestHead(head)
        except NotHttp as e:
            self.answer(400, f"that is not HTTP: {e}")
            return
        self.until = None
        self._door.handle(self, self._head, first)

    def _leave(self) -> None:
        self._door.left(self)


class _First(asyncio.Protocol):
    """Tells a protocol of aiohttp's what has come before its connection was its own."""

    def __init__(self, protocol: asyncio.Protocol, said: bytes) -> None:
        self._protocol = protocol
        self._said = said

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            transport.set_protocol(self._protocol)
        self._protocol.connection_made(transport)
        self._protocol.data_received(self._said)
