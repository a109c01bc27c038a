"""Time budgets of plans and profiles: steps in progress finish, later steps are left out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """Seconds from the start `began`, by `clock`; unlimited by default."""

    seconds: float = math.inf
    clock: Callable[[], float] = time.monotonic
    began: float = field(default=math.nan)

    def __post_init__(self) -> None:
        if math.isnan(self.began):
            # The dataclass is frozen; the default start depends on the instance's own clock.
            object.__setattr__(self, "began", self.clock())

    @property
    def spent(self) -> bool:
        """Whether no further step should begin."""
        return self.clock() - self.began >= self.seconds

    def share(self, part: float) -> Budget:
        """A budget with the same start and `part` (0 to 1) of the seconds: leaves the rest to later stages."""
        return Budget(self.seconds * part, self.clock, self.began)


UNLIMITED = Budget(math.inf, began=0.0)


class Pace:
    """An estimate of the remaining time of `total` similar steps, from the mean of finished steps."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._began = clock()

    def left(self, done: int) -> str:
        """`, about 40 s left` after `done` steps; empty before the first and after the last."""
        if not 0 < done < self._total:
            return ""
        seconds = max(1.0, (self._clock() - self._began) / done * (self._total - done))
        # Minutes from 100 s on: more digits would change with every step.
        return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"
