"""The router's own work for a request, beside segments, pre-processing and codecs: HTTP, JSON, the choice of a route.

At a small edge it decides as much as a segment does: a photo that only passes through to the cloud takes a quarter of
the CPU seconds of the whole model. It is CPU time of the request's thread, which other requests do not lengthen.
"""

from __future__ import annotations

import threading
import time

# Weight of a request in the mean: some twenty count.
_WEIGHT = 0.05


class OwnWork:
    """Mean CPU seconds; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = threading.local()
        self.seconds = 0.0
        """Seconds of a request; 0 before the first."""

    def begin(self) -> None:
        """A request's work begins in this thread."""
        self._thread.named = 0.0

    def named(self, seconds: float) -> None:
        """CPU seconds of this thread's request that other estimates know."""
        self._thread.named = getattr(self._thread, "named", 0.0) + seconds

    def end(self, began: float, answers: int) -> None:
        """A request with so many answers ends; `began` is `time.thread_time()` from when it was received."""
        own_s = max(0.0, time.thread_time() - began - getattr(self._thread, "named", 0.0)) / max(1, answers)
        with self._lock:
            self.seconds += _WEIGHT * (own_s - self.seconds) if self.seconds else own_s
