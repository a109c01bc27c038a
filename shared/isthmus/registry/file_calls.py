"""File-system calls with a bound on time. A share whose server is gone lets a call hang, and nothing can end it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from isthmus.errors import RegistryUnavailable

MAX_HANGING = 16
"""Calls that may hang at a time; each keeps a thread until the share answers."""

T = TypeVar("T")


class FileCalls:
    """Makes each call in a thread of its own, which is left behind when the time is up; several threads may use it.

    The threads are daemons: one that hangs in the kernel must not keep the process from leaving.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._hanging = 0
        self._lock = threading.RLock()  # a callback may come from within

    def __call__(self, call: Callable[[], T], seconds: float, key: str) -> T:
        """`call`'s result, or what it raises.

        Raises:
            RegistryUnavailable: it took longer than `seconds`, or MAX_HANGING others have not come back.
        """
        if self._hanging >= MAX_HANGING:
            raise self._unavailable(f"{self._url} hangs: {MAX_HANGING} reads or writes have not come back", key)
        future: Future[T] = Future()
        threading.Thread(target=self._run, args=(future, call), name="registry file", daemon=True).start()
        try:
            return future.result(timeout=seconds)
        except FutureTimeout:
            with self._lock:
                if future.done():
                    return future.result()
                self._hanging += 1
                future.add_done_callback(self._came_back)
            raise self._unavailable(f"{self._url} did not answer within {seconds:.3g} s for {key}", key) from None

    @staticmethod
    def _run(future: Future[T], call: Callable[[], T]) -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    def _came_back(self, future: Future[T]) -> None:
        with self._lock:
            self._hanging -= 1

    def _unavailable(self, message: str, key: str) -> RegistryUnavailable:
        return RegistryUnavailable(
            message, registry=self._url, blob=key, hint="see whether the share is mounted and its server answers"
        )
