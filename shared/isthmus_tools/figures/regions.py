"""The map of where splitting pays: the best candidate by edge slowdown and bandwidth, its time, and the plan's cell."""

from __future__ import annotations

import os
import textwrap
from typing import Any

import numpy as np

from isthmus.artifacts.plan import Plan
from isthmus.units import format_duration, format_rate
from isthmus_tools.figures.plan import constraints_text, hues_of
from isthmus_tools.figures.style import INK, headline, new_figure, save, settle, style
from isthmus_tools.planner.regions import REGIONS, RegionCell, RegionMap

# Of a cell's side; the rest separates the cells.
_SIDE, _FRAME_SIDE = 0.96, 0.84
# Characters of a cut that fit in a cell.
_MAX_CUT = 10
# Of a legend of two columns.
_LEGEND_WIDTH = 48


def draw(plan: Plan, regions: RegionMap, path: str | os.PathLike[str] | None = None) -> bytes:
    """The map in the format of the suffix of `path`, else PNG; also written to `path` if given.

    Raises:
        ModelError: another suffix, the file cannot be written, or matplotlib is missing.
    """
    with style():
        return save(build(plan, regions), path)


def build(plan: Plan, regions: RegionMap) -> Any:
    """The figure; the cell nearest to the plan's edge and link is framed."""
    cells = regions.cells
    figure = new_figure(8, 1.9 + 0.5 * len(cells))
    axes = figure.add_subplot()
    wins = {cell.best for row in cells for cell in row}
    hues = hues_of(c for c in plan.candidates if c.name in wins)
    cuts = {c.name: c.cuts for c in plan.candidates}
    requested = regions.requested()
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            cut = f"cut {'/'.join(cuts[cell.best])}" if cuts.get(cell.best) else ""
            # A long name of a cut stands in the legend alone.
            cut = cut if len(cut) <= _MAX_CUT else ""
            _draw_cell(axes, (x, y), cell, hues.get(cell.best, INK), cut, is_requested=cell is requested)
    axes.set_xlim(-0.5, len(cells[0]) - 0.5)
    axes.set_ylim(-0.5, len(cells) - 0.5)
    axes.set_xticks(range(len(cells[0])), [format_rate(c.conditions.up_bps).removesuffix("bit/s") for c in cells[0]])
    axes.set_yticks(range(len(cells)), [f"{row[0].slowdown:g}×" for row in cells])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("bandwidth to the cloud, bit/s")
    axes.set_ylabel("edge slower than the " + ("cloud" if regions.over_cloud else "plan's edge"))
    _legend(figure, plan, regions, hues)
    counts = [f"{region} {count}" for region, count in regions.counts.items()]
    headline(
        figure,
        f"{plan.model}: where splitting pays",
        f"cells: predicted {regions.objective} of the best in ms, at {format_duration(regions.rtt_s)} of round trip; "
        f"{', '.join(counts)} of {len(cells) * len(cells[0])}",
        constraints_text(plan),
        _requested_text(regions),
    )
    settle(figure)
    return figure


def _requested_text(regions: RegionMap) -> str:
    if not np.isfinite(regions.uplink_bps):
        return "this plan's link is unlimited"
    over = "the cloud" if regions.over_cloud else "its edge"
    return (
        f"framed: nearest to this plan, {format_rate(regions.uplink_bps)} and {regions.planned:.3g} times slower than"
        f" {over}"
    )


def _draw_cell(axes: Any, at: tuple[int, int], cell: RegionCell, colour: str, cuts: str, *, is_requested: bool) -> None:
    axes.add_patch(_square(at, _SIDE, facecolor=colour, edgecolor="none"))
    # The cells are opaque, so white is readable in light and dark schemes.
    lines = [(f"{cell.seconds * 1e3:.0f}" if cell.region else "none", 9.0, "bold"), (cuts, 7.5, "normal")]
    offsets = (0.16, -0.2) if cuts else (0.0, 0.0)
    for (text, size, weight), offset in zip(lines, offsets, strict=True):
        spot = (at[0], at[1] + offset)
        axes.text(*spot, text, ha="center", va="center", color="#ffffff", fontsize=size, fontweight=weight)
    if is_requested:
        axes.add_patch(_square(at, _FRAME_SIDE, fill=False, edgecolor="#ffffff", linewidth=2.2, gid="requested"))


def _square(at: tuple[int, int], side: float, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((at[0] - side / 2, at[1] - side / 2), side, side, **options)


def _legend(figure: Any, plan: Plan, regions: RegionMap, hues: dict[str, str]) -> None:
    """A patch for each colour, with the names of its candidates."""
    from matplotlib.patches import Patch

    kinds = {c.name: c.kind for c in plan.candidates}
    by_colour: dict[str, list[str]] = {}
    # In the order of the regions.
    for name, colour in sorted(hues.items(), key=lambda hue: REGIONS.index(kinds[hue[0]])):
        by_colour.setdefault(colour, []).append(name)
    patches = [
        Patch(color=colour, label=textwrap.fill(f"{kinds[names[0]]}: {', '.join(names)}", _LEGEND_WIDTH))
        for colour, names in by_colour.items()
    ]
    if any(not cell.region for row in regions.cells for cell in row):
        patches.append(Patch(color=INK, label="no candidate meets the constraints"))
    figure.legend(handles=patches, loc="outside lower left", ncols=2)
