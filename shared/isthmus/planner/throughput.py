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

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isthmus.planner.network import Network, Row, amounts, prices
from isthmus.planner.problem import Labels, Problem, cost, lowest, tally

Floats = npt.NDArray[np.float64]
_STEP = 4.0


@dataclass(frozen=True)
class Pipeline:
    """A division as a pipeline: seconds of its slowest stage, of one request alone, and of each stage.

    No allowed division has a slowest stage below `bound`; where `bound` is `slowest`, this one is optimal.
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

    `rounds` minimum cuts raise the bound and look for divisions that are no prefix. A cut under stage weights that sum
    to 1 costs no more than any division's slowest stage, so each of them bounds all; weights shift to the stages that
    were slow.

    Raises:
        Infeasible: no division is allowed.
    """
    network = Network(problem)
    found = {lowest(problem), *best_prefixes(problem)}
    times = prices(problem)[: -len(problem.links)]
    weights, bound, scale = np.full(len(times), 1 / len(times)), 0.0, 0.0
    for _ in range(rounds):
        row: Row = np.concatenate([times * weights, np.zeros(len(problem.links))])
        labels = network.cheapest(row)
        occupied = amounts(problem, labels)[: len(times)] * times
        bound = max(bound, float(occupied @ weights))
        found.add(labels)
        scale = max(scale, float(occupied.max()))
        if scale == 0:
            break
        weights = weights * np.exp(_STEP * occupied / scale)
        weights /= weights.sum()
    ranked = sorted((max(stages(problem, x)), cost(problem, x), x) for x in found)
    slowest, seconds, labels = ranked[0]
    return Pipeline(labels, slowest, seconds, stages(problem, labels), min(bound, slowest))
