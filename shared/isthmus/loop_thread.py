"""An asynchronous context manager run in an event loop of its own, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class LoopThread(Generic[T]):
    """Enters the asynchronous context manager of `live()` in a thread's event loop on `start`, exits it on `stop`.

    `_value` is the value of `live()` while the thread runs, else None.
    """

    def __init__(
        self,
        name: str,
        live: Callable[[], AbstractAsyncContextManager[T]],
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> None:
        self._name = name
        self._live = live
        self._loop_factory = loop_factory
        self._value: T | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_event: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> Self:
        """Start the thread, and return once the context is entered; an error of entering is raised here."""
        entered = threading.Event()
        self._error = None
        # Not a thread of a pool: the kernel ends the processes that a thread started with that thread.
        self._thread = threading.Thread(target=self._main, args=(entered,), name=self._name, daemon=True)
        self._thread.start()
        entered.wait()
        if self._error is not None:
            self._thread.join()
            self._thread = None
            raise self._error
        return self

    def stop(self) -> None:
        """Exit the context and join the thread; no-op while stopped."""
        thread, loop, event = self._thread, self._loop, self._stop_event  # another thread may call `stop` too
        if thread is None or loop is None or event is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the thread has ended already
            loop.call_soon_threadsafe(event.set)
        thread.join()
        self._value = self._thread = self._loop = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _main(self, entered: threading.Event) -> None:
        async def live() -> None:
            self._loop, self._stop_event = asyncio.get_running_loop(), asyncio.Event()
            async with self._live() as self._value:
                entered.set()
                await self._stop_event.wait()

        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                runner.run(live())
        except BaseException as e:
            self._error = e
        finally:
            entered.set()
