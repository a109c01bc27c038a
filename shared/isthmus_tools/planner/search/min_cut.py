"""The cheapest division under given prices, by one minimum cut. The only module that imports SciPy.

A problem's network is built once and re-priced for each query, as a sweep or a search for throughput needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from isthmus.errors import PlanError
from isthmus_tools.planner.search.flow_network import UNCUTTABLE, flow_network
from isthmus_tools.planner.search.problem import Labels, Problem, earliest_tiers, is_allowed, usage

Row: TypeAlias = npt.NDArray[np.float64]
"""A number for each kind: k tiers, then each boundary's bytes up, bytes down, and use. Prices or amounts."""
Ints: TypeAlias = npt.NDArray[np.int64]

# Decimal prices tie after rounding to 15 of the 15.9 significant digits of a double. 10^-300 is still a normal double.
_DIGITS, _MIN_EXPONENT = 15, -300
# Sums of int64 stay exact with a factor of 4 to spare.
_MAX_FLOW = 2**61
# SciPy stores capacities as int32, and an arc plus the reverse arc must not exceed that either.
_FLOW_BITS = 30
_MAX_CAPACITY = 2**_FLOW_BITS - 1


def prices(problem: Problem) -> Row:
    """The prices under which a division's price is the `cost`: seconds as given, link amounts by link times."""
    links = problem.links
    return np.array(
        [*[1.0] * problem.tiers, *(k.up for k in links), *(k.down for k in links), *(k.fixed for k in links)]
    )


def amounts(problem: Problem, labels: Sequence[int]) -> Row:
    """The amounts of the division `labels`, to be multiplied with prices."""
    total = usage(problem, labels)
    return np.array([*total.compute, *total.up_bytes, *total.down_bytes, *map(float, total.used)])


@dataclass
class MinCut:
    """The minimum cut of a problem, for any prices.

    Raises:
        Infeasible: no division is allowed.
    """

    problem: Problem

    def __post_init__(self) -> None:
        uniform = [(tier,) * self.problem.nodes for tier in range(self.problem.tiers)]
        allowed = [labels for labels in uniform if is_allowed(self.problem, labels)]
        self._bounds = [amounts(self.problem, labels) for labels in (earliest_tiers(self.problem), *allowed)]
        self._network = flow_network(self.problem)

    def cheapest(self, row: Row) -> Labels:
        """The cheapest division under the prices `row`; among equals the division with every node on an earliest tier.

        That division exists and is unique: the cheapest divisions are closed under the element-wise minimum. Prices
        are rounded to whole units, a power of ten near 1e-15 of a known division's price, so that equal decimals tie;
        the result is the cheapest to within half a unit per paid arc.
        """
        network = self._network
        k, n = self.problem.tiers, self.problem.nodes
        bound = float(min(known @ row for known in self._bounds))
        costs = np.where(network.kinds == UNCUTTABLE, math.inf, network.amounts * row[network.kinds])
        # Every division pays at least a node's cheapest tier. Without that common part less flow has to be pushed.
        compute = costs[: k * n].reshape(k, n)
        compute -= compute.min(axis=0)
        side = source_side(
            network.vertices, network.tails, network.heads, self._units(costs, bound), network.source, network.sink
        )
        return tuple(int(t) for t in side[: n * (k - 1)].reshape(n, k - 1).sum(axis=1))

    def add_bound(self, labels: Labels) -> Row:
        """The amounts of an allowed division, stored as an upper bound for later queries."""
        self._bounds.append(amounts(self.problem, labels))
        return self._bounds[-1]

    def _units(self, costs: Row, bound: float) -> Ints:
        unit = 10.0 ** max(_MIN_EXPONENT, math.ceil(math.log10(bound)) - _DIGITS) if bound > 0 else 1.0
        leaving = self._network.tails == self._network.source
        while True:
            # No cheapest division pays an arc above the bound: such arcs, like uncuttable arcs, weigh just too much.
            too_much = math.ceil(bound / unit) + len(costs)
            units = np.rint(np.minimum(costs, 2 * bound + unit) / unit)
            units[costs > bound] = too_much
            if units[leaving].sum() < _MAX_FLOW:
                return units.astype(np.int64)
            unit *= 10


def source_side(
    vertices: int, tails: Ints, heads: Ints, capacities: Ints, source: int, sink: int
) -> npt.NDArray[np.bool_]:
    """The source's side of the smallest minimum cut: all vertices reachable over residual capacity.

    Capacity scaling around SciPy's Dinic: the capacities are taken from the high bits to the low bits. A flow that is
    maximal in units of 2^s leaves less than a unit on each arc of some cut, a bound on the flow of the next, finer
    round. Each round fits 32 bits, and the last round, in units of 1, makes the flow maximal in 64 bits.

    Units: capacities are whole and not negative; those out of the source sum to less than 2^62.

    Raises:
        PlanError: flow and cut differ, so that neither is proved optimal.

    Source: Dinic 1970 (blocking flows); Ahuja, Magnanti, Orlin, Network Flows, section 7.3 (capacity scaling).
    """
    # SciPy takes about 0.5 s to import, and most commands never search.
    from scipy.sparse import csr_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow  # type: ignore[import-untyped]

    # Parallel arcs become one, and each arc gets a reverse arc of capacity 0: one array holds all residual capacities.
    both = csr_array(
        (
            np.concatenate([capacities, 0 * capacities]),
            (np.concatenate([tails, heads]), np.concatenate([heads, tails])),
        ),
        shape=(vertices, vertices),
    )
    both.sum_duplicates()
    residual = both.data
    limit = int(capacities[tails == source].sum())
    # After a round at most len(residual) units are left to push, so the next round may be finer by the other bits.
    step = _FLOW_BITS - len(residual).bit_length()
    shift = max(0, limit.bit_length() - _FLOW_BITS)
    pushed = 0
    while True:
        units = np.minimum(residual >> shift, _MAX_CAPACITY).astype(np.int32)
        graph = csr_array((units, both.indices, both.indptr), shape=both.shape)
        flow = maximum_flow(graph, source, sink, method="dinic")
        residual -= flow.flow.data.astype(np.int64) << shift
        pushed += int(flow.flow_value) << shift
        if shift == 0:
            break
        shift = max(0, shift - step)
    rest = csr_array((residual, both.indices, both.indptr), shape=both.shape)
    rest.eliminate_zeros()
    side = np.zeros(vertices, np.bool_)
    side[breadth_first_order(rest, source, return_predecessors=False)] = True
    if (cut := int(capacities[side[tails] & ~side[heads]].sum())) != pushed:
        raise PlanError(f"a flow of {pushed} and a cut of {cut} do not prove each other", flow=pushed, cut=cut)
    return side
