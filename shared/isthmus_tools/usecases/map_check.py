"""Cells of the map of where splitting pays, measured on the functions to check what the map predicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from isthmus.artifacts.conditions import Objective
from isthmus.artifacts.plan import Candidate
from isthmus.errors import RequestMalformed
from isthmus_tools.planner.choice import VALUES
from isthmus_tools.planner.regions import REGIONS, RegionCell, RegionMap, cell_candidates
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.functions import measure_over_link
from isthmus_tools.usecases.plan import PlanRequest, PlanResult

# Interleaved requests of each candidate: the two of a cell near a border differ by little.
_ROUNDS = 7


@dataclass(frozen=True)
class CheckedCell:
    """A cell with its best candidate and the best of another kind, each with its prediction there and a measurement.

    A candidate that failed has no measurement.
    """

    cell: RegionCell
    objective: Objective
    candidates: tuple[Candidate, ...]

    @property
    def measured_best(self) -> str:
        """The candidate that was measured best; "" without a measurement of all."""
        if any(c.measured is None for c in self.candidates):
            return ""
        return min(self.candidates, key=VALUES[self.objective]).name

    @property
    def as_predicted(self) -> bool:
        """Whether the predicted best is the measured best."""
        return self.measured_best == self.cell.best

    @property
    def gaps(self) -> list[float]:
        """Measured over predicted, minus 1, of each measured candidate's latency."""
        return [c.relative_gap for c in self.candidates if c.relative_gap is not None]

    def document(self) -> dict[str, Any]:
        """This cell, JSON-ready."""
        return {
            "edge_slowdown": self.cell.slowdown,
            "bandwidth_bps": self.cell.conditions.up_bps,
            "best": self.cell.best,
            "measured_best": self.measured_best,
            "candidates": [
                {
                    "name": c.name,
                    "predicted_s": c.predicted.total,
                    "measured_s": None if c.measured is None else c.measured.median,
                }
                for c in self.candidates
            ],
        }


def cells_to_check(regions: RegionMap, count: int) -> list[RegionCell]:
    """The requested cell, then by turns cells at borders, where the lead is least, and the centre of each region."""
    able = [cell for row in regions.cells for cell in row if cell.lead is not None]
    borders = sorted(able, key=lambda cell: cell.lead or 0.0)
    centres = [
        max((c for c in able if c.region == region), key=lambda cell: cell.lead or 0.0, default=None)
        for region in REGIONS
    ]
    turns = [cell for pair in itertools.zip_longest(borders, centres) for cell in pair if cell is not None]
    requested = regions.requested()
    first = [requested] if requested in able and requested is not None else []
    # By identity: cells are no dictionary keys.
    unique = {id(cell): cell for cell in (*first, *turns)}
    return list(unique.values())[:count]


def check_map(
    request: PlanRequest, result: PlanResult, regions: RegionMap, count: int, progress: Progress = silent
) -> Sequence[CheckedCell]:
    """Measure the best candidate of `count` cells and the best of another kind, each cell with its edge and link.

    After the request's budget no further cell begins.

    Raises:
        RequestMalformed: without the functions of a slow edge, whose CPU time is known.
        HopError, RegistryError: a function or the registry cannot be reached.
    """
    functions = request.functions
    if functions is None or not functions.edge.pids:
        raise RequestMalformed("cells are measured on a slow edge of this machine: --local --edge-slowdown N")
    candidates = result.graph_candidates
    digest = candidates.stage(result.registry)
    checked: list[CheckedCell] = []
    cells = cells_to_check(regions, count)
    for i, cell in enumerate(cells):
        if request.budget.spent:
            break
        progress("measuring cells of the map", i, len(cells))
        measured = measure_over_link(
            replace(functions, edge=replace(functions.edge, slowdown=cell.slowdown)),
            cell_candidates(result.plan, regions, cell),
            digest,
            candidates.bundle,
            candidates.inputs,
            result.registry,
            cell.conditions,
            constraints=request.constraints,
            rounds=_ROUNDS,
            eliminate=False,
        )
        checked.append(CheckedCell(cell, regions.objective, measured))
    return checked
