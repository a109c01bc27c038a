"""Rate–distortion curves: points of codecs and peers, interpolation, and comparison with a goal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from isthmus.artifacts.bounds import wilson
from isthmus_tools.calibration.scoring import Tally

# Changed predictions that a share must allow among the inputs that decide a goal: as 99% allows among the 1,000 inputs
# of a full run.
MIN_CHANGED = 10


@dataclass(frozen=True)
class Point:
    """A codec or peer at a quality. Units: bytes are means over the scored inputs, bits per value, ms of CPU time.

    `looks` is the mean number of closer looks of an input.
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
        """The codec: the name up to its `@`, or a picture format without its number."""
        return self.name.partition("@")[0].strip()


def point(name: str, tally: Tally, values: int, mean_bytes: float | None = None) -> Point:
    """The point of a tally; `values` counts an input's."""
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
    """The points of some families, fewest bytes first."""
    return sorted((p for p in points if p.family in families), key=lambda p: p.bytes)


def bytes_at(points: Sequence[Point], level: float, of: Callable[[Point], float] = lambda p: p.same) -> float | None:
    """Bytes at which a curve reaches `level` of the score `of`; None where the curve stays below.

    Points on the Pareto front are interpolated in the logarithm of bytes. Below the smallest point its bytes count,
    to the curve's disadvantage.
    """
    before: Point | None = None
    for p in points:
        if before is not None and of(p) <= of(before):
            continue
        if of(p) >= level:
            if before is None:
                return p.bytes
            share = (level - of(before)) / (of(p) - of(before))
            return math.exp(math.log(before.bytes) + share * (math.log(p.bytes) - math.log(before.bytes)))
        before = p
    return None


def fewer(ours: Sequence[Point], theirs: Sequence[Point], level: float, of: Callable[[Point], float]) -> float | None:
    """Bytes of `theirs` over bytes of `ours` at the same level."""
    mine, other = bytes_at(ours, level, of), bytes_at(theirs, level, of)
    return other / mine if mine is not None and other is not None else None


def fewest_bits(points: Iterable[Point], min_accuracy: float) -> Point | None:
    """The point of the fewest bits with at least that accuracy (1 - error); None without such a point."""
    return min((p for p in points if 1 - p.error >= min_accuracy), key=lambda p: p.bits, default=None)


@dataclass(frozen=True)
class Comparison:
    """A goal: at an equal share of unchanged predictions, a peer's bytes over ours reach `goal`.

    `theirs` gives the peer's bytes at a share; None where the peer stays below.
    """

    name: str
    share: float
    goal: float
    ours: Sequence[Point]
    theirs: Callable[[float], float | None]

    def times_fewer(self, share: float) -> float:
        """The ratio at a share; 0 where a curve stays below."""
        theirs, mine = self.theirs(share), bytes_at(self.ours, share)
        return theirs / mine if theirs is not None and mine is not None else 0.0

    def decided(self, inputs: int) -> bool:
        """Whether the goal is met, or missed, at both ends of the share's 95% interval for that number of inputs."""
        if inputs * (1 - self.share) < MIN_CHANGED:
            return False
        low, high = (self.times_fewer(end) >= self.goal for end in wilson(self.share, inputs))
        return low == high
