"""The bound on the weights of loaded segments: which segments are in memory, and which are evicted for which.

A request is worth more than a load ahead of requests. A request's load evicts the least recently used segments, those
that no request used first. A load ahead evicts none that was used or asked for within IN_USE_S, so that two routers
with different estimates, or a new version of a model, never evict what requests run. Versions of a model that differ in
their plan or calibration have equal segments, which are in memory once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.errors import MemoryInUse, SegmentTooLarge
from isthmus.runtime.ort_runner import Runner

Key = tuple[str, str]
"""A bundle's digest and a segment's id."""
# Several times the period in which a router under load asks again for the segments of its routes.
IN_USE_S = 60.0
# Bundles of a segment in memory; each new plan of a model is one. Further ones load the segment again.
MAX_SHARED = 64


@dataclass(frozen=True)
class LoadedSegment:
    """A segment in memory, and the size of its weights in bytes."""

    bundle: str
    segment: str
    bytes: int


@dataclass
class _MemoryEntry:
    runner: Runner
    bytes: int
    in_use_at: float
    content: str
    keys: set[Key]


class SegmentMemory:
    """Loaded segments within `limit` bytes, loads under way included; thread-safe."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._changed = threading.Condition()
        # In the order of their last use by a request; segments without a use are first.
        # No LRUCache: listing its items, as metrics do, would count as a use of each.
        self._order: OrderedDict[str, _MemoryEntry] = OrderedDict()
        self._entries: dict[Key, _MemoryEntry] = {}
        self._reserved: dict[Key, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key) -> Runner | None:
        """The segment for a request, which counts as a use; None where it is not in memory."""
        with self._changed:
            if (entry := self._entries.get(key)) is None:
                return None
            self._order.move_to_end(entry.content)
            entry.in_use_at = self._clock()
            return entry.runner

    def peek(self, key: Key) -> Runner | None:
        """The segment, without counting as a use."""
        with self._changed:
            return None if (entry := self._entries.get(key)) is None else entry.runner

    def touch(self, key: Key) -> bool:
        """Whether the segment is in memory; if so, no load ahead evicts it for IN_USE_S seconds."""
        with self._changed:
            if (entry := self._entries.get(key)) is None:
                return False
            entry.in_use_at = self._clock()
            return True

    def share(self, key: Key, content: str) -> Runner | None:
        """The segment of another bundle with the same `content`, from now on this one as well; None without any."""
        with self._changed:
            if (entry := self._order.get(content)) is None:
                return None
            if len(entry.keys) < MAX_SHARED:
                entry.keys.add(key)
                self._entries[key] = entry
            entry.in_use_at = self._clock()
            return entry.runner

    def check(self, key: Key, needed: int) -> None:
        """Refuse a load ahead for which there is no room now.

        Raises:
            SegmentTooLarge, MemoryInUse: as `reserve`.
        """
        with self._changed:
            self._check_size(key, needed)
            self._victims(key, needed, is_ahead=True)

    def reserve(self, key: Key, needed: int, is_ahead: Callable[[], bool] = lambda: False) -> None:
        """Reserve `needed` bytes for a load, and evict for these; a request's load waits until other loads have ended.

        `is_ahead` tells whether no request waits for the load; a request may begin to wait meanwhile.

        Raises:
            SegmentTooLarge: more than the limit.
            MemoryInUse: a load ahead for which segments in use would have to go; nothing was evicted.
        """
        with self._changed:
            self._check_size(key, needed)
            while (victims := self._victims(key, needed, is_ahead=is_ahead())) is None:
                self._changed.wait()
            for victim in victims:
                self._drop(victim)
            self._reserved[key] = needed

    def add(self, key: Key, runner: Runner, content: str, *, is_ahead: bool = False) -> None:
        """Put the loaded segment in the place that was reserved. Segments of equal `content` are interchangeable."""
        with self._changed:
            needed = self._reserved.pop(key)
            if content in self._order:  # loaded at the same time for two bundles
                self._entries[key] = self._order[content]
                self._order[content].keys.add(key)
            else:
                self._entries[key] = _MemoryEntry(runner, needed, self._clock(), content, {key})
                self._order[content] = self._entries[key]
                self._order.move_to_end(content, last=not is_ahead)
            self._changed.notify_all()

    def discard(self, key: Key) -> None:
        """Drop a reservation or a segment; no-op without either."""
        with self._changed:
            self._reserved.pop(key, None)
            if (entry := self._entries.get(key)) is not None:
                self._drop(entry)
            self._changed.notify_all()

    def loaded(self) -> list[LoadedSegment]:
        """The segments in memory, least recently used first; a segment of several bundles counts once."""
        with self._changed:
            return [LoadedSegment(*min(entry.keys), entry.bytes) for entry in self._order.values()]

    def _drop(self, entry: _MemoryEntry) -> None:
        del self._order[entry.content]
        for key in entry.keys:
            del self._entries[key]

    def _check_size(self, key: Key, needed: int) -> None:
        if needed > self._limit:
            raise SegmentTooLarge(
                f"segment {key[1]} weighs {needed} bytes; max_loaded_bytes is {self._limit}",
                segment=key[1],
                bytes=needed,
                limit=self._limit,
                hint="raise max_loaded_bytes and the function's memory limit, or cut the model elsewhere",
            )

    def _victims(self, key: Key, needed: int, *, is_ahead: bool) -> list[_MemoryEntry] | None:
        """The segments to evict for `needed` bytes; None where loads under way leave a request's load no room yet."""
        used = sum(entry.bytes for entry in self._order.values()) + sum(self._reserved.values())
        idle_since = self._clock() - IN_USE_S if is_ahead else math.inf
        victims = []
        for entry in self._order.values():
            if used + needed <= self._limit:
                break
            if entry.in_use_at <= idle_since:
                victims.append(entry)
                used -= entry.bytes
        if used + needed <= self._limit:
            return victims
        if not is_ahead:
            return None
        raise MemoryInUse(
            f"segment {key[1]} weighs {needed} bytes, and segments in use leave {max(0, self._limit - used)} of"
            f" max_loaded_bytes, {self._limit}",
            segment=key[1],
            bytes=needed,
            limit=self._limit,
            retry_after_s=math.ceil(IN_USE_S),
            hint=f"raise max_loaded_bytes and the function's memory limit; a segment that nobody used or asked for in"
            f" {IN_USE_S:.0f} s makes room",
        )
