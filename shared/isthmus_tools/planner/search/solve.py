"""The fastest division of one request's work among tiers, exactly, by one minimum cut."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus_tools.planner.search.division import Labels, cost, tally
from isthmus_tools.planner.search.network import Network, prices
from isthmus_tools.planner.search.problem import Problem


@dataclass(frozen=True)
class Assignment:
    """One division: the tier of each node, the seconds of one request, and what crosses each boundary, each way.

    Tensors are indices into `Problem.tensors`. `up` are those that climb, `down` those on their way to the caller, or
    from a caller above.
    """

    labels: Labels
    seconds: float
    up: tuple[tuple[int, ...], ...]
    down: tuple[tuple[int, ...], ...]


def assignment(problem: Problem, labels: Labels) -> Assignment:
    """`labels` with what they cost.

    Raises:
        ProblemMalformed: not one label a node, or no tier of that number.
    """
    found = tally(problem, labels)
    return Assignment(labels, cost(problem, labels), found.up, found.down)


def solve(problem: Problem) -> Assignment:
    """The division of least `cost` over all that are allowed; of equal ones, each node on its earliest tier of any.

    Exact for any number of tiers, since every term is a cut (see `arcs`), fixed seconds included; times are counted in
    units of at most 1e-14 of the answer's (see `Network.cheapest`).

    Raises:
        Infeasible: no division is allowed; names the node for which no tier is left.
    """
    return assignment(problem, Network(problem).cheapest(prices(problem)))
