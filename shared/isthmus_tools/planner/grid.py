"""The best candidate for every link: over bandwidth and round trip, from what each has to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Candidate, Measured
from isthmus_tools.planner.choose import VALUES, broken
from isthmus_tools.planner.costs import HEADERS_DOWN, HEADERS_UP

RATES = (0.5e6, 1e6, 2e6, 5e6, 10e6, 20e6, 50e6, 100e6, 200e6, 500e6, 1e9)
ROUND_TRIPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)


@dataclass(frozen=True)
class Cell:
    """One link, and the best candidate there; "" where none keeps the constraints."""

    conditions: Conditions
    best: str
    seconds: float


def under(candidate: Candidate, conditions: Conditions) -> Candidate:
    """`candidate` over another link: its bytes take what they take there, all else stays as it was.

    A measured one is moved by the difference of what was predicted, so its own deviation stays in it.
    """
    t = candidate.predicted
    if candidate.up_bytes or candidate.down_bytes:
        moved = replace(
            t,
            up=(candidate.up_bytes + candidate.calls * HEADERS_UP) * conditions.up_byte_s,
            down=(candidate.down_bytes + candidate.calls * HEADERS_DOWN) * conditions.down_byte_s,
            rtt=candidate.calls * conditions.rtt_s,
        )
    else:
        moved = t
    seen = candidate.measured
    if seen is not None:
        by = moved.total - t.total
        # Faster than a measurement's own link terms were, it may not become less than nothing.
        low, median, high = (max(1e-6, s + by) for s in (seen.low, seen.median, seen.high))
        seen = Measured(median, low, high, seen.runs)
    return replace(candidate, predicted=moved, measured=seen)


def grid(
    candidates: Sequence[Candidate],
    objective: Objective,
    constraints: Constraints,
    *,
    rates: Sequence[float] = RATES,
    round_trips: Sequence[float] = ROUND_TRIPS,
    down_share: float = 1.0,
) -> list[list[Cell]]:
    """The best candidate of every link, a row for each round trip and in it a cell for each rate.

    `down_share` is the rate back as a multiple of the rate there. All of it is predicted, that of measured candidates
    too: some were measured on one link, and most on none, so nothing else compares like with like.
    """
    value = VALUES[objective]
    candidates = [replace(c, measured=None) for c in candidates]
    rows = []
    for rtt_s in round_trips:
        row = []
        for rate in rates:
            conditions = Conditions(rate, rate * down_share, rtt_s)
            there = [under(c, conditions) for c in candidates]
            able = [c for c in there if not broken(c, constraints)]
            best = min(able, key=value, default=None)
            row.append(Cell(conditions, best.name if best else "", best.seconds if best else 0.0))
        rows.append(row)
    return rows
