"""Messages in memory, in lanes: each lane is serial and in order, lanes run in parallel."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


@dataclass(eq=False)
class _Lane(Generic[Item]):
    """The messages of a key, the oldest first; a message leaves when done."""

    key: str | None
    items: deque[Item] = field(default_factory=deque)


class Lanes(Generic[Item]):
    """A queue of items by lane; any thread may call. Units: seconds, and bytes of the items' bodies."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._keyed: dict[str, _Lane[Item]] = {}
        self._lanes: dict[Item, tuple[_Lane[Item], int]] = {}
        self._ready: deque[_Lane[Item]] = deque()
        # A heap by time; lanes do not compare, so a number breaks ties.
        self._delayed: list[tuple[float, int, _Lane[Item]]] = []
        self._numbers = itertools.count()
        self._running: set[Item] = set()
        self._is_closed = False
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._lanes)

    @property
    def running(self) -> int:
        """Items taken and neither done nor delayed."""
        return len(self._running)

    @property
    def runnable(self) -> int:
        """Items in work, and first items of lanes that could be taken now."""
        with self._changed:
            self._wake()
            return len(self._running) + len(self._ready)

    def items(self) -> list[Item]:
        """All items, those in work included."""
        with self._changed:
            return list(self._lanes)

    def put(self, item: Item, key: str | None, size: int) -> None:
        """Append an item to the lane of `key`; without a key it has a lane of its own."""
        with self._changed:
            lane = None if key is None else self._keyed.get(key)
            if lane is None:
                lane = _Lane(key)
                if key is not None:
                    self._keyed[key] = lane
            lane.items.append(item)
            self._lanes[item] = (lane, size)
            self.bytes += size
            if len(lane.items) == 1:
                self._ready.append(lane)
                self._changed.notify()

    def take(self) -> Item | None:
        """Wait for a ready lane, the longest ready first, and take its first item; None once closed."""
        with self._changed:
            while not self._is_closed:
                next_s = self._wake()
                if self._ready:
                    item = self._ready.popleft().items[0]
                    self._running.add(item)
                    return item
                self._changed.wait(next_s)
            return None

    def done(self, item: Item) -> None:
        """Remove an item; the next of its lane is ready."""
        with self._changed:
            lane, size = self._lanes.pop(item)
            self.bytes -= size
            self._running.discard(item)
            lane.items.popleft()
            if lane.items:
                self._ready.append(lane)
            elif lane.key is not None:
                del self._keyed[lane.key]
            self._changed.notify_all()

    def remove(self, item: Item) -> None:
        """Remove an item that is not in work, once closed."""
        with self._changed:
            self.bytes -= self._lanes.pop(item)[1]

    def delay(self, item: Item, after_s: float) -> None:
        """Keep an item at the head of its lane, to be taken again after `after_s` seconds."""
        with self._changed:
            self._running.discard(item)
            heapq.heappush(self._delayed, (self._clock() + after_s, next(self._numbers), self._lanes[item][0]))
            self._changed.notify_all()

    def wait_for_change(self, timeout_s: float) -> None:
        """Wait until an item is done or delayed, or the lanes are closed."""
        with self._changed:
            if not self._is_closed:
                self._changed.wait(timeout_s)

    def close(self) -> list[Item]:
        """Let `take` end; the items that are not in work."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            return [item for item in self._lanes if item not in self._running]

    def _wake(self) -> float | None:
        """Make delayed lanes ready whose time has come; seconds until the next one's, None without."""
        now = self._clock()
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])
        return self._delayed[0][0] - now if self._delayed else None
