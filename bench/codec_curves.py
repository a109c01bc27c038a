"""Rate against fidelity: what each way to send costs at each quality, and what a curve costs at a given agreement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from isthmus.artifacts.bounds import wilson
from isthmus_tools.calibration.scoring import Tally

MIN_CHANGED = 10
"""Changed predictions that a share must allow among the inputs that decide a goal: as many as 99% allow among the 1,000
inputs of a full run."""


@dataclass(frozen=True)
class Point:
    """One way at one quality. Units: bytes are means over the scored inputs, bits for one value, ms of CPU time.

    `looks` is how many closer looks an input took on average.
    """

    name: str
    bytes: float
    bits: float
    same: float
    low: float
    high: float
    error: float
    pack_ms: float
    unpack_ms: float
    fell_back: float = 0.0
    looks: float = 0.0

    @property
    def family(self) -> str:
        """What it is a quality of: the name up to its `@`, or a picture format without its number."""
        return self.name.partition("@")[0].strip()


def point(name: str, tally: Tally, values: int, mean_bytes: float | None = None) -> Point:
    """What a tally says; `values` of one input."""
    size = statistics.fmean(tally.bytes) if mean_bytes is None else mean_bytes
    low, high = tally.interval()
    return Point(
        name,
        size,
        8 * size / values,
        tally.agreement,
        low,
        high,
        tally.mean_error(),
        1000 * statistics.median(tally.encode_s or [0.0]),
        1000 * statistics.median(tally.decode_s or [0.0]),
        tally.fell_back / len(tally.bytes),
    )


def curve(points: Iterable[Point], *families: str) -> list[Point]:
    """The points of one family, or of some, fewest bytes first."""
    return sorted((p for p in points if p.family in families), key=lambda p: p.bytes)


def bytes_at(points: Sequence[Point], wanted: float, of: Callable[[Point], float] = lambda p: p.same) -> float | None:
    """Bytes at which a curve reaches `wanted` of what `of` measures, the more the better; None where it never does.

    A point that is no better than a smaller one is passed over. Between two, bytes are interpolated in their logarithm.
    Below the smallest point, that one's bytes stand, which is no advantage to the curve.
    """
    before: Point | None = None
    for p in points:
        if before is not None and of(p) <= of(before):
            continue
        if of(p) >= wanted:
            if before is None:
                return p.bytes
            share = (wanted - of(before)) / (of(p) - of(before))
            return math.exp(math.log(before.bytes) + share * (math.log(p.bytes) - math.log(before.bytes)))
        before = p
    return None


def fewer(ours: Sequence[Point], theirs: Sequence[Point], wanted: float, of: Callable[[Point], float]) -> float | None:
    """How many times fewer bytes than `theirs` our curve takes for the same."""
    mine, other = bytes_at(ours, wanted, of), bytes_at(theirs, wanted, of)
    return other / mine if mine is not None and other is not None else None


def fewest_bits(points: Iterable[Point], least_accuracy: float) -> Point | None:
    """The point of the fewest bits whose accuracy (1 - error) is at least that; None without one."""
    return min((p for p in points if 1 - p.error >= least_accuracy), key=lambda p: p.bits, default=None)


@dataclass(frozen=True)
class Comparison:
    """A goal: where both keep a share of the predictions, the bytes of a peer over ours reach `goal`.

    `theirs` gives the bytes of the peer at a share; None where it never keeps so many.
    """

    name: str
    share: float
    goal: float
    ours: Sequence[Point]
    theirs: Callable[[float], float | None]

    def times_fewer(self, share: float) -> float:
        """The ratio at a share; 0 where a curve never keeps so many."""
        theirs, mine = self.theirs(share), bytes_at(self.ours, share)
        return theirs / mine if theirs is not None and mine is not None else 0.0

    def decided(self, inputs: int) -> bool:
        """Whether so many inputs decide it: met, or missed, at both ends of the 95% interval of the share."""
        if inputs * (1 - self.share) < MIN_CHANGED:
            return False
        low, high = (self.times_fewer(end) >= self.goal for end in wilson(self.share, inputs))
        return low == high
