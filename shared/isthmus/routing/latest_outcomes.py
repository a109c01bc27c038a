"""The latest outcomes of a check, and whether the share of bad outcomes exceeds a limit beyond chance.

The guards of codecs and of exits, and the trials of canaries, judge by such a window.
"""

from __future__ import annotations

from collections import deque

from isthmus.artifacts.bounds import exceeds

# Latest outcomes that count, so that a drift, or a fault that begins late, shows.
WINDOW = 500
# That the limit is exceeded before a guard acts: every check tests again, so 0.95 would act too often.
GUARD_CONFIDENCE = 0.999


class LatestOutcomes:
    """The latest WINDOW outcomes, each good or bad; not thread-safe."""

    def __init__(self) -> None:
        self._bad: deque[bool] = deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self._bad)

    def add(self, *, is_bad: bool) -> None:
        """Add an outcome; beyond WINDOW the oldest is dropped."""
        self._bad.append(is_bad)

    def clear(self) -> None:
        """Start anew."""
        self._bad.clear()

    @property
    def share(self) -> float:
        """Share of bad outcomes; 0 without any outcome."""
        return self._bad.count(True) / len(self._bad) if self._bad else 0.0

    def facts(self) -> dict[str, float]:
        """Number of outcomes and share of bad outcomes, for logs."""
        return {"checks": len(self), "disagreement": round(self.share, 4)}

    def exceed(self, limit: float, confidence: float = GUARD_CONFIDENCE) -> bool:
        """Whether bad outcomes have a rate above `limit`, with this confidence."""
        return exceeds(self._bad.count(True), len(self._bad), limit, confidence)
