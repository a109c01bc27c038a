"""All divisions that are the fastest at some bandwidth of one link, found without trying bandwidths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from isthmus.errors import ProblemMalformed
from isthmus_tools.planner.search.division import Labels
from isthmus_tools.planner.search.network import Network, Row, prices
from isthmus_tools.planner.search.problem import Problem
from isthmus_tools.planner.search.solve import Assignment, assignment

_DIGITS = 15


@dataclass(frozen=True)
class Piece:
    """The division that is the fastest while the link takes `low` <= s < `high` seconds per byte.

    Its seconds there are `base` + s x `bytes`; `bytes` weighs those on their way down with the sweep's `down`.
    """

    low: float
    high: float
    labels: Labels
    base: float
    bytes: float

    def at(self, problem: Problem, boundary: int, seconds_per_byte: float, down: float = 1.0) -> Assignment:
        """This division at one bandwidth."""
        return assignment(with_speed(problem, boundary, seconds_per_byte, down), self.labels)


@dataclass(frozen=True)
class _Line:
    labels: Labels
    base: Fraction
    slope: Fraction

    def __call__(self, x: Fraction) -> Fraction:
        return self.base + x * self.slope


def sweep(problem: Problem, boundary: int = 0, down: float = 1.0) -> list[Piece]:
    """The lower envelope over the speed of the link at `boundary`, from 0 seconds per byte to an infinite number.

    A byte down takes `down` times as long as one up; the link's own speeds are ignored, its fixed seconds count. Each
    division is a line over seconds per byte, so the fastest ones form a concave chain. Two neighbours on it that meet
    where a minimum cut finds nothing below them are final; else what it finds lies between (Eisner, Severance 1976):
    p pieces take at most 2p + 1 cuts. A division that is never the fastest, though no other is better both in time and
    bytes, is not on the envelope. Where two cost the same over a whole stretch, the one with fewer bytes is listed.

    Units: lines are compared as exact fractions, their seconds rounded to 1e-15 of the slowest piece's.

    Raises:
        ProblemMalformed: no such boundary, or `down` is negative or unbounded.
        Infeasible: no division is allowed.
    """
    if not 0 <= boundary < len(problem.links) or not 0 <= down < math.inf:
        raise ProblemMalformed(f"nothing to sweep at boundary {boundary}", boundary=boundary, down=down)
    network = Network(problem)
    fixed = prices(with_speed(problem, boundary, 0.0, down))
    moving = prices(with_speed(problem, boundary, 1.0, down)) - fixed
    ends = [network.cheapest(row) for row in (fixed, moving)]
    slowest = max(float(network.learn(labels) @ fixed) for labels in ends)
    digits = _DIGITS - math.ceil(math.log10(slowest)) if slowest > 0 else _DIGITS

    def line(labels: Labels) -> _Line:
        found = network.learn(labels)
        return _Line(labels, _dot(found, fixed, digits), _dot(found, moving))

    first, last = map(line, ends)
    chain, waiting = [first], [last]
    while waiting:
        left, right = chain[-1], waiting[-1]
        if right.slope >= left.slope:
            # As many bytes for no more time, or more bytes: one of the two is never needed.
            better = min(left, right, key=lambda k: (k.slope, k.base))
            chain[-1] = better
            waiting.pop()
            continue
        meet = (right.base - left.base) / (left.slope - right.slope)
        below = line(network.cheapest(fixed + float(meet) * moving)) if meet > 0 else left
        lower = below(meet) < min(left(meet), right(meet))
        if lower and right.slope <= below.slope <= left.slope:
            waiting.append(below)
            continue
        chain.append(waiting.pop())
    return _pieces(chain)


def with_speed(problem: Problem, boundary: int, seconds_per_byte: float, down: float = 1.0) -> Problem:
    """`problem` with another speed of the link at `boundary`: so many seconds per byte up, `down` times those down."""
    links = list(problem.links)
    links[boundary] = replace(links[boundary], up=seconds_per_byte, down=seconds_per_byte * down)
    return replace(problem, links=tuple(links))


def _dot(amounts: Row, row: Row, digits: int | None = None) -> Fraction:
    pairs = zip(amounts.tolist(), row.tolist(), strict=True)
    exact = sum((Fraction(a) * Fraction(p) for a, p in pairs if a and p), Fraction(0))
    # Sums of decimals differ in their last bits where they should tie, and would leave pieces of no width.
    return exact if digits is None else round(exact, digits)


def _pieces(chain: Sequence[_Line]) -> list[Piece]:
    kept: list[tuple[Fraction, _Line]] = []
    for line in chain:
        start = Fraction(0)
        while kept:
            low, before = kept[-1]
            start = (line.base - before.base) / (before.slope - line.slope)
            if start > low:
                break
            kept.pop()
            start = Fraction(0)
        kept.append((start, line))
    ends = [*(float(low) for low, _ in kept[1:]), math.inf]
    return [
        Piece(float(low), high, line.labels, float(line.base), float(line.slope))
        for (low, line), high in zip(kept, ends, strict=True)
    ]
