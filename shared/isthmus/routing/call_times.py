"""Seconds of the latest calls of each segment: what a call takes, and how slow the slow ones are.

Steps of sessions are told apart by the number of their positions, to a factor of two: a chunk of a prompt takes a
hundred times as long as a single token.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque

from cachetools import LRUCache

from isthmus.wire.frame import Frame

# Segments of a hop; bundles come and go.
MAX_SEGMENTS = 256
# Enough that the 95th percentile is not the maximum.
MAX_CALLS = 100


class CallTimes:
    """The seconds of the latest MAX_CALLS successful calls of each of a hop's segments; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: LRUCache[tuple[str, str, int], _Window] = LRUCache(MAX_SEGMENTS)

    def add(self, frame: Frame, seconds: float) -> None:
        """Add a call."""
        key = _kind(frame)
        with self._lock:
            if (window := self._segments.get(key)) is None:
                window = self._segments[key] = _Window()
            window.add(seconds)

    def quantile(self, frame: Frame, share: float, min_calls: int) -> float | None:
        """The seconds that `share` of the frame's segment's calls stay below; None before `min_calls` calls."""
        with self._lock:
            window = self._segments.get(_kind(frame))
            return None if window is None or window.count < min_calls else window.quantile(share)


def _kind(frame: Frame) -> tuple[str, str, int]:
    return frame.bundle, frame.segment, frame.step_tokens.bit_length()


class _Window:
    """The latest values, in order of arrival and in order of size."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        if len(self._latest) == MAX_CALLS:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(value)
        insort(self._sorted, value)

    @property
    def count(self) -> int:
        return len(self._sorted)

    def quantile(self, share: float) -> float:
        return self._sorted[min(self.count - 1, int(share * self.count))]
