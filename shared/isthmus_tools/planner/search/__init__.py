"""Graph partitioning over tiers: costs as plain data and exact searches, without any device or network.

`isthmus_tools.planner.search.from_graph` builds problems of models, and imports `isthmus_tools.graph`.
"""

from isthmus_tools.planner.search.latency import Assignment, Piece, assignment, solve, sweep, with_speed
from isthmus_tools.planner.search.problem import (
    Labels,
    LinkTimes,
    Problem,
    Tensor,
    Usage,
    cost,
    earliest_tiers,
    is_allowed,
    usage,
)

__all__ = [
    "Assignment",
    "Labels",
    "LinkTimes",
    "Piece",
    "Problem",
    "Tensor",
    "Usage",
    "assignment",
    "cost",
    "earliest_tiers",
    "is_allowed",
    "solve",
    "sweep",
    "usage",
    "with_speed",
]
