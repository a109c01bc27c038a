"""The map of where splitting pays: the best candidate by edge slowdown and bandwidth, as predicted.

The edge's slowdown decides more than the round trip: a fast edge needs no cloud, a slow one only the link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions, Objective
from isthmus.artifacts.plan import Candidate, Plan
from isthmus_tools.planner.choice import MAP_RATES, VALUES, over_link, violations

SLOWDOWNS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""From an edge like the cloud to a small board beside a server."""
REGIONS = ("edge", "cloud", "split")


@dataclass(frozen=True)
class RegionCell:
    """The best candidate for an edge and a link, its kind and its predicted value; "" where none is admissible.

    `other` is the best candidate of another kind, `lead` how much worse it is, as a share: 0.1 is a tenth. None without
    another.
    """

    slowdown: float
    conditions: Conditions
    region: str
    best: str
    seconds: float
    lead: float | None = None
    other: str = ""

    def document(self) -> dict[str, Any]:
        """This cell, JSON-ready."""
        return {
            "edge_slowdown": self.slowdown,
            "bandwidth_bps": self.conditions.up_bps,
            "region": self.region,
            "best": self.best,
            "seconds": self.seconds,
            "lead": self.lead,
            "other": self.other,
        }


@dataclass(frozen=True)
class RegionMap:
    """Cells by slowdown and bandwidth at one round trip; `planned` is the slowdown of the plan's own edge.

    Slowdowns are those of the edge over the cloud where `over_cloud`, else over the plan's edge. `objective` is latency
    or throughput: the plan has no prices for other edges.
    """

    objective: Objective
    rtt_s: float
    planned: float
    uplink_bps: float
    over_cloud: bool
    cells: tuple[tuple[RegionCell, ...], ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of cells in each region."""
        every = [cell.region for row in self.cells for cell in row]
        return {region: every.count(region) for region in REGIONS}

    def requested(self) -> RegionCell | None:
        """The cell nearest to the plan's edge and link; None for an unlimited link."""
        if math.isinf(self.uplink_bps):
            return None

        def distance(cell: RegionCell) -> float:
            # In factors: 2 is as far from 1 as 1 from a half.
            rate = math.log(cell.conditions.up_bps / self.uplink_bps)
            return math.hypot(rate, math.log(cell.slowdown / self.planned))

        return min((cell for row in self.cells for cell in row), key=distance)

    def document(self) -> dict[str, Any]:
        """The map, JSON-ready; the requested bandwidth is null where it is unlimited."""
        return {
            "objective": self.objective,
            "rtt_s": self.rtt_s,
            "slowdown_over": "cloud" if self.over_cloud else "planned edge",
            "requested": {
                "edge_slowdown": self.planned,
                "bandwidth_bps": None if math.isinf(self.uplink_bps) else self.uplink_bps,
            },
            "cells": [cell.document() for row in self.cells for cell in row],
        }


def region_map(
    plan: Plan,
    *,
    planned: float | None = None,
    slowdowns: Sequence[float] = SLOWDOWNS,
    rates: Sequence[float] = MAP_RATES,
) -> RegionMap:
    """The map of a plan's candidates at the plan's round trip, with a row for each slowdown.

    `planned` is how many times slower than the cloud the plan's edge is, as far as that is known without its profiles.

    The downlink keeps its ratio to the uplink. All values are predictions; the cuts are those of the plan.
    """
    # Cost and energy need the price file, which a published plan does not hold.
    objective = plan.objective if plan.objective in ("latency", "throughput") else "latency"
    # Refused by no constraint, and so everywhere: it failed, or too few of its predictions agree.
    usable = [replace(c, measured=None) for c in plan.candidates if not c.refused or violations(c, plan.constraints)]
    # Without cloud-only, as under a private depth, nothing tells how fast the cloud is.
    ratio = planned or planned_slowdown(plan.candidates)
    planned = 1.0 if ratio is None else ratio
    link = plan.conditions
    down_share = 1.0 if math.isinf(link.up_bps) or math.isinf(link.down_bps) else link.down_bps / link.up_bps

    def cell(slowdown: float, rate: float) -> RegionCell:
        conditions = Conditions(rate, rate * down_share, link.rtt_s)
        moved = [slower_edge(over_link(c, conditions), slowdown / planned) for c in usable]
        value = VALUES[objective]
        admissible = sorted((c for c in moved if not violations(c, plan.constraints)), key=value)
        if not admissible:
            return RegionCell(slowdown, conditions, "", "", 0.0)
        best = admissible[0]
        other = next((c for c in admissible if c.kind != best.kind), None)
        lead = None if other is None or not value(best) else value(other) / value(best) - 1
        return RegionCell(slowdown, conditions, best.kind, best.name, value(best), lead, other.name if other else "")

    rows = tuple(tuple(cell(slowdown, rate) for rate in rates) for slowdown in slowdowns)
    return RegionMap(objective, link.rtt_s, planned, link.up_bps, ratio is not None, rows)


def cell_candidates(plan: Plan, regions: RegionMap, cell: RegionCell) -> list[Candidate]:
    """The cell's best candidate and the best of another kind, predicted for the cell's edge and link."""
    by_name = {c.name: replace(c, measured=None) for c in plan.candidates}
    both = [by_name[name] for name in (cell.best, cell.other) if name]
    factor = cell.slowdown / regions.planned
    return [replace(slower_edge(over_link(c, cell.conditions), factor), refused="") for c in both]


def planned_slowdown(candidates: Sequence[Candidate]) -> float | None:
    """How many times longer the plan's edge runs the whole model than the cloud; None without either of the two."""
    plain = (c for c in candidates if c.kind == "edge" and c.variant is None and not c.head)
    edge = next((c.predicted.edge_run for c in plain), 0.0)
    cloud = next((c.predicted.cloud_run for c in candidates if c.kind == "cloud"), 0.0)
    return edge / cloud if edge > 0 and cloud > 0 else None


def slower_edge(candidate: Candidate, factor: float) -> Candidate:
    """`candidate` with the prediction for an edge that takes `factor` times as long for all of its work."""
    t = candidate.predicted
    # The call itself is HTTP and frames, on the same slow CPU.
    slowed = replace(
        t,
        preprocess=t.preprocess * factor,
        edge_run=t.edge_run * factor,
        edge_hop=t.edge_hop * factor,
        pack=t.pack * factor,
    )
    return replace(candidate, predicted=slowed)
