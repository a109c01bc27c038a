"""The division of highest throughput: the fastest slowest stage of a pipeline.

In a pipeline the tiers work on different requests at once, and each link carries the tensors of one request while the
tiers compute others. Stages are the k tiers and the two directions of each link (full duplex). Fixed seconds delay a
request but occupy no stage, so they do not count here.

Exactness: over *prefix* divisions, where each tier takes a contiguous run of the topological order, the result is the
optimum. On a chain every division is a prefix. On a DAG with branches the problem is NP-hard: two tiers and independent
nodes are the partition problem. There the best prefix competes with divisions from minimum cuts, and `bound` limits the
possible improvement.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from isthmus_tools.planner.search.min_cut import Ints, MinCut, Row, amounts, prices
from isthmus_tools.planner.search.problem import Labels, Problem, cost, earliest_tiers, usage

Floats = npt.NDArray[np.float64]
# A round multiplies weights by at most e: of 0.5, 1 and 2, this step gave the highest mean bound on 300 random graphs.
_STEP = 1.0
# Of 300 random graphs, 4 orders improved 49 over a single order, and 12 orders only 8 more.
_MAX_ORDERS = 4
# Minimum cuts count in whole units, so a bound from a cut may be too high by far less than this share.
_EXACT = 1 - 1e-9
# Sums in another order differ in the last bits; without this tolerance the second pass could lose the optimum.
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Pipeline:
    """A division as a pipeline: seconds of the slowest stage, of one request alone, and of each stage.

    No allowed division has a slowest stage below `bound`; where `bound` equals `slowest`, this division is optimal.
    """

    labels: Labels
    slowest: float
    seconds: float
    stages: tuple[float, ...]
    bound: float


def stages(problem: Problem, labels: Labels) -> tuple[float, ...]:
    """Seconds for which one request occupies each stage: the tiers, then each link up, then each link down.

    Raises:
        ProblemMalformed: the number of labels is not the number of nodes, or a label is no tier.
    """
    total = usage(problem, labels)
    up = (n * link.up for n, link in zip(total.up_bytes, problem.links, strict=True))
    down = (n * link.down for n, link in zip(total.down_bytes, problem.links, strict=True))
    return (*total.compute, *up, *down)


def pipeline(problem: Problem, rounds: int = 20) -> Pipeline:
    """The best division by slowest stage; of equal divisions, the division with the least latency.

    `rounds` minimum cuts raise the lower bound and yield divisions that are no prefix. Under stage weights that sum to
    1, the cheapest division weighs no more than any division's slowest stage, so each cut is a bound; then weight moves
    to the slow stages (multiplicative weights). The best of these divisions give other topological orders, whose
    prefixes are searched as well.

    Raises:
        Infeasible: no division is allowed.
    """
    minimum = MinCut(problem)
    divisions = {earliest_tiers(problem)}
    if (prefix := best_prefix(problem)) is not None:
        divisions.add(prefix)
    times = prices(problem)[: -len(problem.links)]
    weights = np.full(len(times), 1 / len(times))
    bound = _largest_node(problem)
    for _ in range(rounds):
        row: Row = np.concatenate([times * weights, np.zeros(len(problem.links))])
        labels = minimum.cheapest(row)
        divisions.add(labels)
        occupied = amounts(problem, labels)[: len(times)] * times
        bound = max(bound, float(occupied @ weights) * _EXACT)
        if not occupied.any():
            break
        weights *= np.exp(_STEP * occupied / occupied.max())
        weights /= weights.sum()
    for labels in sorted(divisions, key=lambda labels: _rank(problem, labels))[:_MAX_ORDERS]:
        divisions.update(_prefix_along(problem, labels))
    best = min(divisions, key=lambda labels: _rank(problem, labels))
    slowest = max(stages(problem, best))
    bound = slowest if _is_chain(problem) else min(bound, slowest)
    return Pipeline(best, slowest, cost(problem, best), stages(problem, best), bound)


def _rank(problem: Problem, labels: Labels) -> tuple[float, float, Labels]:
    return max(stages(problem, labels)), cost(problem, labels), labels


def _prefix_along(problem: Problem, labels: Labels) -> Iterator[Labels]:
    """The best prefix of the topological order that is sorted by the tiers of `labels`, itself such a prefix."""
    order = sorted(range(problem.nodes), key=lambda v: (labels[v], v))
    place = {v: i for i, v in enumerate(order)}
    tensors = (
        replace(
            t,
            producer=None if t.producer is None else place[t.producer],
            consumers=tuple(place[v] for v in t.consumers),
        )
        for t in problem.tensors
    )
    prefix = best_prefix(
        replace(
            problem,
            seconds=tuple(tuple(row[v] for v in order) for row in problem.seconds),
            tensors=tuple(tensors),
            pins={place[v]: pin for v, pin in problem.pins.items()},
            names=(),
        )
    )
    if prefix is not None:
        yield tuple(prefix[place[v]] for v in range(problem.nodes))


def _largest_node(problem: Problem) -> float:
    """A lower bound: some tier runs the node with the largest least run time."""
    return float(np.where(np.array(problem.allowed), np.array(problem.seconds), np.inf).min(axis=0).max())


def _is_chain(problem: Problem) -> bool:
    """Whether every node reads the node before, so that every allowed division is a prefix."""
    joined = {(t.producer, v) for t in problem.tensors for v in t.consumers}
    return all((v, v + 1) in joined for v in range(problem.nodes - 1))


def best_prefix(problem: Problem) -> Labels | None:
    """The prefix division with the fastest slowest stage; of equal divisions, the division with the least latency.

    A prefix division is k - 1 positions: boundary b lies before node p_b. Tensors over a boundary depend on p_b alone,
    a tier's seconds on two positions. For a given limit on every stage, feasibility is therefore a scan linear in nodes
    and tiers, and the least limit follows by bisection over all doubles. None where run times and pins allow no prefix.
    """
    tables = _PrefixTables.of(problem)
    if not tables.feasible(math.inf):
        return None
    # Non-negative doubles order as their bit patterns do: 64 halvings reach the exact limit.
    low, high = 0, int(np.float64(np.finfo(np.float64).max).view(np.int64))
    while low < high:
        middle = (low + high) // 2
        if tables.feasible(float(np.int64(middle).view(np.float64))):
            high = middle
        else:
            low = middle + 1
    positions = tables.fastest(float(np.int64(low).view(np.float64)) * (1 + _TOLERANCE))
    return tuple(int(t) for t in np.searchsorted(np.array(positions), np.arange(problem.nodes), side="right"))


@dataclass(frozen=True)
class _PrefixTables:
    """For each tier and position p: seconds of the nodes before p, and the first start of an allowed run to p.

    For each boundary and p: seconds of the slower direction (math.inf where p is not allowed), and seconds in all.
    """

    before: Floats  # (tiers, nodes + 1)
    first: Ints  # (tiers, nodes + 1)
    slower: Floats  # (boundaries, nodes + 1)
    spent: Floats  # (boundaries, nodes + 1)

    @classmethod
    def of(cls, problem: Problem) -> _PrefixTables:
        n = problem.nodes
        allowed = np.array(problem.allowed)
        times = np.where(allowed, np.array(problem.seconds), 0.0)
        start = np.zeros((problem.tiers, 1))
        before = np.concatenate([start, np.cumsum(times, axis=1)], axis=1)
        after_forbidden = np.where(allowed, 0, np.arange(1, n + 1))
        first = np.concatenate([start.astype(np.int64), np.maximum.accumulate(after_forbidden, axis=1)], axis=1)
        links = [_link_seconds(problem, b) for b in range(len(problem.links))]
        return cls(before, first, np.array([s for s, _ in links]), np.array([s for _, s in links]))

    def feasible(self, limit: float) -> bool:
        """Whether some prefix division has no stage above `limit` seconds."""
        tiers, places = self.before.shape
        position = np.arange(places)
        reached = position == 0
        for tier in range(tiers):
            # The latest start is the best: the run is the shortest.
            start = np.maximum.accumulate(np.where(reached, position, -1))
            took = self.before[tier] - self.before[tier][start]
            reached = (start >= self.first[tier]) & (took <= limit)
            if tier < tiers - 1:
                reached &= np.isfinite(self.slower[tier]) & (self.slower[tier] <= limit)
        return bool(reached[-1])

    def fastest(self, limit: float) -> list[int]:
        """Boundary positions of least latency with no stage above `limit` seconds; later positions if equal."""
        tiers, places = self.before.shape
        least = np.full(places, math.inf)
        least[0] = 0.0
        starts: list[list[int]] = []
        for tier in range(tiers):
            before, first = self.before[tier].tolist(), self.first[tier].tolist()
            offset = (least - self.before[tier]).tolist()
            # A monotonic queue: the minimum over a sliding window of starts, in linear time.
            window: deque[int] = deque()
            best, best_start = [math.inf] * places, [-1] * places
            for p in range(places):
                while window and offset[window[-1]] >= offset[p]:
                    window.pop()
                window.append(p)
                while window and (window[0] < first[p] or before[p] - before[window[0]] > limit):
                    window.popleft()
                if window:
                    best[p], best_start[p] = offset[window[0]] + before[p], window[0]
            least = np.array(best)
            if tier < tiers - 1:
                least = np.where(self.slower[tier] <= limit, least + self.spent[tier], math.inf)
            starts.append(best_start)
        positions = [places - 1]
        for best_start in reversed(starts[1:]):
            positions.append(best_start[positions[-1]])
        return positions[:0:-1]


def _link_seconds(problem: Problem, boundary: int) -> tuple[Floats, Floats]:
    """Seconds of the slower direction, and in all, for each position of the boundary. Shapes: (nodes + 1,)."""
    n, link = problem.nodes, problem.links[boundary]
    caller_beyond = problem.caller > boundary
    # Difference arrays: a tensor adds its bytes over a range of positions; the last row counts tensors beyond a frame.
    up, down, never = np.zeros((3, n + 2))

    def add(way: Floats, start: int, stop: int, size: float) -> None:
        row, amount = (never, 1.0) if math.isinf(size) else (way, size)
        row[start] += amount
        row[stop] -= amount

    for t in problem.tensors:
        last = max(t.consumers, default=-1)
        if t.producer is None:
            if t.consumers and caller_beyond:
                add(down, min(t.consumers) + 1, n + 1, t.bytes)
            elif t.consumers:
                add(up, 0, last + 1, t.bytes)
        elif t.output and caller_beyond:
            add(up, t.producer + 1, n + 1, t.bytes)
        else:
            if t.consumers:
                add(up, t.producer + 1, last + 1, t.bytes)
            if t.output:
                add(down, 0, t.producer + 1, t.bytes)
    positions = np.arange(n + 1)
    up, down, never = (np.cumsum(way)[:-1] for way in (up, down, never))
    up, down = up * link.up, down * link.down
    used = positions > 0 if caller_beyond else positions < n
    blocked = never > 0
    return np.where(blocked, math.inf, np.maximum(up, down)), up + down + used * link.fixed
