"""Look-ups for callers who name what is not known here: bounded in time and number, failures remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from cachetools import TLRUCache

from isthmus.admission import RETRY_AFTER_S, aside
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, IsthmusError, Overloaded, RegistryMissing, RegistryUnavailable

MAX_UNDER_WAY = 64
"""Look-ups that are under way or wait for a thread; callers name them, so there must be an end."""
MAX_REMEMBERED = 1024
"""Failures remembered; as above."""
_WORKERS = 4
_UNAVAILABLE_S = 1.0
"""How long it is remembered that the registry did not answer: no longer than callers are told to stay away."""

T = TypeVar("T")


class Lookups:
    """Finds things by key in threads of its own; safe to use from several threads.

    Callers of one key share one look-up, which goes on when they run out of time, so that a later caller finds its
    result. A failure is remembered for `remember_s`: it answers without asking the registry again. Units: seconds.
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
        """`look_up`'s result, waited for outside of the request's slot and no longer than its deadline.

        Raises:
            DeadlineExceeded: it was still under way when the deadline passed.
            Overloaded: too many others are under way or waited for.
            IsthmusError: what `look_up` raised now, or a moment ago.
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
        with aside():
            try:
                found: T = future.result(timeout=deadline.remaining())
            except FutureTimeout:
                raise DeadlineExceeded(
                    "the deadline passed while the registry was asked", hint="see whether the registry answers"
                ) from None
        return found

    def close(self) -> None:
        """Look nothing more up; what is under way goes on to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, key: Hashable) -> None:
        """Ask the registry anew for this key."""
        with self._lock:
            self._failures.pop(key, None)

    def _raise_remembered(self, key: Hashable) -> None:
        if (error := self._failures.get(key)) is not None:
            # A copy: an exception that several threads raise collects all their tracebacks.
            raise type(error)(error.message, hint=error.hint, **error.facts)

    def _seconds(self, error: IsthmusError) -> float:
        passing = isinstance(error, RegistryUnavailable | RegistryMissing)
        return min(self._remember_s, _UNAVAILABLE_S) if passing else self._remember_s

    def _run(self, key: Hashable, look_up: Callable[[], T]) -> T:
        try:
            return look_up()
        except IsthmusError as e:
            with self._lock:
                self._failures[key] = e.with_traceback(None)
            raise
        finally:
            with self._lock:
                del self._under_way[key]
