"""Which tier runs which node: costs as plain data, and exact searches over them. No device and no network is touched."""

from isthmus.planner.problem import Labels, Link, Problem, Tally, Tensor, cost, is_allowed, lowest, tally
from isthmus.planner.search import Assignment, assignment, solve
from isthmus.planner.sweep import Piece, sweep, with_speed
from isthmus.planner.throughput import Pipeline, pipeline, stages

__all__ = [
    "Assignment",
    "Labels",
    "Link",
    "Pipeline",
    "Piece",
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
