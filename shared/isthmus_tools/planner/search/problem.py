"""A partitioning problem as plain data, and the definitions of feasibility and cost that every search is held to.

Dataflow is one-way: a node never reads a tensor from a later tier. Only graph inputs, stored at the caller, and
outputs, returned to the caller, may travel down.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from isthmus.errors import Infeasible, ProblemMalformed

Labels: TypeAlias = tuple[int, ...]
"""A division: the tier of each node."""


@dataclass(frozen=True)
class Tensor:
    """A value computed by the node `producer` (None: a graph input, stored at the caller) and read by `consumers`.

    `bytes` is math.inf where no frame can carry the value. An `output` returns to the caller.
    """

    name: str
    producer: int | None
    consumers: tuple[int, ...]
    bytes: float
    output: bool = False


@dataclass(frozen=True)
class LinkTimes:
    """The link from a tier to the next: seconds per byte towards the next tier (`up`) and back (`down`).

    `fixed` seconds are paid once per request if any node runs on the far side, as seen from the caller.
    """

    up: float
    down: float
    fixed: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Nodes 0..n-1 in topological order, to be divided among the tiers 0..k-1, k >= 2.

    `seconds[tier][node]` is the node's run time on the tier; math.inf forbids the tier. `pins[node]` are the lowest and
    the highest tier allowed. `links[b]` joins the tiers b and b + 1. Inputs are stored at, and outputs return to, tier
    `caller`. `names` are node names for error messages.

    Raises:
        ProblemMalformed: lengths, indices or the topological order disagree, a number is negative or NaN, or there is
            no node, no input or no output.
        Infeasible: a pin's lowest tier lies above its highest.
    """

    seconds: tuple[tuple[float, ...], ...]
    tensors: tuple[Tensor, ...]
    links: tuple[LinkTimes, ...]
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
        """The node's name, or its number where the name is empty."""
        return (self.names[node] if self.names else "") or f"node {node}"

    @cached_property
    def allowed(self) -> tuple[tuple[bool, ...], ...]:
        """`allowed[tier][node]`: whether run times and pins permit the node on the tier."""
        rows = [[not math.isinf(s) for s in row] for row in self.seconds]
        for node, (low, high) in self.pins.items():
            for tier in range(self.tiers):
                rows[tier][node] &= low <= tier <= high
        return tuple(map(tuple, rows))


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
            if not s >= 0:  # NaN compares false
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


@dataclass(frozen=True)
class Usage:
    """Resources of a division: seconds by tier, and by boundary the tensors and bytes each way and whether in use.

    Tensors are indices into `Problem.tensors`.
    """

    compute: tuple[float, ...]
    up: tuple[tuple[int, ...], ...]
    down: tuple[tuple[int, ...], ...]
    up_bytes: tuple[float, ...]
    down_bytes: tuple[float, ...]
    used: tuple[bool, ...]


def usage(problem: Problem, labels: Sequence[int]) -> Usage:
    """Resources of the division `labels`; a tensor counts once per boundary and direction, however many read it.

    Raises:
        ProblemMalformed: the number of labels is not the number of nodes, or a label is no tier.
    """
    k = problem.tiers
    if len(labels) != problem.nodes or not all(0 <= t < k for t in labels):
        raise ProblemMalformed(f"labels must be {problem.nodes} tiers, each below {k}", labels=len(labels))
    up: list[list[int]] = [[] for _ in problem.links]
    down: list[list[int]] = [[] for _ in problem.links]
    for i, tensor in enumerate(problem.tensors):
        home, readers = _ends(problem, tensor, labels)
        if not readers:
            continue
        for b in range(home, max(readers)):
            up[b].append(i)
        for b in range(min(readers), home):
            down[b].append(i)
    # A boundary is in use where any node runs on the far side, as seen from the caller.
    lowest, highest = min(labels), max(labels)
    return Usage(
        compute=tuple(
            math.fsum(s for s, t in zip(row, labels, strict=True) if t == tier)
            for tier, row in enumerate(problem.seconds)
        ),
        up=tuple(map(tuple, up)),
        down=tuple(map(tuple, down)),
        up_bytes=tuple(math.fsum(problem.tensors[i].bytes for i in indices) for indices in up),
        down_bytes=tuple(math.fsum(problem.tensors[i].bytes for i in indices) for indices in down),
        used=tuple(b < highest if b >= problem.caller else lowest <= b for b in range(k - 1)),
    )


def is_allowed(problem: Problem, labels: Sequence[int]) -> bool:
    """Whether a division respects run times and pins, sends nothing back, and sends only tensors a frame can carry."""
    if not all(problem.allowed[tier][node] for node, tier in enumerate(labels)):
        return False
    for tensor in problem.tensors:
        home, readers = _ends(problem, tensor, labels)
        if tensor.producer is not None and any(labels[v] < home for v in tensor.consumers):
            return False
        if math.isinf(tensor.bytes) and any(tier != home for tier in readers):
            return False
    return True


def cost(problem: Problem, labels: Sequence[int]) -> float:
    """Seconds of one request under `labels`, nodes and transfers in sequence; math.inf where not allowed.

    Raises:
        ProblemMalformed: as `usage`.
    """
    amounts = usage(problem, labels)
    if not is_allowed(problem, labels):
        return math.inf
    parts = list(amounts.compute)
    for b, link in enumerate(problem.links):
        parts += [amounts.up_bytes[b] * link.up, amounts.down_bytes[b] * link.down, amounts.used[b] * link.fixed]
    # Exact sums: divisions of equal cost must tie, whatever the order of their terms.
    return math.fsum(parts)


def _ends(problem: Problem, tensor: Tensor, labels: Sequence[int]) -> tuple[int, list[int]]:
    """The tier where a tensor is stored first, and the tiers of all readers, the caller among them for an output."""
    home = problem.caller if tensor.producer is None else labels[tensor.producer]
    return home, [labels[v] for v in tensor.consumers] + [problem.caller] * tensor.output


def earliest_tiers(problem: Problem) -> Labels:
    """The earliest tier of each node over all allowed divisions; together these tiers form an allowed division.

    Every rule has the form "if node a is beyond a boundary, so is node b", hence allowed divisions are closed under the
    element-wise minimum. Raising only labels that must rise therefore ends at the least division or proves that none
    exists.

    Raises:
        Infeasible: a node has no tier left; names the node and the node that forced it.
    """
    k = problem.tiers
    followers: list[list[int]] = [[] for _ in range(problem.nodes)]
    floor = [0] * problem.nodes
    ceiling = [k - 1] * problem.nodes
    for tensor in problem.tensors:
        bound = math.isinf(tensor.bytes)
        if tensor.producer is None:
            for v in tensor.consumers if bound else ():
                floor[v] = max(floor[v], problem.caller)
                ceiling[v] = min(ceiling[v], problem.caller)
            continue
        followers[tensor.producer] += tensor.consumers
        # A tensor that no frame carries ties producer and consumers to one tier, in both directions.
        for v in tensor.consumers if bound else ():
            followers[v].append(tensor.producer)
        if bound and tensor.output:
            floor[tensor.producer] = max(floor[tensor.producer], problem.caller)
            ceiling[tensor.producer] = min(ceiling[tensor.producer], problem.caller)
    labels = [-1] * problem.nodes
    because: list[int | None] = [None] * problem.nodes
    queue = deque(range(problem.nodes))
    while queue:
        v = queue.popleft()
        tiers = (t for t in range(max(floor[v], labels[v]), ceiling[v] + 1) if problem.allowed[t][v])
        if (tier := next(tiers, None)) is None:
            raise _no_tier(problem, v, because[v])
        if tier == labels[v]:
            continue
        labels[v] = tier
        for w in followers[v]:
            if floor[w] < tier:
                floor[w], because[w] = tier, v
                queue.append(w)
    return tuple(labels)


def _no_tier(problem: Problem, node: int, because: int | None) -> Infeasible:
    permitted = [t for t in range(problem.tiers) if problem.allowed[t][node]]
    tiers = f"only tiers {permitted}" if permitted else "no tier"
    reason = "" if because is None else f", and must run no earlier than {problem.name(because)}"
    return Infeasible(
        f"{problem.name(node)} may run on {tiers}{reason}: no tier is left for it",
        node=node,
        name=problem.name(node),
        because=None if because is None else problem.name(because),
    )
