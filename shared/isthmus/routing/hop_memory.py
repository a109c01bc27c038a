"""What a hop has in memory, as its responses tell: segments that ran there, and those that it said are loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cachetools import FIFOCache

# Segments of a hop: callers name versions, and each has segments of its own.
MAX_SEGMENTS = 1024


class HopMemory:
    """The segments in a hop's memory; thread-safe. `on_change` is called after each change."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = _no_op
        self._lock = threading.Lock()
        # First in, first out: a look-up changes nothing, and so needs no lock.
        self._loaded: FIFOCache[tuple[str, str], None] = FIFOCache(MAX_SEGMENTS)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether the segment `(bundle digest, segment id)` is loaded."""
        return key in self._loaded

    def ran(self, bundle: str, segment: str, load_s: float) -> None:
        """A segment ran, after `load_s` seconds of loading: 0 where the function had it in memory.

        A load of a segment that was in memory means another process, or an eviction: the rest is in doubt as well.
        """
        key = (bundle, segment)
        is_known = key in self._loaded
        if is_known and not load_s:
            return
        with self._lock:
            if is_known:
                self._loaded.clear()
            self._loaded[key] = None
        self.on_change()

    def tell(self, bundle: str, segment: str, *, is_loaded: bool) -> None:
        """What the function said of a segment."""
        key = (bundle, segment)
        if (key in self._loaded) == is_loaded:
            return
        with self._lock:
            if is_loaded:
                self._loaded[key] = None
            else:
                self._loaded.pop(key, None)
        self.on_change()

    def forget(self) -> None:
        """The function was not reached, and may come back as a new process."""
        if self._loaded:
            with self._lock:
                self._loaded.clear()
            self.on_change()


def _no_op() -> None:
    """Default of `on_change`."""
