"""The router's own work for a request, beside segments, pre-processing and codecs: HTTP, JSON, the choice of a route.

At a small edge it decides as much as a segment does: a photo that only passes through to the cloud takes a quarter of
the CPU seconds of the whole model. It is CPU time of the request's thread, which other requests do not lengthen, times
the slowness of the process: the wall time of its segments over their CPU time, 4 at a quota of a quarter of a CPU.
"""

from __future__ import annotations

import threading
import time

# Weight of a request in the mean: some twenty count.
_WEIGHT = 0.05
# A run that took less CPU time than this share of its wall time ran in another thread, as part of a batch.
_MIN_CPU_SHARE = 1 / 64


class OwnWork:
    """Mean seconds; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._cpu_s = self._run_wall_s = self._run_cpu_s = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of a request; 0 before the first."""
        slowness = self._run_wall_s / self._run_cpu_s if self._run_cpu_s else 1.0
        return self._cpu_s * max(1.0, slowness)

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
            self._cpu_s += _WEIGHT * (own_s - self._cpu_s) if self._cpu_s else own_s

    def ran(self, wall_s: float, cpu_s: float) -> None:
        """A segment ran in this thread."""
        self.named(cpu_s)
        if cpu_s < _MIN_CPU_SHARE * wall_s:
            return
        with self._lock:
            self._run_wall_s += _WEIGHT * (wall_s - self._run_wall_s)
            self._run_cpu_s += _WEIGHT * (cpu_s - self._run_cpu_s)
