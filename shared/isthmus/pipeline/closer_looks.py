"""Closer looks: confidence-gated second transmission.

Where the margin of the prediction is below a look's threshold, the router sends the boundary tensors again, whole and
at a finer quality, and runs the segments behind them again. Source: docs/explanation/calibration.md, "Closer looks".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isthmus.arrays import Array
from isthmus.artifacts.choice import Look
from isthmus.context import Deadline
from isthmus.errors import IsthmusError

# The margin was sufficient; no look remained; no time remained; a look failed and the prediction before it stands.
OUTCOMES = ("sure", "last", "late", "failed")

# A hop that hangs must leave time for the response: a look has at most ten times the seconds of the run before, but at
# least a second, since short runs vary by more than that.
_MIN_BOUND_S, _MAX_SLOWDOWN = 1.0, 10.0


@dataclass(frozen=True)
class LookPolicy:
    """The looks of a route, in order, each with its quality and its threshold.

    `margin_of` computes the margin of the model's outputs, in nats (`pipeline.agreement.margin_of`).
    """

    looks: tuple[Look, ...]
    margin_of: Callable[[Mapping[str, Array]], float]


@dataclass(frozen=True)
class LooksTaken:
    """The outcome, one of OUTCOMES, and the count of looks taken."""

    outcome: str
    count: int = 0
    error: IsthmusError | None = field(default=None, compare=False)
    """The reason why the next look failed, for the log; responses do not name it."""


def take_looks(
    policy: LookPolicy,
    deadline: Deadline,
    first_s: float,
    outputs: Callable[[], Mapping[str, Array]],
    repeat: Callable[[float, Deadline], float],
) -> LooksTaken:
    """Take looks until the prediction is clear.

    `repeat(quality, deadline)` transmits and runs again, replaces the outputs once all segments have run, and returns
    the seconds of that; the transmission before the first look took `first_s`. An error of `repeat` leaves the
    prediction unchanged.
    """
    latest_s = first_s
    for count, look in enumerate(policy.looks):
        if policy.margin_of(outputs()) >= look.margin:
            return LooksTaken("sure", count)
        bound_s = min(deadline.remaining() / 2, max(_MIN_BOUND_S, _MAX_SLOWDOWN * latest_s))
        if bound_s < latest_s:
            return LooksTaken("late", count)
        try:
            latest_s = repeat(look.quality, Deadline.after(bound_s))
        except IsthmusError as e:
            return LooksTaken("failed", count, e)
    return LooksTaken("last", len(policy.looks))
