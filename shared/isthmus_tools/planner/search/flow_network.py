"""A partitioning problem as a flow network: finite s-t cuts are the allowed divisions, with capacity equal to cost.

Every node v and boundary b has a vertex x[v, b], on the source's side if v runs beyond b. An arc x -> y is paid where x
is beyond and y is not:
- tier t of node v is the arc x[v, t-1] -> x[v, t], out of the source for the first tier and into the sink for the
  last. The reverse arcs are uncuttable: a node beyond b is beyond every boundary before b.
- A producer beyond b takes its consumers along: uncuttable arcs x[producer, b] -> x[consumer, b].
- A tensor sent up over b is paid once: uncuttable arcs from every x[consumer, b] to an auxiliary vertex, beyond if any
  consumer is, and from there a paid arc to x[producer, b]. For inputs, and for outputs on the way back, the caller
  stands at one end: the source where the caller lies beyond b, else the sink.
- A boundary's fixed seconds are another such vertex, dragged along by every node on the far side. The maximum over
  nodes is submodular, so the cut stays exact and no number of tiers has to be enumerated. Only nodes without consumers
  (on the way down: without producers) are joined to the vertex, since a node takes those along anyway.

Source: Ishikawa 2003 (ordered labels); Kohli, Ladicky, Torr 2009 (maximum terms); Hu et al. 2019 (DADS).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from isthmus_tools.planner.search.problem import Problem, Tensor

UNCUTTABLE = -1
"""The kind of an arc of infinite capacity."""


@dataclass(frozen=True)
class FlowNetwork:
    """Arcs as columns: end points, the amount paid, and the amount's kind, an index into prices (or `UNCUTTABLE`).

    The first k x n arcs are the nodes' times, tier by tier. Vertex `node * (k - 1) + boundary` is x[node, boundary].
    """

    vertices: int
    source: int
    sink: int
    tails: npt.NDArray[np.int64]
    heads: npt.NDArray[np.int64]
    amounts: npt.NDArray[np.float64]
    kinds: npt.NDArray[np.int64]


def flow_network(problem: Problem) -> FlowNetwork:
    """The network of `problem`. Kinds: k tiers, then each boundary's bytes up, bytes down, and use."""
    build = _Builder(problem)
    build.nodes()
    for tensor in problem.tensors:
        for b in range(problem.tiers - 1):
            build.tensor(tensor, b)
    for b in range(problem.tiers - 1):
        build.use(b)
    return FlowNetwork(
        vertices=build.vertices,
        source=build.source,
        sink=build.sink,
        tails=np.array(build.tails, np.int64),
        heads=np.array(build.heads, np.int64),
        amounts=np.array(build.amounts, np.float64),
        kinds=np.array(build.kinds, np.int64),
    )


@dataclass
class _Builder:
    problem: Problem
    tails: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.boundaries = self.problem.tiers - 1
        self.source = self.problem.nodes * self.boundaries
        self.sink = self.source + 1
        self.vertices = self.sink + 1

    def nodes(self) -> None:
        k, n = self.problem.tiers, self.problem.nodes
        for tier in range(k):
            for v in range(n):
                allowed = self.problem.allowed[tier][v]
                # A forbidden tier is an uncuttable arc.
                amount = self.problem.seconds[tier][v] if allowed else math.inf
                self._pay(self._x(v, tier - 1), self._x(v, tier), amount, tier)
        # Without these arcs a cut could put a node beyond a later boundary but not beyond an earlier boundary.
        for v in range(n):
            for b in range(1, self.boundaries):
                self._uncuttable(self._x(v, b), self._x(v, b - 1))

    def tensor(self, tensor: Tensor, b: int) -> None:
        readers = [self._x(v, b) for v in dict.fromkeys(tensor.consumers)]
        caller_beyond = self.problem.caller > b
        up, down = self.problem.tiers + b, self.problem.tiers + self.boundaries + b
        if tensor.producer is None:
            if caller_beyond:
                self._down_to(readers, tensor.bytes, down)
            else:
                self._up_to(readers, self.sink, tensor.bytes, up)
            return
        home = self._x(tensor.producer, b)
        for x in readers:
            self._uncuttable(home, x)
        if tensor.output and caller_beyond:
            # The caller reads the tensor too and lies beyond b, so the tensor is sent wherever other readers run.
            self._pay(self.source, home, tensor.bytes, up)
            return
        self._up_to(readers, home, tensor.bytes, up)
        if tensor.output:
            self._pay(home, self.sink, tensor.bytes, down)

    def use(self, b: int) -> None:
        kind = self.problem.tiers + 2 * self.boundaries + b
        nodes = range(self.problem.nodes)
        if self.problem.caller > b:
            inner = {v for t in self.problem.tensors if t.producer is not None for v in t.consumers}
            self._down_to([self._x(v, b) for v in nodes if v not in inner], 1.0, kind)
        else:
            inner = {t.producer for t in self.problem.tensors if t.consumers and t.producer is not None}
            self._up_to([self._x(v, b) for v in nodes if v not in inner], self.sink, 1.0, kind)

    def _up_to(self, readers: list[int], home: int, amount: float, kind: int) -> None:
        # A single reader stands for itself: its arc is paid directly.
        if len(readers) > 1:
            any_reader = self._new()
            for x in readers:
                self._uncuttable(x, any_reader)
            readers = [any_reader]
        for x in readers:
            self._pay(x, home, amount, kind)

    def _down_to(self, readers: list[int], amount: float, kind: int) -> None:
        if not readers:
            return
        all_readers = self._new()
        self._pay(self.source, all_readers, amount, kind)
        for x in readers:
            self._uncuttable(all_readers, x)

    def _x(self, node: int, boundary: int) -> int:
        if boundary < 0:
            return self.source
        return self.sink if boundary == self.boundaries else node * self.boundaries + boundary

    def _new(self) -> int:
        self.vertices += 1
        return self.vertices - 1

    def _pay(self, tail: int, head: int, amount: float, kind: int) -> None:
        infinite = math.isinf(amount)
        self.tails.append(tail)
        self.heads.append(head)
        # Amounts are multiplied with prices, and 0 x inf would be NaN: the kind alone says infinite.
        self.amounts.append(0.0 if infinite else amount)
        self.kinds.append(UNCUTTABLE if infinite else kind)

    def _uncuttable(self, tail: int, head: int) -> None:
        self._pay(tail, head, math.inf, UNCUTTABLE)
