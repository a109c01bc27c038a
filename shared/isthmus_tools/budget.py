"""A limit on the time of a plan or a profile: what is under way is finished, what has not begun is left out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """Seconds from `began` on, by `clock`; unlimited by default."""

    seconds: float = math.inf
    clock: Callable[[], float] = time.monotonic
    began: float = field(default=math.nan)

    def __post_init__(self) -> None:
        if math.isnan(self.began):
            object.__setattr__(self, "began", self.clock())

    @property
    def spent(self) -> bool:
        """Whether nothing more should begin."""
        return self.clock() - self.began >= self.seconds

    def share(self, part: float) -> Budget:
        """The first `part` of it, from 0 to 1: what must be over for the rest to have its time."""
        return Budget(self.seconds * part, self.clock, self.began)


UNLIMITED = Budget(math.inf, began=0.0)


class Pace:
    """How long a series of `total` alike pieces of work has still to go, from how long those before took."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._began = clock()

    def left(self, done: int) -> str:
        """`, about 40 s left` after `done` pieces; empty before the first."""
        if not 0 < done < self._total:
            return ""
        seconds = max(1.0, (self._clock() - self._began) / done * (self._total - done))
        return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"
