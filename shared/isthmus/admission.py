"""Admission control: a bound on the requests at work, apart from those that only wait for the registry.

A request that waits for a look-up gives its slot back meanwhile, so that callers of what is known find one. The waiting
requests have a bound of their own: each holds a thread of the server, of which the template starts as many more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from isthmus.context import Deadline
from isthmus.errors import DeadlineExceeded, Overloaded, RequestTooLarge

MAX_WAITING = 16
"""Requests that wait for the registry at a time; the template's index.py counts them among its threads."""
RETRY_AFTER_S = 1


class Slots:
    """`limit` requests may be at work; MAX_WAITING more, but no more than `limit`, may wait beside them."""

    def __init__(self, limit: int) -> None:
        self._limit, self.max_waiting = limit, min(limit, MAX_WAITING)
        # Taking from a list and putting back are atomic, and take a tenth of what a semaphore does.
        self._free = list(range(limit))
        self._free_to_wait = list(range(self.max_waiting))
        # Those who wait with a slot leave the other half, where there is one, to callers of what is here.
        self._free_to_keep = list(range(max(1, limit // 2)))

    @property
    def taken(self) -> int:
        """Requests at work now."""
        return self._limit - len(self._free)

    @contextmanager
    def admitted(self, deadline: Deadline) -> Iterator[None]:
        """Hold a slot for this thread's request, except while it is `aside`.

        Raises:
            Overloaded: `limit` requests are at work.
        """
        request = _Request(self, deadline, works=True)
        request.hold()
        with _current(request):
            yield

    @contextmanager
    def unadmitted(self, deadline: Deadline) -> Iterator[None]:
        """This thread's request needs no slot, but its waiting for the registry counts as others' does."""
        with _current(_Request(self, deadline, works=False)):
            yield

    def take(self) -> int:
        """One of the slots; `give` takes it back."""
        try:
            return self._free.pop()
        except IndexError:
            raise Overloaded(
                f"{self._limit} requests are under way; that is the limit", retry_after_s=RETRY_AFTER_S
            ) from None

    def give(self, slot: int) -> None:
        """Let another request have the slot."""
        self._free.append(slot)

    def place(self) -> int | None:
        """One of the places of the waiting, which `leave` takes back; None where as many wait as may."""
        with suppress(IndexError):
            return self._free_to_wait.pop()
        return None

    def leave(self, place: int) -> None:
        """Let another request wait."""
        self._free_to_wait.append(place)

    def keep(self) -> int | None:
        """The right to wait with a slot, which `lose` takes back; None where half of the slots wait so."""
        with suppress(IndexError):
            return self._free_to_keep.pop()
        return None

    def lose(self, right: int) -> None:
        """Let another request wait with its slot."""
        self._free_to_keep.append(right)


class _Request:
    """A request's deadline, and its slot while it holds one."""

    def __init__(self, slots: Slots, deadline: Deadline, *, works: bool) -> None:
        self.slots, self.deadline = slots, deadline
        self._works = works
        self._slot: int | None = None

    def hold(self) -> None:
        if self._works:
            self._slot = self.slots.take()

    def give_back(self) -> None:
        if self._slot is not None:
            self.slots.give(self._slot)
            self._slot = None


_CURRENT: ContextVar[_Request | None] = ContextVar("request", default=None)


@contextmanager
def _current(request: _Request) -> Iterator[None]:
    token = _CURRENT.set(request)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        request.give_back()


def current_deadline() -> Deadline | None:
    """The deadline of this thread's request; None outside of requests."""
    return None if (request := _CURRENT.get()) is None else request.deadline


@contextmanager
def aside(*, refuse: bool = True) -> Iterator[None]:
    """Give this thread's slot back while the block waits for the registry, and take one again after it.

    Where too many wait already, the request keeps its slot if `refuse` is false, up to half of all slots.
    Nothing happens outside of requests. A block that raises leaves its request without a slot: it is about to end.

    Raises:
        Overloaded: too many wait already; or, after the block, as many requests are at work as may.
    """
    if (request := _CURRENT.get()) is None:
        yield
        return
    if (place := request.slots.place()) is None:
        if refuse or (right := request.slots.keep()) is None:
            raise Overloaded(
                f"{request.slots.max_waiting} requests wait for the registry; that is the limit",
                retry_after_s=RETRY_AFTER_S,
            )
        try:
            yield
        finally:
            request.slots.lose(right)
        return
    request.give_back()
    try:
        yield
    finally:
        request.slots.leave(place)
    request.hold()


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
