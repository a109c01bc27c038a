"""The queue in front of the slots: callers take turns, and of one caller the earliest deadline goes first.

Fair queueing by the work that callers received: the next request is of the caller with the least, where a caller that
was away starts at the present turn, so that no caller saves up turns. A caller's share of the places follows Choudhury
and Hahne's dynamic thresholds: as many places as are free, so some stay free for other callers.
"""

from __future__ import annotations

import threading
from bisect import insort
from dataclasses import dataclass, field

from cachetools import LRUCache

# Callers without a request in the queue, with the work that each received.
MAX_CALLERS = 1024


@dataclass(order=True)
class Waiter:
    """A waiting request. `latest_start` is the last moment at which work can begin and still meet the deadline.

    Units: `cost_s` is the expected seconds of its work; moments are of the monotonic clock.
    """

    latest_start: float
    number: int
    caller: str | None = field(compare=False)
    cost_s: float = field(compare=False)
    called: threading.Event = field(compare=False, default_factory=threading.Event)
    is_admitted: bool = field(compare=False, default=False)


class _Caller:
    """A caller's waiters in order, and the seconds of work received."""

    def __init__(self, received_s: float) -> None:
        self.waiters = list[Waiter]()
        self.received_s = received_s


class FairQueue:
    """Waiters of waiting requests, at most `max_length`; not thread-safe."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._waiting: dict[str | None, _Caller] = {}
        self._remembered: LRUCache[str | None, float] = LRUCache(MAX_CALLERS)
        # Seconds of work received by the caller of the latest turn.
        self._turn_s = 0.0
        self._length, self._cost_s = 0, 0.0

    def __len__(self) -> int:
        return self._length

    @property
    def cost_s(self) -> float:
        """Seconds of work of all waiters."""
        return max(0.0, self._cost_s)

    def has_room(self, caller: str | None) -> bool:
        """Whether there is a place for a further request of `caller`; None where callers are not told apart."""
        free = self.max_length - self._length
        own = self._waiting.get(caller) if caller is not None else None
        return free > (len(own.waiters) if own is not None else 0)

    def ahead_s(self, caller: str | None, latest_start: float) -> float:
        """Seconds of work that would be begun before a new waiter of `caller`.

        Other callers have a turn for each of the caller's own waiters, as if all waiters were of equal cost.
        """
        own = self._waiting.get(caller)
        before = [t.cost_s for t in own.waiters if t.latest_start <= latest_start] if own is not None else []
        others = (
            sum(t.cost_s for t in queue.waiters[: len(before) + 1])
            for name, queue in self._waiting.items()
            if name != caller
        )
        return sum(before) + sum(others)

    def add(self, waiter: Waiter) -> None:
        """Queue a waiter; `has_room` was asked."""
        if (caller := self._waiting.get(waiter.caller)) is None:
            received_s = max(self._turn_s, self._remembered.get(waiter.caller, 0.0))
            caller = self._waiting[waiter.caller] = _Caller(received_s)
        insort(caller.waiters, waiter)
        self._length += 1
        self._cost_s += waiter.cost_s

    def next(self) -> Waiter | None:
        """Take the next waiter in turn; None where none waits."""
        if not self._waiting:
            return None
        name = min(self._waiting, key=lambda name: self._waiting[name].received_s)
        caller = self._waiting[name]
        waiter = caller.waiters[0]
        self._turn_s = max(self._turn_s, caller.received_s)
        caller.received_s += waiter.cost_s
        self.remove(waiter)
        return waiter

    def remove(self, waiter: Waiter) -> None:
        """Take a waiter out of turn: its request waits no longer."""
        caller = self._waiting[waiter.caller]
        caller.waiters.remove(waiter)
        self._length -= 1
        self._cost_s = self._cost_s - waiter.cost_s if self._length else 0.0
        if not caller.waiters:
            del self._waiting[waiter.caller]
            self._remembered[waiter.caller] = caller.received_s
