"""What all requests of a process take in memory together, counted before it is allocated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from isthmus.admission import RETRY_AFTER_S
from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RequestTooLarge


class Memory(Protocol):
    """A count of bytes with a limit: this module's, or the server's, which counts the bodies that it reads."""

    limit: int

    def take(self, count: int) -> bool:
        """Count so many bytes more, if they fit."""
        ...

    def give(self, count: int) -> None:
        """Count so many bytes less."""
        ...


class CountedMemory:
    """See `Memory`; the template's server has the same."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that are counted now."""
        return self._used

    def take(self, count: int) -> bool:
        """See `Memory`."""
        with self._lock:
            if self._used + count > self.limit:
                return False
            self._used += count
            return True

    def give(self, count: int) -> None:
        """See `Memory`."""
        with self._lock:
            self._used -= count


class Reservation:
    """One request's share; whatever becomes of the request, `close` gives all of it back."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._held = 0

    def hold(self, count: int) -> None:
        """Count so many bytes more, until `close`.

        Raises:
            RequestTooLarge: no request may take so much, even alone.
            Overloaded: with what the other requests take, it is too much now.
        """
        limit = self._memory.limit
        if self._held + count > limit:
            raise RequestTooLarge(
                f"this request takes some {self._held + count} bytes of memory; at most {limit} are given",
                limit=limit,
                hint="send fewer or smaller tensors, or as binary data; the setting max_working_bytes is the bound",
            )
        if not self._memory.take(count):
            raise Overloaded(
                f"this request takes some {count} bytes of memory more, and all requests together may take {limit};"
                " try again",
                limit=limit,
                retry_after_s=RETRY_AFTER_S,
            )
        self._held += count

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Give back at the block's end what is held within it."""
        before = self._held
        try:
            yield
        finally:
            self._memory.give(self._held - before)
            self._held = before

    def close(self) -> None:
        """Give back what is held."""
        held, self._held = self._held, 0
        self._memory.give(held)


class Turns:
    """As many threads as given at a time do what takes memory and nothing but the CPU; others wait for their turn.

    All at once they would take as many times the memory, and no less time.
    """

    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)

    @contextmanager
    def one(self, deadline: Deadline) -> Iterator[None]:
        """Have a turn within the block.

        Raises:
            DeadlineExceeded: none came in time.
        """
        if not self._free.acquire(timeout=deadline.remaining()):
            raise DeadlineExceeded("the deadline passed while other requests were read")
        try:
            yield
        finally:
            self._free.release()
