"""The division of least latency, exact for any number of tiers, and the parametric sweep over a link's bandwidth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from isthmus.errors import ProblemMalformed
from isthmus_tools.planner.search.min_cut import MinCut, Row, prices
from isthmus_tools.planner.search.problem import Labels, Problem, cost, usage

# As in `min_cut`: decimal inputs agree to 15 significant digits, and not always in the last bits of a double.
_DIGITS = 15


@dataclass(frozen=True)
class Assignment:
    """A division with the seconds of one request and the tensors sent over each boundary, each way.

    Tensors are indices into `Problem.tensors`: `up` towards later tiers, `down` towards the caller, or from a caller on
    a later tier.
    """

    labels: Labels
    seconds: float
    up: tuple[tuple[int, ...], ...]
    down: tuple[tuple[int, ...], ...]


def assignment(problem: Problem, labels: Labels) -> Assignment:
    """`labels` with cost and tensors sent.

    Raises:
        ProblemMalformed: the number of labels is not the number of nodes, or a label is no tier.
    """
    total = usage(problem, labels)
    return Assignment(labels, cost(problem, labels), total.up, total.down)


def solve(problem: Problem) -> Assignment:
    """The allowed division of least `cost`; of equal divisions, each node on the earliest tier.

    Every term, fixed seconds included, is a cut of the flow network (see `flow_network`). Times are counted in units of
    at most 1e-14 of the optimum (see `MinCut.cheapest`).

    Raises:
        Infeasible: no division is allowed; names the node without a tier.
    """
    return assignment(problem, MinCut(problem).cheapest(prices(problem)))


@dataclass(frozen=True)
class Piece:
    """The fastest division while the link takes `low` <= s < `high` seconds per byte.

    Latency there is `base` + s x `bytes`; `bytes` weighs bytes down by the sweep's `down`.
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
    """The lower envelope of latency over the link speed at `boundary`, from 0 to infinite seconds per byte.

    A byte down takes `down` times as long as a byte up; the link's own speeds are ignored, fixed seconds count. Each
    division is a line over seconds per byte, so the fastest divisions form a concave chain. If a minimum cut at the
    intersection of two neighbours on the chain is no faster, both are final; else the cut lies between both: p pieces
    take at most 2p + 1 cuts. A division that is Pareto-optimal in time and bytes but never the fastest is not on the
    envelope. Of divisions that tie over an interval, the division with fewer bytes is listed.

    Units: lines are compared as exact fractions, seconds rounded to 1e-15 of the slowest piece.

    Raises:
        ProblemMalformed: no such boundary, or `down` is negative or unbounded.
        Infeasible: no division is allowed.

    Source: Eisner, Severance 1976.
    """
    if not 0 <= boundary < len(problem.links) or not 0 <= down < math.inf:
        raise ProblemMalformed(f"nothing to sweep at boundary {boundary}", boundary=boundary, down=down)
    minimum = MinCut(problem)
    constant = prices(with_speed(problem, boundary, 0.0, down))
    per_byte = prices(with_speed(problem, boundary, 1.0, down)) - constant
    # The ends of the envelope: the fastest division on an infinitely fast link, and the division of fewest bytes.
    ends = [minimum.cheapest(row) for row in (constant, per_byte)]
    slowest = max(float(minimum.add_bound(labels) @ constant) for labels in ends)
    digits = _DIGITS - math.ceil(math.log10(slowest)) if slowest > 0 else _DIGITS

    def line(labels: Labels) -> _Line:
        amounts = minimum.add_bound(labels)
        return _Line(labels, _dot(amounts, constant, digits), _dot(amounts, per_byte))

    first, last = map(line, ends)
    chain, candidates = [first], [last]
    while candidates:
        left, right = chain[-1], candidates[-1]
        if right.slope >= left.slope:
            # As many bytes for no less time, or more bytes: the worse of the two is nowhere on the envelope.
            chain[-1] = min(left, right, key=lambda k: (k.slope, k.base))
            candidates.pop()
            continue
        meet = (right.base - left.base) / (left.slope - right.slope)
        below = line(minimum.cheapest(constant + float(meet) * per_byte)) if meet > 0 else left
        lower = below(meet) < min(left(meet), right(meet))
        if lower and right.slope <= below.slope <= left.slope:
            candidates.append(below)
            continue
        chain.append(candidates.pop())
    return _pieces(chain)


def with_speed(problem: Problem, boundary: int, seconds_per_byte: float, down: float = 1.0) -> Problem:
    """`problem` with other times of the link at `boundary`: seconds per byte up, and `down` times as much down."""
    links = list(problem.links)
    links[boundary] = replace(links[boundary], up=seconds_per_byte, down=seconds_per_byte * down)
    return replace(problem, links=tuple(links))


def _dot(amounts: Row, row: Row, digits: int | None = None) -> Fraction:
    pairs = zip(amounts.tolist(), row.tolist(), strict=True)
    exact = sum((Fraction(a) * Fraction(p) for a, p in pairs if a and p), Fraction(0))
    # Sums of decimals differ in the last bits where equal, and would leave pieces of no width.
    return exact if digits is None else round(exact, digits)


def _pieces(chain: Sequence[_Line]) -> list[Piece]:
    envelope: list[tuple[Fraction, _Line]] = []
    for line in chain:
        start = Fraction(0)
        while envelope:
            low, before = envelope[-1]
            start = (line.base - before.base) / (before.slope - line.slope)
            if start > low:
                break
            # The line before is beaten over the whole interval: rounding of `digits` can do that.
            envelope.pop()
            start = Fraction(0)
        envelope.append((start, line))
    ends = [*(float(low) for low, _ in envelope[1:]), math.inf]
    return [
        Piece(float(low), high, line.labels, float(line.base), float(line.slope))
        for (low, line), high in zip(envelope, ends, strict=True)
    ]
