"""Which tier runs which node: costs as plain data, and searches over them. It touches no device and no network.

`isthmus_tools.planner.search.from_graph` makes problems of models, and imports what `isthmus_tools.graph` imports.
"""

from isthmus_tools.planner.search.division import Labels, Tally, cost, is_allowed, lowest, tally
from isthmus_tools.planner.search.problem import Link, Problem, Tensor
from isthmus_tools.planner.search.solve import Assignment, assignment, solve
from isthmus_tools.planner.search.sweep import Piece, sweep, with_speed
from isthmus_tools.planner.search.throughput import Pipeline, pipeline, stages

__all__ = [
    "Assignment",
    "Labels",
    "Link",
    "Piece",
    "Pipeline",
    "Problem",
    "Tally",
    "Tensor",
    "assignment",
    "cost",
    "is_allowed",
    "lowest",
    "pipeline",
    "solve",
    "stages",
    "sweep",
    "tally",
    "with_speed",
]
