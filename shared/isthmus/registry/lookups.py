"""Deduplicated registry look-ups on behalf of requests: bounded in time and number, with negative caching."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from cachetools import TLRUCache

from isthmus.admission import RETRY_AFTER_S, slot_released
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, IsthmusError, Overloaded, RegistryMissing, RegistryUnavailable

MAX_UNDER_WAY = 64
"""Look-ups in progress or queued. Callers choose the keys, so that the queue needs a bound."""
MAX_REMEMBERED = 1024
"""Failures in the negative cache; bounded for the same reason."""
_WORKERS = 4
_UNAVAILABLE_S = 1.0
"""Seconds in the negative cache for an unavailable registry: no longer than Retry-After tells callers to wait."""

T = TypeVar("T")


class Lookups:
    """Single-flight look-ups in a thread pool, with a negative cache; thread-safe.

    Concurrent callers of one key share one look-up. A look-up outlives a caller whose deadline passes, so that a later
    caller gets the result. A failure stays cached for `remember_s` seconds and is raised without a request.
    """

    def __init__(self, remember_s: float) -> None:
        self._remember_s = remember_s
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="lookup")
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, Future[Any]] = {}
        self._failures: TLRUCache[Hashable, IsthmusError] = TLRUCache(
            MAX_REMEMBERED, lambda _, error, now: now + self._seconds(error), time.monotonic
        )

    def find(self, key: Hashable, look_up: Callable[[], T], deadline: Deadline) -> T:
        """The result of `look_up`. The caller waits outside of its admission slot, until its deadline at most.

        Raises:
            DeadlineExceeded: the look-up was still in progress at the deadline.
            Overloaded: too many look-ups are in progress or awaited.
            IsthmusError: the error of `look_up`, now or from the negative cache.
        """
        with self._lock:
            self._raise_remembered(key)
            if (future := self._under_way.get(key)) is None:
                if len(self._under_way) >= MAX_UNDER_WAY:
                    raise Overloaded(
                        f"{MAX_UNDER_WAY} look-ups in the registry are under way; that is the limit",
                        retry_after_s=RETRY_AFTER_S,
                    )
                future = self._under_way[key] = self._pool.submit(self._run, key, look_up)
        with slot_released():
            try:
                result: T = future.result(timeout=deadline.remaining())
            except FutureTimeout:
                raise DeadlineExceeded(
                    "the deadline passed while the registry was asked", hint="see whether the registry answers"
                ) from None
        return result

    def close(self) -> None:
        """Refuse new look-ups; look-ups in progress run to their end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, key: Hashable) -> None:
        """Drop the cached failure of `key`."""
        with self._lock:
            self._failures.pop(key, None)

    def _raise_remembered(self, key: Hashable) -> None:
        if (error := self._failures.get(key)) is not None:
            # A copy, because an exception raised by several threads would collect all their tracebacks.
            raise type(error)(error.message, hint=error.hint, **error.facts)

    def _seconds(self, error: IsthmusError) -> float:
        # A missing registry is often a share not mounted yet: as transient as an unavailable server.
        passing = isinstance(error, RegistryUnavailable | RegistryMissing)
        return min(self._remember_s, _UNAVAILABLE_S) if passing else self._remember_s

    def _run(self, key: Hashable, look_up: Callable[[], T]) -> T:
        try:
            return look_up()
        except IsthmusError as e:
            with self._lock:
                # The traceback would keep the frames of the look-up, and their data, alive.
                self._failures[key] = e.with_traceback(None)
            raise
        finally:
            with self._lock:
                del self._under_way[key]
