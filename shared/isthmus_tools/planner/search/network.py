"""The cheapest division of a problem under any prices: its arcs are made once, and each question is one minimum cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from isthmus_tools.planner.search import flow
from isthmus_tools.planner.search.arcs import FORCED, arcs_of
from isthmus_tools.planner.search.division import Labels, is_allowed, lowest, tally
from isthmus_tools.planner.search.problem import Problem

Row: TypeAlias = npt.NDArray[np.float64]
"""One number for each kind: k tiers, then each boundary's bytes up, bytes down, and use. Prices or amounts."""

_DIGITS, _SMALLEST = 15, -300
_MAX_FLOW = 2**61


def prices(problem: Problem) -> Row:
    """The prices under which a division's price is its `cost`: seconds as they are, links as they take."""
    links = problem.links
    return np.array(
        [*[1.0] * problem.tiers, *(k.up for k in links), *(k.down for k in links), *(k.fixed for k in links)]
    )


def amounts(problem: Problem, labels: Sequence[int]) -> Row:
    """What `labels` amount to, to be multiplied with prices."""
    found = tally(problem, labels)
    return np.array([*found.compute, *found.up_bytes, *found.down_bytes, *map(float, found.used)])


@dataclass
class Network:
    """A problem made ready for questions.

    Raises:
        Infeasible: no division is allowed.
    """

    problem: Problem

    def __post_init__(self) -> None:
        uniform = [(tier,) * self.problem.nodes for tier in range(self.problem.tiers)]
        sure = [lowest(self.problem), *(labels for labels in uniform if is_allowed(self.problem, labels))]
        self._known = [amounts(self.problem, labels) for labels in sure]
        self._arcs = arcs_of(self.problem)

    def cheapest(self, row: Row) -> Labels:
        """The cheapest division under the prices `row`; among equals the one with every node on its earliest tier.

        That one exists and is unique, since the cheapest divisions are closed under the minimum of two. Prices count
        in whole units, a power of ten near 1e-15 of a known division's price, so that decimal prices tie where
        they should: what is returned is the cheapest to within half a unit for each arc that it pays.
        """
        arcs = self._arcs
        k, n = self.problem.tiers, self.problem.nodes
        bound = float(min(known @ row for known in self._known))
        costs = np.where(arcs.kinds == FORCED, math.inf, arcs.amounts * row[arcs.kinds])
        # A node pays one of its tiers in any case; what they have in common is no choice, only flow to push.
        compute = costs[: k * n].reshape(k, n)
        compute -= compute.min(axis=0)
        sides = flow.source_side(
            arcs.vertices, arcs.tails, arcs.heads, self._units(costs, bound), arcs.source, arcs.sink
        )
        return tuple(int(t) for t in sides[: n * (k - 1)].reshape(n, k - 1).sum(axis=1))

    def learn(self, labels: Labels) -> Row:
        """The amounts of an allowed division, kept as a bound for the questions to come."""
        self._known.append(amounts(self.problem, labels))
        return self._known[-1]

    def _units(self, costs: Row, bound: float) -> npt.NDArray[np.int64]:
        # No cheapest division pays an arc above the bound, so those weigh just too much; forced ones weigh the same.
        unit = 10.0 ** max(_SMALLEST, math.ceil(math.log10(bound)) - _DIGITS) if bound > 0 else 1.0
        leaving = self._arcs.tails == self._arcs.source
        while True:
            too_much = math.ceil(bound / unit) + len(costs)
            units = np.rint(np.minimum(costs, 2 * bound + unit) / unit)
            units[costs > bound] = too_much
            if units[leaving].sum() < _MAX_FLOW:
                return units.astype(np.int64)
            unit *= 10
