"""A problem as a flow network whose cuts are the allowed divisions, each as heavy as the division is slow.

Every node v and boundary b has a vertex x[v, b] on the source side if v runs beyond b. An arc from x to y is paid where
x is beyond and y is not, so
- tier t of node v is the arc x[v, t-1] -> x[v, t], from the source for the first tier and to the sink for the last,
  and the arcs back are forced (never paid): beyond b means beyond every boundary before it;
- a producer beyond b takes its consumers along: forced arcs x[producer, b] -> x[consumer, b];
- a tensor that climbs over b is paid once: forced arcs from every x[consumer, b] to one auxiliary vertex, which is
  beyond if any consumer is, and from it a paid arc to x[producer, b]. Inputs, and outputs on their way to the caller,
  are the same with a constant side, source or sink, for the caller;
- a boundary's fixed seconds are one more such vertex, which all nodes drag beyond: the maximum of the nodes' sides is
  submodular, so no enumeration of the tiers used is needed. Only nodes that nothing consumes are joined to it, since
  whatever lies beyond takes such a node along.

Source: Ishikawa 2003 (labels in order), Kohli et al. 2009 (robust higher-order terms), Hu et al. 2019 (DADS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from isthmus.planner.flow import source_side

from isthmus.planner.problem import Labels, Problem, lowest, tally

Floats: TypeAlias = npt.NDArray[np.float64]
_UNITS = 1e15
_MOST_FLOW = 2**61


@dataclass(frozen=True)
class Prices:
    """What a unit of each amount costs: a second on a tier, a byte each way over a link, a use of a link."""

    tiers: tuple[float, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]
    fixed: tuple[float, ...]

    def row(self) -> Floats:
        """All prices, in the order in which arcs and amounts number them."""
        return np.array([*self.tiers, *self.up, *self.down, *self.fixed])


def seconds(problem: Problem) -> Prices:
    """The prices under which the total is `problem.cost`."""
    return Prices(
        tiers=(1.0,) * problem.tiers,
        up=tuple(link.up for link in problem.links),
        down=tuple(link.down for link in problem.links),
        fixed=tuple(link.fixed for link in problem.links),
    )


def amounts(problem: Problem, labels: Sequence[int]) -> Floats:
    """What `labels` amount to, one number for each price."""
    found = tally(problem, labels)
    return np.array([*found.compute, *found.up_bytes, *found.down_bytes, *map(float, found.used)])


@dataclass
class Network:
    """The network of one problem; `minimise` may be called again under other prices, which is cheap.

    Raises:
        Infeasible: no division is allowed.
    """

    problem: Problem
    _tails: list[int] = field(default_factory=list)
    _heads: list[int] = field(default_factory=list)
    _amounts: list[float] = field(default_factory=list)
    _kinds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        k, n = self.problem.tiers, self.problem.nodes
        self._count = n * (k - 1) + 2
        self._source, self._sink = n * (k - 1), n * (k - 1) + 1
        # Some divisions that surely exist: the cheapest of them bounds every capacity.
        uniform = [(t,) * n for t in range(k)]
        found = [lowest(self.problem), *(labels for labels in uniform if self._fits(labels))]
        self._known = np.array([amounts(self.problem, labels) for labels in found])
        self._join()
        self._tail_array = np.array(self._tails, np.int64)
        self._head_array = np.array(self._heads, np.int64)
        self._amount_array = np.array(self._amounts)
        self._kind_array = np.array(self._kinds, np.int64)
        allowed = np.array(self.problem.allowed)
        self._compute = np.where(allowed, np.array(self.problem.seconds), math.inf)

    def minimise(self, prices: Prices, known: Sequence[Floats] = ()) -> Labels:
        """The cheapest division under `prices`; among equals the one that has every node on the earliest tier.

        Such a division exists and is unique: cheapest divisions are closed under the minimum of two. Costs count in
        whole units, a power of ten near 1e-15 of the cost of a known division (`known` adds the amounts of more), so
        that decimal costs tie where they should; the answer is the cheapest to within that, times the arcs it pays.
        """
        row = prices.row()
        k = self.problem.tiers
        compute = self._compute * row[:k, None]
        compute[np.isinf(self._compute)] = math.inf
        # One of a node's tiers is always paid: what all have in common carries no choice, only flow.
        compute -= compute.min(axis=0)
        priced = np.where(self._kind_array < 0, math.inf, self._amount_array * row[np.maximum(self._kind_array, 0)])
        costs = np.concatenate([compute.ravel(), priced])
        bound = float(min(np.vstack([self._known, *known]) @ row))
        unit = 10.0 ** math.ceil(math.log10(bound / _UNITS)) if bound > 0 else 1.0
        most = math.ceil(bound / unit) + 1
        out_of_source = np.isinf(costs) | (costs > bound)
        finite = np.where(out_of_source, 0.0, costs)
        capacities = np.rint(finite / unit).astype(np.int64)
        capacities[out_of_source] = most
        capacities[np.isinf(costs)] = 2 * most + len(costs)
        beyond = source_side(
            self._count,
            self._tail_array,
            self._head_array,
            capacities,
            source=self._source,
            sink=self._sink,
        )
        sides = beyond[: self._source].reshape(self.problem.nodes, k - 1)
        return tuple(int(t) for t in sides.sum(axis=1))

    def _fits(self, labels: Labels) -> bool:
        from isthmus.planner.problem import is_allowed

        return is_allowed(self.problem, labels)

    def _vertex(self, node: int, boundary: int) -> int:
        if boundary < 0:
            return self._source
        return self._sink if boundary == self.problem.tiers - 1 else node * (self.problem.tiers - 1) + boundary

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _pay(self, tail: int, head: int, amount: float, kind: int) -> None:
        if math.isinf(amount):
            amount, kind = 0.0, -1
        self._tails.append(tail)
        self._heads.append(head)
        self._amounts.append(amount)
        self._kinds.append(kind)

    def _force(self, tail: int, head: int) -> None:
        self._pay(tail, head, math.inf, -1)

    def _join(self) -> None:
        k, n = self.problem.tiers, self.problem.nodes
        # The compute arcs come first, tier by tier; `minimise` prices them as one array.
        for tier in range(k):
            self._tails += [self._vertex(v, tier - 1) for v in range(n)]
            self._heads += [self._vertex(v, tier) for v in range(n)]
        for v in range(n):
            for b in range(1, k - 1):
                self._force(self._vertex(v, b), self._vertex(v, b - 1))
        followed = set()
        for tensor in self.problem.tensors:
            if tensor.producer is not None and tensor.consumers:
                followed.add(tensor.producer)
                for w in dict.fromkeys(tensor.consumers):
                    for b in range(k - 1):
                        self._force(self._vertex(tensor.producer, b), self._vertex(w, b))
