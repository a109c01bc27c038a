"""Divisions where each tier takes a run of the topological order: the one whose slowest stage is the fastest.

Such a division is k - 1 positions: boundary b lies before node p_b. What crosses it depends on p_b alone, and a tier's
seconds on its two positions. So for one limit on every stage the positions that can be reached follow tier by tier, in
time linear in nodes and tiers, and the least limit is found by halving the doubles between 0 and the whole.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isthmus_tools.planner.search.division import Labels
from isthmus_tools.planner.search.problem import Problem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Sums in another order differ in the last bits; without this much room the second pass could lose the first's answer.
_ROOM = 1e-12


def best_prefix(problem: Problem) -> Labels | None:
    """The prefix division with the fastest slowest stage; of equal ones, that with the fewest seconds for one request.

    None where times and pins allow no prefix of this order.
    """
    tables = _Tables.of(problem)
    if not tables.feasible(math.inf):
        return None
    # Doubles that are not negative are in the order of their bits.
    low, high = 0, int(np.float64(np.finfo(np.float64).max).view(np.int64))
    while low < high:
        middle = (low + high) // 2
        if tables.feasible(float(np.int64(middle).view(np.float64))):
            high = middle
        else:
            low = middle + 1
    positions = tables.fastest(float(np.int64(low).view(np.float64)) * (1 + _ROOM))
    return tuple(int(t) for t in np.searchsorted(np.array(positions), np.arange(problem.nodes), side="right"))


@dataclass(frozen=True)
class _Tables:
    """For each tier and position p: seconds of the nodes before p, and the first start whose run to p is allowed.

    For each boundary and p: the slower direction's seconds (math.inf where p is not allowed), and all seconds spent.
    """

    before: Floats  # (tiers, nodes + 1)
    first: Ints  # (tiers, nodes + 1)
    slower: Floats  # (boundaries, nodes + 1)
    spent: Floats  # (boundaries, nodes + 1)

    @classmethod
    def of(cls, problem: Problem) -> _Tables:
        n = problem.nodes
        allowed = np.array(problem.allowed)
        times = np.where(allowed, np.array(problem.seconds), 0.0)
        start = np.zeros((problem.tiers, 1))
        before = np.concatenate([start, np.cumsum(times, axis=1)], axis=1)
        after_bad = np.where(allowed, 0, np.arange(1, n + 1))
        first = np.concatenate([start.astype(np.int64), np.maximum.accumulate(after_bad, axis=1)], axis=1)
        links = [_link(problem, b) for b in range(len(problem.links))]
        return cls(before, first, np.array([s for s, _ in links]), np.array([s for _, s in links]))

    def feasible(self, limit: float) -> bool:
        tiers, places = self.before.shape
        every = np.arange(places)
        reached = every == 0
        for tier in range(tiers):
            # The latest start is the best: the run is the shortest.
            start = np.maximum.accumulate(np.where(reached, every, -1))
            took = self.before[tier] - self.before[tier][start]
            reached = (start >= self.first[tier]) & (took <= limit)
            if tier < tiers - 1:
                reached &= np.isfinite(self.slower[tier]) & (self.slower[tier] <= limit)
        return bool(reached[-1])

    def fastest(self, limit: float) -> list[int]:
        """Positions of the boundaries, no stage above `limit`, with the fewest seconds in all; later ones if equal."""
        tiers, places = self.before.shape
        least = np.full(places, math.inf)
        least[0] = 0.0
        starts: list[list[int]] = []
        for tier in range(tiers):
            before, first = self.before[tier].tolist(), self.first[tier].tolist()
            offset = (least - self.before[tier]).tolist()
            window: deque[int] = deque()
            best, chosen = [math.inf] * places, [-1] * places
            for p in range(places):
                while window and offset[window[-1]] >= offset[p]:
                    window.pop()
                window.append(p)
                while window and (window[0] < first[p] or before[p] - before[window[0]] > limit):
                    window.popleft()
                if window:
                    best[p], chosen[p] = offset[window[0]] + before[p], window[0]
            least = np.array(best)
            if tier < tiers - 1:
                least = np.where(self.slower[tier] <= limit, least + self.spent[tier], math.inf)
            starts.append(chosen)
        positions = [places - 1]
        for chosen in reversed(starts[1:]):
            positions.append(chosen[positions[-1]])
        return positions[:0:-1]


def _link(problem: Problem, boundary: int) -> tuple[Floats, Floats]:
    n, link = problem.nodes, problem.links[boundary]
    caller_beyond = problem.caller > boundary
    # Differences: what is added from a position on; the last row counts what no frame can carry.
    up, down, never = np.zeros((3, n + 2))

    def crosses(way: Floats, start: int, stop: int, size: float) -> None:
        where, amount = (never, 1.0) if math.isinf(size) else (way, size)
        where[start] += amount
        where[stop] -= amount

    for t in problem.tensors:
        last = max(t.consumers, default=-1)
        if t.producer is None:
            if t.consumers and caller_beyond:
                crosses(down, min(t.consumers) + 1, n + 1, t.bytes)
            elif t.consumers:
                crosses(up, 0, last + 1, t.bytes)
        elif t.output and caller_beyond:
            crosses(up, t.producer + 1, n + 1, t.bytes)
        else:
            if t.consumers:
                crosses(up, t.producer + 1, last + 1, t.bytes)
            if t.output:
                crosses(down, 0, t.producer + 1, t.bytes)
    places = np.arange(n + 1)
    up, down, never = (np.cumsum(way)[:-1] for way in (up, down, never))
    up, down = up * link.up, down * link.down
    used = places > 0 if caller_beyond else places < n
    blocked = never > 0
    return np.where(blocked, math.inf, np.maximum(up, down)), up + down + used * link.fixed
