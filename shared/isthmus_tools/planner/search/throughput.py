"""The division that serves the most requests a second: the one whose slowest stage is the fastest.

In a pipeline the tiers work on different requests at once, and each link carries one request's tensors while the tiers
compute others. Stages are the k tiers and the two directions of each link (both carry at once); fixed seconds delay a
request but occupy nothing, so they do not count here.

What is exact: over *prefix* divisions, where each tier takes a run of the topological order, the answer is the optimum.
On a chain every division is a prefix, so there it is the optimum. On a DAG with branches it is not always: even two
tiers and independent nodes make this the partition problem, which is NP-hard. There the best prefix competes with the
divisions that minimum cuts find, and `bound` says how much better any division could be at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from isthmus_tools.planner.search.division import Labels, cost, lowest, tally
from isthmus_tools.planner.search.network import Network, Row, amounts, prices
from isthmus_tools.planner.search.prefix import best_prefix
from isthmus_tools.planner.search.problem import Problem

_STEP = 1.0
_ORDERS = 4
# Minimum cuts count in whole units, so a bound from one may be too high by far less than this share.
_EXACT = 1 - 1e-9


@dataclass(frozen=True)
class Pipeline:
    """A division as a pipeline: seconds of its slowest stage, of one request alone, and of each stage.

    No allowed division has a slowest stage below `bound`; where `bound` equals `slowest`, this one is optimal.
    """

    labels: Labels
    slowest: float
    seconds: float
    stages: tuple[float, ...]
    bound: float


def stages(problem: Problem, labels: Labels) -> tuple[float, ...]:
    """Seconds that one request occupies each stage: the tiers, then each link up, then each link down.

    Raises:
        ProblemMalformed: not one label a node, or no tier of that number.
    """
    found = tally(problem, labels)
    up = (n * link.up for n, link in zip(found.up_bytes, problem.links, strict=True))
    down = (n * link.down for n, link in zip(found.down_bytes, problem.links, strict=True))
    return (*found.compute, *up, *down)


def pipeline(problem: Problem, rounds: int = 20) -> Pipeline:
    """The division found with the fastest slowest stage; of equal ones, that with the fewest seconds for one request.

    `rounds` minimum cuts raise the bound and look for divisions that are no prefix. Under weights of the stages that
    sum to 1, the cheapest division weighs no more than any division's slowest stage, so each cut bounds them all; then
    weight moves to the stages that were slow. The best divisions found this way give other orders of the nodes, whose
    prefixes are searched as well.

    Raises:
        Infeasible: no division is allowed.
    """
    network = Network(problem)
    found = {lowest(problem)}
    if (prefix := best_prefix(problem)) is not None:
        found.add(prefix)
    times = prices(problem)[: -len(problem.links)]
    weights = np.full(len(times), 1 / len(times))
    bound = _largest_node(problem)
    for _ in range(rounds):
        row: Row = np.concatenate([times * weights, np.zeros(len(problem.links))])
        labels = network.cheapest(row)
        found.add(labels)
        occupied = amounts(problem, labels)[: len(times)] * times
        bound = max(bound, float(occupied @ weights) * _EXACT)
        if not occupied.any():
            break
        weights *= np.exp(_STEP * occupied / occupied.max())
        weights /= weights.sum()
    for labels in sorted(found, key=lambda labels: _rank(problem, labels))[:_ORDERS]:
        found.update(_prefix_along(problem, labels))
    best = min(found, key=lambda labels: _rank(problem, labels))
    slowest = max(stages(problem, best))
    bound = slowest if _is_chain(problem) else min(bound, slowest)
    return Pipeline(best, slowest, cost(problem, best), stages(problem, best), bound)


def _rank(problem: Problem, labels: Labels) -> tuple[float, float, Labels]:
    return max(stages(problem, labels)), cost(problem, labels), labels


def _prefix_along(problem: Problem, labels: Labels) -> Iterator[Labels]:
    """The best prefix of the order that has the tiers of `labels` one after the other; `labels` is one of those."""
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
    found = best_prefix(
        replace(
            problem,
            seconds=tuple(tuple(row[v] for v in order) for row in problem.seconds),
            tensors=tuple(tensors),
            pins={place[v]: pin for v, pin in problem.pins.items()},
            names=(),
        )
    )
    if found is not None:
        yield tuple(found[place[v]] for v in range(problem.nodes))


def _largest_node(problem: Problem) -> float:
    """Some tier takes the node that is slow wherever it runs."""
    return float(np.where(np.array(problem.allowed), np.array(problem.seconds), np.inf).min(axis=0).max())


def _is_chain(problem: Problem) -> bool:
    """Whether every node reads the one before it, so that every allowed division is a prefix."""
    joined = {(t.producer, v) for t in problem.tensors for v in t.consumers}
    return all((v, v + 1) in joined for v in range(problem.nodes - 1))
