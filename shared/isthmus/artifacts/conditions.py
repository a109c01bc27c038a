"""The conditions of a plan: the link between the tiers, the constraints, and the objective."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct
from msgspec.structs import asdict, force_setattr

from isthmus.artifacts.constraints import Amount, Count, Share, one_of
from isthmus.errors import ConstraintMalformed

OBJECTIVES = ("latency", "throughput", "cost", "energy")
Objective: TypeAlias = Annotated[str, one_of(*OBJECTIVES)]
"""One of OBJECTIVES: the least time of a request, the most requests a second, the least money, the fewest joules."""

_Rate = Annotated[float, Meta(gt=0)]

MAX_ERROR = 0.05
"""The default bound on `Error.relative` for candidates without calibration."""


class Conditions(Struct, frozen=True, forbid_unknown_fields=True):
    """The emulated link between edge and cloud, beside the network that is there: bits per second each way (None:
    unlimited; infinity becomes None) and the round trip in seconds. The default adds nothing.

    Raises:
        ConstraintMalformed: a rate that is not positive, or a time that is negative.
    """

    uplink_bps: _Rate | None = None
    downlink_bps: _Rate | None = None
    rtt_s: Amount = 0.0

    def __post_init__(self) -> None:
        for what in ("uplink_bps", "downlink_bps"):
            rate = getattr(self, what)
            if rate is not None and not rate > 0:
                raise ConstraintMalformed(f"the rate {what} is {rate}; it is above 0", what=what)
            # JSON has no infinity.
            force_setattr(self, what, None if rate == math.inf else rate)
        if not 0 <= self.rtt_s < math.inf:
            raise ConstraintMalformed(f"the round trip is {self.rtt_s} s; it is 0 or more", what="rtt_s")

    @property
    def adds_nothing(self) -> bool:
        """Whether the link is no slower than the network that is there."""
        return self.uplink_bps is None and self.downlink_bps is None and self.rtt_s == 0

    @property
    def up_bps(self) -> float:
        """The rate towards the cloud; infinite where it is unlimited."""
        return math.inf if self.uplink_bps is None else self.uplink_bps

    @property
    def down_bps(self) -> float:
        """The rate back; infinite where it is unlimited."""
        return math.inf if self.downlink_bps is None else self.downlink_bps

    @property
    def up_byte_s(self) -> float:
        """Seconds per byte towards the cloud."""
        return 8 / self.up_bps

    @property
    def down_byte_s(self) -> float:
        """Seconds per byte back."""
        return 8 / self.down_bps


class Constraints(Struct, frozen=True, forbid_unknown_fields=True):
    """The constraints on a candidate; None is no constraint.

    `private_depth` nodes, the first ones in topological order, run at the edge, and so do all that read an input of the
    model where it is not 0: no cut lies before them, and no input crosses one. `max_error` bounds `Error.relative`,
    `max_disagreement` the share of inputs with another answer. Without `max_error`, MAX_ERROR holds, and what a
    calibrated bundle offers is good enough.
    Units: bytes, seconds.

    Raises:
        ConstraintMalformed: one is negative, or cannot be met by any number.
    """

    edge_memory_bytes: Count | None = None
    private_depth: Count = 0
    latency_s: Amount | None = None
    max_error: Amount | None = None
    max_disagreement: Share | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value < math.inf:
                raise ConstraintMalformed(f"the constraint {name} is {value}; it is 0 or more", what=name)
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
