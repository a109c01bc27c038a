"""Memory of all requests of a process together: bytes are reserved before they are allocated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from isthmus.admission import RETRY_AFTER_S
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RequestTooLarge


class MemoryBudget:
    """A count of bytes with a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    def reserve(self, count: int) -> bool:
        """Count `count` bytes more if they fit; False where they do not."""
        with self._lock:
            if self._used + count > self.limit:
                return False
            self._used += count
            return True

    def release(self, count: int) -> None:
        """Count `count` bytes less."""
        with self._lock:
            self._used -= count


class Reservation:
    """One request's share of a budget; `close` releases all of it, however the request ends."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._reserved = 0

    def hold(self, count: int) -> None:
        """Reserve `count` bytes more, until `close`.

        Raises:
            RequestTooLarge: no request may take so much, even alone.
            Overloaded: with what the other requests take, it is too much now.
        """
        limit = self._budget.limit
        if self._reserved + count > limit:
            raise RequestTooLarge(
                f"this request takes some {self._reserved + count} bytes of memory; at most {limit} are given",
                limit=limit,
                hint="send fewer or smaller tensors, or as binary data; the setting max_working_bytes is the bound",
            )
        if not self._budget.reserve(count):
            raise Overloaded(
                f"this request takes some {count} bytes of memory more, and all requests together may take {limit};"
                " try again",
                limit=limit,
                retry_after_s=RETRY_AFTER_S,
            )
        self._reserved += count

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Release at the block's end what was reserved within it."""
        before = self._reserved
        try:
            yield
        finally:
            self._budget.release(self._reserved - before)
            self._reserved = before

    def close(self) -> None:
        """Release everything."""
        reserved, self._reserved = self._reserved, 0
        self._budget.release(reserved)


class Turns:
    """At most `count` threads at a time do work that takes memory and the CPU alone; others wait for their turn.

    All at once they would take as many times the memory, and no less time.
    """

    def __init__(self, count: int) -> None:
        self._semaphore = threading.Semaphore(count)

    @contextmanager
    def one(self, deadline: Deadline) -> Iterator[None]:
        """Have a turn within the block.

        Raises:
            DeadlineExceeded: no turn came in time.
        """
        if not self._semaphore.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded("the deadline passed while other requests were read")
        try:
            yield
        finally:
            self._semaphore.release()
