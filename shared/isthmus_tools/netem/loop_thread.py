"""Something that lives in an event loop of its own, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class InThread(Generic[T]):
    """A context manager that enters `live()` in a thread's event loop on `start`, and leaves it on `stop`.

    `_value` is what `live()` gave, None while it does not run.
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
        self._leave: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> Self:
        """Begin, and return once it is entered.

        Raises:
            What entering raised, LocalError among them.
        """
        up = threading.Event()
        self._error = None
        # Not a thread of a pool: the kernel ends the processes that a thread started with that thread.
        self._thread = threading.Thread(target=self._main, args=(up,), name=self._name, daemon=True)
        self._thread.start()
        up.wait()
        if self._error is not None:
            self._thread.join()
            self._thread = None
            raise self._error
        return self

    def stop(self) -> None:
        """Leave and wait for the end; harmless when it does not run."""
        thread, loop, leave = self._thread, self._loop, self._leave  # another thread may stop it too
        if thread is None or loop is None or leave is None:
            return
        with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended already
            loop.call_soon_threadsafe(leave.set)
        thread.join()
        self._value = self._thread = self._loop = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _main(self, up: threading.Event) -> None:
        async def live() -> None:
            self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
            async with self._live() as self._value:
                up.set()
                await self._leave.wait()

        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                runner.run(live())
        except BaseException as e:
            self._error = e
        finally:
            up.set()
