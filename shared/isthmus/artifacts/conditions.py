"""The conditions of a plan: the link between the tiers, the constraints, and the objective."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct
from msgspec.structs import asdict, force_setattr

from isthmus.artifacts.constraints import Amount, Count, Share, one_of
from isthmus.errors import ConstraintMalformed

GENERATION_OBJECTIVES = ("first-token", "per-token")
"""Objectives of language models alone: minimal time to the first token, minimal time of a further token."""
OBJECTIVES = ("latency", "throughput", "cost", "energy", *GENERATION_OBJECTIVES)
# One of OBJECTIVES: minimal latency of a request, maximal requests per second, minimal price, minimal joules, and
# those of GENERATION_OBJECTIVES.
Objective: TypeAlias = Annotated[str, one_of(*OBJECTIVES)]

_Rate = Annotated[float, Meta(gt=0)]

# Default bound on `Error.relative` for candidates without calibration.
MAX_ERROR = 0.05


class Conditions(Struct, frozen=True, forbid_unknown_fields=True):
    """The emulated link between edge and cloud, in addition to the real network: bits per second each way (None:
    unlimited; infinity becomes None) and round-trip time in seconds. The default adds nothing.

    Raises:
        ConstraintMalformed: a rate is not positive, or the round-trip time is negative.
    """

    uplink_bps: _Rate | None = None
    downlink_bps: _Rate | None = None
    rtt_s: Amount = 0.0

    def __post_init__(self) -> None:
        for field in ("uplink_bps", "downlink_bps"):
            rate = getattr(self, field)
            if rate is not None and not rate > 0:
                raise ConstraintMalformed(f"the rate {field} is {rate}; it is above 0", what=field)
            # JSON has no infinity.
            force_setattr(self, field, None if rate == math.inf else rate)
        if not 0 <= self.rtt_s < math.inf:
            raise ConstraintMalformed(f"the round trip is {self.rtt_s} s; it is 0 or more", what="rtt_s")

    @property
    def adds_nothing(self) -> bool:
        """Whether the link is no slower than the real network."""
        return self.uplink_bps is None and self.downlink_bps is None and self.rtt_s == 0

    @property
    def up_bps(self) -> float:
        """Rate towards the cloud; infinite if unlimited."""
        return math.inf if self.uplink_bps is None else self.uplink_bps

    @property
    def down_bps(self) -> float:
        """Rate towards the edge; infinite if unlimited."""
        return math.inf if self.downlink_bps is None else self.downlink_bps

    @property
    def up_byte_s(self) -> float:
        """Seconds per byte towards the cloud."""
        return 8 / self.up_bps

    @property
    def down_byte_s(self) -> float:
        """Seconds per byte towards the edge."""
        return 8 / self.down_bps


class Constraints(Struct, frozen=True, forbid_unknown_fields=True):
    """Constraints on a candidate; None is unconstrained.

    The first `private_depth` nodes in topological order run at the edge. If the depth is not 0, so do all readers of a
    model input: no cut lies before these nodes, and no input is transmitted. `max_error` bounds `Error.relative`,
    `max_disagreement` the share of inputs with another prediction. Without `max_error`, MAX_ERROR applies to
    uncalibrated bundles, and calibrated bundles are accepted as measured. Of a language model `private_depth` counts
    layers, `latency_s` is for a whole answer, `first_token_s` and `per_token_s` are for its parts.
    `private_ssim` bounds the similarity of an input to its reconstruction from boundary tensors, by the leak document.
    Units: bytes, seconds.

    Raises:
        ConstraintMalformed: a negative or unsatisfiable constraint.
    """

    edge_memory_bytes: Count | None = None
    private_depth: Count = 0
    latency_s: Amount | None = None
    max_error: Amount | None = None
    max_disagreement: Share | None = None
    first_token_s: Amount | None = None
    per_token_s: Amount | None = None
    private_ssim: Share | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            # Checked here as well as by the annotations: msgspec validates decoded documents, not constructor calls.
            if value is not None and not 0 <= value < math.inf:
                raise ConstraintMalformed(f"the constraint {name} is {value}; it is 0 or more", what=name)
        for name, most in (("max_disagreement", "a share"), ("private_ssim", "a similarity")):
            if (value := getattr(self, name)) is not None and value > 1:
                raise ConstraintMalformed(f"the constraint {name} is {value}; {most} is at most 1", what=name)
        for field in ("edge_memory_bytes", "latency_s", "first_token_s", "per_token_s"):
            if getattr(self, field) == 0:
                raise ConstraintMalformed(f"the constraint {field} is 0; nothing runs in that", what=field)


def check_objective(text: str) -> Objective:
    """`text`, if one of OBJECTIVES.

    Raises:
        ConstraintMalformed: any other text; the message lists OBJECTIVES.
    """
    if text not in OBJECTIVES:
        raise ConstraintMalformed(f"the objective is {text!r}; it is one of {', '.join(OBJECTIVES)}", what="objective")
    return text
