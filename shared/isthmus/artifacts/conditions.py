"""What a plan is made for: the link between the tiers, what must hold, and what is to be least."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeAlias

from isthmus.errors import ConstraintMalformed

OBJECTIVES = ("latency", "throughput", "cost", "energy")
Objective: TypeAlias = str
"""One of OBJECTIVES: the least time of a request, the most requests a second, the least money, the fewest joules."""

MAX_ERROR = 0.05
"""What answers may differ where nothing is asked for and calibration has not measured them: see `Error.relative`."""


@dataclass(frozen=True)
class Conditions:
    """The link between edge and cloud, on top of the network that is there: bits per second each way, seconds there
    and back. By default it adds nothing.

    Raises:
        ConstraintMalformed: a rate that is not positive, or a time that is negative.
    """

    uplink_bps: float = math.inf
    downlink_bps: float = math.inf
    rtt_s: float = 0.0

    def __post_init__(self) -> None:
        for what in ("uplink_bps", "downlink_bps"):
            if not getattr(self, what) > 0:
                raise ConstraintMalformed(f"the rate {what} is {getattr(self, what)}; it is above 0", what=what)
        if not 0 <= self.rtt_s < math.inf:
            raise ConstraintMalformed(f"the round trip is {self.rtt_s} s; it is 0 or more", what="rtt_s")

    @property
    def adds_nothing(self) -> bool:
        """Whether the link is no slower than the network that is there."""
        return math.isinf(self.uplink_bps) and math.isinf(self.downlink_bps) and self.rtt_s == 0

    @property
    def up_byte_s(self) -> float:
        """Seconds per byte towards the cloud."""
        return 8 / self.uplink_bps

    @property
    def down_byte_s(self) -> float:
        """Seconds per byte back."""
        return 8 / self.downlink_bps


@dataclass(frozen=True)
class Constraints:
    """What a candidate must keep to; None asks for nothing more.

    `private_depth` nodes, the first ones in topological order, run at the edge, and so do all that read an input of the
    model where it is not 0: no cut lies before them, and no input crosses one. `max_error` bounds `Error.relative`,
    `max_disagreement` the share of inputs with another answer. Without `max_error`, MAX_ERROR holds, and what a
    calibrated bundle offers is good enough.
    Units: bytes, seconds.

    Raises:
        ConstraintMalformed: one is negative, or cannot be met by any number.
    """

    edge_memory_bytes: int | None = None
    private_depth: int = 0
    latency_s: float | None = None
    max_error: float | None = None
    max_disagreement: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not 0 <= value < math.inf:
                raise ConstraintMalformed(f"the constraint {f.name} is {value}; it is 0 or more", what=f.name)
        if self.max_disagreement is not None and self.max_disagreement > 1:
            raise ConstraintMalformed(
                f"the constraint max_disagreement is {self.max_disagreement}; a share is at most 1",
                what="max_disagreement",
            )
        for what in ("edge_memory_bytes", "latency_s"):
            if getattr(self, what) == 0:
                raise ConstraintMalformed(f"the constraint {what} is 0; nothing runs in that", what=what)


def check_objective(text: str) -> Objective:
    """`text`, if it is one of OBJECTIVES.

    Raises:
        ConstraintMalformed: it is not; names those there are.
    """
    if text not in OBJECTIVES:
        raise ConstraintMalformed(f"the objective is {text!r}; it is one of {', '.join(OBJECTIVES)}", what="objective")
    return text
