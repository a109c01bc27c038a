"""What is to be divided among tiers, as plain data, and what any one division of it costs.

Data climbs: a node never reads what a later tier than its own has made. Only a graph input, which lies at the caller,
and an output, which returns there, may travel down.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from isthmus.errors import Infeasible, ProblemMalformed

Labels: TypeAlias = tuple[int, ...]


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


@dataclass(frozen=True)
class Tally:
    """What one division amounts to: seconds by tier, and by boundary the tensors and bytes each way and whether used.

    Tensors are indices into `Problem.tensors`.
    """

    compute: tuple[float, ...]
    up: tuple[tuple[int, ...], ...]
    down: tuple[tuple[int, ...], ...]
    up_bytes: tuple[float, ...]
    down_bytes: tuple[float, ...]
    used: tuple[bool, ...]


def tally(problem: Problem, labels: Sequence[int]) -> Tally:
    """What the division amounts to that gives each node the tier in `labels`; each tensor counts once each way.

    Raises:
        ProblemMalformed: not one label a node, or no tier of that number.
    """
    k = problem.tiers
    if len(labels) != problem.nodes or not all(0 <= t < k for t in labels):
        raise ProblemMalformed(f"labels must be {problem.nodes} tiers, each below {k}", labels=len(labels))
    up: list[list[int]] = [[] for _ in problem.links]
    down: list[list[int]] = [[] for _ in problem.links]
    for i, tensor in enumerate(problem.tensors):
        home = problem.caller if tensor.producer is None else labels[tensor.producer]
        readers = [labels[v] for v in tensor.consumers] + [problem.caller] * tensor.output
        if not readers:
            continue
        for b in range(home, max(readers)):
            up[b].append(i)
        for b in range(min(readers), home):
            down[b].append(i)
    lowest, highest = min(labels), max(labels)
    return Tally(
        compute=tuple(
            math.fsum(s for s, t in zip(row, labels, strict=True) if t == tier)
            for tier, row in enumerate(problem.seconds)
        ),
        up=tuple(map(tuple, up)),
        down=tuple(map(tuple, down)),
        up_bytes=tuple(math.fsum(problem.tensors[i].bytes for i in crossing) for crossing in up),
        down_bytes=tuple(math.fsum(problem.tensors[i].bytes for i in crossing) for crossing in down),
        used=tuple(b < highest if b >= problem.caller else lowest <= b for b in range(k - 1)),
    )


def is_allowed(problem: Problem, labels: Sequence[int]) -> bool:
    """Whether every node may run on its tier, nothing flows back, and nothing crosses that no frame can carry."""
    if not all(problem.allowed[tier][node] for node, tier in enumerate(labels)):
        return False
    for tensor in problem.tensors:
        home = problem.caller if tensor.producer is None else labels[tensor.producer]
        if tensor.producer is not None and any(labels[v] < home for v in tensor.consumers):
            return False
        if math.isinf(tensor.bytes) and any(
            t != home for t in (*(labels[v] for v in tensor.consumers), *[problem.caller] * tensor.output)
        ):
            return False
    return True


def cost(problem: Problem, labels: Sequence[int]) -> float:
    """Seconds that one request takes under `labels`, every node and transfer after the other; math.inf if not allowed.

    Raises:
        ProblemMalformed: as `tally`.
    """
    amounts = tally(problem, labels)
    if not is_allowed(problem, labels):
        return math.inf
    parts = list(amounts.compute)
    for b, link in enumerate(problem.links):
        parts += [amounts.up_bytes[b] * link.up, amounts.down_bytes[b] * link.down, amounts.used[b] * link.fixed]
    return math.fsum(parts)


def lowest(problem: Problem) -> Labels:
    """The earliest tier of each node over all allowed divisions; together they are one themselves.

    Divisions are closed under the minimum of two, since every rule is of the form "if this node is beyond a boundary,
    so is that one". Hence raising only what must be raised ends at the least of them, or shows that there is none.

    Raises:
        Infeasible: a node has no tier left; names it, and the node that it must follow.
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
        for v in tensor.consumers if bound else ():
            followers[v].append(tensor.producer)
        if bound and tensor.output:
            floor[tensor.producer] = max(floor[tensor.producer], problem.caller)
            ceiling[tensor.producer] = min(ceiling[tensor.producer], problem.caller)
    labels = [-1] * problem.nodes
    because: list[int | None] = [None] * problem.nodes
    waiting = deque(range(problem.nodes))
    while waiting:
        v = waiting.popleft()
        fits = (t for t in range(max(floor[v], labels[v]), ceiling[v] + 1) if problem.allowed[t][v])
        if (tier := next(fits, None)) is None:
            raise _no_tier(problem, v, because[v])
        if tier == labels[v]:
            continue
        labels[v] = tier
        for w in followers[v]:
            if floor[w] < tier:
                floor[w], because[w] = tier, v
                waiting.append(w)
    return tuple(labels)


def _no_tier(problem: Problem, node: int, because: int | None) -> Infeasible:
    open_to = [t for t in range(problem.tiers) if problem.allowed[t][node]]
    tiers = f"only tiers {open_to}" if open_to else "no tier"
    reason = "" if because is None else f", and must run no earlier than {problem.name(because)}"
    return Infeasible(
        f"{problem.name(node)} may run on {tiers}{reason}: no tier is left for it",
        node=node,
        name=problem.name(node),
        because=None if because is None else problem.name(because),
    )


def _faults(problem: Problem) -> Iterator[tuple[str, dict[str, object]]]:
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
