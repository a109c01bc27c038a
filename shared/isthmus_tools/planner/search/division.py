"""One division of a problem, the tier of each node: whether it is allowed, what it amounts to, what it costs.

These are the definitions that every search is held to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from isthmus.errors import Infeasible, ProblemMalformed
from isthmus_tools.planner.search.problem import Problem

Labels: TypeAlias = tuple[int, ...]


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
