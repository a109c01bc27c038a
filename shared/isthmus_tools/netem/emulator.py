"""A network to rehearse with: a TCP relay on this machine that is as slow, far and unreliable as it is told to be."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self, TypeVar
from urllib.parse import urlsplit

from isthmus.errors import LocalError
from isthmus_tools.netem.loop_thread import InThread
from isthmus_tools.netem.network import HOST, LinkCounters, Network
from isthmus_tools.netem.pacing import LinkShape
from isthmus_tools.netem.relay import PreciseSelector
from isthmus_tools.netem.script import Step

__all__ = ["Link", "LinkCounters", "LinkShape"]
_T = TypeVar("_T")


class Link(InThread[int]):
    """A network between a client on this machine and `target`, in a thread of its own; a context manager.

    `target` is HOST:PORT or an http URL. The link listens on 127.0.0.1 alone; port 0 takes a free one. `script` changes
    it from its start on; `seed` makes jitter and random cuts repeatable. A process whose other threads compute in
    Python delays the link's; `isthmus link` is a process of its own.

    Raises:
        LocalError: `target` is no address.
    """

    def __init__(
        self, target: str, shape: LinkShape | None = None, *, port: int = 0, script: Sequence[Step] = (), seed: int = 0
    ) -> None:
        self._family, self._address = _resolve(target)
        self._wanted_port = port
        self._network = Network(shape or LinkShape(), script, random.Random(seed))  # noqa: S311
        self._port = 0
        super().__init__("link", self._relaying, lambda: asyncio.SelectorEventLoop(PreciseSelector()))

    def start(self) -> Self:
        """Take the port; once only.

        Raises:
            LocalError: the port is taken, or it has been started.
        """
        if self._thread is not None or self._leave is not None:
            raise LocalError("a link starts once")
        return super().start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def url(self) -> str:
        """Where it listens, for a target that speaks HTTP."""
        return f"http://{HOST}:{self._port}"

    @property
    def shape(self) -> LinkShape:
        """What it models now."""
        return self._network.shape

    @property
    def counters(self) -> LinkCounters:
        """What went through it so far; those of an ended link stay."""
        return self._network.counters() if self._thread is None else self._tell(self._network.counters)

    def set(self, shape: LinkShape) -> None:
        """Be another network from now on; bytes that have left keep their arrival."""
        self._tell(lambda: self._network.set(shape))

    def cut(self) -> None:
        """Reset every established connection."""
        self._tell(self._network.cut)

    def refuse(self, refuse: bool = True) -> None:
        """Refuse new connections, or take them again; established ones live on."""
        self._tell(lambda: self._network.refuse(refuse))

    def stall(self, seconds: float) -> None:
        """Let nothing pass for that long: what is on its way waits, new connections hear nothing."""
        self._tell(lambda: self._network.stall(seconds))

    def down(self) -> None:
        """Be dead: reset what is established and refuse what is new."""
        self._tell(self._network.down)

    def up(self) -> None:
        """Be alive again: no refusing, no stall."""
        self._tell(self._network.up)

    def _tell(self, do: Callable[[], _T]) -> _T:
        """Do it in the link's thread; it holds on return."""
        if self._thread is None or self._loop is None:
            raise LocalError("the link does not run")
        done: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def work() -> None:
            try:
                done.set_result(do())
            except BaseException as e:
                done.set_exception(e)

        self._loop.call_soon_threadsafe(work)
        return done.result()

    @contextlib.asynccontextmanager
    async def _relaying(self) -> AsyncIterator[int]:
        async with self._network.relaying(self._wanted_port, self._family, self._address) as self._port:
            # Nothing else listens there, and every connection would make the next one.
            if self._address[:2] == (HOST, self._port):
                raise LocalError(f"the link would lead to itself: it listens on {HOST}:{self._port}", port=self._port)
            yield self._port


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
