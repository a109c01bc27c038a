"""The figure of a plan: bytes and times along the graph, candidates over bandwidth, the map of where splitting pays.

Backgrounds are transparent and all colours middle tones, readable on white and on black.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.artifacts.profile import Profile
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import ModelError
from isthmus.registry import Registry, Resolved, SegmentCache
from isthmus.units import format_duration, format_rate
from isthmus_tools.figures.style import bytes_axis, new_figure, save, size_text
from isthmus_tools.graph import cuts, open_model, stored_examples
from isthmus_tools.graph.model import Model
from isthmus_tools.planner.candidates import CLOUD, EDGE, CandidateSet
from isthmus_tools.planner.choice import over_link
from isthmus_tools.planner.regions import RegionCell, RegionMap
from isthmus_tools.profiling import profiles

_INK, _FAINT = "#7d8590", "#8b949e"
_EDGE, _CLOUD, _BYTES, _BEST = "#d1682f", "#3f8fd2", "#2f9e6e", "#c24a8f"
_HUES = ("#3f8fd2", "#d1682f", "#2f9e6e", "#c24a8f", "#8f74d6", "#b08a1f", "#2a9fa8", "#c75151", "#6f9a2f", "#9a7b5f")
_DPI = 130
# Characters that a cell of the sweep holds in a line.
_MAX_CELL_TEXT = 11
# Ends of the bandwidth panel in bit/s: from a poor mobile link to a local network.
_RATES = (0.3e6, 1e9)


@dataclass(frozen=True)
class GraphCurves:
    """Curves over the prefix cuts of a graph: bytes of boundary tensors, and seconds up to the cut on both tiers.

    `marked` are the positions of the bundle's cuts.
    """

    positions: tuple[int, ...]
    bytes: tuple[int, ...]
    edge_s: tuple[float, ...]
    cloud_s: tuple[float, ...]
    marked: Mapping[str, int]

    @classmethod
    def of(cls, candidates: CandidateSet) -> GraphCurves:
        """The curves of a candidate set, before its plan is published."""
        return _curves(candidates.model, candidates.profiles, candidates.bundle)

    @classmethod
    def published(cls, plan: Plan, version: Resolved, registry: Registry, cache: SegmentCache) -> GraphCurves:
        """The curves of a published plan; a tier whose profile has been removed has zero times."""
        bundle = version.bundle
        stored = {p.tier: profiles.find(registry, bundle, p.tier, p.device) for p in plan.profiles}
        with cache.locate(version.digest, WHOLE) as whole:
            bind, examples = bundle.source.get("bind", {}), stored_examples(bundle)
            model = open_model(whole.path, bind=bind, examples=examples, normalise=False)
        return _curves(model, {tier: p for tier, p in stored.items() if p is not None}, bundle)


def _curves(model: Model, by_tier: Mapping[str, Profile], bundle: Bundle) -> GraphCurves:
    every = [(c.position, c.bytes) for c in cuts(model) if c.position is not None]
    positions, sizes = tuple(p for p, _ in every), tuple(size for _, size in every)

    def seconds(tier: str) -> tuple[float, ...]:
        times = np.cumsum(by_tier[tier].nodes) if tier in by_tier else np.zeros(len(model.nodes))
        return tuple(float(times[i]) for i in positions)

    marked = {name: cut.position for name, cut in bundle.cuts.items() if cut.position is not None}
    return GraphCurves(positions, sizes, seconds(EDGE), seconds(CLOUD), marked)


def draw(plan: Plan, regions: RegionMap, path: Path, curves: GraphCurves) -> None:
    """Draw `plan` to `path`, as PNG or SVG by its suffix: the graph, the candidates over bandwidth, and the map.

    Raises:
        ModelError: the file cannot be written, or matplotlib is missing.
    """
    panels = [bool(curves.positions), True, True]
    figure = new_figure(ModelError, figsize=(10, 4.1 * sum(panels)))
    import matplotlib as mpl

    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        "axes.titlecolor": _INK,
        "svg.fonttype": "none",
        # Element ids are hashes; a fixed salt makes equal plans equal files.
        "svg.hashsalt": "isthmus",
        "font.size": 9.5,
    }
    with mpl.rc_context(style):
        axes = iter(np.atleast_1d(figure.subplots(sum(panels), 1)))
        if curves.positions:
            _draw_graph(next(axes), plan, curves)
        hues = _hues(plan, regions)
        _draw_bandwidth(next(axes), plan, hues)
        _draw_regions(next(axes), regions, hues)
        save(figure, path, path.suffix[1:].lower(), ModelError, dpi=_DPI, transparent=True)


def _draw_graph(axes: Any, plan: Plan, curves: GraphCurves) -> None:
    axes.step(curves.positions, [max(1, b) for b in curves.bytes], where="mid", color=_BYTES, linewidth=1.2)
    names = {c.cuts[0] for c in plan.candidates if c.cuts and c.cuts[0] in curves.marked}
    sizes = dict(zip(curves.positions, curves.bytes, strict=True))
    spots = [(curves.marked[name], name) for name in names if curves.marked[name] in sizes]
    axes.scatter([x for x, _ in spots], [max(1, sizes[x]) for x, _ in spots], s=26, color=_BYTES, zorder=3)
    for x, name in spots:
        best = name in plan.choice.cuts
        axes.annotate(
            f"{name}: {size_text(sizes[x])}" if best else name,
            (x, max(1, sizes[x])),
            xytext=(0, -15 if best else 7),
            textcoords="offset points",
            ha="center",
            fontsize=9 if best else 7.5,
            fontweight="bold" if best else "normal",
            color=_BEST if best else _INK,
        )
        if best:
            axes.scatter([x], [max(1, sizes[x])], s=80, color=_BEST, zorder=4)
    bytes_axis(axes)
    axes.set_ylabel("bytes of boundary tensors, raw", color=_BYTES)
    axes.set_xlabel("cut after node (position in topological order)")
    axes.grid(axis="y", color=_FAINT, alpha=0.25)
    time = axes.twinx()
    for seconds, colour, label in ((curves.edge_s, _EDGE, "edge"), (curves.cloud_s, _CLOUD, "cloud")):
        if any(seconds):
            time.plot(
                curves.positions, [s * 1e3 for s in seconds], color=colour, linewidth=1.5, label=f"time on the {label}"
            )
    time.legend(frameon=False, fontsize=8.5, loc="upper center", ncols=2, labelcolor=_INK)
    time.set_ylabel("run time up to the cut, ms")
    time.set_ylim(0, time.get_ylim()[1] * 1.12)
    axes.set_title(f"{plan.model}: boundary tensors and run time along the graph; candidates marked", loc="left")


def _draw_bandwidth(axes: Any, plan: Plan, hues: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    usable = [c for c in plan.candidates if not c.refused]
    rates = np.geomspace(*_RATES, 160)
    rtt_s = plan.conditions.rtt_s
    lines = {c.name: np.array([_seconds(c, rate, rtt_s) for rate in rates]) * 1e3 for c in usable}
    # The lower envelope: the best candidate at each bandwidth.
    lowest = np.min(list(lines.values()), axis=0)
    for name, line in lines.items():
        if name not in hues:
            axes.plot(rates / 1e6, line, color=_FAINT, linewidth=0.6, alpha=0.45)
    for name, colour in hues.items():
        if name in lines:
            axes.plot(rates / 1e6, lines[name], color=colour, linewidth=1.6, label=name)
    axes.plot(rates / 1e6, lowest, color=_INK, linewidth=4, alpha=0.35, label="the lowest", zorder=1)
    if np.isfinite(plan.conditions.up_bps):
        at = plan.conditions.up_bps / 1e6
        axes.axvline(at, color=_INK, linestyle=":", linewidth=1)
        for c in usable:
            if c.measured is not None:
                axes.scatter([at], [c.measured.median * 1e3], color=hues.get(c.name, _FAINT), s=26, zorder=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Slow candidates at low bandwidth would squeeze the curves that compete.
    axes.set_ylim(lowest.min() * 0.8, lowest.max() * 12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("bandwidth, Mbit/s")
    axes.set_ylabel("one request, ms")
    axes.grid(color=_FAINT, alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right", labelcolor=_INK)
    dots = "; dots are measured" if plan.measured else ""
    axes.set_title(f"candidates over bandwidth as predicted, {format_duration(rtt_s)} of round trip{dots}", loc="left")


def _draw_regions(axes: Any, regions: RegionMap, hues: Mapping[str, str]) -> None:
    from matplotlib.colors import ListedColormap

    cells = regions.cells
    names = list(dict.fromkeys(cell.best for row in cells for cell in row))
    index = np.array([[names.index(cell.best) for cell in row] for row in cells])
    colours = ListedColormap([hues.get(name, _FAINT) for name in names])
    axes.imshow(index, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", origin="lower")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            # The cells are opaque, so white is readable in dark and light schemes.
            axes.text(x, y, _cell_text(cell), ha="center", va="center", fontsize=6.8, color="white", fontweight="bold")
    axes.set_xticks(range(len(cells[0])), [format_rate(c.conditions.up_bps) for c in cells[0]], fontsize=8)
    axes.set_yticks(range(len(cells)), [f"{row[0].slowdown:g}×" for row in cells])
    axes.set_ylabel("edge slower than the cloud" if regions.over_cloud else "slower than the planned edge")
    if np.isfinite(regions.uplink_bps):
        rates, slowdowns = [c.conditions.up_bps for c in cells[0]], [row[0].slowdown for row in cells]
        at_x, at_y = (
            float(np.interp(np.log(at), np.log(ticks), np.arange(len(ticks))))
            for at, ticks in ((regions.uplink_bps, rates), (regions.planned, slowdowns))
        )
        # Open, so that the cell's text stays readable below.
        axes.scatter([at_x], [at_y], s=2600, facecolors="none", edgecolors="white", linewidths=2.2, zorder=5)
    counts = ", ".join(f"{region} {count}" for region, count in regions.counts.items())
    axes.set_title(
        f"where splitting pays at {format_duration(regions.rtt_s)} of round trip, predicted {regions.objective};"
        f" cells: {counts}; ring: this plan",
        fontsize=10,
        loc="left",
    )


def _cell_text(cell: RegionCell) -> str:
    if not cell.region:
        return "none"
    name = cell.best.removeprefix(f"{cell.region}-")
    if len(name) > _MAX_CELL_TEXT:
        name = name.replace("-", "\n", 1)
    return f"{cell.region}\n{name}\n{cell.seconds * 1e3:.0f} ms"


def _seconds(candidate: Candidate, rate: float, rtt_s: float) -> float:
    return over_link(candidate, Conditions(rate, rate, rtt_s)).predicted.total


def _hues(plan: Plan, regions: RegionMap) -> dict[str, str]:
    """A colour for each candidate in the legend: the chosen candidate, winners in some cell, and baselines."""
    wins: dict[str, int] = {}
    for cell in (cell for row in regions.cells for cell in row):
        wins[cell.best] = wins.get(cell.best, 0) + 1
    # Most wins first: the palette's first hues are the most distinct.
    winners = sorted((n for n in wins if n), key=lambda n: -wins[n])
    usable = {c.name for c in plan.candidates if not c.refused}
    baselines = [n for n in ("edge-float", "cloud-photo", "cloud-raw") if n in usable]
    legend = dict.fromkeys([plan.chosen, *winners, *baselines])
    return dict(zip(legend, _HUES, strict=False))
