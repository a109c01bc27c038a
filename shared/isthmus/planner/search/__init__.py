"""Which tier runs which node: costs as plain data, and searches over them. It touches no device and no network.

`isthmus.planner.search.from_graph` makes problems of models, and imports what `isthmus.graph` imports.
"""

from isthmus.planner.search.division import Labels, Tally, cost, is_allowed, lowest, tally
from isthmus.planner.search.problem import Link, Problem, Tensor
from isthmus.planner.search.solve import Assignment, assignment, solve
from isthmus.planner.search.sweep import Piece, sweep, with_speed
from isthmus.planner.search.throughput import Pipeline, pipeline, stages

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
