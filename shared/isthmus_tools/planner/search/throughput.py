"""The divisions of a graph that together serve the most requests a second, by column generation.

Two tiers and the two directions of a link work on different requests at once, so requests divided over several
divisions may serve more than any division alone. The linear programme over all divisions has exponentially many
columns, of which few matter: solved over those found so far, its prices say what each resource is worth, and the
cheapest division at these prices, a minimum cut, is the only one that can raise the rate. Where it costs no less than
the divisions in use, the rate is optimal over all divisions of the graph, prefix or not. Fixed seconds delay a request
but occupy nothing.

Source: Ford and Fulkerson, A Suggested Computation for Maximal Multi-Commodity Network Flows, 1958.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from isthmus.errors import ProblemMalformed
from isthmus.routing.demand import Demand
from isthmus.routing.mix import Resources, joint_capacity
from isthmus_tools.planner.search.min_cut import MinCut, Row, amounts, prices
from isthmus_tools.planner.search.problem import Labels, Problem

ALL_SECONDS = Resources(1.0, 1.0, 1.0, 1.0)
"""A tier computes one request at a time; a direction of the link sends one after the other."""
# Prices improve in a handful of rounds; each adds a division, so that the search ends by itself.
_MAX_ROUNDS = 100
# Minimum cuts count in whole units.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class MixedDivisions:
    """The divisions in use and their shares; `rate` is requests a second, of all divisions of the graph the highest."""

    divisions: tuple[Labels, ...]
    shares: tuple[float, ...]
    rate: float


def stage_seconds(problem: Problem, labels: Labels) -> Resources:
    """Seconds for which one request occupies each tier and each direction of the link.

    Raises:
        ProblemMalformed: the number of labels is not the number of nodes, or a label is no tier.
    """
    edge, cloud, up, down, _ = amounts(problem, labels) * prices(problem)
    # An input that is never sent may be infinitely large.
    return Resources(*(0.0 if math.isnan(s) else float(s) for s in (edge, up, down, cloud)))


def best_mix(problem: Problem) -> MixedDivisions:
    """The divisions that together serve the most requests a second.

    Raises:
        Infeasible: no division is allowed.
        ProblemMalformed: more or fewer than two tiers.
    """
    if problem.tiers != 2:
        raise ProblemMalformed(f"requests share the stages of two tiers, and here are {problem.tiers}")
    minimum, worth = MinCut(problem), Resources(1.0, 1.0, 1.0, 1.0)
    found: list[Labels] = []
    while True:
        labels = minimum.cheapest(_row(problem, worth))
        seconds = stage_seconds(problem, labels)
        is_better = sum(w * s for w, s in zip(worth, seconds, strict=True)) < 1 - _TOLERANCE
        if found and (labels in found or not is_better or len(found) >= _MAX_ROUNDS):
            break
        found.append(labels)
        mix = joint_capacity([Demand(*stage_seconds(problem, each)) for each in found], ALL_SECONDS)
        if math.isinf(mix.rate):
            break
        worth = mix.prices
    used = [i for i, share in enumerate(mix.shares) if share > _TOLERANCE]
    return MixedDivisions(tuple(found[i] for i in used), tuple(mix.shares[i] for i in used), mix.rate)


def _row(problem: Problem, worth: Resources) -> Row:
    """The price of each kind of amount at the worth of a second of each resource."""
    row: Row = prices(problem) * np.array([worth.edge, worth.cloud, worth.uplink, worth.downlink, 0.0])
    return row
