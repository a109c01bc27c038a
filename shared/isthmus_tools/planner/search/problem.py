"""What is to be divided among tiers, as plain data.

Data climbs: a node never reads what a later tier than its own has made. Only a graph input, which lies at the caller,
and an output, which returns there, may travel down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from isthmus.errors import Infeasible, ProblemMalformed


@dataclass(frozen=True)
class Tensor:
    """One value: made by the node `producer` (None: a graph input, at the caller), read by the nodes `consumers`.

    `bytes` may be math.inf: no frame can carry it. An `output` returns to the caller.
    """

    name: str
    producer: int | None
    consumers: tuple[int, ...]
    bytes: float
    output: bool = False


@dataclass(frozen=True)
class Link:
    """What joins a tier to the next: seconds per byte towards it (`up`) and back (`down`).

    `fixed` seconds are paid once if any node runs on the far side of it, as the caller sees it.
    """

    up: float
    down: float
    fixed: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Nodes 0..n-1 in topological order, to be divided among the tiers 0..k-1, k >= 2.

    `seconds[tier][node]` is a node's time on a tier; math.inf forbids it. `pins[node]` are the lowest and the highest
    tier that it may take. `links[b]` joins the tiers b and b + 1. Inputs lie at, and outputs return to, `caller`.
    `names` are the nodes', for errors.

    Raises:
        ProblemMalformed: lengths, indices or the topological order disagree, a number is negative or not a number, or
            there is no node, input or output at all.
        Infeasible: a pin's lowest tier lies above its highest.
    """

    seconds: tuple[tuple[float, ...], ...]
    tensors: tuple[Tensor, ...]
    links: tuple[Link, ...]
    caller: int = 0
    pins: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for sentence, facts in _faults(self):
            raise ProblemMalformed(sentence, **facts)
        for node, (low, high) in self.pins.items():
            if low > high:
                raise Infeasible(
                    f"{self.name(node)} is pinned to tier {low} or later and to tier {high} or earlier",
                    node=node,
                    name=self.name(node),
                    because=None,
                )

    @property
    def tiers(self) -> int:
        return len(self.seconds)

    @property
    def nodes(self) -> int:
        return len(self.seconds[0])

    def name(self, node: int) -> str:
        """The node's name, or its number where it has none."""
        return (self.names[node] if self.names else "") or f"node {node}"

    @cached_property
    def allowed(self) -> tuple[tuple[bool, ...], ...]:
        """`allowed[tier][node]`: whether times and pins let the node run there."""
        every = [[not math.isinf(s) for s in row] for row in self.seconds]
        for node, (low, high) in self.pins.items():
            for tier in range(self.tiers):
                every[tier][node] &= low <= tier <= high
        return tuple(map(tuple, every))


def _faults(problem: Problem) -> Iterator[tuple[str, dict[str, Any]]]:
    k = len(problem.seconds)
    if k < 2:
        yield f"a division needs two tiers or more, not {k}", {"tiers": k}
    n = len(problem.seconds[0])
    if n == 0:
        yield "there is no node to place", {"nodes": 0}
    if len({len(row) for row in problem.seconds}) > 1 or (problem.names and len(problem.names) != n):
        yield "every tier needs one time, and `names` one name, for each node", {"nodes": n}
    for tier, row in enumerate(problem.seconds):
        for node, s in enumerate(row):
            if not s >= 0:
                yield f"{problem.name(node)} takes {s} seconds on tier {tier}", {"node": node, "tier": tier}
    if len(problem.links) != k - 1:
        yield f"{k} tiers need {k - 1} links, not {len(problem.links)}", {"links": len(problem.links)}
    for b, link in enumerate(problem.links):
        if not all(0 <= s < math.inf for s in (link.up, link.down, link.fixed)):
            yield f"link {b} has a negative or unbounded time: {link}", {"link": b}
    if not 0 <= problem.caller < k:
        yield f"the caller's tier {problem.caller} is none of {k}", {"caller": problem.caller}
    for tensor in problem.tensors:
        first = -1 if tensor.producer is None else tensor.producer
        if not (-1 <= first < n and all(first < v < n for v in tensor.consumers)) or tensor.producer == -1:
            yield f"{tensor.name} is not made before it is read, by nodes 0 to {n - 1}", {"tensor": tensor.name}
        if not tensor.bytes >= 0:
            yield f"{tensor.name} has {tensor.bytes} bytes", {"tensor": tensor.name}
    if not any(t.producer is None for t in problem.tensors):
        yield "there is no graph input", {"inputs": 0}
    if not any(t.output for t in problem.tensors):
        yield "there is no output", {"outputs": 0}
    for node, (low, high) in problem.pins.items():
        if not (0 <= node < n and 0 <= low < k and 0 <= high < k):
            yield f"the pin {node}: ({low}, {high}) names no node or no tier", {"node": node}
